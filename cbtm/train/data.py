"""Training blocks in an order that depends on nothing but the seed and the step.

The documents of an arm are one stream of tokens, each behind its separator. Either an epoch cuts the stream at a
random phase into blocks, which wastes nothing and lets a block begin anywhere in a document; or whole documents are
packed into blocks once, with a little padding. An epoch visits every block once, shuffled. Any step of any epoch can
be computed without the steps before it, which is what makes a resumed run see exactly the data of one that was
never interrupted.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError
from cbtm.tokens import TokenDocuments
from cbtm.train.packing import Packing, cut, pack

IGNORED = -100  # target where nothing is learned; PyTorch's own default for it
_PREPARED_AHEAD = 2  # the device computes on one batch while the next two are made

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some blocks, int64 arrays of shape (B, T).

    Attributes:
        inputs: Tokens fed to the model; 0 where a block is padded.
        targets: The token to be predicted at each place; `IGNORED` where nothing is learned.
        positions: Place of each token in its piece of a document, where those are kept apart.
        segments: Number of the piece within its block, where attention is to stay inside equal numbers; padding
            has a number of its own.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    positions: NDArray[np.int64] | None = None
    segments: NDArray[np.int64] | None = None

    @property
    def n_targets(self) -> int:
        """Targets that are learned."""
        return int(np.count_nonzero(self.targets != IGNORED))

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` blocks, the last one of what is left."""
        for start in range(0, len(self.inputs), size):
            rows = slice(start, start + size)
            yield Batch(
                self.inputs[rows],
                self.targets[rows],
                None if self.positions is None else self.positions[rows],
                None if self.segments is None else self.segments[rows],
            )


