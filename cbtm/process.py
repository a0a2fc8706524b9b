"""A stage as a process of its own, as it runs in a pod, in a container or under kfp.local."""

import ctypes
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cbtm import storage
from cbtm.errors import CbtmError, ConfigError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # prctl(2)
_S3_PATIENCE = "300"  # seconds: a store that restarts or moves is back within a few minutes


class _LineFormatter(logging.Formatter):
    """The message alone; from a warning upwards its level first, so that those who read logs find it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def log_to_stderr() -> None:
    """Send log lines to the standard error stream, from CBTM_LOG_LEVEL upwards (INFO)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(message)s"))
    # force: kfp's executor has set up a handler of its own, whose prefix would hide what a line says.
    logging.basicConfig(level=os.environ.get("CBTM_LOG_LEVEL", "INFO"), handlers=[handler], force=True)
    for name in ("botocore", "mlflow", "alembic", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def stage_process() -> Iterator[None]:
    """Set up logging and patience with S3, and end on an error that a user can mend with its message and exit code."""
    log_to_stderr()
    try:
        storage.be_patient(s3_patience())
        yield
    except CbtmError as error:
        logger.error("%s", error)
        sys.exit(error.exit_code)


def in_kubernetes() -> bool:
    """Tell whether this process runs in a pod: Kubernetes gives every container the address of its own API."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def s3_patience() -> float:
    """Seconds that work which nobody watches waits for an S3 that is away: CBTM_S3_PATIENCE (300).

    Raises:
        ConfigError: If the variable is no number of seconds.
    """
    text = os.environ.get("CBTM_S3_PATIENCE") or _S3_PATIENCE
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"CBTM_S3_PATIENCE={text!r} is to be a number of seconds, such as {_S3_PATIENCE}; 0 is none")
    return seconds


def end_with_parent() -> None:
    """Have this process get SIGTERM when the one that started it ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """Event that SIGTERM and SIGINT set, so that work ends where nothing is lost; signals end nothing meanwhile."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only; whoever works elsewhere stops it by other means
        return
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
