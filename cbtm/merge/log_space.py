"""What the definitions of the ensembles and the quick grid share: logarithms of weights, and mixing in log space.

Both take the same steps in the same order, so that experts of equal weight are equal in both, and ties fall alike.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError

# 8 MiB of float64 per temporary: small against any model, large against the cost of a Python loop step.
_BLOCK_ELEMENTS = 2**20
# Float32 weights of 128 experts sum to 1 within 1e-6.
_SUM_TOLERANCE = 1e-5

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Array = NDArray[np.float64]


def log_mixture(log_weights: Array, log_probs: Array) -> Array:
    """Logarithm of sum_c w_c p_c for each token; both of shape (n_experts, n_tokens), at most 0."""
    terms = log_weights + log_probs
    highest = terms.max(axis=0)
    # Where all are -inf, subtracting 0 instead keeps -inf - -inf from becoming NaN.
    terms -= np.where(np.isneginf(highest), 0, highest)
    with np.errstate(divide="ignore"):
        mixed: Array = highest + np.log(np.exp(terms).sum(axis=0))
    # Weights that sum to 1 + 1e-16 can lift a certain token above probability 1.
    return np.minimum(mixed, 0, out=mixed)


def log_closeness(energies: Array, temperature: float) -> Array:
    """Logarithms of unnormalised routing weights from distance^distance_power, shape (n, k); 0 for the nearest."""
    closeness: Array = energies - energies.min(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        closeness /= -temperature
    return closeness


def log_prior(prior: Floats | None, n_experts: int) -> Array:
    """Logarithms of prior weights, None being uniform.

    Raises:
        DataError: If they are no distribution over the experts.
    """
    weights = np.full(n_experts, 1 / n_experts) if prior is None else checked_prior(prior, n_experts)
    with np.errstate(divide="ignore"):
        logs: Array = np.log(weights)
    return logs


def checked_prior(prior: Floats, n_experts: int) -> Array:
    """The prior in float64, with sum 1.

    Raises:
        DataError: If it is no distribution over the experts.
    """
    weights = np.asarray(prior, dtype=np.float64)
    if weights.shape != (n_experts,):
        raise DataError(f"prior of shape {weights.shape} for {n_experts} experts; expected a weight for each")
    if not ((weights >= 0).all() and abs(weights.sum() - 1) <= _SUM_TOLERANCE):
        raise DataError(f"prior is {weights}, with sum {weights.sum()}; expected weights of at least 0 that sum to 1")
    normalised: Array = weights / weights.sum()
    return normalised


def check_offsets(offsets: Integers, n_tokens: int) -> None:
    """Refuse offsets that do not run from 0 to the number of tokens.

    Raises:
        DataError: If so.
    """
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) == 0:
        raise DataError(
            f"offsets of shape {offsets.shape} and dtype {offsets.dtype}; expected integers, where each document "
            "begins, and the end"
        )
    if offsets[0] != 0 or offsets[-1] != n_tokens or (offsets[1:] < offsets[:-1]).any():
        raise DataError(
            f"offsets run from {offsets[0]} to {offsets[-1]}, there are {n_tokens} tokens; "
            "expected ascending numbers from 0 to the number of tokens"
        )


def best_expert(impossible: Integers, totals: Array) -> NDArray[np.intp]:
    """Index of the best expert along the last axis: fewest impossible tokens, then the highest sum of the others."""
    fewest = impossible == impossible.min(axis=-1, keepdims=True)
    best: NDArray[np.intp] = np.where(fewest, totals, -np.inf).argmax(axis=-1)
    return best


def log_weights_or(logs: Array, otherwise: Array) -> Array:
    """Log-weights (n, k), where all of a row are -inf those of `otherwise`."""
    nowhere = np.isneginf(logs.max(axis=1, keepdims=True))
    return np.where(nowhere, otherwise, logs) if nowhere.any() else logs


def token_blocks(n_tokens: int, n_experts: int) -> Iterator[slice]:
    """Slices that cover the tokens in order, each small enough for a few float64 temporaries over all experts."""
    step = max(1, _BLOCK_ELEMENTS // max(1, n_experts))
    for begin in range(0, n_tokens, step):
        yield slice(begin, min(begin + step, n_tokens))


def checked_log_probs(log_probs: Floats, first_token: int) -> NDArray[np.float64]:
    """The values in float64; `log_probs` has tokens along its last axis, the first being `first_token`.

    Raises:
        DataError: If one is NaN or above 0.
    """
    values = log_probs.astype(np.float64)
    wrong = np.argwhere(~(values <= 0))
    if len(wrong):
        token = first_token + int(wrong[0][-1])
        where = f"token {token}" if values.ndim == 1 else f"token {token} of expert {wrong[0][0]}"
        raise DataError(
            f"log-probability {values[tuple(wrong[0])]} at {where} is not in [-inf, 0]; "
            "the scores are damaged or are not natural log-probabilities: score that expert again"
        )
    return values


def checked_weights(weights: Floats, block: slice) -> NDArray[np.float64]:
    """Weights of some tokens, shape (tokens, experts), in float64.

    Raises:
        DataError: If those of a token are no distribution.
    """
    values = weights[block].astype(np.float64)
    sums = values.sum(axis=1)
    wrong = np.flatnonzero(~((np.abs(sums - 1) <= _SUM_TOLERANCE) & (values >= 0).all(axis=1)))
    if len(wrong):
        raise DataError(
            f"weights of token {block.start + wrong[0]} are {values[wrong[0]]}, with sum {sums[wrong[0]]}; "
            "weights must not be negative and must sum to 1 over the experts"
        )
    return values
