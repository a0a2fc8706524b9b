"""The report of a run: one HTML page that answers whether the experts beat the dense model, and where.

The page is a pure function of `result.json` and of the training curves, so it can be rendered again, anywhere,
and the same data gives the same bytes. It is self-contained: style and figures are inline, nothing is fetched,
and a content security policy forbids scripts and requests. The texts of documents are hostile input: the
template escapes everything, and only the SVG that `figures` wrote goes in as it is.

Which rows of the ensemble grid are shown is decided by `selected`, set on the selection half of the validation
documents; this module never picks a row by its perplexity on the half that is reported on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Any

from cbtm.errors import ConfigError, DataError
from cbtm.merge import figures
from cbtm.merge.domain_section import domain_cards, domain_remarks, domain_rows, domain_terms, draw_domains
from cbtm.merge.figures import format_change, format_perplexity, plain_text

FORMAT = 1
"""The version of result.json that this module reads."""

_CLUSTERS_SHOWN = 12
"""Numbers of clusters in a sentence; the table of domains has all."""

_Curves = Mapping[str, Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class HeadlineRow:
    """One arm of the comparison.

    `interval` is the 95 % bootstrap interval of `perplexity`. `change_to_dense` is relative: -0.187 is 18.7 %
    below the dense model; it is None for the dense model itself and when none was trained.
    """

    name: str
    perplexity: float
    bits_per_byte: float
    interval: tuple[float, float] | None
    change_to_dense: float | None


@dataclass(frozen=True)
class _Arm:
    """A headline row with what only the page shows: its colour and the mean number of models run per token."""

    row: HeadlineRow
    role: str
    models_per_token: float


def headline_rows(result: Mapping[str, Any]) -> list[HeadlineRow]:
    """The arms of a result in a fixed order: seed, dense, random clusters, ensembles, best single expert.

    Of the ensembles, those appear whose temperature and distance power were selected, from all experts to one.

    Raises:
        DataError: If `result` is of another format.
    """
    return [arm.row for arm in _arms(result)]


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
    _check_format(result)
    rows = _selected(result)
    if not rows:
        return "No ensemble of the experts was evaluated."
    name, perplexity = _ensemble_subject(rows[0], len(result["experts"])), format_perplexity(rows[0]["perplexity"])
    ratio, interval = _dense_ratio(rows[0], result), rows[0].get("dense_ratio_interval")
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


def render_report(result: Mapping[str, Any], curves: _Curves) -> str:
    """Render the page.

    Args:
        result: The content of result.json.
        curves: Training points by member ("seed", "dense", "cluster-00003", "random-00003"), each with "step"
            and, where logged, "train/loss" (nats per token), "train/learning_rate", "train/tokens_per_second".

    Returns:
        A complete HTML document, to be written as UTF-8.

    Raises:
        ConfigError: If matplotlib or jinja2 is not installed.
        DataError: If `result` is of another format or `curves` names a member that no run has.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ConfigError(f'the report needs jinja2 ({error}); pip install "cbtm[report]"') from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(_FILTERS)
    template = files("cbtm.merge").joinpath("report.html.j2").read_text(encoding="utf-8")
    arms = _arms(result)
    page = environment.from_string(template).render(
        result=result,
        verdict=verdict(result),
        remarks=_remarks(result, arms),
        arms=arms,
        lead=next((arm.row.name for arm in arms if arm.role == "ensemble"), None),
        figures=_figures(result, curves, arms),
        uniform=_uniform(result),
        n_experts=len(result["experts"]),
        budget=_training_budget(result),
        domains=domain_cards(result),
        domain_remarks=domain_remarks(result),
        by_domain=domain_rows(result),
        named_domains=figures.NAMED_DOMAINS,
        training=_training(curves),
    )
    # A lone surrogate in a run name or a path would make the page unwritable as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def _arms(result: Mapping[str, Any]) -> list[_Arm]:
    _check_format(result)
    k = len(result["experts"])
    arms = [
        _Arm(_row(name, result[role], result), role, models)
        for role, name, models in (
            ("seed", "seed model", 1), ("dense", "dense model", 1), ("random", "random clusters", k),
        )
        if result.get(role)
    ]  # fmt: skip
    for row in _selected(result):
        name = "the one expert" if k == 1 else f"ensemble, top-{row['top_k']}"
        name = f"ensemble, all {k} experts" if row["top_k"] == k > 1 else name
        arms.append(_Arm(_row(name, row, result), "ensemble", row["experts_used"]))
    best = result.get("best_single_expert")
    if best:
        arms.append(_Arm(_row(f"best single expert, cluster {best['cluster']}", best, result), "single", 1))
    return arms


