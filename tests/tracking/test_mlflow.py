"""Tracking against real stores: sqlite files, and an `mlflow server` that is killed and started again."""

import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cbtm.errors import DataError
from cbtm.tracking import TrackingConfig, finish_parent_run, open_run, replay, start_parent_run

mlflow = pytest.importorskip("mlflow")

pytestmark = pytest.mark.slow  # one server takes 10 to 25 s to start, and it starts twice

LOSS = "train/loss"


class Server:
    """An `mlflow server` of its own process group on a free port; its database outlives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder}/server.db"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        options = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--backend-store-uri": self.database,
            "--artifacts-destination": str(self._folder / "artifacts"),
            "--workers": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=(self._folder / "server.log").open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> "Server":
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return self
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self._folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self._process is not None:
            # SIGKILL to the group: uvicorn's worker is a child and would go on serving.
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module", autouse=True)
def launched(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Server]:
    """Started before the first test and awaited by the first that needs it."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(template, folder / "server.db")
    server = Server(folder)
    server.launch()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def server(launched: Server) -> Server:
    return launched.wait()


def client(config: TrackingConfig) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(config.resolved_uri())


def runs(config: TrackingConfig, condition: str = "") -> list["mlflow.entities.Run"]:
    experiment = client(config).get_experiment_by_name("cbtm")
    return list(client(config).search_runs([experiment.experiment_id], condition))


def points(config: TrackingConfig, run_id: str, key: str = LOSS) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client(config).get_metric_history(run_id, key))


def track(config: TrackingConfig, journal: Path, steps: range, run_key: str = "key", scale: float = 1.0) -> None:
    """One life of an expert's stage: the loss at step s is s * scale."""
    tracker = open_run(config, name="expert-00", kind="expert", run_key=run_key, journal=journal, cluster=0)
    for step in steps:
        tracker.log_metrics({LOSS: step * scale}, step)
    tracker.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("cbtm") and record.levelno >= logging.WARNING
    ]


