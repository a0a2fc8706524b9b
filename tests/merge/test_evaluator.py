import math
from dataclasses import replace

import numpy as np
import pytest

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError, ManifestError
from cbtm.merge.evaluator import (
    EvaluateConfig,
    Scores,
    ValidationSet,
    context_distances,
    evaluate,
    selection_documents,
)

ONE_SETTING = EvaluateConfig(temperatures=(1.0,), distance_powers=(2,), bootstrap_resamples=200)
# Expert 0 nearer by ln 3 in squared distance: exp(0) to exp(-ln 3) is 3 to 1, weights 3/4 and 1/4.
NEAR_0 = (0.0, math.sqrt(math.log(3)))
NEAR_1 = NEAR_0[::-1]


def logs(*rows):
    return np.log(np.array(rows)).astype(np.float32)


def hand_case():
    """Four documents; 0 and 2 select, 1 (two tokens) and 3 (one token) are reported on.

    The reported tokens, with both experts' probabilities and their mixture:
    .75 * .4 + .25 * .8 = 1/2, .75 * .2 + .25 * .4 = 1/4, .25 * .2 + .75 * .1 = 1/8.
    """
    rows = [np.array([0, 1]), np.array([0, 1, 1]), np.array([0, 1]), np.array([0, 1])]
    validation = ValidationSet(
        texts=["aaaa", "bbbbbb", "cccc", "ddd"],
        tokens=rows,
        clusters=np.array([0, 0, 1, 1]),
        n_bytes=np.array([4, 6, 4, 3]),
    )
    scores = Scores(
        seed=logs([0.5] * 5)[0],
        dense=logs([0.9, 1 / 2, 1 / 4, 0.9, 1 / 8])[0],
        experts=logs([0.9, 0.4, 0.2, 0.9, 0.2], [0.5, 0.8, 0.4, 0.5, 0.1]),
        random=logs([1 / 16] * 5, [3 / 16] * 5),
    )
    distances = np.array([NEAR_0, NEAR_0, NEAR_0, NEAR_1, NEAR_1], dtype=np.float32)
    return validation, scores, distances


def random_case(n_documents=24, k=4, seed=0):
    rng = np.random.default_rng(seed)
    tokens = [np.zeros(length + 1, dtype=np.int64) for length in rng.integers(1, 30, size=n_documents)]
    validation = ValidationSet(
        texts=["x"] * n_documents,
        tokens=tokens,
        clusters=rng.integers(k, size=n_documents),
        n_bytes=rng.integers(1, 100, size=n_documents),
    )
    n = int(validation.offsets[-1])
    draw = lambda *shape: -rng.exponential(3, size=shape).astype(np.float32)  # noqa: E731
    scores = Scores(seed=draw(n), experts=draw(k, n), dense=draw(n), random=draw(k, n))
    return validation, scores, rng.uniform(0.3, 1.4, size=(n, k)).astype(np.float32)


def in_half(validation, half):
    """Mask of the tokens of one half, shape (n_tokens,): every second document, the first one selects."""
    parity = {"selection": 0, "report": 1}[half]
    lengths = [len(row) - 1 for row in validation.tokens]
    return np.repeat(np.arange(len(lengths)) % 2 == parity, lengths)


def rows_of(result, **wanted):
    return [row for row in result["ensemble"] if all(row[key] == value for key, value in wanted.items())]


def close(value):
    return pytest.approx(value, rel=1e-6)


# --- by hand ---


def test_models_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    # 3 reported tokens in 6 + 3 bytes; the perplexity of a product p of 3 probabilities is p^(-1/3).
    assert (result["n_documents"], result["n_tokens"], result["n_bytes"]) == (2, 3, 9)
    assert result["selection"] == {"n_documents": 2, "n_tokens": 2, "n_bytes": 8, "n_prompt_tokens": 0}
    assert result["seed"]["perplexity"] == close(2)
    assert result["seed"]["bits_per_byte"] == close(3 / 9)  # one bit a token
    assert result["dense"]["perplexity"] == close(4)  # (1/64)^(-1/3)
    assert result["dense"]["bits_per_byte"] == close((1 + 2 + 3) / 9)
    assert result["random"]["perplexity"] == close(8)  # (1/16 + 3/16) / 2
    assert result["random"]["bits_per_byte"] == close(9 / 9)
    # .4 * .2 * .2 and .8 * .4 * .1
    assert [row["perplexity"] for row in result["experts"]] == [close(0.016 ** (-1 / 3)), close(0.032 ** (-1 / 3))]


