"""How sure a perplexity is: percentile bootstraps over documents, for many models and settings on the same draws.

Documents are the unit that was sampled; tokens of one document are not independent. Each resample draws as many
documents as there are, with replacement, and takes exp(sum of nll / sum of tokens). In the paired form both sides are
taken on the same resample, so what makes a document hard for both cancels (Koehn 2004, "Statistical significance tests
for machine translation evaluation").

A resample is a vector of counts, so that a chunk of them and the sums of all settings are one matrix product. Ends of
intervals are order statistics, not interpolated: between a finite perplexity and an infinite one there is nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError

# 32 MiB of counts for each chunk of resamples.
_CHUNK_ELEMENTS = 2**22

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]
Array = NDArray[np.float64]


class Resamples:
    """Bootstrap resamples of one set of documents; the same for all that is measured with it.

    Args:
        document_tokens: Tokens that count of each document, shape (n_docs,), at least 1 each.
        random_state: Seed of the resampling.
        n_resamples: Resamples drawn.
        level: Coverage of the intervals, in (0, 1).

    Raises:
        ConfigError: If `n_resamples` or `level` is out of range.
        DataError: If there are fewer than two documents, or one has no token.
    """

    def __init__(
        self, document_tokens: Integers, *, random_state: int, n_resamples: int = 1000, level: float = 0.95
    ) -> None:
        if n_resamples < 1:
            raise ConfigError(f"n_resamples={n_resamples} is below 1; 1000 is usual")
        if not 0 < level < 1:
            raise ConfigError(f"level={level} is not between 0 and 1; 0.95 is usual")
        if document_tokens.ndim != 1:
            raise DataError(f"document_tokens of shape {document_tokens.shape}; expected (documents,)")
        if len(document_tokens) < 2:
            raise DataError(f"{len(document_tokens)} documents; an interval over documents takes at least 2")
        if (document_tokens < 1).any():
            raise DataError(
                f"document {np.flatnonzero(document_tokens < 1)[0]} has {document_tokens[document_tokens < 1][0]} "
                "scored tokens; leave out documents in which no token is scored"
            )
        self._tokens = document_tokens.astype(np.float64)  # exact below 2^53
        self._random_state, self._n_resamples, self._level = random_state, n_resamples, level

    def intervals(self, nll: Floats) -> Array:
        """Intervals of perplexities.

        Args:
            nll: Sums of negative natural log-probabilities of each document, shape (n_settings, n_docs); inf is
                allowed.

        Returns:
            Lower and upper ends, shape (n_settings, 2), each the perplexity of a resample.

        Raises:
            DataError: If `nll` does not fit the documents, or holds NaN or values below 0.
        """
        return self._percentiles(self._checked(nll, "nll"))

    def ratio_intervals(self, nll: Floats, base: Floats) -> Array:
        """Intervals of perplexity / perplexity of the base, on the same documents each time.

        An interval below 1 says that the base is worse.

        Args:
            nll: As in `intervals`, shape (n_settings, n_docs).
            base: The same of what is compared with, shape (n_docs,).

        Returns:
            Lower and upper ends of the ratio, shape (n_settings, 2).

        Raises:
            DataError: As in `intervals`, or if a setting and the base both find some token impossible.
        """
        sums, beside = self._checked(nll, "nll"), self._checked(base[np.newaxis], "base")
        if np.isinf(sums).any() and np.isinf(beside).any():
            raise DataError("both sides find some token impossible, so the ratio of their perplexities is undefined")
        return self._percentiles(sums - beside)

    def _percentiles(self, nll: Array) -> Array:
        """Ends of the central part of exp(sum of nll / sum of tokens) over the resamples."""
        infinite = np.isinf(nll)
        finite = np.where(infinite, 0, nll)  # 0 drawings of an infinite document are 0, not NaN
        sign = np.where((nll == -np.inf).any(axis=1), -np.inf, np.inf)
        some = np.flatnonzero(infinite.any(axis=1))
        rates = np.empty((self._n_resamples, len(nll)))
        done = 0
        for counts in self._counts():
            part = rates[done : done + len(counts)]
            np.matmul(counts, finite.T, out=part)
            part /= (counts @ self._tokens)[:, np.newaxis]
            drawn = counts @ infinite[some].T.astype(np.float64) > 0
            part[:, some] = np.where(drawn, sign[some], part[:, some])
            done += len(counts)
        rates.sort(axis=0)
        tail = math.floor((1 - self._level) / 2 * (self._n_resamples - 1))
        with np.errstate(over="ignore"):
            ends: Array = np.exp(rates[[tail, self._n_resamples - 1 - tail]].T)
        return ends

    def _counts(self) -> Iterator[Array]:
        """How often each document is drawn, shape (resamples of a chunk, n_docs), the same at every call."""
        rng = np.random.default_rng(self._random_state)
        n_documents = len(self._tokens)
        step = max(1, _CHUNK_ELEMENTS // n_documents)
        for begin in range(0, self._n_resamples, step):
            n_rows = min(step, self._n_resamples - begin)
            drawn = rng.integers(n_documents, size=(n_rows, n_documents))
            drawn += n_documents * np.arange(n_rows)[:, np.newaxis]
            counts = np.bincount(drawn.ravel(), minlength=n_rows * n_documents)
            yield counts.reshape(n_rows, n_documents).astype(np.float64)

    def _checked(self, nll: Floats, name: str) -> Array:
        if nll.ndim != 2 or nll.shape[1] != len(self._tokens):
            raise DataError(
                f"{name} of shape {nll.shape}, document_tokens of shape {self._tokens.shape}; expected sums of each "
                "document along the last axis"
            )
        values = nll.astype(np.float64)
        wrong = ~(values >= 0)
        if wrong.any():
            row, document = (int(found[0]) for found in np.nonzero(wrong))
            raise DataError(
                f"{name} is {values[row, document]} for document {document}; expected sums of negative "
                "log-probabilities, at least 0"
            )
        return values


def bootstrap_interval(
    document_nll: Floats,
    document_tokens: Integers,
    *,
    random_state: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of one perplexity; see `Resamples.intervals`. `document_nll` has shape (n_docs,)."""
    resamples = Resamples(document_tokens, random_state=random_state, n_resamples=n_resamples, level=level)
    low, high = resamples.intervals(document_nll[np.newaxis])[0].tolist()
    return low, high


def paired_bootstrap_interval(
    nll_a: Floats,
    nll_b: Floats,
    document_tokens: Integers,
    *,
    random_state: int,
    n_resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of perplexity a / perplexity b; see `Resamples.ratio_intervals`. Both have shape (n_docs,)."""
    resamples = Resamples(document_tokens, random_state=random_state, n_resamples=n_resamples, level=level)
    low, high = resamples.ratio_intervals(nll_a[np.newaxis], nll_b)[0].tolist()
    return low, high
