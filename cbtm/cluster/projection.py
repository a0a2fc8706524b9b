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
# Directions weaker than this part of the strongest are float32 rounding noise.
_RANK_TOLERANCE = 1e-5
_REORTHOGONALISATIONS = 2  # "twice is enough" (Giraud, Langou and Rozložník 2005)


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
    else:
        images = _krylov_images(matrix, n_directions, iterations, np.random.default_rng(random_state))
    # Rayleigh-Ritz: the best directions within the span of the images, shape (m, basis).
    strengths, coordinates = _decomposed_gram(images.T @ images, n_directions)
    directions = images @ (coordinates / strengths)
    # The sign of a singular vector is free, and libraries differ.
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.sign(directions[largest, np.arange(len(strengths))])
    return strengths, directions


def _krylov_images(
    matrix: csr_matrix, n_directions: int, iterations: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Images under the transposed matrix of an orthonormal basis, shape (m, about n_directions / 5 * (iterations + 1)).

    The basis, in the space of the rows, grows by a block at each step: what the matrix makes of the last block's image,
    without what the basis spans already.
    """
    n_rows, n_columns = matrix.shape
    width = max(_LEAST_BLOCK, math.ceil(_BLOCK_PART * n_directions))
    n_blocks = max(iterations, math.ceil(n_directions / width) - 1) + 1
    transposed = matrix.T.tocsr()  # a product by rows writes in order
    basis = np.empty((n_rows, n_blocks * width), dtype=np.float32)
    images = np.empty((n_columns, n_blocks * width), dtype=np.float32)
    image, done = rng.standard_normal((n_columns, width), dtype=np.float32), 0
    for _ in range(n_blocks):
        block = _orthonormal_to(basis[:, :done], matrix @ image)
        if not block.shape[1]:
            break  # the basis spans all that the matrix does
        image = transposed @ block
        new = slice(done, done + block.shape[1])
        basis[:, new], images[:, new] = block, image
        done = new.stop
    return images[:, :done]


def _orthonormal_to(basis: NDArray[np.float32], block: NDArray[np.float32]) -> NDArray[np.float32]:
    """Orthonormal columns that span what `block` adds to `basis`."""
    size = float(np.linalg.norm(block, axis=0).max(initial=0))
    for _ in range(_REORTHOGONALISATIONS):
        block = block - basis @ (basis.T @ block)
        values, vectors = np.linalg.eigh((block.T @ block).astype(np.float64))
        real = values > (_RANK_TOLERANCE * size) ** 2
        block = block @ (vectors[:, real] / np.sqrt(values[real])).astype(np.float32)
        size = 1.0
    return block


def _decomposed_gram(gram: NDArray[np.float32], n_directions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Roots of the largest eigenvalues, falling, and their eigenvectors as columns."""
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    strengths = np.sqrt(np.maximum(values[::-1][:n_directions], 0))
    n_real = int(np.count_nonzero(strengths > _RANK_TOLERANCE * strengths[0]))
    return strengths[:n_real].astype(np.float32), vectors[:, ::-1][:, :n_real].astype(np.float32)
