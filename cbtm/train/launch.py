"""One training on the devices of one machine: in this process, or in several that torchrun starts.

Where several machines train one model, each has such a launch, for its own part of the ranks.

The launch is the only process that its user meets. It hands on what rank 0 reports, passes a stop request to the
workers themselves (torchrun would end them while they save), and makes of several failing ranks the one error that
came first. The processes run in sessions of their own, so that Ctrl-C reaches the launch alone; they end with it,
however it ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import cbtm
from cbtm.errors import ConfigError, Interrupted
from cbtm.process import stop_requested
from cbtm.train.config import OptimizationConfig
from cbtm.train.job import TrainJob
from cbtm.train.node import Node
from cbtm.train.outcome import Outcome, RankError, WorkerFailedError
from cbtm.train.slots import cores, held_locks
from cbtm.train.worker import MODULE, LaunchFolder, load_function

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float], int], None]
Progress = Callable[[int, float], None]

TARGET = "cbtm.train.expert:train_expert"
STOP_SECONDS = 600.0  # for a checkpoint of billions of parameters to reach a slow object store
_GRACE_SECONDS = 5.0  # for ranks to end by themselves once another has failed; torchrun would give them 30
_POLL_SECONDS = 0.1


def train_on(
    job: TrainJob,
    *,
    n_processes: int,
    report: Report,
    progress: Progress | None,
    stop_seconds: float = STOP_SECONDS,
    target: str = TARGET,
    node: Node | None = None,
) -> dict[str, Any]:
    """Train one member on `n_processes` devices of this machine.

    Args:
        job: The training.
        n_processes: Processes, one for each device; 1 trains in this one.
        report: Receives the metrics of rank 0 and their step.
        progress: Receives steps and losses of rank 0: with several processes not each, but the last one.
        stop_seconds: How long the processes may save after SIGTERM or SIGINT.
        target: The function that each process calls, as `package.module:function`.
        node: This machine among others that train the member with it; None for this one alone.

    Returns:
        What the function returned on rank 0; nothing on a machine that does not have it.

    Raises:
        ConfigError: If there are fewer GPUs than processes.
        Interrupted: On SIGTERM or SIGINT, after the processes have saved a checkpoint together.
        CbtmError: The error of the rank that failed first, with its exit code.
        WorkerFailedError: If that rank failed by a defect, or was ended from outside.
    """
    folder = LaunchFolder.below(job.scratch)
    if n_processes > 1 or node is not None:
        _check_devices(job.config, n_processes)
    with stop_requested() as stop:
        _wait_for_earlier(folder, job.member, stop.wait)
        if n_processes > 1 or node is not None:
            with _running(folder, job, n_processes, target, node) as launch:
                while not launch.has_ended():
                    launch.hand_on(report, progress)
                    if stop.is_set():
                        launch.stop(stop_seconds)
                    launch.end_those_left()
                    time.sleep(_POLL_SECONDS)
                launch.hand_on(report, progress)
            return launch.result()
    return load_function(target)(job, report=report, progress=progress)


def _check_devices(config: OptimizationConfig, n_processes: int) -> None:
    n_gpus = _visible_gpus() if config.device != "cpu" else 0
    if config.device == "cuda" or n_gpus:
        if n_processes > n_gpus:
            raise ConfigError(
                f"devices={n_processes}, but {n_gpus} GPUs are visible here; lower it, or train with device=cpu"
            )
    elif n_processes > len(cores()):
        logger.warning("devices=%d processes share %d cores; fewer would be quicker", n_processes, len(cores()))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _wait_for_earlier(folder: LaunchFolder, member: str, wait: Callable[[float], bool]) -> None:
    """Wait until no process is left of an earlier launch, whose own process was killed."""
    if not folder.lock.is_file():
        return
    with folder.lock.open("a") as lock:
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    logger.info("member=%s waiting for processes of an earlier try, which still save", member)
                    said = True
                if wait(_POLL_SECONDS):
                    raise Interrupted("stopped before training began") from None
            else:
                return


@contextlib.contextmanager
def _running(
    folder: LaunchFolder, job: TrainJob, n_processes: int, target: str, node: Node | None
) -> Iterator["_Launch"]:
    """Start torchrun; at the end of the block none of its processes is left."""
    shutil.rmtree(folder.root, ignore_errors=True)
    folder.root.mkdir(parents=True)
    job.save(folder.job)
    command = [sys.executable, "-m", MODULE, "agent", str(os.getpid()), str(folder.root), target, str(n_processes)]
    command += [] if node is None else node.arguments()
    with folder.agent_log.open("wb") as out:
        agent = subprocess.Popen(  # noqa: S603 - no shell, our own interpreter
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(job.config, n_processes),
            start_new_session=True,
            pass_fds=held_locks(),  # if this process is killed its devices stay taken until the agent has ended
        )
    launch = _Launch(folder, agent, node or Node(0, 1, "", 0), n_processes)
    try:
        yield launch
    finally:
        launch.end()


def _environment(config: OptimizationConfig, n_processes: int) -> dict[str, str]:
    # PET_* are settings of torchrun's, which an operator of PyTorch jobs gives for its own torchrun.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PET_")}
    threads = config.threads or environment.get("OMP_NUM_THREADS") or max(1, len(cores()) // n_processes)
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["TOKENIZERS_PARALLELISM"] = "false"
    # Where torchrun's agent is itself told to end, it gives the workers as long as this process would.
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(int(STOP_SECONDS))
    # The same cbtm, and nothing that lies in the current folder by chance. A folder of installed packages is on the
    # path anyhow, behind the standard library, where it belongs.
    environment["PYTHONSAFEPATH"] = "1"
    home = Path(cbtm.__file__).parents[1]
    if not {"site-packages", "dist-packages"} & set(home.parts):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))
    return environment


class _Rank:
    """One worker, as the launch sees it: what it tells, and the process."""

    def __init__(self, rank: int, folder: LaunchFolder) -> None:
        self.rank = rank
        self.events: list[dict[str, Any]] = []
        self.asked_to_stop = False
        self._done = False
        self._path = folder.events(rank)
        self._file: BinaryIO | None = None
        self._rest = b""
        self._pid: int | None = None
        self._process: int | None = None  # file descriptor

    def read(self) -> None:
        """Take in what it has told since the last call."""
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for event in map(json.loads, lines):
            if event["kind"] == "started":
                self._pid = event["pid"]
                self._process = _open_process(event["pid"])
            elif event["kind"] == "done":
                self._done = True
            else:
                self.events.append(event)

    def close(self) -> None:
        """Let go of its files."""
        if self._file is not None:
            self._file.close()
        if self._process is not None:
            os.close(self._process)

    @property
    def started(self) -> bool:
        """Whether it has said that it is there."""
        return self._pid is not None

    @property
    def lives(self) -> bool:
        """Whether it has started and not ended."""
        if self._process is not None:
            poll = select.poll()
            poll.register(self._process, select.POLLIN)
            return not poll.poll(0)
        return self.send(0)

    @property
    def has_failed(self) -> bool:
        """Whether it has ended without having come to an end."""
        if self._pid is None or self.lives:
            return False
        self.read()  # once more: its last words may have come in between
        return not self._done

    def send(self, number: int) -> bool:
        """Send it a signal; says whether there was somebody to get it."""
        if self._pid is None:
            return False
        try:
            if self._process is not None:
                signal.pidfd_send_signal(self._process, number)
            else:
                os.kill(self._pid, number)
        except ProcessLookupError:
            return False
        return True


def _open_process(pid: int) -> int | None:
    """File descriptor that stands for a process, and never for a later one with its number; None off Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # ended already, or a sandbox does not know the call
            return os.pidfd_open(pid)
    return None


