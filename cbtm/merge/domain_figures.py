"""Figures of the domains that were found: their map and their sizes.

The map is drawn in points rather than in axes: circles and names are then laid out by arithmetic, before anything is
drawn. Names take the first free place beside their circle, those of large domains first; a name that finds none is
left out, for the page lists the names by number. What two axes distort, lines mend: each domain is joined to the one
whose centre is nearest in all dimensions.
"""

import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cbtm.merge.figures import COLOURS, INK, NAMED_DOMAINS, WIDTH, legend_above, plain_text, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""

_POINTS = 72.0 * WIDTH
_MARGIN = (70.0, 36.0)  # beside and above the outermost centres, for names and circles
_HEIGHT = (190.0, 430.0)
_LARGEST_RADIUS = 32.0
_SMALLEST_RADIUS = 2.5
_NAME_CHARACTERS = 30


@dataclass(frozen=True)
class Place:
    """Where one domain is drawn, in points from the lower left corner.

    Attributes:
        x: Centre of the circle.
        y: Centre of the circle.
        radius: Radius of the circle; 0 for a domain that received nothing.
        name: Lower left corner of the name and its text, or None where it found no room.
        numbered: Whether its number has room in the circle, or beside other numbers.
    """

    x: float
    y: float
    radius: float
    name: tuple[float, float, str] | None
    numbered: bool


def domain_map(domains: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]], *, label: str) -> str:
    """Map of the domains: a circle at each position, its area by tokens, joined to its nearest neighbour.

    Args:
        domains: Entries of the result's "domains", with "position", "neighbours", "tokens" and "documents".
        terms: Top terms of each cluster.
        label: What the figure shows, for readers who do not see it.
    """
    places, height = place_domains(domains, terms)
    number_size, name_size = _text_sizes(len(domains))
    line: dict[str, Any] = {
        "color": INK,
        "alpha": 0.25 if len(domains) <= NAMED_DOMAINS else 0.15,
        "linewidth": 1,
        "zorder": 1,
    }

    def draw(figure: "Figure") -> None:
        from matplotlib.patches import Circle

        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, _POINTS)
        axes.set_ylim(0, height)
        by_cluster = {domain["cluster"]: place for domain, place in zip(domains, places, strict=True)}
        for domain, place in zip(domains, places, strict=True):
            for neighbour in domain["neighbours"][:1]:
                other = by_cluster[neighbour["cluster"]]
                axes.plot([place.x, other.x], [place.y, other.y], **line)
        for domain, place in zip(domains, places, strict=True):
            radius, gid = max(place.radius, 1.0), f"domain-{domain['cluster']}"
            colour, fill = COLOURS["ensemble"], (COLOURS["ensemble"], 0.3)
            axes.add_patch(Circle((place.x, place.y), radius, edgecolor=colour, facecolor=fill, gid=gid, zorder=2))
            if place.numbered:
                number = str(domain["cluster"])
                centred: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
                axes.text(place.x, place.y, number, gid=f"{gid}-number", fontsize=number_size, zorder=4, **centred)
            if place.name is not None:
                x, y, text = place.name
                axes.text(x, y, text, fontsize=name_size, va="bottom", zorder=3)

    titles = {domain["cluster"]: _title(domain, terms) for domain in domains}
    return _with_titles(svg("map", label, (WIDTH, height / 72.0), draw), titles)


def size_chart(domains: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]], *, label: str) -> str:
    """Share of each domain in the documents and in the tokens, the largest on top, with the equal share as a level.

    Up to `NAMED_DOMAINS` domains get a row each; more are ranked by their tokens without names.

    Args:
        domains: Entries of the result's "domains".
        terms: Top terms of each cluster.
        label: What the figure shows, for readers who do not see it.
    """
    ranked = sorted(domains, key=lambda domain: (-domain["share_tokens"], domain["cluster"]))
    named = len(ranked) <= NAMED_DOMAINS
    size = (WIDTH, 0.9 + 0.28 * len(ranked)) if named else (WIDTH, 3.0)
    draw = _draw_named_sizes if named else _draw_ranked_sizes
    return svg("sizes", label, size, lambda figure: draw(figure, ranked, terms))


