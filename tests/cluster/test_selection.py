"""Comparing numbers of clusters: planted structure is found, noise gets no answer, columns against definitions."""

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.kmeans import balanced_kmeans, squared_distances
from cbtm.cluster.selection import (
    Candidate,
    candidates_json,
    compare_k,
    format_candidates,
    suggest,
)
from cbtm.errors import ConfigError, DataError


def planted(n_groups: int, per_group: int = 50, d: int = 20, noise: float = 0.3, seed: int = 5):
    """Points around `n_groups` random directions of length sqrt(d) or so, and the group of each."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    x = rng.normal(size=(n_groups, d))[groups] + noise * rng.normal(size=(len(groups), d))
    order = rng.permutation(len(groups))
    return x[order].astype(np.float32), groups[order]


def unit_noise(n: int = 800, d: int = 50, seed: int = 2) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def candidate(k: int, stability: float, *, spread: float = 0.0, balance: float = 1.0) -> Candidate:
    return Candidate(k, 1.0, 1.0, balance, stability, spread, None, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_six_planted_groups_are_suggested(seed):
    x, groups = planted(6, seed=seed)
    candidates = compare_k(x, [2, 3, 4, 6, 8, 12], random_state=seed, true_labels=groups.tolist())
    assert [row.n_clusters for row in candidates] == [2, 3, 4, 6, 8, 12]
    assert suggest(candidates) == 6
    six = candidates[3]
    # Every fit of six finds the six groups: same partition (ARI 1, no spread), the true one (NMI 1), 50 each.
    assert (six.stability, six.stability_spread, six.balance) == (1.0, 0.0, 1.0)
    assert six.nmi == pytest.approx(1.0)
    assert six.inertia == pytest.approx(six.greedy_inertia, rel=1e-5)


def test_points_without_structure_get_no_suggestion_and_a_reason():
    candidates = compare_k(unit_noise(), [2, 4, 8], random_state=0)
    assert max(row.stability for row in candidates) < 0.2
    assert suggest(candidates) is None
    assert "No k is suggested" in format_candidates(candidates, None)


def test_the_row_of_a_k_is_the_fit_that_the_clusterer_would_make():
    x = unit_noise(300)
    (row,) = compare_k(x, [5], random_state=7)
    fit = balanced_kmeans(x, 5, random_state=7)
    distances = squared_distances(x, fit.cluster_centers_)
    sizes = np.bincount(distances.argmin(axis=1), minlength=5)
    assert row.inertia == pytest.approx(fit.inertia_ / 300, rel=1e-6)
    assert row.greedy_inertia == pytest.approx(distances.min(axis=1).mean(), rel=1e-5)
    assert row.balance == sizes.max() / sizes.min()
    assert row.greedy_inertia < row.inertia  # the nearest centre is never farther than the balanced one


def test_a_row_depends_neither_on_the_other_ks_nor_on_their_order():
    x = unit_noise(200)

    def without_time(rows):
        return [{**row, "seconds": None} for row in candidates_json(rows, None)["candidates"]]

    together = without_time(compare_k(x, [4, 2, 4, 3], random_state=1))
    alone = without_time(compare_k(x, [3], random_state=1))
    assert [row["n_clusters"] for row in together] == [2, 3, 4]
    assert together[1] == alone[0]


def test_a_fit_sees_at_most_max_documents_and_all_documents_are_labelled():
    x, groups = planted(4, per_group=200)
    (row,) = compare_k(x, [4], random_state=0, max_documents_per_fit=80, true_labels=groups.tolist())
    assert row.nmi == pytest.approx(1.0)  # over all 800, or the labels would not have fitted
    with pytest.raises(ConfigError, match="k=81 is larger than the 80 documents of a resampled fit"):
        compare_k(x, [81], random_state=0, max_documents_per_fit=80)


def test_progress_counts_every_fit():
    seen = []
    compare_k(
        unit_noise(60), [2, 3], repeats=2, random_state=0, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 6) for done in range(1, 7)]  # two ks, each one fit and two resampled ones


def test_the_largest_k_within_the_tolerance_of_the_most_stable_is_suggested():
    # Bar: 0.99 - 0.02 = 0.97; 12 clears it, 16 does not.
    rows = [candidate(4, 0.99), candidate(8, 0.98), candidate(12, 0.972), candidate(16, 0.96)]
    assert suggest(rows) == 12


def test_the_spread_of_the_best_widens_the_tolerance_but_an_erratic_k_does_not_help_itself():
    assert suggest([candidate(4, 0.99, spread=0.05), candidate(8, 0.95)]) == 8  # 0.99 - 0.05 <= 0.95
    assert suggest([candidate(4, 0.99), candidate(8, 0.95, spread=0.3)]) == 4


def test_two_clusters_set_no_bar_and_are_suggested_only_alone():
    assert suggest([candidate(2, 1.0), candidate(8, 0.95), candidate(16, 0.7)]) == 8
    rows = [candidate(2, 1.0), candidate(8, 0.8)]
    assert suggest(rows) == 2
    assert "no larger k" in format_candidates(rows, 2)


def test_lopsided_ks_are_not_suggested():
    assert suggest([candidate(4, 0.95), candidate(8, 1.0, balance=3.5)]) == 4
    rows = [candidate(8, 1.0, balance=math.inf)]
    assert suggest(rows) is None
    assert "over 3 times as large" in format_candidates(rows, None)
    assert suggest([]) is None


def test_the_table_marks_the_suggestion_and_warns_where_the_range_ends():
    rows = [candidate(4, 0.95), candidate(8, 0.99)]
    lines = format_candidates(rows, 8).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["k", "4", "*"]
    assert len({len(line) for line in lines[:3]}) == 1  # columns line up
    assert "the largest tried" in lines[3]
    assert "NMI" not in lines[0]


def test_the_json_holds_no_infinity():
    data = candidates_json([candidate(8, 1.0, balance=math.inf)], None)
    assert json.loads(json.dumps(data, allow_nan=False))["candidates"][0]["balance"] is None


@pytest.mark.parametrize(
    ("ks", "settings", "message"),
    [
        ([], {}, "ks is empty"),
        ([1, 2], {}, "k=1 has nothing to compare; use at least 2"),
        ([2, 41], {}, "k=41 is larger than the 40 documents of a resampled fit"),  # 40 = 2/3 of 60
        ([2], {"repeats": 1}, "repeats=1 is too small; use at least 2"),
        ([2], {"random_state": -1}, "random_state=-1 is too small"),
        ([2], {"max_documents_per_fit": 0}, "max_documents_per_fit=0 is too small"),
    ],
)
def test_settings_out_of_range_are_named(ks, settings, message):
    with pytest.raises(ConfigError, match=message):
        compare_k(unit_noise(60), ks, **{"random_state": 0, **settings})


def test_data_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="3 labels for 60 documents"):
        compare_k(unit_noise(60), [2], random_state=0, true_labels=[0, 1, 2])
    with pytest.raises(DataError, match=r"vectors has shape \(60,\)"):
        compare_k(np.zeros(60, dtype=np.float32), [2], random_state=0)
    broken = unit_noise(60)
    broken[7, 0] = np.nan
    with pytest.raises(DataError, match="row 7 of vectors is not finite"):
        compare_k(broken, [2], random_state=0, max_documents_per_fit=5)


def test_identical_documents_are_no_clusters():
    # Every distance is 0; greedy puts all into cluster 0, so the balance is infinite and nothing is suggested.
    (row,) = compare_k(np.ones((30, 3), dtype=np.float32), [3], random_state=0)
    assert row.inertia == row.greedy_inertia == 0
    assert row.balance == math.inf
    assert suggest([row]) is None