class _Launch:
    """torchrun and its workers, from the start to their end."""

    def __init__(self, folder: LaunchFolder, agent: "subprocess.Popen[bytes]", node: Node, n_processes: int) -> None:
        self._folder, self._agent = folder, agent
        self._ranks = [_Rank(rank, folder) for rank in node.ranks(n_processes)]
        self._n_ranks = node.count * n_processes
        self._is_alone = node.count == 1
        self._killed: set[int] = set()  # by this launch
        self._stop_began: float | None = None
        self._failure_seen: float | None = None

    def has_ended(self) -> bool:
        """Whether no process is left; workers may outlive an agent that was killed, and save."""
        return self._agent.poll() is not None and not any(rank.lives for rank in self._ranks)

    def hand_on(self, report: Report, progress: Progress | None) -> None:
        """Hand on what the ranks have told."""
        for rank in self._ranks:
            rank.read()
            events, rank.events = rank.events, []
            for event in events:
                if event["kind"] == "metrics":
                    if rank.rank == 0:
                        report(event["metrics"], event["step"])
                elif event["kind"] == "progress":
                    if rank.rank == 0 and progress is not None:
                        progress(event["step"], event["loss"])
                else:
                    who = f"rank {rank.rank}: " if rank.rank else ""
                    logging.getLogger(event["logger"]).log(event["level"], "%s%s", who, event["message"])

    def stop(self, seconds: float) -> None:
        """Ask every worker to stop, as soon as it is there; after `seconds` end those that have not."""
        now = time.monotonic()
        if self._stop_began is None:
            logger.info("stopping: the processes save a checkpoint")
            self._stop_began = now
        for rank in self._ranks:
            if not rank.asked_to_stop:
                rank.asked_to_stop = rank.send(signal.SIGTERM)
        if (
            not self._is_alone
            and now - self._stop_began > _GRACE_SECONDS
            and not any(rank.started for rank in self._ranks)
        ):
            self._agent.kill()  # it waits for another machine, deaf to signals
        if now - self._stop_began > seconds:
            self._kill_ranks()

    def end_those_left(self) -> None:
        """End ranks that wait for one which has failed."""
        if self._failure_seen is None and any(rank.has_failed for rank in self._ranks):
            self._failure_seen = time.monotonic()
        if self._failure_seen is not None and time.monotonic() - self._failure_seen > _GRACE_SECONDS:
            self._kill_ranks()

    def _kill_ranks(self) -> None:
        for rank in self._ranks:
            if rank.lives and rank.send(signal.SIGKILL):
                self._killed.add(rank.rank)

    def end(self) -> None:
        """End what is left: nothing, unless this process gives up by an error of its own."""
        if self._agent.poll() is None:
            self._agent.terminate()  # first, or it takes the end of the workers for a failure
        self._kill_ranks()
        try:
            self._agent.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        for rank in self._ranks:
            rank.close()

    def result(self) -> dict[str, Any]:
        """What rank 0 returned.

        Raises:
            CbtmError: If it returned nothing.
        """
        ranks = [rank.rank for rank in self._ranks]
        failed = [RankError.load(path) for path in map(self._folder.error, ranks) if path.is_file()]
        ended = json.loads(self._folder.ended.read_bytes()) if self._folder.ended.is_file() else []
        codes = {one["rank"]: one["exit_code"] for one in ended if one["rank"] not in self._killed}
        stopping = self._stop_began is not None
        self._folder.save_outcome(failed, codes, stopping=stopping)
        outcome = Outcome(self._n_ranks, failed, codes, stopping, log=self._folder.log, n_heard=len(ranks))
        error = outcome.error()
        if error is not None:
            raise error
        if ranks[0] > 0 and self._agent.returncode == 0:
            return {}
        if not self._folder.facts.is_file():
            lines = self._folder.agent_log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise WorkerFailedError(
                f"torchrun ended with code {self._agent.returncode} and no result: {' '.join(lines[-3:])}; "
                f"its log: {self._folder.agent_log}"
            )
        facts: dict[str, Any] = json.loads(self._folder.facts.read_bytes())
        return facts
