"""The compiled pipelines on this machine: no cluster, no container engine, no server.

kfp.local executes the same YAML that a Kubeflow cluster gets, but for its retries, every task in a process of its own,
as many of a loop at once as this machine has devices for. It prints freely and takes over the root logger, so it runs
as a child process whose output goes to a log file; this process follows that file and shows one line of progress on a
terminal, and little elsewhere.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cbtm import stages, storage
from cbtm.comparison import Comparison
from cbtm.config import digest_of
from cbtm.errors import CbtmError, ConfigError, Interrupted, ManifestError
from cbtm.kubeflow.pipeline_file import for_this_machine, shipped_pipeline
from cbtm.process import end_with_parent
from cbtm.progress import PREFIX
from cbtm.run import Run
from cbtm.run_config import RunConfig
from cbtm.stages.tracked import finish_parent
from cbtm.tracking import RunStatus
from cbtm.train.launch import STOP_SECONDS
from cbtm.train.slots import default_folder, tasks_at_once, visible_gpus

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.3
_STOP_SECONDS = STOP_SECONDS + 60  # the longest that a training may take to save, and what comes after
_STAGE_DONE = re.compile(r"stage=(\S+) root=(\S+) (files=\d+ done|up to date)")


class PipelineFailedError(CbtmError):
    """A task of the pipeline failed; its own message has been shown."""

    exit_code = 1


def run_comparison(comparison: Comparison) -> None:
    """Run all arms of a comparison on this machine, as `run_pipeline` does one run."""
    from cbtm.stages.comparison import finished

    _run(comparison.shared, "compare", comparison.config, lambda: finished(Comparison(comparison.config)))


def run_pipeline(run: Run) -> None:
    """Run the compiled pipeline for `run` on this machine, or return at once if all its outputs are there.

    Raises:
        PipelineFailedError: If a task failed, with the last lines that it wrote.
        Interrupted: On SIGTERM or Ctrl-C; the tasks have saved what they could.
        ConfigError: If kfp is not installed.
        StorageError: If the run's root cannot be written.
    """
    # A fresh Run each time: one may remember manifests that have been replaced since.
    _run(run, "cbtm", run.config, lambda: stages.finished(Run(run.config)))


def _run(run: Run, pipeline: str, config: RunConfig, finished: Callable[[], bool]) -> None:
    """Run one of the pipelines with a configuration; `run` is where it is tracked, and which devices it wants."""
    if finished():
        logger.info("run=%s root=%s up to date", run.config.name, run.config.root)
        return
    _check_kfp()
    storage.check_writable(run.config.root)
    log = _log_folder(run) / f"pipeline-{datetime.now(UTC):%Y%m%dT%H%M%S}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    environment = {
        **os.environ,
        **_share_of_devices(run),
        "CBTM_PROGRESS_SECONDS": "1",
        # Threads that wait for each other spin only briefly: as quick as spinning on a machine of one's own, and
        # twice as quick where tasks share the cores (docs/experiments.md).
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000"),
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("wb") as out:
        child = subprocess.Popen(  # noqa: S603 - no shell, our own interpreter
            [sys.executable, "-m", "cbtm.local", pipeline, config.model_dump_json()],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops all of them in order
        )
    try:
        code = _follow(child, log)
    except Interrupted:
        _close_parent(run, "KILLED")
        raise
    _stop(child)  # tasks that outlived a pipeline that failed
    # By what was written, not by the exit code alone: an earlier configuration's manifest proves nothing.
    if code != 0 or not finished():
        _close_parent(run, "FAILED")
        raise PipelineFailedError(f"{_reason(log)}\nthe whole log: {log}")
    logger.info("run=%s root=%s seconds=%.0f done", run.config.name, run.config.root, time.monotonic() - started)


def _share_of_devices(run: Run) -> dict[str, str]:
    """How many tasks run at once, and where they agree on who has which device (`cbtm.train.slots`)."""
    train, folder = run.config.train, default_folder()
    tasks = os.environ.get("CBTM_TASKS") or str(
        tasks_at_once(train.devices, threads=train.threads, device=train.device)
    )
    if not tasks.isdecimal() or int(tasks) < 1:
        raise ConfigError(f"CBTM_TASKS={tasks!r}: expected the number of tasks that run at once, 1 or more")
    return {
        "CBTM_TASKS": tasks,
        # GPUs are taken in turns by all runs of a user, cores by the tasks of one run: a small run is not to wait for
        # the hours of another, and the system shares cores between them.
        "CBTM_SLOTS": os.environ.get(
            "CBTM_SLOTS", str(folder if visible_gpus() else folder / digest_of([os.getcwd(), run.config.root])[:16])
        ),
        # Or else a task that asks whether there are GPUs can no longer be given one of them.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }


def _close_parent(run: Run, status: RunStatus) -> None:
    """Say in the tracker how the run ended; the next try opens the same parent again."""
    with contextlib.suppress(ManifestError):  # not even planned: there is no parent run yet
        finish_parent(run, status)


def _check_kfp() -> None:
    from importlib.util import find_spec

    if find_spec("kfp") is None:
        raise ConfigError('cbtm run needs kfp, which executes the compiled pipeline: pip install "cbtm[local]"')


def _log_folder(run: Run) -> Path:
    root = run.config.root
    return storage.local_path(root) / "logs" if not storage.is_s3(root) else Path(tempfile.gettempdir(), "cbtm-logs")


def _follow(child: "subprocess.Popen[bytes]", log: Path) -> int:
    """Show what the pipeline writes until it ends; stop it in order when this process is asked to stop."""
    view = _View()
    try:
        with _sigterm_as_interrupt(), log.open(encoding="utf-8", errors="replace") as lines:
            while True:
                ended = child.poll() is not None
                for line in _new_lines(lines):
                    view.show(line)
                if ended:
                    return child.returncode
                time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        logger.info("stopping: the tasks save their checkpoints")
        _stop(child)
        raise Interrupted("stopped; run the same command to go on from here") from None
    finally:
        view.close()


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """Let every task save a checkpoint: SIGTERM to the whole session, and a bound on the patience."""
    deadline = time.monotonic() + _STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):  # the group is gone when its last process is
        os.killpg(child.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(_POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _new_lines(file: Any) -> Iterator[str]:
    while line := file.readline():
        if not line.endswith("\n"):  # half a line: read it again when the rest is there
            file.seek(file.tell() - len(line.encode()))
            return
        yield line.strip()


@dataclass
class _View:
    """One line on a terminal: tasks done, and what runs now; elsewhere only stages that ended, and warnings."""

    running: dict[str, str] = field(default_factory=dict)
    bar: Any = None

    def __post_init__(self) -> None:
        if sys.stderr.isatty():
            self.bar = tqdm(bar_format="{elapsed} {n_fmt} stages done {desc}", leave=False)

    def show(self, line: str) -> None:
        if line.startswith(PREFIX):
            task, _, state = line.removeprefix(f"{PREFIX} task=").partition(" ")
            self.running[task] = state
            self._draw()
        elif found := _STAGE_DONE.match(line):
            name = found[2].rsplit("/", 1)[-1]
            self.running = {task: state for task, state in self.running.items() if name not in task}
            self._say(line)
            if self.bar is not None:
                self.bar.update(1)
        elif line.startswith(("error: ", "warning: ")):
            self._say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            logger.info("%s", line)

    def _draw(self) -> None:
        if self.bar is not None:
            latest = list(self.running.items())[-2:]
            self.bar.set_description_str("| " + " | ".join(f"{task} {state}" for task, state in latest))


def _reason(log: Path) -> str:
    """What the failed task said: its error line, or else the end of its traceback."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0].removeprefix("error: ")
    return "the pipeline failed:\n" + "\n".join(lines[-15:])


