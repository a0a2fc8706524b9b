"""Comparison of runs: what arms of several random states give to the same documents, against the dense model.

A row is one way to spend the training tokens. Its figure over random states is the geometric mean of the perplexities,
that is exp of the mean loss, and its spread their least and largest. Its ratio to the dense model is taken document by
document: each document's loss is averaged over the random states on both sides, and the interval is a bootstrap over
documents (`cbtm.merge.intervals`). So the interval says what other documents could change, and the spread what other
random states did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.merge.intervals import Resamples
from cbtm.merge.measured import exp, finite, ratio, ratio_intervals

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ArmDocuments:
    """One arm's documents.csv.

    Attributes:
        name: Name of the arm.
        kind: What it is, as `cbtm.comparison.Arm.kind`.
        n_clusters: Its k.
        random_state: Its random state.
        sp_ids: Identity of each document.
        clusters: Nearest cluster of each document, shape (n_documents,).
        labels: Known domain of each document, empty where it has none.
        reported: Documents that are reported on, shape (n_documents,).
        tokens: Tokens of each that count, shape (n_documents,).
        nats: Summed negative log-probability of each, by model or ensemble, shape (n_documents,) each.
    """

    name: str
    kind: str
    n_clusters: int
    random_state: int
    sp_ids: Sequence[str]
    clusters: NDArray[np.int64]
    labels: Sequence[str]
    reported: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    nats: Mapping[str, Array]


@dataclass(frozen=True)
class _Row:
    """One way to spend the tokens: documents' losses by random state, each of shape (n_reported,)."""

    kind: str
    n_clusters: int
    top_k: int | None
    losses: Mapping[int, Array]


def compare_arms(arms: Sequence[ArmDocuments], *, random_state: int, n_resamples: int) -> dict[str, Any]:
    """Figures of all arms on the documents that are reported on.

    Args:
        arms: The arms; every kind and k in the same random states.
        random_state: Seed of the bootstrap.
        n_resamples: Its resamples.

    Returns:
        n_documents, n_tokens; rows (kind, n_clusters, top_k, perplexity, least, largest, interval, dense_ratio,
        dense_ratio_interval, by_random_state); and groups: by label where all documents have one, else by cluster of
        the first arm with the largest k, the perplexity of the main rows and their ratios to dense. A perplexity or an
        end of an interval is None where it is infinite, which a token that a model finds impossible makes it; so is a
        ratio, or an interval of ratios, where both sides are.

    Raises:
        DataError: If the arms have different documents, there is no dense arm, or fewer than two documents.
    """
    first = arms[0]
    for arm in arms:
        if list(arm.sp_ids) != list(first.sp_ids) or not np.array_equal(arm.tokens, first.tokens):
            raise DataError(
                f"arms {first.name} and {arm.name} have different held-out documents; run the comparison again"
            )
    rows = _rows(arms)
    dense = next((row for row in rows if row.kind == "dense"), None)
    if dense is None:
        raise DataError(f"no dense arm among {', '.join(arm.name for arm in arms)}; run the comparison again")
    tokens = first.tokens[first.reported]
    resamples = Resamples(tokens, random_state=random_state, n_resamples=n_resamples)
    compared: dict[str, Any] = finite(
        {
            "n_documents": len(tokens),
            "n_tokens": int(tokens.sum()),
            "rows": [_figures(row, dense, tokens, resamples) for row in rows],
            "groups": _groups(arms, rows, dense, tokens, random_state, n_resamples),
        }
    )
    return compared


