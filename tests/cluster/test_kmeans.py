"""Balanced k-means: hand-computed and exhaustive optima, sizes, seeds, odd inputs; distances and greedy labels."""

import itertools
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.assignment import balanced_assignment
from cbtm.cluster.kmeans import balanced_kmeans, nearest_centers, squared_distances
from cbtm.errors import ConfigError, DataError


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)[:, None]


def unit_points(n: int, d: int, seed: int) -> NDArray[np.float32]:
    points = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def exact_inertia(x: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """Sum of squared distances to the means of the groups, in float64."""
    x = x.astype(np.float64)
    return sum(np.square(x[labels == c] - x[labels == c].mean(axis=0)).sum() for c in np.unique(labels))


def test_two_pairs_on_a_line():
    result = balanced_kmeans(column(0, 1, 10, 11), 2, random_state=0)
    assert sorted(result.cluster_centers_.ravel()) == [0.5, 10.5]
    assert result.labels_[0] == result.labels_[1] != result.labels_[2] == result.labels_[3]
    assert result.inertia_ == pytest.approx(4 * 0.5**2)


def test_balance_forces_a_point_away_from_its_neighbours():
    # {0, 1} and {2, 10}: 2 * 0.5^2 + 2 * 4^2 = 32.5; unbalanced k-means would find {0, 1, 2}, {10} at 2.
    result = balanced_kmeans(column(0, 1, 2, 10), 2, random_state=0)
    assert result.labels_[0] == result.labels_[1] != result.labels_[2] == result.labels_[3]
    assert result.inertia_ == pytest.approx(32.5)


def test_ten_starts_find_the_best_of_all_balanced_partitions():
    x = np.random.default_rng(3).normal(size=(9, 2)).astype(np.float32)
    best = min(
        exact_inertia(x, np.array(labels))
        for labels in itertools.product(range(3), repeat=9)
        if np.bincount(labels, minlength=3).tolist() == [3, 3, 3]
    )
    assert balanced_kmeans(x, 3, random_state=0, n_init=10).inertia_ == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("random_state", range(10))
def test_planted_groups_of_equal_size_are_found_from_every_seed(random_state):
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(8), 250)
    x = (rng.normal(size=(8, 20))[groups] + 0.3 * rng.normal(size=(2000, 20))).astype(np.float32)
    labels = balanced_kmeans(x, 8, random_state=random_state).labels_
    pairs = {(int(a), int(b)) for a, b in zip(groups, labels, strict=True)}
    assert len(pairs) == 8  # one label for each group


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 7, 19, 36, 37])
def test_sizes_differ_by_at_most_one_for_any_number_of_clusters(n_clusters):
    x = unit_points(37, 5, seed=1)
    result = balanced_kmeans(x, n_clusters, random_state=2)
    sizes = np.bincount(result.labels_, minlength=n_clusters)
    assert sizes.min() == 37 // n_clusters
    assert sizes.max() == -(-37 // n_clusters)
    assert result.cluster_centers_.shape == (n_clusters, 5)
    assert result.cluster_centers_.dtype == np.float32
    assert result.labels_.dtype == np.int32


def test_one_cluster_is_the_mean():
    x = unit_points(50, 4, seed=2)
    result = balanced_kmeans(x, 1, random_state=0)
    np.testing.assert_allclose(result.cluster_centers_[0], x.mean(axis=0), atol=1e-7)
    assert result.inertia_ == pytest.approx(exact_inertia(x, np.zeros(50, dtype=int)), rel=1e-6)


def test_as_many_clusters_as_points_leaves_no_distance():
    result = balanced_kmeans(unit_points(23, 6, seed=3), 23, random_state=0)
    assert sorted(result.labels_) == list(range(23))
    assert result.inertia_ == pytest.approx(0, abs=1e-5)


def test_labels_and_inertia_belong_to_the_centres():
    x = unit_points(600, 10, seed=4)
    for max_iterations in (1, 3, 50):
        result = balanced_kmeans(x, 7, random_state=0, max_iterations=max_iterations)
        again = balanced_assignment(squared_distances(x, result.cluster_centers_))
        distances = np.square(x.astype(np.float64) - result.cluster_centers_[result.labels_]).sum()
        assert result.inertia_ == pytest.approx(again.total_cost, rel=1e-6)
        assert result.inertia_ == pytest.approx(distances, rel=1e-5)
        assert result.n_iter_ == len(result.history_) <= max_iterations
        assert result.history_[-1] == result.inertia_


def test_inertia_never_rises():
    history = balanced_kmeans(unit_points(3000, 20, seed=5), 12, random_state=1, tolerance=0).history_
    assert len(history) > 3
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(history))