def test_ensembles_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    both, one, flat = result["ensemble"]
    assert (both["ensemble"], both["top_k"], both["experts_used"]) == ("clustering", 2, 2.0)
    assert both["perplexity"] == close(4)
    assert both["bits_per_byte"] == close(6 / 9)
    assert both["dense_ratio"] == close(1)
    assert both["dense_ratio_interval"] == [close(1), close(1)]
    # The nearest alone: .4 * .2 * .1 = 1/125.
    assert (one["top_k"], one["experts_used"]) == (1, 1.0)
    assert one["perplexity"] == close(5)
    assert one["dense_ratio"] == close(5 / 4)
    # Plain means: .6 * .3 * .15 = .3^3.
    assert (flat["ensemble"], flat["temperature"], flat["distance_power"], flat["top_k"]) == ("uniform", None, None, 2)
    assert flat["perplexity"] == close(1 / 0.3)
    # The selecting half: .75 * .9 + .25 * .5 = .8 and .25 * .9 + .75 * .5 = .6; the nearest .9 and .5; means .7.
    assert both["selection_perplexity"] == close((0.8 * 0.6) ** (-1 / 2))
    assert one["selection_perplexity"] == close((0.9 * 0.5) ** (-1 / 2))
    assert flat["selection_perplexity"] == close(1 / 0.7)
    assert [row["selected"] for row in (both, one, flat)] == [True, True, False]


def test_interval_of_two_documents_runs_from_the_one_to_the_other():
    # Resamples of two are the one twice, the other twice, or both: (1/2 * 1/4)^(-1/2), and 8.
    result = evaluate(ONE_SETTING, *hand_case())
    assert result["ensemble"][0]["interval"] == [close(math.sqrt(8)), close(8)]


def test_exponent_4_is_the_distance_to_the_fourth():
    # exp(-(ln 3)^2) to 1 = .2991: weights .7698 and .2302.
    config = EvaluateConfig(temperatures=(1.0,), distance_powers=(4,), bootstrap_resamples=100)
    far = 1 / (1 + math.exp(math.log(3) ** 2))
    near = 1 - far
    product = (near * 0.4 + far * 0.8) * (near * 0.2 + far * 0.4) * (far * 0.2 + near * 0.1)
    row = evaluate(config, *hand_case())["ensemble"][0]
    assert row["distance_power"] == 4
    assert row["perplexity"] == close(product ** (-1 / 3))


def test_best_single_expert_is_chosen_on_the_selecting_half():
    # Expert 0 is better there (.9 to .5) and worse on the reported half (.016 to .032).
    best = evaluate(ONE_SETTING, *hand_case())["best_single_expert"]
    assert best["cluster"] == 0
    assert best["perplexity"] == close(0.016 ** (-1 / 3))


def test_domains_by_hand():
    result = evaluate(ONE_SETTING, *hand_case())
    first, second = result["by_domain"]
    # Domain 0 is document 1: tokens of 1/2 and 1/4; its expert gives .4 and .2.
    assert (first["cluster"], first["n_documents"], first["n_tokens"]) == (0, 1, 2)
    assert [first["ensemble"], first["dense"]] == [close(math.sqrt(8)), close(math.sqrt(8))]
    assert first["own_expert"] == close(0.08 ** (-1 / 2))
    # Domain 1 is document 3: one token of 1/8; its expert gives .1.
    assert (second["cluster"], second["n_documents"], second["n_tokens"]) == (1, 1, 1)
    assert second["ensemble"] == close(8)
    assert second["own_expert"] == close(10)
    assert (second["seed"], second["random"]) == (close(2), close(8))


def test_domain_without_a_reported_document_has_no_figures():
    validation, scores, distances = hand_case()
    validation = replace(validation, clusters=np.array([1, 0, 1, 0]))
    empty = evaluate(ONE_SETTING, validation, scores, distances)["by_domain"][1]
    assert (empty["n_documents"], empty["n_tokens"]) == (0, 0)
    assert empty["ensemble"] is empty["dense"] is empty["own_expert"] is None


