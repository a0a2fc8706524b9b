"""MLflow as the place runs are sent to: the one module that imports mlflow.

Only MlflowClient with explicit run ids is used: no active run and no global state; a run that a KFP plugin has made for
this pod (`cbtm.tracking.injected`) is taken over where it is asked for. A run is found again by its tag `cbtm.run_key`,
so whoever comes back (a retried pod, a resumed stage, a replay) goes on in it. Everything sent here may be sent twice
and counts once: points carry their first timestamp, parameters are compared first, tags and files overwrite, inputs are
matched by digest.

A sqlite file is shared by processes of one machine: looking for and making the database, the experiment and a run
happen under a lock beside the file, because MLflow's migrations do not bear two processes at once.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cbtm
from cbtm.tracking.config import TrackingConfig, redact, sqlite_file
from cbtm.tracking.environment import import_mlflow, prepare_environment
from cbtm.tracking.injected import INJECTED_TAG, SUPERSEDED_TAG, injection
from cbtm.tracking.journal import Record

if TYPE_CHECKING:
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

RUN_KEY_TAG = "cbtm.run_key"
PARENT_KEY_TAG = "cbtm.parent_run_key"
_PARENT_TAG = "mlflow.parentRunId"  # mlflow.utils.mlflow_tags.MLFLOW_PARENT_RUN_ID: the UI nests by it
_PARAM_PREFIX = "cbtm."

# Limits of mlflow.utils.validation in 3.17.
_METRICS_PER_CALL = 1000
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DIGEST_LENGTH = 36
# Two requests of the same moment are served well within this on any server that answers at all.
_SETTLE_SECONDS = 1.0


class RunGoneError(Exception):
    """The run that was open is not, or no longer, on the server."""


@dataclass(frozen=True)
class FoundRun:
    """A run of the store; `created` tells a new one from one that was found by its key."""

    run_id: str
    created: bool


class MlflowStore:
    """One experiment of one MLflow store.

    Raises:
        ConfigError: If mlflow, or what it needs for a sqlite file, is not installed, or credentials in the environment
            are for another server.
    """

    def __init__(self, config: TrackingConfig) -> None:
        self._uri = config.resolved_uri()
        self._experiment_name = config.resolved_experiment()
        self._database = sqlite_file(self._uri)
        self._injection = injection(config.uri)
        config.check_credentials()
        prepare_environment(config)
        import_mlflow(needs_database=self._uri.startswith("sqlite"))
        self._experiment_id: str | None = None
        self._open_client: Any = None

    @property
    def printable_uri(self) -> str:
        """The URI without credentials."""
        return redact(self._uri)

    @property
    def is_local_file(self) -> bool:
        """Whether the store is a sqlite file, which may be slow or locked but not away."""
        return self._database is not None

    def find_or_create(self, opened: Record) -> FoundRun:
        """Find the run with the key of `opened`, or create it, below its parent if that is known already."""
        with self._database_lock():
            run = self._injected(opened.fields) or self._find(opened.fields["run_key"])
            created = run is None
            if run is None:
                run = self._create(opened)
        if opened.fields["kind"] == "parent":
            self._adopt(opened.fields["run_key"], run.info.run_id)
        return FoundRun(run.info.run_id, created)

    def ask(self) -> None:
        """Ask for the experiment, whether it is there or not; raises what the client raises."""
        self._client().get_experiment_by_name(self._experiment_name)

    def children(self, run_key: str, *, measured: str) -> tuple[str, list[str]]:
        """The experiment's id, and the ids of the runs below the parent with this key, oldest first.

        Args:
            run_key: Key of the parent.
            measured: Metric that the runs are to have; where none has it yet, all are taken.
        """
        runs = self._search(PARENT_KEY_TAG, run_key)
        having = [run for run in runs if measured in run.data.metrics]
        return self._experiment(), [run.info.run_id for run in having or runs]

    def is_deleted(self, run_id: str) -> bool:
        """Whether the store has the run as deleted; False for a run it never had."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client().get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def history(self, run_id: str) -> dict[str, dict[int, float]]:
        """The points that the run has: value by step by metric key."""
        keys = self._client().get_run(run_id).data.metrics
        return {
            key: {point.step: point.value for point in self._client().get_metric_history(run_id, key)} for key in keys
        }

    def send(self, run_id: str, records: Sequence[Record], folder: Path) -> None:
        """Send `records` in order; consecutive metrics share a call. Files are looked up below `folder`."""
        from mlflow.entities import Metric

        points: list[Metric] = []
        for record in records:
            if record.op == "metrics":
                step = record.fields["step"]
                points += [Metric(key, value, record.time_ms, step) for key, value in record.points.items()]
                continue
            self._send_points(run_id, points)
            points = []
            self._send_one(run_id, record, folder)
        self._send_points(run_id, points)

    def refusal(self, error: Exception, run_id: str) -> bool:
        """Whether `error` is the server's last word on what was sent, rather than a state that may pass.

        Raises:
            RunGoneError: If the run itself is the reason.
        """
        from mlflow.exceptions import MlflowException

        if not isinstance(error, MlflowException):
            return False
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            self._experiment_id = None  # a new database numbers its experiments anew
            raise RunGoneError(f"run {run_id} is not on the server any more") from error
        # BAD_REQUEST is what a database's constraint becomes, two processes at one row among them.
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            return False
        return bool(self._client().get_run(run_id).info.lifecycle_stage == "active")

    def _client(self) -> Any:
        if self._open_client is None:
            from mlflow import MlflowClient

            self._open_client = MlflowClient(tracking_uri=self._uri)
        return self._open_client

    @contextlib.contextmanager
    def _database_lock(self) -> Iterator[None]:
        if self._database is None:
            yield
            return
        lock_path = Path(f"{self._database}.lock")
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        with lock_path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                logger.debug("no lock on %s: %s", lock_path, error)
            try:
                yield
            finally:
                # Unlocked by hand, for a process forked meanwhile shares the lock.
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)

    def _injected(self, fields: Mapping[str, Any]) -> "Run | None":
        """The run that the pod was given for this work; for a parent, the run above, which is the pipeline run's.

        The key of an earlier run of the same work passes to it: whoever looks for the work finds the latest.
        """
        run_id = fields.get("injected_run_id")
        run = self._run(run_id) if run_id else None
        if run is not None and fields["kind"] == "parent":
            run = self._run(run.data.tags.get(_PARENT_TAG)) or run
        if run is None:
            return None
        for other in self._search(RUN_KEY_TAG, fields["run_key"]):
            if other.info.run_id != run.info.run_id:
                self._client().set_tag(other.info.run_id, SUPERSEDED_TAG, run.info.run_id)
                self._client().delete_tag(other.info.run_id, RUN_KEY_TAG)
        self._client().set_tag(run.info.run_id, INJECTED_TAG, "true")
        return run

    def _run(self, run_id: str | None) -> "Run | None":
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run: Run = self._client().get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning(
                "run %s, which this pod was given, is not on %s; a new one is made", run_id, self.printable_uri
            )
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        client, name = self._client(), self._experiment_name
        if self._experiment_id is None and self._injection is not None:
            given = self._injection.experiment_id
            run = None if given else self._run(self._injection.run_id)
            self._experiment_id = given or (run.info.experiment_id if run else None)
        if self._experiment_id is None:
            found = client.get_experiment_by_name(name)
            if found is None:
                try:
                    self._experiment_id = client.create_experiment(name, self._artifact_location())
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = client.get_experiment_by_name(name)
            if found is not None:
                self._experiment_id = found.experiment_id
        assert self._experiment_id is not None
        return self._experiment_id

    def _artifact_location(self) -> str | None:
        """Beside a sqlite file; by default MLflow puts them below the working directory of whoever came first."""
        if self._database is None:
            return None
        return (Path(self._database).parent / "mlartifacts").as_uri()

    def _search(self, tag: str, value: str) -> "list[Run]":
        # The ids break ties, so that all processes agree on which run is the first.
        runs: list[Run] = []
        token = None
        while True:
            page = self._client().search_runs([self._experiment()], f"tags.`{tag}` = '{value}'", page_token=token)
            runs += page
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _find(self, run_key: str) -> "Run | None":
        runs = self._search(RUN_KEY_TAG, run_key)
        return runs[0] if runs else None

    def _create(self, opened: Record) -> "Run":
        fields = opened.fields
        tags = _run_tags(fields) | self._parent_tag(fields)
        client = self._client()
        run: Run = client.create_run(self._experiment(), start_time=opened.time_ms, tags=tags, run_name=fields["name"])
        # A server has no lock: of two processes that created the run at once, both keep the earlier one. Each looks
        # only after the other's request, sent before it looked for the first time, has surely been served.
        if not self.is_local_file:
            time.sleep(_SETTLE_SECONDS)
        first = self._find(fields["run_key"])
        if first is not None and first.info.run_id != run.info.run_id:
            client.delete_run(run.info.run_id)
            return first
        return run

    def _parent_tag(self, fields: Mapping[str, Any]) -> dict[str, str]:
        parent = self._find(fields["parent_run_key"]) if fields["parent_run_key"] else None
        parent_id = parent.info.run_id if parent else fields["parent_run_id"]
        return {_PARENT_TAG: parent_id} if parent_id else {}

    def _adopt(self, run_key: str, run_id: str) -> None:
        """Nest the runs that named this parent while it was not there yet."""
        for child in self._search(PARENT_KEY_TAG, run_key):
            if _PARENT_TAG not in child.data.tags:
                self._client().set_tag(child.info.run_id, _PARENT_TAG, run_id)

    def _send_points(self, run_id: str, points: Sequence[Any]) -> None:
        for start in range(0, len(points), _METRICS_PER_CALL):
            self._client().log_batch(run_id, metrics=points[start : start + _METRICS_PER_CALL])

    def _send_one(self, run_id: str, record: Record, folder: Path) -> None:
        fields = record.fields
        if record.op == "open":
            self._reopen(run_id, fields)
        elif record.op == "params":
            self._send_params(run_id, fields["values"])
        elif record.op == "tags":
            self._send_tags(run_id, fields["values"])
        elif record.op == "dataset":
            self._client().log_inputs(run_id, datasets=[_dataset_input(fields)])
        elif record.op == "artifact":
            self._send_artifact(run_id, folder / fields["file"], fields["artifact_path"])
        elif record.op == "close" and not self._is_injected(run_id):
            if _PARENT_TAG not in self._client().get_run(run_id).data.tags:
                self._send_tags(run_id, self._parent_tag(self._opened_fields(run_id)))
            self._client().set_terminated(run_id, status=fields["status"], end_time=record.time_ms)

    def _is_injected(self, run_id: str) -> bool:
        """Whether somebody else opens and ends this run."""
        return INJECTED_TAG in self._client().get_run(run_id).data.tags

    def _opened_fields(self, run_id: str) -> dict[str, Any]:
        tags: dict[str, str] = self._client().get_run(run_id).data.tags
        return {"parent_run_key": tags.get(PARENT_KEY_TAG), "parent_run_id": None}

    def _reopen(self, run_id: str, fields: Mapping[str, Any]) -> None:
        if self._client().get_run(run_id).info.status != "RUNNING" and not self._is_injected(run_id):
            self._client().update_run(run_id, status="RUNNING")
        self._send_tags(run_id, _run_tags(fields))

    def _send_params(self, run_id: str, values: Mapping[str, str]) -> None:
        """Send what the run has not; MLflow's parameters cannot change, and one that would spoils its call."""
        from mlflow.entities import Param

        present = self._client().get_run(run_id).data.params
        wanted = {_param_key(key): _cut(value, _PARAM_LENGTH) for key, value in values.items()}
        changed = [key for key, value in wanted.items() if present.get(key, value) != value]
        if changed:
            logger.warning(
                "run %s keeps its earlier values of %s: parameters of an MLflow run cannot change",
                run_id,
                ", ".join(f"{key}={present[key]} (now {wanted[key]})" for key in changed),
            )
        new = [Param(key, value) for key, value in wanted.items() if key not in present]
        for start in range(0, len(new), _PARAMS_PER_CALL):
            self._client().log_batch(run_id, params=new[start : start + _PARAMS_PER_CALL])

    def _send_tags(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, _cut(value, _TAG_LENGTH)) for key, value in values.items()]
        for start in range(0, len(tags), _PARAMS_PER_CALL):
            self._client().log_batch(run_id, tags=tags[start : start + _PARAMS_PER_CALL])

    def _send_artifact(self, run_id: str, path: Path, artifact_path: str | None) -> None:
        if not path.is_file():
            logger.warning("artifact %s is gone and was not sent to %s", path, self.printable_uri)
            return
        self._client().log_artifact(run_id, str(path), artifact_path)


