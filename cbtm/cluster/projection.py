"""The leading singular directions of a sparse matrix: a truncated SVD by a block Krylov method, in float32.

Randomised block Lanczos with full reorthogonalisation (Musco and Musco 2015, arXiv 1504.05477; Golub and Van Loan
2013, section 10.3.6). For the same number of sparse products it captures more than the randomised power iteration
that scikit-learn uses, because it keeps the directions of every step, not only those of the last. tf-idf matrices,
whose singular values fall slowly, gain most. benchmarks/embedder.py has both in one run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Directions per step, as a part of those wanted: smaller blocks reach further for the same work, but a sparse product
# with a narrow block runs slower.
_BLOCK_PART = 0.2
_LEAST_BLOCK = 4
# A matrix of up to this many rows is decomposed exactly: its Gram matrix is small.
_EXACT_ROWS = 512
# What is left of a float32 column below this part of its length is rounding noise.
_ROUNDING = 1e-5
# Singular values below this part of the largest are: their squares are sums in float32, good to six or seven digits.
_RANK_TOLERANCE = 1e-3


def leading_directions(
    matrix: csr_matrix, n_directions: int, *, iterations: int, random_state: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Right singular vectors of the largest singular values.

    Args:
        matrix: Float32, shape (n, m).
        n_directions: Vectors wanted, d.
        iterations: Steps after the first; each adds about d / 5 directions to the basis, and the more of them, the
            nearer the result comes to the exact one.
        random_state: Seed of the start.

    Returns:
        Singular values, float32, shape (r,), falling, and the vectors, float32, shape (m, r), with the largest entry
        of each positive; r is d, or the rank of the matrix if that is smaller.
    """
    if matrix.shape[0] <= _EXACT_ROWS:
        images = matrix.T.toarray()  # the basis is every row
        gram = (matrix @ matrix.T).toarray()
    else:
        images, gram = _krylov_images(matrix, n_directions, iterations, np.random.default_rng(random_state))
    # Rayleigh-Ritz: the best directions within the span of the images.
    strengths, coordinates = _decomposed(gram, n_directions)
    directions = images @ (coordinates / strengths)
    # The sign of a singular vector is free, and libraries differ.
    directions *= np.where(directions.max(axis=0) < -directions.min(axis=0), np.float32(-1), np.float32(1))
    return strengths, directions


def _krylov_images(
    matrix: csr_matrix, n_directions: int, iterations: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Images under the transposed matrix of an orthonormal basis, and their Gram matrix.

    The basis, in the space of the rows, grows by a block at each step: what the matrix makes of the last block's image,
    without what the basis spans already. That overlap is a column of blocks of the Gram matrix.

    Returns:
        Images, shape (m, b), b about n_directions / 5 * (iterations + 1), and products of each two of them, shape
        (b, b), of which the upper triangle is filled.
    """
    n_rows, n_columns = matrix.shape
    width = max(_LEAST_BLOCK, math.ceil(_BLOCK_PART * n_directions))
    n_blocks = max(iterations, math.ceil(n_directions / width) - 1) + 1
    transposed = matrix.T.tocsr()  # a product by rows writes in order
    basis = np.empty((n_rows, n_blocks * width), dtype=np.float32)
    images = np.empty((n_columns, n_blocks * width), dtype=np.float32)
    gram = np.zeros((n_blocks * width, n_blocks * width), dtype=np.float32)
    image, last = rng.standard_normal((n_columns, width), dtype=np.float32), slice(0, 0)
    for number in range(n_blocks + 1):
        known = basis[:, : last.stop]
        product = matrix @ image
        overlap = known.T @ product
        if number:
            gram[: last.stop, last] = overlap
        if number == n_blocks:
            break
        block = _orthonormal(product, known, overlap)
        if not block.shape[1]:
            break  # the basis spans all that the matrix does
        image = transposed @ block
        last = slice(last.stop, last.stop + block.shape[1])
        basis[:, last], images[:, last] = block, image
    return images[:, : last.stop], gram[: last.stop, : last.stop]


def _orthonormal(
    block: NDArray[np.float32], basis: NDArray[np.float32], overlap: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Orthonormal columns that span what `block` adds to `basis`; `overlap` is basis.T @ block."""
    size = float(np.linalg.norm(block, axis=0).max(initial=0))
    for again in (True, False):  # "twice is enough" (Giraud, Langou and Rozložník 2005)
        block = block - basis @ overlap
        values, vectors = np.linalg.eigh((block.T @ block).astype(np.float64))
        real = values > (_ROUNDING * size) ** 2
        block = block @ (vectors[:, real] / np.sqrt(values[real])).astype(np.float32)
        if again:
            overlap, size = basis.T @ block, 1.0
    return block


def _decomposed(gram: NDArray[np.float32], n_directions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Roots of the largest eigenvalues of a matrix (its upper triangle), falling, and the eigenvectors as columns."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64), UPLO="U")
    strengths = np.sqrt(np.maximum(values[::-1][:n_directions], 0))
    n_real = int(np.count_nonzero(strengths > _RANK_TOLERANCE * strengths[0]))
    return strengths[:n_real].astype(np.float32), vectors[:, ::-1][:, :n_real].astype(np.float32)
