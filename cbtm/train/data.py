"""Training blocks in an order that depends on nothing but the seed and the step.

The documents of an arm are one stream of tokens, each behind its separator; an epoch cuts it at a random phase
into blocks and visits every block once, shuffled. Any step of any epoch can be computed without the steps before
it, which is what makes a resumed run see exactly the data of one that was never interrupted.
"""

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.tokens import TokenDocuments


class BlockOrder:
    """Blocks of `context_length` tokens and their targets, addressed by step.

    Args:
        documents: The token stream.
        context_length: Tokens that a block feeds to the model; one more is read, for the targets.
        seed: Seed of the order.

    Raises:
        DataError: If the stream is shorter than one block.
    """

    def __init__(self, documents: TokenDocuments, *, context_length: int, seed: int) -> None:
        self.documents = documents
        self.context_length = context_length
        self.seed = seed
        self.n_blocks = (documents.n_tokens - 1) // context_length
        if self.n_blocks < 1:
            raise DataError(
                f"{documents.n_documents} documents with {documents.n_tokens} tokens are less than one block of "
                f"context_length={context_length}; use fewer clusters, a shorter context or more text"
            )
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._phase = 0

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """Blocks number `first` … `first + count` of the endless sequence, int64, shape (count, context + 1)."""
        return np.stack([self._block(index) for index in range(first, first + count)])

    def epochs(self, n_blocks: int) -> float:
        """How often the stream has been seen after so many blocks."""
        return n_blocks / self.n_blocks

    def _block(self, index: int) -> NDArray[np.int64]:
        epoch, position = divmod(index, self.n_blocks)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            spare = (self.documents.n_tokens - 1) - self.n_blocks * self.context_length
            self._order, self._phase = rng.permutation(self.n_blocks), int(rng.integers(spare + 1))
            self._epoch = epoch
        start = self._phase + int(self._order[position]) * self.context_length
        return self.documents.read(start, self.context_length + 1)