def _rows(arms: Sequence[ArmDocuments]) -> list[_Row]:
    rows: dict[tuple[str, int, int | None], dict[int, Array]] = {}

    def add(arm: ArmDocuments, kind: str, column: str, top_k: int | None = None, k: int | None = None) -> None:
        row = rows.setdefault((kind, arm.n_clusters if k is None else k, top_k), {})
        row.setdefault(arm.random_state, arm.nats[column][arm.reported])

    add(arms[0], "seed", "seed", k=1)
    for arm in arms:
        if arm.kind in ("dense", "small-batch", "small-batch-scaled"):
            add(arm, arm.kind, "clustering-top-1")
            continue
        kept = sorted(
            (int(name.rpartition("-")[2]) for name in arm.nats if name.startswith("clustering-")), reverse=True
        )
        for top_k in kept:
            add(arm, arm.kind, f"clustering-top-{top_k}", top_k)
        if "random" in arm.nats:
            add(arm, "random", "random")
    order = ("seed", "dense", "small-batch", "small-batch-scaled", "random", "clusters", "plain", "tokens")
    keys = sorted(rows, key=lambda key: (order.index(key[0]), key[1], -(key[2] or 0)))
    return [_Row(kind, k, top_k, rows[kind, k, top_k]) for kind, k, top_k in keys]


def _mean(row: _Row) -> Array:
    mean: Array = np.mean(list(row.losses.values()), axis=0)
    return mean


def _figures(row: _Row, dense: _Row, tokens: NDArray[np.int64], resamples: Resamples) -> dict[str, Any]:
    total = int(tokens.sum())
    perplexities = {state: exp(loss.sum() / total) for state, loss in row.losses.items()}
    mean, base = _mean(row), _mean(dense)
    figures: dict[str, Any] = {
        "kind": row.kind,
        "n_clusters": row.n_clusters,
        "top_k": row.top_k,
        "perplexity": exp(mean.sum() / total),
        "least": min(perplexities.values()),
        "largest": max(perplexities.values()),
        "interval": resamples.intervals(mean[None])[0].tolist(),
        "dense_ratio": ratio(mean.sum(), base.sum(), total),
        "dense_ratio_interval": ratio_intervals(resamples, mean[None], base)[0],
    }
    states = []
    for state, loss in row.losses.items():
        one: dict[str, Any] = {"random_state": state, "perplexity": perplexities[state]}
        if state in dense.losses:
            beside = dense.losses[state]
            one["dense_ratio"] = ratio(loss.sum(), beside.sum(), total)
            one["dense_ratio_interval"] = ratio_intervals(resamples, loss[None], beside)[0]
        states.append(one)
    return {**figures, "by_random_state": states}


def _groups(
    arms: Sequence[ArmDocuments],
    rows: Sequence[_Row],
    dense: _Row,
    tokens: NDArray[np.int64],
    random_state: int,
    n_resamples: int,
) -> dict[str, Any]:
    """The main rows by kind of document."""
    first = arms[0]
    found = [arm for arm in arms if arm.kind == "clusters"]
    if all(first.labels):
        by, source = "label", None
        names: Sequence[Any] = np.array(first.labels)[first.reported].tolist()
    else:
        largest = max(found, key=lambda arm: arm.n_clusters)
        by, source = "cluster", largest.name
        names = largest.clusters[largest.reported].tolist()
    k = max(row.n_clusters for row in rows if row.kind == "clusters")
    main = [row for row in rows if row.kind in ("random", "clusters") and row.n_clusters == k]
    shown = [dense, *(row for row in main if row.top_k in (None, k))]
    groups = []
    for name in sorted(set(names)):
        among = np.array([one == name for one in names])
        n_tokens = int(tokens[among].sum())
        group: dict[str, Any] = {"name": name, "n_documents": int(among.sum()), "n_tokens": n_tokens}
        base = _mean(dense)[among]
        for row in shown:
            mean = _mean(row)[among]
            values: dict[str, Any] = {"perplexity": exp(mean.sum() / n_tokens)}
            if row.kind != "dense":
                values["dense_ratio"] = ratio(mean.sum(), base.sum(), n_tokens)
                if among.sum() > 1:
                    some = Resamples(tokens[among], random_state=random_state, n_resamples=n_resamples)
                    values["dense_ratio_interval"] = ratio_intervals(some, mean[None], base)[0]
            group[row.kind] = values
        groups.append(group)
    return {"by": by, "of": source, "n_clusters": k, "rows": groups}
