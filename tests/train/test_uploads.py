"""Publishing beside training: real folders, real threads, and publishers that are slow or fail."""

import errno
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cbtm import storage
from cbtm.errors import StorageError
from cbtm.train.uploads import Uploads


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Folder of the checkpoints that are on their way."""
    folder = tmp_path / "local"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def checkpoint(local: Path, step: int) -> Path:
    folder = local / f"step-{step}"
    folder.mkdir()
    (folder / "model").write_text(f"weights of step {step}")
    (folder / "state").write_text(str(step))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def copy_to(target: Path) -> Callable[[Path], None]:
    return lambda folder: storage.upload(folder, str(target / folder.name), ["model", "state"])


class Gate:
    """A publisher that says when it has begun and goes on when it is let."""

    def __init__(self, target: Path) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.copy = copy_to(target)

    def __call__(self, folder: Path) -> None:
        self.begun.set()
        assert self.go.wait(10)
        self.copy(folder)


@pytest.fixture
def gate(target: Path) -> Iterator[Gate]:
    gate = Gate(target)
    yield gate
    gate.go.set()


def fail(folder: Path) -> None:
    storage.upload(folder, "/dev/null/not/a/folder", ["model"])


def test_what_is_submitted_is_published_whole_and_its_folder_removed(local: Path, target: Path):
    with Uploads() as uploads:
        for step in range(3):
            uploads.submit(checkpoint(local, step), copy_to(target))
            uploads.drain()
            assert names(local) == []
    assert names(target) == ["step-0", "step-1", "step-2"]
    assert (target / "step-1" / "model").read_text() == "weights of step 1"
    assert (uploads.failed, uploads.last_error) == (0, None)


def test_submit_returns_while_the_folder_is_being_published(local: Path, target: Path, gate: Gate):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), gate)
        assert gate.begun.wait(10)
        assert names(target) == []
        gate.go.set()
    assert names(target) == ["step-1"]


def test_a_newer_checkpoint_replaces_the_one_that_waits(
    local: Path, target: Path, gate: Gate, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "cbtm")
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), gate)
        assert gate.begun.wait(10)
        uploads.submit(checkpoint(local, 2), copy_to(target))
        assert names(local) == ["step-1", "step-2"]
        uploads.submit(checkpoint(local, 3), copy_to(target))
        assert names(local) == ["step-1", "step-3"]
        uploads.submit(checkpoint(local, 4), copy_to(target))
        assert names(local) == ["step-1", "step-4"]
        gate.go.set()
    assert names(target) == ["step-1", "step-4"]
    assert names(local) == []
    assert caplog.messages == [
        "checkpoint=step-2 replaced by a newer one before it was published",
        "checkpoint=step-3 replaced by a newer one before it was published",
    ]


def test_the_local_disk_never_holds_more_than_three(local: Path, target: Path):
    most_written, most_published = 0, 0

    def publish(folder: Path) -> None:
        nonlocal most_published
        for _ in range(3):
            most_published = max(most_published, len(names(local)))
            time.sleep(0.002)
        if folder.name.endswith("7"):
            raise StorageError("the store is away")
        copy_to(target)(folder)

    with Uploads() as uploads:
        for step in range(100):
            folder = checkpoint(local, step)
            most_written = max(most_written, len(names(local)))
            uploads.submit(folder, publish)
            assert len(names(local)) <= 2
            time.sleep(0.001)
    # One being written, one that waits, one being published.
    assert most_written == 3
    assert most_published <= 3
    assert names(local) == []
    assert "step-99" in names(target)


# --- failures ---


def full_disk(_: Path) -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("publish", "message"), [(fail, "Not a directory"), (full_disk, "No space left on device")], ids=["fail", "full"]
)
def test_a_failure_is_a_warning_and_the_next_submission_a_new_try(
    local: Path, target: Path, caplog: pytest.LogCaptureFixture, publish: Callable[[Path], None], message: str
):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), publish)
        with pytest.raises(OSError, match=message):
            uploads.drain()
        assert uploads.failed == 1
        assert message in str(uploads.last_error)
        assert names(local) == []
        uploads.submit(checkpoint(local, 2), copy_to(target))
        uploads.drain()  # the newest is there: nothing is raised
    assert names(target) == ["step-2"]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("checkpoint=step-1 was not published: ")
    assert record.getMessage().endswith("; a restart goes on from an earlier one")
    assert uploads.failed == 1


def test_the_end_of_a_good_training_raises_if_its_newest_checkpoint_is_lost(local: Path, target: Path):
    def train() -> None:
        with Uploads() as uploads:
            uploads.submit(checkpoint(local, 1), copy_to(target))
            uploads.drain()
            uploads.submit(checkpoint(local, 2), fail)

    with pytest.raises(StorageError, match="Not a directory"):
        train()
    assert names(target) == ["step-1"]


def test_a_permission_that_is_missing_is_a_warning(local: Path, tmp_path: Path):
    def publish(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    uploads = Uploads()
    uploads.submit(checkpoint(local, 1), publish)
    with pytest.raises(PermissionError):
        uploads.drain()
    uploads.submit(checkpoint(local, 2), publish)  # goes on
    uploads.close(seconds=5)
    assert uploads.failed == 2


@pytest.mark.parametrize("defect", [ValueError("a defect"), SystemExit("a defect")])
def test_a_defect_reaches_the_trainer_at_the_next_submission(local: Path, target: Path, defect: BaseException):
    def publish(_: Path) -> None:
        raise defect

    uploads = Uploads()
    uploads.submit(checkpoint(local, 1), publish)
    with pytest.raises(type(defect), match="a defect"):
        uploads.drain()
    with pytest.raises(type(defect), match="a defect"):
        uploads.submit(checkpoint(local, 2), copy_to(target))
    uploads.close(seconds=5)


# --- the end ---


def test_a_training_that_fails_still_publishes_what_it_has_finished(local: Path, target: Path, gate: Gate):
    def train() -> None:
        with Uploads() as uploads:
            uploads.submit(checkpoint(local, 1), gate)
            uploads.submit(checkpoint(local, 2), copy_to(target))
            threading.Timer(0.2, gate.go.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert "step-2" in names(target)
    assert names(local) == []


def test_a_training_that_fails_waits_for_so_long_and_says_what_it_leaves(
    local: Path, target: Path, gate: Gate, caplog: pytest.LogCaptureFixture
):
    def train() -> None:
        with Uploads(seconds=0.3) as uploads:
            uploads.submit(checkpoint(local, 1), gate)
            assert gate.begun.wait(10)
            uploads.submit(checkpoint(local, 2), copy_to(target))
            raise ZeroDivisionError

    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        train()
    assert 0.3 <= time.monotonic() - began < 3
    assert caplog.messages == [
        f"not published within 0.3 s, left on the local disk: {local / 'step-1'}, {local / 'step-2'}"
    ]
    assert names(local) == ["step-1", "step-2"]


def test_a_failure_does_not_hide_the_error_that_ended_the_training(local: Path):
    def train() -> None:
        with Uploads() as uploads:
            uploads.submit(checkpoint(local, 1), fail)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()


def test_nothing_is_taken_after_close(local: Path, target: Path):
    uploads = Uploads()
    uploads.close()
    uploads.close()
    with pytest.raises(RuntimeError, match="step-1 was submitted after close"):
        uploads.submit(checkpoint(local, 1), copy_to(target))


def test_the_thread_ends_with_close(local: Path, target: Path):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), copy_to(target))
    for _ in range(100):
        if not any(thread.name == "uploads" for thread in threading.enumerate()):
            break
        time.sleep(0.02)
    assert not any(thread.name == "uploads" for thread in threading.enumerate())


def test_the_time_that_the_trainer_was_blocked_is_that_of_the_drain(local: Path, gate: Gate):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), gate)
        time.sleep(0.3)  # training
        assert uploads.seconds_blocked < 0.2
        threading.Timer(0.4, gate.go.set).start()
        uploads.drain()
        assert 0.3 < uploads.seconds_blocked < 2


# --- the process ---


def run(script: str, *arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    return time.monotonic() - began, done


def test_a_process_that_ends_without_close_does_not_wait_for_the_thread(local: Path):
    script = """
