"""How many clusters: several k fitted to the same vectors and set side by side.

Inertia falls with every further cluster and says little alone. Stability says more: fits on different random two
thirds of the documents, from different seeds, label all documents, and the labelings are compared in pairs by the
adjusted Rand index (Hubert and Arabie 1985, doi 10.1007/BF01908075; 0 is chance, 1 the same partition). Clusters that
come back whatever the sample are structure of the corpus; those that do not are cuts through it. The idea and its
limits are surveyed by von Luxburg (2010, arXiv 1007.1075). `suggest` states the rule that turns the table into one k.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.kmeans import balanced_kmeans, nearest_centers
from cbtm.errors import ConfigError, DataError

RESAMPLED_PART = 2 / 3
"""Part of the documents that each of the repeated fits sees: any two then share at least a third of them."""
LEAST_STABILITY = 0.9
"""Below this, no k is suggested. The eight domains of our test corpus reach 0.99, points without structure 0.02."""
STABILITY_TOLERANCE = 0.02
"""Differences of stability that count as none, however small the spread."""
LARGEST_BALANCE = 3.0
"""A k whose largest greedy cluster has more than this many times the documents of its smallest is not suggested."""

_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Candidate:
    """What fits with one number of clusters look like.

    Attributes:
        n_clusters: k.
        inertia: Mean squared distance of the fit's documents to their centres under the balanced assignment.
        greedy_inertia: Mean squared distance of all documents to their nearest centres.
        balance: Documents of the largest greedy cluster over those of the smallest; infinite where one is empty.
        stability: Mean adjusted Rand index between the labelings of the resampled fits, 1 at most.
        stability_spread: Standard deviation of that index over the pairs of fits; 0 for a single pair.
        nmi: Normalised mutual information of greedy clusters and true labels; None without labels.
        seconds: Wall time of the fit, without the resampled ones.
    """

    n_clusters: int
    inertia: float
    greedy_inertia: float
    balance: float
    stability: float
    stability_spread: float
    nmi: float | None
    seconds: float


def compare_k(
    vectors: NDArray[np.float32],
    ks: Sequence[int],
    *,
    repeats: int = 3,
    random_state: int,
    max_documents_per_fit: int = 50_000,
    true_labels: Sequence[str] | Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Fit every k once on all documents and `repeats` times on random parts of them.

    The parts are the same for every k, and the row of one k does not depend on the others asked for.

    Args:
        vectors: Embedded documents, float32, shape (n, d).
        ks: Numbers of clusters, each 2 or more; doubles are dropped.
        repeats: Resampled fits per k, 2 or more; they give repeats * (repeats - 1) / 2 pairs.
        random_state: Seed of the samples and of k-means.
        max_documents_per_fit: A fit sees a random sample of this many documents at most; all n are labelled.
        true_labels: One label per document, for `nmi`; they take no part in the fits or in the suggestion.
        progress: Called with the fits done and the fits in all, after each.

    Returns:
        One candidate per k, in ascending order.

    Raises:
        ConfigError: If a setting is out of its range, or a k exceeds the documents of a resampled fit.
        DataError: If `vectors` is not a finite matrix, or the number of labels differs from n.
    """
    vectors = _checked_vectors(vectors)
    if true_labels is not None and len(true_labels) != len(vectors):
        raise DataError(f"{len(true_labels)} labels for {len(vectors)} documents; pass one per document")
    n_resampled = min(max_documents_per_fit, math.floor(RESAMPLED_PART * len(vectors)))
    ks = _checked_ks(ks, n_resampled, repeats, random_state, max_documents_per_fit)
    n_fits = len(ks) * (1 + repeats)
    done = itertools.count(1)

    def report() -> None:
        if progress is not None:
            progress(next(done), n_fits)

    sample = _draw(vectors, min(max_documents_per_fit, len(vectors)), np.random.default_rng([random_state, 0]))
    candidates = []
    for k in ks:
        started = time.perf_counter()
        fit = balanced_kmeans(sample, k, random_state=random_state)
        seconds = time.perf_counter() - started
        labels, greedy_inertia = _greedy(vectors, fit.cluster_centers_)
        report()
        stability, spread = _stability(vectors, k, n_resampled, repeats, random_state, report)
        candidates.append(
            Candidate(
                n_clusters=k,
                inertia=fit.inertia_ / len(sample),
                greedy_inertia=greedy_inertia,
                balance=_balance(labels, k),
                stability=stability,
                stability_spread=spread,
                nmi=None if true_labels is None else _nmi(true_labels, labels),
                seconds=seconds,
            )
        )
    return candidates


