"""What a clusterer found, for people: sizes, typical and borderline documents, neighbours, a map, agreement.

A description reads the vectors of the fit once, block by block, and holds a few numbers for each cluster besides.
Two assignments of the fit's documents are told apart: the balanced one, which placed the centres, and that to the
nearest centre, which the assigner uses.

The map is drawn by stress majorisation (Gansner, Koren and North 2004), which asks that each distance on it be right
in proportion to its length, and starts at the principal components of the centres. These alone spend both axes on the
few domains that lie farthest out and put the rest, in a space of a hundred dimensions, on one spot; and unlike t-SNE
or UMAP the same centres give the same picture. By how much its distances are wrong is part of the description.

A document without a counted word has the zero vector. It is counted, but shown nowhere: a wide cluster's centre is
shorter than its documents are far from it, so that documents which say nothing would be its most typical ones.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.kmeans import squared_distances
from cbtm.errors import DataError

DOMAINS_FORMAT = 2
"""The version of domains.json that `describe_domains` makes."""

_BLOCK_ROWS = 4096  # with 128 clusters, 2 MiB of distances
_NEIGHBOURS = 3
_MAP_ROUNDS = 200
_LABELS_SHOWN = 3
_DECIMALS = 4  # distances are float32 and near 1; more digits would be noise

Vectors = NDArray[np.float32] | Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Snippet:
    """The start of one document: its identity, and its text cut to 600 characters."""

    sp_id: str
    text: str


def describe_domains(
    centers: NDArray[np.float32],
    vectors: Vectors,
    labels: NDArray[np.int32],
    snippet: Callable[[int], Snippet],
    top_terms: Sequence[Sequence[str]],
    *,
    n_examples: int = 3,
    true_labels: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Describe the clusters that a fit found.

    Args:
        centers: Centres, float32, shape (k, d).
        vectors: Vectors of the fit's documents, unit or zero rows, float32: an array or memmap of shape (n, d), or
            the blocks of its rows in order.
        labels: Balanced assignment of the fit, int32, shape (n,), from 0 to k - 1.
        snippet: Start of the document of a row; called for those that are shown alone.
        top_terms: Terms that set each cluster apart, best first.
        n_examples: Typical documents, and borderline ones, that are shown for each cluster.
        true_labels: What the corpus says of each document, None where it says nothing; for measuring only.

    Returns:
        The content of domains.json: "domains" with an entry for each cluster in order, "map" with the mean error
        of its distances as a part of each, "balance" of both assignments, "agreement" with the labels or None. All
        distances are Euclidean; the positions on the map are scaled so that the largest coordinate is 1.

    Raises:
        DataError: If the lengths differ, a label is no cluster, or labels were given and no document has one.
    """
    k = len(centers)
    _check(k, labels, top_terms)
    scan = _scan(np.asarray(centers, dtype=np.float32), vectors, labels, n_examples)
    agreement, by_label = _agreement(labels, scan.nearest, true_labels, k)
    (positions, error), neighbours = _map(centers), _neighbours(centers)
    fit_sizes, nearest_sizes = (np.bincount(found, minlength=k).tolist() for found in (labels, scan.nearest))
    domains = [
        {
            "cluster": cluster,
            "fit_documents": fit_sizes[cluster],
            "nearest_documents": nearest_sizes[cluster],
            "top_terms": list(top_terms[cluster]),
            "radius": scan.radii[cluster],
            "position": positions[cluster],
            "neighbours": neighbours[cluster],
            "labels": by_label[cluster],
            **_documents(cluster, scan, snippet),
        }
        for cluster in range(k)
    ]
    return {
        "format": DOMAINS_FORMAT,
        "domains": domains,
        "documents": len(labels),
        "without_words": scan.zero_rows,
        "map": {"method": "stress majorisation", "distance_error": error},
        "balance": {"fit": balance(fit_sizes), "nearest": balance(nearest_sizes)},
        "agreement": agreement,
    }


