"""Figures of the report, as inline SVG text.

matplotlib draws them because people who run experiments have it and its axes, log ticks and legends are right.
We use `Figure` alone, never pyplot: no global state, no display. Three choices make the SVG fit for a page:
text stays text (`svg.fonttype: none`), so it is small, searchable and in the reader's font; ids are hashed with
the figure's name as salt and prefixed with it, so that figures on one page do not share ids and the same data
gives the same bytes; the ink colour becomes `currentColor`, so that axes follow a dark page.

Colours are those of Okabe and Ito (2008), told apart by people with any common colour blindness; a marker or a
line style always says the same as the colour.
"""

import html
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cbtm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "seed": "#7f7f7f",
    "dense": "#0072b2",
    "random": "#cc79a7",
    "ensemble": "#d55e00",
    "average": "#56b4e9",
    "single": "#009e73",
}
NAMED_DOMAINS = 24
"""Above this many domains a figure ranks them without names; each row needs 0.28 inch to stay readable."""

INK = "#010203"  # replaced by currentColor; a colour that no palette uses
DIRECTIONS = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
WIDTH = 8.4  # inches at 72 units an inch: 605 units over a page of about 900 CSS pixels
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a top term may hold a dollar sign
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so the layout is that of no machine
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Bar:
    """One bar: a perplexity, its interval, the role that gives it its colour (a key of `COLOURS`).

    `impossible_tokens` is said where the perplexity is infinite.
    """

    label: str
    value: float
    interval: tuple[float, float] | None
    role: str
    impossible_tokens: int = 0


def format_perplexity(value: float | None) -> str:
    """Two decimals below 20, one below 1000, thousands separated by commas above; an en dash for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    decimals = 2 if abs(value) < 20 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}"


def show_perplexity(value: float | None) -> str:
    """As `format_perplexity`, with the sign of infinity, which a terminal's table does without."""
    return "∞" if value is not None and math.isinf(value) else format_perplexity(value)


def format_change(ratio: float | None) -> str:
    """A ratio to the dense model as a signed percentage: 0.813 is −18.7 %; an en dash for None."""
    if ratio is None:
        return "–"
    if math.isinf(ratio):
        return "+∞\u00a0%"
    percent = round(100.0 * (ratio - 1.0), 1)
    return f"{'−' if percent < 0 else '+' if percent > 0 else '±'}{abs(percent):.1f}\u00a0%"


