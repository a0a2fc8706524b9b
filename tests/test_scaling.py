"""The scaling study: its formulas by hand, and its simulated run against a real one and against the formulas."""

import json
from pathlib import Path

import pytest
import scaling
import scaling_model
import simulation
from counted_store import MemoryStore, counted, kind_of
from scaling_model import Rates, Scale
from small import settings, write_corpus

from cbtm import s3, stages, storage
from cbtm.run import Run

RATES = Rates(
    bytes_per_token=4.0,
    fit_seconds=3600.0,
    assign_bytes_per_second=1e6,
    read_bytes_per_second=1e8,
    route_tokens_per_second=1e6,
    mfu=0.5,
    peak_flops=1e15,
)
SMALL = Scale(
    documents=1000, text_bytes=4e6, shards=100, groups=10, clusters=4, parameters=1e9, training_tokens=3.6e12,
    validation_tokens=1e6,
)  # fmt: skip


def value(lines: list[scaling_model.Line], what: str) -> float:
    (found,) = [line.value for line in lines if line.what.startswith(what)]
    return found


def test_the_formulas_of_the_page_are_those_computed_by_hand():
    # 4e6 bytes at 4 a token and 1000 separators; two bytes each, and 8 + 60 a document.
    assert scaling_model.corpus_tokens(SMALL, RATES) == 1_001_000
    assert scaling_model.token_bytes(SMALL, RATES) == 2 * 1_001_000 + 1000 * 68
    assert SMALL.models == 2 * 4 + 1
    # Ten shards a group, and two partitions of four clusters of three files.
    assert scaling_model.group_files(SMALL) == 10 + 24
    # 12 bytes a parameter; nine models and the seed, of 4 bytes a parameter.
    lines = scaling_model.storage(SMALL, RATES, experts_at_once=4)
    assert value(lines, "one checkpoint") == 12.0
    assert value(lines, "10 models, float32") == pytest.approx(0.04)
    assert value(lines, "checkpoints of 4 trainings") == pytest.approx(0.096)
    # 6e9 FLOPs a token and attention of 12 * 32 * 4096 * 2048, at 5e14 a second.
    hours = 3.6e12 * (6e9 + 12 * 32 * 4096 * 2048) / 5e14 / 3600
    assert value(scaling_model.gpu_hours(SMALL, RATES), "all experts") == pytest.approx(hours)
    assert value(scaling_model.cpu_hours(SMALL, RATES), "assign") == pytest.approx(4 / 3600)


def test_the_exponent_is_that_of_the_power_that_the_costs_follow():
    assert scaling.exponent([2, 8, 32], [3 * n**1.5 for n in (2, 8, 32)]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match=r"two sizes, not \[4, 4\]"):
        scaling.exponent([4, 4], [1.0, 2.0])


def test_a_simulated_group_has_the_files_and_the_facts_that_the_assigner_writes(tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus")
    run = Run.parse(json.dumps(settings(str(corpus), str(tmp_path / "run"), None)))
    for stage in (stages.plan, stages.tokenizer, stages.cluster):
        stage(run)
    size = simulation.Size(shards=2, clusters=2, groups=2)
    for group in run.plan_made.groups:
        made = stages.assign(run, group.name)
        assert simulation.group_files(group, size) == made.paths()
        counts = simulation.group_counts(group, size)
        assert {name: len(some) for name, some in counts.items()} == {
            "learned": 2,
            "random": 2,
        } or group.part != "train"
        assert counts.keys() == made.metadata["clusters"].keys()
        assert counts["learned"][0].keys() == made.metadata["clusters"]["learned"][0].keys()


@pytest.fixture
def simulated(s3_settings: pytest.MonkeyPatch) -> simulation.Size:
    """A finished run of 40 shards, three clusters and four groups, in a store in memory that the client speaks to."""
    for name in (*simulation.ENVIRONMENT, "AWS_PROFILE"):
        s3_settings.setenv(name, "")  # so that what the simulation sets is undone
    store, size = MemoryStore(), simulation.Size(shards=40, clusters=3, groups=4, validation=2)
    simulation.connect(store)
    simulation.fill(store, size)
    return size


def test_the_tasks_of_a_simulated_run_send_the_requests_of_the_formulas(simulated, tmp_path):
    found = {}
    for name, _, work in simulation.tasks(simulated):
        with counted(s3.client(8)) as requests:
            work(simulation.open_run(simulated), tmp_path / name)
        found[name] = requests.kinds
    expected = scaling_model.requests(Scale(shards=40, clusters=3, groups=4))
    assert found["train expert: identity, token shards"]["get"] == value(expected, "get of an expert's training")
    assert found["train dense: identity, token shards"]["get"] == value(expected, "get of the dense model's")
    # Four more manifests are head-ed by nobody: the group's own files are.
    assert found["assign: done before"]["head"] == value(expected, "head of an assign task") == 40 / 4 + 2 * 3 * 3
    # Plan, tokenizer and clusterer; the groups (four, and two of validation); seven models and the seed, twice.
    assert found["evaluate: identity"]["get"] == 3 + (4 + 2) + 2 * 8
    assert found["evaluate: identity"]["head"] == 0


def test_a_store_in_memory_lists_and_forgets_as_s3_does(simulated):
    uri = f"{simulation.ROOT}/pages"
    for number in range(1100):  # two pages
        storage.write_bytes(f"{uri}/{number:04d}", b"x")
    assert [file.path for file in storage.list_files(uri)] == [f"{number:04d}" for number in range(1100)]
    storage.delete(uri, ["0000", "1099"])
    assert len(storage.list_files(uri)) == 1098
    assert storage.sizes(uri, ["0000", "0001"]) == {"0000": None, "0001": 1}


def test_requests_are_told_apart_by_method_and_query():
    url = "http://host/bucket"
    assert kind_of("GET", f"{url}?list-type=2&prefix=a") == "list"
    assert kind_of("POST", f"{url}?delete") == "delete"
    assert kind_of("POST", f"{url}/key?uploads") == "put"
    assert [kind_of(method, f"{url}/key") for method in ("GET", "HEAD", "PUT")] == ["get", "head", "put"]
