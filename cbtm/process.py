"""A stage as a process of its own, as it runs in a pod, in a container or under kfp.local."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cbtm.errors import CbtmError

_PR_SET_PDEATHSIG = 1  # prctl(2)
STOP_WITH_PARENT = "CBTM_STOP_WITH_PARENT"


@contextmanager
def stage_process() -> Iterator[None]:
    """Set up logging, and end on an error that a user can mend with its message alone and its exit code.

    With CBTM_STOP_WITH_PARENT set, the process gets SIGTERM when the process that started it dies, so that
    killing a run on this machine leaves nothing behind that goes on writing.
    """
    logging.basicConfig(level=os.environ.get("CBTM_LOG_LEVEL", "INFO"), format="%(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    if os.environ.get(STOP_WITH_PARENT) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        yield
    except CbtmError as error:
        logging.getLogger(__name__).error("error: %s", error)
        sys.exit(error.exit_code)
