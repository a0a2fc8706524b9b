"""Exact balanced assignment of n points to k clusters.

Every cluster receives floor(n/k) or ceil(n/k) points, and no such assignment costs less: the total is that of a
min-cost flow, including the choice of which n mod k clusters take the extra point. The problem has only k dual
unknowns, so we solve it from there instead of by an auction (the reference implementation) or a general flow solver:

1. *Prices.* The dual, sum_i min_j (cost_ij + price_j) - n/k sum_j price_j, is smoothed by a log-sum-exp of width
   epsilon and maximised by Newton's method on k prices while epsilon shrinks (the smoothed dual of Cuturi and Peyré
   2016, doi 10.1137/15M1032600).
2. *Repair.* argmin_j (cost_ij + price_j) is optimal for the sizes that it happens to have, whatever the prices. The
   few surplus points move along successive shortest paths (Ahuja, Magnanti and Orlin 1993, section 9.7) in the
   residual graph of the clusters, where the edge a -> b weighs the least cost_ib - cost_ia of a point i in a. One
   more node, the pool, hands out the n mod k extra places, so that the paths move these too.

The repair works on costs rounded to whole numbers, so that its sums are exact and a shortest path is one: the grid is
at most 2^-49 (k + 2) of the widest row. Ties are broken by index, so the same input gives the same labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from cbtm.errors import ConfigError, DataError

# Smoothing widths as parts of the typical row range (largest minus least cost of a point). Clustered or repeated
# points need the narrow ones; most problems end at 0.003 or 0.001.
_WIDTHS = (0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
_WIDTH_FROM_PRICES = 0.001  # the narrowest at which good start prices enter
# Widths end where no more than this part of the points is shared: moving these is quicker than a narrower width.
_UNSETTLED_TOLERANCE = 0.003
# Widths from here up are solved on every m-th point, so that about this many take part.
_WIDTH_ON_SAMPLE = 0.01
_SAMPLE_AT_LEAST = 8192
_SAMPLE_PER_CLUSTER = 64
# Newton steps per width at most; what is not balanced by then is left to the next width, at last to the repair.
_NEWTON_STEPS = 12
_LINE_SEARCH_STEPS = 4  # evaluations on the way back from a step that goes too far
# A width is solved when no cluster's expected size is off by more than this part of n/k, or than one point.
_IMBALANCE_ON_SAMPLE = 0.02
_IMBALANCE_ON_ALL = 0.002
# Part of n/k added to the diagonal of the second derivative, and the longest step in widths.
_DAMPING = 1e-3
_LONGEST_STEP = 10
_BLOCK_NUMBERS = 1 << 17  # of a block of points: as float32 they stay in a second-level cache
# Costs above this many typical ranges are all the same to the smoothed dual (not to the repair).
_LARGEST = 1e6
# Largest price on the repair's grid: a price and a path of costs together stay below 2^53.
_LARGEST_WHOLE = 2.0**50


@dataclass(frozen=True)
class BalancedAssignment:
    """A balanced assignment of least total cost, with the prices that prove it.

    Attributes:
        labels: Cluster of each point, int32, shape (n,); each cluster has floor(n/k) or ceil(n/k) points.
        prices: Dual prices of mean 0, float64, shape (k,): each point has the cluster of least cost + price, up to
            the rounding of the repair, and no cluster of floor(n/k) points is dearer than one of ceil(n/k).
        total_cost: Sum of the chosen costs.
    """

    labels: NDArray[np.int32]
    prices: NDArray[np.float64]
    total_cost: float


def balanced_assignment(
    cost: NDArray[np.floating[Any]], *, initial_prices: NDArray[np.floating[Any]] | None = None
) -> BalancedAssignment:
    """Assign points to clusters of equal size at the least total cost.

    Args:
        cost: Cost of giving point i to cluster j, float32 or float64, shape (n, k), 1 <= k <= n.
        initial_prices: Prices of a similar problem, shape (k,), to start from; they change the time taken, and
            which of several equally cheap assignments is found, but not the total.

    Returns:
        The assignment. The same input gives the same labels.

    Raises:
        DataError: If `cost` is not a matrix, is empty, or holds a NaN, an infinity or too wide a row.
        ConfigError: If there are more clusters than points, or `initial_prices` does not fit.
    """
    cost = _checked_cost(cost)
    n_points, n_clusters = cost.shape
    if initial_prices is not None:
        initial_prices = _checked_prices(initial_prices, n_clusters)
    scale = _Scale.of(cost)
    prices = np.zeros(n_clusters)
    if scale.typical_range > 0:
        with np.errstate(over="ignore", under="ignore"), one_blas_thread():
            prices = _smoothed_prices(cost, initial_prices, scale)
    repair = _Repair(cost, prices, scale)
    repair.run()
    total_cost = float(cost[np.arange(n_points), repair.labels].sum(dtype=np.float64))
    return BalancedAssignment(repair.labels, repair.prices(), total_cost)


def one_blas_thread() -> AbstractContextManager[object]:
    """Hold matrix products to one thread.

    The products here are small: threads that wait for each other on a busy machine made them ten times slower. It
    also keeps results independent of the number of cores.
    """
    return cast("AbstractContextManager[object]", _blas_libraries().limit(limits=1, user_api="blas"))


@functools.cache
def _blas_libraries() -> ThreadpoolController:
    return ThreadpoolController()  # a search through the loaded libraries: 3 ms, once


def _checked_cost(cost: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    cost = np.asarray(cost)
    if cost.dtype not in (np.float32, np.float64):
        cost = cost.astype(np.float64)
    if cost.ndim != 2 or cost.size == 0:
        raise DataError(f"cost has shape {cost.shape}; pass a matrix of (points, clusters) with at least one of each")
    n_points, n_clusters = cost.shape
    if n_clusters > n_points:
        raise ConfigError(f"cost has {n_clusters} clusters but only {n_points} points; use at most {n_points} clusters")
    finite = np.isfinite(cost)
    if not finite.all():
        point, cluster = np.argwhere(~finite)[0]
        raise DataError(
            f"cost[{point}, {cluster}] is {cost[point, cluster]}; every cost must be finite "
            f"({int((~finite).sum())} are not)"
        )
    return cost


def _checked_prices(initial_prices: NDArray[np.floating[Any]], n_clusters: int) -> NDArray[np.float64]:
    prices = np.asarray(initial_prices, dtype=np.float64)
    if prices.shape != (n_clusters,) or not np.isfinite(prices).all():
        raise ConfigError(
            f"initial_prices is {initial_prices!r}; pass one finite price for each of {n_clusters} clusters"
        )
    return prices


@dataclass(frozen=True)
class _Scale:
    """Units of a cost matrix: the least cost of each point (n,), and the typical and widest range of a row."""

    least: NDArray[np.float64]
    typical_range: float
    widest_range: float

    @classmethod
    def of(cls, cost: NDArray[np.floating[Any]]) -> _Scale:
        least = cost.min(axis=1).astype(np.float64)
        with np.errstate(over="ignore"):
            ranges = cost.max(axis=1) - least
        widest = float(ranges.max())
        if not np.isfinite(widest):
            raise DataError("the costs of one point differ by more than a float64 can hold; scale them down")
        # The median, because one far outlier would make every width too wide for the other points.
        wide = ranges[ranges > 0]
        return cls(least, float(np.median(wide)) if len(wide) else 0.0, widest)


def _smoothed_prices(
    cost: NDArray[np.floating[Any]], initial_prices: NDArray[np.float64] | None, scale: _Scale
) -> NDArray[np.float64]:
    """Prices (k,) that nearly balance the expected sizes: a continuation over shrinking widths."""
    n_points, n_clusters = cost.shape
    rows = np.empty((n_clusters, n_points), dtype=np.float32)
    for part in _row_blocks(cost):
        relative = (cost[part] - scale.least[part, None]) / scale.typical_range
        rows[:, part] = np.clip(relative, 0, _LARGEST).T
    sample_size = max(_SAMPLE_AT_LEAST, _SAMPLE_PER_CLUSTER * n_clusters)
    sample = np.ascontiguousarray(rows[:, :: max(1, n_points // sample_size)])
    prices, start = np.zeros(n_clusters), 0
    if initial_prices is not None:
        initial_prices = np.clip(initial_prices / scale.typical_range, -_LARGEST, _LARGEST)
        if (within_reach := _narrowest_within_reach(sample, initial_prices)) is not None:
            prices, start = initial_prices, within_reach
    for width in _WIDTHS[start:]:
        on_sample = width >= _WIDTH_ON_SAMPLE
        dual = _balance(sample if on_sample else rows, prices, width)
        prices = dual.prices
        if dual.unsettled <= _UNSETTLED_TOLERANCE and not on_sample:
            break
    return prices * scale.typical_range


def _row_blocks(cost: NDArray[np.floating[Any]]) -> Iterator[slice]:
    """Slices of the rows of `cost` that hold a bounded number of costs."""
    n_points, n_clusters = cost.shape
    step = max(1, _BLOCK_NUMBERS // n_clusters)
    return (slice(start, start + step) for start in range(0, n_points, step))


def _narrowest_within_reach(rows: NDArray[np.float32], prices: NDArray[np.float64]) -> int | None:
    """Index of the narrowest width at which one Newton step from `prices` is short, None if there is none."""
    for index in reversed(range(_WIDTHS.index(_WIDTH_FROM_PRICES) + 1)):
        if np.abs(_SmoothedDual(rows, prices, _WIDTHS[index]).newton_step()).max() <= _LONGEST_STEP:
            return index
    return None


def _balance(rows: NDArray[np.float32], prices: NDArray[np.float64], width: float) -> _SmoothedDual:
    """Maximise the smoothed dual of one width over `rows` (k, n), from `prices` (k,)."""
    part = _IMBALANCE_ON_SAMPLE if width >= _WIDTH_ON_SAMPLE else _IMBALANCE_ON_ALL
    tolerance = max(1.0, part * rows.shape[1] / rows.shape[0])
    dual = _SmoothedDual(rows, prices, width)
    for _ in range(_NEWTON_STEPS):
        if np.abs(dual.surplus).max() <= tolerance:
            break
        step = dual.newton_step()
        step *= min(1.0, _LONGEST_STEP / np.abs(step).max())
        rise = dual.surplus @ step
        for _ in range(_LINE_SEARCH_STEPS):
            trial = _SmoothedDual(rows, dual.prices + width * step, width)
            if (trial_rise := trial.surplus @ step) >= -rise / 2:
                break
            # Too far beyond the top in this direction: back to where the slope is 0 by the secant.
            shorter = rise / (rise - trial_rise)
            step, rise = shorter * step, shorter * rise
        dual = trial
    return dual


class _SmoothedDual:
    """The smoothed dual at one point: expected sizes and their derivatives, from float32 costs (k, n)."""

    def __init__(self, rows: NDArray[np.float32], prices: NDArray[np.float64], width: float) -> None:
        self.prices = prices
        n_clusters, n_points = rows.shape
        self._capacity = n_points / n_clusters
        self._mass = np.zeros(n_clusters)
        self._overlap = np.zeros((n_clusters, n_clusters))
        shift = prices.astype(np.float32)[:, None]
        for part in _row_blocks(rows.T):
            shares = rows[:, part] + shift  # (k, block)
            shares -= shares.min(axis=0)
            shares *= np.float32(-1 / width)
            np.exp(shares, out=shares)
            shares /= shares.sum(axis=0)
            self._mass += shares.sum(axis=1)
            self._overlap += shares @ shares.T
        self.surplus = self._mass - self._capacity
        self.unsettled = 1 - float(np.trace(self._overlap)) / n_points

    def newton_step(self) -> NDArray[np.float64]:
        """Change of the prices in widths (k,)."""
        # The damping keeps clusters that nobody wants yet in bounds.
        curvature = np.diag(self._mass + _DAMPING * self._capacity) - self._overlap
        return np.linalg.solve(curvature, self.surplus)


class _Repair:
    """Labels of least cost + price on a whole-number grid, and the moves that give each cluster its size.

    Costs, prices and path lengths are whole numbers below 2^53 in float64, so that all sums are exact. At any time
    the labels are the cheapest for the sizes that they have, and `_prices` are the proof: no edge a -> b has a
    negative weight + price of b - price of a.

    Attributes:
        labels: Current cluster of each point, int32, shape (n,).
    """

    def __init__(self, cost: NDArray[np.floating[Any]], prices: NDArray[np.float64], scale: _Scale) -> None:
        self._cost, self._least = cost, scale.least
        n_points, n_clusters = cost.shape
        self._pool = n_clusters  # number of the pool node
        self._floor, n_extra = divmod(n_points, n_clusters)
        self._unit = _grid_unit(scale.widest_range, n_clusters)
        with np.errstate(over="ignore"):
            whole_prices = np.rint(np.clip(prices / self._unit, -_LARGEST_WHOLE, _LARGEST_WHOLE))
        self.labels = self._cheapest_labels(whole_prices)
        self._sizes = np.bincount(self.labels, minlength=n_clusters)
        # The dearest clusters are the most wanted: they take the extra places, and the pool has the price between.
        dearest_first = np.argsort(-whole_prices, kind="stable")
        self._has_extra = np.zeros(n_clusters, dtype=np.bool_)
        self._has_extra[dearest_first[:n_extra]] = True
        self._prices = np.append(whole_prices, whole_prices[dearest_first[n_extra]])
        # Edge a -> b: least growth of the cost if one point of a goes to b. A cluster without an extra place may
        # take one from the pool (an edge to it), a cluster with one may give it back (an edge from it).
        self._edges = np.full((n_clusters + 1, n_clusters + 1), np.inf)
        self._weigh_edges(range(n_clusters))

    def run(self) -> None:
        """Move points until every cluster has its size; each move takes the cheapest path."""
        while (surplus := self._sizes - self._floor - self._has_extra).any():
            path = self._cheapest_path(surplus)
            self._move_along(path, limit=int(min(surplus[path[0]], -surplus[path[-1]])))

    def prices(self) -> NDArray[np.float64]:
        """Prices of the clusters (k,) in units of the cost, of mean 0."""
        prices = self._prices[: self._pool] * self._unit
        centred: NDArray[np.float64] = prices - prices.mean()
        return centred

    def _whole_costs(self, points: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        """Costs above the least of each point on the grid, shape (len(points), k)."""
        block = self._cost[points].astype(np.float64)
        block -= self._least[points, None]
        block /= self._unit
        return np.rint(block, out=block)

    def _cheapest_labels(self, whole_prices: NDArray[np.float64]) -> NDArray[np.int32]:
        labels = np.empty(len(self._cost), dtype=np.int32)
        for part in _row_blocks(self._cost):
            labels[part] = (self._whole_costs(part) + whole_prices).argmin(axis=1)
        return labels

    def _weigh_edges(self, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            members = np.flatnonzero(self.labels == cluster)
            weights = self._edges[cluster]
            weights[: self._pool] = np.inf
            if len(members):
                growth = self._whole_costs(members)
                growth -= growth[:, cluster, None].copy()
                weights[: self._pool] = growth.min(axis=0)
            weights[cluster] = np.inf
            weights[self._pool] = np.inf if self._has_extra[cluster] else 0
            self._edges[self._pool, cluster] = 0 if self._has_extra[cluster] else np.inf

    def _cheapest_path(self, surplus: NDArray[np.intp]) -> list[int]:
        """Nodes from a cluster with too many points to one with too few; the prices then make its edges tight.

        Lengths are measured at the current prices, so that moves which cost nothing more, as between clusters
        that a point ties for, come first.
        """
        start = np.append(np.where(surplus > 0, -self._prices[: self._pool], np.inf), np.inf)
        lengths, parents = _shortest_paths(self._edges, start)
        excess = lengths + self._prices
        wanting = np.flatnonzero(surplus < 0)
        target = int(wanting[excess[wanting].argmin()])
        self._prices -= np.minimum(excess, excess[target])
        path = [target]
        while (parent := int(parents[path[-1]])) >= 0:
            path.append(parent)
        return path[::-1]

    def _move_along(self, path: list[int], limit: int) -> None:
        """Move points along every edge of `path`: as many as tie for the least growth, and at most `limit`."""
        moves = []
        for source, target in pairwise(path):
            if self._pool in (source, target):
                limit = min(limit, 1)
                continue
            members = np.flatnonzero(self.labels == source)
            whole = self._whole_costs(members)
            tied = members[whole[:, target] - whole[:, source] == self._edges[source, target]]
            limit = min(limit, len(tied))
            moves.append((tied, target))
        assert limit > 0, "an edge without a point of its weight: the grid is not exact"
        for tied, target in moves:
            self.labels[tied[:limit]] = target
        if self._pool in path:  # always between two clusters: the first takes the extra place that the second gives
            middle = path.index(self._pool)
            self._has_extra[path[middle - 1]], self._has_extra[path[middle + 1]] = True, False
        self._sizes = np.bincount(self.labels, minlength=self._pool)
        self._weigh_edges(node for node in path if node != self._pool)


def _grid_unit(widest_range: float, n_clusters: int) -> float:
    """A power of two that divides the widest range into so many steps that a path of them stays exact."""
    if widest_range == 0:
        return 1.0
    bits = 50 - math.ceil(math.log2(n_clusters + 2))
    return max(math.ldexp(1.0, math.frexp(widest_range)[1] - bits), math.ulp(0.0))


def _shortest_paths(
    edges: NDArray[np.float64], start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Bellman-Ford from every node at once, each with its own start length (infinite: not a start).

    There are no negative cycles, so m rounds suffice for m nodes, and the parents form a forest.

    Returns:
        Length of the shortest path to each node (m,), and the node before it, -1 at a start.
    """
    lengths = start
    parents = np.full(len(start), -1, dtype=np.intp)
    nodes = np.arange(len(start))
    for _ in nodes:
        through = lengths[:, None] + edges  # (from, to)
        before = through.argmin(axis=0)
        reached = through[before, nodes]
        is_shorter = reached < lengths
        if not is_shorter.any():
            break
        lengths = np.where(is_shorter, reached, lengths)
        parents = np.where(is_shorter, before, parents)
    return lengths, parents
