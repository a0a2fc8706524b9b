"""Tables and sentences of domains, labels and experts that are left out."""

import math

import pytest
from hand_made_result import leave_out, make_full_result, make_result

from cbtm.merge.domain_section import (
    domain_cards,
    domain_rows,
    draw_comparisons,
    expert_map_remark,
    label_rows,
    left_out_remark,
)


def test_a_change_is_marked_where_its_interval_excludes_0():
    rows = domain_rows(make_full_result())
    # Ensembles of 40, 41, 42, 43 over 50, give or take 0.16: the upper ends are 0.96, 0.98, 1.00, 1.02.
    assert [row["ratio"] for row in rows] == pytest.approx([0.8, 0.82, 0.84, 0.86])
    assert [row["marked"] for row in rows] == [True, True, False, False]
    assert rows[0]["interval"] == (39.0, 41.0)
    assert rows[0]["terms"] == "term0, naïve, a_$x$"


def test_rows_of_an_older_result_have_a_ratio_and_no_interval():
    rows = domain_rows(make_result())
    assert [row["ratio"] for row in rows] == pytest.approx([0.8, 0.82, 0.84, 0.86])
    assert all(row["ratio_interval"] is None and not row["marked"] for row in rows)
    assert label_rows(make_result()) == []


def test_null_beside_documents_is_infinite_where_the_model_exists_and_nothing_where_it_does_not():
    result = make_full_result()
    result["by_domain"][0] |= {"ensemble": None, "own_expert": None, "dense_ratio": None}
    result["by_domain"][1] |= {"seed": None, "n_documents": 0}
    result["by_domain"][2] |= {"random": None}
    result["random"] = None
    rows = domain_rows(result)
    assert (rows[0]["ensemble"], rows[0]["own_expert"], rows[0]["ratio"]) == (math.inf,) * 3
    assert rows[1]["seed"] is None
    assert rows[2]["random"] is None
    result["experts_evaluated"] = [1, 2, 3]
    result["domain_by_expert"]["clusters"] = [1, 2, 3]
    assert domain_rows(result)[0]["own_expert"] is None


def test_an_infinite_expert_alone_is_said_on_its_card():
    result = make_full_result()
    result["experts"][1]["perplexity"] = None
    assert [card["alone"] for card in domain_cards(result)] == [200.0, math.inf, 202.0, 203.0]
    del result["domain_by_expert"]  # then nothing says that it was measured
    assert domain_cards(result)[1]["alone"] is None


def test_rows_by_label_are_those_by_domain_with_labels():
    rows = label_rows(make_full_result())
    found = [(row["label"], row["ensemble"], row["marked"]) for row in rows]
    assert found == [("code", 33.0, True), ("law", 48.5, False)]
    assert rows[0]["own_expert"] is None


def test_what_leaving_out_does_is_weighed_by_tokens():
    result = leave_out(make_full_result(), (1, 3))
    for row, tokens in zip(result["by_domain"], (100, 300, 100, 100), strict=True):
        row["n_tokens"] = tokens
    # Left out: 41 on 300 tokens and 43 on 100; the others 40 and 42 on 100 each; 38 with all.
    without, others = (41**3 * 43) ** (1 / 4), math.sqrt(40 * 42)
    assert left_out_remark(result) == (
        "The experts of clusters 1, 3 were trained and are left out on purpose: the ensembles on this page mix 2 of 4 "
        f"experts. On the documents of their domains perplexity is {without:.1f}, and 38.0 with all trained experts: "
        f"leaving out changes it by +{100 * (without / 38 - 1):.1f}\u00a0%. On the documents of the other domains "
        f"perplexity is {others:.1f}, and 38.0 with all trained experts: leaving out changes it by "
        f"+{100 * (others / 38 - 1):.1f}\u00a0%."
    )
    assert [row["without"] for row in domain_rows(result)] == pytest.approx([40 / 38, 41 / 38, 42 / 38, 43 / 38])
    assert left_out_remark(make_full_result()) is None


def test_best_experts_are_counted_over_domains_with_documents_and_an_expert():
    result = make_full_result()
    assert "In 4 of 4 domains" in (expert_map_remark(result) or "")
    table = result["domain_by_expert"]["perplexity"]
    table[0] = [None] * 4
    table[1][3] = 1.0
    assert "In 2 of 3 domains" in (expert_map_remark(result) or "")
    assert "In 1 of 1 domains" in (expert_map_remark(leave_out(result, (0, 1, 3))) or "")
    assert expert_map_remark(make_result()) is None


def test_figures_of_comparison_appear_with_their_data():
    assert set(draw_comparisons(make_full_result())) == {"domains", "experts"}
    assert set(draw_comparisons(make_result())) == {"domains"}
    label = draw_comparisons(make_full_result())["domains"].split('aria-label="')[1].split('"')[0]
    assert label.endswith("lower in 4 of 4. The interval of the change excludes 0 in 2.")