def plain_text(text: object, limit: int) -> str:
    """One line without control, direction or surrogate characters, cut to `limit` characters with an ellipsis."""
    # They break the SVG (Cc), cannot be encoded as UTF-8 (Cs), or reorder the text around them (directions).
    spaced = (" " if unicodedata.category(c) in {"Cc", "Cs"} else c for c in str(text)[: 8 * limit])
    line = " ".join("".join(spaced).translate(DIRECTIONS).split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Horizontal bars from zero with interval whiskers; a bar far beyond the others is cut and marked."""
    limit = _axis_limit([bar.value for bar in bars if math.isfinite(bar.value)])

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for row, bar in enumerate(bars):
            cut = bar.value > limit
            axes.barh(row, min(bar.value, limit), height=0.62, color=COLOURS[bar.role])
            if bar.interval is not None and not cut:
                below, above = (abs(bar.value - min(end, 2 * limit)) for end in bar.interval)
                axes.errorbar(bar.value, row, xerr=[[below], [above]], color=INK, linewidth=1, capsize=2.5)
            axes.text(1.01, row, _bar_text(bar, cut=cut), transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        ends = [bar.interval[1] for bar in bars if bar.interval is not None and bar.value <= limit]
        axes.set_xlim(0, 1.02 * max([limit, *(min(end, 1.2 * limit) for end in ends)]))
        axes.set_xlabel("perplexity (lower is better)")

    return svg("headline", label, (WIDTH, 0.7 + 0.31 * len(bars)), draw)


def top_k_chart(
    rows: Sequence[Mapping[str, Any]], references: Mapping[str, float], n_experts: int, *, label: str
) -> str:
    """Perplexity of the selected ensembles against the number of experts kept, with the other arms as levels.

    Args:
        rows: Selected rows of the ensemble grid, one for each top_k, of finite perplexity.
        references: Perplexity by arm ("dense", "random", "seed"); a level far from the others is left out.
        n_experts: Number of experts; marks the right end as "all".
        label: What the figure shows, for readers who do not see it.
    """
    rows = sorted(rows, key=lambda row: row["top_k"])
    top_ks = [row["top_k"] for row in rows]
    values = [row["perplexity"] for row in rows]
    errors = np.abs(np.array([_interval(row) for row in rows]).T - np.array(values))

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        axes.errorbar(top_ks, values, yerr=errors, color=COLOURS["ensemble"], marker="o", capsize=3, label="ensemble")
        _levels(axes, values, references)
        axes.set_xticks(top_ks, [f"{k} (all)" if k == n_experts else str(k) for k in top_ks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(min(top_ks) / 1.25, max(top_ks) * 1.25)
        axes.set_xlabel("experts kept for a token (top-k)")
        axes.set_ylabel("perplexity")
        legend_above(figure, axes)

    return svg("top-k", label, (WIDTH, 3.1), draw)


def temperature_chart(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]], *, label: str) -> str:
    """Perplexity against the routing temperature: a panel for each distance power, a line for each top-k.

    Args:
        rows: Rows of the ensemble grid by clustering, of finite perplexity.
        chosen: Those of them that get a ring.
        label: What the figure shows, for readers who do not see it.
    """
    powers = sorted({row["distance_power"] for row in rows})
    top_ks = sorted({row["top_k"] for row in rows})
    shades = dict(zip(top_ks, _shades(len(top_ks)), strict=True))

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(1, len(powers), sharey=True, squeeze=False)[0]
        for power, axes in zip(powers, panels, strict=True):
            for order, top_k in enumerate(top_ks):
                points = _along_temperature(rows, power, top_k)
                style = ("-", "--", ":", "-.")[order % 4]
                axes.plot(*points, style, color=shades[top_k], marker=".", label=f"top-{top_k}", linewidth=1.4)
            for row in chosen:
                if row["distance_power"] == power:
                    ring = {"color": "none", "markeredgecolor": shades[row["top_k"]], "markersize": 10}
                    axes.plot(row["temperature"], row["perplexity"], "o", **ring)
            axes.plot([], [], "o", color="none", markeredgecolor=INK, markersize=9, label="chosen")
            log_scale(axes.xaxis)
            axes.set_title(f"weight ∝ exp(−distance{ {2: '²', 4: '⁴'}.get(power, f'^{power:g}') } / T)")
            axes.set_xlabel("temperature T")
        values = [row["perplexity"] for row in rows]
        if max(values) > 4 * min(values):
            log_scale(panels[0].yaxis)
        panels[0].set_ylabel("perplexity")
        legend_above(figure, panels[-1])

    return svg("temperature", label, (WIDTH, 3.3), draw)


def training_chart(curves: Mapping[str, Sequence[Mapping[str, float]]], *, label: str) -> str:
    """Training loss against step: the branched models in one panel, the seed model, if trained, in its own."""
    seed = "seed" in curves
    branched = sorted((name for name in curves if name != "seed"), key=lambda name: (member_kind(name), name))
    bins = 120 if len(branched) <= 32 else 50

    def draw(figure: "Figure") -> None:
        ratios = ([1] if seed else []) + ([2] if branched else [])
        panels = list(figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0])
        if seed:
            axes = panels.pop(0)
            axes.plot(*smooth_curve(curves["seed"], bins=bins), color=COLOURS["seed"], linewidth=1.4)
            axes.set_title("seed model")
            axes.set_xlabel("step")
            axes.set_ylabel("training loss, nats per token")
        for axes in panels:
            _draw_branched(axes, curves, branched, bins)
            axes.set_xlabel("step")
            if not seed:
                axes.set_ylabel("training loss, nats per token")
            legend_above(figure, axes)

    return svg("training", label, (WIDTH, 3.2), draw)


def smooth_curve(points: Sequence[Mapping[str, float]], *, bins: int) -> tuple[list[float], list[float]]:
    """Steps and losses, averaged over equal runs of points so that at most `bins` remain.

    Points without a finite loss are left out; of two points at one step (a resumed run) the later one counts.
    """
    losses = {float(point["step"]): float(point["train/loss"]) for point in points if "train/loss" in point}
    finite = sorted((step, loss) for step, loss in losses.items() if math.isfinite(loss))
    if not finite:
        return [], []
    groups = np.array_split(np.array(finite), min(bins, len(finite)))
    means = [group.mean(axis=0) for group in groups]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


def member_kind(name: str) -> str:
    """What trained a curve: "seed", "dense", "expert" or "random".

    Raises:
        DataError: If `name` is none of seed, dense, cluster-00003, random-00003.
    """
    if name in {"seed", "dense"}:
        return name
    match = re.fullmatch(r"(cluster|random)-\d+", name)
    if match is None:
        raise DataError(f"unknown member {name!r} in curves; expected seed, dense, cluster-00000 or random-00000")
    return "expert" if match[1] == "cluster" else "random"


def _draw_branched(
    axes: "Axes", curves: Mapping[str, Sequence[Mapping[str, float]]], members: Sequence[str], bins: int
) -> None:
    kinds = [member_kind(member) for member in members]
    experts, randoms = kinds.count("expert"), kinds.count("random")
    styles: dict[str, dict[str, Any]] = {
        "random": {"color": COLOURS["random"], "linewidth": 0.9, "alpha": 0.6, "linestyle": "--", "zorder": 1},
        "expert": {"color": COLOURS["ensemble"], "linewidth": 0.9, "alpha": 0.8 if experts <= 32 else 0.4, "zorder": 2},
        "dense": {"color": COLOURS["dense"], "linewidth": 2.2, "zorder": 3},
    }
    names = {"dense": "dense", "expert": f"experts ({experts})", "random": f"random-cluster experts ({randoms})"}
    for member, kind in zip(members, kinds, strict=True):
        label = names.pop(kind, None)  # one entry in the legend for each kind
        axes.plot(*smooth_curve(curves[member], bins=bins), label=label, **styles[kind])
    axes.set_title("branched from it")


def _levels(axes: "Axes", values: Sequence[float], references: Mapping[str, float]) -> None:
    """Horizontal lines for the other arms; the seed may be ten times higher and would flatten the curve."""
    near = [*values, references.get("dense", values[0])]
    low, high = min(near), max(near)
    reach = max(1.5 * (high - low), 0.1 * high)
    for arm, style in (("dense", "--"), ("random", ":"), ("seed", "-.")):
        if arm in references and low - reach <= references[arm] <= high + reach:
            name = "random clusters" if arm == "random" else arm
            axes.axhline(references[arm], color=COLOURS[arm], linestyle=style, linewidth=1.4, label=name)


def _along_temperature(rows: Sequence[Mapping[str, Any]], power: float, top_k: int) -> tuple[list[float], list[float]]:
    line = [row for row in rows if row["distance_power"] == power and row["top_k"] == top_k]
    line.sort(key=lambda row: row["temperature"])
    return [row["temperature"] for row in line], [row["perplexity"] for row in line]


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """The ends of a row's interval; where one is missing or infinite, the value itself, which draws no whisker."""
    low, high = row["interval"] or (None, None)
    return (row["perplexity"] if low is None else low), (row["perplexity"] if high is None else high)


def _bar_text(bar: Bar, *, cut: bool) -> str:
    if math.isinf(bar.value):
        return f"∞ ({bar.impossible_tokens:,} impossible)" if bar.impossible_tokens else "∞"
    return format_perplexity(bar.value) + (" (bar cut)" if cut else "")


def _axis_limit(values: Sequence[float]) -> float:
    """The largest value that is not far (2.5 times) above the median; with a margin if others are cut."""
    if not values:
        return 1.0
    kept = [value for value in values if value <= 2.5 * float(np.median(values))]
    return max(values) if len(kept) == len(values) else 1.3 * max(kept)


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    # The ends of viridis vanish on a white or a dark page, so its middle is used.
    return [colormaps["viridis"](x) for x in np.linspace(0.78, 0.28, count)]


def log_scale(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_data_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 300 else (1,)))
    # Plain numbers: matplotlib's own are powers in mathtext, which is off because of dollar signs in terms.
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def legend_above(figure: "Figure", axes: "Axes", *, columns: int = 6) -> None:
    """Put the legend of `axes` above the panels, in at most so many columns."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, max(1, len(labels))))


def svg(name: str, label: str, size: tuple[float, float], draw: Callable[["Figure"], None]) -> str:
    """Draw a figure of `size` inches and return its `<svg>` element, without prologue, date and fixed size."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f'the report needs matplotlib ({error}); pip install "cbtm[report]"') from None
    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The reader's browser has the glyphs; matplotlib only measures with its own font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change the report
        settings: Any = {**_STYLE, "svg.hashsalt": name}
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _inline(buffer.getvalue(), name, label)


def _inline(document: str, name: str, label: str) -> str:
    start = document.index("<svg")
    root_end = document.index(">", start) + 1
    view_box = re.search(r'viewBox="[\d. ]+"', document[start:root_end])
    if view_box is None:
        raise RuntimeError("matplotlib wrote an SVG without viewBox; the report relies on it to scale figures")
    root = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{view_box[0]} role="img" aria-label="{html.escape(label)}">'
    )
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", document[root_end:])
    return root + body.replace(INK, "currentColor").rstrip()
