"""Experiment tracking: what stages say about themselves, and MLflow as the place where it can be compared.

A stage sees a `Tracker` and knows nothing of MLflow. Each call becomes a line of a journal on the local disk; a
thread sends the journal in batches. So a tracking server that is slow, dead or not yet there neither stops nor
delays a training, and `replay` sends afterwards what is missing, exactly once.

A pipeline run is one parent run with a child per expert, for the seed, the dense model and the evaluation. Every
run has a key that its caller derives from the configuration (`run_key`): whoever opens a run of that key again goes
on in it. The parent is found by its key as well (`parent_run_key`), because a stage that runs while the server is
away has no parent id to give; parent and child find each other in whichever order they reach the server. In a pod that
Kubeflow's MLflow plugin has made a run for, that run is the one (`take_injected`), and the parent the run above it; a
parent may itself be opened below a given run (`TrackingConfig.parent_run_id`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from cbtm.errors import ConfigError, DataError
from cbtm.tracking.config import TrackingConfig, redact, sqlite_file
from cbtm.tracking.delivery import Delivery, Sender
from cbtm.tracking.injected import injection
from cbtm.tracking.journal import Journal, JournalBusyError, json_number
from cbtm.tracking.mlflow_store import MlflowStore

__all__ = [
    "NullTracker",
    "ReplayReport",
    "RunKind",
    "RunStatus",
    "Tracker",
    "TrackingConfig",
    "finish_parent_run",
    "open_run",
    "replay",
    "start_parent_run",
    "tracking_problem",
]

RunKind = Literal["parent", "seed", "dense", "expert", "random", "average", "ensemble", "comparison"]
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# No quote among them: keys become part of MLflow's search expressions.
_KEY_PATTERN = re.compile(r"[A-Za-z0-9._:/=@+-]{1,250}")


class Tracker(Protocol):
    """What a stage may say about its run. No call waits for a server except `close`, which has a limit."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings, under keys with the prefix `cbtm.`; the first value of a key stays."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step; the same value at the same step counts once, so a resumed run may repeat."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""

    def log_dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        """Record an input: where it is, its digest, and what for (`training`, `validation`)."""

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keep a small file (a report) with the run; weights go by URI. The file may go after the call."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """End the run; later calls of `close` do nothing."""


class NullTracker:
    """Tracks nothing."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Do nothing."""

    def close(self, status: RunStatus = "FINISHED") -> None:
        """Do nothing."""


