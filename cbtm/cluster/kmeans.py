"""Balanced k-means: Lloyd's algorithm whose assignment step gives every cluster the same number of points.

Both steps are solved exactly (see `cbtm.cluster.assignment` for the first), so the inertia never rises, and the
dual prices of one iteration start the next. What is left to chance is the local optimum. Greedy k-means++ (Arthur and
Vassilvitskii 2007; the greedy form is scikit-learn's) from a single draw still ends in a poor one now and then, so
several starts compete on a sample, where they are cheap, and only the best runs on all points.

Balanced centres are used with a greedy assignment afterwards, as in c-BTM: `nearest_centers` ignores sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.assignment import balanced_assignment, one_blas_thread
from cbtm.errors import ConfigError, DataError

# Rows per block of distances: with 100 columns, the float32 block stays in a second-level cache.
_BLOCK_ROWS = 4096
# Starts that compete, the points that they compete on, and their iterations.
_START_CANDIDATES = 4
_START_POINTS_PER_CLUSTER = 128
_START_POINTS_AT_LEAST = 4096
_START_ITERATIONS = 10


@dataclass(frozen=True)
class KMeansResult:
    """Centres and the balanced labels that belong to them.

    Attributes:
        cluster_centers_: Centres, float32, shape (k, d).
        labels_: Balanced assignment to `cluster_centers_`, int32, shape (n,).
        inertia_: Sum of squared Euclidean distances of the points to their centres.
        n_iter_: Assignments made by the best run, which is the length of `history_`.
        history_: Inertia after each assignment of the best run.
    """

    cluster_centers_: NDArray[np.float32]
    labels_: NDArray[np.int32]
    inertia_: float
    n_iter_: int
    history_: tuple[float, ...]


def balanced_kmeans(
    x: NDArray[np.float32],
    n_clusters: int,
    *,
    random_state: int,
    n_init: int = 1,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    progress: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Divide points into clusters of equal size (to within one) of least squared distance to their means.

    Args:
        x: Points, float32, shape (n, d). Duplicates and zero rows are allowed.
        n_clusters: k, from 1 to n.
        random_state: Seed; the same input and seed give the same result on one platform.
        n_init: Runs on all points, from different starts; the one of least inertia is returned.
        max_iterations: Assignments per run at most.
        tolerance: A run ends when the inertia falls by less than this part of itself, or no label changes.
        progress: Called with the iteration (from 1) and the inertia after each assignment.

    Returns:
        The best run.

    Raises:
        ConfigError: If a setting is out of its range, `n_clusters` above n included.
        DataError: If `x` is not a matrix, has no columns, or holds a NaN or an infinity.
    """
    x = _checked_points(x)
    _check_settings(len(x), n_clusters, random_state, n_init, max_iterations, tolerance)
    rng = np.random.default_rng(random_state)
    with one_blas_thread():
        runs = (_lloyd(x, _best_start(x, n_clusters, rng), max_iterations, tolerance, progress) for _ in range(n_init))
        return min(runs, key=lambda run: run.inertia_)


