"""What a run costs in counts that are the same on every machine: passes, forward passes, bytes, requests.

A stage that reads the text once more, scores once more for a setting, reads another cluster's tokens, or asks for a
file twice is as right as before, and slower only where it is expensive to see. Each task runs on its own `Run`, as in a
pod of its own, on a corpus and a root in an S3 server whose requests are counted.
"""

import functools
import json
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from counted_store import KINDS, Requests, counted
from small import settings

from cbtm import s3, stages, storage
from cbtm.cluster.assigner import LEARNED, RANDOM
from cbtm.run import Run
from cbtm.train.member import Member

# Requests of a task at most, with two groups of shards for training, one for validation, and two clusters. The one
# table of them: who makes a stage ask for more changes it here, and looks at what `benchmarks/simulation.py` says then.
REQUESTS = {  # head, get, list, put, delete
    "plan": (0, 2, 2, 3, 1),
    "tokenizer": (0, 4, 0, 3, 1),
    "cluster": (0, 4, 0, 7, 1),
    "assign:train": (0, 13, 0, 14, 1),
    "assign:validation": (0, 13, 0, 8, 1),
    "train:seed": (2, 21, 5, 8, 1),
    "train:dense": (2, 29, 5, 8, 1),
    "train:cluster": (2, 23, 5, 8, 1),
    "train:random": (2, 23, 5, 8, 1),
    "score:seed": (1, 22, 2, 5, 2),
    "score:dense": (1, 23, 2, 5, 2),
    "score:cluster": (1, 23, 2, 5, 2),
    "score:random": (1, 23, 2, 5, 2),
    "evaluate": (0, 64, 0, 5, 1),
}
# Passes over the training text, of all tasks of a stage together, and over the validation text.
PASSES = {
    "plan": (0, 0),
    "tokenizer": (1, 0),
    "cluster": (1, 0),
    "assign": (1, 1),
    "train": (0, 0),
    "score": (0, 0),
    "evaluate": (0, 1),
}


@dataclass
class Cost:
    """What one task did: requests, and forward passes of whole models."""

    requests: Requests
    forward_passes: int

    @property
    def kinds(self) -> tuple[int, ...]:
        return tuple(self.requests.kinds[kind] for kind in KINDS)

    def bytes_of(self, part: str) -> int:
        return sum(n for key, n in self.requests.read.items() if part in key)


