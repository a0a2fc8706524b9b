"""Balanced k-means: Lloyd's algorithm whose assignment step gives every cluster the same number of points.

Both steps are solved exactly (see `cbtm.cluster.assignment` for the first), so the inertia never rises, and the
dual prices of one iteration start the next. What is left to chance is the local optimum. Greedy k-means++ (Arthur and
Vassilvitskii 2007; the greedy form is scikit-learn's) from a single draw still ends in a poor one now and then, so
several starts compete on a sample, where they are cheap, and only the best runs on all points.

Points may come in batches, for samples larger than memory. Every iteration reads every batch, and the centres are the
means over all of them. Each batch is balanced by itself: that needs the costs of one batch at a time, and both steps
still lower one inertia. Batches of shuffled documents make this close to the balance of the whole; sizes differ by at
most one for each batch.

Balanced centres are used with a greedy assignment afterwards, as in c-BTM: `nearest_centers` ignores sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.assignment import BalancedAssignment, balanced_assignment
from cbtm.cluster.batches import Batches
from cbtm.cluster.devices import Array, Device, find_device
from cbtm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from cbtm.cluster.weighted import WeightedAssignment

# Rows per block of distances at least: with 100 columns, the float32 block stays in a second-level cache.
_BLOCK_ROWS = 4096
# Starts that compete, the points that they compete on, and their iterations.
_START_CANDIDATES = 4
_START_POINTS_PER_CLUSTER = 128
_START_POINTS_AT_LEAST = 4096
_START_ITERATIONS = 10


@dataclass(frozen=True)
class KMeansResult:
    """Centres and the labels that belong to them.

    Attributes:
        cluster_centers_: Centres, float32, shape (k, d).
        labels_: Assignment to `cluster_centers_`, balanced within each batch, int32, shape (n,), in order of batches.
        inertia_: Sum of squared Euclidean distances of the points to their centres.
        n_iter_: Assignments made by the best run.
        history_: Inertia after each assignment of the best run.
    """

    cluster_centers_: NDArray[np.float32]
    labels_: NDArray[np.int32]
    inertia_: float
    n_iter_: int
    history_: tuple[float, ...]


def balanced_kmeans(
    x: NDArray[np.float32] | Sequence[NDArray[np.float32]],
    n_clusters: int,
    *,
    random_state: int,
    n_init: int = 1,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    weights: NDArray[np.floating[Any]] | None = None,
    device: str | torch.device | Device | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    """Divide points into clusters of equal size (to within one) of least squared distance to their means.

    Args:
        x: Points, float32, shape (n, d); or batches of points, a sequence of such matrices, each of which is read
            once in every iteration and balanced by itself. A last batch of fewer than k points joins the one before
            it. Duplicates and zero rows are allowed.
        n_clusters: k, from 1 to the number of points, and to that of each batch.
        random_state: Seed; the same input and seed give the same result on one platform and device.
        n_init: Runs on all points, from different starts; the one of least inertia is returned.
        max_iterations: Assignments per run at most.
        tolerance: A run ends when the inertia falls by less than this part of itself, or no label changes.
        weights: What clusters shall hold equally much of, such as tokens, for each point, shape (n,) in order of
            batches, instead of equally many points (`cbtm.cluster.weighted`). Centres and inertia count each point
            once either way. Rounding to whole points may raise the inertia, which then ends the run.
        device: Where distances, prices and means are computed, see `cbtm.cluster.devices.find_device`. Another
            device gives the same result up to rounding. Start centres are always drawn in numpy.
        progress: Called with the iteration (from 1) and the inertia after each assignment.

    Returns:
        The best run.

    Raises:
        ConfigError: If a setting is out of its range, `n_clusters` above n or above a batch included, or the device
            is not there.
        DataError: If `x` or a batch is not a matrix, has no columns, or holds a NaN or an infinity, or `weights` does
            not fit.
    """
    check_settings(
        n_clusters, random_state=random_state, n_init=n_init, max_iterations=max_iterations, tolerance=tolerance
    )
    batches = Batches(x, n_clusters, weights=weights, device=find_device(device))
    rng = np.random.default_rng(random_state)
    with batches.device.exact_products():
        runs = (
            _lloyd(batches, _best_start(batches, n_clusters, rng), max_iterations, tolerance, progress)
            for _ in range(n_init)
        )
        return min(runs, key=lambda run: run.inertia_)


def check_settings(n_clusters: int, *, random_state: int, n_init: int, max_iterations: int, tolerance: float) -> None:
    """Refuse settings that are out of range whatever the points are.

    Raises:
        ConfigError: If one is.
    """
    for name, value in (("n_clusters", n_clusters), ("n_init", n_init), ("max_iterations", max_iterations)):
        if value < 1:
            raise ConfigError(f"{name}={value} is too small; use at least 1")
    for name, least_zero in (("random_state", random_state), ("tolerance", tolerance)):
        if not least_zero >= 0:
            raise ConfigError(f"{name}={least_zero} is too small; use 0 or more")


def squared_distances(
    x: NDArray[np.float32],
    centers: NDArray[np.float32],
    *,
    device: str | torch.device | Device | None = None,
) -> NDArray[np.float32]:
    """Squared Euclidean distance of every point to every centre, by matrix product.

    Both are moved by the mean of the centres first: far from the origin, |x|^2 - 2 x.c + |c|^2 would lose the
    distance to rounding.

    Args:
        x: Points, shape (n, d).
        centers: Centres, shape (k, d).
        device: Where it is computed.

    Returns:
        float32, shape (n, k), not negative.

    Raises:
        DataError: If the numbers of columns differ.
        ConfigError: If the device is not there.
    """
    x, centers = _fitting(x, centers)
    device = find_device(device)
    with device.full_precision():
        return device.get(_distances(device.put(x), centers, device))


def nearest_centers(
    x: NDArray[np.float32],
    centers: NDArray[np.float32],
    *,
    device: str | torch.device | Device | None = None,
) -> NDArray[np.int32]:
    """Nearest centre of every point whatever the sizes, ties to the lowest index; int32, shape (n,).

    Raises:
        DataError: If the numbers of columns differ.
        ConfigError: If the device is not there.
    """
    x, centers = _fitting(x, centers)
    device = find_device(device)
    labels = np.empty(len(x), dtype=np.int32)
    step = _block_rows(centers, device)
    with device.full_precision():
        for start in range(0, len(x), step):
            distances = _distances(device.put(x[start : start + step]), centers, device)
            labels[start : start + step] = device.get(distances.argmin(axis=1))
    return labels


def _fitting(x: NDArray[np.float32], centers: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    x, centers = np.asarray(x, dtype=np.float32), np.asarray(centers, dtype=np.float32)
    if x.ndim != 2 or centers.ndim != 2 or x.shape[1] != centers.shape[1] or len(centers) == 0:
        raise DataError(f"points {x.shape} and centres {centers.shape} do not fit; pass (n, d) and (k, d), k >= 1")
    return x, centers


def _block_rows(centers: NDArray[np.float32], device: Device) -> int:
    """Points per block, of whose coordinates and distances the device takes a bounded number at a time."""
    n_clusters, n_columns = centers.shape
    step: int = max(_BLOCK_ROWS, device.block_numbers // max(n_clusters, n_columns))
    return step


def _distances(points: Array, centers: NDArray[np.float32], device: Device) -> Array:
    """Squared distances (n, k) on `device`, of points (n, d) that are there to centres that are not."""
    host_origin = centers.mean(axis=0)
    centered = centers - host_origin
    center_norms = device.put(np.einsum("kd,kd->k", centered, centered))
    factors, origin = device.put(-2 * centered.T), device.put(host_origin)
    distances = device.empty((len(points), len(centers)))
    step = _block_rows(centers, device)
    for start in range(0, len(points), step):
        block = points[start : start + step] - origin  # (block, d)
        part = distances[start : start + step]
        device.xp.matmul(block, factors, out=part)
        part += center_norms
        part += device.xp.einsum("nd,nd->n", block, block)[:, None]
    return device.xp.clip(distances, 0, None, out=distances)


def _best_start(batches: Batches, n_clusters: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centres of the best of several short runs on one sample of the points."""
    sample = batches.sample(max(_START_POINTS_AT_LEAST, _START_POINTS_PER_CLUSTER * n_clusters), n_clusters, rng)
    x = sample.host_points()
    runs = [
        _lloyd(sample, _plus_plus(x, n_clusters, rng), _START_ITERATIONS, tolerance=1e-3)
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
    batches: Batches,
    centers: NDArray[np.float32],
    max_iterations: int,
    tolerance: float,
    progress: Callable[[int, float], None] | None = None,
) -> KMeansResult:
    history: list[float] = []
    labels = np.full(len(batches), -1, dtype=np.int32)
    prices: list[NDArray[np.float64] | None] = [None] * len(batches.sizes)
    while True:
        inertia, unchanged, start = 0.0, True, 0
        sums, counts = np.zeros((len(centers), batches.n_columns)), np.zeros(len(centers), dtype=np.intp)
        for number, (points, weights) in enumerate(batches):
            # In the first iteration, the batch before is the most similar problem.
            near_prices = prices[number] if prices[number] is not None else prices[number - 1]
            found = _assign(_distances(points, centers, batches.device), weights, near_prices, batches.device)
            inertia += found.total_cost
            own = labels[start : start + len(points)]
            unchanged = unchanged and np.array_equal(own, found.labels)
            own[:], prices[number] = found.labels, found.prices
            sums += _sums(points, found.labels, len(centers), batches.device)
            counts += np.bincount(found.labels, minlength=len(centers))
            start += len(points)
        history.append(inertia)
        if progress is not None:
            progress(len(history), inertia)
        if unchanged or len(history) == max_iterations or has_settled(history, tolerance):
            return KMeansResult(centers, labels, inertia, len(history), tuple(history))
        # Only a balance by weight can leave a cluster empty, next to a point that outweighs many: it stays in place.
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centers)
        centers = means.astype(np.float32)


def has_settled(history: Sequence[float], tolerance: float) -> bool:
    """Whether the last inertia is less than the part `tolerance` below the one before it."""
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


def _assign(
    cost: Array, weights: NDArray[np.float64] | None, prices: NDArray[np.float64] | None, device: Device
) -> BalancedAssignment | WeightedAssignment:
    if weights is None:
        return balanced_assignment(cost, initial_prices=prices, device=device)
    from cbtm.cluster.weighted import weighted_assignment

    return weighted_assignment(device.get(cost), weights, initial_prices=prices)


def _sums(points: Array, labels: NDArray[np.int32], n_clusters: int, device: Device) -> NDArray[np.float64]:
    """Sum of the points of each cluster, shape (k, d)."""
    order = device.put(np.argsort(labels, kind="stable"))
    ends = np.cumsum(np.bincount(labels, minlength=n_clusters)).tolist()
    sums = device.empty((n_clusters, points.shape[1]), np.float64)
    for cluster, (start, end) in enumerate(pairwise([0, *ends])):
        sums[cluster] = points[order[start:end]].sum(axis=0, dtype=device.xp.float64)
    return device.get(sums)
