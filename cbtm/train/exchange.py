"""What a launching stage and the machines that train for it tell each other, as files below one prefix in S3.

The stage writes the task, each machine that fails why, and the first one the result. Nothing of it is big: the model's
files are placed where they belong by the machine that has them, and the stage writes their manifest. Metrics and log
lines take another way, the log of the machine's pod.
"""

import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cbtm import storage
from cbtm.config import Config
from cbtm.errors import ManifestError
from cbtm.manifest import FileEntry, Placed
from cbtm.train.node import Node
from cbtm.train.outcome import Outcome, RankError
from cbtm.train.worker import LaunchFolder

_TASK, _RESULT, _FAILURES = "task.json", "result.json", "failures"
_TAIL_LINES, _TAIL_BYTES = 15, 64 << 10  # of a rank's log, in the error that is shown


class NodeTask(Config):
    """What the machines of one training do.

    Attributes:
        config: The run's configuration, JSON text.
        member: The member to be trained.
        key: Identity of the training, which a machine with another version of cbtm does not come to.
    """

    format: int = 1
    config: str
    member: str
    key: str


class NodeFailure(Config):
    """Why one machine ended.

    Attributes:
        node: Its number.
        time: When it said so, seconds of its clock.
        errors: Fields of a `RankError` for each of its ranks that could still speak.
        exit_codes: Of its ranks that failed, in the order in which torchrun noticed.
        stopping: Whether it had been asked to stop.
        logs: Last lines of the log of each of its ranks.
    """

    node: int
    time: float
    errors: list[dict[str, Any]]
    exit_codes: dict[int, int]
    stopping: bool
    logs: dict[int, str]

    @classmethod
    def of(cls, error: BaseException, node: Node, n_processes: int, folder: LaunchFolder) -> "NodeFailure":
        """Describe the exception that ended a machine's work, with what its launch has found, if it came to one."""
        ranks = node.ranks(n_processes)
        found = folder.load_outcome()
        if found is None:  # before there were any ranks, or after they had come to their end
            found = {"errors": [dataclasses.asdict(RankError.of(error, ranks[0]))], "exit_codes": {}, "stopping": False}
        logs = {rank: text for rank in ranks if (text := _tail(folder.log(rank)))}
        return cls(node=node.number, time=time.time(), logs=logs, **found)


def outcome_of(failures: Iterable[NodeFailure], n_ranks: int) -> Outcome:
    """What became of all ranks, by what their machines say."""
    inorder = sorted(failures, key=lambda failure: failure.time)
    logs = {rank: text for failure in inorder for rank, text in failure.logs.items()}
    return Outcome(
        n_ranks=n_ranks,
        errors=[RankError(**error) for failure in inorder for error in failure.errors],
        exit_codes={rank: code for failure in inorder for rank, code in failure.exit_codes.items()},
        stopping=any(failure.stopping for failure in inorder),
        log=lambda rank: "\n" + logs.get(rank, "(empty)"),
    )


class Exchange:
    """The files of one member's training.

    Args:
        uri: Prefix that they lie below.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.task_uri = storage.join(uri, _TASK)

    @classmethod
    def of_task(cls, task_uri: str) -> "Exchange":
        """That of a task, given the address of its file."""
        return cls(task_uri.rpartition("/")[0])

    def write_task(self, task: NodeTask) -> None:
        """Say what is to be done."""
        storage.write_bytes(self.task_uri, task.model_dump_json(indent=1).encode())

    def read_task(self) -> NodeTask:
        """Read what is to be done.

        Raises:
            ManifestError: If it is not of this version.
        """
        found: NodeTask = _parsed(NodeTask, self.task_uri)
        return found

    def write_failure(self, failure: NodeFailure) -> None:
        """Say why a machine ended."""
        storage.write_bytes(self._failure_uri(failure.node), failure.model_dump_json(indent=1).encode())

    def clear_failure(self, node: int) -> None:
        """Take back what an earlier try of a machine said."""
        storage.delete(self.uri, [f"{_FAILURES}/{_name(node)}"])

    def failures(self) -> list[NodeFailure]:
        """What machines have said so far."""
        found = storage.list_files(storage.join(self.uri, _FAILURES))
        return [_parsed(NodeFailure, storage.join(self.uri, _FAILURES, file.path)) for file in found]

    def write_result(self, key: str, placed: Placed) -> None:
        """Say that the model is trained, and which files have been placed."""
        files = [file.model_dump() for file in placed.files]
        told = {"key": key, "files": files, "metadata": dict(placed.metadata)}
        storage.write_bytes(storage.join(self.uri, _RESULT), json.dumps(told, indent=1).encode())

    def result(self, key: str) -> Placed | None:
        """What a training with this key has left; None if there is nothing of it."""
        uri = storage.join(self.uri, _RESULT)
        if not storage.exists(uri):
            return None
        told = json.loads(storage.read_bytes(uri))
        if told["key"] != key:
            return None
        return Placed(tuple(FileEntry.model_validate(file) for file in told["files"]), told["metadata"])

    def clear(self) -> None:
        """Remove all of it."""
        storage.delete(self.uri, [file.path for file in storage.list_files(self.uri)])

    def _failure_uri(self, node: int) -> str:
        return storage.join(self.uri, _FAILURES, _name(node))


def _name(node: int) -> str:
    return f"node-{node:05d}.json"


def _parsed(kind: Any, uri: str) -> Any:
    try:
        return kind.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise ManifestError(f"{uri} is damaged or of another version of cbtm: {error.errors()[0]['msg']}") from None


def _tail(log: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
