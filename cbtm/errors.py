"""Errors, by who can mend them.

Every error that a user is expected to meet derives from `CbtmError`; the command line prints its message
without a traceback and exits with `exit_code`. Anything else is a defect of cbtm and keeps its traceback.
"""


class CbtmError(Exception):
    """Base of all errors with a remedy outside of cbtm's code."""

    exit_code = 2


class ConfigError(CbtmError, ValueError):
    """The configuration is wrong: the person who wrote it can mend it."""


class DataError(CbtmError, ValueError):
    """The corpus or another input is wrong: the owner of the data can mend it."""


class StorageError(CbtmError, OSError):
    """A bucket, a credential, a disk or an endpoint failed: the operator can mend it."""


class ManifestError(CbtmError, ValueError):
    """Outputs that do not belong together, are incomplete, or were changed after they were written."""


class Interrupted(CbtmError):
    """Asked to stop (SIGTERM or Ctrl-C); progress is saved and the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
