"""From the journal to the server: what is sent, when, and what an absent server may cost.

`Delivery` sends what the journal holds behind the last mark; a replay is a delivery and nothing else. `Sender` runs
one in a thread of its own beside the work: every second or 50 points while the server answers, ever more rarely
while it does not. The work waits for the server in two places only, each with a limit: when a parent run must have
an id to hand on, and when a run is closed.
"""

import logging
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from cbtm.tracking.config import TrackingConfig, redact
from cbtm.tracking.journal import Journal, Record
from cbtm.tracking.mlflow_store import MlflowStore, RunGoneError

logger = logging.getLogger(__name__)

_POINTS_PER_BATCH = 1000
_RECORDS_PER_BATCH = 1000
_POINTS_AT_ONCE = 50
_LONGEST_PAUSE_S = 60.0
# The first use of a sqlite file makes its tables: 3 s alone, and processes that start together take turns.
_LOCAL_CLOSE_TIMEOUT_S = 60.0


@dataclass
class Delivery:
    """Sends the lines of one journal, in order, each until the server has it or refuses it for good."""

    journal: Journal
    store: MlflowStore
    run_id: str | None = None
    records_sent: int = 0
    points_sent: int = 0
    records_refused: int = 0
    cancelled: bool = False
    _offset: int = 0
    _known: dict[str, dict[int, float]] = field(default_factory=dict)

    def deliver(self) -> None:
        """Send everything that the journal holds by now.

        Raises:
            Exception: Whatever MLflow's client raises while the server is away; calling again goes on from there.
        """
        try:
            self._deliver_rest()
        except RunGoneError as error:
            # The server lost its database: find or make the run anew, and send it the whole journal.
            logger.warning("%s: %s; sending %s to it anew", self.store.printable_uri, error, self.journal.path)
            self.run_id = None
            self._deliver_rest()

    def _deliver_rest(self) -> None:
        if self.run_id is None:
            self._attach()
        while not self.cancelled and (batch := self._next_batch()):
            self._send([record for record, _ in batch])
            self._offset = batch[-1][1]

    def unsent(self) -> int:
        """How many records of the journal no server has."""
        sent = self.journal.sent
        done = sent.get(self.run_id, 0) if self.run_id else max(sent.values(), default=0)
        return sum(record.n > done for record, _ in self.journal.read())

    def was_deleted(self) -> bool:
        """Whether everything was sent once, to a run that somebody deleted since."""
        sent = self.journal.sent
        return bool(sent) and self.unsent() == 0 and all(self.store.is_deleted(run_id) for run_id in sent)

    def _attach(self) -> None:
        """Find or create the run, and learn which lines and which points it has already."""
        opened = self.journal.latest_open
        if opened is None:
            return
        found = self.store.find_or_create(opened)
        has = self.journal.sent.get(found.run_id)
        # No mark for a run that exists: it was tracked from another machine, or its last mark was lost.
        self._known = self.store.history(found.run_id) if has is None and not found.created else {}
        self._offset = 0
        for record, offset_after in self.journal.read():
            if record.n > (has or 0):
                break
            self._remember(record)
            self._offset = offset_after
        self.run_id = found.run_id

    def _next_batch(self) -> list[tuple[Record, int]]:
        batch: list[tuple[Record, int]] = []
        points = 0
        if self.run_id is not None:
            for record, offset_after in self.journal.read(self._offset):
                points += len(record.points)
                if batch and (points > _POINTS_PER_BATCH or len(batch) == _RECORDS_PER_BATCH):
                    break
                batch.append((record, offset_after))
        return batch

    def _send(self, records: list[Record]) -> None:
        assert self.run_id is not None
        new = self._without_known(records)
        try:
            self.store.send(self.run_id, new, self.journal.path.parent)
        except Exception as error:
            if not self.store.refusal(error, self.run_id):
                raise
            new = self._send_singly(new)
        self.journal.mark_sent(records[-1].n, self.run_id)
        self.records_sent += len(new)
        self.points_sent += sum(len(record.points) for record in new)
        for record in new:
            self._remember(record)
            if record.op == "artifact":
                shutil.rmtree((self.journal.path.parent / record.fields["file"]).parent, ignore_errors=True)

    def _send_singly(self, records: list[Record]) -> list[Record]:
        """Send one by one, to leave out no more than what the server refuses; returns what it took."""
        taken = []
        for record in records:
            try:
                self._send_stubbornly(record)
                taken.append(record)
            except _RefusedError as refused:
                self._refuse(record, str(refused))
        return taken

    def _send_stubbornly(self, record: Record) -> None:
        assert self.run_id is not None
        # Twice, because a clash of two processes in the database looks like a refusal and passes.
        for last in (False, True):
            try:
                self.store.send(self.run_id, [record], self.journal.path.parent)
                return
            except Exception as error:
                if not self.store.refusal(error, self.run_id):
                    raise
                if last:
                    raise _RefusedError(str(error)) from error

    def _refuse(self, record: Record, reason: str) -> None:
        assert self.run_id is not None
        self.journal.mark_refused(record.n, self.run_id, reason)
        if self.records_refused == 0:
            logger.warning(
                "%s refuses line n=%d (%s) of %s: %s; it is left out, as are others like it",
                self.store.printable_uri,
                record.n,
                record.op,
                self.journal.path,
                redact(reason),
            )
        self.records_refused += 1

    def _without_known(self, records: list[Record]) -> list[Record]:
        """Leave out points that the run has with the same value at the same step.

        A resumed training repeats the steps since its checkpoint, and repeats them to the bit. A value that did
        change is news and is kept beside the first; MLflow shows both.
        """
        new = []
        for record in records:
            if record.op == "metrics":
                step = record.fields["step"]
                values = {
                    key: value
                    for key, value in record.fields["values"].items()
                    if not _same(self._known.get(key, {}).get(step), float(value))
                }
                if not values:
                    continue
                record = Record(record.n, record.time_ms, record.op, {"step": step, "values": values})
            new.append(record)
        return new

    def _remember(self, record: Record) -> None:
        for key, value in record.points.items():
            self._known.setdefault(key, {})[record.fields["step"]] = value


