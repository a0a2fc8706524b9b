"""The text of a document as the router sees it: which expert each piece falls to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LONGEST = 1500
"""Characters of a document that are shown."""


def routed_pieces(
    text: str,
    starts: NDArray[np.integer[Any]],
    weights: NDArray[np.floating[Any]],
    clusters: Sequence[int],
    *,
    longest: int = LONGEST,
) -> list[tuple[str, int, float]]:
    """Cut a text where the expert with the largest weight changes.

    Args:
        text: The document.
        starts: Character at which each scored token begins, ascending, shape (n,).
        weights: Weight of each expert at each scored token, shape (n, k).
        clusters: Cluster of each expert.
        longest: Most characters that are cut up; a token that reaches beyond is left out.

    Returns:
        Pieces of text in order, each with the cluster of its expert and the mean weight of that over the piece's
        tokens. Together they are the text from the first scored token on.
    """
    ends = np.append(starts[1:], len(text)).astype(np.int64)
    best = weights.argmax(axis=1)
    pieces: list[tuple[str, int, float]] = []
    first = 0
    last = int(np.searchsorted(ends, longest, side="right"))
    for token in range(1, last + 1):
        if token == last or best[token] != best[first]:
            piece = text[int(starts[first]) : int(ends[token - 1])]
            if piece:  # tokens may be parts of one character
                pieces.append((piece, int(clusters[best[first]]), float(weights[first:token, best[first]].mean())))
            first = token
    return pieces


def spread(clusters: NDArray[np.integer[Any]], reported: NDArray[np.bool_], count: int = 3) -> list[int]:
    """Places of reported documents of different domains: the first of each of `count` evenly spaced domains.

    Args:
        clusters: Nearest cluster of each document, shape (n,).
        reported: Which documents are reported on, shape (n,).
        count: Documents wanted; fewer where there are fewer domains.
    """
    domains = np.unique(clusters[reported])
    chosen = domains[np.unique(np.linspace(0, len(domains) - 1, min(count, len(domains))).round().astype(np.int64))]
    return [int(np.flatnonzero(reported & (clusters == domain))[0]) for domain in chosen]
