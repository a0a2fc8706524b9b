"""What the report says of few-shot tasks: every model and chosen ensemble by plain and by PMI scoring, and a figure."""

from collections.abc import Mapping
from typing import Any

from cbtm.merge.comparison_figures import task_chart
from cbtm.merge.ensemble_section import ensemble_label
from cbtm.merge.figures import plain_text
from cbtm.merge.headline import average_name, mixed_clusters

_SCORINGS = ("plain", "pmi")
_NAMES = {"seed": "seed model", "dense": "dense model", "random": "random clusters"}
_NAME_CHARACTERS = 60


def task_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tasks with a row for each model and each chosen ensemble.

    Returns:
        The result's tasks with names cut to a line, "figure" (the name of its figure), "scorings" (those there are,
        with what the page calls them) and "rows": for each "name" and, for each scoring, the row of the result with
        "spread" (lowest and highest accuracy over seeds, None with fewer than two), or None.
    """
    return [
        {
            **task,
            "name": plain_text(task["name"], _NAME_CHARACTERS),
            "labels": [plain_text(label, _NAME_CHARACTERS) for label in task["labels"]],
            "figure": f"task-{number}",
            "rows": _rows(task, result),
            "scorings": [
                (scoring, "PMI" if scoring == "pmi" else scoring)
                for scoring in _SCORINGS
                if any(row["scoring"] == scoring for row in task["rows"])
            ],
        }
        for number, task in enumerate(result.get("tasks") or ())
    ]


def draw_tasks(result: Mapping[str, Any]) -> dict[str, str]:
    """A figure of each task as SVG by name."""
    drawn = {}
    for task in task_tables(result):
        if not task["rows"]:
            continue
        values = "; ".join(f"{row['name']} {_values(row)}" for row in task["rows"])
        label = f"Accuracy on {task['name']}: {values}. Chance is {100 * task['chance']:.1f} %."
        drawn[task["figure"]] = task_chart(task["rows"], task["chance"], name=task["figure"], label=label)
    return drawn


def _rows(task: Mapping[str, Any], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in task["rows"]:
        if row["model"] == "ensemble" and not row["selected"]:
            continue
        name = _name(row, result)
        cells = found.setdefault(name, {"name": name, **dict.fromkeys(_SCORINGS)})
        seeds = row.get("by_seed") or []
        cells[row["scoring"]] = {**row, "spread": (min(seeds), max(seeds)) if len(seeds) > 1 else None}
    return list(found.values())


def _name(row: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    model = row["model"]
    if model == "ensemble":
        return ensemble_label(row["ensemble"], row["top_k"], len(mixed_clusters(result)))
    if model.startswith("average-"):
        recipe = model.removeprefix("average-")
        known = (average for average in result.get("averages") or () if average["name"] == recipe)
        return average_name(next(known, {"name": recipe}))
    return _NAMES.get(model, plain_text(model, _NAME_CHARACTERS))


def _values(row: Mapping[str, Any]) -> str:
    cells = ((scoring, row[scoring]) for scoring in _SCORINGS)
    return ", ".join(f"{100 * cell['accuracy']:.1f} % {scoring}" for scoring, cell in cells if cell)
