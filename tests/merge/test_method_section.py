"""Sentences on how a result was measured."""

import pytest
from hand_made_result import make_full_result, make_infinite, make_result

from cbtm.merge.method_section import method_remarks


def said(**settings: object) -> str:
    result = make_full_result()
    result["routing_settings"] |= settings
    return "\n".join(method_remarks(result))


def test_an_older_result_says_nothing():
    assert method_remarks(make_result()) == []


def test_scoring_counts_one_pass_for_each_model_whatever_the_settings():
    text = said()
    # Clustering 3 x 2, uniform, product, bayes and posterior 2 each, prior and oracle.
    assert text.startswith(
        "Scoring 6 models took 6 passes over the validation tokens, whatever the number of settings: 1,234 forward "
        "passes of batches, 210,000 tokens fed, 200,000 scored. The 15 settings of the ensembles are arithmetic"
    )
    assert "saved" not in text
    assert "lag" not in text


def test_top_k_scoring_says_what_it_saved():
    result = make_full_result()
    result["scoring"] |= {"top_k": 2, "compute_share": 0.37}
    text = method_remarks(result)[0]
    assert "among the 2 nearest" in text
    assert "37 % of the compute of full passes and saved 63 %" in text


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({"lag": 1}, "The weights at a token do not see the token just before it (lag 1)."),
        ({"lag": 3}, "The weights at a token do not see the 3 tokens just before it (lag 3)."),
        (
            {"refresh": "once"},
            "The weights are estimated once for a document, before the first token that counts.",
        ),
        (
            {"refresh": 16, "context_ratio": 0.5},
            "The weights are estimated anew every 16 tokens only. After 50 % of a document they stay as they are.",
        ),
        ({"context_ratio": 0.25}, "After 25 % of a document the weights stay as they are."),
    ],
)
def test_routing_that_is_not_the_default_is_said(settings: dict[str, object], sentences: str):
    assert sentences in said(**settings).split("\n")


def test_the_reference_preset_is_named_with_what_it_means():
    text = said(preset="reference", lag=1)
    for fact in (
        "power 4",
        "temperature 0.1",
        "2,049",
        "first token given and not scored",
        "do not see the token before",
    ):
        assert fact in text, fact
    assert "Only figures under this preset compare with those of the reference" in text


def test_impossible_tokens_are_counted():
    assert "No model and no setting here has one." in said()
    result = make_full_result()
    make_infinite(result["ensemble"][0], 12)
    assert "One model or setting here has such tokens." in method_remarks(result)[-1]
    make_infinite(result["seed"], 2)
    assert "2 models and settings here have such tokens." in method_remarks(result)[-1]
