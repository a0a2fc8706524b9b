"""Figures that compare models group by group: domains against dense, every expert on every domain, tasks.

The map of experts and domains is drawn in points, as the map of domains is: an image would be a second format inside
the page, which its content security policy refuses, and a shape for each of 128 x 128 cells would be megabytes. So
colours have nine levels, cells of one level that lie side by side are one rectangle, and all rectangles of a level are
one path. The levels are opacities of one colour, which is why the same figure serves a light and a dark page.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cbtm.merge.figures import (
    COLOURS,
    INK,
    NAMED_DOMAINS,
    WIDTH,
    format_change,
    format_perplexity,
    legend_above,
    log_scale,
    plain_text,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

VALUES_UP_TO = 12
"""Rows or columns above which a cell of the map has no room for its number."""

_POINTS = 72.0 * WIDTH
_OPACITIES = (0.85, 0.6, 0.51, 0.43, 0.35, 0.27, 0.19, 0.12, 0.05)  # the row's best, then away from it
_MISSING, _INFINITE = -1, -2


def domain_chart(rows: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]], *, label: str) -> str:
    """Dense model against ensemble in each domain, the largest gain on top, and the change with its interval.

    Up to `NAMED_DOMAINS` domains get a row with both perplexities; more are ranked by their change alone.

    Args:
        rows: Rows of `by_domain` in which both "dense" and "ensemble" are finite numbers; those with a
            "dense_ratio_interval" get whiskers.
        terms: Top terms of each cluster.
        label: What the figure shows, for readers who do not see it.
    """
    ranked = sorted(rows, key=lambda row: (row["ensemble"] / row["dense"], row["cluster"]))
    if len(ranked) > NAMED_DOMAINS:
        return svg("domains", label, (WIDTH, 3.4), lambda figure: _draw_ranked_domains(figure, ranked))
    size = (WIDTH, 0.9 + 0.28 * len(ranked))
    return svg("domains", label, size, lambda figure: _draw_named_domains(figure, ranked, terms))


def _draw_named_domains(
    figure: "Figure", ranked: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]]
) -> None:
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[5, 4])
    for row, domain in enumerate(ranked):
        left.plot([domain["dense"], domain["ensemble"]], [row, row], color=INK, alpha=0.35, linewidth=1.6)
        change = format_change(domain["ensemble"] / domain["dense"])
        right.text(1.02, row, change, transform=right.get_yaxis_transform(), va="center")
    for arm, marker in (("dense", "s"), ("ensemble", "o")):
        values = [domain[arm] for domain in ranked]
        left.plot(values, range(len(ranked)), marker, color=COLOURS[arm], markersize=6, label=arm)
    names = [plain_text(", ".join(terms.get(domain["cluster"], ())[:3]), 30) for domain in ranked]
    labels = [f"{name} · {domain['cluster']}" for name, domain in zip(names, ranked, strict=True)]
    left.set_yticks(range(len(ranked)), labels)
    left.set_ylim(len(ranked) - 0.4, -0.6)
    values = [domain[arm] for domain in ranked for arm in ("dense", "ensemble")]
    if max(values) > 4 * min(values):
        log_scale(left.xaxis)
    left.set_xlabel("perplexity on the documents of the domain")
    changes, whiskers = _changes(ranked)
    right.axvline(0, color=COLOURS["dense"], linewidth=1.2, linestyle="--")
    style: dict[str, Any] = {"color": COLOURS["ensemble"], "elinewidth": 1.1, "capsize": 2.5, "markersize": 4}
    right.errorbar(changes, range(len(ranked)), xerr=whiskers, fmt="o", **style)
    right.set_xlim(*_change_limits(changes, whiskers))
    right.set_xlabel("change to dense, %")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
    legend_above(figure, left)


def _draw_ranked_domains(figure: "Figure", ranked: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    changes, whiskers = _changes(ranked)
    wins = sum(change < 0 for change in changes)
    axes.axhline(0, color=COLOURS["dense"], linewidth=1.2, linestyle="--", label="dense")
    label = f"ensemble ({wins} of {len(ranked)} domains below dense)"
    # As one line each, for a bar with caps would be three shapes for every domain.
    axes.vlines(
        range(1, len(ranked) + 1),
        [change - below for change, below in zip(changes, whiskers[0], strict=True)],
        [change + above for change, above in zip(changes, whiskers[1], strict=True)],
        color=COLOURS["ensemble"],
        alpha=0.45,
        linewidth=1,
    )
    axes.plot(range(1, len(ranked) + 1), changes, "o", color=COLOURS["ensemble"], markersize=3.5, label=label)
    axes.set_ylim(*_change_limits(changes, whiskers))
    axes.set_xlabel("domains, ranked by change")
    axes.set_ylabel("change to dense, %")
    legend_above(figure, axes)


def _changes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Changes to dense in percent, and how far their intervals reach below and above; NaN where that is not known."""
    changes = [100 * (row["ensemble"] / row["dense"] - 1) for row in rows]
    below, above = [], []
    for row, change in zip(rows, changes, strict=True):
        low, high = row.get("dense_ratio_interval") or (None, None)
        below.append(max(0.0, change - 100 * (low - 1)) if low is not None and math.isfinite(low) else math.nan)
        above.append(max(0.0, 100 * (high - 1) - change) if high is not None and math.isfinite(high) else math.nan)
    return changes, (below, above)


