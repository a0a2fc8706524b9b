"""A stage as a process of its own, as it runs in a pod, in a container or under kfp.local."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cbtm.errors import CbtmError

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # prctl(2)


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
    for name in ("botocore", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def stage_process() -> Iterator[None]:
    """Set up logging, and end on an error that a user can mend with its message alone and its exit code."""
    log_to_stderr()
    try:
        yield
    except CbtmError as error:
        logger.error("%s", error)
        sys.exit(error.exit_code)


def end_with_parent() -> None:
    """Have this process get SIGTERM when the one that started it ends, however that ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
