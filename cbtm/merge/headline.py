"""The comparison in a few rows and one sentence: do the experts together beat the dense model?

Which rows of the ensemble grid count is decided by `selected`, set on the selection half of the validation documents;
nothing here picks a row by its perplexity on the half that is reported on. An infinite perplexity, which a result
holds as null beside a count of impossible tokens, is infinity here: it is shown and compared, never left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cbtm.errors import DataError
from cbtm.merge.figures import format_change, format_perplexity, show_perplexity

FORMAT = 1
"""The version of result.json that this module reads."""

_CLUSTERS_SHOWN = 12
"""Numbers of clusters in a sentence; the table of domains has all."""

_EXPERTS_NAMED = 6
"""Experts of a greedy soup that its name lists; a bar's label has room for no more."""


@dataclass(frozen=True)
class HeadlineRow:
    """One arm of the comparison.

    `perplexity` and `bits_per_byte` are infinite where `impossible_tokens` is not 0. `interval` is the 95 % bootstrap
    interval of `perplexity`. `change_to_dense` is relative: -0.187 is 18.7 % below the dense model; it is None for the
    dense model itself, when none was trained and when its perplexity is infinite.
    """

    name: str
    perplexity: float
    bits_per_byte: float
    interval: tuple[float, float] | None
    change_to_dense: float | None
    impossible_tokens: int = 0


@dataclass(frozen=True)
class Arm:
    """A headline row with what only the page shows: its colour and the mean number of models run per token."""

    row: HeadlineRow
    role: str
    models_per_token: float


def headline_rows(result: Mapping[str, Any]) -> list[HeadlineRow]:
    """The arms of a result in a fixed order: seed, dense, random clusters, ensembles, averages, best single expert.

    Of the ensembles, those by clustering appear whose temperature and distance power were selected, from all experts
    to one.

    Raises:
        DataError: If `result` is of another format.
    """
    return [arm.row for arm in headline_arms(result)]


def headline_arms(result: Mapping[str, Any]) -> list[Arm]:
    """The arms of `headline_rows` with their roles.

    Raises:
        DataError: If `result` is of another format, or two ensembles of one top-k are selected.
    """
    check_format(result)
    k = len(mixed_clusters(result))
    arms = [
        Arm(headline_row(name, result[role], result), role, models)
        for role, name, models in (
            ("seed", "seed model", 1), ("dense", "dense model", 1),
            ("random", "random clusters", len(result["experts"])),
        )
        if result.get(role)
    ]  # fmt: skip
    for row in selected_ensembles(result):
        arms.append(Arm(headline_row(ensemble_name(row, k), row, result), "ensemble", row["experts_used"]))
    arms += [Arm(headline_row(average_name(row), row, result), "average", 1) for row in result.get("averages") or ()]
    best = result.get("best_single_expert")
    if best:
        arms.append(Arm(headline_row(f"best single expert, cluster {best['cluster']}", best, result), "single", 1))
    return arms


def headline_row(name: str, values: Mapping[str, Any], result: Mapping[str, Any]) -> HeadlineRow:
    """The row of one summary of a result; what is null in it is infinite."""
    ratio = None if values is result.get("dense") else dense_ratio(values, result)
    return HeadlineRow(
        name=name,
        perplexity=or_infinite(values["perplexity"]),
        bits_per_byte=or_infinite(values["bits_per_byte"]),
        interval=interval_of(values.get("interval")),
        change_to_dense=None if ratio is None else ratio - 1.0,
        impossible_tokens=values.get("impossible_tokens", 0),
    )