def test_converged_centres_are_the_means_of_their_points():
    x = unit_points(400, 6, seed=6)
    result = balanced_kmeans(x, 5, random_state=0, tolerance=0, max_iterations=500)
    for cluster in range(5):
        mean = x[result.labels_ == cluster].mean(axis=0)
        np.testing.assert_allclose(result.cluster_centers_[cluster], mean, atol=1e-5)


def test_a_wide_tolerance_stops_early():
    x = unit_points(2000, 20, seed=7)
    assert balanced_kmeans(x, 10, random_state=0, tolerance=1.0).n_iter_ == 2
    assert balanced_kmeans(x, 10, random_state=0, tolerance=0).n_iter_ > 2


def test_same_seed_gives_the_same_result_and_another_seed_another_start():
    x = unit_points(5000, 20, seed=8)  # more than the sample of the starts
    first, second = (balanced_kmeans(x, 6, random_state=3, max_iterations=2) for _ in range(2))
    assert np.array_equal(first.cluster_centers_, second.cluster_centers_)
    assert np.array_equal(first.labels_, second.labels_)
    assert first.history_ == second.history_
    other = balanced_kmeans(x, 6, random_state=4, max_iterations=2)
    assert not np.array_equal(first.cluster_centers_, other.cluster_centers_)


def test_more_starts_are_never_worse():
    x = unit_points(1500, 12, seed=9)
    one = balanced_kmeans(x, 9, random_state=0).inertia_
    assert balanced_kmeans(x, 9, random_state=0, n_init=4).inertia_ <= one  # the first start is the same


def test_duplicates_and_zero_rows_are_shared_out():
    x = np.concatenate([np.zeros((40, 3)), np.ones((23, 3)), np.eye(3)]).astype(np.float32)
    for n_clusters in (2, 5, 13):
        result = balanced_kmeans(x, n_clusters, random_state=0)
        assert np.ptp(np.bincount(result.labels_, minlength=n_clusters)) <= 1
        assert np.isfinite(result.cluster_centers_).all()


def test_all_points_equal():
    result = balanced_kmeans(np.full((10, 2), 0.3, dtype=np.float32), 4, random_state=0)
    assert sorted(np.bincount(result.labels_)) == [2, 2, 3, 3]
    assert result.inertia_ == pytest.approx(0, abs=1e-9)


def test_far_from_the_origin_the_groups_are_still_seen():
    x = column(0, 1, 10, 11) + np.float32(1e5)
    result = balanced_kmeans(x, 2, random_state=0)
    assert sorted(result.cluster_centers_.ravel()) == [100000.5, 100010.5]
    assert result.inertia_ == pytest.approx(1.0)


def test_progress_sees_every_iteration():
    seen: list[tuple[int, float]] = []
    x = unit_points(500, 5, seed=10)
    result = balanced_kmeans(x, 4, random_state=0, progress=lambda step, inertia: seen.append((step, inertia)))
    assert seen == list(enumerate(result.history_, start=1))


def test_squared_distances_equal_the_definition():
    x, centers = unit_points(9000, 7, seed=12), unit_points(5, 7, seed=13)
    direct = np.square(x[:, None].astype(np.float64) - centers).sum(axis=2)
    distances = squared_distances(x, centers)
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, direct, atol=2e-6)


def test_distance_to_itself_is_never_negative():
    x = unit_points(500, 100, seed=14)
    assert squared_distances(x, x).min() >= 0
    assert squared_distances(x, x).diagonal().max() < 1e-6


def test_nearest_centre_ignores_sizes_and_ties_go_to_the_lowest_index():
    centers = column(0, 10, 10)
    assert nearest_centers(column(1, 2, 5, 9, 20), centers).tolist() == [0, 0, 0, 1, 1]
    assert nearest_centers(column(1, 2), centers).dtype == np.int32
    assert nearest_centers(np.empty((0, 1), dtype=np.float32), centers).tolist() == []


