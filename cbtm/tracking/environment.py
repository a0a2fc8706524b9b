"""MLflow made ready in this process: imported where it is safe, and told to fail early and keep quiet."""

import os

from cbtm.errors import ConfigError
from cbtm.tracking.config import TrackingConfig

_environment_set_here: dict[str, str] = {}


def import_mlflow(*, needs_database: bool) -> None:
    """Import in the caller's thread: a process that forks while another thread imports may hang in the child."""
    try:
        import mlflow.tracking

        if needs_database:
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    except ImportError as error:
        extra = "local" if needs_database else "tracking"
        raise ConfigError(
            f"tracking needs the package {error.name}, which is not installed; run `pip install "
            f"'cbtm[{extra}]'`, or set tracking.enabled=false"
        ) from error


def prepare_environment(config: TrackingConfig) -> None:
    """Have MLflow fail early and keep quiet, except where the user's environment says otherwise.

    MLflow reads these at each request. Its own defaults, 7 retries with 120 s each, would hold a job up for minutes;
    here the journal is what retries. A retry inside MLflow could also create a run twice.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(config.request_timeout_s),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        if os.environ.get(name) in (None, _environment_set_here.get(name)):
            os.environ[name] = _environment_set_here[name] = value
