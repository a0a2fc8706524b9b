"""The processes that a launch starts: torchrun's agent, and one worker for each rank.

They speak to the launch (`cbtm.train.launch`) through files of one folder, because torchrun passes on neither pipes
nor return values: each rank appends what happens to its own file of events, and leaves its error or the result as a
file that is written whole. torchrun itself says which rank ended and how; its output is for logs alone.
"""

import contextlib
import dataclasses
import faulthandler
import fcntl
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbtm import storage
from cbtm.process import end_with_parent, log_to_stderr, s3_patience
from cbtm.train.job import TrainJob
from cbtm.train.node import Node
from cbtm.train.outcome import RankError

logger = logging.getLogger(__name__)

Train = Callable[..., dict[str, Any]]

MODULE = "cbtm.train.worker"
_OUTCOME = "outcome.json"
_MEETING_SECONDS = 1800  # that one machine may wait for another, which still fetches its inputs
_PROGRESS_SECONDS = 0.1  # between two events of progress: a bar needs no more


@dataclass(frozen=True)
class LaunchFolder:
    """Files of one launch, below the job's scratch folder."""

    root: Path

    @classmethod
    def below(cls, scratch: Path) -> "LaunchFolder":
        """That of a job with this scratch folder."""
        return cls(scratch / "launch")

    @property
    def job(self) -> Path:
        """The job, as `TrainJob.save` writes it."""
        return self.root / "job.json"

    @property
    def facts(self) -> Path:
        """What rank 0 returned, there once it has."""
        return self.root / "facts.json"

    @property
    def ended(self) -> Path:
        """What torchrun's agent says of ranks that ended otherwise: rank and exit code, the first one first."""
        return self.root / "ended.json"

    def save_outcome(self, errors: list[RankError], exit_codes: dict[int, int], *, stopping: bool) -> None:
        """Write down how the ranks ended, as the launch sees it, for those who look at more than its own error."""
        told = {"errors": [dataclasses.asdict(error) for error in errors], "exit_codes": exit_codes}
        storage.write_bytes(str(self.root / _OUTCOME), json.dumps({**told, "stopping": stopping}).encode())

    def clear_outcome(self) -> None:
        """Forget that of an earlier launch."""
        (self.root / _OUTCOME).unlink(missing_ok=True)

    def load_outcome(self) -> dict[str, Any] | None:
        """What `save_outcome` wrote; None if the launch has not come to its end."""
        path = self.root / _OUTCOME
        found: dict[str, Any] | None = json.loads(path.read_bytes()) if path.is_file() else None
        return found

    @property
    def agent_log(self) -> Path:
        """Output of torchrun's agent, and of workers before they have a log."""
        return self.root / "agent.log"

    @property
    def lock(self) -> Path:
        """Locked as long as a process of the launch lives; outside of the folder, which the next launch empties."""
        return self.root.with_name(f"{self.root.name}.lock")

    def log(self, rank: int) -> Path:
        """Output of one rank, with its tracebacks."""
        return self.root / "logs" / f"rank-{rank}.log"

    def events(self, rank: int) -> Path:
        """What one rank tells while it runs, one JSON object a line."""
        return self.root / "events" / f"rank-{rank}.jsonl"

    def error(self, rank: int) -> Path:
        """Why one rank ended, as `RankError`."""
        return self.root / "errors" / f"rank-{rank}.json"