def _run_tags(fields: Mapping[str, Any]) -> dict[str, str]:
    tags = {
        RUN_KEY_TAG: fields["run_key"],
        PARENT_KEY_TAG: fields["parent_run_key"],
        "cbtm.kind": fields["kind"],
        "cbtm.version": cbtm.__version__,
        "mlflow.source.name": "cbtm",
        # A pod has neither git nor the repository: whoever builds the image knows.
        "mlflow.source.git.commit": os.environ.get("CBTM_GIT_SHA"),
    }
    given: dict[str, str] = fields["tags"]
    return {key: value for key, value in tags.items() if value} | given


def _dataset_input(fields: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    uri, digest = fields["uri"], fields["digest"]
    scheme = uri.split("://", 1)[0] if "://" in uri else "local"
    # The names under which mlflow.data registers its sources; an HTTP source calls its place "url".
    kind = {"file": "local", "https": "http"}.get(scheme, scheme)
    source = json.dumps({"url" if kind == "http" else "uri": uri})
    # MLflow holds 36 characters, less than a sha256; the whole digest goes into a tag of the input.
    short = digest.removeprefix("sha256:")[:_DIGEST_LENGTH]
    tags = [InputTag("mlflow.data.context", fields["context"]), InputTag("cbtm.digest", digest)]
    return DatasetInput(Dataset(fields["name"], short, kind, source), tags=tags)


def _param_key(key: str) -> str:
    return key if key.startswith(_PARAM_PREFIX) else _PARAM_PREFIX + key


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
