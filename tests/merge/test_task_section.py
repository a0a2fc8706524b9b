"""Rows of few-shot tasks."""

from typing import Any
from xml.etree import ElementTree

from hand_made_result import make_full_result, make_result

from cbtm.merge.task_section import draw_tasks, task_tables


def test_rows_are_models_and_chosen_ensembles_with_both_scorings():
    (task,) = task_tables(make_full_result())
    found = {row["name"]: (_accuracy(row["plain"]), _accuracy(row["pmi"])) for row in task["rows"]}
    assert found == {
        "seed model": (51, 54),
        "dense model": (62, 66),
        "clustering, all 4": (75, 78),  # the row of 99 was not selected
        "posterior, all 4": (None, 72),
        "greedy soup of experts 0, 1": (58, None),
    }


def _accuracy(cell: dict[str, Any] | None) -> int | None:
    return None if cell is None else round(100 * cell["accuracy"])


def test_spread_is_over_seeds_and_needs_two():
    result = make_full_result()
    (task,) = task_tables(result)
    assert task["rows"][2]["plain"]["spread"] == (0.7, 0.8)
    result["tasks"][0]["rows"][0]["by_seed"] = [0.5]
    assert task_tables(result)[0]["rows"][0]["plain"]["spread"] is None


def test_scorings_are_those_there_are():
    result = make_full_result()
    assert task_tables(result)[0]["scorings"] == [("plain", "plain"), ("pmi", "PMI")]
    result["tasks"][0]["rows"] = [row for row in result["tasks"][0]["rows"] if row["scoring"] == "pmi"]
    assert task_tables(result)[0]["scorings"] == [("pmi", "PMI")]


def test_figures_have_a_name_and_a_label_with_the_numbers():
    drawn = draw_tasks(make_full_result())
    label = ElementTree.fromstring(drawn["task-0"]).get("aria-label", "")
    assert label.startswith("Accuracy on reviews: seed model 51.0 % plain, 54.0 % pmi; dense model 62.0 % plain")
    assert label.endswith("Chance is 50.5 %.")
    assert draw_tasks(make_result()) == {}
