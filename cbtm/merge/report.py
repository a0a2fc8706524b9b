"""The report of a run: one HTML page that answers whether the experts beat the dense model, and where.

The page is a pure function of `result.json` and of the training curves, so it can be rendered again, anywhere,
and the same data gives the same bytes. It is self-contained: style and figures are inline, nothing is fetched,
and a content security policy forbids scripts and requests. The texts of documents are hostile input: the
template escapes everything, and only the SVG that `figures` wrote goes in as it is.

Which rows of the ensemble grid are shown is decided by `selected`, set on the selection half of the validation
documents; no section picks a row by its perplexity on the half that is reported on. A section appears where the result
has its data, so that a result of an older cbtm gives the page of its time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from statistics import median
from typing import Any

from cbtm.errors import ConfigError
from cbtm.merge import figures
from cbtm.merge.domain_section import (
    domain_cards,
    domain_remarks,
    domain_rows,
    domain_terms,
    draw_comparisons,
    draw_domains,
    expert_map_remark,
    label_rows,
    left_out_remark,
)
from cbtm.merge.ensemble_section import kind_remarks, kind_rows
from cbtm.merge.figures import format_change, format_perplexity, plain_text, show_perplexity
from cbtm.merge.headline import (
    Arm,
    HeadlineRow,
    format_table,
    headline_arms,
    headline_rows,
    mixed_clusters,
    remarks,
    selected_ensembles,
    training_budget,
    verdict,
)
from cbtm.merge.method_section import method_remarks
from cbtm.merge.routing_section import routed_documents, routing_legend
from cbtm.merge.task_section import draw_tasks, task_tables

__all__ = ["HeadlineRow", "format_table", "headline_rows", "render_report", "verdict"]

_Curves = Mapping[str, Sequence[Mapping[str, float]]]


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
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError(f'the report needs jinja2 ({error}); pip install "cbtm[report]"') from None
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    arms, terms = headline_arms(result), domain_terms(result)
    page = environment.get_template("report.html.j2").render(
        result=result,
        verdict=verdict(result),
        remarks=remarks(result, arms),
        arms=arms,
        lead=next((arm.row.name for arm in arms if arm.role == "ensemble"), None),
        figures=_figures(result, curves, arms),
        uniform=_uniform(result),
        inf=math.inf,
        kinds=kind_rows(result),
        kind_remarks=kind_remarks(result),
        n_experts=len(result["experts"]),
        budget=training_budget(result),
        domains=domain_cards(result),
        domain_remarks=domain_remarks(result),
        by_domain=domain_rows(result),
        by_label=label_rows(result),
        left_out=left_out_remark(result),
        expert_map_remark=expert_map_remark(result),
        named_domains=figures.NAMED_DOMAINS,
        routed=routed_documents(result, terms),
        routing_legend=routing_legend(result, terms),
        tasks=task_tables(result),
        training=_training(curves),
        method=method_remarks(result),
    )
    # A lone surrogate in a run name or a path would make the page unwritable as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def _template(name: str) -> str:
    return files("cbtm.merge").joinpath(name).read_text(encoding="utf-8")


def _uniform(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """All experts with equal weights: what the experts give without any routing."""
    rows = (row for row in result["ensemble"] if row["ensemble"] == "uniform")
    return next((row for row in rows if row["top_k"] == len(mixed_clusters(result))), None)


def _figures(result: Mapping[str, Any], curves: _Curves, arms: Sequence[Arm]) -> dict[str, str]:
    """SVG by name; a figure without data is not in it, and a point that is infinite is in none but the bars."""
    drawn = {**draw_domains(result), **draw_comparisons(result), **draw_tasks(result)}
    if arms:
        rows = [(arm.row, arm.role) for arm in arms]
        bars = [figures.Bar(row.name, row.perplexity, row.interval, role, row.impossible_tokens) for row, role in rows]
        values = "; ".join(f"{row.name} {show_perplexity(row.perplexity)}" for row, _ in rows)
        drawn["headline"] = figures.bar_chart(bars, label=f"Bar chart of perplexity. {values}.")
    selected = [row for row in selected_ensembles(result) if row["perplexity"] is not None]
    if selected:
        others = ((arm.role, arm.row.perplexity) for arm in arms if arm.role in {"seed", "dense", "random"})
        arms_at = {role: perplexity for role, perplexity in others if math.isfinite(perplexity)}
        values = "; ".join(f"top-{row['top_k']} {format_perplexity(row['perplexity'])}" for row in selected)
        label = f"Perplexity against the number of experts kept. {values}."
        drawn["top_k"] = figures.top_k_chart(selected, arms_at, len(mixed_clusters(result)), label=label)
    grid = [row for row in result["ensemble"] if row["ensemble"] == "clustering" and row["perplexity"] is not None]
    if grid:
        label = "Perplexity against routing temperature, a line for each top-k, the chosen setting marked."
        drawn["temperature"] = figures.temperature_chart(grid, selected, label=label)
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


def _count(value: float | None) -> str:
    """1,638,400; from ten million on 163.8 M, from ten thousand million on 16.4 B; an en dash for None."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if value >= 10 * size:
            return f"{value / size:,.1f}\u00a0{unit}"
    return f"{value:,.0f}"


def _fixed(value: float | None, decimals: int) -> str:
    if value is not None and math.isinf(value):
        return "∞"
    return "–" if value is None else f"{value:,.{decimals}f}"


def _span(ends: tuple[float, float] | None) -> str:
    """39.2–40.8; an en dash for None, and where both ends are infinite."""
    if not ends or math.isinf(ends[0]):
        return "–"
    return f"{show_perplexity(ends[0])}–{show_perplexity(ends[1])}"


def _change_span(ratios: tuple[float, float] | None) -> str:
    """−21.0 to −19.0 %, of two ratios; an en dash for None."""
    if not ratios:
        return "–"
    return f"{format_change(ratios[0]).removesuffix(_PERCENT)} to {format_change(ratios[1])}"


def _percent(share: float | None, decimals: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{decimals}f}{_PERCENT}"


def _duration(seconds: float) -> str:
    """51 s, 12 min 05 s, 3 h 04 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}\u00a0s" if seconds < 10 else f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02d}\u00a0min"


_PERCENT = "\u00a0%"
_FILTERS: dict[str, Callable[..., str]] = {
    "perplexity": show_perplexity,
    "span": _span,
    "change_span": _change_span,
    "percent": _percent,
    "change": format_change,
    "count": _count,
    "fixed": _fixed,
    "duration": _duration,
    "line": plain_text,
}
