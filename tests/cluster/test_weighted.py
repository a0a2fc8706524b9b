"""Assignment balanced by weight: loads, the linear programme as oracle, brute force, ties, odd weights, errors."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from cbtm.cluster.assignment import balanced_assignment
from cbtm.cluster.weighted import WeightedAssignment, weighted_assignment
from cbtm.errors import ConfigError, DataError


def programme_optimum(cost: NDArray[np.floating], weights: NDArray[np.floating]) -> float:
    """Least cost with points split freely and exactly equal loads, by HiGHS."""
    from scipy.optimize import linprog

    n, k = cost.shape
    one_each = np.kron(np.eye(n), np.ones(k))  # (n, n k)
    loads = np.kron(weights, np.eye(k)) / weights.mean()  # (k, n k)
    limits = np.concatenate([np.ones(n), np.full(k, n / k)])
    result = linprog(cost.ravel(), A_eq=np.vstack([one_each, loads]), b_eq=limits, method="highs")
    assert result.status == 0, result.message
    return float(result.fun)


def assert_promises(result: WeightedAssignment, cost: NDArray[np.floating], weights: NDArray[np.floating]) -> None:
    """Loads within the heaviest weight, the cheapest cluster for each point at the prices, and the sums as stated."""
    n, k = cost.shape
    chosen = cost.astype(np.float64)[np.arange(n), result.labels]
    rounding = 1e-9 * np.abs(cost).sum(dtype=np.float64)
    assert result.labels.dtype == np.int32
    assert result.loads == pytest.approx([weights[result.labels == j].sum() for j in range(k)], rel=1e-12)
    excess = result.loads - weights.sum() / k
    assert np.abs(excess).max() <= weights.max() * (1 + 1e-12)
    priced = cost + weights[:, None] * result.prices
    assert (chosen + (weights * result.prices[result.labels]) <= priced.min(axis=1) + rounding).all()
    assert abs(result.prices.mean()) <= 1e-12 * np.abs(result.prices).max()
    assert result.total_cost == pytest.approx(chosen.sum(), rel=1e-12)
    assert result.total_cost <= result.lower_bound + rounding
    assert result.total_cost == pytest.approx(result.lower_bound - result.prices @ excess, abs=rounding)


def lengths(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Tokens of documents: whole numbers, a few hundred typically, some of tens of thousands."""
    return np.ceil(rng.lognormal(6, 1.2, n))


def test_hand_computed_documents_move_in_the_order_of_their_cost_per_weight():
    # W/k = 6/2 = 3. All want cluster 0. Moving the light ones costs 1, 2 and 2.5 for a unit of weight, the heavy
    # one 9/3 = 3: so the light ones move, for 1 + 2 + 2.5.
    cost = np.array([[0.0, 9.0], [0.0, 1.0], [0.0, 2.0], [0.0, 2.5]])
    result = weighted_assignment(cost, np.array([3, 1, 1, 1]))
    assert result.labels.tolist() == [0, 1, 1, 1]
    assert result.loads.tolist() == [3, 3]
    assert (result.total_cost, result.lower_bound) == (5.5, pytest.approx(5.5, rel=1e-12))


def test_hand_computed_split_document_goes_where_it_costs_less():
    # W/k = 3, so half of the last document belongs to each cluster, for 0.5. It ties: 0 + 2 p_0 = 1 + 2 p_1, so the
    # prices of mean 0 are 1/4 and -1/4. All of it in cluster 0 costs 0 and gives loads 4 and 2.
    result = weighted_assignment(np.array([[0.0, 5.0], [5.0, 0.0], [0.0, 1.0]]), np.array([2.0, 2.0, 2.0]))
    assert result.labels.tolist() == [0, 1, 0]
    assert result.prices == pytest.approx([0.25, -0.25])
    assert result.lower_bound == pytest.approx(0.5)
    assert result.total_cost == 0
    assert result.loads.tolist() == [4, 2]


