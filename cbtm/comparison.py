"""A comparison: runs that differ in one thing each, on one text, from one seed model, at equal training tokens.

The runs are ordinary ones, *arms*, each with a root of its own below that of the comparison, which holds what they
share: tokenizer, seed model, held-out tokens and the seed's scores of them (`cbtm.run.Run.shared`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from cbtm import storage
from cbtm.config import digest_of
from cbtm.errors import ConfigError
from cbtm.manifest import StageSpec
from cbtm.run import Run
from cbtm.run_config import RunConfig, parse_config

COMPARISON_FILE, COMPARISON_REPORT_FILE, COMPARISON_TABLE_FILE = "comparison.json", "comparison.html", "comparison.csv"

ArmKind = Literal["dense", "small-batch", "small-batch-scaled", "clusters", "plain", "tokens"]
_NAME = re.compile(r"(dense|small-batch|small-batch-scaled|clusters|plain|tokens)-k(\d+)-s(\d+)")
_PER_STEP = ("steps", "warmup_steps", "checkpoint_every", "log_every")


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
        kind: dense is one model with the whole batch; small-batch one model with the batch of one of k experts, and k
            times the steps, small-batch-scaled the same at a learning rate for that batch; clusters are k balanced
            clusters, with as many random ones beside them; plain are those of k-means without balance; tokens are
            balanced by tokens in the place of documents.
        n_clusters: k; of dense 1.
        random_state: Added to the random states of clusters, random clusters and training.
    """

    kind: ArmKind
    n_clusters: int
    random_state: int

    @property
    def name(self) -> str:
        """Name in paths and in the tracker, such as clusters-k8-s0."""
        return f"{self.kind}-k{self.n_clusters}-s{self.random_state}"

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Inverse of `name`.

        Raises:
            ConfigError: If it is no arm's name.
        """
        if (found := _NAME.fullmatch(name)) is None:
            raise ConfigError(f"{name!r} is no arm of a comparison; expected such as dense-k1-s0 or clusters-k8-s0")
        kind: Any = found[1]
        return cls(kind, int(found[2]), int(found[3]))


class Comparison:
    """The runs of a comparison.

    Args:
        config: The configuration that all arms are made of; its root is that of the comparison.

    Raises:
        ConfigError: If an arm cannot be, with its name and the reason.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.shared is not None:
            raise ConfigError(f"shared={config.shared}: a comparison has what is shared below its own root; remove it")
        if config.score.top_k is not None:
            raise ConfigError(f"score.top_k={config.score.top_k}: arms have several k; leave it out")
        self.config = config
        for arm in self.arms:
            try:
                self.arm_config(arm)
            except ConfigError as error:
                raise ConfigError(f"arm {arm.name}: {error}") from None

    @classmethod
    def parse(cls, text: str) -> "Comparison":
        """Comparison of a configuration given as YAML or JSON text."""
        return cls(parse_config(text))

    @cached_property
    def arms(self) -> list[Arm]:
        """All arms, those of one long training first."""
        compare = self.config.compare
        kinds: dict[ArmKind, Sequence[int]] = {
            "dense": (1,),
            "small-batch": compare.controls(compare.small_batch),
            "small-batch-scaled": compare.controls(compare.small_batch) if compare.scaled_learning_rate else (),
            "clusters": sorted(compare.n_clusters, reverse=True),
            "plain": compare.controls(compare.plain),
            "tokens": compare.controls(compare.by_tokens),
        }
        return [Arm(kind, k, state) for kind, ks in kinds.items() for k in ks for state in compare.random_states]

    @cached_property
    def shared(self) -> Run:
        """The run of what all arms share; no expert of it is trained."""
        return Run(
            _changed(self.config, {"cluster": _ONE_CLUSTER, "train": _NO_BASELINES, "average": {"averages": []}})
        )

    def arm_config(self, arm: Arm) -> RunConfig:
        """Configuration of one arm.

        Raises:
            ConfigError: If it cannot be, as where the batch does not divide among the experts.
        """
        config = self.config
        cluster: dict[str, Any] = {"random_state": config.cluster.random_state + arm.random_state}
        train: dict[str, Any] = {"random_state": config.train.random_state + arm.random_state, **_NO_BASELINES}
        if arm.kind in ("dense", "small-batch", "small-batch-scaled"):
            cluster |= _ONE_CLUSTER
        else:
            cluster |= {"n_clusters": arm.n_clusters}
        if arm.kind == "small-batch":
            train |= _small_batch(config, arm.n_clusters)
        elif arm.kind == "small-batch-scaled":
            train |= _small_batch(config, arm.n_clusters)
            train["learning_rate"] = config.train.learning_rate / math.sqrt(arm.n_clusters)
        elif arm.kind == "clusters":
            train["random_clusters"] = config.compare.random_clusters
        elif arm.kind == "plain":
            cluster["backend"] = "sklearn"
        elif arm.kind == "tokens":
            cluster["balance"] = "tokens"
        return _changed(
            config,
            {
                "name": f"{config.name}/{arm.name}",
                "root": storage.join(config.root, "arms", arm.name),
                "shared": config.root,
                "cluster": cluster,
                "assign": {"random_state": config.assign.random_state + arm.random_state},
                "train": train,
                "average": {"averages": []},
                "evaluate": {"top_k": None},
            },
        )

    def run(self, arm: Arm) -> Run:
        """The run of one arm."""
        return Run(self.arm_config(arm))

    def spec(self) -> StageSpec:
        """Identity of the comparison's result."""
        inputs = {}
        for arm in self.arms:
            run = self.run(arm)
            inputs[arm.name] = run.load(run.evaluate_spec()).digest
        evaluate = self.config.evaluate
        settings = [self.config.compare.digest(), evaluate.bootstrap_resamples, evaluate.random_state]
        return StageSpec("compare", self.config.root, digest_of(settings), inputs)


_ONE_CLUSTER: dict[str, Any] = {"n_clusters": 1, "backend": "balanced", "balance": "documents"}
_NO_BASELINES: dict[str, Any] = {"dense": False, "random_clusters": False}


def _small_batch(config: RunConfig, k: int) -> dict[str, Any]:
    """Settings of a training with 1/k of the batch and k times the steps: as many tokens, in as many epochs."""
    train = config.train
    changed: dict[str, Any] = {name: getattr(train, name) * k for name in _PER_STEP}
    if train.validate_every is not None:
        changed["validate_every"] = train.validate_every * k
    changed["sequences_per_step"] = train.share(k)
    if train.micro_batch_size is not None:
        changed["micro_batch_size"] = min(train.micro_batch_size, changed["sequences_per_step"])
    return changed


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    found = RunConfig.parse(values, source="config")
    found.check()
    return found
