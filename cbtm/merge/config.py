"""Settings of routing and evaluation; free of torch, so that a configuration can be checked where torch is not."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from cbtm.config import Config
from cbtm.errors import ConfigError
from cbtm.merge.grid import EnsembleType, Setting

# What does not look at a token's experts beyond the nearest few, and so can do without the scores of the others.
_SPARSE: tuple[EnsembleType, ...] = ("clustering",)
_ALL: tuple[EnsembleType, ...] = (
    *("clustering", "product_of_experts", "bayes", "posterior", "uniform", "prior"),
    "oracle",
)


class RoutingConfig(Config):
    """From which part of the text before a token the weights of the experts come.

    Attributes:
        lag: Tokens just before the predicted one that the router does not see: 0 takes all there is, 1 is the
            reference implementation, which leaves out the last.
        refresh: Tokens between two estimates of the weights: 1 makes new ones for every token; once takes those at the
            end of the document's prompt (of an empty text, where there is none) for the whole document.
        context_ratio: Part of a document after which its weights stay as they are; 1 is never.
    """

    lag: int = Field(default=0, ge=0)
    refresh: Annotated[int, Field(ge=1)] | Literal["once"] = 1
    context_ratio: float = Field(default=1.0, gt=0, le=1)


class EvaluateConfig(Config):
    """Which ensembles are compared.

    Attributes:
        ensembles: Kinds of ensembles: clustering (the paper's), product_of_experts and bayes (which weigh by the
            probability that an expert gave to the token before), posterior (to all tokens before), uniform, prior (the
            mean routing weights), oracle (the best expert of each document, a bound). None takes all of them, and with
            score.top_k clustering alone.
        temperatures: Temperatures of the routing weights.
        distance_powers: Exponents of the distance: 2 in the paper, 4 in the reference code.
        top_k: Experts kept at each token; None takes all, half of them, and so on down to one.
        experts: Clusters whose experts are mixed, to see what adding or removing a domain does; None takes all that
            were trained.
        bootstrap_resamples: Resamples of documents behind each 95 % interval.
        random_state: Seed of the resampling.
        threads: CPU threads; None takes all cores. Results do not depend on it.
    """

    ensembles: Annotated[tuple[EnsembleType, ...], Field(min_length=1)] | None = None
    temperatures: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    distance_powers: tuple[float, ...] = (2, 4)
    top_k: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    experts: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    bootstrap_resamples: int = Field(default=1000, ge=100)
    random_state: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)

    @field_validator("temperatures", "distance_powers")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(np.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"expected one or more numbers above 0, got {list(values)}")
        return values

    @field_validator("ensembles")
    @classmethod
    def _with_clustering(cls, kinds: tuple[EnsembleType, ...] | None) -> tuple[EnsembleType, ...] | None:
        # The paper's ensemble is what the report, the prior and generation take their settings from.
        if kinds is not None and "clustering" not in kinds:
            raise ValueError(f"{list(kinds)} lacks clustering, which the result is about; add it")
        return kinds

    @field_validator("experts")
    @classmethod
    def _experts_once(cls, clusters: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if clusters is not None and (len(set(clusters)) < len(clusters) or min(clusters) < 0):
            raise ValueError(f"expected clusters from 0 on, each once, got {list(clusters)}")
        return clusters

    def experts_of(self, trained: list[int]) -> list[int]:
        """Clusters whose experts are mixed, in ascending order.

        Args:
            trained: Clusters whose experts were trained.

        Raises:
            ConfigError: If one of `experts` was not trained.
        """
        if self.experts is None:
            return trained
        missing = sorted(set(self.experts) - set(trained))
        if missing:
            raise ConfigError(
                f"evaluate.experts names cluster {missing[0]}, which has no expert; trained are {_shown(trained)}"
            )
        return sorted(self.experts)

    def kinds(self, scored_top_k: int | None = None) -> tuple[EnsembleType, ...]:
        """The kinds of ensembles that are compared.

        Args:
            scored_top_k: Experts that were scored at each token; None is all.

        Raises:
            ConfigError: If one needs scores that were not made.
        """
        if self.ensembles is None:
            return _ALL if scored_top_k is None else _SPARSE
        needs_all = [kind for kind in self.ensembles if kind not in _SPARSE]
        if scored_top_k is not None and needs_all:
            raise ConfigError(
                f"evaluate.ensembles has {needs_all[0]}, which looks at every expert, but score.top_k={scored_top_k} "
                "scores each only where it is near; leave one of them out"
            )
        return self.ensembles

    def top_k_values(
        self, n_experts: int, *, n_clusters: int | None = None, scored_top_k: int | None = None
    ) -> list[int]:
        """The top-k settings for so many experts, largest first.

        Args:
            n_experts: Experts that are mixed.
            n_clusters: Clusters that there are, where these may be more.
            scored_top_k: Experts that were scored at each token; None is all.

        Raises:
            ConfigError: If one is not in [1, n_experts], or above `scored_top_k`.
        """
        if self.top_k is None:
            values = [min(n_experts, scored_top_k or n_experts)]
            while values[-1] > 1:
                values.append(values[-1] // 2)
            return values
        wrong = [value for value in self.top_k if not 1 <= value <= n_experts]
        if wrong and n_clusters in (None, n_experts):
            raise ConfigError(f"evaluate.top_k={wrong[0]} is not in [1, cluster.n_clusters={n_experts}]")
        if wrong:
            raise ConfigError(
                f"evaluate.top_k={wrong[0]} is not in [1, {n_experts}]: train.clusters or evaluate.experts names "
                f"{n_experts} of cluster.n_clusters={n_clusters} clusters, and there are no more experts"
            )
        if scored_top_k is not None and max(self.top_k) > scored_top_k:
            raise ConfigError(
                f"evaluate.top_k={max(self.top_k)} is above score.top_k={scored_top_k}: tokens are scored under their "
                f"{scored_top_k} nearest experts only"
            )
        return sorted(set(self.top_k), reverse=True)

    def settings(
        self, n_experts: int, *, n_clusters: int | None = None, scored_top_k: int | None = None
    ) -> list[Setting]:
        """Every setting that is compared, clustering first, by top-k from the largest.

        Raises:
            ConfigError: As `kinds` and `top_k_values`.
        """
        top_k = self.top_k_values(n_experts, n_clusters=n_clusters, scored_top_k=scored_top_k)
        settings: list[Setting] = []
        kinds = self.kinds(scored_top_k)
        for kind in sorted(kinds, key=_ALL.index):
            if kind in ("clustering", "product_of_experts"):
                settings += [
                    Setting(kind, count, temperature=temperature, distance_power=power)
                    for count in top_k
                    for power in self.distance_powers
                    for temperature in self.temperatures
                ]
            elif kind in ("bayes", "posterior"):
                settings += [Setting(kind, count) for count in top_k]
            else:
                settings.append(Setting(kind, 1 if kind == "oracle" else n_experts))
        return settings


def _shown(clusters: list[int]) -> str:
    return ", ".join(map(str, clusters[:12])) + (", …" if len(clusters) > 12 else "")
