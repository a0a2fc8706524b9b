"""What each task of a large run asks of the object store before and after its work: requests, bytes, time, memory.

The plan, the identities and the manifests are made by cbtm's own code, and lie with the files that they name in a store
in memory (`counted_store`) behind boto3's real client. Files are of no content: of corpus and models there is a size
alone, token shards are empty. So what is measured is all that grows with shards, groups and clusters, and nothing of
the work itself. Every task runs as in a pod of its own: a new process, a new `Run`.

    python benchmarks/simulation.py --groups 16,256 --latency 20
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpora import _peak, _resident_after_reset, hardware, header, row
from counted_store import KINDS, MemoryStore, counted

from cbtm import s3, stages, storage
from cbtm.branch.tokenizer import TOKENIZER_FILES
from cbtm.cluster.assigner import CLUSTERS, LEARNED, RANDOM, assignment_path, held_out_shard, token_shard
from cbtm.cluster.clusterer import CLUSTERER_FORMAT, DECIDING_FILES, DOMAINS_FILE, PROFILE_FILE
from cbtm.cluster.clusterer import SETTINGS_FILE as CLUSTERER_FILE
from cbtm.manifest import FileEntry, Manifest, StageSpec
from cbtm.merge.scorer import LOG_PROBS_FILE, OFFSETS_FILE, SCORES_FILE
from cbtm.plan import ShardGroup
from cbtm.run import DOCUMENTS_FILE as RUN_DOCUMENTS_FILE
from cbtm.run import REPORT_FILE, RESULT_FILE, SETTINGS_FILE, Run
from cbtm.stages import result
from cbtm.tokens import DOCUMENTS, OFFSETS, TOKENS
from cbtm.train.job import CURVE_FILE, EXPERT_FILE
from cbtm.train.member import Member

ROOT, CORPUS, MODEL = "s3://simulation/run", "s3://simulation/corpus", "s3://simulation/opt"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "simulation",
    "AWS_SECRET_ACCESS_KEY": "simulation",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",  # nothing listens there, and nothing is sent
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
SHARD_BYTES = 140_000_000  # 1.4 TB in 10,000 shards
_COUNTS = {"documents": 71, "tokens": 34_000, "bytes": 150_000}


@dataclass(frozen=True)
class Size:
    """A run's size.

    Attributes:
        shards: Shards of the training split, one file in each.
        clusters: Clusters, each with an expert and a random-cluster expert.
        groups: `assign.max_groups`.
        validation: Shards of the validation split.
    """

    shards: int
    clusters: int
    groups: int
    validation: int = 8


def settings(size: Size) -> dict[str, Any]:
    """The configuration of the run, as YAML would give it."""
    return {
        "name": "simulation",
        "root": ROOT,
        "corpus": {"root": CORPUS},
        "cluster": {"n_clusters": size.clusters},
        "assign": {"max_groups": size.groups},
        "seed_model": {"path": MODEL},
        "train": {"sequences_per_step": 4 * size.clusters, "context_length": 2048},
        "tracking": {"enabled": False},
    }


def open_run(size: Size) -> Run:
    return Run.parse(json.dumps(settings(size)))


# --- the run as it lies in the store ---


def fill(store: MemoryStore, size: Size) -> None:
    """Put corpus and seed model into the store, and the plan and all manifests of a finished run."""
    for split, shards in (("train", size.shards), ("valid", size.validation)):
        for number in range(shards):
            store.put(_key(f"{CORPUS}/{split}/{number:05d}/text.jsonl.zst"), SHARD_BYTES)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        store.put(_key(f"{MODEL}/{name}"), 1_000)
    run = open_run(size)
    plan = run.make_plan()
    _publish(store, run.tokenizer_spec(), list(TOKENIZER_FILES), {})
    clusterer = dict.fromkeys([*DECIDING_FILES, PROFILE_FILE, DOMAINS_FILE], b"")
    described = {"format": CLUSTERER_FORMAT, "n_clusters": size.clusters}
    _publish(store, run.cluster_spec(), {**clusterer, CLUSTERER_FILE: json.dumps(described).encode()}, {})
    for group in plan.groups:
        facts = {"documents": 1, "skipped": {}, "without_words": 0, "clusters": group_counts(group, size)}
        _publish(store, run.assign_spec(group.name), group_files(group, size), facts)
    for member in run.scored_members:
        facts = {"tokens_seen": 1, "steps": 1, "cost": {"seconds": 1.0}}
        _publish(store, run.train_spec(member), _model_files(run, member), facts)
        scores = {"forward_passes": 1, "tokens_scored": 1, "tokens_fed": 1, "compute_share": 1.0}
        _publish(store, run.score_spec(member), [LOG_PROBS_FILE, OFFSETS_FILE, SCORES_FILE], scores)
    _publish(store, run.evaluate_spec(), [REPORT_FILE, RESULT_FILE, SETTINGS_FILE, RUN_DOCUMENTS_FILE], {})


def partitions(group: ShardGroup) -> list[str]:
    return [LEARNED, RANDOM] if group.part == "train" else [LEARNED]


def group_files(group: ShardGroup, size: Size) -> list[str]:
    """Paths of what the assigner publishes for a group of documents without prompts."""
    if group.part == "validation":
        held_out = "/".join(held_out_shard(group.split, group.name))
        return sorted(
            [*map(assignment_path, group.paths), *(held_out + end for end in (TOKENS, OFFSETS, DOCUMENTS, CLUSTERS))]
        )
    shards = [
        "/".join(token_shard(partition, group.split, cluster, group.name)) + suffix
        for partition in partitions(group)
        for cluster in range(size.clusters)
        for suffix in (TOKENS, OFFSETS, DOCUMENTS)
    ]
    return sorted([*map(assignment_path, group.paths), *shards])


def group_counts(group: ShardGroup, size: Size) -> dict[str, list[dict[str, int]]]:
    """What the assigner's manifest says of the clusters of a group."""
    return {partition: [dict(_COUNTS)] * size.clusters for partition in partitions(group)}


