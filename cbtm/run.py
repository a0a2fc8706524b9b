"""A run: one configuration, one folder or s3:// prefix, and the identity of everything that lies there.

This is the one place that knows where a run's files lie and what depends on what; `cbtm.stages` does the work.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.branch.tokenizer import TokenizerConfig
from cbtm.cluster.assigner import LEARNED, RANDOM, AssignConfig, token_shard
from cbtm.cluster.clusterer import DECIDING_FILES
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fixed import FixedAssignments
from cbtm.cluster.labels import labels_digest
from cbtm.config import Config, apply_overrides, digest_of, parse_text, read_file
from cbtm.corpus import CorpusConfig, Document, ReadCounts, read_files
from cbtm.errors import ConfigError, ManifestError
from cbtm.manifest import Manifest, StageSpec
from cbtm.merge.evaluator import EvaluateConfig
from cbtm.merge.scorer import ScoreConfig
from cbtm.plan import Part, Plan, make_plan
from cbtm.tokens import TokenDocuments
from cbtm.tracking import TrackingConfig
from cbtm.train.config import SeedConfig, TrainConfig
from cbtm.train.member import Member

RESULT_FILE, REPORT_FILE, CONFIG_FILE = "result.json", "report.html", "config.json"


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
            ConfigError: If the batch does not divide among the clusters, a top-k is larger than their number, or
                the random-cluster experts have no random clusters.
        """
        self.train.share(self.cluster.n_clusters)
        training = self.seed_model.training
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
        self.evaluate.top_k_values(self.cluster.n_clusters)
        if self.train.random_clusters and not self.assign.random_clusters:
            raise ConfigError("train.random_clusters needs assign.random_clusters=true, which deals the documents")

    @property
    def members(self) -> list[Member]:
        """Members that are trained from the seed, the longest job first."""
        clusters = range(self.cluster.n_clusters)
        members = [Member("dense")] if self.train.dense else []
        members += [Member("expert", cluster) for cluster in clusters]
        if self.train.random_clusters:
            members += [Member("random", cluster) for cluster in clusters]
        return members


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


