"""Ensembles of the experts' stored log-probabilities, and what is measured of them: the definitions.

An ensemble gives a token the probability sum_c w_c p_c(token), so one float per token and expert is all that any
temperature, top-k or subset of experts needs: every setting is arithmetic on small arrays. What differs is where the
weights come from: from the context's distances to the clusters (clustering, the paper's), from the probabilities that
the experts gave to the token before (bayes, product_of_experts, as in the code released with the paper) or to all
tokens before (posterior, the Bayesian mixture of whole documents), or from nowhere (uniform, fixed_prior).
No weight of a token sees that token; `oracle` does, and is a bound rather than a model.

All is done in float64 and in log space, where a token that every expert finds unlikely does not underflow to an
impossible one, and in blocks of tokens or documents, so that scores and distances may stay on disk as memory maps.
`cbtm.merge.grid` computes many settings at once; these functions say what it computes.

No token is ever dropped: one impossible token makes the perplexity infinite. The code released with c-BTM
(Gururangan et al. 2023, arXiv 2303.14177) leaves such tokens out of the sum and of the count.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError
from cbtm.merge.log_space import (
    best_expert,
    check_offsets,
    checked_log_probs,
    checked_prior,
    checked_weights,
    log_closeness,
    log_mixture,
    log_prior,
    log_weights_or,
)
from cbtm.merge.log_space import token_blocks as token_blocks
from cbtm.merge.measures import bits_per_byte as bits_per_byte
from cbtm.merge.measures import experts_used as experts_used
from cbtm.merge.measures import nats_per_token as nats_per_token
from cbtm.merge.measures import perplexity as perplexity
from cbtm.merge.measures import routing_entropy as routing_entropy
from cbtm.merge.router import routing_weights

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Array = NDArray[np.float64]


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
    return _mix(log_probs, lambda block: checked_weights(weights, block))


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
    return checked_log_probs(log_probs[expert], 0)


def fixed_prior(log_probs: Floats, prior: Floats) -> NDArray[np.float64]:
    """Mix the experts with the same weights at every token.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        prior: Weight of each expert, shape (n_experts,), summing to 1.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        DataError: If `prior` is no distribution over the experts, or as in `mix`.
    """
    _check_log_probs_shape(log_probs)
    weights = checked_prior(prior, len(log_probs))[np.newaxis]
    return _mix(log_probs, lambda block: weights)


def product_of_experts(
    log_probs: Floats,
    distances: Floats,
    offsets: Integers,
    *,
    temperature: float,
    distance_power: float = 2,
    top_k: int | None = None,
) -> NDArray[np.float64]:
    """Weigh each expert by its clustering weight times the probability that it gave to the token before.

    The first token of a document has none before it and takes uniform weights, as in the code released with c-BTM.
    Where every expert found the token before impossible, the clustering weights stand alone.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        distances: As in `clustering`, shape (n_tokens, n_experts).
        offsets: Where each document begins, and the end, shape (n_documents + 1,).
        temperature: As in `routing_weights`.
        distance_power: As in `routing_weights`.
        top_k: Experts kept at each token, those of largest weight, ties to the lowest index; None keeps all.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        ConfigError: As in `routing_weights`.
        DataError: As in `routing_weights` and `mix`, or if the offsets do not fit.
    """
    _check_pair(log_probs, distances, "distances")

    def log_weights(scores: Array, document: slice) -> Array:
        # Unlike its logarithm, the weight of a far cluster can underflow; it is taken for the checks alone.
        near = distances[document]
        routing_weights(near, temperature=temperature, distance_power=distance_power)
        closeness = log_closeness(near.astype(np.float64) ** distance_power, temperature)  # (n, k)
        logs = log_weights_or(closeness[1:] + scores[:, :-1].T, closeness[1:])
        return np.concatenate([np.zeros((1, len(scores))), logs])

    return _mix_documents(log_probs, offsets, top_k, log_weights)


def bayes(
    log_probs: Floats, offsets: Integers, *, prior: Floats | None = None, top_k: int | None = None
) -> NDArray[np.float64]:
    """Weigh each expert by its prior times the probability that it gave to the token before.

    One token is all that the weights remember; `posterior` has the whole text before. The first token of a document
    takes the prior, and so does one whose predecessor every expert with a prior found impossible.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        offsets: Where each document begins, and the end, shape (n_documents + 1,).
        prior: Prior weight of each expert, shape (n_experts,), summing to 1; None is uniform.
        top_k: Experts kept at each token, those of largest weight, ties to the lowest index; None keeps all.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        ConfigError: If `top_k` is not in [1, n_experts].
        DataError: If `prior` is no distribution over the experts, the offsets do not fit, or as in `mix`.
    """
    _check_log_probs_shape(log_probs)
    before = log_prior(prior, len(log_probs))

    def log_weights(scores: Array, document: slice) -> Array:
        return np.concatenate([before[np.newaxis], log_weights_or(before + scores[:, :-1].T, before)])

    return _mix_documents(log_probs, offsets, top_k, log_weights)


def posterior(
    log_probs: Floats, offsets: Integers, *, prior: Floats | None = None, top_k: int | None = None
) -> NDArray[np.float64]:
    """Weigh each expert by its prior times the probability that it gave to all of the document before the token.

    Without top-k this is the Bayesian mixture of whole documents: its log-probabilities of a document sum to
    log sum_j prior_j p_j(document). Where every expert with a prior has found a token impossible, the prior stands in
    for the rest of the document.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        offsets: Where each document begins, and the end, shape (n_documents + 1,).
        prior: As in `bayes`.
        top_k: As in `bayes`.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        ConfigError: As in `bayes`.
        DataError: As in `bayes`.
    """
    _check_log_probs_shape(log_probs)
    before = log_prior(prior, len(log_probs))

    def log_weights(scores: Array, document: slice) -> Array:
        read = np.cumsum(scores[:, :-1].T, axis=0)  # (n - 1, k)
        return np.concatenate([before[np.newaxis], log_weights_or(before + read, before)])

    return _mix_documents(log_probs, offsets, top_k, log_weights)


def oracle(log_probs: Floats, offsets: Integers, *, counted: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Log-probability of each token under the expert that is best on its document.

    A bound on what choosing one expert per document can reach, not a model: the choice sees the document. Best is
    the fewest impossible tokens, then the highest probability of the others, then the lowest index.

    Args:
        log_probs: As in `mix`, shape (n_experts, n_tokens).
        offsets: Where each document begins, and the end, shape (n_documents + 1,).
        counted: Tokens by which the expert is chosen, shape (n_tokens,); None takes all.

    Returns:
        Natural log-probabilities of shape (n_tokens,).

    Raises:
        DataError: If the offsets do not fit, or as in `mix`.
    """
    _check_log_probs_shape(log_probs)
    check_offsets(offsets, log_probs.shape[1])
    chosen = np.empty(log_probs.shape[1])
    for begin, end in pairwise(offsets.tolist()):
        scores = checked_log_probs(log_probs[:, begin:end], begin)  # (k, n)
        seen = scores if counted is None else scores[:, counted[begin:end]]
        impossible = np.isneginf(seen)
        totals = np.where(impossible, 0, seen).sum(axis=1)  # (k,)
        chosen[begin:end] = scores[best_expert(impossible.sum(axis=1), totals)]
    return chosen


