"""What the evaluator measures, and how it chooses."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation_case import (
    NEAR_0,
    NEAR_1,
    ONE_SETTING,
    hand_case,
    logs,
    random_case,
    row_of,
    rows_of,
    tokens_in,
)

from cbtm.merge import ensembles, grid
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.evaluator import evaluate
from cbtm.merge.validation_set import Scores

SUMMARY = {
    *("perplexity", "bits_per_byte", "nats", "interval", "impossible_tokens", "dense_ratio", "dense_ratio_interval"),
}
SETTING = {"ensemble", "distance_power", "temperature", "top_k"}


def close(value):
    return pytest.approx(value, rel=1e-6)


def entropy(*weights):
    return -sum(weight * math.log(weight) for weight in weights)


# --- by hand ---


def test_models_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    # 3 reported tokens in 6 + 3 bytes; the perplexity of a product p of 3 probabilities is p^(-1/3).
    assert (result["n_documents"], result["n_tokens"], result["n_bytes"], result["n_prompt_tokens"]) == (2, 3, 9, 0)
    assert result["selection"] == {"n_documents": 2, "n_tokens": 2, "n_bytes": 8, "n_prompt_tokens": 0}
    assert result["seed"]["perplexity"] == close(2)
    assert result["seed"]["nats"] == close(math.log(2))
    assert result["seed"]["bits_per_byte"] == close(3 / 9)  # one bit a token
    assert result["seed"]["dense_ratio"] == close(2 / 4)
    assert result["dense"]["perplexity"] == close(4)  # (1/64)^(-1/3)
    assert result["dense"]["bits_per_byte"] == close((1 + 2 + 3) / 9)
    assert result["random"]["perplexity"] == close(8)  # (1/16 + 3/16) / 2
    assert result["random"]["bits_per_byte"] == close(9 / 9)
    # .4 * .2 * .2 and .8 * .4 * .1
    assert [row["perplexity"] for row in result["experts"]] == [close(0.016 ** (-1 / 3)), close(0.032 ** (-1 / 3))]


# The probabilities of the three reported tokens under each ensemble, and its experts and entropies there. The first
# token of a document has none before it: bayes, posterior and product_of_experts weigh by 1/2 and 1/2, keep expert 0.
HALF = entropy(1 / 2, 1 / 2)
BY_HAND = [
    ("clustering", 2, (1 / 2, 1 / 4, 1 / 8), 2, entropy(3 / 4, 1 / 4)),
    ("clustering", 1, (0.4, 0.2, 0.1), 1, 0),  # the nearest alone
    # Weights 3/4 and 1/4 times the .4 and .8 of the token before are .6 and .4.
    ("product_of_experts", 2, (0.6, 0.6 * 0.2 + 0.4 * 0.4, 0.15), 2, (2 * HALF + entropy(0.6, 0.4)) / 3),
    ("product_of_experts", 1, (0.4, 0.2, 0.2), 1, 0),
    # The token before was .4 and .8 likely: 1/3 and 2/3. There is one, so all before are no more.
    ("bayes", 2, (0.6, 0.2 / 3 + 0.4 * 2 / 3, 0.15), 2, (2 * HALF + entropy(1 / 3, 2 / 3)) / 3),
    ("bayes", 1, (0.4, 0.4, 0.2), 1, 0),
    ("posterior", 2, (0.6, 0.2 / 3 + 0.4 * 2 / 3, 0.15), 2, (2 * HALF + entropy(1 / 3, 2 / 3)) / 3),
    ("posterior", 1, (0.4, 0.4, 0.2), 1, 0),
    ("uniform", 2, (0.6, 0.3, 0.15), 2, HALF),
    # The two documents to choose on have weights 3/4 and 1/4, 1/4 and 3/4.
    ("prior", 2, (0.6, 0.3, 0.15), 2, HALF),
    # .8 * .4 is more than .4 * .2, and .2 than .1.
    ("oracle", 1, (0.8, 0.4, 0.2), 1, 0),
]


@pytest.mark.parametrize(("kind", "top_k", "tokens", "used", "spread"), BY_HAND)
def test_ensembles_by_hand(kind, top_k, tokens, used, spread):
    row = row_of(evaluate(ONE_SETTING, *hand_case()), kind, top_k)
    nats = -math.log(math.prod(tokens))
    assert row["perplexity"] == close(math.exp(nats / 3))
    assert row["nats"] == close(nats / 3)
    assert row["bits_per_byte"] == close(nats / math.log(2) / 9)
    assert row["dense_ratio"] == close(math.exp(nats / 3) / 4)
    assert row["experts_used"] == used
    assert row["routing_entropy"] == pytest.approx(spread, rel=1e-6, abs=1e-12)
    assert row["impossible_tokens"] == 0
    routed = kind in ("clustering", "product_of_experts")
    assert (row["temperature"], row["distance_power"]) == ((1.0, 2.0) if routed else (None, None))


def test_selecting_half_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    # .75 * .9 + .25 * .5 = .8 and .25 * .9 + .75 * .5 = .6; the nearest .9 and .5; means .7; the best .9 and .9.
    assert row_of(result, "clustering", 2)["selection_perplexity"] == close((0.8 * 0.6) ** (-1 / 2))
    assert row_of(result, "clustering", 1)["selection_perplexity"] == close((0.9 * 0.5) ** (-1 / 2))
    assert row_of(result, "uniform", 2)["selection_perplexity"] == close(1 / 0.7)
    assert row_of(result, "oracle", 1)["selection_perplexity"] == close(1 / 0.9)


def test_rows_are_of_every_kind_in_order_with_the_same_keys():
    result = evaluate(ONE_SETTING, *hand_case())
    assert [(row["ensemble"], row["top_k"]) for row in result["ensemble"]] == [one[:2] for one in BY_HAND]
    measured = {"selection_perplexity", "experts_used", "flops_relative", "routing_entropy", "selected"}
    for row in result["ensemble"]:
        assert row.keys() == SETTING | SUMMARY | measured
    for name in ("seed", "dense", "random"):
        assert result[name].keys() == SUMMARY
    assert result["best_single_expert"].keys() == SUMMARY | {"cluster"}
    assert [row.keys() for row in result["experts"]] == [{"cluster", "perplexity"}] * 2
    assert result.keys() == {
        *("n_documents", "n_tokens", "n_bytes", "n_prompt_tokens", "selection", "seed", "dense", "random", "averages"),
        *("best_single_expert", "ensemble", "experts", "experts_evaluated", "prior", "by_domain", "by_label"),
        "domain_by_expert",
    }


def test_work_of_an_expert_ends_with_the_last_token_that_has_it_among_the_nearest():
    # The nearest of the reported tokens are 1, 0 and, in the other document, 1: expert 0 reads two tokens, expert 1 one
    # and one; 4 passes for 3 tokens, of which the last part, here a quarter, is done where an expert has weight: 3.
    validation, scores, _ = hand_case()
    near = np.array([NEAR_0, NEAR_1, NEAR_0, NEAR_1, NEAR_1], dtype=np.float32)
    result = evaluate(ONE_SETTING, validation, scores, near, body_share=0.75)
    assert row_of(result, "clustering", 1)["flops_relative"] == close(0.75 * 4 / 3 + 0.25 * 3 / 3)
    assert row_of(result, "clustering", 2)["flops_relative"] == close(2)
    assert row_of(result, "uniform", 2)["flops_relative"] == close(2)
    # Their weights are known after all experts have read: both read everything, and one of the heads is left out.
    assert row_of(result, "bayes", 1)["flops_relative"] == close(0.75 * 2 + 0.25 * 1)
    assert row_of(evaluate(ONE_SETTING, validation, scores, near), "clustering", 1)["flops_relative"] == close(4 / 3)


def test_interval_of_two_documents_runs_from_the_one_to_the_other():
    # Resamples of two are the one twice, the other twice, or both: (1/2 * 1/4)^(-1/2), and 8.
    row = row_of(evaluate(ONE_SETTING, *hand_case()), "clustering", 2)
    assert row["interval"] == [close(math.sqrt(8)), close(8)]
    assert row["dense_ratio_interval"] == [close(1), close(1)]


def test_exponent_4_is_the_distance_to_the_fourth():
    # exp(-(ln 3)^2) to 1 = .2991: weights .7698 and .2302.
    config = EvaluateConfig(temperatures=(1.0,), distance_powers=(4,), bootstrap_resamples=100)
    far = 1 / (1 + math.exp(math.log(3) ** 2))
    near = 1 - far
    product = (near * 0.4 + far * 0.8) * (near * 0.2 + far * 0.4) * (far * 0.2 + near * 0.1)
    row = row_of(evaluate(config, *hand_case()), "clustering", 2)
    assert row["distance_power"] == 4
    assert row["perplexity"] == close(product ** (-1 / 3))


def test_averages_are_models_like_the_others():
    validation, scores, distances = hand_case()
    rows = {"average-uniform": logs([1 / 4] * 5)[0], "average-greedy": scores.dense}
    first, second = evaluate(ONE_SETTING, validation, replace(scores, averages=rows), distances)["averages"]
    assert first.keys() == SUMMARY | {"name"}
    assert (first["name"], first["perplexity"], first["bits_per_byte"]) == ("average-uniform", close(4), close(6 / 9))
    assert (second["name"], second["dense_ratio"]) == ("average-greedy", 1)
    assert evaluate(ONE_SETTING, *hand_case())["averages"] == []


# --- many settings, by the definitions ---


def defined(row, experts, distances, offsets, prior, counted):
    """Log-probability of each token under the ensemble of a row."""
    routed = {key: row[key] for key in ("temperature", "distance_power", "top_k")}
    match row["ensemble"]:
        case "clustering":
            return ensembles.clustering(experts, distances, **routed)
        case "product_of_experts":
            return ensembles.product_of_experts(experts, distances, offsets, **routed)
        case "bayes":
            return ensembles.bayes(experts, offsets, top_k=row["top_k"])
        case "posterior":
            return ensembles.posterior(experts, offsets, top_k=row["top_k"])
        case "uniform":
            return ensembles.uniform(experts)
        case "prior":
            return ensembles.fixed_prior(experts, prior)
        case "oracle":
            return ensembles.oracle(experts, offsets, counted=counted)


@pytest.mark.parametrize("prompts", [False, True])
def test_every_row_is_the_ensemble_of_its_definition(prompts):
    validation, scores, distances = random_case(n_documents=10, k=3, prompts=prompts)
    config = EvaluateConfig(temperatures=(0.05, 0.5), top_k=(3, 2, 1), bootstrap_resamples=100)
    counted = None if validation.counted is None else np.concatenate(validation.counted)
    result = evaluate(config, validation, scores, distances)
    prior = np.array(result["prior"])
    for row in result["ensemble"]:
        found = defined(row, scores.experts, distances, validation.offsets, prior, counted)
        for key, half in (("perplexity", "report"), ("selection_perplexity", "selection")):
            perplexity = math.exp(-found[tokens_in(validation, half)].mean())
            assert row[key] == pytest.approx(perplexity, rel=1e-9), (row, key)


def test_one_cluster_ensemble_is_its_expert():
    validation, scores, distances = random_case(k=1)
    result = evaluate(EvaluateConfig(bootstrap_resamples=100), validation, scores, distances)
    alone = result["experts"][0]["perplexity"]
    assert {row["perplexity"] for row in result["ensemble"]} == {alone}
    assert result["best_single_expert"]["perplexity"] == alone
    assert {row["top_k"] for row in result["ensemble"]} == {1}
    assert result["prior"] == [1.0]


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(grid, "_UNIT_ELEMENTS", 64)  # a few documents at a time
    case = random_case(prompts=True)
    one, two, five = (evaluate(EvaluateConfig(bootstrap_resamples=100, threads=n), *case) for n in (1, 2, 5))
    assert one == two == five


def test_same_random_state_gives_the_same_intervals():
    case = random_case()
    one, same = (evaluate(EvaluateConfig(bootstrap_resamples=100), *case) for _ in range(2))
    other = evaluate(EvaluateConfig(bootstrap_resamples=100, random_state=1), *case)
    assert one == same
    assert one["seed"]["interval"] != other["seed"]["interval"]
    assert one["seed"]["perplexity"] == other["seed"]["perplexity"]


def test_progress_counts_tokens_to_their_end():
    seen = []
    evaluate(ONE_SETTING, *hand_case(), progress=lambda *so_far: seen.append(so_far))
    assert seen[-1] == (5, 5)


# --- choosing and reporting ---


def test_documents_to_choose_on_are_every_second_one():
    validation, scores, distances = random_case(n_documents=9)
    counts = evaluate(EvaluateConfig(bootstrap_resamples=100), validation, scores, distances)
    assert counts["selection"]["n_bytes"] == validation.n_bytes[(np.arange(9) % 2 == 0)].sum()
    assert counts["n_bytes"] == validation.n_bytes[np.arange(9) % 2 == 1].sum()


def test_of_each_kind_and_top_k_the_best_on_the_selecting_half_is_selected():
    result = evaluate(EvaluateConfig(bootstrap_resamples=100), *random_case())
    key = lambda row: (row["ensemble"], row["top_k"])  # noqa: E731
    sizes = {}
    for name, group in itertools.groupby(result["ensemble"], key):
        rows = list(group)
        sizes[name] = len(rows)
        (chosen,) = [row for row in rows if row["selected"]]
        assert chosen["selection_perplexity"] == min(row["selection_perplexity"] for row in rows)
    assert sizes["clustering", 4] == sizes["product_of_experts", 1] == 7 * 2
    assert sizes["bayes", 2] == sizes["uniform", 4] == sizes["oracle", 1] == 1


def test_reported_half_has_no_say_in_what_is_selected():
    # Near experts are good on the selecting half and bad on the other: only a look at the latter prefers T = 10.
    validation, scores, distances = random_case()
    nearness = -distances.T.astype(np.float32)
    experts = np.where(tokens_in(validation, "selection"), nearness, -2 - nearness).clip(-9, -0.01).astype(np.float32)
    config = EvaluateConfig(temperatures=(0.01, 10.0), distance_powers=(2,), top_k=(4,), bootstrap_resamples=100)
    result = evaluate(config, validation, replace(scores, experts=experts), distances)
    sharp, flat = rows_of(result, ensemble="clustering")
    assert sharp["perplexity"] > flat["perplexity"]
    assert (sharp["selected"], flat["selected"]) == (True, False)


def test_selection_sees_the_selecting_half_only():
    validation, scores, distances = random_case()
    config = EvaluateConfig(bootstrap_resamples=100)
    selecting = tokens_in(validation, "selection")
    before = evaluate(config, validation, scores, distances)
    changed = replace(scores, experts=np.where(selecting, scores.experts, scores.experts[::-1] * 0.5))
    turned = np.where(selecting[:, np.newaxis], distances, distances[:, ::-1])
    after = evaluate(config, validation, changed, turned)
    for one, other in zip(before["ensemble"], after["ensemble"], strict=True):
        assert one["selected"] == other["selected"]
        assert one["selection_perplexity"] == other["selection_perplexity"]
        assert one["perplexity"] != other["perplexity"]
    assert before["best_single_expert"]["cluster"] == after["best_single_expert"]["cluster"]
    assert before["prior"] == after["prior"]


def test_report_sees_the_reported_half_only():
    validation, scores, distances = random_case()
    config = EvaluateConfig(temperatures=(0.1,), distance_powers=(2,), bootstrap_resamples=100)
    selecting = tokens_in(validation, "selection")

    def halved(values):
        return np.where(selecting, values * 0.5, values)

    changed = Scores(*(halved(values) for values in (scores.seed, scores.experts, scores.dense, scores.random)))
    before = evaluate(config, validation, scores, distances)
    after = evaluate(config, validation, changed, distances)
    for name in ("seed", "dense", "random", "experts", "by_domain", "domain_by_expert"):
        assert before[name] == after[name]
    for one, other in zip(before["ensemble"], after["ensemble"], strict=True):
        assert one["selection_perplexity"] > other["selection_perplexity"]
        for key in SUMMARY:
            assert one[key] == other[key]


def test_best_single_expert_is_chosen_on_the_selecting_half():
    # Expert 0 is better there (.9 to .5) and worse on the reported half (.016 to .032).
    best = evaluate(ONE_SETTING, *hand_case())["best_single_expert"]
    assert best["cluster"] == 0
    assert best["perplexity"] == close(0.016 ** (-1 / 3))


def test_prior_is_the_mean_weight_of_the_selecting_half():
    # Both documents to choose on near expert 0: 3/4 and 1/4 wherever a document lies.
    validation, scores, distances = hand_case()
    distances[3] = NEAR_0
    result = evaluate(ONE_SETTING, validation, scores, distances)
    assert result["prior"] == [close(3 / 4), close(1 / 4)]
    product = (0.75 * 0.4 + 0.25 * 0.8) * (0.75 * 0.2 + 0.25 * 0.4) * (0.75 * 0.2 + 0.25 * 0.1)
    assert row_of(result, "prior", 2)["perplexity"] == close(product ** (-1 / 3))
    distances[[1, 2, 4]] = NEAR_1  # of the reported half
    assert evaluate(ONE_SETTING, validation, scores, distances)["prior"] == result["prior"]


def test_prior_has_the_temperature_and_exponent_that_were_chosen():
    validation, scores, distances = random_case(prompts=True)
    result = evaluate(EvaluateConfig(bootstrap_resamples=100), validation, scores, distances)
    (chosen,) = rows_of(result, ensemble="clustering", top_k=4, selected=True)
    total = np.zeros(4)
    for row in distances[tokens_in(validation, "selection")].astype(float):
        weights = np.exp(-(row ** chosen["distance_power"]) / chosen["temperature"])
        total += weights / weights.sum()
    np.testing.assert_allclose(result["prior"], total / total.sum(), rtol=1e-9)


def test_without_the_prior_ensemble_there_is_no_prior():
    config = EvaluateConfig(ensembles=("uniform", "clustering"), bootstrap_resamples=100)
    result = evaluate(config, *random_case())
    assert result["prior"] is None
    assert {row["ensemble"] for row in result["ensemble"]} == {"clustering", "uniform"}