def suggest(candidates: Sequence[Candidate]) -> int | None:
    """The largest k that is as stable as the most stable one, and not lopsided; None where there is no clear answer.

    As stable means within `STABILITY_TOLERANCE`, or within the spread of the most stable k where that is wider; the
    spread of a k never speaks for that k itself, so an erratic one gains nothing by it. The largest such k is taken
    because every domain split off at no loss of stability gives an expert of its own. Two clusters are judged apart:
    one strong direction (code against prose) makes k = 2 repeatable in most corpora, so it sets no bar for the others
    and is suggested only where none of them reaches `LEAST_STABILITY`.

    None where no k with a balance of at most `LARGEST_BALANCE` reaches `LEAST_STABILITY`: the documents then fall into
    no number of clusters that another sample would find again, and k is a matter of budget.

    Limits: domains of very different size are cut or joined by balanced clusters, so their number may be unstable;
    where coarse and fine domains are nested, the level that happens to be the more stable wins; a stable k proves
    clusters that come back, not that experts on them are better. A k that was not tried is never suggested.
    """
    reliable = [row for row in _even(candidates) if row.stability >= LEAST_STABILITY]
    many = [row for row in reliable if row.n_clusters > 2]
    if not many:
        return 2 if reliable else None
    best = max(many, key=lambda row: row.stability)
    bar = best.stability - max(STABILITY_TOLERANCE, best.stability_spread)
    return max(row.n_clusters for row in many if row.stability >= bar)


def explain(candidates: Sequence[Candidate], suggested: int | None) -> str:
    """One sentence for people: what `suggest` found, or why it found nothing."""
    if not candidates:
        return "No k is suggested: none was tried."
    if suggested is None:
        even = _even(candidates)
        if not even:
            return f"No k is suggested: every one gives a cluster over {LARGEST_BALANCE:g} times as large as another."
        best = max(even, key=lambda row: row.stability)
        return (
            f"No k is suggested: of the ks with even clusters, k = {best.n_clusters} is the most stable at "
            f"{best.stability:.2f}, and below {LEAST_STABILITY:g} another sample gives other clusters."
        )
    if suggested == 2 and len(candidates) > 1:
        return "k = 2 is suggested: no larger k that was tried gives even clusters that another sample finds again."
    sentence = f"k = {suggested} is suggested: the largest k about as stable as the most stable one."
    if suggested == max(row.n_clusters for row in candidates):
        return sentence + " It is also the largest tried, so larger ones may do as well."
    return sentence