class Run:
    """Files of one run and their identities.

    Args:
        config: A checked configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Run of a configuration given as YAML or JSON text."""
        return cls(parse_config(text))

    # --- where things lie ---

    def uri(self, *parts: str) -> str:
        """URI below the run's root."""
        return storage.join(self.config.root, *parts)

    def member_root(self, member: Member) -> str:
        """Folder of a trained model."""
        return self.uri("seed") if member.kind == "seed" else self.uri("experts", member.name)

    @property
    def key(self) -> str:
        """Identity of the run in the tracker: same root, same settings, same text."""
        settings = self.config.model_dump(mode="json", exclude={"tracking", "name"})
        return digest_of([settings, self.plan_made.digest("train"), self.plan_made.digest("validation")])

    # --- plan ---

    @cached_property
    def plan_made(self) -> Plan:
        """The plan, as `plan` wrote it.

        Raises:
            ManifestError: If the run has not been planned.
        """
        plan = self._read_plan()
        if plan is None:
            raise ManifestError(f"{self.uri('plan.json')} is not there: run cbtm plan, or the whole run, first")
        return plan

    def make_plan(self) -> Plan:
        """List the corpus and write plan.json, if it changed."""
        previous = self._read_plan()
        plan = make_plan(self.config.corpus, max_groups=self.config.assign.max_groups, previous=previous)
        if plan != previous:
            storage.write_bytes(self.uri("plan.json"), plan.model_dump_json(indent=1).encode())
        self.__dict__["plan_made"] = plan
        return plan

    def _read_plan(self) -> Plan | None:
        uri = self.uri("plan.json")
        if not storage.exists(uri):
            return None
        try:
            return Plan.model_validate_json(storage.read_bytes(uri))
        except ValidationError:
            raise ManifestError(f"{uri} is damaged or of another version; remove it, it is made again") from None

    # --- identity of every output ---

    def tokenizer_spec(self) -> StageSpec:
        """Identity of the tokenizer."""
        config, seed = self.config.tokenizer, self.config.seed_model
        given = config.path or seed.path
        # A given tokenizer is known by its files, a trained one by its text.
        source = _folder_digest(given) if given else self.plan_made.digest("train")
        return StageSpec("tokenizer", self.uri("tokenizer"), config.digest(), {"source": source})

    def cluster_spec(self) -> StageSpec:
        """Identity of the clusterer."""
        config = self.config.cluster
        inputs = {"corpus": self.plan_made.digest("train")}
        if config.path is not None:
            inputs["given"] = _folder_digest(config.path, "a clusterer folder")
        if (fixed := self.fixed_assignments) is not None:
            inputs["assignments"] = fixed.digest(self.paths("train"))
        if config.labels is not None:
            inputs["labels"] = labels_digest(config.labels, self.paths("train"))
        if config.needs_tokens:
            inputs["tokenizer"] = self.load(self.tokenizer_spec()).digest
        return StageSpec("cluster", self.uri("clusterer"), config.digest(), inputs)

    @property
    def clusterer_digest(self) -> str:
        """Identity of what decides where a document belongs, without what only describes the domains.

        So known labels or more examples for the report train no expert again.
        """
        made = self.load(self.cluster_spec())
        deciding = [[file.path, file.sha256] for file in made.files if file.path in DECIDING_FILES]
        return digest_of([deciding, made.inputs.get("assignments")])

    def assign_spec(self, group: str) -> StageSpec:
        """Identity of one shard group's assignment and token shards."""
        inputs = {
            "corpus": self.plan_made.group(group).digest,
            "clusterer": self.clusterer_digest,
            "tokenizer": self.load(self.tokenizer_spec()).digest,
        }
        digest = digest_of(self.config.assign.model_dump(mode="json", exclude={"max_groups", "processes"}))
        return StageSpec("assign", self.config.root, digest, inputs, f"manifests/assign/{group}.json")

    def train_spec(self, member: Member) -> StageSpec:
        """Identity of one member."""
        seed, settings = self.config.seed_model, self.config.train.optimization()
        if member.kind == "seed":
            if seed.path is not None:
                return StageSpec("seed", self.uri("seed"), seed.digest(), {"source": _folder_digest(seed.path)})
            inputs = self._assigned("train")
            return StageSpec("seed", self.uri("seed"), self._scratch_digest(), inputs)
        digest = digest_of([member.name, settings.result_digest(), self.share(member)])
        inputs = {**self._assigned("train"), "seed": self.load(self.train_spec(Member("seed"))).digest}
        return StageSpec("train", self.member_root(member), digest, inputs)

    def _scratch_digest(self) -> str:
        seed = self.config.seed_model
        assert seed.scratch is not None  # a seed model has either a path, or a shape with its training
        assert seed.training is not None
        return digest_of([seed.scratch.digest(), seed.training.result_digest()])

    def score_spec(self, member: Member) -> StageSpec:
        """Identity of one member's scores."""
        digest = digest_of([self.config.score.digest(), self.config.train.context_length])
        inputs = {**self._assigned("validation"), "model": self.load(self.train_spec(member)).digest}
        return StageSpec("score", self.uri("scores", member.name), digest, inputs)

    def evaluate_spec(self) -> StageSpec:
        """Identity of the result."""
        inputs = {
            f"scores/{member.name}": self.load(self.score_spec(member)).digest
            for member in (Member("seed"), *self.config.members)
        }
        inputs |= {"clusterer": self.load(self.cluster_spec()).digest, **self._assigned("validation")}
        return StageSpec("evaluate", self.config.root, self.config.evaluate.digest(), inputs)

    def _assigned(self, part: Part) -> dict[str, str]:
        return {group.name: self.load(self.assign_spec(group.name)).digest for group in self.plan_made.part(part)}

    def share(self, member: Member) -> int:
        """Sequences of one member in one step."""
        if member.cluster is None:
            return self.config.train.sequences_per_step
        return self.config.train.share(self.config.cluster.n_clusters)

    # --- reading what stages made ---

    def load(self, spec: StageSpec) -> Manifest:
        """Manifest of an output that is to be there.

        Raises:
            ManifestError: If it is not there, or belongs to another configuration or other inputs.
        """
        found = self._cache.get(spec.manifest_uri) or manifests.load(spec.manifest_uri)
        if found.config_digest != spec.config_digest or found.inputs != dict(spec.inputs):
            raise ManifestError(
                f"{spec.manifest_uri} belongs to another configuration or other inputs; run stage {spec.stage} again"
            )
        self._cache[spec.manifest_uri] = found
        return found

    @cached_property
    def _cache(self) -> dict[str, Manifest]:
        return {}

    def fetch(self, spec: StageSpec, scratch: Path) -> Path:
        """Bring a stage's whole output to this machine, checked."""
        found = self.load(spec)
        return manifests.fetch(spec.root, found, found.paths(), scratch / spec.stage)

    def train_documents(self, member: Member, scratch: Path) -> TokenDocuments:
        """Token stream that a member is trained on: its own cluster, or all of them."""
        clusters = range(self.config.cluster.n_clusters) if member.cluster is None else [member.cluster]
        partition = RANDOM if member.kind == "random" else LEARNED
        return self._token_documents("train", partition, clusters, scratch)[0]

    def validation_documents(self, scratch: Path) -> tuple[TokenDocuments, np.ndarray[Any, np.dtype[np.int64]]]:
        """Validation documents, and the nearest cluster of each, shape (n_documents,)."""
        return self._token_documents("validation", LEARNED, range(self.config.cluster.n_clusters), scratch)

    def _token_documents(
        self, part: Part, partition: str, clusters: Sequence[int], scratch: Path
    ) -> tuple[TokenDocuments, np.ndarray[Any, np.dtype[np.int64]]]:
        shards, numbers = [], []
        for cluster in clusters:
            for group in self.plan_made.part(part):
                spec = self.assign_spec(group.name)
                found = self.load(spec)
                folder, stem = token_shard(partition, group.split, cluster, group.name)
                paths = found.paths(f"{folder}/{stem}.")
                local = manifests.fetch(spec.root, found, paths, scratch / "tokens")
                shards.append((local / folder, stem))
                counts = found.metadata["clusters"][partition][cluster]
                numbers.append(np.full(counts["documents"], cluster, dtype=np.int64))
        return TokenDocuments(shards), np.concatenate(numbers)

    @property
    def fixed_assignments(self) -> FixedAssignments | None:
        """The clusters that the user gave the training documents, if so."""
        root = self.config.cluster.assignments
        return None if root is None else FixedAssignments(root, n_clusters=self.config.cluster.n_clusters)

    def paths(self, part: Part) -> list[str]:
        """Corpus files of one part, relative to the corpus root."""
        return [path for group in self.plan_made.part(part) for path in group.paths]

    def documents(self, part: Part, counts: ReadCounts | None = None) -> Iterator[Document]:
        """Stream the text of one part of the corpus."""
        corpus = self.config.corpus
        return read_files(
            corpus.root,
            self.paths(part),
            max_bad_lines=corpus.max_bad_lines,
            counts=counts if counts is not None else ReadCounts(),
        )

    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        values: dict[str, Any] = json.loads(storage.read_bytes(self.uri(RESULT_FILE)))
        return values


@cache
def _folder_digest(uri: str, expected: str = "a Hugging Face folder") -> str:
    """Identity of a given folder's content: sha256 of local files, ETags in S3."""
    files = storage.list_files(uri)
    if not files:
        raise ConfigError(f"{uri} is empty or not there; expected {expected}")
    local = not storage.is_s3(uri)
    return digest_of(
        [[file.path, storage.sha256(storage.join(uri, file.path)) if local else file.version] for file in files]
    )