def format_table(rows: Sequence[HeadlineRow]) -> str:
    """The headline as a plain-text table (ASCII, no trailing newline) for a terminal or a log."""
    cells = [("", "perplexity", "bits/byte", "95 % interval", "vs dense")]
    for row in rows:
        interval = " to ".join(map(format_perplexity, row.interval)) if row.interval else "-"
        change = "-" if row.change_to_dense is None else f"{100 * row.change_to_dense:+.1f} %"
        cells.append((row.name, format_perplexity(row.perplexity), f"{row.bits_per_byte:.3f}", interval, change))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers in cells:
        right = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence that says whether the ensemble of all experts beats the dense model, from the numbers alone.

    Better or worse is said only when the 95 % interval of the ratio of perplexities excludes 1, and equal training
    tokens only where the experts together saw as many as the dense model.

    Raises:
        DataError: If `result` is of another format.
    """
    check_format(result)
    rows = selected_ensembles(result)
    if not rows:
        return "No ensemble of the experts was evaluated."
    name, perplexity = _ensemble_subject(rows[0], result), format_perplexity(rows[0]["perplexity"])
    if rows[0]["perplexity"] is None:
        tokens = f"{rows[0].get('impossible_tokens', 0):,} of {result['n_tokens']:,}"
        return f"{name} gives {tokens} tokens no probability at all, so its perplexity is infinite."
    if result.get("dense") and result["dense"]["perplexity"] is None:
        tokens = f"{result['dense'].get('impossible_tokens', 0):,}"
        return (
            f"{name} reaches perplexity {perplexity}; that of the dense model is infinite ({tokens} impossible tokens)."
        )
    ratio, interval = dense_ratio(rows[0], result), interval_of(rows[0].get("dense_ratio_interval"))
    if ratio is None:
        return f"{name} reaches perplexity {perplexity}; no dense model was trained at equal tokens to compare it with."
    change, side = f"{abs(100 * (ratio - 1)):.1f} %", "below" if ratio < 1 else "above"
    budget = _at_budget(result)
    start = f"{name} reaches perplexity {perplexity}, {change} {side} the dense model {budget}"
    if interval is None:
        return f"{start}; no interval was computed."
    low, high = interval
    if low <= 1 <= high:
        dense, span = format_perplexity(result["dense"]["perplexity"]), f"{_signed(low)} to {_signed(high)}"
        return (
            f"{name} (perplexity {perplexity}) and the dense model ({dense}) cannot be told apart {budget}: "
            f"the difference of {_signed(ratio)} has a 95 % interval of {span}, which includes 0."
        )
    near, far = sorted(abs(100 * (end - 1)) for end in interval)
    start += f" (95 % interval {near:.1f}–{far:.1f} %)"
    return f"{start}." if high < 1 else f"{start}: on this corpus the dense model is the better one."


def remarks(result: Mapping[str, Any], arms: Sequence[Arm]) -> list[str]:
    """Sentences under the verdict: which experts there are, what one for each token and random clusters give."""
    found = [remark for remark in (_subset_remark(result), _mixed_remark(result)) if remark]
    selected = selected_ensembles(result)
    if len(selected) > 1 and selected[-1]["top_k"] == 1:
        top_1 = selected[-1]
        place = _against_dense(dense_ratio(top_1, result))
        reached = show_perplexity(or_infinite(top_1["perplexity"]))
        found.append(f"With one expert per token (top-1) it reaches {reached}{place}.")
    random = next((arm.row for arm in arms if arm.role == "random"), None)
    if random is not None:
        place = _against_dense(None if random.change_to_dense is None else 1 + random.change_to_dense)
        mixed, trained = len(mixed_clusters(result)), len(result["experts"])
        who = "As many experts" if mixed == trained else f"The {trained} experts"
        found.append(f"{who} trained on random clusters reach {show_perplexity(random.perplexity)}{place}.")
    if result.get("seed"):
        start = show_perplexity(or_infinite(result["seed"]["perplexity"]))
        found.append(f"The seed model that all of them start from has {start}.")
    return found


def selected_ensembles(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The selected clustering ensembles, one for each top_k, largest top_k first.

    Raises:
        DataError: If two of one top_k are selected.
    """
    by_top_k: dict[int, Mapping[str, Any]] = {}
    for row in result["ensemble"]:
        if not row["selected"] or row["ensemble"] != "clustering":
            continue
        if row["top_k"] in by_top_k:
            raise DataError(f"two ensembles with top_k={row['top_k']} are selected; expected one, evaluate again")
        by_top_k[row["top_k"]] = row
    return [by_top_k[top_k] for top_k in sorted(by_top_k, reverse=True)]


def mixed_clusters(result: Mapping[str, Any]) -> list[int]:
    """Clusters whose experts are mixed: those that were trained, or a subset of them on purpose."""
    return list(result.get("experts_evaluated") or (row["cluster"] for row in result["experts"]))


def left_out_clusters(result: Mapping[str, Any]) -> list[int]:
    """Clusters whose expert was trained and is left out of the ensembles on purpose."""
    mixed = set(mixed_clusters(result))
    return [row["cluster"] for row in result["experts"] if row["cluster"] not in mixed]


def ensemble_name(row: Mapping[str, Any], n_experts: int) -> str:
    """The name of a clustering ensemble in tables and figures."""
    if n_experts == 1:
        return "the one expert"
    return f"ensemble, all {n_experts} experts" if row["top_k"] == n_experts else f"ensemble, top-{row['top_k']}"


def average_name(row: Mapping[str, Any]) -> str:
    """The name of one model that was averaged from many: how, and for a greedy soup, from which."""
    if row["name"] != "greedy":
        return f"{row['name']} average of parameters"
    experts = row.get("experts") or []
    if len(experts) > _EXPERTS_NAMED:
        return f"greedy soup of {len(experts)} experts"
    noun = "expert" if len(experts) == 1 else "experts"
    return f"greedy soup of {noun} {', '.join(map(str, experts))}" if experts else "greedy soup of experts"


