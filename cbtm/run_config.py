"""Everything about a run as one configuration: its sections, and what must agree between them."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from cbtm import storage
from cbtm.branch.tokenizer import TokenizerConfig
from cbtm.cluster.assigner import AssignConfig
from cbtm.cluster.config import ClusterConfig
from cbtm.config import Config, apply_overrides, parse_text, read_file
from cbtm.corpus import CorpusConfig
from cbtm.errors import ConfigError
from cbtm.merge.evaluator import EvaluateConfig
from cbtm.merge.scorer import ScoreConfig
from cbtm.tracking import TrackingConfig
from cbtm.train.config import SeedConfig, TrainConfig
from cbtm.train.member import Member

CONFIG_FILE = "config.json"


class RunConfig(Config):
    """Everything about a run.

    Attributes:
        name: Name of the run in the tracker.
        root: Folder or s3:// prefix that receives everything the run makes.
        corpus: The text.
        tokenizer: The tokenizer.
        cluster: How domains are found.
        assign: How documents are assigned to them.
        seed_model: The model that all others start from.
        train: How experts and baselines are trained.
        score: How validation tokens are scored.
        evaluate: Which ensembles are compared.
        tracking: The MLflow tracking server.
    """

    name: str = Field(default="cbtm", min_length=1)
    root: str
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    cluster: ClusterConfig = ClusterConfig()
    assign: AssignConfig = AssignConfig()
    seed_model: SeedConfig
    train: TrainConfig = TrainConfig()
    score: ScoreConfig = ScoreConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("root")
    @classmethod
    def _root_is_named(cls, root: str) -> str:
        if not root.strip() or root == "/":
            raise ValueError(f"root={root!r} names no folder of its own")
        return root.rstrip("/")

    def check(self) -> None:
        """Check what spans several sections.

        Raises:
            ConfigError: If the batch does not divide among the clusters, train.clusters names one that there is not,
                a top-k is larger than the number of experts, or the random-cluster experts have no random clusters.
        """
        _check_devices("train", self.train.share(self.cluster.n_clusters), self.train.devices)
        training = self.seed_model.training
        if training is not None:
            _check_devices("seed_model.training", training.sequences_per_step, training.devices)
        if training is not None and training.context_length != self.train.context_length:
            raise ConfigError(
                f"seed_model.training.context_length={training.context_length} differs from "
                f"train.context_length={self.train.context_length}: the experts continue the seed's training"
            )
        stride = self.score.stride
        if stride is not None and stride > self.train.context_length:
            raise ConfigError(
                f"score.stride={stride} is larger than train.context_length={self.train.context_length}: tokens "
                "between two windows would not be scored"
            )
        n_experts = len(self.train.trained_clusters(self.cluster.n_clusters))
        self.evaluate.top_k_values(n_experts, n_clusters=self.cluster.n_clusters)
        if self.train.random_clusters and not self.assign.random_clusters:
            raise ConfigError("train.random_clusters needs assign.random_clusters=true, which deals the documents")

    @property
    def members(self) -> list[Member]:
        """Members that are trained from the seed, the longest job first."""
        clusters = self.train.trained_clusters(self.cluster.n_clusters)
        members = [Member("dense")] if self.train.dense else []
        members += [Member("expert", cluster) for cluster in clusters]
        if self.train.random_clusters:
            members += [Member("random", cluster) for cluster in clusters]
        return members


def _check_devices(section: str, sequences: int, devices: int) -> None:
    if sequences % devices:
        raise ConfigError(
            f"{section}.devices={devices}: the {sequences} sequences of a model's step do not divide among them; use "
            f"a divisor of {sequences}, or other sequences_per_step"
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override and check a run's configuration file."""
    return _checked(apply_overrides(read_file(path), overrides or []), str(path))


def parse_config(text: str) -> RunConfig:
    """Check a run's configuration given as YAML or JSON text, as the pipeline passes it."""
    return _checked(parse_text(text, source="config"), "config")


def demo_config(root: str, corpus: str, train_split: str, validation_split: str, overrides: list[str]) -> RunConfig:
    """Configuration of the demo, which comes with the package, on one corpus."""
    text = resources.files("cbtm").joinpath("configs/demo.yaml").read_text(encoding="utf-8")
    values = parse_text(text, source="demo.yaml")
    values |= {
        "root": root,
        "corpus": {"root": corpus, "train_split": train_split, "validation_split": validation_split},
    }
    return _checked(apply_overrides(values, overrides), "demo.yaml")


def recorded_config(root: str) -> RunConfig:
    """Configuration under which the run below `root` was last planned.

    Raises:
        StorageError: If there is no run.
    """
    return parse_config(storage.read_bytes(storage.join(root, CONFIG_FILE)).decode())


def _checked(values: Mapping[str, Any], source: str) -> RunConfig:
    config = RunConfig.parse(values, source=source)
    config.check()
    return config
