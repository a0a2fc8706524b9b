"""A stage as a process of its own, as it runs in a pod, in a container or under kfp.local."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cbtm.errors import CbtmError


@contextmanager
def stage_process() -> Iterator[None]:
    """Set up logging, and end on an error that a user can mend with its message alone and its exit code."""
    level = os.environ.get("CBTM_LOG_LEVEL", "INFO")
    # force: kfp's executor has set up a handler of its own, whose prefix would hide what a line says.
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    try:
        yield
    except CbtmError as error:
        logging.getLogger(__name__).error("error: %s", error)
        sys.exit(error.exit_code)