class BlockOrder:
    """Blocks of `context_length` inputs and their targets, addressed by number.

    Packings:

    - continuous: blocks follow each other in the stream, from a phase that each epoch draws anew.
    - documents: whole documents, none of them begun in another block. A document of L tokens, its separator first, is
      L inputs, and its L targets end with the separator again, as the end of the text. One that is longer than a
      block is cut into pieces, each of its targets learned once. Which pieces share a block is the same in each epoch.
    - separate: as documents, with positions that restart at 0 and segments of their own for each piece.

    A prefix token is the first input of each block and takes the place of a text token. In continuous packing its
    target is the block's first token, so that all of the text is learned. In the other two its target is ignored:
    that would be a separator, about which nothing is to be learned, or a token that the piece before has learned. In
    separate packing each piece has a prefix in front of it, at position 0: attention reaches no other.

    Args:
        documents: The token stream.
        context_length: Inputs of a block.
        seed: Seed of the order.
        packing: How documents become blocks.
        prefix_token: Token in front of each block, such as the cluster's.

    Raises:
        DataError: If the stream is shorter than one block; for packed documents, if it is empty.
        ConfigError: If the prefix leaves no room for text.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        *,
        context_length: int,
        seed: int,
        packing: Packing = "continuous",
        prefix_token: int | None = None,
    ) -> None:
        self.documents = documents
        self.context_length = context_length
        self.seed = seed
        self.packing = packing
        self.prefix_token = prefix_token
        self._n_prefix = int(prefix_token is not None)
        if context_length <= self._n_prefix:
            raise ConfigError(f"context_length={context_length} leaves no room for text behind the prefix token; use 2")
        if packing == "continuous":
            # Without a prefix, the block's last target is the first input of the next: one token more than inputs.
            self.n_blocks = (documents.n_tokens - 1 + self._n_prefix) // context_length
            if self.n_blocks < 1:
                raise DataError(
                    f"{documents.n_documents} documents with {documents.n_tokens} tokens are less than one block of "
                    f"context_length={context_length}; use fewer clusters, a shorter context or more text"
                )
        else:
            self.n_blocks = self._pack()
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._phase = 0

    def batch(self, first: int, count: int) -> Batch:
        """Blocks number `first` … `first + count` of the endless sequence; `count` 0 gives arrays of shape (0, T)."""
        shape = (count, self.context_length)
        if self.packing == "continuous":
            batch = Batch(np.empty(shape, np.int64), np.empty(shape, np.int64))
            for row in range(count):
                self._fill_continuous(batch, row, self._place(first + row))
            return batch
        batch = Batch(np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64))
        if self.packing == "separate":
            batch = Batch(batch.inputs, batch.targets, np.empty(shape, np.int64), np.empty(shape, np.int64))
        for row in range(count):
            self._fill_packed(batch, row, self._place(first + row))
        return batch

    def epochs(self, n_blocks: int) -> float:
        """How often the stream has been seen after so many blocks."""
        return n_blocks / self.n_blocks

    @property
    def padding(self) -> float:
        """Share of all inputs that is padding; prefixes are none."""
        if self.packing == "continuous":
            return 0.0
        n_prefixes = len(self._pieces) if self.packing == "separate" else self.n_blocks
        used = self.documents.n_tokens + self._n_prefix * n_prefixes
        return 1 - used / (self.n_blocks * self.context_length)

    def _pack(self) -> int:
        """Cut and pack the documents; returns the number of blocks."""
        room = self.context_length - self._n_prefix
        self._pieces = cut(self.documents.lengths(), room)
        if not len(self._pieces):
            raise DataError(
                f"{self.documents.n_documents} documents with {self.documents.n_tokens} tokens are nothing to pack; "
                "use fewer clusters or more text"
            )
        if self.packing == "separate":  # a prefix is a part of its piece there
            blocks = pack(self._pieces.lengths + self._n_prefix, self.context_length)
        else:
            blocks = pack(self._pieces.lengths, room)
        self._by_block = np.argsort(blocks, kind="stable")  # pieces of a block stay in the stream's order
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(blocks))])
        return len(self._bounds) - 1

    def _place(self, index: int) -> int:
        """Which block of the stream, or of the packed ones, comes at this number of the endless sequence."""
        epoch, position = divmod(index, self.n_blocks)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(self.n_blocks)
            if self.packing == "continuous":
                spare = (self.documents.n_tokens - 1 + self._n_prefix) - self.n_blocks * self.context_length
                self._phase = int(rng.integers(spare + 1))
            self._epoch = epoch
        return int(self._order[position])

    def _fill_continuous(self, batch: Batch, row: int, place: int) -> None:
        begin = self._phase + place * self.context_length
        if self.prefix_token is None:
            tokens = self.documents.read(begin, self.context_length + 1)
            batch.inputs[row], batch.targets[row] = tokens[:-1], tokens[1:]
        else:
            tokens = self.documents.read(begin, self.context_length)
            batch.inputs[row, 0], batch.inputs[row, 1:], batch.targets[row] = self.prefix_token, tokens[:-1], tokens
        if self.documents.has_prompts:
            learned = self.documents.learned(begin + 1 - self._n_prefix, self.context_length)
            batch.targets[row, ~learned] = IGNORED

    def _fill_packed(self, batch: Batch, row: int, place: int) -> None:
        prefix = [] if self.prefix_token is None else [self.prefix_token]
        begin = 0
        for number, piece in enumerate(self._by_block[self._bounds[place] : self._bounds[place + 1]]):
            n_prefix = len(prefix) if number == 0 or self.packing == "separate" else 0
            batch.inputs[row, begin : begin + n_prefix] = prefix[:n_prefix]
            text = begin + n_prefix
            end = text + int(self._pieces.lengths[piece])
            batch.inputs[row, text:end], batch.targets[row, text:end] = self._read_piece(piece)
            _mark(batch, row, begin, end, number)
            begin = end
        _mark(batch, row, begin, self.context_length, number + 1)

    def _read_piece(self, piece: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        start, length = int(self._pieces.starts[piece]), int(self._pieces.lengths[piece])
        separator = int(self._pieces.separators[piece])
        inside = length if separator < 0 else length - 1  # targets that stand in the document
        tokens = self.documents.read(start, inside + 1)
        targets = np.empty(length, np.int64)
        targets[:inside] = tokens[1:]
        if separator >= 0:
            targets[inside] = tokens[0] if separator == start else self.documents.read(separator, 1)[0]
        if self.documents.has_prompts:  # the end of the text is never a part of a prompt
            targets[:inside][~self.documents.learned(start + 1, inside)] = IGNORED
        return tokens[:length], targets


def _mark(batch: Batch, row: int, begin: int, end: int, segment: int) -> None:
    if batch.positions is not None and batch.segments is not None:
        batch.positions[row, begin:end] = np.arange(end - begin)
        batch.segments[row, begin:end] = segment


class Prefetcher(Generic[T]):
    """Makes what each step needs on a thread of its own, while the device computes the steps before it.

    Use it as a context manager: the thread runs inside the block, and leaving it ends the thread as soon as what it
    is making is made.

    Args:
        make: Makes what a step needs. It runs on the thread alone, in the order of the steps.
        first: First step.
        last: One past the last step.

    Attributes:
        waited: Seconds that `next` has waited for the thread.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int) -> None:
        self._make, self._first, self._last = make, first, last
        self._ready: deque[T] = deque()
        self._taken = first
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="prefetcher", daemon=True)
        self.waited = 0.0

    def next(self) -> T:
        """What the next step needs.

        Raises:
            Exception: What `make` raised for this step.
            IndexError: If all steps are taken.
            RuntimeError: Outside of the `with` block, where no thread makes anything.
        """
        if self._taken == self._last:
            raise IndexError(f"steps {self._first} to {self._last} are all taken")
        if self._closed or self._thread.ident is None:
            raise RuntimeError("a prefetcher prepares nothing outside of its `with` block")
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None)
            self.waited += time.perf_counter() - began
            if self._error is not None and not self._ready:
                raise self._error
            self._taken += 1
            self._changed.notify_all()
            return self._ready.popleft()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for step in range(self._first, self._last):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < _PREPARED_AHEAD)
                    if self._closed:
                        return
                made = self._make(step)
                with self._changed:
                    self._ready.append(made)
                    self._changed.notify_all()
        except BaseException as error:  # it is raised again where it is waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()
