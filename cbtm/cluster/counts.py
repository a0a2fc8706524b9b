"""How often each word occurs in each text: sparse matrices over a vocabulary that is still growing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def chosen(
    columns: NDArray[np.int32], is_chosen: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Some of the words of texts: their columns, and where each text begins among them."""
    return columns[is_chosen], np.concatenate([[0], np.cumsum(is_chosen)])[offsets]


def merged(columns: NDArray[np.int32], offsets: NDArray[np.int64], n_words: int) -> csr_matrix:
    """How often each word occurs in each text; float32, shape (texts, n_words)."""
    counts = count_matrix(columns, offsets, n_words)
    counts.sum_duplicates()
    return counts


def stacked(blocks: list[csr_matrix]) -> csr_matrix:
    """Blocks of rows over a growing vocabulary as one matrix; `blocks` is emptied, to hold the entries once."""
    from scipy.sparse import csr_matrix

    if not blocks:
        return csr_matrix((0, 0), dtype=np.float32)
    n_words = blocks[-1].shape[1]
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    indptr = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    data, indices = np.empty(indptr[-1], dtype=np.float32), np.empty(indptr[-1], dtype=np.int32)
    end = len(data)
    while blocks:
        block = blocks.pop()
        start = end - block.nnz
        data[start:end], indices[start:end] = block.data, block.indices
        end = start
    return csr_matrix((data, indices, indptr), shape=(len(lengths), n_words))


def renumbered(counts: csr_matrix, kept: NDArray[np.int64]) -> csr_matrix:
    """The columns `kept` of `counts`, rising; entries stay in their order."""
    from scipy.sparse import csr_matrix

    new_columns = np.full(counts.shape[1], -1, dtype=np.int32)
    new_columns[kept] = np.arange(len(kept), dtype=np.int32)
    indices = new_columns[counts.indices]
    is_kept = indices >= 0
    indptr = np.concatenate([[0], np.cumsum(is_kept)])[counts.indptr]
    return csr_matrix((counts.data[is_kept], indices[is_kept], indptr), shape=(counts.shape[0], len(kept)))


def count_matrix(columns: NDArray[np.int32], indptr: NDArray[np.int64], n_words: int) -> csr_matrix:
    """One float32 entry of 1 per word; scipy adds repeated entries of a row when it multiplies."""
    from scipy.sparse import csr_matrix

    ones = np.ones(len(columns), dtype=np.float32)
    return csr_matrix((ones, columns, indptr), shape=(len(indptr) - 1, n_words))