import sys, time
from pathlib import Path
from cbtm.train.uploads import Uploads
uploads = Uploads()
uploads.submit(Path(sys.argv[1]), lambda folder: time.sleep(50))
raise ZeroDivisionError
"""
    took, done = run(script, str(checkpoint(local, 1)))
    assert done.stderr.rstrip().endswith("ZeroDivisionError")
    assert took < 15


def test_a_training_that_fails_during_an_outage_does_not_wait_for_the_patience_of_storage(
    local: Path, s3_settings: pytest.MonkeyPatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        s3_settings.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    script = """
import sys
from pathlib import Path
from cbtm import storage
from cbtm.train.uploads import Uploads
storage.be_patient(300)
with Uploads(seconds=1) as uploads:
    uploads.submit(Path(sys.argv[1]), lambda folder: storage.upload(folder, "s3://bucket/key", ["model", "state"]))
    raise ZeroDivisionError
"""
    took, done = run(script, str(checkpoint(local, 1)))
    assert done.stderr.rstrip().endswith("ZeroDivisionError")
    assert "not published within 1 s, left on the local disk" in done.stderr
    assert took < 20
    assert names(local) == ["step-1"]


def test_a_forked_child_that_waits_is_told_that_the_thread_is_elsewhere(local: Path, target: Path, gate: Gate):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), gate)
        assert gate.begun.wait(10)
        child = os.fork()
        if child == 0:
            try:
                uploads.drain()
            except RuntimeError as error:
                os._exit(0 if "its thread is not in this process" in str(error) else 1)
            os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        gate.go.set()
    assert names(target) == ["step-1"]


def test_a_publisher_may_move_the_files_away(local: Path, target: Path):
    with Uploads() as uploads:
        uploads.submit(checkpoint(local, 1), lambda folder: shutil.move(folder, target / "moved"))
    assert names(target / "moved") == ["model", "state"]
    assert names(local) == []