def test_without_dense_and_random_models_their_figures_are_absent():
    validation, scores, distances = hand_case()
    result = evaluate(ONE_SETTING, validation, replace(scores, dense=None, random=None), distances)
    assert result["dense"] is result["random"] is None
    assert result["ensemble"][0]["dense_ratio"] is result["ensemble"][0]["dense_ratio_interval"] is None
    assert result["by_domain"][0]["dense"] is None
    assert result["ensemble"][0]["perplexity"] == close(4)


# --- experts of some clusters only ---


def test_ensemble_of_a_subset_weighs_the_distances_to_its_own_centres():
    # A third centre, nearer than both others everywhere but without an expert: the weights stay 3/4 and 1/4.
    validation, scores, distances = hand_case()
    between = np.insert(distances, 1, 0.0, axis=1)
    whole = evaluate(ONE_SETTING, validation, scores, distances)
    subset = evaluate(ONE_SETTING, validation, replace(scores, clusters=(0, 2)), between)
    assert subset["ensemble"] == whole["ensemble"]
    assert subset["ensemble"][0]["perplexity"] == close(4)
    assert [row["top_k"] for row in subset["ensemble"]] == [2, 1, 2]
    assert [subset[name] for name in ("seed", "dense", "random")] == [
        whole[name] for name in ("seed", "dense", "random")
    ]


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


def test_subset_is_evaluated_as_if_there_were_no_other_clusters():
    validation, scores, distances = random_case(k=5)
    kept = [0, 2, 3]
    some = replace(scores, experts=scores.experts[kept], random=scores.random[kept])
    config = EvaluateConfig(bootstrap_resamples=100)
    alone = evaluate(config, validation, some, distances[:, kept])
    subset = evaluate(config, validation, replace(some, clusters=kept), distances)
    for name in ("ensemble", "random", "seed", "dense", "selection"):
        assert subset[name] == alone[name]
    assert {row["top_k"] for row in subset["ensemble"]} == {3, 1}
    assert subset["best_single_expert"] == {
        **alone["best_single_expert"],
        "cluster": kept[alone["best_single_expert"]["cluster"]],
    }


@pytest.mark.parametrize("clusters", [None, (0,), (0, 1, 2), (0, 4)])
def test_scores_that_do_not_fit_their_clusters_are_refused(clusters):
    validation, scores, distances = random_case(k=4)
    two = replace(scores, experts=scores.experts[:2], clusters=clusters)
    with pytest.raises(DataError, match=r"scores of 2 experts do not fit clusters \[.*\] of 4"):
        evaluate(ONE_SETTING, validation, two, distances)


# --- prompts ---


def hand_case_with_prompts():
    """`hand_case` with 1, 2, 1 and 3 tokens of prompt in front, which would ruin every figure.

    At them all models find the truth nearly impossible, and the second centre is so far (exp(-1600) is 0 in
    float64) that one expert alone would be used.
    """
    validation, scores, distances = hand_case()
    prompts = [1, 2, 1, 3]
    marks = [np.arange(len(row) - 1 + n) >= n for row, n in zip(validation.tokens, prompts, strict=True)]
    rows = [
        np.concatenate([row[:1], np.full(n, 7), row[1:]]) for row, n in zip(validation.tokens, prompts, strict=True)
    ]
    counted = np.concatenate(marks)

    def spread(values):
        out = np.full((*values.shape[:-1], len(counted)), -20, dtype=np.float32)
        out[..., counted] = values
        return out

    far = np.tile(np.float32([0, 40]), (len(counted), 1))
    far[counted] = distances
    long = Scores(*(spread(values) for values in (scores.seed, scores.experts, scores.dense, scores.random)))
    return replace(validation, tokens=rows, counted=marks), long, far


def test_tokens_of_prompts_count_in_no_figure():
    plain = evaluate(ONE_SETTING, *hand_case())
    result = evaluate(ONE_SETTING, *hand_case_with_prompts())
    # Documents 1 and 3 are reported: 2 + 1 counted tokens after 2 + 3 of prompts; 0 and 2 select.
    assert (result["n_tokens"], result["n_prompt_tokens"], result["n_bytes"]) == (3, 5, 9)
    assert result["selection"] == {"n_documents": 2, "n_tokens": 2, "n_bytes": 8, "n_prompt_tokens": 2}
    assert result["seed"]["perplexity"] == close(2)
    assert result["dense"]["bits_per_byte"] == close((1 + 2 + 3) / 9)
    assert result["ensemble"][0]["perplexity"] == close(4)
    assert result["ensemble"][0]["experts_used"] == 2.0
    assert [row["n_tokens"] for row in result["by_domain"]] == [2, 1]
    prompts = {"n_prompt_tokens": 0, "selection": {**result["selection"], "n_prompt_tokens": 0}}
    assert {**result, **prompts} == plain