COSTS = {
    "uniform": lambda rng, n, k: rng.random((n, k)),
    "ties": lambda rng, n, k: rng.integers(0, 3, (n, k)).astype(float),
    "one row": lambda rng, n, k: np.repeat(rng.random((1, k)), n, axis=0),
    "constant": lambda rng, n, k: np.ones((n, k)),
    "wide": lambda rng, n, k: rng.normal(size=(n, k)) * 10 ** rng.uniform(-3, 3, (n, 1)),
    "one outlier": lambda rng, n, k: rng.random((n, k)) * np.where(np.arange(n) == n // 2, 1e6, 1)[:, None],
    "nobody wants the last": lambda rng, n, k: rng.random((n, k)) + 50.0 * (np.arange(k) == k - 1),
}
WEIGHTS = {
    "equal": lambda rng, n: np.full(n, 0.1),
    "uniform": lambda rng, n: rng.random(n),
    "tokens": lengths,
    "few values": lambda rng, n: rng.integers(1, 4, n).astype(float),
    "six orders": lambda rng, n: 10 ** rng.uniform(-3, 3, n),
    "some zero": lambda rng, n: np.where(rng.random(n) < 0.4, 0.0, rng.integers(1, 3000, n)) + (np.arange(n) == 0),
    "one outlier": lambda rng, n: np.where(np.arange(n) == n - 1, 1e4, 1.0),
}


@pytest.mark.parametrize("weight_kind", WEIGHTS)
@pytest.mark.parametrize("cost_kind", COSTS)
def test_bound_is_the_optimum_of_the_linear_programme(cost_kind: str, weight_kind: str):
    rng = np.random.default_rng([list(COSTS).index(cost_kind), list(WEIGHTS).index(weight_kind)])
    for n, k in [(6, 3), (17, 2), (25, 7), (9, 9), (40, 5)]:
        cost, weights = COSTS[cost_kind](rng, n, k), WEIGHTS[weight_kind](rng, n)
        if rng.random() < 0.3:
            cost = cost * weights[:, None]  # per token: equal costs now tie only up to rounding
        result = weighted_assignment(cost, weights)
        assert_promises(result, cost, weights)
        rounding = 1e-9 * np.abs(cost).sum()
        assert result.lower_bound == pytest.approx(programme_optimum(cost, weights), rel=1e-6, abs=rounding)


@pytest.mark.parametrize("seed", range(15))
def test_no_cheaper_assignment_has_the_same_loads_and_none_of_equal_loads_is_cheaper(seed: int):
    rng = np.random.default_rng(seed)
    n, k = [(7, 2), (6, 3), (8, 2)][seed % 3]
    cost, weights = rng.random((n, k)), rng.integers(1, 5, n)
    result = weighted_assignment(cost, weights)
    same_loads, equal_loads = [], []
    for labels in itertools.product(range(k), repeat=n):
        loads = np.bincount(labels, weights, minlength=k)
        total = cost[np.arange(n), labels].sum()
        same_loads += [total] if (loads == result.loads).all() else []
        equal_loads += [total] if (loads == weights.sum() / k).all() else []
    assert result.total_cost == pytest.approx(min(same_loads), rel=1e-12)
    assert result.total_cost <= min(equal_loads, default=np.inf) + 1e-12
    assert result.lower_bound <= min(equal_loads, default=np.inf) + 1e-12


@pytest.mark.parametrize(("n", "k"), [(60, 4), (61, 4), (300, 7), (10, 10), (127, 16)])
@pytest.mark.parametrize("weight", [1.0, 0.3, 7e5])
def test_equal_weights_give_sizes_that_differ_by_at_most_one(n: int, k: int, weight: float):
    cost = np.random.default_rng(n).random((n, k))
    result = weighted_assignment(cost, np.full(n, weight))
    assert set(np.bincount(result.labels, minlength=k)) <= {n // k, -(-n // k)}
    by_count = balanced_assignment(cost)
    if n % k == 0:
        assert result.total_cost == pytest.approx(by_count.total_cost, rel=1e-12)
    else:  # here the exact loads are fractions, and the bound is of those
        assert by_count.total_cost <= result.total_cost + 1e-9 <= result.lower_bound + 2e-9


def test_tokens_are_balanced_where_documents_are_not():
    # Cluster 0 has the long documents, as code and law have. Balanced by documents its tokens are four times those of
    # the others; balanced by tokens, 20,000 documents differ by less than the longest.
    rng = np.random.default_rng(1)
    n, k = 20_000, 16
    group = rng.integers(0, k, n)
    cost = (1.0 * (np.arange(k) != group[:, None]) + 0.3 * rng.random((n, k))).astype(np.float32)
    weights = lengths(rng, n) * np.where(group == 0, 4, 1)
    by_documents = np.bincount(balanced_assignment(cost).labels, weights)
    assert by_documents.max() > 3 * by_documents.min()
    result = weighted_assignment(cost, weights)
    assert_promises(result, cost, weights)
    assert result.loads.max() < 1.1 * result.loads.min()
    assert result.lower_bound - result.total_cost < 0.003 * result.lower_bound


def test_lognormal_weights_at_scale_keep_the_bound():
    rng = np.random.default_rng(2)
    cost = np.square(rng.normal(size=(20_000, 16))).astype(np.float32)
    weights = rng.lognormal(0, 1.5, 20_000)
    assert_promises(weighted_assignment(cost, weights), cost, weights)


def test_same_input_gives_the_same_result_and_leaves_it_unchanged():
    rng = np.random.default_rng(3)
    cost, weights = rng.random((3000, 9)), rng.random(3000)
    copies = cost.copy(), weights.copy()
    first, second = weighted_assignment(cost, weights), weighted_assignment(cost, weights)
    assert (first.labels == second.labels).all()
    assert (first.prices == second.prices).all()
    assert (cost == copies[0]).all()
    assert (weights == copies[1]).all()


def test_unit_of_weight_changes_prices_only():
    # A price is per unit of weight: in units of 1024 tokens it is 1024 times as high.
    rng = np.random.default_rng(4)
    cost, weights = rng.random((500, 5)), lengths(rng, 500)
    in_tokens, in_1024 = weighted_assignment(cost, weights), weighted_assignment(cost, weights / 1024)
    assert (in_tokens.labels == in_1024.labels).all()
    assert in_1024.prices == pytest.approx(1024 * in_tokens.prices, rel=1e-12)


@pytest.mark.parametrize("start", ["solution", "nearby", "useless", "far"])
def test_initial_prices_do_not_change_the_bound(start: str):
    rng = np.random.default_rng(5)
    cost, weights = rng.random((4000, 8)), lengths(rng, 4000)
    cold = weighted_assignment(cost, weights)
    prices = {
        "solution": cold.prices,
        "nearby": cold.prices * (1 + 0.05 * rng.normal(size=8)),
        "useless": rng.normal(size=8),
        "far": np.array([1e300, -1e300, *np.zeros(6)]),
    }[start]
    warm = weighted_assignment(cost, weights, initial_prices=prices)
    assert_promises(warm, cost, weights)
    assert warm.lower_bound == pytest.approx(cold.lower_bound, rel=1e-10)
    assert warm.total_cost == pytest.approx(cold.total_cost, rel=1e-3)


def test_whole_number_weights_of_any_dtype_and_float32_costs_are_exact():
    rng = np.random.default_rng(6)
    cost, weights = rng.random((200, 6)).astype(np.float32), rng.integers(1, 90_000, 200)
    expected = weighted_assignment(cost.astype(np.float64), weights.astype(np.float64))
    for dtype in (np.int32, np.int64, np.uint32):
        assert (weighted_assignment(cost, weights.astype(dtype)).labels == expected.labels).all()


def test_documents_without_weight_take_their_cheapest_cluster():
    # The first two weigh nothing. The others, 1 each, are shared out although all want cluster 0.
    cost = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 2.0]])
    result = weighted_assignment(cost, np.array([0, 0, 1, 1]))
    assert result.labels.tolist() == [1, 0, 1, 0]
    assert result.loads.tolist() == [1, 1]


