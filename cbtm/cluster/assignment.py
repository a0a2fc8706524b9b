"""Exact balanced assignment of n points to k clusters.

Every cluster receives floor(n/k) or ceil(n/k) points, and no such assignment costs less: the total is that of a
min-cost flow, including the choice of which n mod k clusters take the extra point. The problem has only k dual
unknowns, so we solve it from there instead of by an auction (the reference implementation) or a general flow solver:

1. *Prices.* `cbtm.cluster.dual` finds prices of the clusters that nearly balance them, on a GPU where asked.
2. *Repair.* argmin_j (cost_ij + price_j) is optimal for the sizes that it happens to have, whatever the prices. The
   few surplus points move along successive shortest paths (Ahuja, Magnanti and Orlin 1993, section 9.7) in the
   residual graph of the clusters, where the edge a -> b weighs the least cost_ib - cost_ia of a point i in a. One
   more node, the pool, hands out the n mod k extra places, so that the paths move these too.

The repair works on costs rounded to whole numbers, so that its sums are exact and a shortest path is one: the grid is
at most 2^-49 (k + 2) of the widest row. Ties are broken by index, so the same input gives the same labels. It always
runs in numpy: whichever device found the prices, the total is the least one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.devices import NUMPY, Array, Device, find_device
from cbtm.cluster.dual import Scale, smoothed_prices
from cbtm.cluster.paths import cheapest_path
from cbtm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

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
    cost: Array,
    *,
    initial_prices: NDArray[np.floating[Any]] | None = None,
    device: str | torch.device | Device | None = None,
) -> BalancedAssignment:
    """Assign points to clusters of equal size at the least total cost.

    Args:
        cost: Cost of giving point i to cluster j, float32 or float64, shape (n, k), 1 <= k <= n; an array of numpy,
            or a tensor that is on `device` already.
        initial_prices: Prices of a similar problem, shape (k,), to start from; they change the time taken, and
            which of several equally cheap assignments is found, but not the total.
        device: Where the prices are found, see `cbtm.cluster.devices.find_device`; like `initial_prices` it does not
            change the total.

    Returns:
        The assignment. The same input gives the same labels on one device.

    Raises:
        DataError: If `cost` is not a matrix, is empty, or holds a NaN, an infinity or too wide a row.
        ConfigError: If there are more clusters than points, `initial_prices` does not fit, or the device is not there.
    """
    device = find_device(device)
    host_cost = _checked_cost(device.get(cost))
    n_points, n_clusters = host_cost.shape
    if initial_prices is not None:
        initial_prices = _checked_prices(initial_prices, n_clusters)
    scale = Scale.of(host_cost)
    prices = np.zeros(n_clusters)
    if scale.typical_range > 0:
        on_device = device.put(cost if device.holds(cost) else host_cost)
        with np.errstate(over="ignore", under="ignore"), device.exact_products():
            prices = smoothed_prices(on_device, scale, initial_prices=initial_prices, device=device)
    repair = _Repair(host_cost, prices, scale)
    repair.run()
    total_cost = float(host_cost[np.arange(n_points), repair.labels].sum(dtype=np.float64))
    return BalancedAssignment(repair.labels, repair.prices(), total_cost)


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


class _Repair:
    """Labels of least cost + price on a whole-number grid, and the moves that give each cluster its size.

    Costs, prices and path lengths are whole numbers below 2^53 in float64, so that all sums are exact. At any time
    the labels are the cheapest for the sizes that they have, and `_prices` are the proof: no edge a -> b has a
    negative weight + price of b - price of a.

    Attributes:
        labels: Current cluster of each point, int32, shape (n,).
    """

    def __init__(self, cost: NDArray[np.floating[Any]], prices: NDArray[np.float64], scale: Scale) -> None:
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
            path = cheapest_path(self._edges, self._prices, np.append(surplus, 0))  # the pool is neither
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

    def _whole_cost(self, points: NDArray[np.intp], cluster: int) -> NDArray[np.float64]:
        """One column of `_whole_costs`, shape (len(points),)."""
        column: NDArray[np.float64] = self._cost[points, cluster].astype(np.float64)
        column -= self._least[points]
        column /= self._unit
        return np.rint(column, out=column)

    def _cheapest_labels(self, whole_prices: NDArray[np.float64]) -> NDArray[np.int32]:
        labels = np.empty(len(self._cost), dtype=np.int32)
        for part in NUMPY.blocks(*self._cost.shape):
            labels[part] = (self._whole_costs(part) + whole_prices).argmin(axis=1)
        return labels

    def _weigh_edges(self, clusters: Iterable[int]) -> None:
        for cluster in clusters:
            members = np.flatnonzero(self.labels == cluster)
            weights = self._edges[cluster]
            weights[: self._pool] = np.inf
            if len(members):
                # By columns, along which numpy is quicker than along the short rows.
                growth = np.ascontiguousarray(self._cost[members].T, dtype=np.float64)
                growth -= self._least[members]
                growth /= self._unit
                np.rint(growth, out=growth)
                growth -= growth[cluster].copy()
                weights[: self._pool] = growth.min(axis=1)
            weights[cluster] = np.inf
            weights[self._pool] = np.inf if self._has_extra[cluster] else 0
            self._edges[self._pool, cluster] = 0 if self._has_extra[cluster] else np.inf

    def _move_along(self, path: list[int], limit: int) -> None:
        """Move points along every edge of `path`: as many as tie for the least growth, and at most `limit`."""
        moves = []
        for source, target in pairwise(path):
            if self._pool in (source, target):
                limit = min(limit, 1)
                continue
            members = np.flatnonzero(self.labels == source)
            growth = self._whole_cost(members, target) - self._whole_cost(members, source)
            tied = members[growth == self._edges[source, target]]
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