def format_candidates(candidates: Sequence[Candidate], suggested: int | None) -> str:
    """The table (ASCII, a row per k, the suggested one marked) and the sentence of `explain`, for a terminal."""
    with_nmi = any(candidate.nmi is not None for candidate in candidates)
    cells = [["k", "inertia", "greedy", "balance", "stability", "spread", *(["NMI"] if with_nmi else []), "seconds"]]
    for row in candidates:
        nmi = ["-" if row.nmi is None else f"{row.nmi:.3f}"] if with_nmi else []
        cells.append(
            [
                f"{'* ' if row.n_clusters == suggested else ''}{row.n_clusters}",
                f"{row.inertia:.4f}",
                f"{row.greedy_inertia:.4f}",
                f"{row.balance:.2f}",
                f"{row.stability:.3f}",
                f"{row.stability_spread:.3f}",
                *nmi,
                f"{row.seconds:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([*lines, explain(candidates, suggested)])


def candidates_json(candidates: Sequence[Candidate], suggested: int | None) -> dict[str, Any]:
    """The comparison as plain data for JSON; an infinite balance becomes None."""
    rows = [asdict(candidate) for candidate in candidates]
    for row in rows:
        row["balance"] = row["balance"] if math.isfinite(row["balance"]) else None
    return {"candidates": rows, "suggested": suggested, "reason": explain(candidates, suggested)}


def _even(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [row for row in candidates if row.balance <= LARGEST_BALANCE]


def _checked_vectors(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2:
        raise DataError(f"vectors has shape {vectors.shape}; pass a matrix of (documents, dimensions)")
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise DataError(f"row {row} of vectors is not finite; remove or mend this document")
    return vectors


def _checked_ks(
    ks: Sequence[int], n_resampled: int, repeats: int, random_state: int, max_documents_per_fit: int
) -> list[int]:
    for name, value, least in (
        ("repeats", repeats, 2),
        ("random_state", random_state, 0),
        ("max_documents_per_fit", max_documents_per_fit, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} is too small; use at least {least}")
    if not ks:
        raise ConfigError("ks is empty; name at least one number of clusters")
    if min(ks) < 2:
        raise ConfigError(f"k={min(ks)} has nothing to compare; use at least 2")
    if max(ks) > n_resampled:
        raise ConfigError(
            f"k={max(ks)} is larger than the {n_resampled} documents of a resampled fit (two thirds of all, at most "
            f"max_documents_per_fit={max_documents_per_fit}); use at most {n_resampled}"
        )
    return sorted(set(ks))


def _draw(vectors: NDArray[np.float32], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """`size` different rows in their order; all of them without a copy."""
    if size == len(vectors):
        return vectors
    return vectors[np.sort(rng.choice(len(vectors), size, replace=False))]


def _greedy(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> tuple[NDArray[np.int32], float]:
    """Nearest centre of every row, int32, shape (n,), and the mean squared distance to it."""
    labels = nearest_centers(vectors, centers)
    total = 0.0
    for start in range(0, len(vectors), _BLOCK_ROWS):
        offsets = vectors[start : start + _BLOCK_ROWS] - centers[labels[start : start + _BLOCK_ROWS]]
        total += float(np.vdot(offsets, offsets))
    return labels, total / len(vectors)


def _balance(labels: NDArray[np.int32], n_clusters: int) -> float:
    sizes = np.bincount(labels, minlength=n_clusters)
    return math.inf if sizes.min() == 0 else float(sizes.max() / sizes.min())


def _stability(
    vectors: NDArray[np.float32],
    n_clusters: int,
    n_resampled: int,
    repeats: int,
    random_state: int,
    report: Callable[[], None],
) -> tuple[float, float]:
    """Mean and standard deviation of the adjusted Rand index over the pairs of resampled fits."""
    from sklearn.metrics import adjusted_rand_score

    labelings = []
    for repeat in range(1, repeats + 1):
        rng = np.random.default_rng([random_state, repeat])
        sample = _draw(vectors, n_resampled, rng)
        fit = balanced_kmeans(sample, n_clusters, random_state=int(rng.integers(2**31)))
        labelings.append(nearest_centers(vectors, fit.cluster_centers_))
        report()
    indices = [float(adjusted_rand_score(one, other)) for one, other in itertools.combinations(labelings, 2)]
    return float(np.mean(indices)), float(np.std(indices, ddof=1)) if len(indices) > 1 else 0.0


def _nmi(true_labels: Sequence[str] | Sequence[int], labels: NDArray[np.int32]) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(true_labels, labels))
