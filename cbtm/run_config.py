"""Everything about a run as one configuration: its sections, and what must agree between them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cbtm import storage
from cbtm.branch.tokenizer import TokenizerConfig
from cbtm.cluster.assigner import AssignConfig
from cbtm.cluster.config import ClusterConfig
from cbtm.compare_config import CompareConfig
from cbtm.config import Config, apply_overrides, parse_text, read_file
from cbtm.corpus import CorpusConfig
from cbtm.errors import ConfigError
from cbtm.merge.average import AverageConfig
from cbtm.merge.config import EvaluateConfig, RoutingConfig
from cbtm.merge.scorer import ScoreConfig
from cbtm.merge.tasks import TaskConfig
from cbtm.tracking import TrackingConfig
from cbtm.train.config import OptimizationConfig, SeedConfig, TrainConfig
from cbtm.train.member import Member

CONFIG_FILE = "config.json"
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The arithmetic of the code released with c-BTM: the squared distance squared once more, documents cut to one
    # context, no BOS, the first token unscored, weights that do not see the token before the predicted one.
    "reference": {
        "score": {"separator": False, "max_tokens": 2049, "stride": None, "top_k": None},
        "routing": {"lag": 1, "refresh": 1, "context_ratio": 1.0},
        "evaluate": {"temperatures": [0.1], "distance_powers": [4]},
    }
}


class RunConfig(Config):
    """Everything about a run.

    Attributes:
        name: Name of the run in the tracker.
        root: Folder or s3:// prefix that receives everything the run makes.
        extends: Folder or s3:// prefix of a finished run that this one adds a domain to: its tokenizer, seed, dense
            model and experts are taken over where they lie, and `corpus` is the text of the added domain alone.
        corpus: The text.
        tokenizer: The tokenizer.
        cluster: How domains are found.
        assign: How documents are assigned to them.
        seed_model: The model that all others start from.
        train: How experts and baselines are trained.
        preset: reference sets score, routing and evaluate to the arithmetic of the code released with c-BTM, so that
            its figures can be compared; None sets nothing.
        average: Which averages of the experts' parameters are made: one model from many.
        score: How validation tokens are scored.
        routing: From which part of the text before a token the experts' weights come.
        evaluate: Which ensembles are compared.
        tasks: Few-shot classification tasks that every model and ensemble answers.
        tracking: The MLflow tracking server.
        compare: What `cbtm compare` makes of this configuration; a run by itself takes no notice of it.
        shared: Root of a run whose tokenizer, seed model and held-out tokens are taken, with what the seed gives those;
            for runs that differ in the rest, and are compared.
    """

    name: str = Field(default="cbtm", min_length=1)
    root: str
    extends: str | None = Field(default=None, min_length=1)
    shared: str | None = None
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    cluster: ClusterConfig = ClusterConfig()
    assign: AssignConfig = AssignConfig()
    seed_model: SeedConfig
    train: TrainConfig = TrainConfig()
    preset: Literal["reference"] | None = None
    average: AverageConfig = AverageConfig()
    score: ScoreConfig = ScoreConfig()
    routing: RoutingConfig = RoutingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tasks: tuple[TaskConfig, ...] = ()
    tracking: TrackingConfig = TrackingConfig()
    compare: CompareConfig = CompareConfig()

    @field_validator("root")
    @classmethod
    def _root_is_named(cls, root: str) -> str:
        if not root.strip() or root == "/":
            raise ValueError(f"root={root!r} names no folder of its own")
        return root.rstrip("/")

    def check(self) -> None:
        """Check what spans several sections.

        Raises:
            ConfigError: If the batch does not divide among the clusters or the devices, several machines have no root
                in S3, train.clusters names one that there is not, a top-k is larger than the number of experts, a
                setting needs scores that are not made, two tasks have one name, the random-cluster experts have no
                random clusters, or a run that extends another asks for what cannot be extended.
        """
        self._check_devices("train", self.train.share(self.cluster.n_clusters), self.train)
        training = self.seed_model.training
        if training is not None:
            self._check_devices("seed_model.training", training.sequences_per_step, training)
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
        self._check_evaluation()
        if self.extends is not None:
            self._check_extension(self.extends.rstrip("/"))
        if self.train.random_clusters and not self.assign.random_clusters:
            raise ConfigError("train.random_clusters needs assign.random_clusters=true, which deals the documents")

    def _check_extension(self, base: str) -> None:
        if f"{self.root}/".startswith(f"{base}/"):
            raise ConfigError(
                f"root={self.root} is extends={base} or lies in it, and nothing is written there; give the extended "
                "run a root of its own"
            )
        if self.shared is not None:
            raise ConfigError(
                f"shared={self.shared} with extends={base}: tokenizer and seed model are those of the extended run; "
                "leave shared out"
            )
        given = [name for name in ("path", "assignments", "labels") if getattr(self.cluster, name) is not None]
        if given:
            raise ConfigError(
                f"cluster.{given[0]} with extends={base}: the clusterer is that run's with one more centre; leave out "
                "one of the two"
            )
        if self.train.random_clusters:
            raise ConfigError(
                f"train.random_clusters with extends={base}: the added text was not dealt to random clusters with the "
                "others; set train.random_clusters=false"
            )
        if self.train.steps_by != "equal":
            raise ConfigError(
                f"train.steps_by={self.train.steps_by} with extends={base}: steps in proportion to the tokens of all "
                "clusters would change those of the experts that are there; use steps_by=equal"
            )
        if self.train.cluster_token:
            raise ConfigError(
                f"train.cluster_token with extends={base}: the vocabulary of the experts that are there has no token "
                "for another cluster; train all of them again, without extends"
            )

    def check_shared(self, other: "RunConfig") -> None:
        """Refuse a run to share with that has other text, or makes something else of it.

        Raises:
            ConfigError: If it has.
        """
        if other.shared is not None:
            raise ConfigError(f"shared={self.shared} itself takes from {other.shared}; name that one")
        for name in ("corpus", "tokenizer", "seed_model", "score", "tasks"):
            if getattr(self, name) != getattr(other, name):
                raise ConfigError(f"shared={self.shared} has another section {name}; use the same, or leave shared out")
        for section, field in (("train", "context_length"), ("assign", "max_groups")):
            mine, others = (getattr(getattr(config, section), field) for config in (self, other))
            if mine != others:
                raise ConfigError(
                    f"shared={self.shared} has {section}.{field}={others}, this run {mine}; use the same, or leave "
                    "shared out"
                )

    def _check_devices(self, section: str, sequences: int, training: OptimizationConfig) -> None:
        devices, nodes = training.devices, training.nodes
        if sequences % (nodes * devices):
            several = f" on each of {section}.nodes={nodes}" if nodes > 1 else ""
            raise ConfigError(
                f"{section}.devices={devices}{several}: the {sequences} sequences of a model's step do not divide "
                f"among them; use a divisor of {sequences}, or other sequences_per_step"
            )
        if nodes > 1 and not storage.is_s3(self.root):
            raise ConfigError(
                f"{section}.nodes={nodes} machines share nothing but an object store, and root={self.root} is none; "
                "use an s3:// root"
            )

    def _check_evaluation(self) -> None:
        trained, top_k = self.trained_clusters, self.score.top_k
        if top_k is not None and top_k > len(trained):
            raise ConfigError(f"score.top_k={top_k} is above the number of experts, {len(trained)}; leave it out")
        mixed = self.evaluate.experts_of(trained)
        if top_k is not None and mixed != trained:
            raise ConfigError(
                f"evaluate.experts with score.top_k={top_k}: each token is scored under its nearest experts only, "
                "which may be among those left out; leave out one of the two"
            )
        if top_k is not None and "greedy" in self.average.averages:
            raise ConfigError(
                f"average.averages has greedy, which orders the experts by their scores on all documents, and "
                f"score.top_k={top_k} does not make those; leave out one of the two"
            )
        self.evaluate.settings(len(mixed), n_clusters=self.cluster.n_clusters, scored_top_k=top_k)
        names = [task.name for task in self.tasks]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two tasks have the name {doubled[0]!r}; give each a name of its own")

    @property
    def trained_clusters(self) -> list[int]:
        """Clusters that an expert is trained for, in ascending order."""
        return list(self.train.trained_clusters(self.cluster.n_clusters))

    @property
    def averages(self) -> list[Member]:
        """Averages of the experts' parameters that are made once those are trained."""
        return [Member("average", recipe=recipe) for recipe in self.average.averages]

    @property
    def members(self) -> list[Member]:
        """Members that are trained from the seed, the longest job first."""
        clusters = self.trained_clusters
        members = [Member("dense")] if self.train.dense else []
        members += [Member("expert", cluster) for cluster in clusters]
        if self.train.random_clusters:
            members += [Member("random", cluster) for cluster in clusters]
        return members


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read, override and check a run's configuration file."""
    return _checked(apply_overrides(read_file(path), overrides or []), str(path))


