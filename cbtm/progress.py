"""Progress of long work: a bar on a terminal, now and then a log line elsewhere.

A run of many processes shows one bar: its stages write lines (`CBTM_PROGRESS_SECONDS` apart) that `cbtm run` reads.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

PREFIX = "progress"
_QUIET_SECONDS = 60.0  # a pod's log should show life, and little else


class Progress:
    """Counts towards a total; `update` may be called as often as one likes."""

    def __init__(self, task: str, unit: str) -> None:
        self._task, self._unit = task, unit
        seconds = os.environ.get("CBTM_PROGRESS_SECONDS")
        self._interval = float(seconds) if seconds else _QUIET_SECONDS
        self._bar: Any = None
        self._on_terminal = seconds is None and sys.stderr.isatty()
        self._last = time.monotonic()

    def update(self, done: int, total: int | None, **facts: str) -> None:
        """Say how far the work is: `done` of `total` units, with a few facts such as the loss."""
        if self._on_terminal:
            if self._bar is None:
                self._bar = tqdm(total=total, initial=done, desc=self._task, unit=f" {self._unit}", leave=False)
            self._bar.n = done
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(0)
            return
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            rest = "".join(f" {key}={value}" for key, value in facts.items())
            of = f"/{total}" if total is not None else ""
            logger.info("%s task=%s %s=%d%s%s", PREFIX, self._task, self._unit, done, of, rest)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(task: str, unit: str) -> Iterator[Progress]:
    """Progress of one task, closed at the end."""
    shown = Progress(task, unit)
    try:
        yield shown
    finally:
        shown.close()