def _check(k: int, labels: NDArray[np.int32], top_terms: Sequence[Sequence[str]]) -> None:
    if len(top_terms) != k:
        raise DataError(f"top terms of {len(top_terms)} clusters were given with {k} centres; pass a list for each")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < k:
        raise DataError(f"labels run from {labels.min()} to {labels.max()}; expected 0 to {k - 1}")


def balance(sizes: Sequence[int]) -> dict[str, Any]:
    """Smallest and largest of the sizes and their ratio, which is None where a cluster is empty."""
    smallest, largest = min(sizes), max(sizes)
    return {"smallest": smallest, "largest": largest, "ratio": largest / smallest if smallest else None}


def agreement_of(counts: NDArray[np.int64]) -> dict[str, float]:
    """Normalised mutual information and purity of two partitions.

    Mutual information is divided by the mean of the two entropies, as scikit-learn does by default; partitions of
    one part each agree fully. Purity is the share of documents that carry the commonest label of their cluster.

    Args:
        counts: Documents of each cluster with each label, int64, shape (clusters, labels), not all zero.
    """
    joint = counts / counts.sum()  # (k, labels)
    of_cluster, of_label = joint.sum(axis=1), joint.sum(axis=0)
    entropies = _entropy(of_cluster) + _entropy(of_label)
    mutual = entropies - _entropy(joint.ravel())
    nmi = 1.0 if entropies == 0 else 2 * mutual / entropies
    return {"nmi": float(np.clip(nmi, 0.0, 1.0)), "purity": float(joint.max(axis=1).sum())}