def test_no_weight_at_all_gives_every_document_its_cheapest_cluster():
    cost = np.random.default_rng(7).random((20, 3))
    result = weighted_assignment(cost, np.zeros(20))
    assert (result.labels == cost.argmin(axis=1)).all()
    assert result.prices.tolist() == [0, 0, 0]
    assert result.total_cost == pytest.approx(result.lower_bound)


def test_one_cluster_takes_everything():
    cost = np.random.default_rng(8).random((5, 1))
    result = weighted_assignment(cost, np.arange(5.0))
    assert result.labels.tolist() == [0] * 5
    assert result.loads.tolist() == [10]
    assert result.lower_bound == pytest.approx(cost.sum())


def test_document_heavier_than_a_cluster_keeps_the_others_together():
    # W/k = 100/2 = 50. The document of 90 fills cluster 0 and 40 of cluster 1, where the rest then belongs.
    cost = np.array([[0.0, 90.0], *[[0.0, 0.1]] * 10])
    result = weighted_assignment(cost, np.array([90.0, *[1.0] * 10]))
    assert result.labels.tolist() == [0] + [1] * 10
    assert result.lower_bound == pytest.approx(40 + 10 * 0.1)
    assert result.total_cost == pytest.approx(1)


@pytest.mark.parametrize("outlier", [1e-9, 1e9])
def test_one_weight_nine_orders_off_leaves_the_others_as_they_are(outlier: float):
    rng = np.random.default_rng(9)
    cost, weights = rng.random((2000, 6)), rng.lognormal(0, 1, 2000)
    weights[77] = outlier
    result = weighted_assignment(cost, weights)
    assert_promises(result, cost, weights)
    if outlier > 1:  # it ties everywhere, so that its costs give the prices
        assert result.prices * outlier == pytest.approx(cost[77].mean() - cost[77], rel=1e-9)


