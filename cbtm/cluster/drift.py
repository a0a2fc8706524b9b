"""Drift: whether new documents still look like those that a clusterer was fitted on.

`DistanceProfile` keeps how far the fitted documents lie from their nearest centres and how they spread over the
clusters; `measure_drift` compares new documents with it. The verdict asks only whether documents lie *farther* than
before, because the fit is biased the other way: projection and centres follow the rare words of the fitted documents,
and unseen ones of the same domains lie nearer (median 0.77 against 0.81 for 6,000 fitted documents of eight domains).
A small drift hides behind that bias; a profile of held-out documents is free of it and works the same way.

Documents may also drift without lying far from a centre, all in one cluster, say: the shares of the clusters are
compared too. Documents without a known word have no place among the centres and are counted apart.

Every measure is allowed what chance gives in all but one of a thousand samples of the same distribution, before it is
held against its thresholds; a small sample thus raises an alarm only for a large drift. The allowance takes documents
to be independent: pieces of one book are not, and such a sample counts for less than its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.kmeans import nearest_centers
from cbtm.errors import DataError, ManifestError

Level = Literal["none", "some", "strong", "unknown"]

THRESHOLDS: dict[str, tuple[float, float]] = {
    "beyond 95 %": (0.05, 0.15),
    "beyond 99 %": (0.03, 0.10),
    "farther (KS)": (0.10, 0.25),
    "zero vectors": (0.02, 0.10),
    "shares (TV)": (0.10, 0.30),
}
"""Excess over the expected value and the allowance for chance from which a measure says "some" and "strong" drift.