_SHARES = (("share_documents", "s", "dense", "documents"), ("share_tokens", "o", "ensemble", "tokens"))


def _draw_named_sizes(
    figure: "Figure", ranked: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]]
) -> None:
    axes = figure.subplots()
    for row, domain in enumerate(ranked):
        shares = [100 * domain[key] for key, *_ in _SHARES]
        axes.plot(shares, [row, row], color=INK, alpha=0.35, linewidth=1.6)
    rows = range(len(ranked))
    for key, marker, role, name in _SHARES:
        shares = [100 * domain[key] for domain in ranked]
        axes.plot(shares, rows, marker, color=COLOURS[role], markersize=6, label=name)
    axes.axvline(100 / len(ranked), color=INK, alpha=0.6, linewidth=1, linestyle="--", label="equal share")
    names = [plain_text(", ".join(terms.get(domain["cluster"], ())[:3]), 34) for domain in ranked]
    axes.set_yticks(rows, [f"{name} · {domain['cluster']}" for name, domain in zip(names, ranked, strict=True)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the training split, %")
    legend_above(figure, axes)


def _draw_ranked_sizes(
    figure: "Figure", ranked: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]]
) -> None:
    axes = figure.subplots()
    for key, marker, role, name in _SHARES:
        shares = [100 * domain[key] for domain in ranked]
        axes.plot(range(1, len(ranked) + 1), shares, marker, color=COLOURS[role], markersize=3.5, label=name)
    axes.axhline(100 / len(ranked), color=INK, alpha=0.6, linewidth=1, linestyle="--", label="equal share")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("domains, ranked by tokens")
    axes.set_ylabel("share of the training split, %")
    legend_above(figure, axes)


# --- layout of the map ---


def place_domains(
    domains: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]]
) -> tuple[list[Place], float]:
    """Lay the map out: a place for each domain in order, and the height that they need in points."""
    points, height = _to_points([domain["position"] for domain in domains])
    tokens = [domain["tokens"] for domain in domains]
    radii = _radii(tokens)
    circles = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(points, radii, strict=True)]
    names = _place_names(domains, terms, circles, height)
    numbered = _place_numbers(domains, points)
    places = [
        Place(x, y, radius, names.get(index), index in numbered)
        for index, ((x, y), radius) in enumerate(zip(points, radii, strict=True))
    ]
    return places, height


def _place_numbers(domains: Sequence[Mapping[str, Any]], points: Sequence[tuple[float, float]]) -> set[int]:
    """The domains whose number, in the middle of the circle, covers no other; those of the largest come first."""
    taken: dict[int, _Box] = {}
    size, _ = _text_sizes(len(domains))
    for index in _largest_first(domains):
        (x, y), width = points[index], _text_width(str(domains[index]["cluster"]), size)
        box = (x - width / 2, y - size / 2, x + width / 2, y + size / 2)
        if not any(_overlap(box, other) for other in taken.values()):
            taken[index] = box
    return set(taken)


def _place_names(
    domains: Sequence[Mapping[str, Any]], terms: Mapping[int, Sequence[str]], circles: Sequence[_Box], height: float
) -> dict[int, tuple[float, float, str]]:
    """A free place for each name, those of the largest domains first: of its terms, as many as find room."""
    taken: list[_Box] = []
    names: dict[int, tuple[float, float, str]] = {}
    counts = (3, 2, 1) if len(domains) <= NAMED_DOMAINS else (1,)
    _, size = _text_sizes(len(domains))
    for index in _largest_first(domains):
        for count in counts:
            text = plain_text(", ".join(terms.get(domains[index]["cluster"], ())[:count]), _NAME_CHARACTERS)
            boxes = _candidates(circles[index], _text_width(text, size), 1.3 * size)
            box = next((box for box in boxes if _is_free(box, index, circles, taken, height)), None)
            if text and box is not None:
                taken.append(box)
                names[index] = (box[0], box[1], text)
                break
    return names


