"""A run that adds a domain to another: what must agree between the two, its clusterer, and its configuration."""

from pathlib import Path
from typing import Any

import yaml

from cbtm import manifest as manifests
from cbtm.cluster.extension import extend_clusterer
from cbtm.corpus import CorpusConfig, ReadCounts
from cbtm.errors import ConfigError, ManifestError
from cbtm.manifest import StageSpec
from cbtm.run import Run
from cbtm.run_config import RunConfig
from cbtm.stages.prepare import TrainDocuments
from cbtm.train.member import Member

# Where a fit begins from or is measured by, which is not done again.
_OF_A_FIT = ("path", "assignments", "labels")


def check_extension(run: Run, base: Run) -> None:
    """Refuse to add a domain to a run that is not what the configuration takes it for.

    Raises:
        ConfigError: If the number of clusters is not one more, tokenizer or seed model are others, the added expert
            would be trained on more or fewer tokens than each of those that are there, or a model is wanted that the
            other run did not train.
        ManifestError: If the other run has not finished.
    """
    extends, config, other = run.config.extends, run.config, base.config
    n_clusters = other.cluster.n_clusters
    if config.cluster.n_clusters != n_clusters + 1:
        raise ConfigError(
            f"cluster.n_clusters={config.cluster.n_clusters} with extends={extends}, which has {n_clusters} clusters: "
            f"one domain is added at a time; use {n_clusters + 1}"
        )
    for name in ("tokenizer", "seed_model"):
        if getattr(config, name) != getattr(other, name):
            raise ConfigError(
                f"{name} is another than that of extends={extends}, which is taken over; write it as it is there "
                f"(cbtm extend writes such a configuration)"
            )
    _check_training(run, base)
    wanted = [member for member in config.members if run.taken_over(member)]
    for member in wanted:
        if member not in other.members:
            raise ConfigError(
                f"{member.name} is to be taken over from extends={extends}, which did not train it; "
                f"{'set train.dense=false' if member.kind == 'dense' else 'leave it out of train.clusters'}, or train "
                "it there"
            )
    _check_finished(base, [Member("seed"), *wanted], str(extends))


def _check_training(run: Run, base: Run) -> None:
    """The added expert is trained on as many tokens as each of the others: steps, sequences, length."""
    mine, there = run.config.train, base.config.train
    n_clusters = base.config.cluster.n_clusters
    for name in ("steps", "context_length"):
        if getattr(mine, name) != getattr(there, name):
            raise ConfigError(
                f"train.{name}={getattr(mine, name)}, but the experts of extends={run.config.extends} were trained "
                f"with {getattr(there, name)}; use the same, so that all experts see equally many tokens"
            )
    share = there.share(n_clusters)
    if mine.share(n_clusters + 1) != share:
        raise ConfigError(
            f"train.sequences_per_step={mine.sequences_per_step} gives an expert {mine.share(n_clusters + 1)} "
            f"sequences a step, and those of extends={run.config.extends} had {share}; use "
            f"{share * (n_clusters + 1)}, so that all experts see equally many tokens"
        )


def _check_finished(base: Run, members: list[Member], extends: str) -> None:
    def check(spec: StageSpec) -> None:
        if not manifests.is_current(spec, base.load(spec)):
            raise ManifestError(f"{spec.root} is not whole")

    try:
        check(base.tokenizer_spec())
        check(base.cluster_spec())
        for member in members:
            check(base.train_spec(member))
    except ManifestError as error:
        raise ManifestError(f"extends={extends} has not finished: {error}; run it first") from None


def cluster(run: Run, work: Path) -> dict[str, Any]:
    """Build the clusterer of a run that adds a domain, in `work`."""
    base = run.base
    assert base is not None
    counts = ReadCounts()
    facts = extend_clusterer(
        run.config.cluster,
        TrainDocuments(run, counts),
        base.fetch(base.cluster_spec(), work.parent / "base"),
        work,
        digest=base.clusterer_digest,
    )
    return {**facts, "skipped": counts.skipped}


def extending(base: RunConfig, corpus: CorpusConfig, root: str, *, name: str | None = None) -> str:
    """Configuration, as YAML, of a run that adds the domain of a corpus to a run.

    What the run was made with stays; its number of clusters and its batch grow by one expert's.

    Args:
        base: Configuration of the run.
        corpus: The text of the added domain.
        root: Folder or s3:// prefix of the run that is to be made.
        name: Its name in the tracker; None makes one of the other's.

    Raises:
        ConfigError: If such a run cannot be extended.
    """
    values = base.model_dump(mode="json", exclude_defaults=True)
    n_clusters = base.cluster.n_clusters
    cluster = {key: value for key, value in values.get("cluster", {}).items() if key not in _OF_A_FIT}
    train = values.get("train", {}) | {
        "sequences_per_step": base.train.share(n_clusters) * (n_clusters + 1),
        "random_clusters": False,
    }
    if base.train.clusters is not None:
        train["clusters"] = [*base.train.clusters, n_clusters]
    evaluate = {key: value for key, value in values.get("evaluate", {}).items() if key != "experts"}
    values |= {
        "name": name or f"{base.name}-{n_clusters + 1}",
        "root": root,
        "extends": base.root,
        "corpus": corpus.model_dump(mode="json", exclude_defaults=True),
        "cluster": cluster | {"n_clusters": n_clusters + 1},
        "assign": values.get("assign", {}) | {"random_clusters": False},
        "train": train,
        "evaluate": evaluate,
    }
    values = {key: value for key, value in values.items() if value != {} and key not in ("shared", "compare")}
    RunConfig.parse(values, source="the extending configuration").check()
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