def test_nearest_centres_in_blocks_equal_one_argmin():
    x, centers = unit_points(9000, 7, seed=15), unit_points(12, 7, seed=16)
    direct = np.square(x[:, None].astype(np.float64) - centers).sum(axis=2).argmin(axis=1)
    assert (nearest_centers(x, centers) == direct).mean() > 0.999  # a near tie may fall either way


def test_more_clusters_than_documents_are_refused():
    message = "n_clusters=9 is larger than the number of documents 5; use at most 5"
    with pytest.raises(ConfigError, match=message):
        balanced_kmeans(np.zeros((5, 2), dtype=np.float32), 9, random_state=0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_clusters": 0}, "n_clusters=0 is too small; use at least 1"),
        ({"n_init": 0}, "n_init=0 is too small; use at least 1"),
        ({"max_iterations": 0}, "max_iterations=0 is too small; use at least 1"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is too small; use 0 or more"),
        ({"random_state": -1}, "random_state=-1 is too small; use 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        balanced_kmeans(column(1, 2, 3), **{"n_clusters": 2, "random_state": 0, **setting})


def test_a_row_that_is_not_finite_is_refused_with_its_number():
    x = np.zeros((6, 2), dtype=np.float32)
    x[3, 1] = np.nan
    with pytest.raises(DataError, match=r"row 3 of x is not finite \(1 such rows\)"):
        balanced_kmeans(x, 2, random_state=0)


@pytest.mark.parametrize("shape", [(5,), (5, 0), (2, 2, 2)])
def test_what_is_not_a_matrix_of_points_is_refused(shape):
    with pytest.raises(DataError, match="pass a matrix of"):
        balanced_kmeans(np.zeros(shape, dtype=np.float32), 1, random_state=0)


def test_points_and_centres_of_different_length_are_refused():
    with pytest.raises(DataError, match=r"points \(3, 1\) and centres \(2, 4\) do not fit"):
        squared_distances(column(1, 2, 3), np.zeros((2, 4), dtype=np.float32))


# --- batches ---


class Reader(Sequence):
    """Batches made when they are asked for, which counts how often that was."""

    def __init__(self, x: NDArray[np.float32], size: int) -> None:
        self.x, self.size, self.n_reads = x, size, 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __getitem__(self, number: int) -> NDArray[np.float32]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        self.n_reads += 1
        return self.x[number * self.size : (number + 1) * self.size].copy()


def test_one_batch_is_the_same_as_a_matrix():
    x = unit_points(5000, 8, seed=20)
    matrix, batch = (balanced_kmeans(points, 6, random_state=1, max_iterations=5) for points in (x, [x]))
    assert np.array_equal(matrix.labels_, batch.labels_)
    assert np.array_equal(matrix.cluster_centers_, batch.cluster_centers_)
    assert matrix.history_ == batch.history_


def test_every_batch_counts():
    # Lines 0, 1 | 10, 11 and 2, 3 | 12, 13: the centres are the means of both batches, not those of the last.
    result = balanced_kmeans([column(0, 1, 10, 11), column(2, 3, 12, 13)], 2, random_state=0)
    assert sorted(result.cluster_centers_.ravel()) == [1.5, 11.5]
    assert result.inertia_ == pytest.approx(2 * (1.5**2 + 0.5**2 + 0.5**2 + 1.5**2))
    low = result.labels_[0]
    assert result.labels_.tolist() == [low, low, 1 - low, 1 - low] * 2


def test_batches_of_different_distributions_are_both_reflected():
    rng = np.random.default_rng(21)
    a = (rng.normal(size=(2, 5)) * 5)[rng.integers(2, size=1200)] + 0.1 * rng.normal(size=(1200, 5))
    b = (rng.normal(size=(2, 5)) * 5)[rng.integers(2, size=800)] + 0.1 * rng.normal(size=(800, 5)) + 40
    batches = [a.astype(np.float32), b.astype(np.float32)]
    result = balanced_kmeans(batches, 2, random_state=0)
    # Each batch is balanced by itself, so each centre is the mean of 600 points around 0 and 400 around 40.
    x = np.concatenate(batches)
    for cluster in range(2):
        members = x[result.labels_ == cluster]
        assert len(members) == 1000
        assert (members.mean(axis=1) > 20).sum() == 400
        np.testing.assert_allclose(result.cluster_centers_[cluster], members.mean(axis=0), atol=1e-2)


def test_the_sizes_of_each_batch_differ_by_at_most_one():
    x = unit_points(1000, 5, seed=22)
    batches = [x[:301], x[301:700], x[700:]]
    labels = balanced_kmeans(batches, 7, random_state=0).labels_
    assert len(labels) == 1000
    for part in (labels[:301], labels[301:700], labels[700:]):
        assert np.ptp(np.bincount(part, minlength=7)) <= 1


def test_inertia_of_batches_is_their_sum_and_never_rises():
    x = unit_points(3000, 12, seed=23)
    result = balanced_kmeans([x[:1000], x[1000:1999], x[1999:]], 9, random_state=1, tolerance=0)
    assert len(result.history_) > 3
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(result.history_))
    distances = np.square(x.astype(np.float64) - result.cluster_centers_[result.labels_]).sum()
    assert result.inertia_ == pytest.approx(distances, rel=1e-5)


def test_shuffled_batches_cost_little_more_than_one_matrix():
    x = unit_points(6000, 10, seed=24)
    whole = balanced_kmeans(x, 8, random_state=0).inertia_
    assert balanced_kmeans([x[:2000], x[2000:4000], x[4000:]], 8, random_state=0).inertia_ < 1.02 * whole


def test_a_small_last_batch_joins_the_one_before():
    x = unit_points(103, 4, seed=25)
    small, joined = (
        balanced_kmeans(batches, 5, random_state=0) for batches in ([x[:50], x[50:100], x[100:]], [x[:50], x[50:]])
    )
    assert np.array_equal(small.labels_, joined.labels_)
    assert sorted(np.bincount(small.labels_[50:])) == [10, 10, 11, 11, 11]  # 53 = 5 * 10 + 3


def test_batches_of_memory_mapped_files_are_read_in_turn(tmp_path):
    n_batches, n_rows, d, k = 10, 4000, 100, 4
    batches = []
    for number in range(n_batches):
        np.save(tmp_path / f"{number}.npy", unit_points(n_rows, d, seed=30 + number))
        batches.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    tracemalloc.start()
    result = balanced_kmeans(batches, k, random_state=0, max_iterations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.bincount(result.labels_).tolist() == [10_000] * 4
    # All points are 16 MB, one batch 1.6 MB, the sample of the starts (4096 points) as much.
    assert peak < 0.5 * n_batches * n_rows * d * 4


def test_a_batch_is_asked_for_once_in_an_iteration():
    reader = Reader(unit_points(9000, 4, seed=26), size=3000)
    result = balanced_kmeans(reader, 3, random_state=0, max_iterations=4, tolerance=0)
    assert reader.n_reads == 3 * (1 + 1 + result.n_iter_)  # check, sample of the starts, iterations


def test_the_sample_of_the_starts_is_drawn_over_all_batches():
    # The start is all there is after one assignment. From the first batch alone, all centres would lie around 0.
    batches = [unit_points(3000, 6, seed=27 + number) + np.float32(100 * number) for number in range(3)]
    result = balanced_kmeans(batches, 3, random_state=0, max_iterations=1)
    assert sorted(np.rint(result.cluster_centers_.mean(axis=1) / 100).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], DataError, "x has no batches; pass at least one matrix"),
        ([np.zeros((9, 2)), np.zeros((9, 3))], DataError, "batch 1 of x has 3 columns, but the first batch has 2"),
        ([np.zeros((9, 2)), np.zeros(9)], DataError, r"batch 1 of x has shape \(9,\); pass a matrix of"),
        (
            [np.zeros((9, 2)), np.full((9, 2), np.nan)],
            DataError,
            r"row 0 of batch 1 of x is not finite \(9 such rows\)",
        ),
        ([np.zeros((3, 2)), np.zeros((9, 2))], ConfigError, "batch 0 of x has 3 documents, fewer than n_clusters=4"),
        ([np.zeros((1, 2)), np.zeros((2, 2))], ConfigError, "n_clusters=4 is larger than the number of documents 3"),
    ],
)
def test_batches_that_cannot_be_clustered_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        balanced_kmeans(batches, 4, random_state=0)


