"""A run: one configuration, one folder or s3:// prefix, and the identity of everything that lies there.

This is the one place that knows where a run's files lie and what depends on what; `cbtm.stages` does the work.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.branch.source import folder_digest, source_digest
from cbtm.cluster.assigner import CLUSTERS, HELD_OUT_FORMAT, LEARNED, RANDOM, held_out_shard, token_shard
from cbtm.cluster.clusterer import DECIDING_FILES
from cbtm.cluster.fixed import FixedAssignments
from cbtm.cluster.labels import has_labels, labels_digest
from cbtm.config import digest_of
from cbtm.corpus import Document, ReadCounts, read_files
from cbtm.manifest import Manifest, StageSpec
from cbtm.manifest_cache import ManifestCache
from cbtm.merge.tasks import task_digest
from cbtm.plan import Part, Plan
from cbtm.planned import PlannedRun
from cbtm.run_config import RunConfig, recorded_config
from cbtm.tokens import SHARD_SUFFIXES, TokenDocuments
from cbtm.train.config import OptimizationConfig
from cbtm.train.job import Shard, Shards
from cbtm.train.member import Member

RESULT_FILE, REPORT_FILE, SETTINGS_FILE = "result.json", "report.html", "settings.csv"
DOCUMENTS_FILE = "documents.csv"


class Run(PlannedRun):
    """Files of one run and their identities."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._manifests = ManifestCache(config.root)
        self._digests_assigned: dict[Part, dict[str, str]] = {}

    def make_plan(self) -> Plan:
        """List the corpus and write plan.json, if it changed."""
        plan = super().make_plan()
        self._digests_assigned.clear()
        self.__dict__.pop("_given_to_clusters", None)
        return plan

    # --- where things lie ---

    def member_root(self, member: Member) -> str:
        """Folder of a model."""
        if self.base is not None and self.taken_over(member):
            return self.base.member_root(member)
        if member.kind == "seed":
            return self.owner(member).uri("seed")
        return self.uri("averages" if member.kind == "average" else "experts", member.name)

    def exchange_root(self, member: Member) -> str:
        """What the machines that train a model together and its stage tell each other, while it is trained."""
        return self.uri("nodes", member.name)

    @cached_property
    def shared(self) -> "Run | None":
        """The run that tokenizer, seed model and held-out tokens are taken from, None where they are made here.

        Raises:
            StorageError: If no run is there.
            ConfigError: If it has other text, or another tokenizer, seed model or way of scoring.
        """
        if self.config.shared is None:
            return None
        # Where it lies now: it may have been copied since it wrote down where it lay.
        root = self.config.shared
        found = Run(recorded_config(root).model_copy(update={"root": root}))
        self.config.check_shared(found.config)
        return found

    def owner(self, member: Member) -> "Run":
        """The run that a member belongs to: the seed may be another's."""
        return self.shared or self if member.kind == "seed" else self

    @property
    def key(self) -> str:
        """Identity of the run in the tracker: same root, same settings, same text."""
        settings = self.config.model_dump(mode="json", exclude={"tracking", "name", "compare"})
        return digest_of([settings, self.plan_made.digest("train"), self.plan_made.digest("validation")])

    # --- identity of every output ---

    def tokenizer_spec(self) -> StageSpec:
        """Identity of the tokenizer."""
        if self.base is not None:
            return self.base.tokenizer_spec()
        if self.shared is not None:
            return self.shared.tokenizer_spec()
        config, seed = self.config.tokenizer, self.config.seed_model
        given = config.path or seed.path
        # A given tokenizer is known by its files, a trained one by its text.
        source = source_digest(self.given(given)) if given else self.plan_made.digest("train")
        return StageSpec("tokenizer", self.uri("tokenizer"), config.digest(), {"source": source})

    def cluster_spec(self) -> StageSpec:
        """Identity of the clusterer."""
        config = self.config.cluster
        inputs = {"corpus": self.plan_made.digest("train"), **self._given_to_clusters}
        if self.base is not None:
            inputs["extends"] = self.base.load(self.base.cluster_spec()).digest
        if config.needs_tokens:
            inputs["tokenizer"] = self.load(self.tokenizer_spec()).digest
        return StageSpec("cluster", self.uri("clusterer"), config.digest(), inputs)

    @cached_property
    def _given_to_clusters(self) -> dict[str, str]:
        config, found = self.config.cluster, {}  # found once: it looks at a file for each corpus file
        if config.path is not None:
            found["given"] = folder_digest(config.path, "a clusterer folder")
        if (fixed := self.fixed_assignments) is not None:
            found["assignments"] = fixed.digest(self.paths("train"))
        if config.labels is not None:
            found["labels"] = labels_digest(config.labels, self.paths("train"))
        return found

    @property
    def clusterer_digest(self) -> str:
        """Identity of what decides where a document belongs, without what only describes the domains.

        So known labels or more examples for the report train no expert again.
        """
        made = self.load(self.cluster_spec())
        deciding = [[file.path, file.sha256] for file in made.files if file.path in DECIDING_FILES]
        # Given assignments and an extension say themselves where the training documents go.
        decides = made.inputs.get("assignments") if self.base is None else self.base.clusterer_digest
        return digest_of([deciding, decides])

    def assign_spec(self, group: str) -> StageSpec:
        """Identity of one shard group's assignment and token shards."""
        inputs = {
            "corpus": self.plan_made.group(group).digest,
            "clusterer": self.clusterer_digest,
            "tokenizer": self.load(self.tokenizer_spec()).digest,
        }
        settings: object = self.config.assign.model_dump(mode="json", exclude={"max_groups", "processes"})
        if self.plan_made.group(group).part == "validation":
            settings = [HELD_OUT_FORMAT, settings]
            if self.shared is not None:
                inputs["held_out"] = self.held_out_digest(group)
        return StageSpec("assign", self.config.root, digest_of(settings), inputs, f"manifests/assign/{group}.json")

    def held_out_digest(self, group: str) -> str:
        """Identity of the tokens of one group of held-out documents, whatever clusters these lie in.

        So another clusterer has no model scored again.
        """
        if self.shared is not None:
            return self.shared.held_out_digest(group)
        folder, stem = held_out_shard(self.plan_made.group(group).split, group)
        made = self.load(self.assign_spec(group))
        tokens = [file for file in made.files if file.path.startswith(f"{folder}/{stem}.")]
        return digest_of([[file.path, file.sha256] for file in tokens if not file.path.endswith(CLUSTERS)])

    def train_spec(self, member: Member) -> StageSpec:
        """Identity of one member."""
        if self.base is not None and self.taken_over(member):
            return self.base.train_spec(member)
        seed = self.config.seed_model
        if member.kind == "seed":
            if self.shared is not None:
                return self.shared.train_spec(member)
            if seed.path is not None:
                inputs = {"source": source_digest(self.given(seed.path))}
                return StageSpec("seed", self.uri("seed"), seed.digest(), inputs)
            inputs = self._assigned("train")
            return StageSpec("seed", self.uri("seed"), self._scratch_digest(), inputs)
        if member.kind == "average":
            return self._average_spec(member)
        settings = self.optimization(member)
        digest = digest_of([member.name, settings.result_digest(), self.share(member), self.cluster_tokens(member)])
        inputs = {**self._assigned("train"), "seed": self.load(self.train_spec(Member("seed"))).digest}
        if settings.patience is not None:
            inputs |= self._assigned("validation")
        return StageSpec("train", self.member_root(member), digest, inputs)

    def _average_spec(self, member: Member) -> StageSpec:
        config = self.config
        inputs = {expert.name: self.load(self.train_spec(expert)).digest for expert in self.experts}
        settings: list[object] = [member.name]
        if member.recipe == "weighted":
            inputs |= self._routing_inputs()
            settings += [config.average.weighting_digest(), config.routing.digest(), self._scored_documents()]
        if member.recipe == "greedy":
            inputs |= {f"scores/{one.name}": self.load(self.score_spec(one)).digest for one in self.experts}
        return StageSpec("average", self.member_root(member), digest_of(settings), inputs)

    def _routing_inputs(self) -> dict[str, str]:
        """What the distances of the validation tokens depend on."""
        return {
            **self._assigned("validation"),
            "clusterer": self.clusterer_digest,
            "tokenizer": self.load(self.tokenizer_spec()).digest,
        }

    def _scored_documents(self) -> dict[str, Any]:
        """The settings that say which tokens are scored."""
        return self.config.score.model_dump(mode="json", include={"separator", "max_tokens", "max_documents"})

    def _scratch_digest(self) -> str:
        seed = self.config.seed_model
        assert seed.scratch is not None  # a seed model has either a path, or a shape with its training
        assert seed.training is not None
        return digest_of([seed.scratch.result_digest(), seed.training.result_digest()])

    def score_spec(self, member: Member) -> StageSpec:
        """Identity of one member's scores."""
        config = self.config
        if member.kind == "seed" and self.shared is not None:
            return self.shared.score_spec(member)
        settings: list[object] = [config.score.result_digest(), config.train.context_length]
        inputs = {group.name: self.held_out_digest(group.name) for group in self.plan_made.part("validation")}
        inputs["model"] = self.load(self.train_spec(member)).digest
        if self.scored_sparsely(member):
            inputs |= self._routing_inputs()
            settings += [config.score.top_k, config.routing.digest(), config.trained_clusters]
        return StageSpec("score", self.uri("scores", member.name), digest_of(settings), inputs)

    def scored_sparsely(self, member: Member) -> bool:
        """Whether a member is scored only where it is among the nearest experts."""
        return self.config.score.top_k is not None and member.kind == "expert"

    def tasks_spec(self, member: Member) -> StageSpec:
        """Identity of one member's answers to the few-shot tasks."""
        config = self.config
        if member.kind == "seed" and self.shared is not None:
            return self.shared.tasks_spec(member)
        inputs = {
            "model": self.load(self.train_spec(member)).digest,
            "tokenizer": self.load(self.tokenizer_spec()).digest,
            **{f"tasks/{name}": digest for name, digest in self.task_digests.items()},
        }
        settings = digest_of([config.score.max_batch_tokens, config.train.context_length])
        return StageSpec("tasks", self.uri("tasks", member.name), settings, inputs)

    @cached_property
    def task_digests(self) -> dict[str, str]:
        """Identity of each few-shot task: its settings and the content of its files."""
        return {task.name: task_digest(task) for task in self.config.tasks}

    def evaluate_spec(self) -> StageSpec:
        """Identity of the result."""
        config = self.config
        inputs: dict[str, str] = {}
        for spec_of in (self.train_spec, self.score_spec):
            self._manifests.read_ahead(map(spec_of, [Member("seed"), *config.members]))
        for member in self.scored_members:
            inputs[f"scores/{member.name}"] = self.load(self.score_spec(member)).digest
            if config.tasks:
                inputs[f"tasks/{member.name}"] = self.load(self.tasks_spec(member)).digest
        inputs |= {"clusterer": self.load(self.cluster_spec()).digest, **self._assigned("validation")}
        if (labels := self.validation_labels) is not None:
            inputs["labels"] = labels_digest(labels, self.paths("validation"))
        evaluation = config.evaluate.model_dump(mode="json", exclude={"threads"})
        settings = digest_of([evaluation, config.routing.digest(), self._scored_documents(), config.preset])
        return StageSpec("evaluate", config.root, settings, inputs)

    @property
    def experts(self) -> list[Member]:
        """The experts, in the order of their clusters."""
        return [Member("expert", cluster) for cluster in self.config.trained_clusters]

    @property
    def scored_members(self) -> list[Member]:
        """All models that validation tokens are scored under: the seed, what was trained, and the averages."""
        return [Member("seed"), *self.config.members, *self.config.averages]

    @cached_property
    def validation_labels(self) -> str | None:
        """Where the known domains of the validation documents lie; None where there are none."""
        labels = self.config.cluster.labels
        return labels if labels is not None and has_labels(labels, self.paths("validation")) else None

    def _assigned(self, part: Part) -> dict[str, str]:
        if part not in self._digests_assigned:
            specs = {group.name: self.assign_spec(group.name) for group in self.plan_made.part(part)}
            self._digests_assigned[part] = self._manifests.digests(specs)
        return self._digests_assigned[part]

    def share(self, member: Member) -> int:
        """Sequences of one member in one step."""
        if member.kind == "seed" and self.config.seed_model.training is not None:
            return self.config.seed_model.training.sequences_per_step
        if member.cluster is None:
            return self.config.train.sequences_per_step
        return self.config.train.share(self.config.cluster.n_clusters)

    def optimization(self, member: Member) -> OptimizationConfig:
        """Settings of one member's training, with its own number of steps.

        Raises:
            ConfigError: If a cluster's part of the tokens is worth less than one step.
        """
        config, training = self.config.train, self.config.seed_model.training
        if member.kind == "seed" and training is not None:
            return training
        if config.steps_by == "equal" or member.cluster is None:
            return config.optimization()
        counts = self.token_counts("train", LEARNED if member.kind == "expert" else RANDOM)
        return config.in_proportion(counts, member.cluster)

    def cluster_tokens(self, member: Member) -> int | None:
        """Tokens that a member's vocabulary grows by; None where it is trained without cluster tokens."""
        if member.cluster is None or not self.config.train.cluster_token:
            return None
        return self.config.cluster.n_clusters

    def token_counts(self, part: Part, partition: str) -> list[int]:
        """Tokens of each cluster, separators included."""
        counts = [0] * self.config.cluster.n_clusters
        for group in self.plan_made.part(part):
            for cluster, found in enumerate(self.load(self.assign_spec(group.name)).metadata["clusters"][partition]):
                counts[cluster] += found["tokens"]
        return counts

    # --- reading what stages made ---

    def load(self, spec: StageSpec) -> Manifest:
        """Manifest of an output that is to be there, as `ManifestCache.load` gives it."""
        return self._manifests.load(spec)

    def fetch(self, spec: StageSpec, scratch: Path) -> Path:
        """Bring a stage's whole output to this machine, checked."""
        found = self.load(spec)
        return manifests.fetch(spec.root, found, found.paths(), scratch / spec.stage)

    def train_shards(self, member: Member, scratch: Path) -> Shards:
        """Token shards that a member is trained on, on this machine: its own cluster's, or all."""
        clusters = range(self.config.cluster.n_clusters) if member.cluster is None else [member.cluster]
        partition = RANDOM if member.kind == "random" else LEARNED
        return self._train_shards(partition, clusters, scratch)

    def validation_shards(self, scratch: Path) -> tuple[Shards, NDArray[np.int64]]:
        """Token shards of the validation documents, and the nearest cluster of each document, (n_documents,).

        They are in the order of the corpus, whatever the clusterer.
        """
        self._assigned("validation")  # reads all manifests at once
        shards, clusters = [], []
        for group in self.plan_made.part("validation"):
            shard, own = self.held_out_tokens(group.name, scratch)
            shards.append(shard)
            clusters.append(np.load(own).astype(np.int64))
        return tuple(shards), np.concatenate(clusters)

    def held_out_tokens(self, group: str, scratch: Path) -> tuple[Shard, Path]:
        """Token shard of one group of held-out documents, and the file of their clusters, on this machine."""
        spec = self.assign_spec(group)
        found = self.load(spec)
        folder, stem = held_out_shard(self.plan_made.group(group).split, group)
        # Only the clusters are this run's own where the tokens are shared.
        local = manifests.fetch(spec.root, found, found.paths(f"{folder}/{stem}."), scratch / "tokens") / folder
        shard = (local, stem) if self.shared is None else self.shared.held_out_tokens(group, scratch / "shared")[0]
        return shard, local / f"{stem}{CLUSTERS}"

    def validation_documents(self, scratch: Path) -> tuple[TokenDocuments, NDArray[np.int64]]:
        """Validation documents, and the nearest cluster of each, shape (n_documents,)."""
        shards, clusters = self.validation_shards(scratch)
        return TokenDocuments(shards), clusters

    def _train_shards(self, partition: str, clusters: Sequence[int], scratch: Path) -> Shards:
        self._assigned("train")  # reads all manifests at once
        groups = self.plan_made.part("train")
        made = {group.name: self.load(self.assign_spec(group.name)) for group in groups}
        wanted: dict[str, list[str]] = {name: [] for name in made}
        there = {name: set(found.paths()) for name, found in made.items()}
        shards = []
        for cluster, group in itertools.product(clusters, groups):
            folder, stem = token_shard(partition, group.split, cluster, group.name)
            names = {f"{folder}/{stem}{suffix}" for suffix in SHARD_SUFFIXES}
            wanted[group.name] += sorted(names & there[group.name])
            shards.append((folder, stem))
        local = manifests.fetch_all(self.config.root, [(made[n], wanted[n]) for n in made], scratch / "tokens")
        return tuple((local / folder, stem) for folder, stem in shards)

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
        counts = counts if counts is not None else ReadCounts()
        for group in self.plan_made.part(part):
            corpus = self.corpus_of(group)
            yield from read_files(corpus.root, group.paths, max_bad_lines=corpus.max_bad_lines, counts=counts)

    def result(self) -> dict[str, Any]:
        """The content of result.json."""
        values: dict[str, Any] = json.loads(storage.read_bytes(self.uri(RESULT_FILE)))
        return values
