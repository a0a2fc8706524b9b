"""Balanced assignment: sizes, optimality against a flow solver and the Hungarian method, ties, odd inputs."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.assignment import BalancedAssignment, balanced_assignment
from cbtm.cluster.kmeans import squared_distances
from cbtm.errors import ConfigError, DataError


def flow_optimum(cost: NDArray[np.int64]) -> int:
    """Least total of whole-number costs, by OR-tools: each cluster takes n//k points and one more through a pool."""
    from ortools.graph.python import min_cost_flow

    n, k = cost.shape
    solver = min_cost_flow.SimpleMinCostFlow()
    pool, sink = n + k, n + k + 1
    points, clusters = np.repeat(np.arange(n), k), np.tile(np.arange(n, n + k), n)
    one, zero, each = np.ones(k, int), np.zeros(k, int), np.arange(n, n + k)
    solver.add_arcs_with_capacity_and_unit_cost(points, clusters, np.ones(n * k, int), cost.ravel())
    solver.add_arcs_with_capacity_and_unit_cost(each, np.full(k, sink), np.full(k, n // k), zero)
    solver.add_arcs_with_capacity_and_unit_cost(each, np.full(k, pool), one, zero)
    solver.add_arc_with_capacity_and_unit_cost(pool, sink, n % k, 0)
    solver.set_nodes_supplies(np.arange(n + k + 2), np.array([1] * n + [0] * (k + 1) + [-n]))
    assert solver.solve() == solver.OPTIMAL
    return int(solver.optimal_cost())


def hungarian_optimum(cost: NDArray[np.float64]) -> float:
    """Least total by SciPy: columns repeated n//k + 1 times, and k - n % k idle rows for the extra columns only."""
    from scipy.optimize import linear_sum_assignment

    n, k = cost.shape
    square = np.hstack([np.repeat(cost, n // k, axis=1), cost])
    idle = np.hstack([np.full((k - n % k, n - n % k), np.inf), np.zeros((k - n % k, k))])
    square = np.vstack([square, idle])
    rows, columns = linear_sum_assignment(square)
    return float(square[rows, columns].sum())


def assert_balanced(result: BalancedAssignment, cost: NDArray[np.floating]) -> None:
    n, k = cost.shape
    sizes = np.bincount(result.labels, minlength=k)
    assert result.labels.dtype == np.int32
    assert sorted(sizes) == [n // k] * (k - n % k) + [n // k + 1] * (n % k)
    assert result.total_cost == pytest.approx(cost[np.arange(n), result.labels].sum(dtype=np.float64), rel=1e-12)


def assert_prices_prove_it(result: BalancedAssignment, cost: NDArray[np.floating]) -> None:
    """Complementary slackness: no point is cheaper elsewhere at these prices, no small cluster is dearer."""
    n, k = cost.shape
    priced = cost.astype(np.float64) + result.prices
    rounding = 1e-9 * np.ptp(cost)
    assert (priced[np.arange(n), result.labels] <= priced.min(axis=1) + rounding).all()
    is_large = np.bincount(result.labels, minlength=k) > n // k
    if n % k:
        assert result.prices[~is_large].max() <= result.prices[is_large].min() + rounding


def clustered_distances(rng: np.random.Generator, n: int, k: int, d: int = 8) -> NDArray[np.float32]:
    """Squared distances of points in k groups of very unequal size to k of the points."""
    groups = rng.choice(k, size=n, p=rng.dirichlet(np.ones(k)))
    points = rng.normal(size=(k, d))[groups] + 0.3 * rng.normal(size=(n, d))
    centers = points[rng.choice(n, k, replace=False)]
    return np.square(points[:, None] - centers).sum(axis=2).astype(np.float32)


def text_distances(n: int, k: int) -> NDArray[np.float32]:
    """Squared distances of unit vectors of 100 numbers, like those of texts, to k of them.

    There are 1.5 k topics of very unequal size, and a spectrum that falls. Of 50,000 such points the nearest of 128
    centres takes 61 to 1340.
    """
    rng = np.random.default_rng(0)
    n_topics = 3 * k // 2
    topics = rng.normal(size=(n_topics, 100)) * np.exp(-np.arange(100) / 40)
    own_topics = rng.choice(n_topics, n, p=rng.dirichlet(np.full(n_topics, 0.5)))
    spread = rng.uniform(0.5, 1.5, size=(n, 1)) * np.exp(-np.arange(100) / 60)
    x = topics[own_topics] + spread * rng.normal(size=(n, 100))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return squared_distances(x, x[rng.choice(n, k, replace=False)])


def test_hand_computed_choice_of_the_extra_place():
    # Three points, two clusters: sizes 2 and 1. Cluster 1 may take two: 0 + 1 + 2 = 3; cluster 0 two: 0 + 5 + 1.
    cost = np.array([[0.0, 9.0], [5.0, 1.0], [7.0, 2.0]])
    result = balanced_assignment(cost)
    assert result.labels.tolist() == [0, 1, 1]
    assert result.total_cost == 3.0


def test_remainder_is_spread_over_clusters():
    cost = np.random.default_rng(0).random((67, 4))
    assert sorted(np.bincount(balanced_assignment(cost).labels)) == [16, 17, 17, 17]  # 67 = 16 + 3 * 17


@pytest.mark.parametrize("n_points", [1, 2, 3, 4, 5, 6, 7])
def test_tiny_cases_equal_the_best_of_all_balanced_assignments(n_points):
    rng = np.random.default_rng(n_points)
    for k in range(1, min(n_points, 3) + 1):
        cost = rng.integers(-3, 4, size=(n_points, k)).astype(np.float64)
        totals = []
        for labels in itertools.product(range(k), repeat=n_points):
            if np.ptp(np.bincount(labels, minlength=k)) <= 1:
                totals.append(cost[np.arange(n_points), labels].sum())
        result = balanced_assignment(cost)
        assert_balanced(result, cost)
        assert result.total_cost == min(totals)


@pytest.mark.parametrize("largest_cost", [1, 3, 1000, 10**9])
def test_seventy_random_whole_number_problems_equal_the_flow_optimum(largest_cost):
    rng = np.random.default_rng(largest_cost)
    for _ in range(70):
        k = int(rng.integers(1, 12))
        n = int(rng.integers(k, 80))
        whole = rng.integers(0, largest_cost + 1, size=(n, k))
        cost = whole.astype(np.float64)
        result = balanced_assignment(cost)
        assert_balanced(result, cost)
        assert_prices_prove_it(result, cost)
        assert result.total_cost == flow_optimum(whole)


def test_sixty_random_clustered_problems_equal_the_hungarian_optimum():
    rng = np.random.default_rng(7)
    for _ in range(60):
        k = int(rng.integers(2, 15))
        n = int(rng.integers(k, 150))
        cost = clustered_distances(rng, n, k)
        result = balanced_assignment(cost)
        assert_balanced(result, cost)
        assert_prices_prove_it(result, cost)
        assert result.total_cost == pytest.approx(hungarian_optimum(cost.astype(np.float64)), rel=1e-10)


@pytest.mark.parametrize(("n_points", "n_clusters"), [(5000, 8), (3001, 7), (2003, 100)])
def test_medium_problems_equal_the_flow_optimum(n_points, n_clusters):
    cost = clustered_distances(np.random.default_rng(1), n_points, n_clusters)
    whole = np.rint(cost.astype(np.float64) * 2**20).astype(np.int64)
    result = balanced_assignment(whole.astype(np.float64))
    assert_balanced(result, whole)
    assert result.total_cost == flow_optimum(whole)


@pytest.mark.parametrize(
    ("n_points", "n_clusters"), [(20_000, 32), (50_000, 8), pytest.param(50_000, 128, marks=pytest.mark.slow)]
)
def test_distances_like_those_of_texts_equal_the_flow_optimum(n_points, n_clusters):
    whole = np.rint(text_distances(n_points, n_clusters).astype(np.float64) * 2**20).astype(np.int64)
    result = balanced_assignment(whole.astype(np.float64))
    assert_balanced(result, whole)  # 50,000 = 390 * 128 + 80: which 80 clusters take one more is part of the optimum
    assert result.total_cost == flow_optimum(whole)


ADVERSARIAL = {
    "only ties": lambda rng, n, k: rng.integers(0, 2, size=(n, k)),
    "all equal": lambda rng, n, k: np.full((n, k), 5),
    "duplicate points": lambda rng, n, k: rng.integers(0, 30, size=(3, k))[rng.integers(3, size=n)],
    "duplicate clusters": lambda rng, n, k: rng.integers(0, 30, size=(n, 3))[:, rng.integers(3, size=k)],
    "one far outlier": lambda rng, n, k: (
        rng.integers(0, 99, size=(n, k)) * np.where(np.arange(n) == n // 2, 10**9, 1)[:, None]
    ),
    "one wanted cluster": lambda rng, n, k: rng.integers(0, 9, size=(n, k)) + 1000 * (np.arange(k) > 0),
    "one shunned cluster": lambda rng, n, k: rng.integers(0, 9, size=(n, k)) + 1000 * (np.arange(k) == 0),
    "far groups": lambda rng, n, k: (rng.geometric(0.5, size=n)[:, None] - 1 - np.arange(k)) ** 2 * 10**6,
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_thirty_adversarial_problems_equal_the_flow_optimum(kind):
    rng = np.random.default_rng(13)
    for case in range(30):
        k = int(rng.integers(1, 12))
        n = (k, k + 1, 2 * k - 1, 2 * k, 5 * k + k // 2, int(rng.integers(k, 90)))[case % 6]
        if case % 10 == 0:
            k = 1
        whole = np.asarray(ADVERSARIAL[kind](rng, n, k), dtype=np.int64)
        cost = whole.astype(np.float64)
        result = balanced_assignment(cost)
        assert_balanced(result, cost)
        assert_prices_prove_it(result, cost)
        assert result.total_cost == flow_optimum(whole)


def test_as_many_clusters_as_points_is_the_assignment_problem():
    cost = np.random.default_rng(2).random((200, 200))
    result = balanced_assignment(cost)
    assert sorted(result.labels) == list(range(200))
    assert result.total_cost == pytest.approx(hungarian_optimum(cost), rel=1e-10)


def test_one_cluster_takes_everything():
    result = balanced_assignment(np.array([[1.5], [2.5]], dtype=np.float32))
    assert result.labels.tolist() == [0, 0]
    assert result.prices.tolist() == [0.0]
    assert result.total_cost == 4.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_costs_are_shared_out(dtype):
    cost = np.full((1003, 10), 2.0, dtype=dtype)
    result = balanced_assignment(cost)
    assert_balanced(result, cost)
    assert result.total_cost == 2006.0


def test_repeated_points_and_repeated_clusters_are_split_optimally():
    rng = np.random.default_rng(3)
    whole = np.repeat(np.repeat(rng.integers(0, 9, size=(5, 4)), 120, axis=0), 3, axis=1)  # (600, 12)
    cost = whole.astype(np.float64)
    result = balanced_assignment(cost)
    assert_balanced(result, cost)
    assert result.total_cost == flow_optimum(whole)


def test_a_far_outlier_does_not_spoil_the_others():
    rng = np.random.default_rng(4)
    cost = clustered_distances(rng, 900, 6).astype(np.float64)
    cost[17] = cost[17] * 1e6 + 1e12
    result = balanced_assignment(cost)
    assert_balanced(result, cost)
    without = cost - cost.min(axis=1, keepdims=True)  # the same problem without the 1e12 that hides the others
    assert result.labels[17] == without[17].argmin()
    assert without[np.arange(900), result.labels].sum() == pytest.approx(hungarian_optimum(without), rel=1e-9)


def test_one_cluster_that_everybody_prefers():
    rng = np.random.default_rng(5)
    cost = np.hstack([np.zeros((800, 1)), 1 + 1e-3 * rng.random((800, 7))])
    result = balanced_assignment(cost)
    assert_balanced(result, cost)
    assert result.total_cost == pytest.approx(hungarian_optimum(cost), rel=1e-10)


def test_tight_far_apart_groups_of_unequal_size():
    rng = np.random.default_rng(6)
    centers = 50 * rng.normal(size=(8, 4))
    points = centers[rng.choice(8, 2000, p=[0.6, 0.2, 0.1, 0.04, 0.03, 0.01, 0.01, 0.01])]
    points = points + 0.01 * rng.normal(size=points.shape)
    cost = np.square(points[:, None] - centers).sum(axis=2)
    result = balanced_assignment(cost)
    assert_balanced(result, cost)
    assert_prices_prove_it(result, cost)


@pytest.mark.parametrize("scale", [1e-310, 1e-30, 1e30, 1e300])
def test_very_small_and_very_large_costs_keep_their_optimum(scale):
    cost = np.random.default_rng(8).random((50, 4))
    labels = balanced_assignment(cost * scale).labels
    assert cost[np.arange(50), labels].sum() == pytest.approx(hungarian_optimum(cost), rel=1e-9)


def test_an_offset_of_a_row_changes_nothing():
    rng = np.random.default_rng(9)
    cost = rng.integers(0, 50, size=(120, 5)).astype(np.float64)
    shifted = cost + rng.integers(0, 10**6, size=(120, 1))
    assert np.array_equal(balanced_assignment(cost).labels, balanced_assignment(shifted).labels)


def test_same_input_gives_the_same_labels_and_input_is_untouched():
    cost = clustered_distances(np.random.default_rng(10), 500, 6)
    copy = cost.copy()
    first, second = balanced_assignment(cost), balanced_assignment(cost)
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.prices, second.prices)
    assert np.array_equal(cost, copy)


def test_memory_order_does_not_matter():
    cost = clustered_distances(np.random.default_rng(11), 500, 6)
    assert np.array_equal(balanced_assignment(cost).labels, balanced_assignment(np.asfortranarray(cost)).labels)


def test_any_initial_prices_lead_to_the_same_total():
    rng = np.random.default_rng(12)
    cost = clustered_distances(rng, 1001, 9)
    cold = balanced_assignment(cost)
    for prices in (cold.prices, cold.prices + 1e9, rng.normal(size=9), 1e12 * rng.normal(size=9)):
        warm = balanced_assignment(cost, initial_prices=prices)
        assert_balanced(warm, cost)
        assert_prices_prove_it(warm, cost)
        assert warm.total_cost == pytest.approx(cold.total_cost, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_is_refused_with_its_place(bad):
    cost = np.zeros((6, 3))
    cost[4, 1] = bad
    with pytest.raises(DataError, match=rf"cost\[4, 1\] is {bad}; every cost must be finite \(1 are not\)"):
        balanced_assignment(cost)


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ConfigError, match="cost has 4 clusters but only 3 points; use at most 3"):
        balanced_assignment(np.zeros((3, 4)))


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (2, 2, 2)])
def test_what_is_not_a_filled_matrix_is_refused(shape):
    with pytest.raises(DataError, match="pass a matrix of"):
        balanced_assignment(np.zeros(shape))


@pytest.mark.parametrize("prices", [np.zeros(2), np.zeros((3, 1)), np.array([0, np.nan, 0])])
def test_prices_that_do_not_fit_are_refused(prices):
    with pytest.raises(ConfigError, match="one finite price for each of 3 clusters"):
        balanced_assignment(np.zeros((5, 3)), initial_prices=prices)


def test_a_row_wider_than_float64_is_refused():
    with pytest.raises(DataError, match="differ by more than a float64 can hold"):
        balanced_assignment(np.array([[1.7e308, -1.7e308], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prices_found_by_torch_lead_to_the_same_total(dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(14)
    for _ in range(20):
        k = int(rng.integers(1, 15))
        n = int(rng.integers(k, 3000))
        cost = clustered_distances(rng, n, k).astype(dtype)
        expected, result = balanced_assignment(cost), balanced_assignment(cost, device=torch.device("cpu"))
        assert_balanced(result, cost)
        assert_prices_prove_it(result, cost)
        assert result.total_cost == pytest.approx(expected.total_cost, rel=1e-12)
        assert np.array_equal(result.labels, expected.labels)  # no ties, so one optimum
        on_device = balanced_assignment(torch.tensor(cost), device=torch.device("cpu"))
        assert np.array_equal(on_device.labels, result.labels)


def test_torch_starts_from_prices_too():
    torch = pytest.importorskip("torch")
    cost = clustered_distances(np.random.default_rng(15), 1001, 9)
    cold = balanced_assignment(cost)
    warm = balanced_assignment(cost, initial_prices=cold.prices, device=torch.device("cpu"))
    assert np.array_equal(warm.labels, cold.labels)


@pytest.mark.parametrize("scale", [1e-310, 1e-30, 1e30, 1e300])
def test_torch_takes_very_small_and_very_large_costs(scale):
    torch = pytest.importorskip("torch")
    cost = np.random.default_rng(16).random((50, 4)) * scale
    expected = balanced_assignment(cost)
    assert balanced_assignment(cost, device=torch.device("cpu")).labels.tolist() == expected.labels.tolist()


def test_a_device_that_is_not_there_is_refused():
    pytest.importorskip("torch")
    with pytest.raises(ConfigError, match="device='cuda:99' cannot be used here"):
        balanced_assignment(np.zeros((3, 2)), device="cuda:99")
