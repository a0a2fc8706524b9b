"""Mixtures of a token's first so many experts, in the order of their weights, for many top-k at once.

Sums are float64, relative to the best of the token's experts. Where what has weight is less probable beside the best
than float64 can say, the token is mixed again in log space, as `cbtm.merge.ensembles` does it everywhere.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbtm.merge.log_space import log_mixture

# Below this share of the best expert, sums have lost digits or underflown.
_EXACT_BELOW = 1e-290

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Indices = NDArray[np.intp]


class Kept:
    """Scores of a token's experts, shape (experts, n), and their probabilities relative to the best of them."""

    def __init__(self, log_probs: Array) -> None:
        self.log_probs = log_probs
        best = log_probs.max(axis=0)
        self.base = np.where(np.isneginf(best), 0, best)
        self.likely = log_probs - self.base
        np.exp(self.likely, out=self.likely)


class Prefixes(NamedTuple):
    """What is measured at each token, for each number of experts kept; all of shape (bounds, n).

    Attributes:
        nll: Negative natural log-probabilities.
        experts_used: Experts with weight above 0.
        entropy: Entropies of the weights, in nats.
        impossible: 1 where no expert with weight gives a probability, else 0, int64.
    """

    nll: Array
    experts_used: Array
    entropy: Array
    impossible: NDArray[np.int64]


def mix_prefixes(logs: Array, kept: Kept, bounds: list[int], *, weights_underflow: bool = False) -> Prefixes:
    """Mix the first so many experts of each token.

    Args:
        logs: Logarithms of the weights relative to the largest, shape (experts, n), largest first where `bounds` has
            less than all.
        kept: The experts in that order, and maybe more.
        bounds: How many experts are kept, ascending, the last being the rows of `logs`.
        weights_underflow: Whether a weight that float64 cannot hold is 0, as in `routing_weights`.
    """
    weights = np.exp(logs)
    total = _running(weights, bounds)  # (bounds, n)
    products = weights * kept.likely[: len(weights)]
    mixed = _running(products, bounds)
    if weights.min() > 0:
        used = np.broadcast_to(np.array(bounds, dtype=np.float64)[:, np.newaxis], total.shape)
        energy = np.multiply(weights, logs, out=products)
    else:
        used = _running(weights > 0, bounds)
        energy = weights * np.maximum(logs, -1e300)  # 0 log 0 = 0
    entropy = np.log(total) - _running(energy, bounds) / total
    log_probs = kept.base + np.log(mixed) - np.log(total)
    for row, bound in enumerate(bounds):
        weak = np.flatnonzero(mixed[row] < _EXACT_BELOW)
        if len(weak):
            exact = logs[:bound, weak]
            if weights_underflow:
                exact = np.where(weights[:bound, weak] > 0, exact, -np.inf)
            log_probs[row, weak] = log_mixture(exact - np.log(total[row, weak]), kept.log_probs[:bound, weak])
    np.minimum(log_probs, 0, out=log_probs)
    return Prefixes(-log_probs, used, entropy, np.isneginf(log_probs).astype(np.int64))


def rank(keys: Floats, bounds: list[int]) -> Indices:
    """Indices of the smallest keys of each row, ties to the lowest index, as many as the largest bound.

    Within two bounds the order is of no meaning: equal keys are put in order only where a bound comes between them.
    """
    order = np.argsort(keys, axis=1)
    tied = np.zeros(len(keys), dtype=np.bool_)
    for bound in (bound for bound in bounds if bound < keys.shape[1]):
        pair = np.take_along_axis(keys, order[:, bound - 1 : bound + 1], axis=1)
        tied |= pair[:, 0] == pair[:, 1]
    # A stable sort of all was measured to take five times as long.
    order[tied] = np.argsort(keys[tied], axis=1, kind="stable")
    return order[:, : bounds[-1]]


def ranked_cells(order: Indices, rows: Indices, n_columns: int) -> Indices:
    """Places in a flat (t, n_columns) array of the columns `order` (n, w) of the rows (n,); shape (w, n)."""
    cells: Indices = np.ascontiguousarray(order.T) + rows * n_columns
    return cells


def _running(values: NDArray[Any], bounds: list[int]) -> Array:
    """Sums over the first so many rows, for each bound, shape (bounds, n)."""
    parts = [values[begin:end].sum(axis=0) for begin, end in zip([0, *bounds[:-1]], bounds, strict=True)]
    return np.cumsum(parts, axis=0, dtype=np.float64)
