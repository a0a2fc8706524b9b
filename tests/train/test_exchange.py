"""What machines and their launch tell each other, and the one error that is made of what several say."""

import dataclasses

import pytest

from cbtm import storage
from cbtm.errors import DataError, Interrupted, ManifestError, StorageError
from cbtm.manifest import FileEntry, Placed
from cbtm.train.exchange import Exchange, NodeFailure, NodeTask, outcome_of
from cbtm.train.node import Node
from cbtm.train.outcome import RankError, WorkerFailedError
from cbtm.train.worker import LaunchFolder

TASK = NodeTask(config="{}", member="cluster-00001", key="key")
GONE = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]")


def raised(error, rank, time):
    try:
        raise error
    except type(error) as met:
        return dataclasses.replace(RankError.of(met, rank), time=time)


def failure(node, *errors, codes=None, time=0.0, stopping=False):
    described = [dataclasses.asdict(error) for error in errors]
    logs = {error.rank: f"the end of rank {error.rank}" for error in errors}
    return NodeFailure(node=node, time=time, errors=described, exit_codes=codes or {}, stopping=stopping, logs=logs)


@pytest.fixture
def exchange(root):
    return Exchange(f"{root}/nodes/cluster-00001")


def test_task_result_and_failures_come_across(exchange):
    exchange.write_task(TASK)
    other = Exchange.of_task(exchange.task_uri)
    assert other.uri == exchange.uri
    assert other.read_task() == TASK
    assert exchange.result("key") is None
    placed = Placed((FileEntry(path="model", size=3, sha256="0" * 64),), {"steps": 4})
    other.write_result("key", placed)
    assert exchange.result("key") == placed
    assert exchange.result("another key") is None
    told = [failure(node, raised(DataError("torn"), node, 1.0)) for node in range(2)]
    for each in told:
        other.write_failure(each)
    assert exchange.failures() == told
    other.clear_failure(0)
    assert exchange.failures() == told[1:]
    exchange.clear()
    assert storage.list_files(exchange.uri) == []


def test_task_of_another_version_is_refused(exchange):
    storage.write_bytes(exchange.task_uri, b'{"format": 1, "member": "dense"}')
    with pytest.raises(ManifestError, match=r"task\.json is damaged or of another version of cbtm: Field required"):
        exchange.read_task()


def test_error_is_that_of_the_rank_that_failed_first_on_any_machine():
    told = [
        failure(0, raised(GONE, 0, 1.0), raised(GONE, 1, 1.1), time=2.0),
        failure(1, raised(KeyError("first"), 3, 0.9), raised(ValueError("second"), 2, 1.2), time=3.0),
    ]
    error = outcome_of(told, 4).cause()
    assert isinstance(error, WorkerFailedError)
    assert str(error) == "rank 3 of 4 failed: KeyError: 'first'; its log: \nthe end of rank 3"


def test_lost_peers_and_interruptions_are_no_cause():
    lost = outcome_of([failure(0, raised(GONE, 0, 1.0))], 2)
    assert lost.cause() is None
    stopped = [failure(node, raised(Interrupted("stopped at step 7 of 20"), node, 1.0)) for node in range(2)]
    assert outcome_of(stopped, 2).cause() is None
    assert str(outcome_of(stopped, 2).error()) == "stopped at step 7 of 20"
    # Where one machine has not saved there is no new checkpoint.
    assert "without a new checkpoint" in str(outcome_of(stopped[:1], 2).error())
    assert outcome_of([], 2).error() is None


def test_killed_rank_of_a_machine_is_the_cause():
    told = [failure(0, raised(GONE, 0, 1.0)), failure(1, codes={1: -9})]
    assert "rank 1 of 2 was ended by signal 9 (SIGKILL)" in str(outcome_of(told, 2).cause())


def test_failure_is_what_the_launch_of_a_machine_has_found(tmp_path):
    folder, node = LaunchFolder(tmp_path), Node(1, 2, "first", 29500)
    early = NodeFailure.of(StorageError("no such bucket"), node, 2, folder)  # it did not come to a launch
    assert [(error["rank"], error["message"]) for error in early.errors] == [(2, "no such bucket")]
    assert isinstance(outcome_of([early], 4).cause(), StorageError)
    folder.log(3).parent.mkdir()
    folder.log(3).write_text("".join(f"{line}\n" for line in range(100_000)))
    folder.save_outcome([raised(DataError("torn"), 3, 1.0)], {3: 1, 2: -15}, stopping=False)
    found = NodeFailure.of(DataError("torn"), node, 2, folder)
    assert found.exit_codes == {3: 1, 2: -15}
    assert [RankError(**error).rank for error in found.errors] == [3]
    assert found.logs == {3: "\n".join(map(str, range(99_985, 100_000)))}
    folder.clear_outcome()
    assert folder.load_outcome() is None