class Events:
    """What a rank tells while it runs; each event is one write, so that none is read by halves."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, kind: str, **content: Any) -> None:
        """Append one event."""
        os.write(self._file, (json.dumps({"kind": kind, **content}) + "\n").encode())


class _EventHandler(logging.Handler):
    """Log records as events: the launch logs them again, where its user sees them."""

    def __init__(self, events: Events, level: int) -> None:
        super().__init__(level)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._events.write("log", level=record.levelno, logger=record.name, message=self.format(record))
        except OSError:
            self.handleError(record)


def load_function(name: str) -> Train:
    """The function that a dotted name, `package.module:function`, stands for."""
    module, _, function = name.partition(":")
    found: Train = getattr(importlib.import_module(module), function)
    return found


@contextlib.contextmanager
def shared_lock(path: Path) -> Iterator[None]:
    """Hold a lock that many processes hold at once, until the block or the process ends."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def run_worker(folder: LaunchFolder, target: str) -> int:
    """Train as one rank; returns the exit code.

    An interrupted rank ends with 0: torchrun would otherwise end the others, which may still be saving.
    """
    rank = int(os.environ["RANK"])
    _send_output_to(folder.log(rank))
    events = Events(folder.events(rank))
    events.write("started", pid=os.getpid())
    log_to_stderr()
    # The launch's user reads the log of rank 0, and of the others what may need him.
    logging.getLogger().addHandler(_EventHandler(events, logging.NOTSET if rank == 0 else logging.WARNING))
    try:
        storage.be_patient(s3_patience())
        with shared_lock(folder.lock):
            job = TrainJob.load(folder.job)
            facts = load_function(target)(job, report=_reporter(events), progress=_progress(events, job.config.steps))
            _ignore_stop()
            if rank == 0:
                storage.write_bytes(str(folder.facts), json.dumps(facts).encode())
    except BaseException as error:
        _ignore_stop()
        traceback.print_exc()
        found = RankError.of(error, rank)
        found.save(folder.error(rank))
        if not found.is_interruption:
            return 1
    events.write("done")
    return 0


def _ignore_stop() -> None:
    """Leave the end to this process: one that ends by a signal has torchrun end the others."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _reporter(events: Events) -> Callable[[Mapping[str, float], int], None]:
    def report(metrics: Mapping[str, float], step: int) -> None:
        events.write("metrics", metrics={name: float(value) for name, value in metrics.items()}, step=step)

    return report


def _progress(events: Events, steps: int) -> Callable[[int, float], None]:
    last = 0.0

    def progress(step: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS or step == steps:
            last = now
            events.write("progress", step=step, loss=loss)

    return progress


def _send_output_to(path: Path) -> None:
    """Have all that this process and its libraries print go to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
    faulthandler.enable()  # a segmentation fault leaves its stack there


def run_agent(folder: LaunchFolder, n_processes: int, target: str, node: Node | None) -> int:
    """Run torchrun in this process, for this machine alone or as one of several; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    options: dict[str, object] = {"--nproc-per-node": n_processes, "--max-restarts": 0}
    if node is None:
        options |= {"--local-addr": "127.0.0.1"}
    else:
        options |= {"--nnodes": node.count, "--node-rank": node.number}
        options |= {"--master-addr": node.address, "--master-port": node.port}
        options |= {"--rdzv-conf": f"timeout={_MEETING_SECONDS}"}
    arguments = ["--standalone"] if node is None else []
    arguments += [str(part) for option in options.items() for part in option]
    arguments += ["--log-dir", str(folder.root / "torchrun"), "-m", MODULE]
    try:
        with shared_lock(folder.lock):
            torchrun([*arguments, "worker", str(os.getpid()), str(folder.root), target])
    except ChildFailedError as error:
        ended = [{"rank": rank, "exit_code": failure.exitcode} for rank, failure in error.failures.items()]
        storage.write_bytes(str(folder.ended), json.dumps(ended).encode())
        return 1
    return 0


def main(arguments: list[str]) -> int:
    """Run as `agent PARENT FOLDER TARGET N [NODE]` or `worker PARENT FOLDER TARGET`; PARENT starts it."""
    role, parent, root, target, *rest = arguments
    end_with_parent()
    if os.getppid() != int(parent):  # it ended before it could be said that this process ends with it
        return 1
    folder = LaunchFolder(Path(root))
    if role == "agent":
        return run_agent(folder, int(rest[0]), target, Node.parse(rest[1:]) if rest[1:] else None)
    return run_worker(folder, target)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: what libraries do at the end may wait for ranks that are gone