@dataclass(frozen=True)
class PlaceOverrides:
    """What the place of a run knows better than its configuration; None keeps what the configuration says.

    Attributes:
        root: Folder or s3:// prefix that receives the run.
        tracking_uri: Address of the MLflow server.
        price_per_hour: Price of one device for an hour, as text.
        more: Further values, each as section.key=value.
    """

    root: str | None = None
    tracking_uri: str | None = None
    price_per_hour: str | None = None
    more: tuple[str, ...] = ()

    def apply(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the values of a configuration with these in it.

        Raises:
            ConfigError: If one of `more` is no override, or goes through something that is not a section.
        """
        found = apply_overrides(values, self.more, option="overrides")
        if self.root is not None:
            found["root"] = self.root
        if self.tracking_uri is not None:
            found["tracking"] = {**(found.get("tracking") or {}), "uri": self.tracking_uri}
        if self.price_per_hour is not None:
            found["train"] = {**(found.get("train") or {}), "price_per_hour": self.price_per_hour}
            seed = found.get("seed_model") or {}
            if seed.get("training"):
                found["seed_model"] = {**seed, "training": {**seed["training"], "price_per_hour": self.price_per_hour}}
        return found


def parse_config(text: str, place: PlaceOverrides | None = None) -> RunConfig:
    """Check a run's configuration given as YAML or JSON text, as the pipeline passes it, for a place."""
    values = parse_text(text, source="config")
    return _checked(place.apply(values) if place else values, "config")


def demo_config(
    root: str, corpus: str, train_split: str, validation_split: str, overrides: list[str], *, name: str = "demo"
) -> RunConfig:
    """Configuration of the demo, or of the comparison (`compare`), which come with the package, on one corpus."""
    text = resources.files("cbtm").joinpath(f"configs/{name}.yaml").read_text(encoding="utf-8")
    values = parse_text(text, source=f"{name}.yaml")
    values |= {
        "root": root,
        "corpus": {"root": corpus, "train_split": train_split, "validation_split": validation_split},
    }
    return _checked(apply_overrides(values, overrides), f"{name}.yaml")


def recorded_config(root: str) -> RunConfig:
    """Configuration under which the run below `root` was last planned.

    Raises:
        StorageError: If there is no run.
    """
    return parse_config(storage.read_bytes(storage.join(root, CONFIG_FILE)).decode())


def _checked(values: Mapping[str, Any], source: str) -> RunConfig:
    config = RunConfig.parse(_with_preset(values, source), source=source)
    config.check()
    return config


def _with_preset(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values with what their preset sets; a value of their own that differs from it is refused."""
    name, found = values.get("preset"), dict(values)
    if name not in PRESETS:
        return found
    for section, settings in PRESETS[name].items():
        own = dict(found.get(section) or {})
        for key, value in settings.items():
            if json.loads(json.dumps(own.setdefault(key, value))) != json.loads(json.dumps(value)):
                raise ConfigError(
                    f"{source}: preset={name} sets {section}.{key}={value}, but the configuration says {own[key]}; "
                    "remove one of them"
                )
        found[section] = own
    return found
