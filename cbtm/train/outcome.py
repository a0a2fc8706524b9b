"""How the processes of a launch ended, and which of their errors caused the others.

When one rank of several fails, the others fail with it: their collectives break off. A rank that was killed says
nothing at all. The user is shown one error, that of the rank which was first.
"""

import dataclasses
import json
import logging
import re
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cbtm import errors
from cbtm.errors import CbtmError, Interrupted
from cbtm.storage import write_bytes

logger = logging.getLogger(__name__)

# What collectives raise once another rank is gone. NCCL's errors are of types of their own, gloo's are not.
_COLLECTIVE_TYPES = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
_COLLECTIVE_MESSAGE = re.compile(
    r"gloo|NCCL|TCPStore|closed by peer|reset by peer|Broken pipe|timed out|wait timeout", re.IGNORECASE
)


class WorkerFailedError(CbtmError):
    """A process of a training ended in a way that is no error of the user's."""

    exit_code = 1


@dataclass(frozen=True)
class RankError:
    """Why a rank ended.

    Attributes:
        rank: Which one.
        time: When, seconds of the system clock.
        kind: Name of the exception's class.
        exit_code: That of a CbtmError; None is a defect.
        message: The exception's message.
        consequence: Whether it is what a collective says when another rank is gone.
        traceback: As Python prints it.
    """

    rank: int
    time: float
    kind: str
    exit_code: int | None
    message: str
    consequence: bool
    traceback: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "RankError":
        """Describe an exception that is being handled."""
        names = {kind.__name__ for kind in type(error).__mro__}
        collective = type(error) is RuntimeError and _COLLECTIVE_MESSAGE.search(str(error)) is not None
        return cls(
            rank=rank,
            time=time.time(),
            kind=type(error).__name__,
            exit_code=error.exit_code if isinstance(error, CbtmError) else None,
            message=str(error),
            consequence=collective or bool(names & _COLLECTIVE_TYPES),
            traceback="".join(traceback.format_exception(error)),
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, whole."""
        write_bytes(str(path), json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, path: Path) -> "RankError":
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_bytes()))

    @property
    def is_interruption(self) -> bool:
        """Whether the rank was asked to stop, and did."""
        return self.exit_code == Interrupted.exit_code


@dataclass(frozen=True)
class Outcome:
    """How the processes of a launch ended.

    Attributes:
        n_ranks: How many there were.
        errors: What ranks that could still speak have said.
        exit_codes: Of ranks that failed, in the order in which torchrun noticed; negative is a signal's number.
        stopping: Whether they had been asked to stop.
        log: Path of a rank's log, or its last lines.
        n_heard: How many of them `errors` could come from, where not all: those of one machine of several.
    """

    n_ranks: int
    errors: list[RankError]
    exit_codes: dict[int, int]
    stopping: bool
    log: Callable[[int], Path | str]
    n_heard: int | None = None

    def error(self) -> CbtmError | None:
        """The one error that caused the others; None if there was none."""
        if (cause := self.cause()) is not None:
            return cause
        failures = sorted((error for error in self.errors if not error.is_interruption), key=lambda error: error.time)
        if failures and not self.stopping:
            return self._failed(failures[0])
        if self.errors or self.exit_codes or self.stopping:
            return self._interrupted()
        return None

    def cause(self) -> CbtmError | None:
        """The error that explains the end; None where the ranks were stopped, or have lost one on another machine."""
        failures = sorted((error for error in self.errors if not error.is_interruption), key=lambda error: error.time)
        causes = [error for error in failures if not error.consequence]
        silent = {rank: code for rank, code in self.exit_codes.items() if rank not in {one.rank for one in failures}}
        # SIGTERM is torchrun's, to those that are left. SIGABRT is often that of a collective that has waited too long.
        killed = [rank for rank, code in silent.items() if code < 0 and -code not in (signal.SIGTERM, signal.SIGABRT)]
        others = [rank for rank, code in silent.items() if code != -signal.SIGTERM]
        if killed:
            return self._ended(killed[0])
        if causes:
            return self._failed(causes[0])
        return self._ended(others[0]) if others else None

    def _interrupted(self) -> CbtmError:
        said = [error.message for error in self.errors if error.is_interruption]
        if len(said) == (self.n_heard or self.n_ranks):
            return Interrupted(said[0])
        return Interrupted("stopped without a new checkpoint; training goes on from the last one")

    def _failed(self, error: RankError) -> CbtmError:
        if error.exit_code is None:
            logger.info("rank %d of %d:\n%s", error.rank, self.n_ranks, error.traceback.rstrip())
            return WorkerFailedError(
                f"rank {error.rank} of {self.n_ranks} failed: {error.kind}: {error.message}; "
                f"its log: {self.log(error.rank)}"
            )
        alone = error.rank > 0 and not any(
            other.message == error.message for other in self.errors if other.rank != error.rank
        )
        kind = getattr(errors, error.kind, CbtmError)
        found: CbtmError = kind(f"rank {error.rank} of {self.n_ranks}: {error.message}" if alone else error.message)
        found.exit_code = error.exit_code
        return found

    def _ended(self, rank: int) -> CbtmError:
        code = self.exit_codes[rank]
        how = f"ended with code {code} and no message"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        if code == -signal.SIGKILL:
            how += ", most often for want of memory"
        return WorkerFailedError(f"rank {rank} of {self.n_ranks} {how}; its log: {self.log(rank)}")
