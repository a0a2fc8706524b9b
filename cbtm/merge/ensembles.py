"""Mix the experts' stored log-probabilities, and measure the mixture.

The ensemble gives a token the probability sum_c w_c p_c(token), so one float per token and expert is all that any
temperature, top-k or subset of experts needs: every setting is arithmetic on small arrays. It is done in log space,
where a token that every expert finds unlikely does not underflow to an impossible one, and in blocks of tokens,
so that scores and distances may stay on disk as memory maps.

No token is ever dropped: one impossible token makes the perplexity infinite. The code released with c-BTM
(Gururangan et al. 2023, arXiv 2303.14177) leaves such tokens out of the sum and of the count.

Confidence intervals are percentile bootstraps over documents, the unit that was sampled; tokens of one document
are not independent (Koehn 2004, "Statistical significance tests for machine translation evaluation", for the
paired form).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError
from cbtm.merge.router import routing_weights

# 8 MiB of float64 per temporary: small against any model, large against the cost of a Python loop step.
_BLOCK_ELEMENTS = 2**20
# Float32 weights of 128 experts sum to 1 within 1e-6.
_SUM_TOLERANCE = 1e-5

Floats = NDArray[np.floating[Any]]


def mix(log_probs: Floats, weights: Floats) -> NDArray[np.float64]:
    """Log-probability of each token under the weighted mixture of experts.

    Args:
        log_probs: Natural log-probability of each token under each expert, shape (n_experts, n_tokens); -inf is
            an impossible token.
        weights: Weight of each expert at each token, shape (n_tokens, n_experts), rows summing to 1. An expert
            of weight 0 takes no part.

    Returns:
        Natural log-probabilities of shape (n_tokens,); -inf where every expert with weight says impossible.

    Raises:
        DataError: If the shapes disagree, a log-probability is NaN or above 0, or weights are negative, NaN or
            do not sum to 1.
    """
    _check_pair(log_probs, weights, "weights")
    return _mix(log_probs, lambda block: _checked_weights(weights, block))


def clustering(
    log_probs: Floats,
    distances: Floats,
    *,
    temperature: float,
    distance_power: float = 2,
    top_k: int | None = None,
) -> NDArray[np.float64]:
    """Mix the experts by the distance of each token's context to their clusters.

    The same as `mix` with `routing_weights`, without ever holding all weights.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        distances: Euclidean distances from each token's context to the centres, shape (n_tokens, n_experts).
        temperature: As in `routing_weights`.
        distance_power: As in `routing_weights`.
        top_k: As in `routing_weights`.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        ConfigError: As in `routing_weights`.
        DataError: As in `routing_weights` and `mix`.
    """
    _check_pair(log_probs, distances, "distances")
    return _mix(
        log_probs,
        lambda block: routing_weights(
            distances[block], temperature=temperature, distance_power=distance_power, top_k=top_k
        ),
    )


def uniform(log_probs: Floats) -> NDArray[np.float64]:
    """Log-probability of each token under the plain mean of the experts' probabilities.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        DataError: If there is no expert, or a log-probability is NaN or above 0.
    """
    _check_log_probs_shape(log_probs)
    n_experts = len(log_probs)
    return _mix(log_probs, lambda block: np.full((1, n_experts), 1 / n_experts))


def single(log_probs: Floats, expert: int) -> NDArray[np.float64]:
    """Log-probability of each token under one expert alone.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        expert: Row of the expert.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        ConfigError: If `expert` is not in [0, n_experts).
        DataError: If there is no expert, or a log-probability of this expert is NaN or above 0.
    """
    _check_log_probs_shape(log_probs)
    if not 0 <= expert < len(log_probs):
        raise ConfigError(f"expert={expert} is not in [0, {len(log_probs)}), the experts that were scored")
    return _checked_log_probs(log_probs[expert], 0)


def perplexity(token_log_probs: Floats) -> float:
    """Exponential of the mean negative log-probability over all tokens.

    Args:
        token_log_probs: Natural log-probabilities, shape (n_tokens,).

    Returns:
        The perplexity; inf if a token is impossible (or the result is beyond float64).

    Raises:
        DataError: If there is no token, or a log-probability is NaN or above 0.
    """
    return _exp(-_checked_sum(token_log_probs) / len(token_log_probs))


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


def bootstrap_interval(
    document_nll: Floats,
    document_tokens: NDArray[np.integer[Any]],
    *,
    random_state: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the perplexity, resampling documents.

    Args:
        document_nll: Sum of negative natural log-probabilities of each document, shape (n_docs,); inf is allowed.
        document_tokens: Scored tokens of each document, shape (n_docs,), at least 1 each.
        random_state: Seed of the resampling.
        n_resamples: Resamples drawn.
        level: Coverage, in (0, 1).

    Returns:
        Lower and upper end, each the perplexity of a resample (no interpolation).

    Raises:
        ConfigError: If `n_resamples` or `level` is out of range.
        DataError: If there are fewer than two documents, or the arrays do not fit or hold impossible values.
    """
    _check_documents(document_nll, document_tokens, "document_nll")
    return _percentiles(document_nll, document_tokens, random_state, n_resamples, level)