def test_prompts_and_a_subset_together_are_the_counted_part_of_the_subset():
    validation, scores, distances = hand_case_with_prompts()
    wide = np.insert(distances, 1, 0.0, axis=1)
    subset = evaluate(ONE_SETTING, validation, replace(scores, clusters=(0, 2)), wide)
    assert subset["ensemble"] == evaluate(ONE_SETTING, *hand_case())["ensemble"]


def test_document_of_which_nothing_counts_is_refused():
    validation, scores, distances = hand_case_with_prompts()
    marks = [*validation.counted[:2], np.zeros(2, dtype=bool), validation.counted[3]]
    with pytest.raises(DataError, match="validation document 2 has no token after its prompt"):
        evaluate(ONE_SETTING, replace(validation, counted=marks), scores, distances)


def test_marks_of_other_tokens_are_refused():
    validation, scores, distances = hand_case_with_prompts()
    with pytest.raises(DataError, match="marks of counted tokens are 8 for 3 documents, the tokens 12 for 4"):
        evaluate(ONE_SETTING, replace(validation, counted=validation.counted[:3]), scores, distances)


# --- choosing and reporting ---


def test_documents_to_choose_on_are_every_second_one():
    assert selection_documents(5).tolist() == [True, False, True, False, True]
    validation, scores, distances = random_case(n_documents=9)
    counts = evaluate(EvaluateConfig(bootstrap_resamples=100), validation, scores, distances)
    assert counts["selection"]["n_bytes"] == validation.n_bytes[selection_documents(9)].sum()
    assert counts["n_bytes"] == validation.n_bytes[~selection_documents(9)].sum()


def test_one_setting_is_selected_for_each_top_k_and_it_is_the_best_of_the_selecting_half():
    result = evaluate(EvaluateConfig(bootstrap_resamples=100), *random_case())
    for top_k in (4, 2, 1):
        rows = rows_of(result, ensemble="clustering", top_k=top_k)
        assert len(rows) == 7 * 2
        chosen = [row for row in rows if row["selected"]]
        assert len(chosen) == 1
        assert chosen[0]["selection_perplexity"] == min(row["selection_perplexity"] for row in rows)
    assert [row["selected"] for row in rows_of(result, ensemble="uniform")] == [False]


def test_reported_half_has_no_say_in_what_is_selected():
    # Near experts are good on the selecting half and bad on the other: only a look at the latter prefers T = 10.
    validation, scores, distances = random_case()
    selecting = in_half(validation, "selection")
    nearness = -distances.T.astype(np.float32)
    experts = np.where(selecting, nearness, -2 - nearness).clip(-9, -0.01).astype(np.float32)
    config = EvaluateConfig(temperatures=(0.01, 10.0), distance_powers=(2,), top_k=(4,), bootstrap_resamples=100)
    result = evaluate(config, validation, replace(scores, experts=experts), distances)
    sharp, flat = rows_of(result, ensemble="clustering")
    assert sharp["perplexity"] > flat["perplexity"]
    assert (sharp["selected"], flat["selected"]) == (True, False)


def test_selection_sees_the_selecting_half_only():
    validation, scores, distances = random_case()
    config = EvaluateConfig(bootstrap_resamples=100)
    selecting = in_half(validation, "selection")
    before = evaluate(config, validation, scores, distances)
    changed = replace(scores, experts=np.where(selecting, scores.experts, scores.experts[::-1] * 0.5))
    after = evaluate(config, validation, changed, distances)
    for one, other in zip(before["ensemble"], after["ensemble"], strict=True):
        assert one["selected"] == other["selected"]
        assert one["selection_perplexity"] == other["selection_perplexity"]
        assert one["perplexity"] != other["perplexity"]
    assert before["best_single_expert"]["cluster"] == after["best_single_expert"]["cluster"]