def _mix(log_probs: Floats, weights_of: Callable[[slice], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mix block by block; `weights_of(block)` has shape (tokens of the block or 1, n_experts)."""
    n_experts, n_tokens = log_probs.shape
    mixed = np.empty(n_tokens)
    for block in token_blocks(n_tokens, n_experts):
        scores = checked_log_probs(log_probs[:, block], block.start)
        with np.errstate(divide="ignore"):
            mixed[block] = log_mixture(np.log(weights_of(block)).T, scores)
    return mixed


def _mix_documents(
    log_probs: Floats, offsets: Integers, top_k: int | None, log_weights_of: Callable[[Array, slice], Array]
) -> NDArray[np.float64]:
    """Mix document by document; `log_weights_of(scores (k, n), its tokens)` has shape (n, k) and any scale."""
    n_experts, n_tokens = log_probs.shape
    check_offsets(offsets, n_tokens)
    if top_k is not None and not 1 <= top_k <= n_experts:
        raise ConfigError(f"top_k={top_k} is not in [1, {n_experts}], the number of experts; use None for all")
    mixed = np.empty(n_tokens)
    for begin, end in pairwise(offsets.tolist()):
        if begin == end:
            continue
        scores = checked_log_probs(log_probs[:, begin:end], begin)  # (k, n)
        logs = log_weights_of(scores, slice(begin, end))  # (n, k)
        if top_k is not None and top_k < n_experts:
            dropped = np.argsort(-logs, axis=1, kind="stable")[:, top_k:]
            np.put_along_axis(logs, dropped, -np.inf, axis=1)
        logs -= logs.max(axis=1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
        mixed[begin:end] = log_mixture(logs.T, scores)
    return mixed


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
