"""Checkpoints on their way to storage while training goes on, one at a time, in one thread.

The trainer writes a folder and hands it over; it never waits for the network. If checkpoints are finished faster than
they are published, the newest is what a restart wants, so a newer one takes the place of the one that waits. Local
disk therefore holds three at most: the one being written, the one that waits, the one being published.

A checkpoint that cannot be published (after storage's patience is over, on a full disk, without permission) is a
warning and no end of the training, which may well finish without ever needing it. What is lost is time: a restart
goes on from the last checkpoint that did arrive. The next one handed over is a new try.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from cbtm import storage
from cbtm.errors import CbtmError

logger = logging.getLogger(__name__)

Publish = Callable[[Path], None]

_POLL_SECONDS = 1.0  # how late a wait notices that the thread is gone, as in a forked child


class Uploads:
    """Publishes folders one after the other, beside the thread that makes them.

    As a context manager it drains at the end of the block. If the block fails, what was handed over is still
    published, for at most `seconds`; what is not done then stays on the local disk.

    The thread is a daemon: a process that ends without `close` does not wait for it.

    Args:
        seconds: Time for publishing at the end of a block that failed; within the notice that a machine is given
            before it is taken away.

    Attributes:
        failed: How many submissions could not be published.
        last_error: Why the newest of them could not.
        seconds_blocked: Time that callers spent in `submit`, `drain` and `close`.
    """

    def __init__(self, *, seconds: float = 60.0) -> None:
        self.failed = 0
        self.last_error: BaseException | None = None
        self.seconds_blocked = 0.0
        self._seconds = seconds
        self._changed = threading.Condition()
        self._waiting: tuple[Path, Publish] | None = None
        self._publishing: Path | None = None
        self._newest: BaseException | None = None  # why the newest submission failed; None if it did not
        self._defect: BaseException | None = None  # no failure of storage, so not to be passed over
        self._closed = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path, publish: Publish) -> None:
        """Hand over a finished folder, which belongs to this object from now on and is removed once published.

        Args:
            folder: Local folder that nobody writes to any more; each submission's is another one.
            publish: Brings the content of `folder` to where it belongs; called in the thread. May move files away.

        Raises:
            RuntimeError: After `close`.
            BaseException: What an earlier `publish` raised that is neither a `CbtmError` nor an `OSError`: a defect.
        """
        with self._blocking():
            with self._changed:
                self._raise_defect()
                if self._closed:
                    raise RuntimeError(f"{folder} was submitted after close")
                replaced, self._waiting = self._waiting, (folder, publish)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
            if replaced is not None:
                logger.info("checkpoint=%s replaced by a newer one before it was published", replaced[0].name)
                shutil.rmtree(replaced[0], ignore_errors=True)

    def drain(self) -> None:
        """Wait until everything submitted is published.

        Raises:
            BaseException: What the newest submission failed with; an earlier failure is made good by a later success.
        """
        with self._blocking():
            if not self._wait(None):
                raise RuntimeError("what was submitted cannot be waited for: its thread is not in this process")
            self._raise_defect()
            if self._newest is not None:
                raise self._newest

    def close(self, *, seconds: float | None = None) -> None:
        """Publish what was submitted, and end the thread.

        Args:
            seconds: Give up after so long, and raise nothing; None is to `drain`.
        """
        try:
            if seconds is None:
                self.drain()
            else:
                with self._blocking():
                    self._leave(seconds)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(seconds=None if kind is None else self._seconds)

    def _leave(self, seconds: float) -> None:
        if self._wait(seconds):
            return
        with self._changed:
            self._closed = True
            left = [self._publishing, *([self._waiting[0]] if self._waiting is not None else [])]
            self._waiting = None
        self._given_up.set()  # or the transfer's own threads, which Python joins at its exit, would go on
        names = ", ".join(str(folder) for folder in left if folder is not None)
        logger.warning("not published within %g s, left on the local disk: %s", seconds, names)

    def _wait(self, seconds: float | None) -> bool:
        """Wait until nothing is submitted any more; False if `seconds` were over before."""
        until = None if seconds is None else time.monotonic() + seconds
        with self._changed:
            while self._waiting is not None or self._publishing is not None:
                if self._thread is None or not self._thread.is_alive():
                    return False
                left = _POLL_SECONDS if until is None else until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _POLL_SECONDS))
        return True

    def _raise_defect(self) -> None:
        if self._defect is not None:
            raise self._defect

    def _run(self) -> None:
        with storage.ended_by(self._given_up):
            while (taken := self._take()) is not None:
                self._publish(*taken)

    def _take(self) -> tuple[Path, Publish] | None:
        with self._changed:
            while self._waiting is None and not self._closed:
                self._changed.wait()
            if self._waiting is None:
                return None
            taken, self._waiting = self._waiting, None
            self._publishing = taken[0]
            return taken

    def _publish(self, folder: Path, publish: Publish) -> None:
        error: BaseException | None = None
        try:
            publish(folder)
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = caught
        if self._given_up.is_set() and error is not None:
            return  # the folder stays, and close has said so
        if error is not None:
            logger.warning(
                "checkpoint=%s was not published: %s; a restart goes on from an earlier one", folder.name, error
            )
        shutil.rmtree(folder, ignore_errors=True)
        with self._changed:
            self._newest, self._publishing = error, None
            if error is not None:
                self.failed, self.last_error = self.failed + 1, error
                if not isinstance(error, CbtmError | OSError):
                    self._defect = error
            self._changed.notify_all()

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds_blocked += time.monotonic() - began
