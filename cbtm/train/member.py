"""The members of a run: seed, dense, experts, experts on random clusters, and averages of the experts.

All members that are trained start from the seed, take the same number of steps and differ only in their data and in
their share of the batch: with k clusters an expert takes 1/k of the sequences of a step, so that k experts together
see as many tokens as the dense model (Gururangan et al. 2023, section 3). An average is one model that is made of
the experts' parameters without any training.
"""

import re
from dataclasses import dataclass
from typing import Literal

from cbtm.errors import ConfigError

Kind = Literal["seed", "dense", "expert", "random", "average"]
_RECIPE = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Member:
    """One model of a run.

    Attributes:
        kind: What it is trained on: everything (seed, dense), a found cluster, or a random one; or that it is an
            average of the experts.
        cluster: Its cluster, for an expert of either kind.
        recipe: How an average is made (`cbtm.merge.average`).
    """

    kind: Kind
    cluster: int | None = None
    recipe: str | None = None

    @property
    def name(self) -> str:
        """Name in paths and in the tracker: seed, dense, cluster-00003, random-00003, average-uniform."""
        if self.recipe is not None:
            return f"{self.kind}-{self.recipe}"
        if self.cluster is None:
            return self.kind
        return f"{'cluster' if self.kind == 'expert' else 'random'}-{self.cluster:05d}"

    @classmethod
    def parse(cls, name: str) -> "Member":
        """Inverse of `name`.

        Raises:
            ConfigError: If it is no member's name.
        """
        stem, _, number = name.partition("-")
        if name in ("seed", "dense"):
            return cls("seed" if name == "seed" else "dense")
        if stem in ("cluster", "random") and number.isdecimal():
            return cls("expert" if stem == "cluster" else "random", int(number))
        if stem == "average" and _RECIPE.fullmatch(number):
            return cls("average", recipe=number)
        raise ConfigError(
            f"{name!r} is no member of a run; expected seed, dense, cluster-00000 …, random-00000 … or "
            "average-uniform …"
        )