def _entropy(shares: NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


# --- one pass over the vectors ---


@dataclass
class _Least:
    """The documents of least value in each cluster, kept while blocks pass; ties go to the earlier document."""

    size: int

    def __post_init__(self) -> None:
        self.clusters: NDArray[np.integer[Any]] = np.empty(0, dtype=np.int64)
        self.values: NDArray[np.floating[Any]] = np.empty(0, dtype=np.float64)
        self.rows: NDArray[np.integer[Any]] = np.empty(0, dtype=np.int64)
        self.others: NDArray[np.integer[Any]] = np.empty(0, dtype=np.int64)

    def add(
        self,
        clusters: NDArray[np.integer[Any]],
        values: NDArray[np.floating[Any]],
        rows: NDArray[np.integer[Any]],
        others: NDArray[np.integer[Any]],
    ) -> None:
        """Offer documents; all four of shape (documents,)."""
        clusters, values = np.append(self.clusters, clusters), np.append(self.values, values)
        rows, others = np.append(self.rows, rows), np.append(self.others, others)
        order = np.lexsort((rows, values, clusters))
        # Place of each within its cluster: its place in the order less that of the cluster's first.
        sorted_clusters = clusters[order]
        places = np.arange(len(order)) - np.searchsorted(sorted_clusters, sorted_clusters)
        kept = order[places < self.size]
        self.clusters, self.values, self.rows, self.others = clusters[kept], values[kept], rows[kept], others[kept]

    def of(self, cluster: int) -> list[tuple[int, float, int]]:
        """Row, value and other cluster of the documents kept for a cluster, least value first."""
        mine = self.clusters == cluster
        return list(zip(self.rows[mine].tolist(), self.values[mine].tolist(), self.others[mine].tolist(), strict=True))


@dataclass(frozen=True)
class _Scan:
    """What the pass over the vectors leaves behind.

    Attributes:
        nearest: Nearest centre of each document, int32, shape (n,).
        typical: Documents closest to the centre of the cluster that the fit put them in.
        borderline: Documents nearest to a centre and almost as near to another.
        radii: Mean distance of each cluster's documents to its centre; None without any.
        zero_rows: Documents without a counted word.
    """

    nearest: NDArray[np.int32]
    typical: _Least
    borderline: _Least
    radii: list[float | None]
    zero_rows: int


def _scan(centers: NDArray[np.float32], vectors: Vectors, labels: NDArray[np.int32], n_examples: int) -> _Scan:
    k, n = len(centers), len(labels)
    typical, borderline = _Least(n_examples), _Least(n_examples)
    sums, counts = np.zeros(k), np.zeros(k, dtype=np.int64)
    nearest = np.empty(n, dtype=np.int32)
    start = 0
    for block in _blocks(vectors):
        end = start + len(block)
        if end > n:
            raise DataError(f"there are more vectors than the {n} labels; pass one label for each vector")
        squared = squared_distances(block, centers)  # (block, k)
        nearest[start:end] = squared.argmin(axis=1)
        own = labels[start:end]
        rows = start + np.flatnonzero(block.any(axis=1))
        within = rows - start
        distances = np.sqrt(squared[within, own[within]], dtype=np.float64)
        typical.add(own[within], distances, rows, own[within])
        sums += np.bincount(own[within], weights=distances, minlength=k)
        counts += np.bincount(own[within], minlength=k)
        if k > 1:
            margins, seconds = _margins(squared[within], nearest[rows])
            borderline.add(nearest[rows], margins, rows, seconds)
        start = end
    if start != n:
        raise DataError(f"there are {start} vectors and {n} labels; pass one label for each vector")
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    radii = [round(total / count, _DECIMALS) if count else None for total, count in pairs]
    return _Scan(nearest, typical, borderline, radii, n - int(counts.sum()))


def _blocks(vectors: Vectors) -> Iterator[NDArray[np.float32]]:
    arrays = [vectors] if isinstance(vectors, np.ndarray) else vectors
    for array in arrays:
        for start in range(0, len(array), _BLOCK_ROWS):
            yield np.asarray(array[start : start + _BLOCK_ROWS], dtype=np.float32)


def _margins(squared: NDArray[np.float32], nearest: NDArray[np.int32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """How much farther the second centre is than the nearest, and which it is; both of shape (n,)."""
    rows = np.arange(len(squared))
    first = np.sqrt(squared[rows, nearest], dtype=np.float64)
    squared[rows, nearest] = np.inf
    second = squared.argmin(axis=1)
    return np.sqrt(squared[rows, second], dtype=np.float64) - first, second


def _documents(cluster: int, scan: _Scan, snippet: Callable[[int], Snippet]) -> dict[str, list[dict[str, Any]]]:
    """The typical and the borderline documents of a cluster, with their texts."""

    def shown(row: int) -> dict[str, str]:
        found = snippet(row)
        return {"sp_id": found.sp_id, "text": found.text}

    return {
        "examples": [
            {**shown(row), "distance": round(distance, _DECIMALS)} for row, distance, _ in scan.typical.of(cluster)
        ],
        "borderline": [
            {**shown(row), "margin": round(margin, _DECIMALS), "other": other}
            for row, margin, other in scan.borderline.of(cluster)
        ],
    }


# --- the centres among themselves ---


def _neighbours(centers: NDArray[np.float32]) -> list[list[dict[str, Any]]]:
    """The nearest other centres of each, ties to the lower number."""
    exact = centers.astype(np.float64)
    found = []
    for cluster, center in enumerate(exact):
        distances = np.linalg.norm(exact - center, axis=1)
        order = [int(other) for other in np.argsort(distances, kind="stable") if other != cluster]
        found.append(
            [{"cluster": other, "distance": round(float(distances[other]), _DECIMALS)} for other in order[:_NEIGHBOURS]]
        )
    return found


def _map(centers: NDArray[np.float32]) -> tuple[list[list[float]], float]:
    """Positions of the centres on a map, and by which part of itself a distance on it is wrong, on average."""
    exact = centers.astype(np.float64)
    distances = _distances(exact)
    positions, all_shown = _principal_positions(exact - exact.mean(axis=0))
    if not all_shown:
        positions = _principal_positions(_majorised(positions, distances))[0]
    apart = distances > 0
    if not apart.any():  # one centre, or several in one place
        return [[0.0, 0.0] for _ in positions], 0.0
    drawn = _distances(positions)
    # The map has no unit; the scale under which its distances are least wrong is the fair one.
    ratios = (drawn[apart] / distances[apart]) / np.median(drawn[apart] / distances[apart])
    positions = np.round(positions / np.abs(positions).max(), _DECIMALS) + 0.0  # no negative zeros
    return positions.tolist(), round(float(np.abs(ratios - 1).mean()), _DECIMALS)


def _principal_positions(centred: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """First two principal components, shape (k, 2), and whether they hold everything.

    An axis points to where its largest loading is positive, so that the picture does not flip between libraries.
    """
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    kept = axes[:2]
    kept = kept * np.sign(kept[np.arange(len(kept)), np.abs(kept).argmax(axis=1)])[:, None]
    positions = np.zeros((len(centred), 2))
    positions[:, : len(kept)] = centred @ kept.T
    return positions, bool((singular[2:] <= 1e-6 * singular[0]).all())


def _majorised(start: NDArray[np.float64], distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions whose distances are as near to the given ones as rounds of stress majorisation bring them.

    Args:
        start: Positions to begin with, shape (k, 2).
        distances: Distances to be shown, shape (k, k).

    Returns:
        Positions, shape (k, 2), with mean 0.
    """
    k = len(start)
    # Points that start in one place would stay together: each is moved a little, in a direction of its own.
    angles = np.arange(k) * np.pi * (3 - np.sqrt(5))
    typical = distances[~np.eye(k, dtype=bool)].mean()
    positions: NDArray[np.float64] = start + 0.01 * typical * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    weights = 1 / np.maximum(distances, 0.05 * typical) ** 2
    np.fill_diagonal(weights, 0)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    inverse = np.linalg.pinv(laplacian, hermitian=True)
    for _ in range(_MAP_ROUNDS):
        drawn = _distances(positions)
        pull = -weights * distances / np.where(drawn > 0, drawn, np.inf)
        np.fill_diagonal(pull, -pull.sum(axis=1))
        positions = np.asarray(inverse @ (pull @ positions))
    return positions


def _distances(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance of each point to each, shape (k, k)."""
    return np.asarray(np.linalg.norm(points[:, None] - points[None], axis=2))


# --- labels ---


def _agreement(
    labels: NDArray[np.int32], nearest: NDArray[np.int32], true_labels: Sequence[str | None] | None, k: int
) -> tuple[dict[str, Any] | None, list[list[dict[str, Any]]]]:
    """Agreement of both assignments with the labels, and the commonest labels of each cluster of the fit."""
    if true_labels is None:
        return None, [[] for _ in range(k)]
    if len(true_labels) != len(labels):
        raise DataError(f"there are {len(true_labels)} true labels and {len(labels)} documents; pass one for each")
    names = sorted({name for name in true_labels if name is not None})
    if not names:
        raise DataError(f"none of the {len(labels)} documents has a label; pass the labels of this corpus, or none")
    number = {name: index for index, name in enumerate(names)}
    codes = np.array([-1 if name is None else number[name] for name in true_labels], dtype=np.int64)
    labelled = codes >= 0
    fit, greedy = (
        np.bincount(found[labelled] * np.int64(len(names)) + codes[labelled], minlength=k * len(names)).reshape(k, -1)
        for found in (labels, nearest)
    )
    overall = {
        "n_labelled": int(labelled.sum()),
        "n_labels": len(names),
        **agreement_of(fit),
        "nearest": agreement_of(greedy),
    }
    return overall, [_commonest(row, names) for row in fit]


def _commonest(counts: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """The labels that most documents of a cluster carry, with their share of those that carry any."""
    found = Counter({name: int(count) for name, count in zip(names, counts, strict=True) if count})
    total = found.total()
    return [
        {"label": name, "share": round(count / total, _DECIMALS)} for name, count in found.most_common(_LABELS_SHOWN)
    ]
