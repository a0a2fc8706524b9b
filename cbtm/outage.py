"""Waiting for a service that is away: how long, in which steps, what the log says of it, and what ends it early.

An attempt that fails for a passing reason is made again after 0.5 s, then after pauses that double up to 10 s, each
shortened at random by up to a half, so that many processes do not come back in the same instant. The patience is one
number for the process: none by default, since a person at a prompt wants the error at once; minutes in a pod, where
nobody waits and an error ends hours of work.
"""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds
_REMIND_SECONDS = 30.0  # between the log's warnings
_POLL_SECONDS = 0.2  # how late a pause notices that it is ended

T = TypeVar("T")

_process_patience = 0.0
_patience_here: ContextVar[float | None] = ContextVar("patience", default=None)
_ends: ContextVar[tuple[threading.Event, ...]] = ContextVar("ends", default=())
_jitter = random.Random()  # noqa: S311 - lengths of pauses; not the global one, whose seed is not ours


def be_patient(seconds: float) -> None:
    """Set for this process how long a request to a store that is away is repeated; 0, the default, is not at all."""
    global _process_patience
    _process_patience = seconds


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Have the calls of this block, in this thread, wait up to `seconds` instead of what `be_patient` says."""
    token = _patience_here.set(seconds)
    try:
        yield
    finally:
        _patience_here.reset(token)


@contextlib.contextmanager
def ended_by(event: threading.Event) -> Iterator[None]:
    """Have the waits and transfers of this block, in this thread, fail with a StorageError once `event` is set."""
    token = _ends.set((*_ends.get(), event))
    try:
        yield
    finally:
        _ends.reset(token)


class GivenUp(Exception):
    """The service did not come back in time.

    Attributes:
        reason: What the last attempt failed with.
        seconds: Time since the first attempt failed.
    """

    def __init__(self, reason: Exception, seconds: float) -> None:
        super().__init__(str(reason))
        self.reason, self.seconds = reason, seconds


@dataclass(frozen=True)
class Patience:
    """How long the requests of one call are repeated, and what ends that early; shared by the call's threads.

    Attributes:
        seconds: Longest time from the first failure of a request to its last attempt.
        ends: Any of these, once set, ends all waiting.
    """

    seconds: float
    ends: tuple[threading.Event, ...]

    @classmethod
    def of_this_call(cls) -> "Patience":
        """What holds in this thread now."""
        here = _patience_here.get()
        return cls(_process_patience if here is None else here, _ends.get())

    def is_ended(self) -> bool:
        """Tell whether the call is to stop."""
        return any(event.is_set() for event in self.ends)

    def pause(self, seconds: float) -> None:
        """Sleep in short steps: signals reach the main thread, the end of the call reaches the others."""
        until = time.monotonic() + seconds
        while not self.is_ended() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))


def persist(service: str, attempt: Callable[[], T], patience: Patience, is_passing: Callable[[Exception], bool]) -> T:
    """Make attempts until one succeeds.

    Args:
        service: Name for the log.
        attempt: What is done; may have been done in part by an attempt that failed.
        patience: How long, since the first failure.
        is_passing: Tells whether an error may be over later with nothing done about it.

    Raises:
        GivenUp: If the patience is over or ended.
        Exception: That of the first attempt without patience, or any that is not a passing one.
    """
    began, pause = None, _FIRST_PAUSE
    while True:
        try:
            result = attempt()
        except Exception as error:
            if patience.seconds <= 0 or not is_passing(error):
                raise
            now = time.monotonic()
            began = now if began is None else began
            left = began + patience.seconds - now
            if left <= 0 or patience.is_ended():
                raise GivenUp(error, now - began) from error
            _log.failed(service, error, left)
            patience.pause(min(left, pause * _jitter.uniform(0.5, 1)))
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if began is not None:
                _log.answered(service, time.monotonic() - began)
            return result


class _OutageLog:
    """Few lines about an outage, however many threads meet it: when it begins, every 30 s, and when it is over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = float("-inf")
        self._is_over = True

    def failed(self, service: str, reason: Exception, left: float) -> None:
        with self._lock:
            if time.monotonic() - self._last < _REMIND_SECONDS:
                return
            self._last, self._is_over = time.monotonic(), False
        logger.warning("%s does not answer (%s); trying again for up to %.0f s", service, reason, left)

    def answered(self, service: str, seconds: float) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        logger.info("%s answers again after %.1f s", service, seconds)


_log = _OutageLog()
