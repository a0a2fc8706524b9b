"""The journal of one run: every tracking call as a line of JSON, and marks of what the server has.

The journal comes first and the server second. A call is a line on the local disk before anyone tries to send it,
so a server that is away costs nothing but time, and what is missing there is the lines after the last mark:

    {"journal": "cbtm-tracking", "version": 1}
    {"n": 1, "t": 1764000000000, "op": "open", "name": "expert-03", "run_key": "9f2c…", …}
    {"n": 2, "t": 1764000001000, "op": "metrics", "step": 10, "values": {"train/loss": 3.25}}
    {"mark": "sent", "n": 2, "run_id": "5be1…"}

`t` is in milliseconds since 1970 and travels with the point. MLflow's databases keep one row per (run, key,
timestamp, step, value), so a line that is sent twice, because the process died between sending and marking, is one
point all the same. A mark is bound to a run id: a server that lost its database gets everything again.
Lines are flushed to the operating system, not synced to the disk: a dead process loses none, a dead machine the
last seconds. A line torn by a crash is counted and skipped. One process writes a journal at a time (flock).
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cbtm.errors import DataError, StorageError
from cbtm.tracking.config import redact

logger = logging.getLogger(__name__)

Operation = Literal["open", "params", "metrics", "tags", "dataset", "artifact", "close"]

_HEADER = b'{"journal": "cbtm-tracking", "version": 1}\n'
# Workers forked by a killed process (DataLoader) hold its lock until they notice, about 5 s.
_LOCK_WAIT_S = 10.0


class JournalBusyError(StorageError):
    """Another process writes this journal."""


@dataclass(frozen=True)
class Record:
    """One tracking call: its number in the journal, its time in ms since 1970, what it is, and its values."""

    n: int
    time_ms: int
    op: Operation
    fields: Mapping[str, Any]

    @property
    def points(self) -> dict[str, float]:
        """Metric values by key; empty for other operations. "nan" and "inf" are strings in JSON."""
        if self.op != "metrics":
            return {}
        return {key: float(value) for key, value in self.fields["values"].items()}


class Journal:
    """The journal of one run, open for appending and held by this process until `close`."""

    def __init__(self, path: Path, file_descriptor: int) -> None:
        self.path = path
        self.torn_lines = 0
        self.latest_open: Record | None = None
        self.sent: dict[str, int] = {}
        """Number of the last line that each run id has."""
        self.last_n = 0
        self._fd: int | None = file_descriptor
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, wait_s: float = _LOCK_WAIT_S) -> Self:
        """Open or create the journal at `path`, mending a torn end.

        Raises:
            JournalBusyError: If another process still holds it after `wait_s` seconds.
            StorageError: If the file cannot be written.
            DataError: If the file is something else than a tracking journal.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"tracking journal {path} cannot be written: {error.strerror}; choose another folder"
            ) from error
        journal = cls(path, fd)
        try:
            _hold(fd, path, wait_s)
            journal._mend()
            journal._scan()
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, op: Operation, **fields: object) -> None:
        """Write one call as a line. A disk that fails ends the journal with one warning, not the work."""
        with self._lock:
            record = Record(self.last_n + 1, time.time_ns() // 1_000_000, op, fields)
            if self._write({"n": record.n, "t": record.time_ms, "op": op, **fields}):
                self.last_n = record.n
                if op == "open":
                    self.latest_open = record

    def append_file(self, path: Path, artifact_path: str | None) -> None:
        """Keep a copy of `path` beside the journal until it is sent, and note it; the original may then go."""
        name = f"{self.path.stem}.files/{time.time_ns()}/{path.name}"
        copy = self.path.parent / name
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        except OSError as error:
            logger.warning("artifact %s is not tracked: no copy beside the journal (%s)", path, error)
            return
        self.append("artifact", file=name, artifact_path=artifact_path)

    def mark_sent(self, n: int, run_id: str) -> None:
        """Note that run `run_id` has every line up to and including `n`."""
        with self._lock:
            if self._write({"mark": "sent", "n": n, "run_id": run_id}):
                self.sent[run_id] = n

    def mark_refused(self, n: int, run_id: str, reason: str) -> None:
        """Note that the server will never take line `n`, and why."""
        with self._lock:
            self._write({"mark": "refused", "n": n, "run_id": run_id, "reason": redact(reason)})

    def read(self, offset: int = 0) -> Iterator[tuple[Record, int]]:
        """Yield the records from byte `offset` on, each with the offset after it; a line still torn is left."""
        for line, offset_after in self._lines(offset):
            entry = _parsed(line)
            if entry is not None and "op" in entry:
                n, time_ms, op = entry.pop("n"), entry.pop("t"), entry.pop("op")
                yield Record(n, time_ms, op, entry), offset_after

    def close(self) -> None:
        """Let go of the file; later marks are dropped, so their lines may be sent once more. May be repeated."""
        with self._lock:
            if self._fd is not None:
                # Unlocked by hand: forked workers share the lock, and closing would leave it with them.
                with contextlib.suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
                os.close(self._fd)
                self._fd = None

    def _lines(self, offset: int) -> Iterator[tuple[bytes, int]]:
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line, offset

    def _write(self, entry: Mapping[str, object]) -> bool:
        if self._fd is None:
            return False
        try:
            # One write per line: a reader in another thread sees whole lines.
            os.write(self._fd, json.dumps(entry, default=str, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            logger.warning(
                "tracking journal %s cannot be written (%s); the work goes on, untracked from here",
                self.path,
                error.strerror,
            )
            os.close(self._fd)
            self._fd = None
            return False
        return True

    def _mend(self) -> None:
        """Write the header of a new file; end a torn last line, so that the next one starts on its own."""
        content_start, size = self._ends()
        if not content_start.endswith(b"\n") and _HEADER.startswith(content_start):
            os.truncate(self.path, 0)
            self._raw_write(_HEADER)
        elif content_start != _HEADER:
            raise DataError(f"{self.path} is not a tracking journal of version 1; give another path, or move it away")
        elif os.pread(self._descriptor(), 1, size - 1) != b"\n":
            self._raw_write(b"\n")

    def _ends(self) -> tuple[bytes, int]:
        fd = self._descriptor()
        return os.pread(fd, len(_HEADER), 0), os.fstat(fd).st_size

    def _raw_write(self, data: bytes) -> None:
        try:
            os.write(self._descriptor(), data)
        except OSError as error:
            raise StorageError(f"tracking journal {self.path} cannot be written: {error.strerror}") from error

    def _descriptor(self) -> int:
        assert self._fd is not None, "a journal is used after close()"
        return self._fd

    def _scan(self) -> None:
        for line, _ in self._lines(len(_HEADER)):
            entry = _parsed(line)
            if entry is None:
                self.torn_lines += line != b"\n"
            elif entry.get("mark") == "sent":
                self.sent[entry["run_id"]] = entry["n"]
            elif "op" in entry:
                self.last_n = max(self.last_n, entry["n"])
                if entry["op"] == "open":
                    self.latest_open = Record(entry.pop("n"), entry.pop("t"), entry.pop("op"), entry)


def json_number(value: float) -> float | str:
    """`value` as JSON can hold it: NaN and the infinities as strings, which `float` reads back."""
    value = float(value)
    return value if math.isfinite(value) else repr(value)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _hold(fd: int, path: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise JournalBusyError(
                    f"tracking journal {path} is being written by another process; two processes must not "
                    "track one run: end the other one, or give this run a key and a journal of its own"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            # Some network file systems have no flock; there, one writer at a time is up to the caller.
            logger.debug("no lock on tracking journal %s: %s", path, error)
            return