# --- weights ---


def test_weights_balance_loads_and_leave_the_centres_means_of_points():
    x = unit_points(900, 6, seed=40)
    weights = np.random.default_rng(41).lognormal(3, 1, size=900)
    result = balanced_kmeans(x, 5, random_state=0, weights=weights, tolerance=0)
    loads = np.bincount(result.labels_, weights)
    assert np.abs(loads - weights.sum() / 5).max() < weights.max()
    unweighted = np.bincount(balanced_kmeans(x, 5, random_state=0).labels_, weights)
    assert np.ptp(loads) < np.ptp(unweighted)
    distances = np.square(x.astype(np.float64) - result.cluster_centers_[result.labels_]).sum()
    assert result.inertia_ == pytest.approx(distances, rel=1e-5)
    for cluster in range(5):
        mean = x[result.labels_ == cluster].mean(axis=0)
        np.testing.assert_allclose(result.cluster_centers_[cluster], mean, atol=0.02)


def test_equal_weights_are_the_balance_of_points():
    result = balanced_kmeans(unit_points(403, 6, seed=42), 4, random_state=0, weights=np.full(403, 7.0))
    assert sorted(np.bincount(result.labels_)) == [100, 101, 101, 101]


def test_weights_go_with_their_batches():
    x = unit_points(900, 6, seed=43)
    weights = np.random.default_rng(44).integers(1, 50, size=900)
    result = balanced_kmeans([x[:400], x[400:]], 3, random_state=0, weights=weights)
    for part in (slice(0, 400), slice(400, 900)):
        loads = np.bincount(result.labels_[part], weights[part])
        assert np.abs(loads - weights[part].sum() / 3).max() < 50


