"""Following a run on a cluster to its end."""

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from cbtm.errors import CbtmError
from cbtm.kubeflow.api import Kubeflow, UnreachableError
from cbtm.kubeflow.run_status import ENDED, TaskStatus, task_statuses

logger = logging.getLogger(__name__)

_POLL_SECONDS = 10.0
# A run takes hours; a proxy or a server that restarts meanwhile is no end of it.
_PATIENCE_SECONDS = 600.0


class RunFailedError(CbtmError):
    """A run on a cluster did not succeed."""

    exit_code = 1


def follow(kubeflow: Kubeflow, run_id: str) -> Any:
    """Show the progress of a run until it ends: a line on a terminal, elsewhere one for each change.

    Raises:
        RunFailedError: If it fails or is cancelled, with the tasks that failed and what they say.
        UnreachableError: If the API does not answer for ten minutes.
    """
    view, away_since = _View(), None
    try:
        while True:
            try:
                run = kubeflow.run(run_id)
            except UnreachableError as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > _PATIENCE_SECONDS:
                    raise
                logger.debug("%s", error)
            else:
                away_since = None
                tasks = task_statuses(run)
                view.show(run.state or "PENDING", tasks)
                if run.state in ENDED:
                    _check_success(run, tasks)
                    return run
            time.sleep(_POLL_SECONDS)
    finally:
        view.close()


def _check_success(run: Any, tasks: list[TaskStatus]) -> None:
    if run.state == "SUCCEEDED":
        return
    failed = [f"{task.name}: {'; '.join(task.errors) or 'failed'}" for task in tasks if task.states["FAILED"]]
    said = [run.error.message] if run.error is not None and run.error.message else []
    raise RunFailedError(
        f"run {run.run_id} {run.state.lower()}: {' | '.join([*said, *failed]) or 'no task says why'}; "
        f"cbtm logs {run.run_id} shows what a task wrote, cbtm retry {run.run_id} goes on from there"
    )


class _View:
    """The last state of a run that was shown."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._bar: Any = tqdm(bar_format="{elapsed} {desc}", leave=False) if sys.stderr.isatty() else None

    def show(self, state: str, tasks: list[TaskStatus]) -> None:
        """Show what has changed."""
        done = sum(task.state == "SUCCEEDED" for task in tasks)
        running = [str(task) for task in tasks if task.state == "RUNNING"]
        if self._bar is not None:
            self._bar.set_description_str(f"{state.lower()} {done} of {len(tasks)} tasks | {' | '.join(running[-2:])}")
            return
        for task in tasks:
            counts = ",".join(f"{name.lower()}={n}" for name, n in sorted(task.states.items()))
            line = f"task={task.name} {counts}"
            if task.states and line not in self._said:
                self._said.add(line)
                logger.info("%s", line)

    def close(self) -> None:
        """Let go of the terminal's line."""
        if self._bar is not None:
            self._bar.close()