def shown_clusters(clusters: Sequence[int]) -> str:
    """Numbers of clusters for a sentence; of many, the first."""
    return ", ".join(map(str, clusters[:_CLUSTERS_SHOWN])) + (", …" if len(clusters) > _CLUSTERS_SHOWN else "")


def dense_ratio(values: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Perplexity over that of the dense model; None without one, or where the dense model's is infinite."""
    dense = (result.get("dense") or {}).get("perplexity")
    if dense is None:
        return None
    stored = values.get("dense_ratio")
    return float(stored if stored is not None else or_infinite(values["perplexity"]) / dense)


def or_infinite(value: float | None) -> float:
    """A figure of a result, in which null stands for infinity."""
    return math.inf if value is None else value


def interval_of(ends: Sequence[float | None] | None) -> tuple[float, float] | None:
    """An interval of a result, in which a null end stands for infinity; None where there is none."""
    return (or_infinite(ends[0]), or_infinite(ends[1])) if ends else None


def training_budget(result: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that the dense model saw, and all experts together; their ratio; whether all took as many steps.

    Without a dense model the experts are measured against what it would have seen. The ratio is 1 within a hundredth,
    where steps were rounded. A result of cbtm 0.1.0 does not say what was seen, but then all had the same.
    """
    seen, planned = result.get("tokens_seen") or {}, result["tokens_per_arm"]
    dense, experts = seen.get("dense") or planned, seen.get("experts") or planned
    steps = {row.get("steps", result["steps"]) for row in result["experts"]} | {result["steps"]}
    return {"dense": dense, "experts": experts, "share": _share(experts, dense), "same_steps": len(steps) == 1}


def check_format(result: Mapping[str, Any]) -> None:
    """Refuse a result that this module does not read.

    Raises:
        DataError: If `result` is of another format.
    """
    if result.get("format") != FORMAT:
        found = result.get("format")
        raise DataError(f"the result has format {found!r}, this cbtm reads {FORMAT}; evaluate again with this cbtm")


def _share(experts: float, dense: float) -> float:
    return 1.0 if abs(experts / dense - 1) < 0.01 else experts / dense


def _at_budget(result: Mapping[str, Any]) -> str:
    """On how many of the dense model's tokens the experts that are mixed were trained."""
    budget, left_out = training_budget(result), set(left_out_clusters(result))
    share = budget["share"]
    if left_out:
        # Experts without a count of their own had equal parts.
        equal = budget["experts"] / len(result["experts"])
        mixed = sum(row.get("tokens_seen", equal) for row in result["experts"] if row["cluster"] not in left_out)
        share = _share(mixed, budget["dense"])
    return "at equal training tokens" if share == 1 else f"on {100 * share:.3g} % of its training tokens"


def _ensemble_subject(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    k, left_out = len(mixed_clusters(result)), left_out_clusters(result)
    of_all = f" of {k + len(left_out)}" if left_out else ""
    if k == 1:
        return "One expert" + of_all if left_out else "The one expert"
    return f"The {'' if row['top_k'] == k else 'top-' + str(row['top_k']) + ' '}ensemble of {k}{of_all} experts"


def _subset_remark(result: Mapping[str, Any]) -> str | None:
    """What is to be known of a run in which only some experts were trained."""
    clusters, k = [row["cluster"] for row in result["experts"]], result["n_clusters"]
    if len(clusters) == k:
        return None
    were = "was trained (cluster" if len(clusters) == 1 else "were trained (clusters"
    remark = f"Only {len(clusters)} of {k} experts {were} {shown_clusters(clusters)})"
    if not result.get("dense"):
        return f"{remark}."
    return (
        f"{remark}, so the comparison with the dense model, which was trained on all clusters, is not at equal tokens."
    )


def _mixed_remark(result: Mapping[str, Any]) -> str | None:
    """What is to be known where trained experts are left out on purpose."""
    left_out = left_out_clusters(result)
    if not left_out:
        return None
    noun = "expert of cluster" if len(left_out) == 1 else "experts of clusters"
    return f"The trained {noun} {shown_clusters(left_out)} {'is' if len(left_out) == 1 else 'are'} left out on purpose."


def _against_dense(ratio: float | None) -> str:
    if ratio is None or math.isinf(ratio):
        return ""
    return f", {abs(100 * (ratio - 1)):.1f} % {'below' if ratio < 1 else 'above'} the dense model"


def _signed(ratio: float) -> str:
    return format_change(ratio).replace("\u00a0", " ")
