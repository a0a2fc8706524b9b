"""The layout of the map of domains, and what its drawing says."""

import itertools
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cbtm.merge.domain_figures import Place, domain_map, place_domains, size_chart


def make_domains(k: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "cluster": c, "position": rng.uniform(-1, 1, 2).tolist(), "tokens": int(rng.integers(1, 1000)),
            "documents": 5, "share_tokens": 1 / k, "share_documents": 1 / k,
            "neighbours": [{"cluster": (c + 1) % k, "distance": 1.0}],
        }
        for c in range(k)
    ]  # fmt: skip


def terms_of(k: int) -> dict[int, list[str]]:
    return {c: [f"alpha{c}", f"beta{c}", f"gamma{c}"] for c in range(k)}


def box(place: Place, size: float) -> tuple[float, float, float, float]:
    assert place.name is not None
    x, y, text = place.name
    return x, y, x + 0.56 * size * len(text), y + 1.3 * size


@pytest.mark.parametrize(("k", "size"), [(8, 8.0), (24, 8.0), (60, 7.0), (128, 6.0)])
def test_names_cover_neither_each_other_nor_another_circle_nor_the_edge(k: int, size: float):
    places, height = place_domains(make_domains(k), terms_of(k))
    named = [place for place in places if place.name]
    assert len(named) > k / 3
    for a, b in itertools.combinations([box(place, size) for place in named], 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    for place in named:
        left, bottom, right, top = box(place, size)
        assert left >= 0
        assert bottom >= 0
        assert right <= 8.4 * 72
        assert top <= height
        for other in places:
            if other is not place:
                near = max(left, min(other.x, right)), max(bottom, min(other.y, top))
                assert math.dist(near, (other.x, other.y)) >= other.radius - 1e-9


def test_areas_are_in_proportion_to_tokens_and_the_map_to_the_positions():
    domains = make_domains(4)
    for domain, tokens, position in zip(
        domains, (400, 100, 0, 400), ([1, 0], [-1, 0], [0, 0.5], [0, -0.5]), strict=True
    ):
        domain |= {"tokens": tokens, "position": position}
    places, height = place_domains(domains, terms_of(4))
    assert places[0].radius == 2 * places[1].radius  # a quarter of the tokens, a quarter of the area
    assert places[2].radius == 0
    width, depth = places[0].x - places[1].x, places[2].y - places[3].y
    assert width / depth == pytest.approx(2)  # one scale for both axes: 2 wide, 1 high
    for place in places:
        assert place.radius <= place.y <= height - place.radius


def test_of_domains_in_one_place_the_largest_keeps_its_number():
    domains = [{**domain, "position": [0.0, 0.0]} for domain in make_domains(3)]
    for domain, tokens in zip(domains, (10, 30, 20), strict=True):
        domain["tokens"] = tokens
    places, height = place_domains(domains, terms_of(3))
    assert [place.numbered for place in places] == [False, True, False]
    assert math.isfinite(height)


def test_drawing_has_a_title_on_every_circle_and_a_line_to_each_neighbour():
    svg = domain_map(make_domains(3), {**terms_of(3), 1: ["<b>&", "€"]}, label="Map of 3 domains.")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "Map of 3 domains."
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("1: <b>&, € (5 documents, ") for title in titles)
    circles = {element.get("id", "") for element in root.iter() if element.get("id", "").startswith("map-domain-")}
    assert {f"map-domain-{c}" for c in range(3)} <= circles
    assert len(titles) == len(circles)
    assert svg.count('id="map-line2d') == 3
    assert "#010203" not in svg  # the ink follows the page


@pytest.mark.parametrize("k", [2, 24, 25, 128])
def test_sizes_are_named_up_to_the_limit_and_ranked_above_it(k: int):
    domains = make_domains(k)
    domains[1]["share_tokens"] = 0.9
    text = "".join(ElementTree.fromstring(size_chart(domains, terms_of(k), label="Sizes.")).itertext())
    assert ("alpha1, beta1, gamma1 · 1" in text) == (k <= 24)
    assert ("domains, ranked by tokens" in text) == (k > 24)
    assert "equal share" in text
