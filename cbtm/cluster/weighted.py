"""Balanced assignment by weight: n points to k clusters of nearly equal load, such as tokens, at little cost.

Clusters of equally many documents can differ by a factor of three in tokens. Here every cluster's load, the sum of its
points' weights, is less than the heaviest weight away from W/k. To minimise cost under exact loads is NP-hard (it
solves PARTITION), so we solve the linear programme in which a point may be split between clusters, and round it:

1. *Prices.* In units of cost per weight, d_ij = cost_ij / weight_i, the programme is a transport problem whose dual,
   sum_i weight_i min_j (d_ij + price_j) - W/k sum_j price_j, has k prices. `cbtm.cluster.dual` finds them nearly.
2. *Repair.* The labels of least d_ij + price_j are optimal for the loads that they have. Surplus weight moves along
   successive shortest paths (Ahuja, Magnanti and Orlin 1993, section 9.7) in the residual graph of the clusters;
   where a path needs less than a point, the point is split.
3. *Rounding.* Split points and clusters form a graph. Weight rotates along a cycle of it, or along a path between
   two clusters of one split point each, until a share is used up (Beck and Fiala 1981, doi
   10.1016/0166-218X(81)90022-6). So the load of a cluster is exact while it holds two split points, and then moves by
   less than the weight of one. Of both directions we take the one that does not raise the cost: the total is at most
   that of the linear programme, which no assignment of equal loads undercuts.

Weights are counted in whole units and d in whole steps of a grid, so that sums are exact and the repair ends. Ties
are broken by index: the same input gives the same labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.assignment import _checked_cost, _checked_prices
from cbtm.cluster.devices import NUMPY, one_blas_thread
from cbtm.cluster.dual import Scale, smoothed_prices
from cbtm.cluster.paths import cheapest_path
from cbtm.errors import ConfigError, DataError

_WEIGHT_BITS = 61  # k W counts at most 2^61 units, so that int64 sums do not overflow
# The largest d counts at most 2^49 steps. Every cluster that gives weight has an edge to every other, so prices and
# path lengths stay below 8 times that, which float64 holds exactly.
_GRID_BITS = 49
_IS_SPLIT = -1  # label of a point that has shares in several clusters

_Steps = list[tuple[int, int, int]]  # (point, from cluster, to cluster)


@dataclass(frozen=True)
class WeightedAssignment:
    """An assignment of nearly equal loads, with the prices and the bound that say how cheap it is.

    Attributes:
        labels: Cluster of each point, int32, shape (n,).
        prices: Dual prices of mean 0, in cost per unit of the weights as given, float64, shape (k,): each point has
            the cluster of least cost + weight * price, so no assignment with the same `loads` is cheaper.
        loads: Sum of the weights of each cluster, float64, shape (k,), less than the heaviest weight from W/k.
        total_cost: Sum of the chosen costs: `lower_bound` - prices @ (loads - W/k), and at most `lower_bound`, both
            up to rounding errors.
        lower_bound: Value of the linear programme: no assignment of exactly equal loads is cheaper.
    """

    labels: NDArray[np.int32]
    prices: NDArray[np.float64]
    loads: NDArray[np.float64]
    total_cost: float
    lower_bound: float


def weighted_assignment(
    cost: NDArray[np.floating[Any]],
    weights: NDArray[np.floating[Any]] | NDArray[np.integer[Any]],
    *,
    initial_prices: NDArray[np.floating[Any]] | None = None,
) -> WeightedAssignment:
    """Assign points to clusters of equal load, within one point, at no more than the cost of exactly equal loads.

    The bound on loads is the heaviest weight. A point heavier than W/k fills more than a cluster alone, and other
    clusters may then stay empty. Equal weights give clusters of floor(n/k) or ceil(n/k) points. Points of weight 0
    take their cheapest cluster, so if all weights are 0, all points do.

    Args:
        cost: Cost of giving point i to cluster j, float32 or float64, shape (n, k), 1 <= k <= n.
        weights: Weight of each point, such as its tokens, finite and at least 0, shape (n,). A weight below 2^-60
            k W may count as 0.
        initial_prices: Prices of a similar problem, shape (k,), to start from; they change the time taken, and
            which of several equally cheap assignments is found.

    Returns:
        The assignment. The same input gives the same labels.

    Raises:
        DataError: If `cost` is not a matrix, is empty, or holds a NaN, an infinity or too wide a row, or if a weight
            is negative, NaN or infinite.
        ConfigError: If there are more clusters than points, or `weights` or `initial_prices` does not fit.
    """
    cost = _checked_cost(cost)
    weights = _checked_weights(weights, len(cost))
    n_clusters = cost.shape[1]
    units = _whole_units(weights, n_clusters)
    labels, prices = np.empty(len(cost), dtype=np.int32), np.zeros(n_clusters)
    if initial_prices is not None:
        initial_prices = _checked_prices(initial_prices, n_clusters)
    has_weight = units > 0
    weightless = np.flatnonzero(~has_weight)
    labels[weightless] = cost[weightless].argmin(axis=1)
    if has_weight.any():
        labels[has_weight], prices = _solve(
            cost if has_weight.all() else cost[has_weight], weights[has_weight], units[has_weight], initial_prices
        )
    return WeightedAssignment(
        labels,
        prices,
        np.bincount(labels, weights, minlength=n_clusters).astype(np.float64, copy=False),
        float(cost[np.arange(len(cost)), labels].sum(dtype=np.float64)),
        _dual_value(cost, weights, prices),
    )


def _checked_weights(weights: NDArray[Any], n_points: int) -> NDArray[np.float64]:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (n_points,):
        raise ConfigError(f"weights has shape {weights.shape}; pass one weight for each of {n_points} points")
    valid = np.isfinite(weights) & (weights >= 0)
    if not valid.all():
        point = int(np.argmin(valid))
        raise DataError(
            f"weights[{point}] is {weights[point]}; every weight must be finite and at least 0 "
            f"({int((~valid).sum())} are not)"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(weights.sum()):
            raise DataError("the weights add up to more than a float64 can hold; scale them down")
    return weights


def _whole_units(weights: NDArray[np.float64], n_clusters: int) -> NDArray[np.int64]:
    """Weights in units (n,), multiples of k so that W/k is whole; exact for whole numbers where k W < 2^59."""
    exponent = _WEIGHT_BITS - math.frexp(float(weights.sum()))[1] - math.frexp(n_clusters)[1]
    return n_clusters * np.rint(np.ldexp(weights, exponent)).astype(np.int64)


def _solve(
    cost: NDArray[np.floating[Any]],
    weights: NDArray[np.float64],
    units: NDArray[np.int64],
    initial_prices: NDArray[np.float64] | None,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Labels (n,) and prices (k,) for points that all have weight."""
    mean_weight = float(weights.mean())
    with np.errstate(over="ignore", under="ignore"), one_blas_thread():
        problem = _Problem.of(cost, weights / mean_weight, units)
        if initial_prices is not None:
            initial_prices = np.clip(initial_prices * mean_weight, -problem.largest, problem.largest)
        repair = _Repair(problem, _smoothed_prices(problem, initial_prices))
        repair.run()
        repair.round_splits()
        return repair.labels, repair.prices() / mean_weight


