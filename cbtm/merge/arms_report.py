"""The comparison of several runs as a page, a table for a terminal, a table of values, and a few lines of Markdown."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cbtm.errors import ConfigError
from cbtm.merge.figures import (
    COLOURS,
    WIDTH,
    format_change,
    legend_above,
    plain_text,
    show_perplexity,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("way", "perplexity", "least to largest", "95 % interval", "against dense", "95 % interval, paired")


def row_name(row: Mapping[str, Any]) -> str:
    """What a row of the comparison is called."""
    k, top_k = row["n_clusters"], row["top_k"]
    whole = {
        "seed": "seed model",
        "dense": "dense",
        "small-batch": f"dense, batch of one of {k} experts",
        "small-batch-scaled": f"dense, batch of one of {k}, learning rate / √{k}",
        "random": f"random clusters, k = {k}",
        "clusters": f"c-BTM, k = {k}",
        "plain": f"plain k-means, k = {k}",
        "tokens": f"balanced by tokens, k = {k}",
    }[row["kind"]]
    return whole if top_k in (None, k) else f"{whole}, top-{top_k}"


def main_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that people look for: fewer experts at a token only for balanced clusters."""
    return [row for row in rows if row["kind"] == "clusters" or row["top_k"] in (None, row["n_clusters"])]


def comparison_verdict(comparison: Mapping[str, Any]) -> str:
    """What the largest k with balanced clusters comes to, in one sentence."""
    row = max(
        (row for row in comparison["rows"] if row["kind"] == "clusters" and row["top_k"] == row["n_clusters"]),
        key=lambda row: row["n_clusters"],
    )
    name = f"c-BTM with {row['n_clusters']} experts"
    if row["dense_ratio_interval"] is None:
        return f"{name} and the dense model each find some token impossible: there is nothing to compare."
    low, high = map(_or_infinite, row["dense_ratio_interval"])
    states = len(row["by_random_state"])
    said = "cannot be told from" if low <= 1 <= high else "is better than" if high < 1 else "is worse than"
    interval = f"{_change(low)} to {_change(high)}, {states} random state{'s' if states > 1 else ''}"
    return (
        f"{name} {said} the dense model at equal tokens: "
        f"{_change(row['dense_ratio'])} perplexity (95 % interval {interval})."
    )