def _change_limits(changes: Sequence[float], whiskers: tuple[Sequence[float], Sequence[float]]) -> tuple[float, float]:
    """Limits of an axis of changes: a whisker of a domain of few documents may run out of it, no point does."""
    low, high = min(0.0, *changes), max(0.0, *changes)
    reach = max(5.0, 1.5 * (high - low))
    lowest = float(np.nanmin([low, *(np.array(changes) - whiskers[0])]))
    highest = float(np.nanmax([high, *(np.array(changes) + whiskers[1])]))
    margin = 0.06 * reach
    return max(lowest, low - reach) - margin, min(highest, high + reach) + margin


# --- experts on domains ---


@dataclass(frozen=True)
class _Grid:
    """Where cells of the map lie, in points: whole numbers, which are short in SVG."""

    left: int
    bottom: int
    width: int
    height: int
    n_rows: int

    def rectangle(self, row: int, column: int, columns: int = 1) -> list[tuple[float, float]]:
        x, y = self.left + column * self.width, self.bottom + (self.n_rows - 1 - row) * self.height
        right, top = x + columns * self.width, y + self.height
        return [(x, y), (right, y), (right, top), (x, top), (x, y)]

    def centre(self, row: int, column: int) -> tuple[float, float]:
        (x, y), _, (right, top), *_ = self.rectangle(row, column)
        return (x + right) / 2, (y + top) / 2