def _dual_value(cost: NDArray[np.floating[Any]], weights: NDArray[np.float64], prices: NDArray[np.float64]) -> float:
    cheapest = np.empty(len(cost))
    for part in NUMPY.blocks(*cost.shape):
        cheapest[part] = (cost[part] + weights[part, None] * prices).min(axis=1)
    return float(cheapest.sum() - weights.sum() * prices.mean())


@dataclass(frozen=True)
class _Problem:
    """The transport problem: d = (cost - least cost of the point) / weight, weights of mean 1.

    Prices of a solution differ by at most (k - 1) D, where the points whose d reaches no further than D weigh more
    than W - W/k: were there a wider gap between two neighbouring prices, all these points would be below it, and too
    little weight left for a cluster above. So d may be capped at `largest` = k D without a change of the solution,
    which keeps the grid fine in spite of points of hardly any weight.
    """

    cost: NDArray[np.floating[Any]]
    least: NDArray[np.float64]
    weights: NDArray[np.float64]
    units: NDArray[np.int64]
    largest: float

    @classmethod
    def of(cls, cost: NDArray[np.floating[Any]], weights: NDArray[np.float64], units: NDArray[np.int64]) -> _Problem:
        n_clusters = cost.shape[1]
        least = cost.min(axis=1).astype(np.float64)
        ranges = (cost.max(axis=1) - least) / weights
        order = np.argsort(ranges, kind="stable")
        below = np.cumsum(units[order])
        all_but_one_cluster = below[-1] // n_clusters * (n_clusters - 1)
        widest_needed = float(ranges[order[np.searchsorted(below, all_but_one_cluster, side="right")]])
        if not math.isfinite(n_clusters * widest_needed):
            raise DataError("the costs of one point differ by more than a float64 can hold; scale them down")
        if widest_needed == 0:  # all prices are equal: any cap above 0 serves
            widest_needed = float(ranges[ranges > 0].min(initial=1.0))
        return cls(cost, least, weights, units, n_clusters * widest_needed)

    def relative(self, points: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        """Capped d of some points, shape (len(points), k)."""
        block = self.cost[points].astype(np.float64)
        block -= self.least[points, None]
        block /= self.weights[points, None]
        return np.minimum(block, self.largest, out=block)


def _smoothed_prices(problem: _Problem, initial_prices: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Prices (k,) that nearly balance the loads."""
    n_points, n_clusters = problem.cost.shape
    unit = problem.largest / n_clusters  # keeps d in the range of float32
    d = np.empty((n_points, n_clusters), dtype=np.float32)
    for part in NUMPY.blocks(n_points, n_clusters):
        d[part] = problem.relative(part) / unit
    scale = Scale.of(d)
    if scale.typical_range == 0:
        return np.zeros(n_clusters)
    if initial_prices is not None:
        initial_prices = initial_prices / unit
    prices = smoothed_prices(d, scale, initial_prices=initial_prices, device=NUMPY, weights=problem.weights)
    prices *= unit
    return prices


class _Repair:
    """Labels of least d + price on a grid, the moves that give each cluster its load, and the rounding of splits.

    d, prices and path lengths are whole numbers below 2^53 in float64, loads are int64, so that all sums are exact.
    At any time the labels are the cheapest for the loads that they have, and `_prices` are the proof: no edge a -> b
    has a negative weight + price of b - price of a.

    Attributes:
        labels: Current cluster of each point, int32, shape (n,), `_IS_SPLIT` where it has shares in several.
    """

    def __init__(self, problem: _Problem, prices: NDArray[np.float64]) -> None:
        self._problem = problem
        n_points, n_clusters = problem.cost.shape
        self._unit = max(math.ldexp(1.0, math.frexp(problem.largest)[1] - _GRID_BITS), math.ulp(0.0))
        largest = np.rint(problem.largest / self._unit)
        self._prices = np.clip(np.rint(prices / self._unit), -largest, largest)
        self.labels = np.empty(n_points, dtype=np.int32)
        for part in NUMPY.blocks(*problem.cost.shape):
            self.labels[part] = (self._whole(part) + self._prices).argmin(axis=1)
        self._splits: dict[int, dict[int, int]] = {}  # units of a split point by cluster
        # Surplus of each cluster in units. bincount sums in float64, which does not hold all of them.
        self._surplus = np.full(n_clusters, -(int(problem.units.sum()) // n_clusters), dtype=np.int64)
        np.add.at(self._surplus, self.labels, problem.units)
        # Edge a -> b: least growth of the cost for a unit that goes from a to b.
        self._edges = np.full((n_clusters, n_clusters), np.inf)
        self._weigh_edges(range(n_clusters))

    def run(self) -> None:
        """Move weight until every cluster has its load; each move takes the cheapest path."""
        while self._surplus.any():
            self._move_along(cheapest_path(self._edges, self._prices, self._surplus))

    def prices(self) -> NDArray[np.float64]:
        """Prices of the clusters (k,) in cost per mean weight, of mean 0."""
        prices = self._prices * self._unit
        centred: NDArray[np.float64] = prices - prices.mean()
        return centred

    def round_splits(self) -> None:
        """Give each split point to one cluster; the loads change as the module says."""
        while self._splits:
            steps = _rotation(self._splits)
            growth = 0.0
            for point, source, target in steps:
                d = self._problem.relative(slice(point, point + 1))[0]
                growth += float(d[target] - d[source])
            if growth > 0:
                steps = [(point, target, source) for point, source, target in steps]
            units = min(self._splits[point][source] for point, source, _ in steps)
            for point, source, target in steps:
                self._shift(point, source, target, units)

    def _whole(self, points: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        block = self._problem.relative(points)
        block /= self._unit
        return np.rint(block, out=block)

    def _members(self, cluster: int) -> NDArray[np.intp]:
        """Points with a share in `cluster`, the split ones first, so that they are used up first."""
        split = [point for point, shares in self._splits.items() if cluster in shares]
        return np.concatenate([np.array(split, dtype=np.intp), np.flatnonzero(self.labels == cluster)])

    def _weigh_edges(self, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            members = self._members(cluster)
            self._edges[cluster] = np.inf
            if len(members):
                growth = self._whole(members)
                growth -= growth[:, cluster, None].copy()
                self._edges[cluster] = growth.min(axis=0)
                self._edges[cluster, cluster] = np.inf

    def _move_along(self, path: list[int]) -> None:
        """Move weight along `path`: as much as points tie for the least growth on each edge."""
        limit = int(min(self._surplus[path[0]], -self._surplus[path[-1]]))
        moves = []
        for source, target in pairwise(path):
            members = self._members(source)
            whole = self._whole(members)
            tied = members[whole[:, target] - whole[:, source] == self._edges[source, target]]
            until = np.cumsum(
                [self._splits[point][source] if point in self._splits else self._problem.units[point] for point in tied]
            )
            limit = min(limit, int(until[-1]))
            moves.append((tied, until, source, target))
        assert limit > 0, "an edge without a point of its weight: the grid is not exact"
        for tied, until, source, target in moves:
            moved = 0
            for point, end in zip(tied.tolist(), until.tolist(), strict=True):
                self._shift(point, source, target, min(end, limit) - moved)
                moved = min(end, limit)
                if moved == limit:
                    break
        self._surplus[path[0]] -= limit
        self._surplus[path[-1]] += limit
        self._weigh_edges(path)

    def _shift(self, point: int, source: int, target: int, units: int) -> None:
        """Move units of one point, which is split as long as it has shares in several clusters."""
        shares = self._splits.setdefault(point, {source: int(self._problem.units[point])})
        shares[source] -= units
        shares[target] = shares.get(target, 0) + units
        if shares[source] == 0:
            del shares[source]
        if len(shares) == 1:
            del self._splits[point]
        self.labels[point] = target if len(shares) == 1 else _IS_SPLIT


def _rotation(splits: dict[int, dict[int, int]]) -> _Steps:
    """Steps along a cycle of split points and clusters, or a path between two clusters of one split point each.

    The walk starts at a cluster of one split point where there is one and never turns back. A split point has
    another cluster to go on to, so the walk ends at a cluster of no other split point, or meets itself.
    """
    points_of: dict[int, list[int]] = {}
    for point, shares in splits.items():
        for cluster in shares:
            points_of.setdefault(cluster, []).append(point)
    cluster = min(points_of, key=lambda cluster: (len(points_of[cluster]) > 1, cluster))
    steps: _Steps = []
    while True:
        onward = [point for point in points_of[cluster] if not steps or point != steps[-1][0]]
        if not onward:
            return steps
        for index, (point, _, target) in enumerate(steps):
            if point == onward[0]:  # the walk meets a point: it left that for `target`
                return [*steps[index + 1 :], (point, cluster, target)]
        target = next(target for target in splits[onward[0]] if target != cluster)
        steps.append((onward[0], cluster, target))
        for index, (_, source, _) in enumerate(steps):
            if source == target:  # the walk meets a cluster
                return steps[index:]
        cluster = target
