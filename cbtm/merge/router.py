"""Route every token of a text by the text before it, exactly, in one pass.

A token at character x is predicted by a mixture whose weights depend on how near the embedding of text[:x] is
to each cluster centre. The direct way vectorises every prefix anew, O(characters^2) for a document. The embedding
is normalise(sum of word vectors over the words of the prefix), so it is a running sum, and three things alone
can differ between a prefix and the whole text:

* the word in which the prefix ends: its beginning is looked up as a word of its own;
* a capital sigma (U+03A3) at the end of the prefix: its lower case is final or not by what follows it, the only
  lower case in Unicode's tables for `str.lower` that depends on the context;
* positions, where lower() makes one character into two (U+0130): those are spelled out before anything else.

Text that is still being written is routed by `PrefixRouter.stream`, in `cbtm.merge.streaming`.

The sums are float64, so that a long document loses nothing against a fresh vectorisation of each prefix.

The weights follow equations 2 and 3 of c-BTM (Gururangan et al. 2023, arXiv 2303.14177): exp(-distance^2 / T).
The code released with the paper squares a distance that is squared already; `distance_power=4` gives its weights.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError
from cbtm.merge.streaming import FINAL, MEDIAL, SIGMA, StreamingRouter, is_case_ignorable, is_cased

# The words of scikit-learn's default token pattern (?u)\b\w\w+\b: runs of \w are taken whole, so \b adds nothing.
_WORD = re.compile(r"\w\w+")
# Multiplications below which OpenBLAS stays on the calling thread. Above, waking its threads on a busy machine was
# measured at 8 ms, 100 times the product itself (2048 contexts, k=8, d=100).
_SERIAL_PRODUCT = 2**18
_BLOCK = 2**14  # contexts whose weights are in memory at once

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


class PrefixRouter:
    """Distances from the context of every token to the cluster centres.

    The embedding of a text is the L2-normalised sum, with repetition, of the vectors of its words; words are the
    matches of `(?u)\\b\\w\\w+\\b` in the lower-cased text, and those outside the vocabulary count for nothing.
    An embedding that sums to zero, as that of an empty context does, stays zero.

    Args:
        vocabulary: Row of each word in `word_vectors`; lower-case words without stop words and numbers.
        word_vectors: Vector of each word (inverse document frequency times SVD components), shape (V, d).
        centers: Cluster centres, shape (k, d).

    Raises:
        DataError: If the shapes disagree, a row lies outside of `word_vectors`, or a centre is not finite.
    """

    def __init__(self, vocabulary: Mapping[str, int], word_vectors: Floats, centers: Floats) -> None:
        if word_vectors.ndim != 2 or centers.ndim != 2 or word_vectors.shape[1] != centers.shape[1]:
            raise DataError(
                f"word_vectors of shape {word_vectors.shape} and centers of shape {centers.shape} do not fit; "
                "expected (words, dimensions) and (clusters, dimensions) of the same clusterer"
            )
        rows = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(vocabulary))
        if len(rows) and (rows.min() < 0 or rows.max() >= len(word_vectors)):
            raise DataError(
                f"the vocabulary names rows {rows.min()} to {rows.max()}, word_vectors has {len(word_vectors)}; "
                "take both from the same clusterer"
            )
        if not np.isfinite(centers).all():
            raise DataError("centers holds values that are not finite; fit the clusterer again")
        self._vocabulary = vocabulary
        self._longest_word = max(map(len, vocabulary), default=0)
        self._word_vectors = word_vectors
        self._centers = centers.astype(np.float64)

    def distances(self, text: str, starts: Integers) -> NDArray[np.float32]:
        """Distance of each context `text[:start]` to every centre.

        Time is O(characters + (words + t) * d + t * k * d), memory 8 * d bytes per word and per start. Text after
        the last start is not looked at.

        Args:
            text: The document.
            starts: Offset in characters at which each token starts, shape (t,), integers in any order.

        Returns:
            Euclidean (not squared) distances of shape (t, k).

        Raises:
            DataError: If `starts` is not a vector of integers in [0, len(text)].
        """
        _check_starts(text, starts)
        return self._distances_of(self._context_sums(text, starts.astype(np.int64)))

    def stream(self) -> StreamingRouter:
        """A router of a text that is still being written, with nothing read yet."""
        return StreamingRouter(
            self._vocabulary,
            self._word_vectors,
            longest_word=self._longest_word,
            distances_of=self._distances_of,
        )

    def subset(self, clusters: Sequence[int]) -> "PrefixRouter":
        """A router to some of the clusters, its columns in the order of `clusters`; it shares the word vectors.

        Raises:
            ConfigError: If `clusters` is empty, repeats one, or names one that there is not.
        """
        wrong = [cluster for cluster in clusters if not 0 <= cluster < self.n_clusters]
        if not clusters or wrong or len(set(clusters)) < len(clusters):
            raise ConfigError(
                f"clusters={list(clusters)} is no choice of the {self.n_clusters} clusters; "
                f"name one or more of 0 to {self.n_clusters - 1}, each once"
            )
        router = copy.copy(self)
        router._centers = self._centers[list(clusters)]
        return router

    @property
    def n_clusters(self) -> int:
        """Number of centres, k."""
        return len(self._centers)

    def _distances_of(self, sums: NDArray[np.float64]) -> NDArray[np.float32]:
        """Distances (t, k) of sums of word vectors (t, d)."""
        norms = np.sqrt(np.einsum("td,td->t", sums, sums))[:, np.newaxis]  # (t, 1)
        unit = np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0)
        squared = (norms > 0) - 2 * self._products(unit) + np.square(self._centers).sum(axis=1)  # (t, k)
        # Rounding can leave -1e-16 for a context that coincides with a centre.
        distances: NDArray[np.float32] = np.sqrt(np.maximum(squared, 0)).astype(np.float32)
        return distances

    def _products(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inner product of each vector (t, d) with each centre, shape (t, k)."""
        products = np.empty((len(vectors), len(self._centers)))
        step = max(1, _SERIAL_PRODUCT // max(1, self._centers.size))
        for begin in range(0, len(vectors), step):
            np.matmul(vectors[begin : begin + step], self._centers.T, out=products[begin : begin + step])
        return products

    def _context_sums(self, text: str, starts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Sum of the word vectors of `text[:start]` for each start, shape (t, d)."""
        text = text[: starts.max(initial=0)]
        text, starts = _spell_out_expansions(text, starts)
        lowered = text.lower()
        spans = np.array([match.span() for match in _WORD.finditer(lowered)], dtype=np.int64).reshape(-1, 2)
        begins, ends = spans[:, 0], spans[:, 1]
        rows = self._rows([lowered[begin:end] for begin, end in spans.tolist()])
        known = rows >= 0
        running = np.zeros((np.count_nonzero(known) + 1, self._word_vectors.shape[1]))
        np.cumsum(self._word_vectors[rows[known]], axis=0, dtype=np.float64, out=running[1:])
        known_before = np.concatenate([[0], np.cumsum(known)])

        whole_words = np.searchsorted(ends, starts, side="right")  # (t,)
        sums: NDArray[np.float64] = running[known_before[whole_words]]
        self._add_cut_words(sums, lowered, starts, begins, whole_words)
        if SIGMA in text:
            self._correct_sigmas(sums, text, lowered, starts, spans)
        return sums

    def _add_cut_words(
        self,
        sums: NDArray[np.float64],
        lowered: str,
        starts: NDArray[np.int64],
        begins: NDArray[np.int64],
        whole_words: NDArray[np.int64],
    ) -> None:
        """Add to `sums` the beginning of the word that each context cuts, where that is itself a word."""
        # The word after the whole ones; the sentinel stands for none, and lies beyond every start.
        begin = np.append(begins, len(lowered) + 1)[whole_words]  # (t,)
        length = starts - begin
        # A piece longer than every word is not looked up, so a very long run of letters stays linear.
        cut = np.flatnonzero((length >= 2) & (length <= self._longest_word))
        pieces = zip(begin[cut].tolist(), starts[cut].tolist(), strict=True)
        rows = self._rows([lowered[a:b] for a, b in pieces])
        sums[cut[rows >= 0]] += self._word_vectors[rows[rows >= 0]]

    def _correct_sigmas(
        self,
        sums: NDArray[np.float64],
        text: str,
        lowered: str,
        starts: NDArray[np.int64],
        spans: NDArray[np.int64],
    ) -> None:
        """Replace in `sums` the words whose sigma is final in the context but not in the whole text."""
        order = np.argsort(starts, kind="stable")
        ordered = starts[order]
        for sigma, until in _unsettled_sigmas(text, lowered):
            word = np.searchsorted(spans[:, 1], sigma, side="right")
            if word == len(spans) or spans[word, 0] > sigma:
                continue  # a word of one letter in the whole text, hence in every context
            begin, end = spans[word].tolist()
            first, last = np.searchsorted(ordered, [sigma, until], side="right")
            for position in order[first:last].tolist():
                stop = min(end, int(starts[position]))
                if 2 <= stop - begin <= self._longest_word:
                    before, after = lowered[begin:sigma], lowered[sigma + 1 : stop]
                    sums[position] += self._vector(before + FINAL + after)
                    sums[position] -= self._vector(before + MEDIAL + after)

    def _rows(self, words: list[str]) -> NDArray[np.int64]:
        """Row of each word in the word vectors, -1 for words outside of the vocabulary."""
        get = self._vocabulary.get
        return np.fromiter((get(word, -1) for word in words), dtype=np.int64, count=len(words))

    def _vector(self, word: str) -> NDArray[np.float64]:
        row = self._vocabulary.get(word)
        if row is None:
            return np.zeros(self._word_vectors.shape[1])
        vector: NDArray[np.float64] = self._word_vectors[row].astype(np.float64)
        return vector


def context_positions(
    n_tokens: int,
    *,
    prompt: int = 0,
    refresh: int | Literal["once"] = 1,
    context_ratio: float = 1.0,
    lag: int = 0,
) -> NDArray[np.int64]:
    """Which context the weights of each scored token of a document come from.

    A row of tokens has one that is given and n_tokens that are scored; token i in 1..n_tokens is predicted after the
    text before it, which is context i: `text[:starts[i]]`, with the starts of all n_tokens + 1 tokens. The rules apply
    in this order: `refresh`, `context_ratio`, `lag`.

    Args:
        n_tokens: Scored tokens, the prompt's included.
        prompt: Leading scored tokens that do not count; `refresh` leaves theirs alone and counts from the first token
            behind them.
        refresh: Tokens that share their weights: those of the first of them. "once" keeps the weights of the first
            token behind the prompt to the end.
        context_ratio: Part of the document after which the weights stay as they are, at least one token.
        lag: Tokens before token i that its weights do not see. 0 uses all text before the token; 1 leaves out the
            last token before it, as the code released with the paper does.

    Returns:
        Indices into `starts` for the tokens 1 to n_tokens, shape (n_tokens,).

    Raises:
        ConfigError: If `refresh`, `context_ratio` or `lag` is out of its range.
        DataError: If `prompt` is not in [0, n_tokens].
    """
    if refresh != "once" and refresh < 1:
        raise ConfigError(f'refresh={refresh} is not a number of tokens; use 1 or more, or "once"')
    if not 0 < context_ratio <= 1:
        raise ConfigError(f"context_ratio={context_ratio} is not in (0, 1]; use 1 for the whole document")
    if lag < 0:
        raise ConfigError(f"lag={lag} would show a token to its own weights; use 0, or 1 for the reference's")
    if not 0 <= prompt <= n_tokens:
        raise DataError(
            f"prompt={prompt} is not in [0, {n_tokens}]; count only tokens of this document that are scored"
        )
    positions = np.arange(1, n_tokens + 1)
    first = 1 + prompt
    behind = positions[prompt:]  # a view
    behind -= behind - first if refresh == "once" else (behind - first) % refresh
    frozen = max(1, int(context_ratio * n_tokens))
    contexts: NDArray[np.int64] = np.maximum(np.minimum(positions, frozen) - lag, 0)
    return contexts


def routing_weights(
    distances: Floats, *, temperature: float, distance_power: float = 2, top_k: int | None = None
) -> NDArray[np.float64]:
    """Weight each expert by how near its cluster is to the context: exp(-distance^power / temperature).

    Args:
        distances: Euclidean distances from contexts to centres, shape (..., k).
        temperature: Divisor of distance^power; smaller is more selective.
        distance_power: 2 as in the paper, 4 as in the code released with it.
        top_k: Experts kept, the nearest ones, ties to the lowest index; the others get weight exactly 0 and the
            rest renormalise. None keeps all.

    Returns:
        Weights of the same shape, summing to 1 along the last axis.

    Raises:
        ConfigError: If `temperature` or `distance_power` is not positive and finite, or `top_k` is not in [1, k].
        DataError: If there is no expert, or a distance is negative or, raised to the power, not finite.
    """
    for name, value in (("temperature", temperature), ("distance_power", distance_power)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"{name}={value} is not a positive finite number; the usual value is "
                f"{0.1 if name == 'temperature' else 2}"
            )
    if distances.ndim == 0 or distances.shape[-1] == 0:
        raise DataError(f"distances of shape {distances.shape} name no expert; expected (..., experts)")
    n_experts = distances.shape[-1]
    if top_k is not None and not 1 <= top_k <= n_experts:
        raise ConfigError(f"top_k={top_k} is not in [1, {n_experts}], the number of experts; use None for all")
    with np.errstate(over="ignore", invalid="ignore"):
        energy = distances.astype(np.float64) ** distance_power
    if not np.isfinite(energy).all() or (distances < 0).any():
        raise DataError(
            f"distances must be finite and not negative, also raised to distance_power={distance_power}; "
            f"they run from {distances.min()} to {distances.max()}"
        )
    # The nearest expert gets exp(0), so nothing underflows to a row of zeros; a quotient of inf is weight 0.
    energy -= energy.min(axis=-1, keepdims=True)
    with np.errstate(over="ignore"):
        weights: NDArray[np.float64] = np.exp(-(energy / temperature))
    if top_k is not None and top_k < n_experts:
        weights[~_nearest(distances, top_k)] = 0
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def mean_routing_weights(
    distances: Floats, chosen: NDArray[np.bool_], *, temperature: float, distance_power: float = 2
) -> NDArray[np.float64]:
    """Mean of `routing_weights` over tokens: a prior that does not depend on the context.

    Args:
        distances: Euclidean distances from contexts to centres, shape (t, k); may be a memory map.
        chosen: The tokens that count, shape (t,).
        temperature: As for `routing_weights`.
        distance_power: As for `routing_weights`.

    Returns:
        Weights of shape (k,), summing to 1.

    Raises:
        ConfigError: As for `routing_weights`.
        DataError: As for `routing_weights`, or if no token is chosen.
    """
    tokens = np.flatnonzero(chosen)
    if not len(tokens):
        raise DataError(f"none of the {len(distances)} tokens is chosen, so there are no weights to take the mean of")
    total = np.zeros(distances.shape[-1])
    for begin in range(0, len(tokens), _BLOCK):
        block = np.asarray(distances[tokens[begin : begin + _BLOCK]])
        total += routing_weights(block, temperature=temperature, distance_power=distance_power).sum(axis=0)
    mean: NDArray[np.float64] = total / len(tokens)
    return mean


def _nearest(distances: Floats, count: int) -> NDArray[np.bool_]:
    """Mark the `count` smallest distances of each row, ties to the lowest index."""
    # One selection instead of a sort: at 128 experts a stable argsort is the slowest part of an evaluation.
    limit = np.partition(distances, count - 1, axis=-1)[..., count - 1 : count]
    nearer = distances < limit
    tied = distances == limit
    places = count - nearer.sum(axis=-1, keepdims=True)
    kept: NDArray[np.bool_] = nearer | (tied & (tied.cumsum(axis=-1) <= places))
    return kept


def _check_starts(text: str, starts: Integers) -> None:
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise DataError(f"starts has shape {starts.shape} and dtype {starts.dtype}; expected a vector of integers")
    if len(starts) and (starts.min() < 0 or starts.max() > len(text)):
        raise DataError(
            f"starts run from {starts.min()} to {starts.max()}, the text has {len(text)} characters; "
            "give offsets in characters, not in bytes, of this text"
        )


def _spell_out_expansions(text: str, starts: NDArray[np.int64]) -> tuple[str, NDArray[np.int64]]:
    """Replace characters whose lower case is longer, so that `lower()` keeps every position; move the starts."""
    if len(text.lower()) == len(text):
        return text, starts
    pieces = [char if len(lower := char.lower()) == 1 else lower for char in text]
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    return "".join(pieces), offsets[starts]


def _unsettled_sigmas(text: str, lowered: str) -> Iterator[tuple[int, int]]:
    """Capital sigmas that are final in some prefixes only, as (position, until).

    A sigma is final if a cased character precedes it and none follows, case-ignorable ones being skipped both
    ways (Unicode, Final_Sigma). So one that has a cased character before and after it is final in just those
    prefixes that end after it and not beyond the first character that is not ignorable, at `until`.
    """
    for match in re.finditer(SIGMA, text):
        sigma = match.start()
        if lowered[sigma] == FINAL:
            continue  # nothing cased follows in the whole text, so nothing does in a prefix
        before = sigma - 1
        while before >= 0 and is_case_ignorable(text[before]):
            before -= 1
        if before < 0 or not is_cased(text[before]):
            continue
        until = sigma + 1
        while until < len(text) and is_case_ignorable(text[until]):
            until += 1
        yield sigma, until
