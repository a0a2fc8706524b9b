"""A comparison of several runs: every stage of every arm in one process, and what they come to side by side."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from small import settings

from cbtm import local, stages
from cbtm.comparison import Arm, Comparison
from cbtm.errors import ConfigError
from cbtm.merge.arms_report import format_comparison
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages import comparison as comparison_stages


@pytest.fixture(scope="module")
def values(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("comparison")
    found = settings(str(corpus), str(folder / "out"), f"sqlite:///{folder}/mlflow.db")
    found["train"]["steps"] = 10
    found["evaluate"] |= {"ensembles": ["clustering", "uniform"]}
    found["compare"] = {"n_clusters": [2], "random_states": [0, 1], "plain": [], "by_tokens": [2], "small_batch": [2]}
    return found


def make(run: Run, *, shared: bool = False) -> None:
    stages.plan(run)
    for task in stages.tasks(run):
        if shared and task.name.startswith(("train:cluster", "score:cluster", "evaluate")):
            continue
        task.run()


@pytest.fixture(scope="module")
def made(values: dict[str, Any]) -> Comparison:
    comparison = Comparison.parse(json.dumps(values))
    make(comparison.shared, shared=True)
    for arm in comparison.arms:
        make(comparison.run(arm))
    comparison_stages.compare(comparison)
    return comparison


@pytest.fixture(scope="module")
def result(made: Comparison) -> dict[str, Any]:
    return comparison_stages.result(made)


def row_of(result: dict[str, Any], kind: str, top_k: int | None) -> dict[str, Any]:
    (row,) = [row for row in result["rows"] if (row["kind"], row["top_k"]) == (kind, top_k)]
    return row


def test_every_arm_sees_the_same_tokens(result):
    budget = 10 * 4 * 48
    assert result["tokens_per_arm"] == budget
    assert {arm["tokens_seen"] for arm in result["arms"]} == {budget}
    assert {arm["random_tokens_seen"] for arm in result["arms"]} == {budget, None}
    steps = {arm["name"]: (arm["steps"], arm["sequences_per_step"]) for arm in result["arms"]}
    assert steps["dense-k1-s0"] == (10, 4)
    assert steps["small-batch-k2-s1"] == steps["small-batch-scaled-k2-s1"] == (20, 2)
    assert steps["clusters-k2-s0"] == steps["tokens-k2-s1"] == (10, 2)


def test_rows_are_those_of_every_kind_over_random_states(result):
    kinds = [(row["kind"], row["n_clusters"], row["top_k"]) for row in result["rows"]]
    assert kinds == [
        ("seed", 1, None),
        ("dense", 1, None),
        ("small-batch", 2, None),
        ("small-batch-scaled", 2, None),
        ("random", 2, None),
        ("clusters", 2, 2),
        ("clusters", 2, 1),
        ("tokens", 2, 2),
        ("tokens", 2, 1),
    ]
    for row in result["rows"]:
        states = [0] if row["kind"] == "seed" else [0, 1]
        assert [one["random_state"] for one in row["by_random_state"]] == states


def test_dense_arm_is_the_dense_model_of_a_run_by_itself(made, values, result, tmp_path):
    alone = values | {"root": str(tmp_path / "alone"), "tracking": {"enabled": False}}
    alone["train"] = values["train"] | {"random_clusters": False}
    run = Run(parse_config(json.dumps(alone | {"shared": made.config.root})))
    make(run)
    (first, _) = row_of(result, "dense", None)["by_random_state"]
    # The shards of one cluster are the same documents in another order, so that batches differ and losses hardly do.
    assert first["perplexity"] == pytest.approx(run.result()["dense"]["perplexity"], rel=0.05)


def test_figures_of_an_arm_are_those_of_its_own_result(made, result):
    for state in (0, 1):
        own = made.run(Arm("clusters", 2, state)).result()
        chosen = next(row for row in own["ensemble"] if row["selected"])
        found = row_of(result, "clusters", 2)["by_random_state"][state]
        assert found["perplexity"] == pytest.approx(chosen["perplexity"])
        random = row_of(result, "random", None)["by_random_state"][state]
        assert random["perplexity"] == pytest.approx(own["random"]["perplexity"])
    seed = row_of(result, "seed", None)
    assert seed["perplexity"] == pytest.approx(own["seed"]["perplexity"])


def test_mean_over_random_states_is_that_of_the_losses(result):
    row, dense = row_of(result, "clusters", 2), row_of(result, "dense", None)
    logs = [math.log(one["perplexity"]) for one in row["by_random_state"]]
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(logs)))
    assert (row["least"], row["largest"]) == pytest.approx((math.exp(min(logs)), math.exp(max(logs))))
    assert row["dense_ratio"] == pytest.approx(row["perplexity"] / dense["perplexity"])
    assert dense["dense_ratio"] == 1
    low, high = row["dense_ratio_interval"]
    assert low < row["dense_ratio"] < high


def test_groups_are_clusters_of_the_largest_k_and_add_up(made, result):
    groups = result["groups"]
    assert (groups["by"], groups["of"], groups["n_clusters"]) == ("cluster", "clusters-k2-s0", 2)
    assert [group["name"] for group in groups["rows"]] == [0, 1]
    assert sum(group["n_tokens"] for group in groups["rows"]) == result["n_tokens"]
    total = sum(group["n_tokens"] * math.log(group["clusters"]["perplexity"]) for group in groups["rows"])
    assert math.exp(total / result["n_tokens"]) == pytest.approx(row_of(result, "clusters", 2)["perplexity"])
    assert all(group["terms"] for group in groups["rows"])


def test_second_time_makes_nothing(made):
    page = Path(made.shared.uri("comparison.html"))
    before = page.stat().st_mtime_ns
    assert comparison_stages.finished(Comparison(made.config))
    comparison_stages.compare(Comparison(made.config))
    assert page.stat().st_mtime_ns == before


def test_comparison_with_another_arm_is_not_finished(made, values):
    more = values | {"compare": values["compare"] | {"random_states": [0, 1, 2]}}
    assert not comparison_stages.finished(Comparison.parse(json.dumps(more)))


def test_page_and_tables_say_the_same(made, result):
    page = Path(made.shared.uri("comparison.html")).read_text()
    assert "<svg" in page
    shown = f"{row_of(result, 'clusters', 2)['perplexity']:.1f}"
    assert shown in page
    assert shown in format_comparison(result)
    with open(made.shared.uri("comparison.csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 2 * 8
    assert float(lines[0]["perplexity"]) == pytest.approx(row_of(result, "seed", None)["perplexity"])


def test_tracker_has_a_run_for_each_row_and_lines_over_k(made, values, result):
    client = mlflow.MlflowClient(values["tracking"]["uri"])
    (experiment,) = [one for one in client.search_experiments() if one.name != "Default"]
    runs = client.search_runs([experiment.experiment_id], "tags.`cbtm.kind` = 'comparison'")
    by_name = {run.info.run_name.rpartition("/")[2]: run for run in runs}
    run = by_name["comparison-clusters-k2-top2"]
    assert (run.data.params["cbtm.n_clusters"], run.data.params["cbtm.arm"]) == ("2", "clusters")
    assert run.data.metrics["eval/perplexity"] == pytest.approx(row_of(result, "clusters", 2)["perplexity"])
    (point,) = client.get_metric_history(by_name["line-dense"].info.run_id, "compare/perplexity")
    assert (point.step, point.value) == (2, pytest.approx(row_of(result, "dense", None)["perplexity"]))
    parents = {one.data.tags["mlflow.parentRunId"] for one in runs}
    assert len(parents) == 1
    assert client.get_run(parents.pop()).info.status == "FINISHED"
    names = [one.path for one in client.list_artifacts(by_name["comparison"].info.run_id)]
    assert sorted(names) == ["comparison.csv", "comparison.html", "comparison.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compare": {"n_clusters": [2, 3]}}, "arm small-batch-k3-s0: .*does not divide among cluster.n_clusters=3"),
        ({"compare": {"n_clusters": [2, 2]}}, r"compare.n_clusters: .*each once, got \[2, 2\]"),
        ({"compare": {"n_clusters": [1]}}, "expected numbers from 2 on"),
        ({"compare": {"random_states": []}}, "compare.random_states"),
        ({"shared": "somewhere"}, "shared=somewhere: a comparison has what is shared below its own root"),
        ({"score": {"top_k": 1}, "evaluate": {}}, "score.top_k=1: arms have several k"),
    ],
)
def test_comparison_that_cannot_be_is_refused_before_any_work(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        Comparison.parse(json.dumps(values | changes))


@pytest.mark.parametrize("name", ["clusters-k8", "dense", "experts-k8-s0", "clusters-k8-s0x"])
def test_name_of_no_arm_is_refused(name):
    with pytest.raises(ConfigError, match="is no arm of a comparison"):
        Arm.parse(name)


def test_name_of_an_arm_is_read_back(values):
    for arm in Comparison.parse(json.dumps(values)).arms:
        assert Arm.parse(arm.name) == arm


def test_compiled_pipeline_makes_all_of_it(values, tmp_path):
    few = values | {"root": str(tmp_path / "out"), "tracking": {"enabled": False}}
    few["compare"] = {"n_clusters": [2], "random_states": [3], "random_clusters": False, "plain": [], "by_tokens": []}
    few["compare"]["small_batch"] = []
    comparison = Comparison.parse(json.dumps(few))
    local.run_comparison(comparison)
    found = comparison_stages.result(comparison)
    assert [arm["name"] for arm in found["arms"]] == ["dense-k1-s3", "clusters-k2-s3"]
    assert not (tmp_path / "out/arms/clusters-k2-s3/seed").exists()
    before = Path(comparison.shared.uri("manifest.json")).stat().st_mtime_ns
    local.run_comparison(Comparison(comparison.config))  # up to date
    assert Path(comparison.shared.uri("manifest.json")).stat().st_mtime_ns == before
