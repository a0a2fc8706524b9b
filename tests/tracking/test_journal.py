import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from cbtm.errors import ConfigError, DataError, StorageError
from cbtm.tracking import NullTracker, TrackingConfig, finish_parent_run, open_run, replay, start_parent_run
from cbtm.tracking.config import redact
from cbtm.tracking.journal import Journal, json_number


def written(path: Path, count: int) -> None:
    journal = Journal.open(path)
    for step in range(count):
        journal.append("metrics", step=step, values={"train/loss": json_number(1.5)})
    journal.close()


def records(path: Path) -> list[tuple[int, int]]:
    journal = Journal.open(path)
    found = [(record.n, record.fields["step"]) for record, _ in journal.read()]
    journal.close()
    return found


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, cbtm.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbering_goes_on_when_a_journal_is_opened_again(tmp_path: Path) -> None:
    written(tmp_path / "run.jsonl", 2)
    written(tmp_path / "run.jsonl", 1)
    assert records(tmp_path / "run.jsonl") == [(1, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize("torn_bytes", [1, 10, 40])
def test_a_torn_last_line_is_skipped_and_the_next_line_stands_on_its_own(tmp_path: Path, torn_bytes: int) -> None:
    path = tmp_path / "run.jsonl"
    written(path, 3)
    path.write_bytes(path.read_bytes()[:-torn_bytes])
    journal = Journal.open(path)
    journal.append("metrics", step=9, values={})
    journal.close()
    # One byte less takes the newline only: that line is whole. More leaves two of three lines.
    expected = [(1, 0), (2, 1), (3, 2), (4, 9)] if torn_bytes == 1 else [(1, 0), (2, 1), (3, 9)]
    assert records(path) == expected
    assert journal.torn_lines == (0 if torn_bytes == 1 else 1)


def test_a_torn_header_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"journal": "cb')
    written(path, 1)
    assert records(path) == [(1, 0)]


def test_another_kind_of_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a corpus"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl is not a tracking journal of version 1; give another path"):
        Journal.open(path)
    assert path.read_text() == '{"text": "a corpus"}\n'


def test_one_process_writes_a_journal_at_a_time(tmp_path: Path) -> None:
    first = Journal.open(tmp_path / "run.jsonl")
    with pytest.raises(StorageError, match="is being written by another process"):
        Journal.open(tmp_path / "run.jsonl", wait_s=0)
    first.close()
    Journal.open(tmp_path / "run.jsonl", wait_s=0).close()


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written: "):
        Journal.open(tmp_path / "file" / "run.jsonl")


def test_marks_are_bound_to_a_run(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "run.jsonl")
    journal.append("params", values={})
    journal.mark_sent(1, "run-a")
    journal.close()
    journal = Journal.open(tmp_path / "run.jsonl")
    journal.close()
    assert journal.sent == {"run-a": 1}


def test_numbers_that_json_lacks_survive(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "run.jsonl")
    values = {"nan": json_number(math.nan), "inf": json_number(math.inf), "low": json_number(-math.inf)}
    journal.append("metrics", step=0, values=values)
    journal.close()
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    [(record, _)] = journal.read()
    assert math.isnan(record.points["nan"])
    assert (record.points["inf"], record.points["low"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://user:pa@ss@host:5000/x", "http://host:5000/x"),
        ("no postgresql+psycopg2://u:p@db/mlflow?x=1 (refused)", "no postgresql+psycopg2://db/mlflow?x=1 (refused)"),
        ("https://b.s3/k?X-Amz-Signature=abc&v=1", "https://b.s3/k?X-Amz-Signature=REDACTED&v=1"),
        ("postgresql://db/mlflow?password=p", "postgresql://db/mlflow?password=REDACTED"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)  # fmt: skip
def test_redact_takes_credentials_only(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_a_uri_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValidationError, match=r"tracking\.uri=http://host:5000 was given with a credential") as caught:
        TrackingConfig(uri="http://me:hunter2@host:5000")
    assert "hunter2" not in str(caught.value)


def test_settings_go_before_the_environment_and_the_environment_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert TrackingConfig().resolved_uri() == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert TrackingConfig().resolved_experiment() == "cbtm"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "domains")
    assert TrackingConfig().resolved_uri() == "http://server:5000"
    assert TrackingConfig().resolved_experiment() == "domains"
    config = TrackingConfig(uri="sqlite:///my.db?timeout=5", experiment="mine")
    assert config.resolved_uri() == f"sqlite:///{tmp_path}/my.db?timeout=5"
    assert config.resolved_experiment() == "mine"


def test_tracking_that_is_off_writes_nothing(tmp_path: Path) -> None:
    config = TrackingConfig(enabled=False)
    path = tmp_path / "run.jsonl"
    tracker = open_run(config, name="a", kind="seed", run_key="a", journal=path)
    tracker.log_metrics({"x": 1.0}, step=0)
    tracker.close()
    assert isinstance(tracker, NullTracker)
    assert start_parent_run(config, name="p", run_key="p", journal=path) is None
    finish_parent_run(config, name="p", run_key="p", journal=path)
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_cannot_stand_in_a_search_is_refused(tmp_path: Path) -> None:
    config = TrackingConfig(uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"run key \"it's\" does not match"):
        open_run(config, name="a", kind="seed", run_key="it's", journal=tmp_path / "run.jsonl")


def test_replay_names_a_path_without_a_journal(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tracking journal at "):
        replay(tmp_path, TrackingConfig())
    with pytest.raises(DataError, match=r"no tracking journal at .*nothing\.jsonl"):
        replay(tmp_path / "nothing.jsonl", TrackingConfig())