def paired_bootstrap_interval(
    nll_a: Floats,
    nll_b: Floats,
    document_tokens: NDArray[np.integer[Any]],
    *,
    random_state: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of perplexity a / perplexity b on the same documents.

    Both are taken on the same resample each time, so what makes a document hard for both cancels. An interval
    below 1 says that a is better.

    Args:
        nll_a: Sums of negative natural log-probabilities under a, shape (n_docs,).
        nll_b: The same under b.
        document_tokens: Scored tokens of each document, shape (n_docs,), at least 1 each.
        random_state: Seed of the resampling.
        n_resamples: Resamples drawn.
        level: Coverage, in (0, 1).

    Returns:
        Lower and upper end of the ratio.

    Raises:
        ConfigError: As in `bootstrap_interval`.
        DataError: As in `bootstrap_interval`, or if both a and b find a token impossible.
    """
    _check_documents(nll_a, document_tokens, "nll_a")
    _check_documents(nll_b, document_tokens, "nll_b")
    if np.isinf(nll_a).any() and np.isinf(nll_b).any():
        raise DataError("both sides find some token impossible, so the ratio of their perplexities is undefined")
    differences = nll_a.astype(np.float64) - nll_b.astype(np.float64)
    return _percentiles(differences, document_tokens, random_state, n_resamples, level)


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


def token_blocks(n_tokens: int, n_experts: int) -> Iterator[slice]:
    """Slices that cover the tokens in order, each small enough for a few float64 temporaries over all experts."""
    step = max(1, _BLOCK_ELEMENTS // max(1, n_experts))
    for begin in range(0, n_tokens, step):
        yield slice(begin, min(begin + step, n_tokens))


def _mix(log_probs: Floats, weights_of: Callable[[slice], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mix block by block; `weights_of(block)` has shape (tokens of the block or 1, n_experts)."""
    n_experts, n_tokens = log_probs.shape
    mixed = np.empty(n_tokens)
    for block in token_blocks(n_tokens, n_experts):
        with np.errstate(divide="ignore"):
            terms = np.log(weights_of(block)).T + _checked_log_probs(log_probs[:, block], block.start)
        highest = terms.max(axis=0)
        # Where all are -inf, subtracting 0 instead keeps -inf - -inf from becoming NaN.
        terms -= np.where(np.isneginf(highest), 0, highest)
        with np.errstate(divide="ignore"):
            mixed[block] = highest + np.log(np.exp(terms).sum(axis=0))
    # Weights that sum to 1 + 1e-16 can lift a certain token above probability 1.
    np.minimum(mixed, 0, out=mixed)
    return mixed


def _percentiles(
    nll: Floats, tokens: NDArray[np.integer[Any]], random_state: int, n_resamples: int, level: float
) -> tuple[float, float]:
    """Ends of the central `level` of exp(sum of nll / sum of tokens) over resamples of the documents."""
    if n_resamples < 1:
        raise ConfigError(f"n_resamples={n_resamples} is below 1; 1000 is usual")
    if not 0 < level < 1:
        raise ConfigError(f"level={level} is not between 0 and 1; 0.95 is usual")
    rng = np.random.default_rng(random_state)
    rates = np.empty(n_resamples)
    for resample in range(n_resamples):
        drawn = rng.integers(len(nll), size=len(nll))
        rates[resample] = nll[drawn].sum(dtype=np.float64) / tokens[drawn].sum(dtype=np.int64)
    rates.sort()
    # Order statistics rather than interpolation: between a finite rate and inf there is nothing.
    tail = (1 - level) / 2 * (n_resamples - 1)
    return _exp(float(rates[math.floor(tail)])), _exp(float(rates[n_resamples - 1 - math.floor(tail)]))


def _mean_over_tokens(weights: Floats, statistic: Callable[[NDArray[np.float64]], NDArray[Any]]) -> float:
    if weights.ndim != 2 or 0 in weights.shape:
        raise DataError(f"weights of shape {weights.shape}; expected (tokens, experts), at least one of each")
    blocks = token_blocks(*weights.shape)
    return float(sum(statistic(_checked_weights(weights, block)).sum() for block in blocks) / len(weights))


def _exp(exponent: float) -> float:
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def _checked_log_probs(log_probs: Floats, first_token: int) -> NDArray[np.float64]:
    """The values in float64; `log_probs` has tokens along its last axis, the first being `first_token`."""
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


def _checked_weights(weights: Floats, block: slice) -> NDArray[np.float64]:
    values = weights[block].astype(np.float64)
    sums = values.sum(axis=1)
    wrong = np.flatnonzero(~((np.abs(sums - 1) <= _SUM_TOLERANCE) & (values >= 0).all(axis=1)))
    if len(wrong):
        raise DataError(
            f"weights of token {block.start + wrong[0]} are {values[wrong[0]]}, with sum {sums[wrong[0]]}; "
            "weights must not be negative and must sum to 1 over the experts"
        )
    return values


def _checked_sum(token_log_probs: Floats) -> float:
    if token_log_probs.ndim != 1 or len(token_log_probs) == 0:
        raise DataError(f"log-probabilities of shape {token_log_probs.shape}; expected (tokens,), at least one")
    return float(_checked_log_probs(token_log_probs, 0).sum())


def _check_log_probs_shape(log_probs: Floats) -> None:
    if log_probs.ndim != 2 or len(log_probs) == 0:
        raise DataError(f"log_probs of shape {log_probs.shape}; expected (experts, tokens), at least one expert")


def _check_pair(log_probs: Floats, by_token: Floats, name: str) -> None:
    _check_log_probs_shape(log_probs)
    if by_token.shape != log_probs.shape[::-1]:
        raise DataError(
            f"{name} of shape {by_token.shape} do not fit log_probs of shape {log_probs.shape}; "
            f"expected (tokens, experts), here {log_probs.shape[::-1]}"
        )


def _check_documents(nll: Floats, tokens: NDArray[np.integer[Any]], name: str) -> None:
    if nll.ndim != 1 or nll.shape != tokens.shape:
        raise DataError(f"{name} of shape {nll.shape}, document_tokens of shape {tokens.shape}; expected one each")
    if len(nll) < 2:
        raise DataError(f"{len(nll)} documents; an interval over documents takes at least 2")
    if not (nll >= 0).all():
        raise DataError(
            f"{name} is {nll[~(nll >= 0)][0]} for document {np.flatnonzero(~(nll >= 0))[0]}; "
            "expected sums of negative log-probabilities, at least 0"
        )
    if (tokens < 1).any():
        raise DataError(
            f"document {np.flatnonzero(tokens < 1)[0]} has {tokens[tokens < 1][0]} scored tokens; "
            "leave out documents in which no token is scored"
        )