def test_identical_documents_are_shared_out_by_weight():
    rng = np.random.default_rng(10)
    rows, weights = rng.random((20, 8)), rng.random(5000)
    for cost in (rows[rng.integers(0, 20, 5000)], rows[rng.integers(0, 20, 5000)] * weights[:, None]):
        assert_promises(weighted_assignment(cost, weights), cost, weights)


@pytest.mark.parametrize("scale", [1e-290, 1e290])
def test_extreme_units_give_the_same_labels(scale: float):
    rng = np.random.default_rng(11)
    cost, weights = rng.random((50, 4)), rng.random(50)
    scale = 2.0 ** round(np.log2(scale))  # a power of two, so that no digit changes
    expected = weighted_assignment(cost, weights).labels
    assert (weighted_assignment(cost * scale, weights).labels == expected).all()
    assert (weighted_assignment(cost, weights * scale).labels == expected).all()


@pytest.mark.parametrize("shape", [(3,), (5,), (4, 1), ()])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"weights has shape .*; pass one weight for each of 4 points"):
        weighted_assignment(np.zeros((4, 2)), np.ones(shape))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_weight_that_is_none_is_refused_with_its_place(weight: float):
    with pytest.raises(DataError, match=rf"weights\[2\] is {weight}; .*finite and at least 0 \(1 are not\)"):
        weighted_assignment(np.zeros((4, 2)), np.array([1, 1, weight, 1]))


def test_weights_that_add_up_to_infinity_are_refused():
    with pytest.raises(DataError, match="weights add up to more than a float64 can hold"):
        weighted_assignment(np.zeros((4, 2)), np.full(4, 1e308))


def test_costs_too_far_apart_are_refused():
    with pytest.raises(DataError, match="differ by more than a float64 can hold"):
        weighted_assignment(np.array([[-1e308, 1e308]] * 4), np.ones(4))


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ConfigError, match="3 clusters but only 2 points"):
        weighted_assignment(np.zeros((2, 3)), np.ones(2))


def test_costs_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match=r"cost\[1, 0\] is nan"):
        weighted_assignment(np.array([[0.0, 1.0], [np.nan, 1.0]]), np.ones(2))


def test_initial_prices_that_do_not_fit_are_refused():
    for prices in (np.zeros(3), np.array([0, np.nan])):
        with pytest.raises(ConfigError, match="one finite price for each of 2 clusters"):
            weighted_assignment(np.zeros((4, 2)), np.ones(4), initial_prices=prices)