class _RunTracker:
    """A run that is written to its journal and sent from there."""

    def __init__(self, journal: Journal, store: MlflowStore, config: TrackingConfig) -> None:
        self._journal = journal
        self._delivery = Delivery(journal, store)
        self._sender: Sender | None = Sender(self._delivery, config)

    def log_params(self, params: Mapping[str, object]) -> None:
        self._append("params", values={key: redact(_as_text(value)) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values = {key: json_number(value) for key, value in metrics.items()}
        self._append("metrics", len(values), step=int(step), values=values)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append("tags", values={key: redact(value) for key, value in tags.items()})

    def log_dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        self._append("dataset", name=name, uri=redact(uri), digest=digest, context=context)

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        if not path.is_file():
            raise DataError(f"artifact {path} is not a file; write it before it is tracked")
        self._journal.append_file(path, artifact_path)
        self._open_sender().notice(0)

    def close(self, status: RunStatus = "FINISHED") -> None:
        if self._sender is not None:
            self._append("close", status=status)
            self.release()

    def release(self) -> str | None:
        """Send the rest and leave the run running; returns its id, or None while no server knows it."""
        if self._sender is not None:
            self._sender.stop()
            self._sender = None
            self._journal.close()
        return self._delivery.run_id

    def _append(
        self, op: Literal["params", "metrics", "tags", "dataset", "close"], points: int = 0, **fields: object
    ) -> None:
        sender = self._open_sender()
        self._journal.append(op, **fields)
        sender.notice(points)

    def _open_sender(self) -> Sender:
        if self._sender is None:
            raise RuntimeError(f"the run of tracking journal {self._journal.path} is closed")
        return self._sender


def open_run(
    config: TrackingConfig,
    *,
    name: str,
    kind: RunKind,
    run_key: str,
    journal: Path,
    parent_run_id: str | None = None,
    parent_run_key: str | None = None,
    cluster: int | None = None,
    tags: Mapping[str, str] | None = None,
    take_injected: bool = False,
) -> Tracker:
    """Open the run with this key: a new one, or the earlier one of a stage that is retried or resumed.

    Args:
        config: Where to track, and how long to wait.
        name: Name shown for a new run, such as `expert-03`.
        kind: What the run is about; tag `cbtm.kind`.
        run_key: Identity of the run within the experiment, such as a digest of configuration and member.
        journal: File to write, one per run; an existing one is continued, and what it still holds is sent first.
        parent_run_id: Id of the parent, where `start_parent_run` returned one.
        parent_run_key: Key of the parent; goes before the id, and works while no server does.
        cluster: Cluster of an expert; tag `cbtm.cluster`.
        tags: Further tags.
        take_injected: Whether this is what the pod is for, so that the run it was given is this one.

    Raises:
        ConfigError: If `run_key` or `kind` is not valid, or mlflow is not installed.
        StorageError: If the journal cannot be written, or another process is writing it.
        DataError: If the journal is another kind of file.
    """
    if not config.enabled:
        return NullTracker()
    all_tags = dict(tags or {})
    if cluster is not None:
        all_tags["cbtm.cluster"] = str(cluster)
    return _open(config, name, kind, run_key, journal, parent_run_id, parent_run_key, all_tags, take_injected)


def start_parent_run(
    config: TrackingConfig,
    *,
    name: str,
    run_key: str,
    journal: Path,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, object] | None = None,
    take_injected: bool = False,
) -> str | None:
    """Open the parent run of a pipeline run, or the earlier one with this key, and leave it running.

    With `take_injected` it is, in a pod that has a run of its own, the run above that.

    Returns:
        The run id, or None if tracking is off or no server answered in time. Children that give the parent's key
        are nested below it either way.
    """
    if not config.enabled:
        return None
    parent = config.resolved_parent()
    tracker = _open(config, name, "parent", run_key, journal, parent, None, dict(tags or {}), take_injected)
    if params:
        tracker.log_params(params)
    return tracker.release()


def finish_parent_run(
    config: TrackingConfig, *, name: str, run_key: str, journal: Path, status: RunStatus = "FINISHED"
) -> None:
    """End the parent run. It is found by its key, for the pod that ends it is seldom the one that started it."""
    if config.enabled:
        _open(config, name, "parent", run_key, journal, None, None, {}).close(status)


def tracking_problem(config: TrackingConfig) -> str | None:
    """What stands in the way of tracking, or None; a server is asked for the experiment, and nothing is made.

    Raises:
        ConfigError: If mlflow is not installed.
    """
    if not config.enabled or sqlite_file(config.resolved_uri()) is not None:
        return None  # a file is made when it is first used, which takes seconds
    store = MlflowStore(config)
    try:
        store.ask()
    except Exception as error:
        # The client raises what its transport raises; here it is one text.
        return f"{store.printable_uri} cannot be used: {redact(str(error))}"
    return None


@dataclass(frozen=True)
class ReplayReport:
    """What a replay did: numbers of journals, records and metric points.

    Attributes:
        journals: Journals read to their end, or as far as the server took them.
        records_sent: Records sent now; 0 when nothing was missing.
        points_sent: Metric points among them.
        records_refused: Records that the server will never take; the journal says why.
        records_left: Records that still wait.
        torn_lines: Lines that a crash left unreadable.
        problems: Why records are left, one text per journal.
    """

    journals: int = 0
    records_sent: int = 0
    points_sent: int = 0
    records_refused: int = 0
    records_left: int = 0
    torn_lines: int = 0
    problems: tuple[str, ...] = ()


def replay(journal: Path, config: TrackingConfig) -> ReplayReport:
    """Send what an outage kept back, from one journal or from all `*.jsonl` of a folder and of those in it.

    A journal of a run still going on is left to it and reported. No time is spent on a second attempt: a server that
    does not answer is a problem in the report, and the same call goes on from there.

    Raises:
        ConfigError: If mlflow is not installed.
        DataError: If there is no journal at this path, or it is another kind of file.
    """
    paths = sorted(journal.rglob("*.jsonl")) if journal.is_dir() else [journal]
    if not all(path.is_file() for path in paths) or not paths:
        raise DataError(f"no tracking journal at {journal}; give a .jsonl file that a run wrote, or its folder")
    store = MlflowStore(config)
    report = ReplayReport()
    for path in paths:
        report = _add(report, _replay_one(path, store))
    return report


def _replay_one(path: Path, store: MlflowStore) -> ReplayReport:
    try:
        journal = Journal.open(path, wait_s=0)
    except JournalBusyError as error:
        return ReplayReport(problems=(str(error),))
    delivery = Delivery(journal, store)
    problems: tuple[str, ...] = ()
    try:
        # What somebody deleted on purpose stays so; what a server lost with its database is sent again.
        if not delivery.was_deleted():
            delivery.deliver()
    except Exception as error:
        # The client raises what its transport raises; for a report it is one text.
        problems = (f"{path}: {store.printable_uri} cannot be used: {redact(str(error))}",)
    finally:
        journal.close()
    return ReplayReport(
        journals=1,
        records_sent=delivery.records_sent,
        points_sent=delivery.points_sent,
        records_refused=delivery.records_refused,
        records_left=delivery.unsent() if problems else 0,
        torn_lines=journal.torn_lines,
        problems=problems,
    )


def _add(a: ReplayReport, b: ReplayReport) -> ReplayReport:
    return ReplayReport(
        journals=a.journals + b.journals,
        records_sent=a.records_sent + b.records_sent,
        points_sent=a.points_sent + b.points_sent,
        records_refused=a.records_refused + b.records_refused,
        records_left=a.records_left + b.records_left,
        torn_lines=a.torn_lines + b.torn_lines,
        problems=a.problems + b.problems,
    )


def _open(
    config: TrackingConfig,
    name: str,
    kind: RunKind,
    run_key: str,
    journal_path: Path,
    parent_run_id: str | None,
    parent_run_key: str | None,
    tags: Mapping[str, str],
    take_injected: bool = False,
) -> _RunTracker:
    if kind not in get_args(RunKind):
        raise ConfigError(f"run kind {kind!r} is not known; use one of {', '.join(get_args(RunKind))}")
    for key in (run_key, parent_run_key):
        if key is not None and not _KEY_PATTERN.fullmatch(key):
            raise ConfigError(
                f"run key {key!r} does not match {_KEY_PATTERN.pattern}; use a digest, or a digest and a name"
            )
    store = MlflowStore(config)
    given = injection(config.uri) if take_injected else None
    journal = Journal.open(journal_path)
    journal.append(
        "open",
        name=name,
        kind=kind,
        run_key=run_key,
        parent_run_id=parent_run_id,
        parent_run_key=parent_run_key,
        injected_run_id=given.run_id if given is not None and given.take(run_key) else None,
        uri=store.printable_uri,
        tags={key: redact(value) for key, value in tags.items()},
    )
    return _RunTracker(journal, store, config)


def _as_text(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, sort_keys=True, default=str)
    return str(value)
