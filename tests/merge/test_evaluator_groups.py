"""Groups that the evaluator looks at by themselves: domains, labels, single experts, and experts of some clusters."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation_case import (
    ONE_SETTING,
    hand_case,
    hand_case_with_prompts,
    random_case,
    row_of,
    rows_of,
    tokens_in,
)

from cbtm.errors import ConfigError, DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.evaluator import evaluate
from cbtm.merge.validation_set import Scores

QUICK = EvaluateConfig(bootstrap_resamples=100)
GROUP = {
    *("n_documents", "n_tokens", "seed", "dense", "random", "ensemble", "ensemble_all"),
    *("interval", "dense_interval", "dense_ratio", "dense_ratio_interval"),
}


def close(value):
    return pytest.approx(value, rel=1e-6)


def written_perplexity(validation, scores, among):
    """Perplexity of one model on the reported documents of those marked, one by one; None if there is none."""
    total = count = 0.0
    for index in range(1, len(validation.tokens), 2):
        if among[index]:
            own = scores[validation.offsets[index] : validation.offsets[index + 1]].astype(float)
            total -= own.sum()
            count += len(own)
    return math.exp(total / count) if count else None


# --- domains ---


def test_domains_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    first, second = result["by_domain"]
    assert first.keys() == GROUP | {"cluster", "own_expert"}
    # Domain 0 is document 1: tokens of 1/2 and 1/4; its expert gives .4 and .2.
    assert (first["cluster"], first["n_documents"], first["n_tokens"]) == (0, 1, 2)
    assert [first["ensemble"], first["dense"]] == [close(math.sqrt(8)), close(math.sqrt(8))]
    assert first["own_expert"] == close(0.08 ** (-1 / 2))
    assert first["dense_ratio"] == close(1)
    # One document has no interval.
    assert (first["interval"], first["dense_interval"], first["dense_ratio_interval"]) == (None, None, None)
    # Domain 1 is document 3: one token of 1/8; its expert gives .1.
    assert (second["cluster"], second["n_documents"], second["n_tokens"]) == (1, 1, 1)
    assert second["ensemble"] == close(8)
    assert second["own_expert"] == close(10)
    assert (second["seed"], second["random"]) == (close(2), close(8))


def test_domain_without_a_reported_document_has_no_figures():
    validation, scores, distances = hand_case()
    validation = replace(validation, clusters=np.array([1, 0, 1, 0]))
    result = evaluate(ONE_SETTING, validation, scores, distances)
    empty = result["by_domain"][1]
    assert (empty.pop("cluster"), empty.pop("n_documents"), empty.pop("n_tokens")) == (1, 0, 0)
    assert set(empty.values()) == {None}
    assert result["domain_by_expert"]["perplexity"][1] == [None, None]


def test_without_dense_and_random_models_their_figures_are_absent():
    validation, scores, distances = hand_case()
    result = evaluate(ONE_SETTING, validation, replace(scores, dense=None, random=None), distances)
    assert result["dense"] is result["random"] is None
    row = row_of(result, "clustering", 2)
    assert row["dense_ratio"] is row["dense_ratio_interval"] is None
    assert result["by_domain"][0]["dense"] is result["by_domain"][0]["dense_ratio"] is None
    assert row["perplexity"] == close(4)


def test_every_domain_is_tried_with_every_expert():
    validation, scores, distances = random_case(k=3)
    result = evaluate(QUICK, validation, scores, distances)
    matrix = result["domain_by_expert"]
    assert matrix["clusters"] == [0, 1, 2]
    for cluster in range(3):
        among = validation.clusters == cluster
        expected = [written_perplexity(validation, row, among) for row in scores.experts]
        assert matrix["perplexity"][cluster] == [close(value) for value in expected]
        assert result["by_domain"][cluster]["own_expert"] == close(expected[cluster])


# --- labels ---


def test_labels_by_hand():
    # Documents 1 and 3 are reported on; that of no label, and the label of the other half, have no row.
    validation, scores, distances = hand_case()
    case = replace(validation, labels=["news", "law", "news", "art"])
    art, law = evaluate(ONE_SETTING, case, scores, distances)["by_label"]
    assert art.keys() == GROUP | {"label"}
    assert (art["label"], art["n_documents"], art["n_tokens"], art["ensemble"]) == ("art", 1, 1, close(8))
    assert (law["label"], law["n_documents"], law["n_tokens"], law["ensemble"]) == ("law", 1, 2, close(math.sqrt(8)))
    case = replace(validation, labels=["news", None, None, "art"])
    assert [row["label"] for row in evaluate(ONE_SETTING, case, scores, distances)["by_label"]] == ["art"]


def test_documents_of_one_label_have_an_interval_and_a_ratio():
    validation, scores, distances = hand_case()
    labels = [None, "law", None, "law"]
    (law,) = evaluate(ONE_SETTING, replace(validation, labels=labels), scores, distances)["by_label"]
    assert (law["n_documents"], law["n_tokens"], law["ensemble"], law["dense"]) == (2, 3, close(4), close(4))
    # From the one document twice to the other twice.
    assert law["interval"] == [close(math.sqrt(8)), close(8)]
    assert law["dense_interval"] == [close(math.sqrt(8)), close(8)]
    assert (law["dense_ratio"], law["dense_ratio_interval"]) == (close(1), [close(1), close(1)])


def test_rows_of_labels_are_those_of_their_documents():
    validation, scores, distances = random_case()
    labels = [None if index % 5 == 4 else "abc"[index % 3] for index in range(24)]
    result = evaluate(QUICK, replace(validation, labels=labels), scores, distances)
    assert [row["label"] for row in result["by_label"]] == ["a", "b", "c"]
    for row in result["by_label"]:
        among = [label == row["label"] for label in labels]
        assert row["seed"] == close(written_perplexity(validation, scores.seed, among))
        assert row["dense"] == close(written_perplexity(validation, scores.dense, among))
        assert row["dense_ratio"] == close(row["ensemble"] / row["dense"])
    json.dumps(result, allow_nan=False)


def test_without_labels_there_are_no_rows_of_them():
    assert evaluate(ONE_SETTING, *hand_case())["by_label"] is None


# --- experts of some clusters only ---


def test_ensemble_of_a_subset_weighs_the_distances_to_its_own_centres():
    # A third centre, nearer than both others everywhere but without an expert: the weights stay 3/4 and 1/4.
    validation, scores, distances = hand_case()
    between = np.insert(distances, 1, 0.0, axis=1)
    whole = evaluate(ONE_SETTING, validation, scores, distances)
    subset = evaluate(ONE_SETTING, validation, replace(scores, clusters=(0, 2)), between)
    assert subset["ensemble"] == whole["ensemble"]
    assert row_of(subset, "clustering", 2)["perplexity"] == close(4)
    assert [subset[name] for name in ("seed", "dense", "random")] == [
        whole[name] for name in ("seed", "dense", "random")
    ]
    # All that were trained are mixed.
    assert subset["experts_evaluated"] == [0, 2]
    assert {row["ensemble_all"] for row in subset["by_domain"]} == {None}


def test_experts_of_a_subset_keep_the_number_of_their_cluster():
    validation, scores, distances = hand_case()
    result = evaluate(ONE_SETTING, validation, replace(scores, clusters=(1, 4)), np.repeat(distances, 3, axis=1))
    assert [row["cluster"] for row in result["experts"]] == [1, 4]
    assert [row["perplexity"] for row in result["experts"]] == [close(0.016 ** (-1 / 3)), close(0.032 ** (-1 / 3))]
    assert result["best_single_expert"]["cluster"] == 1
    # Documents 1 and 3 are of clusters 0 and 1: that of cluster 0 has no expert of its own, but is evaluated.
    rows = result["by_domain"]
    assert [row["cluster"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[0]["own_expert"] is None
    assert rows[0]["seed"] == close(2)
    assert rows[0]["ensemble"] is not None
    assert rows[1]["own_expert"] == close(1 / 0.2)  # the first expert's, of the token of document 3
    assert [row["n_documents"] for row in rows] == [1, 1, 0, 0, 0, 0]
    assert result["domain_by_expert"]["clusters"] == [1, 4]
    assert len(result["domain_by_expert"]["perplexity"]) == 6


def test_subset_is_evaluated_as_if_there_were_no_other_clusters():
    validation, scores, distances = random_case(k=5)
    kept = [0, 2, 3]
    some = replace(scores, experts=scores.experts[kept], random=scores.random[kept])
    alone = evaluate(QUICK, validation, some, distances[:, kept])
    subset = evaluate(QUICK, validation, replace(some, clusters=kept), distances)
    for name in ("ensemble", "random", "seed", "dense", "selection", "prior"):
        assert subset[name] == alone[name]
    assert {row["top_k"] for row in rows_of(subset, ensemble="clustering")} == {3, 1}
    assert subset["best_single_expert"] == {
        **alone["best_single_expert"],
        "cluster": kept[alone["best_single_expert"]["cluster"]],
    }


def test_experts_that_are_left_out_on_purpose_take_no_part():
    validation, scores, distances = random_case(k=3)
    whole = evaluate(QUICK, validation, scores, distances)
    config = EvaluateConfig(experts=(2, 0), bootstrap_resamples=100)
    result = evaluate(config, validation, scores, distances)
    kept = [0, 2]
    alone = evaluate(QUICK, validation, replace(scores, experts=scores.experts[kept]), distances[:, kept])
    assert result["experts_evaluated"] == kept
    assert result["ensemble"] == alone["ensemble"]
    assert result["prior"] == alone["prior"]
    # By domain the ensemble of all stands beside it: what leaving an expert out does.
    for row, of_all in zip(result["by_domain"], whole["by_domain"], strict=True):
        assert row["ensemble_all"] == close(of_all["ensemble"])
        assert row["ensemble"] != close(of_all["ensemble"])
        assert of_all["ensemble_all"] is None
    # Other models do not depend on who is mixed; an expert that is not has no figures.
    for name in ("seed", "dense", "random"):
        assert result[name] == whole[name]
    assert [row["perplexity"] for row in result["experts"]] == [
        whole["experts"][0]["perplexity"],
        None,
        whole["experts"][2]["perplexity"],
    ]
    assert result["by_domain"][1]["own_expert"] is None
    assert result["by_domain"][2]["own_expert"] == whole["by_domain"][2]["own_expert"]
    assert result["domain_by_expert"]["clusters"] == kept


def test_ensemble_of_all_has_a_temperature_of_its_own():
    # Near experts are good where all are mixed, and the nearest of the first two is bad: sharp weights for all, flat
    # ones for the two. The ensemble of all is the best of its settings on the selecting half, not that of the two.
    validation, scores, distances = random_case(k=3)
    distances[:, 2] = 0.1
    nearness = np.where(np.arange(3)[:, np.newaxis] == 2, -0.1, -8 * (2 - distances.T)).clip(-20, -0.01)
    experts = nearness.astype(np.float32)
    settings = {"temperatures": (0.01, 10.0), "distance_powers": (2,), "bootstrap_resamples": 100}
    two = evaluate(EvaluateConfig(experts=(0, 1), **settings), validation, replace(scores, experts=experts), distances)
    whole = evaluate(EvaluateConfig(**settings), validation, replace(scores, experts=experts), distances)
    (chosen,) = rows_of(two, ensemble="clustering", top_k=2, selected=True)
    (chosen_of_all,) = rows_of(whole, ensemble="clustering", top_k=3, selected=True)
    assert (chosen["temperature"], chosen_of_all["temperature"]) == (10.0, 0.01)
    for row, of_all in zip(two["by_domain"], whole["by_domain"], strict=True):
        assert row["ensemble_all"] == close(of_all["ensemble"])


def test_expert_that_was_not_trained_cannot_be_mixed():
    with pytest.raises(ConfigError, match=r"evaluate.experts names cluster 3, which has no expert; trained are 0, 1"):
        evaluate(EvaluateConfig(experts=(0, 3)), *random_case(k=2))


def test_top_k_above_the_number_of_trained_experts_is_refused_with_both_numbers():
    validation, scores, distances = random_case(k=8)
    three = replace(scores, experts=scores.experts[:3], clusters=(0, 1, 2))
    message = (
        r"evaluate.top_k=4 is not in \[1, 3\]: train.clusters or evaluate.experts names 3 of cluster.n_clusters=8 "
        "clusters, and there are no more experts"
    )
    with pytest.raises(ConfigError, match=message):
        evaluate(EvaluateConfig(top_k=(4, 2)), validation, three, distances)


@pytest.mark.parametrize("clusters", [None, (0,), (0, 1, 2), (0, 4), (-1, 0), (1, 1), (1, 0)])
def test_scores_that_do_not_fit_their_clusters_are_refused(clusters):
    validation, scores, distances = random_case(k=4)
    two = replace(scores, experts=scores.experts[:2], clusters=clusters)
    with pytest.raises(DataError, match=r"scores of 2 experts do not fit clusters \[.*\] of 4"):
        evaluate(ONE_SETTING, validation, two, distances)


def test_prompts_and_a_subset_together_are_the_counted_part_of_the_subset():
    config = EvaluateConfig(ensembles=("clustering", "uniform", "prior"), temperatures=(1.0,), distance_powers=(2,))
    validation, scores, distances = hand_case_with_prompts()
    wide = np.insert(distances, 1, 0.0, axis=1)
    subset = evaluate(config, validation, replace(scores, clusters=(0, 2)), wide)
    for row, plain in zip(subset["ensemble"], evaluate(config, *hand_case())["ensemble"], strict=True):
        assert row | {"flops_relative": None} == plain | {"flops_relative": None}


# --- scores of the nearest experts only ---


def sparse(scores, distances, top_k):
    """The same with NaN where an expert is not among the nearest."""
    near = np.argsort(distances, axis=1, kind="stable")[:, :top_k]
    experts = np.full_like(scores.experts, np.nan)
    np.put_along_axis(experts.T, near, np.take_along_axis(scores.experts.T, near, axis=1), axis=1)
    return replace(scores, experts=experts, top_k=top_k)


def test_scores_of_the_nearest_experts_give_the_same_clustering():
    validation, scores, distances = random_case(k=4)
    result = evaluate(QUICK, validation, sparse(scores, distances, 2), distances)
    config = EvaluateConfig(ensembles=("clustering",), top_k=(2, 1), bootstrap_resamples=100)
    whole = evaluate(config, validation, scores, distances)
    assert len(result["ensemble"]) == 2 * 14
    assert result["ensemble"] == whole["ensemble"]
    for name in ("seed", "dense", "random", "selection", "n_tokens"):
        assert result[name] == whole[name]
    for row, of_whole in zip(result["by_domain"], whole["by_domain"], strict=True):
        assert row == of_whole | {"own_expert": None}


def test_scores_of_the_nearest_experts_say_nothing_of_an_expert_alone():
    validation, scores, distances = random_case(k=4)
    result = evaluate(QUICK, validation, sparse(scores, distances, 2), distances)
    assert result["experts"] == [{"cluster": cluster, "perplexity": None} for cluster in range(4)]
    assert result["best_single_expert"] is result["domain_by_expert"] is result["prior"] is None


@pytest.mark.parametrize("kind", ["product_of_experts", "bayes", "posterior", "uniform", "prior", "oracle"])
def test_kind_that_looks_at_every_expert_is_refused_where_few_were_scored(kind):
    validation, scores, distances = random_case(k=4)
    few = sparse(scores, distances, 2)
    with pytest.raises(ConfigError, match=f"evaluate.ensembles has {kind}, which looks at every expert.*score.top_k=2"):
        evaluate(EvaluateConfig(ensembles=("clustering", kind)), validation, few, distances)
    with pytest.raises(ConfigError, match=r"evaluate.top_k=3 is above score.top_k=2"):
        evaluate(EvaluateConfig(top_k=(3,)), validation, few, distances)


def test_score_that_is_missing_where_an_expert_is_near_is_refused():
    validation, scores, distances = random_case(k=4)
    few = sparse(scores, distances, 2)
    token = int(np.flatnonzero(tokens_in(validation, "report"))[0])
    nearest = int(np.argmin(distances[token]))
    few.experts[nearest, token] = np.nan
    with pytest.raises(DataError, match=rf"nan at token {token} of expert {nearest} is not in .* were not made"):
        evaluate(QUICK, validation, few, distances)


def test_scores_may_be_memory_maps(tmp_path):
    validation, scores, distances = random_case()

    def stored(name, values):
        np.save(tmp_path / f"{name}.npy", values)
        return np.load(tmp_path / f"{name}.npy", mmap_mode="r")

    on_disk = Scores(
        seed=stored("seed", scores.seed),
        experts=[stored(f"expert-{number}", row) for number, row in enumerate(scores.experts)],
        dense=stored("dense", scores.dense),
        random=[stored(f"random-{number}", row) for number, row in enumerate(scores.random)],
    )
    found = evaluate(QUICK, validation, on_disk, stored("distances", distances))
    assert found == evaluate(QUICK, validation, scores, distances)
