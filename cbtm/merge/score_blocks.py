"""Blocks of scores that are finished, so that scoring goes on after them when it is started again.

A block is one file, written whole or not at all: a line of JSON that says what it belongs to and what it cost, then
the array in NumPy's format. Blocks are bound to their scores by a key, as a training's checkpoints are; one of another
key, of another cut into blocks or with damaged bytes is passed over and scored again.
"""

import contextlib
import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from cbtm import storage
from cbtm.errors import Interrupted, StorageError
from cbtm.process import stop_requested

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fed:
    """What went through a model.

    Attributes:
        forward_passes: Calls of the model.
        tokens: Tokens of all calls, padding and prefix tokens included.
    """

    forward_passes: int = 0
    tokens: int = 0

    def __add__(self, other: "Fed") -> "Fed":
        return Fed(self.forward_passes + other.forward_passes, self.tokens + other.tokens)


@dataclass(frozen=True)
class Block:
    """Scores of consecutive documents.

    Attributes:
        first: First document.
        end: One past the last.
        log_probs: Float32 of shape (scored tokens of the documents,); NaN where a token was not scored.
        fed: What it cost.
    """

    first: int
    end: int
    log_probs: NDArray[np.float32]
    fed: Fed


class ScoreBlocks:
    """Finished blocks below one URI.

    Args:
        uri: Folder or s3:// prefix of these scores' blocks.
        key: Identity of the scores.
    """

    def __init__(self, uri: str, *, key: str) -> None:
        self.uri, self._key = uri, key

    def load(self, number: int, *, first: int, end: int, size: int) -> Block | None:
        """The block of that number, or None where there is none of this key, these documents and so many scores.

        Raises:
            StorageError: If the store cannot be read.
        """
        uri = storage.join(self.uri, _name(number))
        if not storage.exists(uri):
            return None
        said, _, data = storage.read_bytes(uri).partition(b"\n")
        expected = {"key": self._key, "first": first, "end": end, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            facts = json.loads(said)
            if {name: facts.get(name) for name in expected} != expected:
                logger.info("block=%s passed over: it is of other scores, or damaged", uri)
                return None
            log_probs = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
            fed = Fed(**facts["fed"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever lies there, it is no block
            logger.warning("block=%s passed over: %s", uri, error)
            return None
        if log_probs.shape != (size,) or log_probs.dtype != np.float32:
            logger.warning("block=%s passed over: %s scores of %s", uri, log_probs.shape, log_probs.dtype)
            return None
        return Block(first, end, log_probs, fed)

    def save(self, number: int, block: Block) -> None:
        """Write a block, in place of any other of its number.

        Raises:
            StorageError: If it cannot be written.
        """
        file = io.BytesIO()
        np.lib.format.write_array(file, np.asarray(block.log_probs, dtype=np.float32), allow_pickle=False)
        data = file.getvalue()
        facts = {
            "key": self._key,
            "first": block.first,
            "end": block.end,
            "sha256": hashlib.sha256(data).hexdigest(),
            "fed": asdict(block.fed),
        }
        storage.write_bytes(storage.join(self.uri, _name(number)), json.dumps(facts).encode() + b"\n" + data)

    def clear(self) -> None:
        """Remove all blocks, whatever their key: the scores have been published."""
        storage.delete(self.uri, [file.path for file in storage.list_files(self.uri)])
        if not storage.is_s3(self.uri):
            with contextlib.suppress(OSError):  # not there, or not empty
                storage.local_path(self.uri).rmdir()


def _name(number: int) -> str:
    return f"block-{number:06d}"


def block_bounds(offsets: NDArray[np.int64], block_tokens: int) -> list[tuple[int, int]]:
    """First document and end of each block: of the documents whose scores begin in the same `block_tokens`."""
    numbers = offsets[:-1] // block_tokens
    firsts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
    return list(zip(firsts, [*firsts[1:], len(numbers)], strict=True))


def score_blocks(
    score_block: Callable[[int, int, threading.Event, Callable[[int], None]], Block | None],
    offsets: NDArray[np.int64],
    bounds: Sequence[tuple[int, int]],
    blocks: ScoreBlocks | None,
    progress: Callable[[int, int], None] | None,
    *,
    n_needed: int | None = None,
) -> tuple[NDArray[np.float32], Fed]:
    """Score block by block; those that are saved are taken as they are.

    Args:
        score_block: Makes the block of documents first … end. It looks at the event between forward passes, returns
            None once that is set, and tells how many tokens each pass scored.
        offsets: Where each document's scores begin, and the end.
        bounds: From `block_bounds`.
        blocks: Where finished blocks are; None saves none.
        progress: Called with tokens scored so far and in all.
        n_needed: Tokens to score; None is all.

    Returns:
        Float32 scores of all tokens, and what they cost, saved blocks included.

    Raises:
        Interrupted: On SIGTERM or SIGINT.
        StorageError: If a block cannot be read or written.
    """
    out, fed, done = np.empty(int(offsets[-1]), dtype=np.float32), Fed(), 0
    total = len(out) if n_needed is None else n_needed

    def count(n_scored: int) -> None:
        nonlocal done
        done += n_scored
        if progress is not None:
            progress(done, total)

    with stop_requested() as stop:
        for number, (first, end) in enumerate(bounds):
            place = slice(int(offsets[first]), int(offsets[end]))
            block = _load(blocks, stop, number, first, end, place.stop - place.start)
            if block is not None:
                count(int(np.count_nonzero(~np.isnan(block.log_probs))))
            else:
                block = score_block(first, end, stop, count)
                if block is not None and blocks is not None:
                    blocks.save(number, block)
            # Behind the last block as well: whoever asked for the scores would go on to other work.
            if block is None or stop.is_set():
                where = "none is saved"
                if blocks is not None:
                    where = f"{number + (block is not None)} of {len(bounds)} blocks are saved at {blocks.uri}"
                raise Interrupted(f"stopped after {done} of {total} tokens; {where}")
            out[place] = block.log_probs
            fed += block.fed
    return out, fed


def _load(
    blocks: ScoreBlocks | None, stop: threading.Event, number: int, first: int, end: int, size: int
) -> Block | None:
    """A saved block; a store that is away is not waited for once there is a request to stop."""
    if blocks is None:
        return None
    try:
        with storage.ended_by(stop):
            return blocks.load(number, first=first, end=end, size=size)
    except StorageError:
        if stop.is_set():
            return None
        raise