def _model_files(run: Run, member: Member) -> dict[str, bytes]:
    facts = {"format": 1, "kind": member.kind, "cluster": member.cluster, "clusterer_digest": run.clusterer_digest}
    contents = {EXPERT_FILE: json.dumps(facts).encode(), CURVE_FILE: b'{"step": 1, "train/loss": 3.0}\n'}
    return (
        dict.fromkeys(["config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES], b"") | contents
    )


def _publish(
    store: MemoryStore, spec: StageSpec, files: Sequence[str] | Mapping[str, bytes], facts: Mapping[str, Any]
) -> None:
    """Put files, empty where no content is given, and their manifest into the store."""
    contents = files if isinstance(files, Mapping) else dict.fromkeys(files, b"")
    made = Manifest(
        stage=spec.stage,
        config_digest=spec.config_digest,
        inputs=dict(spec.inputs),
        files=tuple(
            FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for path, content in sorted(contents.items())
        ),
        metadata={**facts, "seconds": 1.0},
    )
    for path, content in contents.items():
        store.put(_key(storage.join(spec.root, path)), content)
    store.put(_key(spec.manifest_uri), made.model_dump_json(indent=1).encode())


def _key(uri: str) -> str:
    return uri.removeprefix("s3://")


# --- its tasks ---


def tasks(size: Size) -> Iterator[tuple[str, int, Callable[[Run, Path], object]]]:
    """Name, how many there are in a run, and what such a task does around its work."""
    yield "plan", 1, lambda run, _: run.make_plan()
    group, n_groups = "train-00000", min(size.groups, size.shards) + min(size.groups, size.validation)
    yield "assign: identity", n_groups, lambda run, _: run.assign_spec(group)
    yield "assign: done before", n_groups, lambda run, _: stages.assign(run, group)
    expert, dense = Member("expert", 1), Member("dense")
    yield "train expert: identity", 2 * size.clusters, lambda run, _: run.train_spec(expert)
    yield (
        "train expert: identity, token shards",
        2 * size.clusters,
        lambda run, scratch: (run.train_spec(expert), run.train_shards(expert, scratch)),
    )
    yield (
        "train dense: identity, token shards",
        2,
        lambda run, scratch: (run.train_spec(dense), run.train_shards(dense, scratch)),
    )
    yield "score: identity", 2 * size.clusters + 2, lambda run, _: run.score_spec(expert)
    yield "evaluate: identity", 1, lambda run, _: run.evaluate_spec()
    yield "evaluate: identity, what it reads of models", 1, lambda run, _: _evaluate(run)
    yield "whole run finished?", 1, lambda run, _: _finished(run)


def _evaluate(run: Run) -> None:
    run.evaluate_spec()
    result._check_bindings(run, ())
    result._counts(run, "train")
    result._seconds(run)
    result._cost(run)
    result._scoring(run)
    result._curves(run)


def _finished(run: Run) -> None:
    if not stages.finished(run):
        raise AssertionError("the simulated run is not finished")


@dataclass(frozen=True)
class Cost:
    """What one task costs: seconds of wall and processor, requests by kind, bytes read, and peak memory above start."""

    seconds: float
    cpu_seconds: float
    kinds: dict[str, int]
    bytes_read: int
    peak_bytes: int


def cost_of(size: Size, work: Callable[[Run, Path], object]) -> Cost:
    """Cost of a task in a process of its own, which has the store as it is now."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        with tempfile.TemporaryDirectory() as scratch, counted(s3.client(8)) as requests:
            os.environ["CBTM_SCRATCH"] = scratch
            before, cpu, begin = _resident_after_reset(), time.process_time(), time.perf_counter()
            work(open_run(size), Path(scratch))
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
            sender.send(Cost(seconds, cpu_seconds, dict(requests.kinds), requests.bytes_read, _peak() - before))

    process = context.Process(target=child)
    process.start()
    sender.close()
    try:
        found: Cost = receiver.recv()
    finally:
        process.join()
    return found


# --- what Kubeflow has to carry ---


def kubeflow_sizes(size: Size) -> dict[str, int]:
    """Bytes of the parameters of the pipeline's two loops and of the configuration, and how much the loops make."""
    run = open_run(size)
    groups = [group.name for group in run.plan_made.groups]
    members = [member.name for member in run.config.members]
    return {
        "bytes of the parameter groups": len(json.dumps(groups)),
        "bytes of the parameter members": len(json.dumps(members)),
        "bytes of the parameter config": len(json.dumps(run.config.model_dump_json())),
        "iterations of the assign loop": len(groups),
        "iterations of the train loop": len(members),
        # Of each task a driver and the task; of each iteration, and of each of the two loops, a driver more.
        "pods": 2 * (10 + len(groups) + 2 * len(members)) + len(groups) + len(members) + 4,
        "artifacts": 8 + len(groups) + 2 * len(members),
        "runs in MLflow": 2 + 1 + len(members),
    }


def connect(store: MemoryStore) -> None:
    """Make cbtm's S3 client speak to the store."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(name, None)
    os.environ |= ENVIRONMENT
    s3.client.cache_clear()
    store.attach(s3.client(8))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--clusters", type=int, default=128)
    parser.add_argument("--groups", default="16,256", help="values of assign.max_groups, with commas")
    parser.add_argument("--latency", type=float, default=20, metavar="MS", help="of a request, on top of the client's")
    parser.add_argument("--tasks", default="", help="only tasks whose name begins so")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    print(hardware("boto3", "pydantic"))
    for groups in map(int, args.groups.split(",")):
        size, store = Size(args.shards, args.clusters, groups), MemoryStore()
        connect(store)
        begin = time.perf_counter()
        fill(store, size)
        seconds = time.perf_counter() - begin
        print(
            f"\n{size.shards:,} shards, {size.clusters} clusters, assign.max_groups={groups}: {len(store):,} objects "
            f"(made in {seconds:.0f} s); {args.latency:g} ms a request\n"
        )
        store.latency = args.latency / 1000
        header("task", "tasks", "s", "CPU s", *KINDS, "MB read", "peak MB")
        for name, count, work in tasks(size):
            if name.startswith(args.tasks):
                cost = cost_of(size, work)
                kinds = [f"{cost.kinds.get(kind, 0):,}" for kind in KINDS]
                megabytes = [f"{n / 1e6:.1f}" for n in (cost.bytes_read, cost.peak_bytes)]
                row(name, count, f"{cost.seconds:.2f}", f"{cost.cpu_seconds:.2f}", *kinds, *megabytes)
        print()
        header("Kubeflow", "")
        for name, value in kubeflow_sizes(size).items():
            row(name, f"{value:,}")


if __name__ == "__main__":
    main()
