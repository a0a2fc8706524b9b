"""Levels of the map of experts, and what the figures of comparison draw."""

import math
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from cbtm.merge.comparison_figures import colour_levels, domain_chart, expert_map, task_chart


def text_of(svg: str) -> str:
    return "".join(ElementTree.fromstring(svg).itertext())


def test_levels_are_equal_steps_of_the_logarithm_up_to_the_95th_percentile():
    # Ratios 2^0 to 2^8; of the eight above 1, the 95th percentile by interpolation is at 0.95 * 7 = 6.65: between 128
    # and 256, 128 + 0.65 * 128 = 211.2. A step is log(211.2) / 8, or 0.965 of a doubling: 2^i is level 1 + i, capped.
    levels, bounds = colour_levels([[2.0**i for i in range(9)]])
    assert bounds == pytest.approx([211.2 ** (i / 8) for i in range(8)])
    assert levels == [[0, 2, 3, 4, 5, 6, 7, 8, 8]]


def test_levels_tell_no_document_from_an_infinite_perplexity():
    levels, _ = colour_levels([[None, None], [10.0, None], [5.0, 5.0]])
    assert levels == [[-1, -1], [0, -2], [0, 0]]


def test_equal_experts_have_a_scale_all_the_same():
    levels, bounds = colour_levels([[7.0, 7.0], [7.0, 7.0]])
    assert levels == [[0, 0], [0, 0]]
    assert bounds[1] > 1


def test_map_has_values_and_names_and_an_outline_for_each_expert_of_its_own():
    svg = expert_map([[10.0, 20.5], [30.0, None], [None, None]], [0, 2], {0: ["<b>", "law"]}, label="Map of 2 experts.")
    text = text_of(svg)
    for part in ("10.00", "20.5", "∞", "–", "<b>, law · 0", "expert of cluster", "best"):
        assert part in text, part
    (own,) = re.findall(r'<g id="experts-own">.*?</g>', svg, flags=re.DOTALL)
    assert own.count("M ") == 2
    assert "#010203" not in svg


def test_map_of_128_has_no_numbers_in_cells_few_paths_and_all_cells():
    rng = np.random.default_rng(0)
    table: list[list[float | None]] = (10 * rng.lognormal(1, 0.5, (128, 128))).tolist()
    svg = expert_map(table, list(range(128)), {}, label="Map of 128 experts.")
    assert len(svg) < 900_000
    groups = re.findall(r'<g id="experts-cells-(\d)">\s*<path d="(.*?)"', svg, flags=re.DOTALL)
    assert [level for level, _ in groups] == list("012345678")
    points = [np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path), dtype=float) for _, path in groups]
    # Rectangles of 4 points a side cover 128 x 128 cells once: their widths sum to as many.
    size = (8.4 * 72 - 60) // 128
    width = sum(np.ptp(one.reshape(-1, 4, 2)[:, :, 0], axis=1).sum() for one in points)
    assert width == 128 * 128 * size
    assert len(text_of(svg)) < 2000


def whiskers(svg: str) -> int:
    (lines,) = re.findall(r'<g id="domains-LineCollection_1">.*?</g>', svg, flags=re.DOTALL)
    return lines.count('d="M')


def domain(cluster: int, dense: float, ensemble: float, **more: Any) -> dict[str, Any]:
    return {"cluster": cluster, "dense": dense, "ensemble": ensemble, **more}


def test_domains_have_whiskers_where_they_have_intervals():
    rows = [domain(0, 50.0, 40.0, dense_ratio_interval=[0.7, 0.9]), domain(1, 50.0, 55.0, dense_ratio_interval=None)]
    svg = domain_chart(rows, {}, label="Domains.")
    assert "change to dense, %" in text_of(svg)
    assert "−20.0\u00a0%" in text_of(svg)
    assert whiskers(svg) == 1
    assert whiskers(domain_chart([domain(0, 50.0, 40.0), domain(1, 50.0, 55.0)], {}, label="Domains.")) == 0


@pytest.mark.parametrize("k", [24, 25])
def test_domains_are_named_up_to_the_limit_and_an_endless_whisker_draws(k: int):
    rows = [domain(c, 50.0, 40.0 + c, dense_ratio_interval=[0.5, math.inf if c else 90.0]) for c in range(k)]
    text = text_of(domain_chart(rows, {c: [f"alpha{c}"] for c in range(k)}, label="Domains."))
    assert ("alpha3 · 3" in text) == (k == 24)
    # 40/50 to 64/50 are -20 to +28 %; the whisker to 9,000 % does not set the axis.
    assert "8000" not in text


def test_tasks_draw_both_scorings_and_chance():
    cell = {"accuracy": 0.7, "interval": [0.65, 0.75]}
    rows = [{"name": "dense model", "plain": cell, "pmi": None}, {"name": "<i>", "plain": cell, "pmi": cell}]
    text = text_of(task_chart(rows, 0.5, name="task-0", label="Accuracy."))
    for part in ("dense model", "<i>", "plain", "PMI", "chance", "accuracy, %"):
        assert part in text, part
    only = task_chart([{"name": "a", "plain": {**cell, "interval": None}, "pmi": None}], 0.5, name="task-1", label="x")
    assert "PMI" not in text_of(only)
