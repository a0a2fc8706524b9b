"""The headline, its sentence and its terminal table, on results written by hand."""

import math

import pytest
from hand_made_result import leave_out, make_full_result, make_infinite, make_result, make_subset

from cbtm.errors import DataError
from cbtm.merge.headline import HeadlineRow, format_table, headline_rows, verdict


def test_headline_has_the_arms_in_order_with_their_change_to_dense():
    rows = headline_rows(make_result())
    assert [(row.name, row.perplexity) for row in rows] == [
        ("seed model", 60.0),
        ("dense model", 50.0),
        ("random clusters", 55.0),
        ("ensemble, all 4 experts", 40.0),
        ("ensemble, top-2", 41.0),
        ("ensemble, top-1", 42.0),
        ("best single expert, cluster 0", 200.0),
    ]
    # 60/50 - 1, the dense model itself, 55/50 - 1, 40/50 - 1, 41/50 - 1, 42/50 - 1, 200/50 - 1
    assert [row.change_to_dense for row in rows] == [
        None if x is None else pytest.approx(x) for x in (0.2, None, 0.1, -0.2, -0.18, -0.16, 3.0)
    ]
    assert rows[1].interval == (49.0, 51.0)


def test_a_better_row_that_was_not_selected_is_not_reported():
    # At T = 1 every top_k is 5 better on the reported half, but T = 0.1 was chosen on the other half.
    assert min(row.perplexity for row in headline_rows(make_result())) == 40.0


def test_two_selected_rows_of_one_top_k_are_refused():
    result = make_result()
    result["ensemble"][1]["selected"] = True
    with pytest.raises(DataError, match="two ensembles with top_k=4 are selected"):
        headline_rows(result)


def test_verdict_of_a_win():
    # 40/50 = 0.80, interval of the ratio 0.79 to 0.81
    assert verdict(make_result(best=40.0)) == (
        "The ensemble of 4 experts reaches perplexity 40.0, 20.0 % below the dense model at equal training tokens "
        "(95 % interval 19.0–21.0 %)."
    )


def test_verdict_of_a_loss():
    # 55/50 = 1.10, interval of the ratio 1.09 to 1.11
    assert verdict(make_result(best=55.0)) == (
        "The ensemble of 4 experts reaches perplexity 55.0, 10.0 % above the dense model at equal training tokens "
        "(95 % interval 9.0–11.0 %): on this corpus the dense model is the better one."
    )


def test_verdict_is_undecided_when_the_interval_includes_0():
    # 49.75/50 = 0.995, interval of the ratio 0.985 to 1.005
    assert verdict(make_result(best=49.75)) == (
        "The ensemble of 4 experts (perplexity 49.8) and the dense model (50.0) cannot be told apart at equal training "
        "tokens: the difference of −0.5 % has a 95 % interval of −1.5 % to +0.5 %, which includes 0."
    )


def test_verdict_without_a_dense_model_claims_nothing():
    result = {**make_result(), "dense": None}
    assert verdict(result) == (
        "The ensemble of 4 experts reaches perplexity 40.0; "
        "no dense model was trained at equal tokens to compare it with."
    )


def test_verdict_without_interval_says_so_and_without_ensemble_too():
    result = make_result()
    result["ensemble"][0]["dense_ratio_interval"] = None
    assert verdict(result).endswith("at equal training tokens; no interval was computed.")
    assert verdict({**result, "ensemble": []}) == "No ensemble of the experts was evaluated."


def test_verdict_names_the_top_k_when_all_experts_were_not_evaluated():
    result = make_result()
    result["ensemble"] = [row for row in result["ensemble"] if row["top_k"] == 2]
    assert verdict(result).startswith("The top-2 ensemble of 4 experts reaches perplexity 41.0, 18.0 % below")


def test_verdict_on_a_subset_says_how_many_tokens_its_experts_saw():
    # 2 of 4 experts with 409,600 tokens each, the dense model with 1,638,400.
    assert verdict(make_subset()) == (
        "The ensemble of 2 experts reaches perplexity 40.0, 20.0 % below the dense model on 50 % of its training "
        "tokens (95 % interval 19.0–21.0 %)."
    )
    assert verdict(make_subset((2,))).startswith("The one expert reaches perplexity 40.0, 20.0 % below the dense model")
    whole = {**make_result(), "tokens_seen": {"dense": 1_638_400, "experts": 1_638_000, "random": None}}
    assert verdict(whole) == verdict(make_result())  # rounded steps


def test_headline_of_a_subset_counts_the_experts_that_there_are():
    names = [row.name for row in headline_rows(make_subset())]
    assert names[3:] == ["ensemble, all 2 experts", "ensemble, top-1", "best single expert, cluster 3"]


def test_table_aligns_and_is_ascii():
    rows = [
        HeadlineRow("dense model", 50.0, 1.411, (49.0, 51.0), None),
        HeadlineRow("ensemble, top-1", 1234.5, 2.5675, None, 23.69),
    ]
    assert format_table(rows).splitlines() == [
        "                 perplexity  bits/byte  95 % interval   vs dense",
        "dense model            50.0      1.411   49.0 to 51.0          -",
        "ensemble, top-1       1,234      2.567              -  +2369.0 %",
    ]
    assert format_table(headline_rows(make_result())).isascii()


def test_headline_has_averages_before_the_single_expert():
    names = [row.name for row in headline_rows(make_full_result())]
    assert names[-4:] == [
        "uniform average of parameters",
        "weighted average of parameters",
        "greedy soup of experts 0, 1",
        "best single expert, cluster 0",
    ]
    result = make_full_result(8)
    result["averages"][2]["experts"] = list(range(8))
    assert headline_rows(result)[-2].name == "greedy soup of 8 experts"


def test_verdict_when_the_dense_model_alone_is_infinite_compares_with_nothing():
    result = make_full_result()
    make_infinite(result["dense"], 4)
    assert verdict(result) == (
        "The ensemble of 4 experts reaches perplexity 40.0; that of the dense model is infinite (4 impossible tokens)."
    )
    assert all(row.change_to_dense is None for row in headline_rows(result))


def test_verdict_of_a_subset_on_purpose_counts_the_tokens_of_its_experts():
    result = leave_out(make_full_result(), (1, 3))
    # 2 of the 4 experts, which together saw what the dense model did; top-2 is 41/50 = 0.82, from 0.81 to 0.83.
    assert verdict(result) == (
        "The ensemble of 2 of 4 experts reaches perplexity 41.0, 18.0 % below the dense model on 50 % of its training "
        "tokens (95 % interval 17.0–19.0 %)."
    )


def test_infinite_perplexity_is_inf_in_rows_and_in_the_table():
    result = make_full_result()
    make_infinite(result["ensemble"][0], 12)
    make_infinite(result["random"], 2)
    rows = {row.name: row for row in headline_rows(result)}
    assert rows["ensemble, all 4 experts"].perplexity == math.inf
    assert rows["ensemble, all 4 experts"].impossible_tokens == 12
    assert format_table(headline_rows(result)[2:3]).splitlines()[1].split() == (
        ["random", "clusters", "inf", "inf", "inf", "to", "inf", "+inf", "%"]
    )
    assert verdict(result) == (
        "The ensemble of 4 experts gives 12 of 100,000 tokens no probability at all, so its perplexity is infinite."
    )
