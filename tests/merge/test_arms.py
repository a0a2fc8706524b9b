"""The comparison of arms by hand, infinite figures included; a comparison of real runs is in tests/integration."""

import csv
import io
import json
import math

import numpy as np
import pytest

from cbtm.errors import DataError
from cbtm.merge.arms import ArmDocuments, compare_arms
from cbtm.merge.arms_report import comparison_csv, comparison_verdict, format_comparison, render_comparison

TOKENS = np.array([2, 4, 2, 4])


def arm(kind, n_clusters, random_state=0, **nats):
    """An arm over four documents, of which all are reported on; nats per token of each document by column."""
    return ArmDocuments(
        name=f"{kind}-k{n_clusters}-s{random_state}",
        kind=kind,
        n_clusters=n_clusters,
        random_state=random_state,
        sp_ids=["a", "b", "c", "d"],
        clusters=np.array([0, 0, 1, 1]),
        labels=[""] * 4,
        reported=np.ones(4, dtype=bool),
        tokens=TOKENS,
        nats={name.replace("_", "-"): TOKENS * np.array(values, dtype=float) for name, values in nats.items()},
    )


def compared(dense, ensemble, random=(2, 2, 2, 2)):
    arms = [
        arm("dense", 1, seed=[3] * 4, clustering_top_1=dense),
        arm("clusters", 2, seed=[3] * 4, clustering_top_2=ensemble, clustering_top_1=ensemble, random=random),
    ]
    found = compare_arms(arms, random_state=0, n_resamples=50)
    return {
        **found,
        "run": {"name": "by hand", "root": "runs/by-hand", "created": "2026-01-01T00:00:00+00:00", "cbtm_version": "1"},
        "tokens_per_arm": 100,
        "arms": [],
    }


def row_of(result, kind):
    return next(row for row in result["rows"] if row["kind"] == kind)


def test_figures_by_hand():
    # Losses of 2 and 3 for 2 and 4 tokens: 32 nats over 12 tokens.
    result = compared([2, 3, 2, 3], [1, 1, 1, 1])
    assert row_of(result, "dense")["perplexity"] == pytest.approx(math.exp(32 / 12))
    ensemble = row_of(result, "clusters")
    assert ensemble["dense_ratio"] == pytest.approx(math.exp(1 - 32 / 12))
    low, high = ensemble["dense_ratio_interval"]
    assert low <= ensemble["dense_ratio"] <= high < 1
    assert [group["dense"]["perplexity"] for group in result["groups"]["rows"]] == pytest.approx([math.exp(16 / 6)] * 2)
    assert "2 experts is better than the dense model" in comparison_verdict(result)


def test_impossible_token_of_the_ensemble_makes_it_infinite_and_worse():
    result = compared([1, 2, 1, 2], [math.inf] * 4)
    json.dumps(result, allow_nan=False)
    ensemble = row_of(result, "clusters")
    assert ensemble["perplexity"] is ensemble["largest"] is ensemble["dense_ratio"] is None
    assert ensemble["dense_ratio_interval"] == [None, None]
    assert row_of(result, "random")["perplexity"] == pytest.approx(math.exp(2))
    assert "is worse than the dense model" in comparison_verdict(result)
    line = next(line for line in format_comparison(result).splitlines() if line.startswith("c-BTM, k = 2 "))
    assert line.split()[4:] == ["∞", "–", "∞–∞", "–", "+∞", "%", "to", "+∞", "%"]
    assert next(one for one in csv.reader(io.StringIO(comparison_csv(result))) if one[0] == "clusters")[4] == "inf"
    page = render_comparison(result)
    assert "∞" in page
    assert "inf" not in page.split("<svg")[0].replace("infinite", "")


def test_impossible_token_in_one_document_is_infinite_in_its_own_group_alone():
    result = compared([1, 2, 1, 2], [1, 1, 1, math.inf])
    groups = [group["clusters"] for group in result["groups"]["rows"]]
    assert groups[0]["perplexity"] == pytest.approx(math.e)
    assert groups[1]["perplexity"] is None
    low, high = row_of(result, "clusters")["dense_ratio_interval"]
    assert low < 1  # of resamples without that document
    assert high is None
    assert "cannot be told from" in comparison_verdict(result)


def test_tokens_that_both_find_impossible_leave_nothing_to_compare():
    result = compared([1, math.inf, 1, 2], [1, math.inf, 1, 1])
    json.dumps(result, allow_nan=False)
    assert row_of(result, "clusters")["dense_ratio_interval"] is None
    assert "nothing to compare" in comparison_verdict(result)
    assert row_of(result, "random")["dense_ratio"] == 0  # finite over infinite
    render_comparison(result)


def test_loss_beyond_the_largest_float_is_infinite():
    result = compared([1, 2, 1, 2], [800] * 4)
    assert row_of(result, "clusters")["perplexity"] is None


def test_arms_of_other_documents_are_refused():
    one, other = arm("dense", 1, seed=[3] * 4, clustering_top_1=[1] * 4), arm("clusters", 2, clustering_top_2=[1] * 4)
    other.sp_ids[0] = "z"
    with pytest.raises(DataError, match="have different held-out documents"):
        compare_arms([one, other], random_state=0, n_resamples=10)