They are sizes of effect, chosen: "some" where twice as many documents as expected lie beyond the 95th percentile, or a
tenth of all have moved; "strong" where a seventh to a third have."""
LEAST_DOCUMENTS = 50
"""Fewer new documents than this give the verdict "unknown"."""

_FAR = "They lie farther from the centres than those of the fit: texts of a kind that it has not seen."
_MEANINGS = {
    **dict.fromkeys(("beyond 95 %", "beyond 99 %", "farther (KS)"), _FAR),
    "zero vectors": "More of them hold no known word: another language, another script, or broken text.",
    "shares (TV)": "They spread over the clusters in other shares than those of the fit.",
}
_FORMAT = 1
PERCENTILES = tuple(range(101))
CLUSTER_PERCENTILES = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
# One in a thousand: z of a one-sided normal test; and sqrt(ln(1000) / 2), of the one-sided Kolmogorov-Smirnov test
# and, by McDiarmid's inequality, of a total variation distance above its mean.
_NORMAL_CHANCE, _SUP_CHANCE = 3.09, math.sqrt(math.log(1000) / 2)
# Distances of the same document in two blocks differ by rounding; unit vectors, so this is far below any difference.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class DistanceProfile:
    """How the documents of a fit lie about their nearest centres.

    Attributes:
        n_documents: Documents, those without a known word included.
        n_zero_vectors: Documents without a known word; they are in none of the following.
        cluster_documents: Documents nearest to each centre, k entries.
        quantiles: Distance at each percentile from 0 to 100, 101 entries, ascending.
        cluster_quantiles: For each cluster, the distances at percentiles 0, 1, 5, 10, 25, 50, 75, 90, 95, 99 and 100;
            None for a cluster without documents.
    """

    n_documents: int
    n_zero_vectors: int
    cluster_documents: tuple[int, ...]
    quantiles: tuple[float, ...]
    cluster_quantiles: tuple[tuple[float, ...] | None, ...]

    @classmethod
    def of(cls, blocks: Iterable[NDArray[np.float32]], centers: NDArray[np.float32]) -> DistanceProfile:
        """Profile vectors that come in blocks; 8 bytes per document are kept meanwhile.

        Blocks are float32, shape (n_i, d); centres float32, shape (k, d).

        Raises:
            DataError: If no document has a known word, a vector is not finite, or a block does not fit the centres.
        """
        n_documents, distances, labels = _place(blocks, centers)
        if len(distances) == 0:
            raise DataError(f"none of the {n_documents} documents has a known word; there is nothing to profile")
        clusters = [distances[labels == cluster] for cluster in range(len(centers))]
        return cls(
            n_documents=n_documents,
            n_zero_vectors=n_documents - len(distances),
            cluster_documents=tuple(map(len, clusters)),
            quantiles=_quantiles(distances, PERCENTILES),
            cluster_quantiles=tuple(_quantiles(own, CLUSTER_PERCENTILES) if len(own) else None for own in clusters),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON; `from_json` gives an equal profile back."""
        return {
            "format": _FORMAT,
            **asdict(self),
            "cluster_documents": list(self.cluster_documents),
            "quantiles": list(self.quantiles),
            "cluster_quantiles": [own and list(own) for own in self.cluster_quantiles],
        }

    @classmethod
    def from_json(cls, data: object, *, source: str = "drift profile") -> DistanceProfile:
        """Read what `to_json` gave; `source` names the file in errors.

        Raises:
            ManifestError: If it is of another format, lacks an entry, or its numbers contradict each other.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ManifestError(f"{source}: drift profile format {found!r}, this cbtm reads {_FORMAT}; fit again")
        try:
            profile = cls(
                n_documents=_count(data["n_documents"]),
                n_zero_vectors=_count(data["n_zero_vectors"]),
                cluster_documents=tuple(_count(size) for size in data["cluster_documents"]),
                quantiles=_ascending(data["quantiles"], len(PERCENTILES)),
                cluster_quantiles=tuple(
                    None if own is None else _ascending(own, len(CLUSTER_PERCENTILES))
                    for own in data["cluster_quantiles"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{source} lacks an entry or holds a wrong one: {error!r}; fit again") from error
        placed, sizes = profile.n_documents - profile.n_zero_vectors, profile.cluster_documents
        filled = [own is not None for own in profile.cluster_quantiles]
        if placed < 1 or sum(sizes) != placed or filled != [size > 0 for size in sizes]:
            raise ManifestError(
                f"{source} contradicts itself: {profile.n_documents} documents, {profile.n_zero_vectors} of them "
                f"without a known word, {sum(sizes)} in clusters; fit again"
            )
        return profile


@dataclass(frozen=True)
class Measure:
    """One comparison: `level` follows from `value - expected - chance` and `THRESHOLDS`; a value of None is unknown."""

    name: str
    value: float | None
    expected: float
    chance: float
    level: Level


@dataclass(frozen=True)
class ClusterDrift:
    """New documents nearest to one centre; distances against the quantiles of the fitted documents of that cluster.

    `level` is that of `beyond_95`, "unknown" for fewer than `LEAST_DOCUMENTS` new or fitted documents. Medians and
    shares of distances are None where there are no documents.
    """

    cluster: int
    documents: int
    share: float
    fit_share: float
    median: float | None
    fit_median: float | None
    beyond_95: float | None
    beyond_99: float | None
    level: Level


@dataclass(frozen=True)
class DriftReport:
    """How new documents differ from those of the fit.

    Attributes:
        documents: New documents, those without a known word included.
        zero_vectors: New documents without a known word; distances and cluster shares leave them out.
        fit_documents: Documents of the profile.
        median, fit_median: Median distance to the nearest centre; None if no document has a known word.
        ks: Two-sample Kolmogorov-Smirnov statistic of the distances, to 0.01 (the grid of the profile), two-sided:
            unseen documents of the same domains may well score 0.15, by lying nearer. None without distances.
        share_shift: Total variation distance of the cluster shares: the part of documents in another cluster.
        jensen_shannon: Jensen-Shannon divergence of the cluster shares, bits, 0 to 1.
        measures: What the verdict rests on, in the order of `THRESHOLDS`.
        clusters: One entry per cluster.
        verdict: The highest level of the measures, and at least "some" where a cluster drifts strongly; "unknown" for
            fewer than `LEAST_DOCUMENTS` documents.
    """

    documents: int
    zero_vectors: int
    fit_documents: int
    median: float | None
    fit_median: float
    ks: float | None
    share_shift: float | None
    jensen_shannon: float | None
    measures: tuple[Measure, ...]
    clusters: tuple[ClusterDrift, ...]
    verdict: Level

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = asdict(self)
        return {**values, "measures": list(values["measures"]), "clusters": list(values["clusters"])}


def measure_drift(
    profile: DistanceProfile, blocks: Iterable[NDArray[np.float32]], centers: NDArray[np.float32]
) -> DriftReport:
    """Compare new documents (blocks, float32, shape (n_i, d)) with a profile of the same centres (float32, (k, d)).

    Raises:
        DataError: If there is no document, a vector is not finite, or a block does not fit the centres.
        ManifestError: If the profile has another number of clusters than `centers`.
    """
    if (n_clusters := len(profile.cluster_documents)) != len(centers):
        raise ManifestError(f"the drift profile has {n_clusters} clusters, the clusterer {len(centers)}; fit again")
    n_documents, distances, labels = _place(blocks, centers)
    if n_documents == 0:
        raise DataError("there are no new documents to compare; check that the corpus split is not empty")
    n_new, n_fit = len(distances), profile.n_documents - profile.n_zero_vectors
    sizes, fit_sizes = np.bincount(labels, minlength=len(centers)), np.array(profile.cluster_documents)
    clusters = tuple(_cluster_drift(profile, own, distances[labels == own], n_new) for own in range(len(centers)))
    farther, nearer = _ks(profile.quantiles, distances) if n_new else (None, None)
    shift = float(np.abs(sizes / n_new - fit_sizes / n_fit).sum() / 2) if n_new else None
    zero_share = profile.n_zero_vectors / profile.n_documents
    zero_chance = _share_chance(max(zero_share, 1 / profile.n_documents), n_documents, profile.n_documents)
    measures = (
        _measure("beyond 95 %", _beyond(distances, profile.quantiles[95]), 0.05, _share_chance(0.05, n_new, n_fit)),
        _measure("beyond 99 %", _beyond(distances, profile.quantiles[99]), 0.01, _share_chance(0.01, n_new, n_fit)),
        _measure("farther (KS)", farther, 0.0, _SUP_CHANCE * _two_sample(n_new, n_fit)),
        _measure("zero vectors", 1 - n_new / n_documents, zero_share, zero_chance),
        _measure("shares (TV)", shift, *_shift_chance(sizes, fit_sizes)),
    )
    return DriftReport(
        documents=n_documents,
        zero_vectors=n_documents - n_new,
        fit_documents=profile.n_documents,
        median=_median(distances),
        fit_median=profile.quantiles[50],
        ks=None if farther is None or nearer is None else max(farther, nearer),
        share_shift=shift,
        jensen_shannon=_jensen_shannon(sizes / n_new, fit_sizes / n_fit) if n_new else None,
        measures=measures,
        clusters=clusters,
        verdict=_verdict(n_documents, measures, clusters),
    )


def format_drift(report: DriftReport) -> str:
    """Verdict, measures and clusters as plain text (ASCII, no trailing newline) for a terminal or a log."""
    lines = [
        f"Drift: {report.verdict}. {report.documents} new documents against {report.fit_documents} of the fit; median "
        f"distance {_number(report.median)}, fit {_number(report.fit_median)}."
    ]
    if report.documents < LEAST_DOCUMENTS:
        lines.append(f"Fewer than {LEAST_DOCUMENTS} documents are too few to tell drift from chance.")
    drifted = dict.fromkeys(_MEANINGS[row.name] for row in report.measures if row.level in ("some", "strong"))
    strong = ", ".join(str(own.cluster) for own in report.clusters if own.level == "strong")
    lines += [*drifted, *([f"Clusters with strong drift: {strong}."] if strong else [])]
    measures = [["measure", "value", "expected", "by chance up to", "level"]]
    for row in report.measures:
        measures.append([row.name, *map(_number, (row.value, row.expected, row.expected + row.chance)), row.level])
    clusters = [["cluster", "documents", "share", "fit share", "median", "fit median", "beyond 95 %", "level"]]
    for own in report.clusters:
        numbers = map(_number, (own.share, own.fit_share, own.median, own.fit_median, own.beyond_95))
        clusters.append([str(own.cluster), str(own.documents), *numbers, own.level])
    return "\n".join([*lines, "", *_aligned(measures), "", *_aligned(clusters)])


def _place(
    blocks: Iterable[NDArray[np.float32]], centers: NDArray[np.float32]
) -> tuple[int, NDArray[np.float32], NDArray[np.int32]]:
    """Number of documents; of those with a known word, the distances to the nearest centre and its number."""
    n_documents, distances, labels = 0, [np.empty(0, np.float32)], [np.empty(0, np.int32)]
    for block in blocks:
        block = np.asarray(block, dtype=np.float32)
        if block.ndim != 2 or block.shape[1] != centers.shape[1]:
            raise DataError(f"vectors of shape {block.shape} do not fit centres of shape {centers.shape}")
        if not np.isfinite(block).all():
            row = n_documents + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
            raise DataError(f"the vector of document {row} is not finite; remove or mend this document")
        n_documents += len(block)
        block = block[block.any(axis=1)]
        labels.append(nearest_centers(block, centers))
        # Not by the matrix product of `squared_distances`: near a centre, it loses the distance to rounding.
        distances.append(np.linalg.norm(block - centers[labels[-1]], axis=1))
    return n_documents, np.concatenate(distances), np.concatenate(labels)


def _cluster_drift(profile: DistanceProfile, cluster: int, distances: NDArray[np.float32], n_new: int) -> ClusterDrift:
    fit_quantiles, n_fit = profile.cluster_quantiles[cluster], profile.cluster_documents[cluster]
    at = dict(zip(CLUSTER_PERCENTILES, fit_quantiles, strict=True)) if fit_quantiles else {}
    beyond_95 = _beyond(distances, at[95]) if at else None
    level = _measure("beyond 95 %", beyond_95, 0.05, _share_chance(0.05, len(distances), n_fit)).level
    return ClusterDrift(
        cluster=cluster,
        documents=len(distances),
        share=len(distances) / n_new if n_new else 0.0,
        fit_share=n_fit / sum(profile.cluster_documents),
        median=_median(distances),
        fit_median=at.get(50),
        beyond_95=beyond_95,
        beyond_99=_beyond(distances, at[99]) if at else None,
        level=level if min(len(distances), n_fit) >= LEAST_DOCUMENTS else "unknown",
    )


def _measure(name: str, value: float | None, expected: float, chance: float) -> Measure:
    if value is None:
        return Measure(name, value, expected, chance, "unknown")
    some, strong = THRESHOLDS[name]
    excess = value - expected - chance
    return Measure(name, value, expected, chance, "strong" if excess > strong else "some" if excess > some else "none")


def _verdict(n_documents: int, measures: Iterable[Measure], clusters: Iterable[ClusterDrift]) -> Level:
    levels = {measure.level for measure in measures} | {"some" for own in clusters if own.level == "strong"}
    if n_documents < LEAST_DOCUMENTS:
        return "unknown"
    return "strong" if "strong" in levels else "some" if "some" in levels else "none"


def _two_sample(n: int, m: int) -> float:
    """Square root of 1/n + 1/m, to which the error of a comparison of two samples is proportional."""
    return math.sqrt(1 / max(n, 1) + 1 / max(m, 1))


def _share_chance(share: float, n: int, m: int) -> float:
    """How far chance takes a small share; normal, with the skew of a binomial (Cornish and Fisher's second term)."""
    skew = (_NORMAL_CHANCE**2 - 1) / 6 * (1 - 2 * share) / max(n, 1)
    return _NORMAL_CHANCE * math.sqrt(share * (1 - share)) * _two_sample(n, m) + skew


def _shift_chance(sizes: NDArray[np.int64], fit_sizes: NDArray[np.int64]) -> tuple[float, float]:
    """Mean total variation distance of two samples of the pooled shares, and how far chance takes it above that."""
    pooled = (sizes + fit_sizes) / (sizes + fit_sizes).sum()
    error = _two_sample(int(sizes.sum()), int(fit_sizes.sum()))
    # A difference of shares is about normal with this standard deviation; E|x| of a normal is sqrt(2 / pi) of it.
    mean = float(np.sqrt(pooled * (1 - pooled)).sum() * error * math.sqrt(2 / math.pi) / 2)
    return mean, _SUP_CHANCE * error


def _ks(fit_quantiles: tuple[float, ...], distances: NDArray[np.float32]) -> tuple[float, float]:
    """Largest excess of the fit's distribution function over the new one (new lies farther), and the reverse."""
    values, first = np.unique(np.array(fit_quantiles), return_index=True)
    below, upto = first / 100, np.append(first[1:] - 1, 100) / 100  # equal quantiles are a jump of the function
    ordered = np.sort(distances)
    new_upto = np.searchsorted(ordered, values + _ROUNDING, side="right") / len(ordered)
    new_below = np.searchsorted(ordered, values - _ROUNDING, side="left") / len(ordered)
    farther = max(float((upto - new_upto).max()), float((below - new_below).max()), 0.0)
    nearer = max(float((new_upto - upto).max()), float((new_below - below).max()), 0.0)
    return farther, nearer


def _jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    from scipy.special import rel_entr

    middle = (p + q) / 2
    return float((rel_entr(p, middle) + rel_entr(q, middle)).sum() / (2 * math.log(2)))


def _beyond(distances: NDArray[np.float32], bound: float) -> float | None:
    return float((distances > bound + _ROUNDING).mean()) if len(distances) else None


def _median(distances: NDArray[np.float32]) -> float | None:
    return float(np.median(distances)) if len(distances) else None


def _quantiles(distances: NDArray[np.float32], percentiles: tuple[int, ...]) -> tuple[float, ...]:
    # Six decimals: a tenth of what rounding is allowed for.
    return tuple(np.quantile(distances.astype(np.float64), np.array(percentiles) / 100).round(6).tolist())


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _ascending(values: Any, length: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != length or list(numbers) != sorted(numbers) or not all(0 <= one < math.inf for one in numbers):
        raise ValueError(f"{length} distances in ascending order are wanted, {numbers[:3]} ... ({len(numbers)}) found")
    return numbers


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