def comparison_lines(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table as text."""
    return [_COLUMNS, *(_cells(row) for row in main_rows(comparison["rows"]))]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    spread = _span(row["least"], row["largest"]) if len(row["by_random_state"]) > 1 else "–"
    is_dense = row["kind"] == "dense"
    change = "–" if is_dense else _change(row["dense_ratio"])
    paired = "–" if is_dense else _changes(row["dense_ratio_interval"], _change)
    return (row_name(row), _perplexity(row["perplexity"]), spread, _span(*row["interval"]), change, paired)


def format_comparison(comparison: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = comparison_lines(comparison)
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    text = []
    for line in lines:
        first, *others = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text.append("  ".join([first, *others]).rstrip())
    return "\n".join([*text, "", comparison_verdict(comparison)])


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The table as Markdown, for pages that show no HTML."""
    head, *lines = comparison_lines(comparison)
    rows = ["| " + " | ".join(line) + " |" for line in (head, ["---"] + ["---:"] * (len(head) - 1), *lines)]
    return "\n".join(["# Comparison", "", comparison_verdict(comparison), "", *rows, ""])


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """A line for each row and random state, for programs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["kind", "n_clusters", "top_k", "random_state", "perplexity", "dense_ratio"])
    for row in comparison["rows"]:
        for one in row["by_random_state"]:
            setting = [row["kind"], row["n_clusters"], row["top_k"]]
            figure = _or_infinite(one["perplexity"])
            writer.writerow([*setting, one["random_state"], figure, one.get("dense_ratio")])
    return out.getvalue()


def comparison_chart(rows: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Perplexity against k: balanced clusters and random ones as lines, dense models as levels, the rest as points.

    Bars reach from the least to the largest of the random states. What is infinite is not in it.
    """
    rows = [row for row in rows if row["largest"] is not None]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        whole = [row for row in rows if row["top_k"] in (None, row["n_clusters"])]
        lines = (("clusters", "c-BTM", "ensemble", "o-"), ("random", "random clusters", "random", "s:"))
        for kind, name, role, style in lines:
            _points(axes, [row for row in whole if row["kind"] == kind], name, COLOURS[role], style)
        _points(
            axes,
            [row for row in rows if row["kind"] == "clusters" and row["top_k"] == 1],
            "c-BTM, top-1",
            COLOURS["single"],
            "^--",
        )
        levels = (
            ("dense", "--", "dense"),
            ("small-batch", "-.", "dense, batch of one expert"),
            ("small-batch-scaled", ":", "the same, learning rate / √k"),
        )
        for kind, style, name in levels:
            for row in (row for row in rows if row["kind"] == kind):
                axes.axhline(row["perplexity"], color=COLOURS["dense"], linestyle=style, linewidth=1.4, label=name)
                if row["least"] < row["largest"]:
                    axes.axhspan(row["least"], row["largest"], color=COLOURS["dense"], alpha=0.12, linewidth=0)
        for kind, marker, name in (("plain", "x", "plain k-means"), ("tokens", "d", "balanced by tokens")):
            _points(axes, [row for row in whole if row["kind"] == kind], name, COLOURS["average"], marker)
        ks = sorted({row["n_clusters"] for row in rows if row["kind"] not in ("seed", "dense")}) or [1]
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(ks) / 1.3, max(ks) * 1.3)
        axes.set_xlabel("k, the number of clusters and of experts")
        axes.set_ylabel("perplexity (lower is better)")
        legend_above(figure, axes, columns=4)

    return svg("comparison", label, (WIDTH, 3.8), draw)


def _points(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, colour: str, style: str) -> None:
    if not rows:
        return
    values = [row["perplexity"] for row in rows]
    errors = [[row["perplexity"] - row["least"] for row in rows], [row["largest"] - row["perplexity"] for row in rows]]
    ks = [row["n_clusters"] for row in rows]
    axes.errorbar(ks, values, yerr=errors, fmt=style, color=colour, capsize=3, label=name)


def render_comparison(comparison: Mapping[str, Any]) -> str:
    """The page; a pure function of comparison.json.

    Raises:
        ConfigError: If matplotlib or jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError(f'the report needs jinja2 ({error}); pip install "cbtm[report]"') from None
    environment = Environment(
        loader=FunctionLoader(lambda name: files("cbtm.merge").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        perplexity=_perplexity,
        change=format_change,
        changes=lambda ends: _changes(ends, format_change),
        count=lambda number: f"{number:,}",
        line=plain_text,
    )
    head, *lines = comparison_lines(comparison)
    said = "; ".join(f"{row_name(row)} {_perplexity(row['perplexity'])}" for row in main_rows(comparison["rows"]))
    page = environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        verdict=comparison_verdict(comparison),
        chart=comparison_chart(comparison["rows"], label=f"Perplexity against the number of clusters. {said}."),
        head=head,
        lines=lines,
    )
    return page.encode("utf-8", "replace").decode("utf-8")


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _perplexity(value: float | None) -> str:
    return show_perplexity(_or_infinite(value))


def _change(ratio: float | None) -> str:
    return "–" if ratio is None else f"{100 * (ratio - 1):+.1f}\u00a0%".replace("inf", "∞")


def _changes(ends: Sequence[float | None] | None, change: Callable[[float], str]) -> str:
    return "–" if ends is None else " to ".join(change(_or_infinite(end)) for end in ends)


def _span(low: float | None, high: float | None) -> str:
    return f"{_perplexity(low)}–{_perplexity(high)}"
