"""The table of every kind of ensemble."""

import pytest
from hand_made_result import make_full_result, make_infinite, make_result

from cbtm.merge.ensemble_section import ensemble_label, kind_remarks, kind_rows


def test_rows_are_clustering_at_each_top_k_then_each_kind_with_the_most_experts_then_averages():
    rows = kind_rows(make_full_result())
    assert [(row["arm"].name, row["arm"].perplexity) for row in rows] == [
        ("clustering, all 4", 40.0),
        ("clustering, top-2", 41.0),
        ("clustering, top-1", 42.0),
        ("uniform", 70.0),
        ("product of experts, all 4", 39.0),  # not its top-1 row, of 40
        ("bayes, all 4", 43.0),
        ("posterior, all 4", 38.0),
        ("prior", 60.0),
        ("oracle", 37.0),
        ("uniform average of parameters", 90.0),
        ("weighted average of parameters", 80.0),
        ("greedy soup of experts 0, 1", 49.0),
    ]
    posterior = rows[6]
    assert posterior["arm"].change_to_dense == pytest.approx(38 / 50 - 1)
    assert posterior["interval"] == pytest.approx((0.75, 0.77))
    assert (posterior["experts_used"], posterior["flops_relative"], posterior["routing_entropy"]) == (4.0, 3.6, 0.75)
    assert [row["setting"] for row in rows[3:6]] == [None, "T = 0.1, distance to the power 2", None]
    assert [(row["experts_used"], row["flops_relative"]) for row in rows[-3:]] == [(1.0, 1.0)] * 3
    assert [row["role"] for row in rows] == ["ensemble"] * 9 + ["average"] * 3


def test_the_selected_row_is_shown_and_not_the_best_one():
    result = make_full_result()
    better = {**result["ensemble"][-1], "ensemble": "posterior", "top_k": 4, "perplexity": 20.0, "selected": False}
    result["ensemble"].append(better)
    assert "posterior, all 4" in [row["arm"].name for row in kind_rows(result)]
    assert 20.0 not in [row["arm"].perplexity for row in kind_rows(result)]


def test_a_result_of_cbtm_0_1_0_has_no_such_table():
    assert kind_rows(make_result()) == []  # its uniform row was not selected
    assert kind_remarks(make_result()) == []


def test_averages_alone_make_a_table():
    result = {**make_result(), "averages": make_full_result()["averages"]}
    assert [row["arm"].name for row in kind_rows(result)][2:4] == ["clustering, top-1", "uniform average of parameters"]
    assert [name for name, _ in kind_remarks(result)] == [
        *("clustering", "uniform average of parameters", "weighted average of parameters", "greedy soup"),
    ]


def test_each_kind_is_explained_once_and_the_oracle_is_said_to_be_no_model():
    said = dict(kind_remarks(make_full_result()))
    assert len(said) == 7 + 3
    assert "no model" in said["oracle"]
    assert "the paper’s" in said["clustering"]


def test_an_infinite_row_keeps_its_count_and_has_no_interval_of_change():
    result = make_full_result()
    row = next(row for row in result["ensemble"] if row["ensemble"] == "bayes")
    make_infinite(row, 7)
    shown = next(row for row in kind_rows(result) if row["arm"].name == "bayes, all 4")
    assert (shown["arm"].perplexity, shown["arm"].impossible_tokens) == (float("inf"), 7)
    assert shown["interval"] is None
    assert shown["arm"].change_to_dense == float("inf")


def test_labels_name_top_k_where_it_is_a_choice():
    assert ensemble_label("bayes", 2, 8) == "bayes, top-2"
    assert ensemble_label("oracle", 1, 8) == "oracle"
    assert ensemble_label("clustering", 1, 1) == "clustering"
    assert ensemble_label("a_new_one", 8, 8) == "a new one, all 8"
