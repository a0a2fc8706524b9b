"""The comparison of one run's models in the MLflow UI."""

import json
import os
import socket
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from urllib.parse import quote

from cbtm.errors import ConfigError, DataError
from cbtm.process import end_with_parent
from cbtm.tracking.config import TrackingConfig
from cbtm.tracking.mlflow_store import MlflowStore

_COMPARED = "eval/bits_per_byte"
"""What whole models and ensembles have, and an expert by itself has not: of k experts the page would be k columns."""


def comparison_path(config: TrackingConfig, run_key: str) -> str:
    """Path of the UI's page that compares a pipeline run's models and ensembles; all its children before there are any.

    Raises:
        DataError: If the tracking store has no such run.
    """
    experiment, runs = MlflowStore(config).children(run_key, measured=_COMPARED)
    if not runs:
        raise DataError(f"{config.resolved_uri()} has no runs of this pipeline run; run it first (cbtm run, make demo)")
    return f"/#/compare-runs?runs={quote(json.dumps(runs))}&experiments={quote(json.dumps([experiment]))}"


def serve(config: TrackingConfig, run_key: str, *, port: int, say: Callable[[str], None]) -> None:
    """Print and open the comparison; serve the database meanwhile, where it is a local file.

    Raises:
        ConfigError: If the port is taken.
    """
    path = comparison_path(config, run_key)
    uri = config.resolved_uri()
    if not uri.startswith("sqlite"):
        say(f"{uri.rstrip('/')}{path}")
        return
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"port {port} is taken; choose another with --port (make ui PORT={port + 1})")
    address = f"http://127.0.0.1:{port}{path}"
    say(f"comparison: {address}\nCtrl-C ends the server")
    if os.environ.get("DISPLAY") or sys.platform == "darwin":
        webbrowser.open(address)
    # Without the job runner one process serves, not ten; nothing here uses jobs.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    try:
        subprocess.run(  # noqa: S603 - no shell, our own interpreter
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env=environment,
            check=False,
            preexec_fn=end_with_parent,  # a server that outlives this command would hold the port
        )
    except KeyboardInterrupt:
        say("stopped")
