"""What is measured of an ensemble: the perplexity of its token log-probabilities, and how its weights spread.

The log-probabilities are of all tokens; one impossible token makes the perplexity infinite.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.merge.log_space import checked_log_probs, checked_weights, token_blocks

Floats = NDArray[np.floating[Any]]


def perplexity(token_log_probs: Floats) -> float:
    """Exponential of the mean negative log-probability over all tokens.

    Args:
        token_log_probs: Natural log-probabilities, shape (n_tokens,).

    Returns:
        The perplexity; inf if a token is impossible (or the result is beyond float64).

    Raises:
        DataError: If there is no token, or a log-probability is NaN or above 0.
    """
    try:
        return math.exp(nats_per_token(token_log_probs))
    except OverflowError:
        return math.inf


def bits_per_byte(token_log_probs: Floats, n_bytes: int) -> float:
    """Code length of the text in bits per byte, comparable between tokenizers.

    Args:
        token_log_probs: Natural log-probabilities of the scored tokens, shape (n_tokens,).
        n_bytes: UTF-8 bytes of the text that those tokens spell.

    Returns:
        Bits per byte; inf if a token is impossible.

    Raises:
        DataError: If there is no token or no byte, or a log-probability is NaN or above 0.
    """
    if n_bytes < 1:
        raise DataError(f"n_bytes={n_bytes}: count the UTF-8 bytes of the scored tokens, at least 1")
    return -_checked_sum(token_log_probs) / (math.log(2) * n_bytes)


def nats_per_token(token_log_probs: Floats) -> float:
    """Mean negative log-probability over all tokens, the logarithm of the perplexity.

    Args:
        token_log_probs: Natural log-probabilities, shape (n_tokens,).

    Returns:
        Nats per token; inf if a token is impossible.

    Raises:
        DataError: If there is no token, or a log-probability is NaN or above 0.
    """
    return -_checked_sum(token_log_probs) / len(token_log_probs)


def experts_used(weights: Floats) -> float:
    """Mean number of experts with a weight above 0 at a token; weights of shape (n_tokens, n_experts).

    Raises:
        DataError: If there is no token, or weights are negative, NaN or do not sum to 1.
    """
    return _mean_over_tokens(weights, lambda part: np.count_nonzero(part, axis=1))


def routing_entropy(weights: Floats) -> float:
    """Mean entropy of the weights at a token, in nats: 0 for one expert, log k for k equal ones.

    Args:
        weights: Weights of shape (n_tokens, n_experts).

    Raises:
        DataError: If there is no token, or weights are negative, NaN or do not sum to 1.
    """

    def entropy(part: NDArray[np.float64]) -> NDArray[np.float64]:
        logs = np.log(part, out=np.zeros_like(part), where=part > 0)
        row_entropy: NDArray[np.float64] = -np.einsum("ij,ij->i", part, logs)
        return row_entropy

    return _mean_over_tokens(weights, entropy)


def _mean_over_tokens(weights: Floats, statistic: Callable[[NDArray[np.float64]], NDArray[Any]]) -> float:
    if weights.ndim != 2 or 0 in weights.shape:
        raise DataError(f"weights of shape {weights.shape}; expected (tokens, experts), at least one of each")
    blocks = token_blocks(*weights.shape)
    return float(sum(statistic(checked_weights(weights, block)).sum() for block in blocks) / len(weights))


def _checked_sum(token_log_probs: Floats) -> float:
    if token_log_probs.ndim != 1 or len(token_log_probs) == 0:
        raise DataError(f"log-probabilities of shape {token_log_probs.shape}; expected (tokens,), at least one")
    return float(checked_log_probs(token_log_probs, 0).sum())
