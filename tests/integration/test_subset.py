"""A run that trains the experts of some clusters, and goes on later with the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import settings

from cbtm import stages
from cbtm.errors import ConfigError
from cbtm.merge.validation_set import selection_documents
from cbtm.run import Run
from cbtm.run_config import parse_config


def planned(values: dict[str, Any]) -> Run:
    run = Run(parse_config(json.dumps(values)))
    stages.plan(run)
    return run


def run_all(values: dict[str, Any]) -> Run:
    run = planned(values)
    for task in stages.tasks(run):
        task.run()
    return run


def with_clusters(values: dict[str, Any], clusters: list[int] | None) -> dict[str, Any]:
    return values | {"train": values["train"] | {"clusters": clusters}}


@pytest.fixture(scope="module")
def values(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return settings(str(corpus), str(tmp_path_factory.mktemp("run") / "out"), None)


@pytest.fixture(scope="module")
def subset(values: dict[str, Any]) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Result, report and files of a run with the expert of cluster 1 alone, before anything else is made there."""
    run = run_all(with_clusters(values, [1]))
    root = Path(run.config.root)
    trained = {
        str(path.relative_to(root)): path.read_bytes()
        for folder in ("seed", "experts", "scores", "clusterer", "manifests")
        for path in (root / folder).rglob("*")
        if path.is_file()
    }
    return run.result(), (root / "report.html").read_text(), trained


def test_only_the_named_experts_are_trained_and_evaluated(subset):
    result, report, trained = subset
    assert {path.split("/")[1] for path in trained if path.startswith("experts/")} == {
        "dense", "cluster-00001", "random-00001",
    }  # fmt: skip
    assert result["n_clusters"] == 2
    assert result["clusters_trained"] == [1]
    assert [expert["cluster"] for expert in result["experts"]] == [1]
    assert result["experts"][0]["documents"] == result["domains"][1]["documents"]
    assert result["experts"][0]["top_terms"] == result["domains"][1]["top_terms"]
    assert result["best_single_expert"]["cluster"] == 1
    assert {row["top_k"] for row in result["ensemble"]} == {1}
    # 20 steps of 4 sequences of 48 tokens, of which the one expert takes 2 sequences.
    assert result["tokens_per_arm"] == 20 * 4 * 48
    assert result["tokens_seen"] == {"dense": 20 * 4 * 48, "experts": 20 * 2 * 48, "random": 20 * 2 * 48}
    assert "Only 1 of 2 experts was trained (cluster 1)" in report


def test_documents_of_a_cluster_without_expert_are_evaluated(subset):
    result = subset[0]
    first, second = result["by_domain"]
    assert first["own_expert"] is None
    assert second["own_expert"] is not None
    assert first["n_documents"] > 0
    assert first["n_tokens"] + second["n_tokens"] == result["n_tokens"]
    # There is one expert to mix, so the ensemble is that expert everywhere.
    assert second["ensemble"] == pytest.approx(second["own_expert"], rel=1e-9)
    assert result["ensemble"][0]["perplexity"] == pytest.approx(result["experts"][0]["perplexity"], rel=1e-9)


def test_going_on_with_all_clusters_trains_the_rest_alone_and_gives_the_whole_result(subset, values, tmp_path):
    root = Path(values["root"])
    run = planned(values)
    made = {path: (root / path).stat().st_mtime_ns for path in subset[2]}
    assert not stages.finished(run)
    for task in stages.tasks(run):
        task.run()
    assert stages.finished(run)
    assert {path: (root / path).stat().st_mtime_ns for path in made} == made
    assert {path: (root / path).read_bytes() for path in made} == subset[2]
    whole = run_all(values | {"root": str(tmp_path / "whole")})
    weights = "experts/cluster-00001/model.safetensors"
    assert (root / weights).read_bytes() == Path(whole.uri(weights)).read_bytes()
    continued, at_once = run.result(), whole.result()
    for result in (continued, at_once):
        del result["run"]
    assert continued == at_once
    assert continued["clusters_trained"] == [0, 1]
    assert continued["tokens_seen"]["experts"] == continued["tokens_seen"]["dense"]


def test_ensemble_of_a_subset_is_evaluated_from_scores_that_are_there(subset, values):
    run = run_all(values)
    built = Path(run.uri("scores/cluster-00000/manifest.json")).stat().st_mtime_ns
    fewer = run_all(with_clusters(values, [0]))
    assert Path(run.uri("scores/cluster-00000/manifest.json")).stat().st_mtime_ns == built
    offsets = np.load(run.uri("scores/cluster-00000/offsets.npy"))
    scores = np.load(run.uri("scores/cluster-00000/log_probs.npy"))
    reported = np.concatenate([scores[offsets[i] : offsets[i + 1]] for i in np.flatnonzero(~selection_documents(40))])
    expected = np.exp(-reported.mean(dtype=np.float64))
    assert [(row["cluster"], row["perplexity"]) for row in fewer.result()["experts"]] == [
        (0, pytest.approx(expected, rel=1e-6))
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": [0, 2]}, "train.clusters names cluster 2; with cluster.n_clusters=2 they are 0 to 1"),
        ({"clusters": [-1]}, "train.clusters.0: Input should be greater than or equal to 0"),
        ({"clusters": [1, 0, 1]}, r"train.clusters: \[1, 0, 1\] names cluster 1 more than once"),
        ({"clusters": []}, "train.clusters: names no cluster; leave it out to train the experts of all"),
    ],
)
def test_clusters_that_there_are_not_are_refused(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(json.dumps(values | {"train": values["train"] | changes}))


def test_more_experts_for_a_token_than_there_are_is_refused_before_any_work(values):
    small = with_clusters(values, [1]) | {"evaluate": values["evaluate"] | {"top_k": [2, 1]}}
    with pytest.raises(ConfigError, match=r"evaluate.top_k=2 is not in \[1, 1\]: .* names 1 of cluster.n_clusters=2"):
        parse_config(json.dumps(small))