def _stop_with_parent() -> None:
    """End this session's tasks with this process, and this process with the one that started it, however it ends."""
    signal.signal(signal.SIGTERM, _stop_session)
    end_with_parent()


def _stop_session(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    # Not sys.exit: kfp's threads would be waited for, and they wait for tasks that may take a while to save.
    os._exit(Interrupted.exit_code)


def _run_at_once(n_tasks: int) -> None:
    """Have kfp.local run `n_tasks` tasks of a loop at once.

    kfp 2.17 runs two, whatever a pipeline asks for, because threads multiply where loops lie within loops; of those
    that do `for_this_machine` lets two turns run at once. There is no setting.
    """
    from kfp.local.orchestrator import enhanced_dag_orchestrator

    class Executor(enhanced_dag_orchestrator.ParallelExecutor):  # type: ignore[misc]  # kfp has no types
        def __init__(self) -> None:
            super().__init__()
            self.conservative_max = self.max_workers = n_tasks

    enhanced_dag_orchestrator.ParallelExecutor = Executor


def main() -> None:
    """Execute a compiled pipeline in this process: its name and the configuration are the arguments."""
    from kfp import components, local

    _stop_with_parent()
    _run_at_once(int(os.environ["CBTM_TASKS"]))
    name, config = sys.argv[1:]
    root = json.loads(config)["root"]
    with tempfile.TemporaryDirectory(prefix="cbtm-kfp-") as scratch:
        # Small artifacts only (manifests, the report); what they speak of lies below the run's root.
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=scratch, raise_on_error=True)
        pipeline = components.load_component_from_text(for_this_machine(shipped_pipeline(name)))
        logging.getLogger(__name__).info("pipeline=%s root=%s", name, root)
        pipeline(config=config)


if __name__ == "__main__":
    main()