def test_a_cluster_that_weights_leave_empty_keeps_its_centre():
    # Points of weight 0 take their nearest centre, of equal ones the first.
    result = balanced_kmeans(np.full((6, 2), 0.5, dtype=np.float32), 3, random_state=0, weights=np.zeros(6))
    assert result.labels_.tolist() == [0] * 6
    assert result.cluster_centers_.tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (np.ones(4), ConfigError, r"weights has shape \(4,\); pass one weight for each of 5 documents"),
        (np.array([1, 1, -2, 1, 1]), DataError, r"weights\[2\] is -2.0; every weight must be finite and 0 or more"),
        (np.array([1, np.nan, 1, 1, 1]), DataError, r"weights\[1\] is nan"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        balanced_kmeans(unit_points(5, 2, seed=46), 2, random_state=0, weights=weights)


# --- torch ---


def test_torch_finds_the_result_of_numpy():
    torch = pytest.importorskip("torch")
    x = unit_points(1500, 10, seed=50)
    for points in (x, [x[:700], x[700:]]):
        expected = balanced_kmeans(points, 6, random_state=0, max_iterations=4)
        result = balanced_kmeans(points, 6, random_state=0, max_iterations=4, device=torch.device("cpu"))
        assert result.inertia_ == pytest.approx(expected.inertia_, rel=1e-5)
        assert (result.labels_ == expected.labels_).mean() > 0.999
        np.testing.assert_allclose(result.cluster_centers_, expected.cluster_centers_, atol=1e-4)
        assert result.labels_.dtype == np.int32
        assert result.cluster_centers_.dtype == np.float32
        again = balanced_kmeans(points, 6, random_state=0, max_iterations=4, device=torch.device("cpu"))
        assert np.array_equal(result.labels_, again.labels_)


def test_torch_measures_the_distances_of_numpy():
    torch = pytest.importorskip("torch")
    x, centers = unit_points(9000, 7, seed=51), unit_points(5, 7, seed=52)
    distances = squared_distances(x, centers, device=torch.device("cpu"))
    assert isinstance(distances, np.ndarray)
    np.testing.assert_allclose(distances, squared_distances(x, centers), atol=2e-6)
    assert squared_distances(x[:50], x[:50], device=torch.device("cpu")).min() >= 0


def test_torch_breaks_ties_of_centres_as_numpy_does():
    torch = pytest.importorskip("torch")
    labels = nearest_centers(column(1, 2, 5, 9, 20), column(0, 10, 10), device=torch.device("cpu"))
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert labels.dtype == np.int32


def test_torch_reads_memory_mapped_points(tmp_path):
    torch = pytest.importorskip("torch")
    np.save(tmp_path / "x.npy", unit_points(100, 3, seed=53))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")  # torch warns of arrays that cannot be written to
    assert np.bincount(balanced_kmeans(x, 4, random_state=0, device=torch.device("cpu")).labels_).tolist() == [25] * 4
