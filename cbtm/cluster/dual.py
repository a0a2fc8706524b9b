"""The smoothed dual of the balanced assignment: prices of the clusters that nearly give each its size.

The dual, sum_i min_j (cost_ij + price_j) - n/k sum_j price_j, has one unknown for each cluster. It is smoothed by a
log-sum-exp of width epsilon and maximised by Newton's method while epsilon shrinks (Cuturi and Peyré 2016, doi
10.1137/15M1032600). A step reads the n x k costs once, which is where the time of an assignment goes; so this part
runs on the device that is asked for. The prices need not be exact: `cbtm.cluster.assignment` repairs what they leave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.devices import NUMPY, Array, Device
from cbtm.errors import DataError

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
# Costs above this many typical ranges are all the same to the smoothed dual (not to the repair).
_LARGEST = 1e6


@dataclass(frozen=True)
class Scale:
    """Units of a cost matrix: the least cost of each point (n,), and the typical and widest range of a row."""

    least: NDArray[np.float64]
    typical_range: float
    widest_range: float

    @classmethod
    def of(cls, cost: NDArray[np.floating[Any]]) -> Scale:
        """Units of the costs (n, k).

        Raises:
            DataError: If the range of a row is not finite.
        """
        least, largest = np.empty(len(cost)), np.empty(len(cost))
        for part in NUMPY.blocks(*cost.shape):
            # Short rows: numpy is ten times as fast along columns.
            columns = np.ascontiguousarray(cost[part].T)
            least[part], largest[part] = columns.min(axis=0), columns.max(axis=0)
        with np.errstate(over="ignore"):
            ranges = largest - least
        widest = float(ranges.max())
        if not np.isfinite(widest):
            raise DataError("the costs of one point differ by more than a float64 can hold; scale them down")
        # The median, because one far outlier would make every width too wide for the other points.
        wide = ranges[ranges > 0]
        return cls(least, float(np.median(wide)) if len(wide) else 0.0, widest)


def smoothed_prices(
    cost: Array,
    scale: Scale,
    *,
    initial_prices: NDArray[np.float64] | None,
    device: Device,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Prices that nearly balance the expected sizes: a continuation over shrinking widths.

    Args:
        cost: Costs on `device`, float32 or float64, shape (n, k).
        scale: Their units, of a typical range above 0.
        initial_prices: Prices to start from, shape (k,); they are left aside where they are of no help.
        device: Where the sums over points run.
        weights: How often each point counts, of mean 1, shape (n,): the prices then nearly balance the sums of
            weights. None counts each once.

    Returns:
        Prices in units of the cost, shape (k,).
    """
    costs = _relative_rows(cost, scale, device)
    n_clusters, n_points = costs.shape
    rows = _Rows(costs, None if weights is None else device.put(np.sqrt(weights).astype(np.float32)))
    sample = rows.every(max(1, n_points // max(_SAMPLE_AT_LEAST, _SAMPLE_PER_CLUSTER * n_clusters)), device)
    prices, start = np.zeros(n_clusters), 0
    if initial_prices is not None:
        initial_prices = np.clip(initial_prices / scale.typical_range, -_LARGEST, _LARGEST)
        if (within_reach := _narrowest_within_reach(sample, initial_prices, device)) is not None:
            prices, start = initial_prices, within_reach
    # Where no single point fits exactly, each cluster but one shares a point to the end.
    tolerance = _UNSETTLED_TOLERANCE + (0 if weights is None else n_clusters / n_points)
    for width in _WIDTHS[start:]:
        on_sample = width >= _WIDTH_ON_SAMPLE
        dual = _balance(sample if on_sample else rows, prices, width, device)
        prices = dual.prices
        if dual.unsettled <= tolerance and not on_sample:
            break
    return prices * scale.typical_range


@dataclass(frozen=True)
class _Rows:
    """Points as columns on a device: float32 costs (k, n), square roots of weights of mean 1 (n,) or None for ones."""

    costs: Array
    roots: Array | None

    def every(self, step: int, device: Device) -> _Rows:
        """Every `step`-th point."""
        sampled = self.costs[:, ::step]
        costs = device.empty(tuple(sampled.shape))
        costs[:] = sampled
        return _Rows(costs, None if self.roots is None else self.roots[::step])


def _relative_rows(cost: Array, scale: Scale, device: Device) -> Array:
    """Costs above the least of each point in typical ranges, float32, shape (k, n)."""
    n_points, n_clusters = cost.shape
    least = device.put(scale.least[:, None])
    # An array, because torch divides by a number through its inverse, which overflows for the smallest of ranges.
    typical_range = device.put(np.full(1, scale.typical_range))
    rows = device.empty((n_clusters, n_points))
    for part in device.blocks(n_points, n_clusters):
        relative = (cost[part] - least[part]) / typical_range
        rows[:, part] = device.xp.clip(relative, 0, _LARGEST).T
    return rows


def _narrowest_within_reach(rows: _Rows, prices: NDArray[np.float64], device: Device) -> int | None:
    """Index of the narrowest width at which one Newton step from `prices` is short, None if there is none."""
    for index in reversed(range(_WIDTHS.index(_WIDTH_FROM_PRICES) + 1)):
        if np.abs(_SmoothedDual(rows, prices, _WIDTHS[index], device).newton_step()).max() <= _LONGEST_STEP:
            return index
    return None


def _balance(rows: _Rows, prices: NDArray[np.float64], width: float, device: Device) -> _SmoothedDual:
    """Maximise the smoothed dual of one width over `rows`, from `prices` (k,)."""
    part = _IMBALANCE_ON_SAMPLE if width >= _WIDTH_ON_SAMPLE else _IMBALANCE_ON_ALL
    tolerance = max(1.0, part * rows.costs.shape[1] / rows.costs.shape[0])
    dual = _SmoothedDual(rows, prices, width, device)
    for _ in range(_NEWTON_STEPS):
        if np.abs(dual.surplus).max() <= tolerance:
            break
        step = dual.newton_step()
        step *= min(1.0, _LONGEST_STEP / np.abs(step).max())
        rise = dual.surplus @ step
        for _ in range(_LINE_SEARCH_STEPS):
            trial = _SmoothedDual(rows, dual.prices + width * step, width, device)
            if (trial_rise := trial.surplus @ step) >= -rise / 2:
                break
            # Too far beyond the top in this direction: back to where the slope is 0 by the secant.
            shorter = rise / (rise - trial_rise)
            step, rise = shorter * step, shorter * rise
        dual = trial
    return dual


class _SmoothedDual:
    """The smoothed dual at one point: expected sizes and their derivatives, from points on a device."""

    def __init__(self, rows: _Rows, prices: NDArray[np.float64], width: float, device: Device) -> None:
        self.prices = prices
        xp = device.xp
        n_clusters, n_points = rows.costs.shape
        total = float(n_points) if rows.roots is None else float((rows.roots * rows.roots).sum())
        self._capacity = total / n_clusters
        self.unsettled = 1.0
        # Of the sums over points only k and k x k numbers come back, to be added up in float64.
        self._mass = np.zeros(n_clusters)
        self._overlap = np.zeros((n_clusters, n_clusters))
        shift = device.put(prices.astype(np.float32)[:, None])
        for part in device.blocks(n_points, n_clusters):
            shares = rows.costs[:, part] + shift  # (k, block)
            shares -= xp.amin(shares, axis=0)
            shares *= -1 / width
            xp.exp(shares, out=shares)
            shares /= shares.sum(axis=0)
            if rows.roots is None:
                self._mass += device.get(shares.sum(axis=1))
            else:
                self.unsettled -= float((shares * shares).sum()) / n_points
                shares *= rows.roots[part]
                self._mass += device.get(shares @ rows.roots[part])
            self._overlap += device.get(shares @ shares.T)
        self.surplus = self._mass - self._capacity
        if rows.roots is None:
            self.unsettled = 1 - float(np.trace(self._overlap)) / n_points

    def newton_step(self) -> NDArray[np.float64]:
        """Change of the prices in widths (k,)."""
        # The damping keeps clusters that nobody wants yet in bounds.
        curvature = np.diag(self._mass + _DAMPING * self._capacity) - self._overlap
        return np.linalg.solve(curvature, self.surplus)