def test_two_processes_share_a_fresh_sqlite_file(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from cbtm.tracking import TrackingConfig, open_run
        member = sys.argv[1]
        tracker = open_run(TrackingConfig(flush_interval_s=0.05), name=f"expert-{member}", kind="expert",
                           run_key=f"key/{member}", journal=Path(f"journals/{member}.jsonl"), cluster=int(member))
        tracker.log_params({"train.learning_rate": 0.1})
        for step in range(300):
            tracker.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
        Path(f"report-{member}.html").write_text("<p>report</p>")
        tracker.log_artifact(Path(f"report-{member}.html"), "report")
        tracker.close()
    """)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, member], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for member in "01"
    ]
    outputs = [process.communicate(timeout=100)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not any("tracking server" in output for output in outputs), outputs

    # No setting and no variable: the file is runs/mlflow.db below the working directory, artifacts beside it.
    config = TrackingConfig(uri=f"sqlite:///{tmp_path}/runs/mlflow.db")
    found = {run.data.tags["cbtm.cluster"]: run for run in runs(config)}
    assert sorted(found) == ["0", "1"]
    for run in found.values():
        assert points(config, run.info.run_id) == [(step, 1.0 / (step + 1)) for step in range(300)]
        assert run.info.status == "FINISHED"
        assert run.data.params == {"cbtm.train.learning_rate": "0.1"}
        assert run.info.artifact_uri == f"file://{tmp_path}/runs/mlartifacts/{run.info.run_id}/artifacts"
    assert replay(tmp_path / "journals", config).records_sent == 0


def test_the_run_of_a_key_is_gone_on_with_and_repeated_steps_count_once(local: TrackingConfig, tmp_path: Path) -> None:
    track(local, tmp_path / "run.jsonl", range(10))
    tracker = open_run(local, name="expert-00", kind="expert", run_key="key", journal=tmp_path / "run.jsonl")
    for step in range(5, 15):
        tracker.log_metrics({LOSS: float(step)}, step)
    wait_for(lambda: len(points(local, runs(local)[0].info.run_id)) == 15)
    assert [run.info.status for run in runs(local)] == ["RUNNING"]
    tracker.close("FAILED")
    tracker.close()
    [run] = runs(local)
    assert run.info.status == "FAILED"
    assert points(local, run.info.run_id) == [(step, float(step)) for step in range(15)]


def test_a_pod_that_lost_its_journal_repeats_no_point_either(local: TrackingConfig, tmp_path: Path) -> None:
    track(local, tmp_path / "first-pod.jsonl", range(10))
    track(local, tmp_path / "second-pod.jsonl", range(5, 15))
    [run] = runs(local)
    assert points(local, run.info.run_id) == [(step, float(step)) for step in range(15)]


def test_a_value_that_changed_stands_beside_the_first(local: TrackingConfig, tmp_path: Path) -> None:
    track(local, tmp_path / "run.jsonl", range(3))
    track(local, tmp_path / "run.jsonl", range(2, 4), scale=10.0)
    [run] = runs(local)
    assert points(local, run.info.run_id) == [(0, 0.0), (1, 1.0), (2, 2.0), (2, 20.0), (3, 30.0)]


def test_parent_and_children_find_each_other_in_any_order(
    local: TrackingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(name: str, **parent: str) -> None:
        open_run(local, name=name, kind="expert", run_key=name, journal=tmp_path / f"{name}.jsonl", **parent).close()

    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")  # injected by a KFP plugin
    child("early", parent_run_key="parent")
    options = {"name": "run", "run_key": "parent", "journal": tmp_path / "parent.jsonl"}
    parent_id = start_parent_run(local, **options, params={"clusters": 3}, tags={"team": "a"})
    assert start_parent_run(local, **options) == parent_id
    child("by-id", parent_run_id=parent_id)
    child("by-key", parent_run_key="parent")
    finish_parent_run(local, name="run", run_key="parent", journal=tmp_path / "elsewhere.jsonl")

    children = runs(local, f"tags.`mlflow.parentRunId` = '{parent_id}'")
    assert sorted(run.info.run_name for run in children) == ["by-id", "by-key", "early"]
    [parent] = runs(local, "tags.`cbtm.kind` = 'parent'")
    assert (parent.info.run_id, parent.info.status, parent.info.run_name) == (parent_id, "FINISHED", "run")
    assert parent.data.params == {"cbtm.clusters": "3"}
    assert parent.data.tags["team"] == "a"


def test_a_changed_parameter_keeps_its_first_value_and_holds_nothing_else_back(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for host in ("node-1", "node-2"):
        tracker = open_run(local, name="dense", kind="dense", run_key="key", journal=tmp_path / f"{host}.jsonl")
        tracker.log_params({"host": host, "shape": [2, 3], host: None, "long": "x" * 7000})
        tracker.log_metrics({LOSS: 1.0}, 0)
        tracker.close()
    [run] = runs(local)
    assert run.data.params == {
        "cbtm.host": "node-1",
        "cbtm.shape": "[2, 3]",
        "cbtm.node-1": "None",
        "cbtm.node-2": "None",
        "cbtm.long": "x" * 5999 + "…",
    }
    [warning] = warnings_of(caplog)
    assert "keeps its earlier values of cbtm.host=node-1 (now node-2)" in warning
    assert points(local, run.info.run_id) == [(0, 1.0)]


def test_a_dataset_is_an_input_whose_source_mlflow_can_read_back(local: TrackingConfig, tmp_path: Path) -> None:
    from mlflow.data import get_source

    digest = "sha256:" + "0123456789abcdef" * 4
    tracker = open_run(local, name="expert-03", kind="expert", run_key="key", journal=tmp_path / "run.jsonl")
    tracker.log_dataset("cluster-00003", "s3://me:secret@bucket/tokens/cluster-00003", digest, "training")
    tracker.log_dataset("valid", str(tmp_path / "valid"), "abc", "validation")
    tracker.close()
    [run] = runs(local)
    by_name = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    tags = {tag.key: tag.value for tag in by_name["cluster-00003"].tags}
    assert tags == {"mlflow.data.context": "training", "cbtm.digest": digest}
    assert by_name["cluster-00003"].dataset.digest == "0123456789abcdef0123456789abcdef0123"
    assert get_source(by_name["cluster-00003"].dataset).uri == "s3://bucket/tokens/cluster-00003"
    assert get_source(by_name["valid"].dataset).uri == str(tmp_path / "valid")


def test_what_the_server_refuses_is_left_out_alone(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(local, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    tracker.log_metrics({LOSS: 1.0}, 0)
    tracker.log_metrics({"what?": 1.0}, 1)
    tracker.log_metrics({LOSS: 2.0}, 2)
    tracker.close()
    [run] = runs(local)
    assert points(local, run.info.run_id) == [(0, 1.0), (2, 2.0)]
    assert run.info.status == "FINISHED"
    [warning] = warnings_of(caplog)
    assert "refuses line n=3 (metrics)" in warning
    assert replay(tmp_path / "run.jsonl", local).records_sent == 0


def test_an_artifact_that_is_not_there_is_an_error_of_the_caller(local: TrackingConfig, tmp_path: Path) -> None:
    tracker = open_run(local, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    with pytest.raises(DataError, match=r"report\.html is not a file; write it before it is tracked"):
        tracker.log_artifact(tmp_path / "report.html")
    tracker.close()
    with pytest.raises(RuntimeError, match=r"run\.jsonl is closed"):
        tracker.log_metrics({LOSS: 1.0}, 0)


def test_a_locked_database_is_waited_for(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(local, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    other = sqlite3.connect(tmp_path / "store" / "mlflow.db", isolation_level=None, check_same_thread=False)
    wait_for(lambda: runs_exist(local))
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(1.5, other.execute, ["COMMIT"])
    release.start()
    started = time.monotonic()
    tracker.log_metrics({LOSS: 1.0}, 0)
    assert time.monotonic() - started < 0.5
    tracker.close()
    release.join()
    other.close()
    [run] = runs(local)
    assert points(local, run.info.run_id) == [(0, 1.0)]
    assert warnings_of(caplog) == []


def test_a_store_that_lost_its_database_gets_the_whole_journal_again(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(local, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    tracker.log_metrics({LOSS: 1.0}, 0)
    wait_for(lambda: runs_exist(local) and points(local, runs(local)[0].info.run_id) == [(0, 1.0)])
    [old] = runs(local)
    with sqlite3.connect(tmp_path / "store" / "mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "tags", "params", "runs"):
            database.execute(f"DELETE FROM {table}")
    tracker.log_metrics({LOSS: 2.0}, 1)
    tracker.close()
    [new] = runs(local)
    assert new.info.run_id != old.info.run_id
    assert points(local, new.info.run_id) == [(0, 1.0), (1, 2.0)]
    [warning] = warnings_of(caplog)
    assert f"run {old.info.run_id} is not on the server any more" in warning


def test_a_deleted_run_is_not_brought_back_by_a_replay(local: TrackingConfig, tmp_path: Path) -> None:
    track(local, tmp_path / "run.jsonl", range(3))
    client(local).delete_run(runs(local)[0].info.run_id)
    report = replay(tmp_path / "run.jsonl", local)
    assert (report.records_sent, report.records_left, report.problems) == (0, 0, ())
    assert runs(local) == []


def test_a_journal_in_use_is_left_to_its_run(local: TrackingConfig, tmp_path: Path) -> None:
    tracker = open_run(local, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    report = replay(tmp_path, local)
    assert report.journals == 0
    assert "is being written by another process" in report.problems[0]
    tracker.close()


def test_without_a_server_from_the_start_replay_makes_the_runs(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Port 9 (discard) is closed; the password must not come out anywhere.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    away = TrackingConfig(retry_after_s=0.2, flush_interval_s=0.1)
    folder, report_file = tmp_path / "journals", tmp_path / "report.html"
    began = time.time() * 1000
    started = time.monotonic()
    assert start_parent_run(away, name="run", run_key="parent", journal=folder / "zz-parent.jsonl") is None
    tracker = open_run(
        away, name="expert-00", kind="expert", run_key="a", journal=folder / "a.jsonl", parent_run_key="parent"
    )
    for step in range(100):
        tracker.log_metrics({LOSS: float(step)}, step)
    report_file.write_text("<p>hello</p>")
    tracker.log_artifact(report_file, "report")
    report_file.unlink()
    time.sleep(1)  # several attempts fail
    tracker.close()
    assert time.monotonic() - started < 5
    ended = time.time() * 1000
    assert len(warnings_of(caplog)) == 2, "one for each of the two runs"
    assert "http://127.0.0.1:9 cannot be used" in warnings_of(caplog)[1]
    said = warnings_of(caplog)[1]
    assert f"{folder}/a.jsonl keeps what is tracked, and `cbtm tracking replay` with the run's configuration" in said
    assert "hunter2" not in caplog.text + (folder / "a.jsonl").read_text()

    failed = replay(folder, away)
    # open; and open, 100 points, artifact, close.
    assert (failed.records_sent, failed.records_left, len(failed.problems)) == (0, 1 + 103, 2)
    assert "hunter2" not in str(failed)
    report = replay(folder, local)
    assert (report.journals, report.records_sent, report.points_sent, report.records_left) == (2, 104, 100, 0)
    assert replay(folder, local).records_sent == 0

    by_name = {run.info.run_name: run for run in runs(local)}
    child, parent = by_name["expert-00"], by_name["run"]
    assert len(by_name) == len(runs(local)) == 2
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert began <= child.info.start_time <= child.info.end_time <= ended, "times of the work, not of the replay"
    assert points(local, child.info.run_id) == [(step, float(step)) for step in range(100)]
    downloaded = client(local).download_artifacts(child.info.run_id, "report/report.html", str(tmp_path))
    assert Path(downloaded).read_text() == "<p>hello</p>"
    assert list((folder / "a.files").iterdir()) == [], "the kept copy goes once it is sent"


def test_a_server_that_never_answers_does_not_hold_up_the_close(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:  # accepts and says nothing
        config = TrackingConfig(
            uri=f"http://127.0.0.1:{mute.getsockname()[1]}", request_timeout_s=20, close_timeout_s=1
        )
        started = time.monotonic()
        tracker = open_run(config, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
        for step in range(1000):
            tracker.log_metrics({LOSS: 1.0}, step)
        logged = time.monotonic() - started
        tracker.close()
        closed = time.monotonic() - started
    assert logged < 1
    assert closed < 3
    [warning] = warnings_of(caplog)
    assert "no answer within 1 s of closing" in warning


def test_a_server_started_on_the_local_file_shows_its_artifacts(server: Server, tmp_path: Path) -> None:
    local = TrackingConfig(uri=server.database, experiment="beside")
    tracker = open_run(local, name="seed", kind="seed", run_key="beside", journal=tmp_path / "run.jsonl")
    (tmp_path / "report.html").write_text("<p>hello</p>")
    tracker.log_artifact(tmp_path / "report.html", "report")
    tracker.close()
    experiment = client(local).get_experiment_by_name("beside")
    [run] = client(local).search_runs([experiment.experiment_id])
    address = f"{server.uri}/get-artifact?path=report/report.html&run_uuid={run.info.run_id}"
    with urllib.request.urlopen(address) as answer:
        assert answer.read() == b"<p>hello</p>"


def test_a_killed_server_costs_no_point_and_replay_sends_just_the_missing_ones(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(uri=server.uri, flush_interval_s=0.1, retry_after_s=0.3, request_timeout_s=30)
    journal = tmp_path / "run.jsonl"
    tracker = open_run(config, name="expert-00", kind="expert", run_key="killed", journal=journal)
    tracker.log_params({"a": 1})
    for step in range(100):
        tracker.log_metrics({LOSS: float(step)}, step)
    wait_for(lambda: '"mark": "sent", "n": 102' in journal.read_text())  # open, params, 100 points

    server.kill()
    for step in range(100, 200):
        tracker.log_metrics({LOSS: float(step)}, step)
        time.sleep(0.01)
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 10
    [warning] = warnings_of(caplog)
    assert f"tracking server {server.uri} cannot be used" in warning
    left = replay(journal, config)
    assert (left.records_sent, left.records_left) == (0, 101)  # 100 points, close

    server.launch()
    server.wait()
    report = replay(journal, config)
    assert (report.records_sent, report.points_sent, report.records_left, report.problems) == (101, 100, 0, ())
    assert replay(journal, config).records_sent == 0
    [run] = runs(config, "tags.`cbtm.run_key` = 'killed'")
    assert points(config, run.info.run_id) == [(step, float(step)) for step in range(200)]
    assert (run.info.status, run.data.params) == ("FINISHED", {"cbtm.a": "1"})


def test_two_openings_of_a_key_at_once_leave_one_run_on_a_server(server: Server, tmp_path: Path) -> None:
    config = TrackingConfig(uri=server.uri, request_timeout_s=30, close_timeout_s=30)
    threads = [
        threading.Thread(target=track, args=(config, tmp_path / f"{i}.jsonl", range(5), "at-once")) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [run] = runs(config, "tags.`cbtm.run_key` = 'at-once'")
    assert set(points(config, run.info.run_id)) == {(step, float(step)) for step in range(5)}


def test_a_run_goes_on_by_itself_when_the_server_is_back(
    local: TrackingConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "store" / "mlflow.db"
    config = local.model_copy(update={"retry_after_s": 0.2})
    blocker = tmp_path / "store" / "mlflow.db.lock"
    blocker.mkdir()  # whatever keeps the store from being opened: here, its lock cannot be made
    tracker = open_run(config, name="seed", kind="seed", run_key="key", journal=tmp_path / "run.jsonl")
    tracker.log_metrics({LOSS: 1.0}, 0)
    wait_for(lambda: len(warnings_of(caplog)) == 1)
    blocker.rmdir()
    wait_for(lambda: runs_exist(local) and points(local, runs(local)[0].info.run_id) == [(0, 1.0)])
    tracker.close()
    assert database.exists()
    assert len(warnings_of(caplog)) == 1


def runs_exist(config: TrackingConfig) -> bool:
    return client(config).get_experiment_by_name("cbtm") is not None and bool(runs(config))


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.05)