def squared_distances(x: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared Euclidean distance of every point to every centre, by matrix product.

    Both are moved by the mean of the centres first: far from the origin, |x|^2 - 2 x.c + |c|^2 would lose the
    distance to rounding.

    Args:
        x: Points, shape (n, d).
        centers: Centres, shape (k, d).

    Returns:
        float32, shape (n, k), not negative.

    Raises:
        DataError: If the numbers of columns differ.
    """
    x, centers = np.asarray(x, dtype=np.float32), np.asarray(centers, dtype=np.float32)
    if x.ndim != 2 or centers.ndim != 2 or x.shape[1] != centers.shape[1] or len(centers) == 0:
        raise DataError(f"points {x.shape} and centres {centers.shape} do not fit; pass (n, d) and (k, d), k >= 1")
    origin = centers.mean(axis=0)
    centers = centers - origin
    center_norms = np.einsum("kd,kd->k", centers, centers)
    distances = np.empty((len(x), len(centers)), dtype=np.float32)
    for start in range(0, len(x), _BLOCK_ROWS):
        block = x[start : start + _BLOCK_ROWS] - origin  # (block, d)
        part = distances[start : start + _BLOCK_ROWS]
        np.matmul(block, -2 * centers.T, out=part)
        part += center_norms
        part += np.einsum("nd,nd->n", block, block)[:, None]
    return np.maximum(distances, 0, out=distances)


def nearest_centers(x: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int32]:
    """Nearest centre of every point whatever the sizes, ties to the lowest index; int32, shape (n,).

    Raises:
        DataError: If the numbers of columns differ.
    """
    labels = np.empty(len(x), dtype=np.int32)
    for start in range(0, max(len(x), 1), _BLOCK_ROWS):
        labels[start : start + _BLOCK_ROWS] = squared_distances(x[start : start + _BLOCK_ROWS], centers).argmin(1)
    return labels


def _checked_points(x: NDArray[np.float32]) -> NDArray[np.float32]:
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim != 2 or x.shape[1] == 0:
        raise DataError(f"x has shape {x.shape}; pass a matrix of (documents, dimensions)")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise DataError(
            f"row {int(np.flatnonzero(~finite)[0])} of x is not finite ({int((~finite).sum())} such rows); "
            "remove or mend these documents"
        )
    return x


def _check_settings(
    n_points: int, n_clusters: int, random_state: int, n_init: int, max_iterations: int, tolerance: float
) -> None:
    for name, value in (("n_clusters", n_clusters), ("n_init", n_init), ("max_iterations", max_iterations)):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small; use at least 1")
    for name, least_zero in (("random_state", random_state), ("tolerance", tolerance)):
        if not least_zero >= 0:
            raise ConfigError(f"{name}={least_zero} is too small; use 0 or more")
    if n_clusters > n_points:
        raise ConfigError(
            f"n_clusters={n_clusters} is larger than the number of documents {n_points}; use at most {n_points}"
        )


def _best_start(x: NDArray[np.float32], n_clusters: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centres of the best of several short runs on one sample of the points."""
    n_sample = max(_START_POINTS_AT_LEAST, _START_POINTS_PER_CLUSTER * n_clusters)
    sample = x[np.sort(rng.choice(len(x), n_sample, replace=False))] if n_sample < len(x) else x
    runs = [
        _lloyd(sample, _plus_plus(sample, n_clusters, rng), _START_ITERATIONS, tolerance=1e-3)
        for _ in range(_START_CANDIDATES if n_clusters > 1 else 1)
    ]
    return min(runs, key=lambda run: run.inertia_).cluster_centers_


def _plus_plus(x: NDArray[np.float32], n_clusters: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Greedy k-means++: of a few points drawn by squared distance, keep the one that lowers the inertia most."""
    n_trials = 2 + int(np.log(n_clusters))
    chosen = [int(rng.integers(len(x)))]
    nearest = squared_distances(x, x[chosen])[:, 0].astype(np.float64)
    while len(chosen) < n_clusters:
        cumulative = np.cumsum(nearest)
        # With fewer different points than clusters all distances are 0: any point will do.
        draws = rng.random(n_trials) * cumulative[-1]
        trials = np.minimum(np.searchsorted(cumulative, draws, side="right"), len(x) - 1)
        remaining = np.minimum(nearest[:, None], squared_distances(x, x[trials]))  # (n, trials)
        best = int(remaining.sum(axis=0).argmin())
        chosen.append(int(trials[best]))
        nearest = remaining[:, best]
    return x[chosen]


def _lloyd(
    x: NDArray[np.float32],
    centers: NDArray[np.float32],
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    history: list[float] = []
    labels = prices = None
    while True:
        assignment = balanced_assignment(squared_distances(x, centers), initial_prices=prices)
        history.append(assignment.total_cost)
        if progress is not None:
            progress(len(history), history[-1])
        unchanged = labels is not None and np.array_equal(labels, assignment.labels)
        labels, prices = assignment.labels, assignment.prices
        if unchanged or len(history) == max_iterations or _has_settled(history, tolerance):
            return KMeansResult(centers, labels, history[-1], len(history), tuple(history))
        centers = _means(x, labels, len(centers))


def _has_settled(history: list[float], tolerance: float) -> bool:
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


def _means(x: NDArray[np.float32], labels: NDArray[np.int32], n_clusters: int) -> NDArray[np.float32]:
    """Mean of each cluster, summed in float64; a balanced cluster is never empty."""
    centers = np.empty((n_clusters, x.shape[1]), dtype=np.float32)
    for cluster in range(n_clusters):
        centers[cluster] = x[labels == cluster].mean(axis=0, dtype=np.float64)
    return centers