def expert_map(
    perplexity: Sequence[Sequence[float | None]],
    clusters: Sequence[int],
    terms: Mapping[int, Sequence[str]],
    *,
    label: str,
) -> str:
    """Every expert on every domain: the stronger the colour, the nearer to the best expert of the row.

    Up to `VALUES_UP_TO` domains, cells hold their perplexity. The cell of a domain's own expert is outlined.

    Args:
        perplexity: A row for each domain, in the order of clusters from 0; a column for each expert; a row of None
            has no document, None beside numbers is infinite.
        clusters: Cluster of the expert of each column.
        terms: Top terms of each cluster.
        label: What the figure shows, for readers who do not see it.
    """
    n, m = len(perplexity), len(clusters)
    named = max(n, m) <= NAMED_DOMAINS
    left = 196 if named else 48
    cell = max(1, int((_POINTS - left - 12) // max(n, m)))
    grid = _Grid(left, 46, min(cell, 48) if named else cell, 21 if named else cell, n)
    height = grid.bottom + n * grid.height + 34
    levels, bounds = colour_levels(perplexity)

    def draw(figure: "Figure") -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, _POINTS)
        axes.set_ylim(0, height)
        _draw_cells(axes, grid, levels, clusters)
        _draw_map_names(axes, grid, clusters, terms, named=named)
        _draw_key(axes, bounds)
        if max(n, m) <= VALUES_UP_TO:
            for row, values in enumerate(perplexity):
                for column, value in enumerate(values):
                    text = format_perplexity(value) if value is not None else "∞" if any(values) else "–"
                    axes.text(*grid.centre(row, column), text, fontsize=7.5, ha="center", va="center_baseline")

    return svg("experts", label, (WIDTH, height / 72.0), draw)


def colour_levels(perplexity: Sequence[Sequence[float | None]]) -> tuple[list[list[int]], list[float]]:
    """The colour of each cell by its ratio to the row's best, and where the levels begin.

    Level 0 is the row's best; the eight others are equal steps of the ratio's logarithm, the last of them open: it
    begins where seven eighths of the way to the 95th percentile are gone, so that one hopeless expert does not take
    the colour from all others.

    Returns:
        Levels of the shape of `perplexity`, -1 where a row has no document and -2 where a perplexity is infinite; and
        the ratio at which each of the levels 1 to 8 begins.
    """
    ratios = []
    for row in perplexity:
        known = [value for value in row if value is not None and math.isfinite(value)]
        best = min(known, default=None)
        ratios.append([None if best is None or value is None else value / best for value in row])
    worse = [ratio for row in ratios for ratio in row if ratio is not None and 1 < ratio < math.inf]
    step = max(0.01, math.log(float(np.percentile(worse, 95)))) / 8 if worse else 0.01

    def level(ratio: float | None, row: Sequence[float | None]) -> int:
        if ratio is None or math.isinf(ratio):
            return _MISSING if all(one is None for one in row) else _INFINITE
        return 0 if ratio == 1 else 1 + min(7, int(math.log(ratio) / step))

    return [[level(ratio, row) for ratio in row] for row in ratios], [math.exp(step * index) for index in range(8)]


def _draw_cells(axes: "Axes", grid: _Grid, levels: Sequence[Sequence[int]], clusters: Sequence[int]) -> None:
    from matplotlib.patches import PathPatch

    fills = {level: (COLOURS["ensemble"], opacity) for level, opacity in enumerate(_OPACITIES)}
    fills |= {_MISSING: (INK, 0.1), _INFINITE: (INK, 0.3)}
    rectangles: dict[int, list[list[tuple[float, float]]]] = {}
    for row, found in enumerate(levels):
        start = 0
        for column in range(1, len(found) + 1):
            if column == len(found) or found[column] != found[start]:
                rectangles.setdefault(found[start], []).append(grid.rectangle(row, start, column - start))
                start = column
    for level, drawn in sorted(rectangles.items()):
        axes.add_patch(PathPatch(_path(drawn), facecolor=fills[level], edgecolor="none", gid=f"cells-{level}"))
    own = [grid.rectangle(cluster, column) for column, cluster in enumerate(clusters) if cluster < grid.n_rows]
    if own:
        width = 1.4 if grid.height > 12 else 0.8
        axes.add_patch(PathPatch(_path(own), facecolor="none", edgecolor=INK, linewidth=width, gid="own"))


def _path(rectangles: Sequence[Sequence[tuple[float, float]]]) -> "Path":
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path([point for corners in rectangles for point in corners], codes * len(rectangles))


def _draw_map_names(
    axes: "Axes", grid: _Grid, clusters: Sequence[int], terms: Mapping[int, Sequence[str]], *, named: bool
) -> None:
    """Names of rows, numbers of columns: of many, as many as find room."""
    every = 1 if named else math.ceil(14 / grid.height)
    top = grid.bottom + grid.n_rows * grid.height
    for row in range(0, grid.n_rows, every):
        words = plain_text(", ".join(terms.get(row, ())[:3]), 30)
        text = f"{words} · {row}" if named else str(row)
        axes.text(grid.left - 6, grid.centre(row, 0)[1], text, fontsize=8, ha="right", va="center_baseline")
    for column in range(0, len(clusters), every if named else math.ceil(20 / grid.width)):
        axes.text(grid.centre(0, column)[0], top + 5, str(clusters[column]), fontsize=8, ha="center")
    axes.text(grid.left, top + 19, "expert of cluster", fontsize=9)
    axes.text(grid.left - 6, top + 5, "domain", fontsize=9, ha="right")


def _draw_key(axes: "Axes", bounds: Sequence[float]) -> None:
    from matplotlib.patches import Rectangle

    width = 48
    for level, opacity in enumerate(_OPACITIES):
        x = 34 + width * level
        axes.add_patch(Rectangle((x, 20), width, 12, facecolor=(COLOURS["ensemble"], opacity), edgecolor="none"))
        percent = 100 * (bounds[max(level, 1) - 1] - 1)
        text = "best" if level == 0 else f"+{percent:.{0 if percent >= 10 or percent == 0 else 1}f} %"
        axes.text(x, 7, text, fontsize=8, ha="left")
    axes.text(34 + width * len(_OPACITIES) + 6, 22, "and more above the row’s best", fontsize=8)


# --- tasks ---


def task_chart(rows: Sequence[Mapping[str, Any]], chance: float, *, name: str, label: str) -> str:
    """Accuracy of each model on one task, by plain and by PMI scoring, with intervals and the level of chance.

    Args:
        rows: For each model "name" and, by scoring, "plain" and "pmi": rows of the result's task, or None.
        chance: Accuracy of always giving the most frequent label.
        name: Name of the figure, for its ids.
        label: What the figure shows, for readers who do not see it.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for scoring, marker, role, shift in (("plain", "o", "ensemble", -0.14), ("PMI", "s", "dense", 0.14)):
            found = [(row + shift, cell) for row, one in enumerate(rows) if (cell := one[scoring.lower()])]
            if not found:
                continue
            places, values = [place for place, _ in found], [100 * one["accuracy"] for _, one in found]
            intervals = [one.get("interval") or (one["accuracy"], one["accuracy"]) for _, one in found]
            reach = np.abs(100 * np.array(intervals).T - values)
            style: dict[str, Any] = {"color": COLOURS[role], "elinewidth": 1.1, "capsize": 2.5, "markersize": 4.5}
            axes.errorbar(values, places, xerr=reach, fmt=marker, label=scoring, **style)
        axes.axvline(100 * chance, color=INK, alpha=0.6, linewidth=1, linestyle="--", label="chance")
        axes.set_yticks(range(len(rows)), [one["name"] for one in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("accuracy, %")
        legend_above(figure, axes)

    return svg(name, label, (WIDTH, 0.9 + 0.3 * len(rows)), draw)