def _largest_first(domains: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted(range(len(domains)), key=lambda index: (-domains[index]["tokens"], index))


def _is_free(box: _Box, index: int, circles: Sequence[_Box], taken: Sequence[_Box], height: float) -> bool:
    if box[0] < 0 or box[1] < 0 or box[2] > _POINTS or box[3] > height:
        return False
    others = [circle for other, circle in enumerate(circles) if other != index]
    return not any(_overlap(box, other) for other in [*taken, *others])


def _candidates(circle: _Box, width: float, height: float) -> list[_Box]:
    """Places of a name: right, left, below and above its circle, then at its corners."""
    left, bottom, right, top = circle
    x, y, gap = (left + right) / 2, (bottom + top) / 2, 3.0
    corner = 0.29 * (right - left) / 2  # a square's corner is that much nearer on a circle
    lower_left = [
        (right + gap, y - height / 2),
        (left - gap - width, y - height / 2),
        (x - width / 2, bottom - gap - height),
        (x - width / 2, top + gap),
        (right - corner + gap, top - corner),
        (right - corner + gap, bottom + corner - height),
        (left + corner - gap - width, top - corner),
        (left + corner - gap - width, bottom + corner - height),
    ]
    return [(a, b, a + width, b + height) for a, b in lower_left]


def _to_points(positions: Sequence[Sequence[float]]) -> tuple[list[tuple[float, float]], float]:
    """Positions in points, one scale on both axes, and the height of the figure."""
    xs, ys = [x for x, _ in positions], [y for _, y in positions]
    width, depth = max(xs) - min(xs), max(ys) - min(ys)
    room = (_POINTS - 2 * _MARGIN[0], _HEIGHT[1] - 2 * _MARGIN[1])
    scale = min((place / span for place, span in zip(room, (width, depth), strict=True) if span > 0), default=1.0)
    height = max(_HEIGHT[0], scale * depth + 2 * _MARGIN[1])
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    points = [(_POINTS / 2 + scale * (x - middle[0]), height / 2 + scale * (y - middle[1])) for x, y in positions]
    return points, height


def _radii(tokens: Sequence[int]) -> list[float]:
    largest = min(_LARGEST_RADIUS, 90.0 / math.sqrt(len(tokens)))
    return [max(_SMALLEST_RADIUS, largest * math.sqrt(count / max(tokens))) if count else 0.0 for count in tokens]


def _text_sizes(count: int) -> tuple[float, float]:
    """Font sizes of numbers and names on a map of so many domains."""
    return (9.0, 8.0) if count <= NAMED_DOMAINS else (7.0, 7.0) if count <= 64 else (5.5, 6.0)


def _text_width(text: str, size: float) -> float:
    """Width in points, about: the reader's font is not known; wide characters of East Asia take twice the place."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return size * (0.56 * (len(text) - wide) + wide)


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- titles ---


def _title(domain: Mapping[str, Any], terms: Mapping[int, Sequence[str]]) -> str:
    words = ", ".join(terms.get(domain["cluster"], ())[:5])
    return f"{domain['cluster']}: {words} ({domain['documents']:,} documents, {domain['tokens']:,} tokens)"


def _with_titles(drawn: str, titles: Mapping[int, str]) -> str:
    """Give circles and numbers a title, which a browser shows where the pointer rests."""
    return re.sub(
        r'(<g id="map-domain-(\d+)(?:-number)?">)',
        lambda match: f"{match[1]}<title>{html.escape(titles[int(match[2])])}</title>",
        drawn,
    )