@contextmanager
def forward_passes() -> Iterator[Counter[str]]:
    """Count the forward passes of transformers' decoders, whoever asks for them."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    found: Counter[str] = Counter()

    def note(module: Any, _: Any) -> None:
        if type(module).__name__ == "OPTDecoder":
            found["passes"] += 1

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@dataclass
class Measured:
    """A finished run, and the cost of each of its tasks."""

    run: Run
    costs: dict[str, Cost]


def run_measured(values: dict[str, Any], client: Any) -> Measured:
    costs: dict[str, Cost] = {}

    def open_run() -> Run:
        return Run.parse(json.dumps(values))

    def measure(name: str, work: Any) -> None:
        with counted(client) as requests, forward_passes() as passes:
            work(open_run())
        costs[name] = Cost(requests, passes["passes"])

    measure("plan", stages.plan)
    names = [task.name for task in stages.tasks(open_run())]
    for name in names:
        measure(name, lambda run, name=name: next(task for task in stages.tasks(run) if task.name == name).run())
    return Measured(open_run(), costs)


@pytest.fixture(scope="module")
def values(corpus: Path, s3_server: tuple[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Settings of a run whose corpus and root lie in S3."""
    _, client = s3_server
    bucket = f"counts-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(s3, "client", functools.cache(lambda attempts: client))
        monkeypatch.setenv("CBTM_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
        storage.be_patient(0)
        for file in storage.list_files(str(corpus)):
            storage.write_bytes(f"s3://{bucket}/corpus/{file.path}", (corpus / file.path).read_bytes())
        made = settings(f"s3://{bucket}/corpus", f"s3://{bucket}/run", None)
        made["seed_model"]["training"]["steps"] = 2
        made["train"] |= {"steps": 2, "checkpoint_every": 2}
        yield made


@pytest.fixture(scope="module")
def measured(values: dict[str, Any], s3_server: tuple[str, Any]) -> Measured:
    return run_measured(values, s3_server[1])


def of_stage(measured: Measured, stage: str) -> list[Cost]:
    found = [cost for name, cost in measured.costs.items() if name.partition(":")[0] == stage]
    assert found, stage
    return found


def token_files(run: Run, partition: str, cluster: int) -> dict[str, int]:
    """Sizes of the training token files of one cluster, by what the groups' manifests say."""
    groups = [run.load(run.assign_spec(group.name)) for group in run.plan_made.part("train")]
    below = f"tokens/{partition}/train/cluster-{cluster:05d}/"
    return {f"/{run.uri(file.path)[5:]}": file.size for made in groups for file in made.files if below in file.path}


def test_each_stage_reads_the_text_as_often_as_its_passes_say(measured, corpus):
    sizes = {part: sum(file.size for file in storage.list_files(str(corpus / part))) for part in ("train", "valid")}
    for stage, (train, valid) in PASSES.items():
        costs = of_stage(measured, stage)
        assert sum(cost.bytes_of("/corpus/train/") for cost in costs) == train * sizes["train"], stage
        assert sum(cost.bytes_of("/corpus/valid/") for cost in costs) == valid * sizes["valid"], stage


@pytest.mark.parametrize(("kind", "partition"), [("cluster", LEARNED), ("random", RANDOM)])
def test_an_expert_reads_the_training_tokens_of_its_own_cluster_once_and_no_others(measured, kind, partition):
    for cluster in (0, 1):
        read = measured.costs[f"train:{kind}-{cluster:05d}"].requests.read
        tokens = {key: n for key, n in read.items() if "/tokens/" in key}
        assert tokens == token_files(measured.run, partition, cluster)
        assert len(tokens) == 2 * 3  # groups x files of a shard


def test_the_dense_model_reads_the_tokens_of_all_clusters_once(measured):
    read = measured.costs["train:dense"].bytes_of("/tokens/")
    assert read == sum(sum(token_files(measured.run, LEARNED, cluster).values()) for cluster in (0, 1))


def test_no_task_reads_an_object_twice(measured):
    for name, cost in measured.costs.items():
        assert [key for key, n in cost.requests.gets.items() if n > 1] == [], name


def test_each_model_is_scored_in_one_pass_and_the_settings_cost_none(measured):
    run, passes = measured.run, {name: cost.forward_passes for name, cost in measured.costs.items()}
    scored = [f"score:{member.name}" for member in run.scored_members]
    # Batches of all documents' windows: the same for every model. Each stage asks the model twice for four tokens, to
    # see whether its head is what its loss computes (cbtm.train.loss).
    batches = run.load(run.score_spec(Member("seed"))).metadata["forward_passes"]
    assert batches > 1
    assert {passes[name] for name in scored} == {batches + 2}
    assert len(run.result()["ensemble"]) > 20
    assert sum(passes.values()) == sum(passes[name] for name in passes if name.startswith(("train:", "score:")))


def test_whether_a_run_is_finished_is_told_by_a_listing_and_the_manifests(measured, values, s3_server):
    client = s3_server[1]
    tasks = len(list(stages.tasks(measured.run)))
    with counted(client) as requests:
        assert stages.finished(Run.parse(json.dumps(values)))
    assert requests.kinds["head"] == 1  # the run's own manifest
    assert requests.kinds["list"] <= 4  # the corpus of two splits, and the root
    assert requests.kinds["get"] <= 2 * tasks + 4
    # A file that is cut short, or gone, is seen in it.
    folder = measured.run.uri("scores/dense")
    kept = storage.join(folder, "log_probs.npy")
    whole = storage.read_bytes(kept)
    storage.write_bytes(kept, whole[:-1])
    assert not stages.finished(Run.parse(json.dumps(values)))
    storage.delete(folder, ["log_probs.npy"])
    assert not stages.finished(Run.parse(json.dumps(values)))
    storage.write_bytes(kept, whole)
    assert stages.finished(Run.parse(json.dumps(values)))


def test_other_settings_of_the_evaluation_score_and_train_nothing(measured, values, s3_server):
    settings_before = len(measured.run.result()["ensemble"])
    more = values | {"evaluate": values["evaluate"] | {"temperatures": [0.05, 0.1, 0.5, 1.0]}}
    again = run_measured(more, s3_server[1])
    made = [name for name, cost in again.costs.items() if name != "plan" and cost.requests.kinds["put"]]
    assert made == ["evaluate"]
    assert sum(cost.forward_passes for cost in again.costs.values()) == 0
    assert len(again.run.result()["ensemble"]) > settings_before


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_task_sends_no_more_requests_than_the_table_says(measured, kind):
    found = {name: cost.kinds for name, cost in measured.costs.items() if name.split("-")[0] == kind}
    assert found
    for name, kinds in found.items():
        over = {of: (n, most) for of, n, most in zip(KINDS, kinds, REQUESTS[kind], strict=True) if n > most}
        assert over == {}, name


def test_the_table_of_requests_has_every_task(measured):
    assert {name.split("-")[0] for name in measured.costs} == set(REQUESTS)
