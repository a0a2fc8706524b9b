"""Where runs are tracked, and how long tracking may hold up the work.

Without settings, runs go into one sqlite file below the working directory, so that a laptop needs no server.
Otherwise MLflow's own environment variables hold: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, and
MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN for the credentials, which have no
place in a configuration because configurations are stored with the results.
"""

import os
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cbtm.errors import ConfigError

DEFAULT_DATABASE = Path("runs") / "mlflow.db"
DEFAULT_EXPERIMENT = "cbtm"

_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
)

_USER_INFO = re.compile(r"(?<=://)[^\s/?#]*@")
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:signature|token|password|secret|credential)[^=&\s]*=)[^&\s#]*", re.IGNORECASE
)


def redact(text: str) -> str:
    """Take `user:password@` and secrets in a query (a pre-signed S3 URL's signature) out of every URI in `text`."""
    return _SECRET_IN_QUERY.sub(r"\1REDACTED", _USER_INFO.sub("", text))


class TrackingConfig(BaseModel):
    """Settings of experiment tracking.

    Attributes:
        uri: MLflow tracking URI (`http://…`, `sqlite:///…`), without credentials. None: MLFLOW_TRACKING_URI, or
            else the sqlite file `runs/mlflow.db` below the working directory.
        experiment: Name of the MLflow experiment. None: MLFLOW_EXPERIMENT_NAME, or else `cbtm`.
        parent_run_id: MLflow run below which a pipeline run's own is opened, such as that of a sweep. None:
            CBTM_TRACKING_PARENT_RUN_ID, or else none. What Kubeflow's MLflow plugin gives a pod goes before.
        enabled: False: nothing is tracked, and no journal is written.
        request_timeout_s: Longest wait for one answer of the server, in seconds. MLFLOW_HTTP_REQUEST_TIMEOUT,
            where the user set it, goes before.
        close_timeout_s: Longest time that closing a run may take while a server does not answer, in seconds.
        flush_interval_s: Age at which points are sent, in seconds; 50 points are sent at once.
        retry_after_s: Pause after a failed attempt, in seconds; it doubles up to 60 s.
    """

    # Values are left out of validation errors: an offending URI may hold a password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    uri: str | None = None
    experiment: str | None = Field(default=None, min_length=1)
    parent_run_id: str | None = Field(default=None, min_length=1)
    enabled: bool = True
    request_timeout_s: int = Field(default=10, ge=1)
    close_timeout_s: float = Field(default=10.0, gt=0)
    flush_interval_s: float = Field(default=1.0, gt=0)
    retry_after_s: float = Field(default=5.0, gt=0)

    @field_validator("uri")
    @classmethod
    def _has_no_credentials(cls, uri: str | None) -> str | None:
        if uri is not None and redact(uri) != uri:
            raise ConfigError(
                f"tracking.uri={redact(uri)} was given with a credential in it; leave it out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI as a whole"
            )
        return uri

    def resolved_uri(self) -> str:
        """The URI to send to: setting, environment, or the default file; a sqlite path is made absolute."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_DATABASE}"
        database = sqlite_file(uri)
        if database is None or Path(database).is_absolute():
            return uri
        # The working directory may differ when the run is resumed or read, so the relative path ends here.
        scheme, rest = uri.split(":///", 1)
        return f"{scheme}:///{Path(database).absolute()}{rest[len(database) :]}"

    def resolved_parent(self) -> str | None:
        """Id of the run that the pipeline run's own is opened below: setting, environment, or none."""
        return self.parent_run_id or os.environ.get("CBTM_TRACKING_PARENT_RUN_ID") or None

    def check_credentials(self) -> None:
        """Refuse to send the credentials of one server to another.

        MLFLOW_TRACKING_URI and the credentials beside it come from one hand (Kubeflow's MLflow plugin, or whoever set
        up this environment), `uri` from the configuration's author.

        Raises:
            ConfigError: If `uri` names another server than the environment that has credentials.
        """
        theirs = os.environ.get("MLFLOW_TRACKING_URI")
        credentials = [name for name in _CREDENTIALS if os.environ.get(name)]
        if self.uri is None or theirs is None or not credentials or self.uri.rstrip("/") == theirs.rstrip("/"):
            return
        raise ConfigError(
            f"tracking.uri={self.uri}, but MLFLOW_TRACKING_URI={redact(theirs)} and {', '.join(credentials)} are for "
            "another server, which that one is not to get; leave tracking.uri out, or take them out of the environment"
        )

    def resolved_experiment(self) -> str:
        """The name of the experiment: setting, environment, or `cbtm`."""
        return self.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT


def sqlite_file(uri: str) -> str | None:
    """The path in a sqlite URI as it is written there; None for any other store and for `sqlite://` in memory."""
    if not uri.startswith("sqlite") or ":///" not in uri:
        return None
    return uri.split(":///", 1)[1].split("?", 1)[0] or None