def test_report_sees_the_reported_half_only():
    validation, scores, distances = random_case()
    config = EvaluateConfig(temperatures=(0.1,), distance_powers=(2,), bootstrap_resamples=100)
    selecting = in_half(validation, "selection")

    def halved(values):
        return np.where(selecting, values * 0.5, values)

    changed = Scores(*(halved(values) for values in (scores.seed, scores.experts, scores.dense, scores.random)))
    before = evaluate(config, validation, scores, distances)
    after = evaluate(config, validation, changed, distances)
    for name in ("seed", "dense", "random", "experts", "by_domain"):
        assert before[name] == after[name]
    for one, other in zip(before["ensemble"], after["ensemble"], strict=True):
        assert one["selection_perplexity"] > other["selection_perplexity"]
        assert (one["perplexity"], one["bits_per_byte"], one["interval"], one["dense_ratio"]) == (
            other["perplexity"],
            other["bits_per_byte"],
            other["interval"],
            other["dense_ratio"],
        )


def test_grid_agrees_with_a_loop_over_tokens():
    validation, scores, distances = random_case(n_documents=6, k=3)
    config = EvaluateConfig(temperatures=(0.05, 0.5), top_k=(3, 2, 1), bootstrap_resamples=100)
    reported = np.flatnonzero(in_half(validation, "report"))
    for row in rows_of(evaluate(config, validation, scores, distances), ensemble="clustering"):
        total = 0.0
        for token in reported:
            energy = distances[token].astype(float) ** row["distance_power"] / row["temperature"]
            weights = np.exp(-(energy - energy.min()))
            weights[np.argsort(energy)[row["top_k"] :]] = 0
            total -= math.log(weights @ np.exp(scores.experts[:, token].astype(float)) / weights.sum())
        assert row["perplexity"] == pytest.approx(math.exp(total / len(reported)), rel=1e-9)


def test_one_cluster_ensemble_is_its_expert():
    validation, scores, distances = random_case(k=1)
    result = evaluate(EvaluateConfig(bootstrap_resamples=100), validation, scores, distances)
    alone = result["experts"][0]["perplexity"]
    assert {row["perplexity"] for row in result["ensemble"]} == {alone}
    assert result["best_single_expert"]["perplexity"] == alone
    assert {row["top_k"] for row in result["ensemble"]} == {1}


def test_same_random_state_gives_the_same_intervals():
    case = random_case()
    one, same = (evaluate(EvaluateConfig(bootstrap_resamples=100), *case) for _ in range(2))
    other = evaluate(EvaluateConfig(bootstrap_resamples=100, random_state=1), *case)
    assert one == same
    assert one["seed"]["interval"] != other["seed"]["interval"]
    assert one["seed"]["perplexity"] == other["seed"]["perplexity"]


# --- settings and input ---


@pytest.mark.parametrize(("k", "values"), [(8, [8, 4, 2, 1]), (6, [6, 3, 1]), (2, [2, 1]), (1, [1])])
def test_top_k_goes_down_by_halves(k, values):
    assert EvaluateConfig().top_k_values(k) == values


def test_given_top_k_are_sorted_and_each_counts_once():
    assert EvaluateConfig(top_k=(1, 4, 2, 4)).top_k_values(4) == [4, 2, 1]


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_top_k_out_of_range_is_refused(top_k):
    with pytest.raises(ConfigError, match=rf"evaluate.top_k={top_k} is not in \[1, cluster.n_clusters=4\]"):
        EvaluateConfig(top_k=(2, top_k)).top_k_values(4)
    with pytest.raises(ConfigError, match=f"evaluate.top_k={top_k} is not in"):
        evaluate(EvaluateConfig(top_k=(top_k,)), *random_case(k=4))


