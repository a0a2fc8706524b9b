"""What the report says of every kind of ensemble: a table of the chosen settings, and a sentence for each kind.

A result of cbtm 0.1.0 has the paper's ensemble alone, which the headline shows; its page goes without this section.
"""

from collections.abc import Mapping
from typing import Any

from cbtm.merge.headline import average_name, headline_row, interval_of, mixed_clusters, selected_ensembles

_KINDS = {
    "clustering": (
        "clustering",
        "the paper’s: an expert weighs the more, the nearer the text before the token is to its cluster",
    ),
    "product_of_experts": (
        "product of experts",
        "the weight by clustering times the probability that the expert gave to the token before",
    ),
    "bayes": ("bayes", "an expert weighs by the probability that it gave to the token before, without any clustering"),
    "posterior": (
        "posterior",
        "an expert weighs by the probability that it gave to all of the document’s text before the token",
    ),
    "uniform": ("uniform", "all experts weigh the same at every token"),
    "prior": (
        "prior",
        "fixed weights, the same at every token: those that clustering gives on average on the selection half",
    ),
    "oracle": (
        "oracle",
        "for each document the one expert that turns out best on it; a bound that shows what perfect choice of a "
        "single expert would give, and no model, for it looks at the answer",
    ),
}
_AVERAGES = {
    "uniform": "the mean of the experts’ parameters",
    "weighted": "their mean by weights that come from validation documents",
    "greedy": "the mean of those that help: experts are added one by one where validation perplexity falls",
}


def kind_name(kind: str) -> str:
    """A kind of ensemble in plain words; one that this module does not know keeps its own name."""
    return _KINDS.get(kind, (kind.replace("_", " "),))[0]


def ensemble_label(kind: str, top_k: int | None, n_experts: int) -> str:
    """A kind of ensemble with the number of experts that it keeps at a token, where that is a choice."""
    if kind in ("uniform", "prior", "oracle") or top_k is None or n_experts == 1:
        return kind_name(kind)
    return f"{kind_name(kind)}, {f'all {n_experts}' if top_k == n_experts else f'top-{top_k}'}"


def kind_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table: clustering at each top-k, of every other kind the selected one of the most experts, averages.

    Returns:
        For each row "arm" (a `HeadlineRow`), "role" (its colour), "interval" of the change to dense as two ratios or
        None, "setting" (temperature and power in words, or None), "experts_used", "flops_relative" and
        "routing_entropy", None where not known. Nothing where a result has no other kind and no average.
    """
    k = len(mixed_clusters(result))
    found = [*selected_ensembles(result), *_others(result)]
    rows = [
        {
            **_compared(ensemble_label(row["ensemble"], row["top_k"], k), row, result),
            "role": "ensemble",
            "setting": _setting(row),
            "experts_used": row.get("experts_used"),
            "flops_relative": row.get("flops_relative"),
            "routing_entropy": row.get("routing_entropy"),
        }
        for row in found
    ]
    averages = result.get("averages") or ()
    if len({row["ensemble"] for row in found}) < 2 and not averages:
        return []
    one_model = {"setting": None, "experts_used": 1.0, "flops_relative": 1.0, "routing_entropy": None}
    return rows + [{**_compared(average_name(row), row, result), "role": "average", **one_model} for row in averages]


def kind_remarks(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each kind in the table its name and what it does."""
    rows = kind_rows(result)
    if not rows:
        return []
    kinds = dict.fromkeys(row["ensemble"] for row in (*selected_ensembles(result), *_others(result)))
    found = [_KINDS[kind] for kind in kinds if kind in _KINDS]
    averages = [row["name"] for row in result.get("averages") or () if row["name"] in _AVERAGES]
    names = {"greedy": "greedy soup"}
    return found + [(names.get(name, f"{name} average of parameters"), _AVERAGES[name]) for name in averages]


def _others(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of every kind but clustering the selected row with the most experts, in the order of the result."""
    found: dict[str, Mapping[str, Any]] = {}
    for row in result["ensemble"]:
        kind = row["ensemble"]
        if kind == "clustering" or not row["selected"]:
            continue
        if kind not in found or row["top_k"] > found[kind]["top_k"]:
            found[kind] = row
    return list(found.values())


def _compared(name: str, row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    return {"arm": headline_row(name, row, result), "interval": interval_of(row.get("dense_ratio_interval"))}


def _setting(row: Mapping[str, Any]) -> str | None:
    if row.get("temperature") is None:
        return None
    return f"T = {row['temperature']:g}, distance to the power {row['distance_power']:g}"