def _row(name: str, values: Mapping[str, Any], result: Mapping[str, Any]) -> HeadlineRow:
    ratio = None if values is result.get("dense") else _dense_ratio(values, result)
    low_high = values.get("interval")
    return HeadlineRow(
        name=name,
        perplexity=values["perplexity"],
        bits_per_byte=values["bits_per_byte"],
        interval=(low_high[0], low_high[1]) if low_high else None,
        change_to_dense=None if ratio is None else ratio - 1.0,
    )


def _selected(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The selected clustering ensembles, one for each top_k, largest top_k first."""
    by_top_k: dict[int, Mapping[str, Any]] = {}
    for row in result["ensemble"]:
        if not row["selected"] or row["ensemble"] != "clustering":
            continue
        if row["top_k"] in by_top_k:
            raise DataError(f"two ensembles with top_k={row['top_k']} are selected; expected one, evaluate again")
        by_top_k[row["top_k"]] = row
    return [by_top_k[top_k] for top_k in sorted(by_top_k, reverse=True)]


def _uniform(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """All experts with equal weights: what the experts give without any routing."""
    rows = (row for row in result["ensemble"] if row["ensemble"] == "uniform")
    return next((row for row in rows if row["top_k"] == len(result["experts"])), None)


def _dense_ratio(values: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    if not result.get("dense"):
        return None
    stored = values.get("dense_ratio")
    return float(stored if stored is not None else values["perplexity"] / result["dense"]["perplexity"])


def _ensemble_subject(row: Mapping[str, Any], n_experts: int) -> str:
    if n_experts == 1:
        return "The one expert"
    return f"The {'' if row['top_k'] == n_experts else 'top-' + str(row['top_k']) + ' '}ensemble of {n_experts} experts"


def _training_budget(result: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that the dense model saw, and all experts together; their ratio; whether all took as many steps.

    Without a dense model the experts are measured against what it would have seen. The ratio is 1 within a hundredth,
    where steps were rounded. A result of cbtm 0.1.0 does not say what was seen, but then all had the same.
    """
    seen, planned = result.get("tokens_seen") or {}, result["tokens_per_arm"]
    dense, experts = seen.get("dense") or planned, seen.get("experts") or planned
    share = 1.0 if abs(experts / dense - 1) < 0.01 else experts / dense
    steps = {row.get("steps", result["steps"]) for row in result["experts"]} | {result["steps"]}
    return {"dense": dense, "experts": experts, "share": share, "same_steps": len(steps) == 1}


def _at_budget(result: Mapping[str, Any]) -> str:
    share = _training_budget(result)["share"]
    return "at equal training tokens" if share == 1 else f"on {100 * share:.3g} % of its training tokens"


def _subset_remark(result: Mapping[str, Any]) -> str | None:
    """What is to be known of a run in which only some experts were trained."""
    clusters, k = [str(row["cluster"]) for row in result["experts"]], result["n_clusters"]
    if len(clusters) == k:
        return None
    were = "was trained (cluster" if len(clusters) == 1 else "were trained (clusters"
    shown = ", ".join(clusters[:_CLUSTERS_SHOWN]) + (", …" if len(clusters) > _CLUSTERS_SHOWN else "")
    remark = f"Only {len(clusters)} of {k} experts {were} {shown})"
    if not result.get("dense"):
        return f"{remark}."
    return (
        f"{remark}, so the comparison with the dense model, which was trained on all clusters, is not at equal tokens."
    )


def _remarks(result: Mapping[str, Any], arms: Sequence[_Arm]) -> list[str]:
    """Sentences under the verdict: which experts there are, what one for each token and random clusters give."""
    remarks = [remark] if (remark := _subset_remark(result)) else []
    selected = _selected(result)
    if len(selected) > 1 and selected[-1]["top_k"] == 1:
        top_1 = selected[-1]
        place = _against_dense(_dense_ratio(top_1, result))
        remarks.append(f"With one expert per token (top-1) it reaches {format_perplexity(top_1['perplexity'])}{place}.")
    random = next((arm.row for arm in arms if arm.role == "random"), None)
    if random is not None:
        place = _against_dense(None if random.change_to_dense is None else 1 + random.change_to_dense)
        reached = f"reach {format_perplexity(random.perplexity)}{place}"
        remarks.append(f"As many experts trained on random clusters {reached}.")
    if result.get("seed"):
        start = format_perplexity(result["seed"]["perplexity"])
        remarks.append(f"The seed model that all of them start from has {start}.")
    return remarks


def _against_dense(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f", {abs(100 * (ratio - 1)):.1f} % {'below' if ratio < 1 else 'above'} the dense model"


def _figures(result: Mapping[str, Any], curves: _Curves, arms: Sequence[_Arm]) -> dict[str, str]:
    """SVG by name; a figure without data is not in it."""
    drawn = draw_domains(result)
    if arms:
        rows = [(arm.row, arm.role) for arm in arms]
        bars = [figures.Bar(row.name, row.perplexity, row.interval, role) for row, role in rows]
        values = "; ".join(f"{row.name} {format_perplexity(row.perplexity)}" for row, _ in rows)
        drawn["headline"] = figures.bar_chart(bars, label=f"Bar chart of perplexity. {values}.")
    selected = _selected(result)
    if selected:
        arms_at = {arm.role: arm.row.perplexity for arm in arms if arm.role in {"seed", "dense", "random"}}
        values = "; ".join(f"top-{row['top_k']} {format_perplexity(row['perplexity'])}" for row in selected)
        label = f"Perplexity against the number of experts kept. {values}."
        drawn["top_k"] = figures.top_k_chart(selected, arms_at, len(result["experts"]), label=label)
    grid = [row for row in result["ensemble"] if row["ensemble"] == "clustering"]
    if grid:
        label = "Perplexity against routing temperature, a line for each top-k, the chosen setting marked."
        drawn["temperature"] = figures.temperature_chart(grid, selected, label=label)
    both = [row for row in result["by_domain"] if row["dense"] is not None and row["ensemble"] is not None]
    if both:
        wins = sum(row["ensemble"] < row["dense"] for row in both)
        label = f"Dense model against ensemble in each domain; the ensemble is lower in {wins} of {len(both)}."
        drawn["domains"] = figures.domain_chart(both, domain_terms(result), label=label)
    if any(curves.values()):
        label = f"Training loss against step of {len(curves)} models."
        drawn["training"] = figures.training_chart(curves, label=label)
    return drawn


def _training(curves: _Curves) -> list[dict[str, Any]]:
    """One row for each kind of model: how many, steps, last loss, learning rate at its peak, speed (medians)."""
    rows = []
    names = {"seed": "seed model", "dense": "dense model", "expert": "experts", "random": "random-cluster experts"}
    for kind, name in names.items():
        members = [points for member, points in sorted(curves.items()) if figures.member_kind(member) == kind]
        members = [points for points in members if points]
        if not members:
            continue
        last = [loss[-1] for points in members if (loss := figures.smooth_curve(points, bins=10)[1])]
        rows.append(
            {
                "name": name,
                "models": len(members),
                "steps": max(point["step"] for points in members for point in points),
                "loss": median(last) if last else None,
                "learning_rate": max(_logged(members, "train/learning_rate"), default=None),
                "speed": median(speeds) if (speeds := _logged(members, "train/tokens_per_second")) else None,
            }
        )
    return rows


def _logged(members: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[float]:
    values = (point[key] for points in members for point in points if key in point)
    return [value for value in values if math.isfinite(value)]


def _check_format(result: Mapping[str, Any]) -> None:
    if result.get("format") != FORMAT:
        found = result.get("format")
        raise DataError(f"the result has format {found!r}, this cbtm reads {FORMAT}; evaluate again with this cbtm")


def _signed(ratio: float) -> str:
    return format_change(ratio).replace("\u00a0", " ")


def _count(value: float | None) -> str:
    """1,638,400; from ten million on 163.8 M, from ten thousand million on 16.4 B; an en dash for None."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= 10 * size:
            return f"{value / size:,.1f}\u00a0{unit}"
    return f"{value:,.0f}"


def _fixed(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:,.{decimals}f}"


def _duration(seconds: float) -> str:
    """51 s, 12 min 05 s, 3 h 04 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 10 else f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


_FILTERS: dict[str, Callable[..., str]] = {
    "perplexity": format_perplexity,
    "change": format_change,
    "count": _count,
    "fixed": _fixed,
    "duration": _duration,
    "line": plain_text,
}