def test_top_k_above_the_number_of_trained_experts_is_refused_with_both_numbers():
    message = r"evaluate.top_k=4 is not in \[1, 3\]: train.clusters names 3 of cluster.n_clusters=8 clusters"
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(top_k=(4, 2)).top_k_values(3, n_clusters=8)
    assert EvaluateConfig(top_k=(3, 2)).top_k_values(3, n_clusters=8) == [3, 2]
    assert EvaluateConfig().top_k_values(3, n_clusters=8) == [3, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": [0.1, 0]}, r"temperatures: expected one or more numbers above 0, got \[0.1, 0.0\]"),
        ({"temperatures": [-1]}, r"temperatures: expected one or more numbers above 0, got \[-1.0\]"),
        ({"temperatures": []}, r"temperatures: expected one or more numbers above 0, got \[\]"),
        ({"distance_powers": [0]}, r"distance_powers: expected one or more numbers above 0, got \[0.0\]"),
        ({"temperatures": [math.inf]}, "temperatures"),
        ({"top_k": []}, "top_k: Tuple should have at least 1 item"),
        ({"bootstrap_resamples": 99}, "bootstrap_resamples: Input should be greater than or equal to 100"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig.parse(values)


def test_fewer_than_four_documents_are_refused():
    validation, scores, distances = random_case(n_documents=4)
    evaluate(ONE_SETTING, validation, scores, distances)
    with pytest.raises(DataError, match="the validation split has 3 documents; at least 4 are needed"):
        evaluate(ONE_SETTING, *random_case(n_documents=3))


def test_document_without_a_token_is_refused():
    validation, scores, distances = hand_case()
    rows = [np.array([0, 1]), np.array([0, 1, 1]), np.array([0]), np.array([0, 1, 1])]
    with pytest.raises(DataError, match="no token of validation document 2; remove it"):
        evaluate(ONE_SETTING, replace(validation, tokens=rows), scores, distances)


# --- distances ---

TEXTS = [
    "the cat sat on the mat while the dogs slept",
    "stocks fell as banks raised interest rates again",
    "naïve café owners sell crème brûlée at night",
    "a goal in the last minute won the match 3:2",
    "cats and dogs chase mice around old houses",
    "interest in bank shares rose after the market closed",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusterer")
    documents = [Document(f"d|{number}", text) for number, text in enumerate(TEXTS)]
    fit_clusterer(ClusterConfig(n_clusters=3, n_components=4), documents, folder)
    tokenizer = TextTokenizer.train(TEXTS, 300)
    validation = ValidationSet(
        texts=TEXTS,
        tokens=tokenizer.encode_batch(TEXTS),
        clusters=np.zeros(len(TEXTS), dtype=np.int64),
        n_bytes=np.array([len(text.encode()) for text in TEXTS]),
    )
    return Clusterer.load(folder), tokenizer, validation


def test_distances_are_those_of_the_text_before_each_token(parts):
    clusterer, tokenizer, validation = parts
    seen = []
    found = context_distances(clusterer, tokenizer, validation, lambda done, total: seen.append((done, total)))
    expected = []
    for text in TEXTS:
        _, starts = tokenizer.encode_with_starts(text)
        vectors = clusterer.embedder.transform([text[:start] for start in starts[1:]])
        expected.append(np.linalg.norm(vectors[:, None] - clusterer.centers[None], axis=2))
    assert found.shape == (validation.offsets[-1], 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
    # The first token of a text is routed by the empty text, the same for all: its distances are the centres' lengths.
    np.testing.assert_allclose(
        found[validation.offsets[:-1]], np.tile(np.linalg.norm(clusterer.centers, axis=1), (6, 1)), atol=1e-6
    )
    assert seen == [(number, 6) for number in range(1, 7)]


def test_tokenizer_that_cuts_otherwise_is_refused(parts):
    clusterer, tokenizer, validation = parts
    other = TextTokenizer.train(["entirely other words make entirely other merges"] * 3, 300)
    again, there = len(other.encode_batch(TEXTS)[0]), len(validation.tokens[0])
    with pytest.raises(ManifestError, match=f"document 0 has {again} tokens now and {there} in the token shards"):
        context_distances(clusterer, other, validation)
    # As many tokens, but not the same.
    turned = [*validation.tokens[:2], validation.tokens[2][::-1], *validation.tokens[3:]]
    with pytest.raises(ManifestError, match=r"validation document 2 has .* tokens now"):
        context_distances(clusterer, tokenizer, replace(validation, tokens=turned))
    changed = replace(validation, texts=[*TEXTS[:4], TEXTS[4].replace("mice", "rats"), TEXTS[5]])
    with pytest.raises(ManifestError, match=r"validation document 4 has .*; run the assign stage again"):
        context_distances(clusterer, tokenizer, changed)