class Sender:
    """A thread that delivers a journal while the work goes on, and that outlives no `stop`."""

    def __init__(self, delivery: Delivery, config: TrackingConfig) -> None:
        self._delivery = delivery
        self._config = config
        self._wake = threading.Condition()
        self._waiting_points = 0
        self._waiting = True  # the run itself
        self._stopping = False
        self._failures = 0
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="cbtm-tracking", daemon=True)
        self._thread.start()

    def notice(self, points: int) -> None:
        """Tell that the journal has grown by a record with so many points."""
        with self._wake:
            self._waiting = True
            self._waiting_points += points
            if self._waiting_points >= _POINTS_AT_ONCE:
                self._wake.notify()

    def stop(self) -> None:
        """Send the rest, with one last attempt if the server was away, and end; returns within a bounded time."""
        limit = self._config.close_timeout_s
        if self._delivery.store.is_local_file:
            limit = max(limit, _LOCAL_CLOSE_TIMEOUT_S)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(limit)
        if self._thread.is_alive():
            self._delivery.cancelled = True
            self._warn(f"no answer within {limit:g} s of closing")

    def _run(self) -> None:
        while True:
            with self._wake:
                stopping = self._stopping
                self._waiting, self._waiting_points = False, 0
            if self._delivery.cancelled:
                return
            self._attempt()
            if stopping:
                return
            with self._wake:
                if self._failures:
                    self._wake.wait_for(lambda: self._stopping, self._pause())
                else:
                    self._wake.wait_for(lambda: self._stopping or self._waiting)
                    self._wake.wait_for(self._is_due, self._config.flush_interval_s)

    def _attempt(self) -> None:
        try:
            self._delivery.deliver()
        except Exception as error:
            # Whatever it is, the answer is the same: the journal has it, and the work matters more.
            self._failures += 1
            self._warn(str(error))
            logger.debug("tracking attempt %d failed", self._failures, exc_info=True)
        else:
            if self._failures:
                logger.info("tracking server %s is back", self._delivery.store.printable_uri)
            self._failures, self._warned = 0, False

    def _is_due(self) -> bool:
        return self._stopping or self._waiting_points >= _POINTS_AT_ONCE

    def _pause(self) -> float:
        return float(min(_LONGEST_PAUSE_S, self._config.retry_after_s * 2 ** min(self._failures - 1, 10)))

    def _warn(self, reason: str) -> None:
        """Warn once per outage, however many attempts it takes."""
        if self._warned:
            return
        self._warned = True
        path: Path = self._delivery.journal.path
        logger.warning(
            "tracking server %s cannot be used: %s; the work goes on, %s keeps what is tracked, and "
            "`cbtm tracking replay` with the run's configuration sends what is missing later",
            self._delivery.store.printable_uri,
            redact(reason),
            path,
        )


class _RefusedError(Exception):
    """The server will never take this record."""


def _same(known: float | None, value: float) -> bool:
    return known is not None and (known == value or (known != known and value != value))
