"""The evaluator where scores, documents or settings are not plain: impossible tokens, prompts, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from evaluation_case import ONE_SETTING, hand_case, hand_case_with_prompts, random_case, row_of, rows_of

from cbtm.errors import ConfigError, DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.evaluator import evaluate


def close(value):
    return pytest.approx(value, rel=1e-6)


# --- impossible tokens ---


def test_impossible_tokens_are_counted_and_make_the_perplexity_infinite():
    validation, scores, distances = hand_case()
    scores.experts[0, 2] = scores.seed[1] = scores.seed[2] = scores.seed[0] = -np.inf
    result = evaluate(ONE_SETTING, validation, scores, distances)
    seed = result["seed"]
    assert (seed["perplexity"], seed["nats"], seed["bits_per_byte"], seed["dense_ratio"]) == (None,) * 4
    assert seed["impossible_tokens"] == 2  # of the reported half alone
    assert seed["interval"] == [close(2), None]  # the document without any, twice
    assert result["n_tokens"] == 3
    # Where one expert fails, the other bears the token: .25 * .4 instead of 1/4.
    both, one = (row_of(result, "clustering", top_k) for top_k in (2, 1))
    assert both["perplexity"] == close((1 / 2 * 0.1 * 1 / 8) ** (-1 / 3))
    assert (both["impossible_tokens"], one["impossible_tokens"]) == (0, 1)
    assert one["perplexity"] is None
    assert result["experts"][0] == {"cluster": 0, "perplexity": None}
    json.dumps(result, allow_nan=False)


def test_setting_that_finds_a_token_of_the_selecting_half_impossible_is_not_selected():
    # At T = 0.001 the far expert has no weight at all, and the near one finds the first token impossible.
    validation, scores, distances = hand_case()
    scores.experts[0, 0] = -np.inf
    config = EvaluateConfig(temperatures=(0.001, 1.0), distance_powers=(2,), top_k=(2,), bootstrap_resamples=100)
    sharp, flat = rows_of(evaluate(config, validation, scores, distances), ensemble="clustering")
    assert sharp["selection_perplexity"] is None
    assert (sharp["selected"], flat["selected"]) == (False, True)


def test_ratio_to_a_dense_model_that_finds_a_token_impossible():
    validation, scores, distances = hand_case()
    scores.dense[1] = -np.inf
    scores.experts[:, 4] = -np.inf
    result = evaluate(ONE_SETTING, validation, scores, distances)
    assert (result["dense"]["dense_ratio"], result["dense"]["dense_ratio_interval"]) == (None, None)
    # A finite perplexity over an infinite one is 0; over the document that dense can do, 2 to 8 for it.
    assert result["seed"]["dense_ratio"] == 0
    assert result["seed"]["dense_ratio_interval"] == [0, close(2 / 8)]
    row = row_of(result, "clustering", 2)
    assert (row["dense_ratio"], row["dense_ratio_interval"]) == (None, None)  # both are infinite
    # The groups say the same: dense fails in the first domain, the ensemble in the second.
    assert [one["dense_ratio"] for one in result["by_domain"]] == [0, None]
    assert [one["ensemble"] for one in result["by_domain"]] == [close(math.sqrt(8)), None]


def test_perplexity_beyond_any_number_is_none():
    validation, scores, distances = hand_case()
    scores.seed[:] = -2000
    seed = evaluate(ONE_SETTING, validation, scores, distances)["seed"]
    assert (seed["perplexity"], seed["nats"], seed["impossible_tokens"]) == (None, 2000, 0)


def test_text_of_no_byte_has_no_bits_per_byte():
    # Documents cut within their first character.
    validation, scores, distances = hand_case()
    empty = replace(validation, n_bytes=np.array([4, 0, 4, 0]))
    seed = evaluate(ONE_SETTING, empty, scores, distances)["seed"]
    assert (seed["bits_per_byte"], seed["perplexity"]) == (None, close(2))


# --- prompts ---


def test_tokens_of_prompts_count_in_no_figure():
    config = EvaluateConfig(
        ensembles=("clustering", "uniform", "prior", "oracle"),  # those that do not weigh by the tokens before
        **ONE_SETTING.model_dump(exclude={"ensembles"}),
    )
    plain = evaluate(config, *hand_case())
    result = evaluate(config, *hand_case_with_prompts())
    # Documents 1 and 3 are reported: 2 + 1 counted tokens after 2 + 3 of prompts; 0 and 2 select.
    assert (result["n_tokens"], result["n_prompt_tokens"], result["n_bytes"]) == (3, 5, 9)
    assert result["selection"] == {"n_documents": 2, "n_tokens": 2, "n_bytes": 8, "n_prompt_tokens": 2}
    assert result["seed"]["perplexity"] == close(2)
    assert row_of(result, "clustering", 2)["experts_used"] == 2.0
    assert [row["n_tokens"] for row in result["by_domain"]] == [2, 1]
    # But in the work: experts read the prompts. Of the nearest alone expert 0 reads all 4 tokens of document 1 and the
    # 3 of prompt of document 3, expert 1 all 4 of that.
    assert row_of(result, "clustering", 1)["flops_relative"] == close((4 + 3 + 4) / 8)
    for row in (*plain["ensemble"], *result["ensemble"]):
        row["flops_relative"] = None
    prompts = {"n_prompt_tokens": 0, "selection": {**result["selection"], "n_prompt_tokens": 0}}
    assert {**result, **prompts} == plain


def test_prompts_are_what_posterior_weighs_by():
    # The prompts of documents 1 and 3 prove one expert each (e^-20 against e^-1), which then has all the weight.
    validation, scores, distances = hand_case_with_prompts()
    scores.experts[0, [2, 3]] = scores.experts[1, [8, 9, 10]] = -1
    row = row_of(evaluate(ONE_SETTING, validation, scores, distances), "posterior", 2)
    assert row["perplexity"] == pytest.approx((0.4 * 0.2 * 0.1) ** (-1 / 3), rel=1e-6)


# --- input ---


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.25])
@pytest.mark.parametrize("name", ["seed", "dense", "average"])
def test_score_that_is_no_log_probability_is_refused_with_its_place(name, wrong):
    validation, scores, distances = hand_case()
    scores = replace(scores, averages={"average": scores.seed.copy()})
    (scores.averages["average"] if name == "average" else getattr(scores, name))[3] = wrong
    with pytest.raises(DataError, match=rf"log-probability {wrong} at token 3 is not in \[-inf, 0\].*score that model"):
        evaluate(ONE_SETTING, validation, scores, distances)


@pytest.mark.parametrize("name", ["experts", "random"])
def test_broken_score_of_an_expert_is_refused(name):
    validation, scores, distances = hand_case()
    getattr(scores, name)[1, 4] = np.nan
    with pytest.raises(DataError, match=r"log-probability nan at token 4 .*is not in \[-inf, 0\]"):
        evaluate(ONE_SETTING, validation, scores, distances)


def test_scores_of_other_tokens_are_refused():
    validation, scores, distances = hand_case()
    with pytest.raises(DataError, match=r"scores of shape \(4,\) for 5 tokens; score the model again"):
        evaluate(ONE_SETTING, validation, replace(scores, seed=scores.seed[:4]), distances)
    with pytest.raises(DataError, match=r"offsets run from 0 to 5, there are 4 tokens"):
        evaluate(ONE_SETTING, validation, scores, distances[:4])


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1])
def test_distance_that_is_none_is_refused(wrong):
    validation, scores, distances = hand_case()
    distances[2, 0] = wrong
    with pytest.raises(DataError, match=r"distances of tokens 0 to 4 run from .* expected finite ones of at least 0"):
        evaluate(ONE_SETTING, validation, scores, distances)


def test_fewer_than_four_documents_are_refused():
    evaluate(ONE_SETTING, *random_case(n_documents=4))
    with pytest.raises(
        DataError,
        match=r"the validation split has 3 documents that can be scored, 2 of them to choose .* at least 2 of each",
    ):
        evaluate(ONE_SETTING, *random_case(n_documents=3))


def test_document_without_a_token_is_refused():
    validation, scores, distances = hand_case()
    rows = [np.array([0, 1]), np.array([0, 1, 1]), np.array([0]), np.array([0, 1, 1])]
    with pytest.raises(DataError, match="no token of validation document 2; remove it"):
        evaluate(ONE_SETTING, replace(validation, tokens=rows), scores, distances)


def test_document_of_which_nothing_counts_is_refused():
    validation, scores, distances = hand_case_with_prompts()
    marks = [*validation.counted[:2], np.zeros(2, dtype=bool), validation.counted[3]]
    with pytest.raises(DataError, match="validation document 2 has no token after its prompt"):
        evaluate(ONE_SETTING, replace(validation, counted=marks), scores, distances)


def test_marks_of_other_tokens_are_refused():
    validation, scores, distances = hand_case_with_prompts()
    with pytest.raises(DataError, match="marks of counted tokens are 8 for 3 documents, the tokens 12 for 4"):
        evaluate(ONE_SETTING, replace(validation, counted=validation.counted[:3]), scores, distances)


@pytest.mark.parametrize("top_k", [5, -1])
def test_top_k_out_of_range_is_refused(top_k):
    with pytest.raises(ConfigError, match=rf"evaluate.top_k={top_k} is not in \[1, cluster.n_clusters=4\]"):
        evaluate(EvaluateConfig(top_k=(2, top_k)), *random_case(k=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": [0.1, 0]}, r"temperatures: expected one or more numbers above 0, got \[0.1, 0.0\]"),
        ({"temperatures": [-1]}, r"temperatures: expected one or more numbers above 0, got \[-1.0\]"),
        ({"temperatures": [math.inf]}, "temperatures"),
        ({"top_k": []}, "top_k: Tuple should have at least 1 item"),
        ({"bootstrap_resamples": 99}, "bootstrap_resamples: Input should be greater than or equal to 100"),
        ({"threads": 0}, "threads: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig.parse(values)
