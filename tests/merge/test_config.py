import pytest

from cbtm.errors import ConfigError
from cbtm.merge.config import EvaluateConfig, RoutingConfig

ONE = {"temperatures": (0.1,), "distance_powers": (2,)}


@pytest.mark.parametrize(("k", "values"), [(1, [1]), (2, [2, 1]), (8, [8, 4, 2, 1]), (6, [6, 3, 1])])
def test_top_k_goes_down_by_halves(k, values):
    assert EvaluateConfig().top_k_values(k) == values


def test_top_k_starts_at_the_experts_that_were_scored():
    assert EvaluateConfig().top_k_values(8, scored_top_k=2) == [2, 1]


def test_given_top_k_are_sorted_and_each_counts_once():
    assert EvaluateConfig(top_k=(1, 3, 3, 2)).top_k_values(4) == [3, 2, 1]


@pytest.mark.parametrize("top_k", [0, 9])
def test_top_k_out_of_range_is_refused(top_k):
    with pytest.raises(ConfigError, match=rf"evaluate.top_k={top_k} is not in \[1, cluster.n_clusters=8\]"):
        EvaluateConfig(top_k=(top_k,)).top_k_values(8)


def test_top_k_above_the_experts_that_were_scored_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate.top_k=4 is above score.top_k=2"):
        EvaluateConfig(top_k=(4, 1)).top_k_values(8, scored_top_k=2)


def test_grid_is_kind_by_top_k_by_power_by_temperature():
    settings = EvaluateConfig(temperatures=(0.1, 0.2), distance_powers=(2, 4)).settings(2)
    counts = {}
    for setting in settings:
        counts[setting.ensemble] = counts.get(setting.ensemble, 0) + 1
    # 2 top-k x 2 powers x 2 temperatures; 2 top-k; one each.
    assert counts == {
        "clustering": 8, "product_of_experts": 8, "bayes": 2, "posterior": 2, "uniform": 1, "prior": 1, "oracle": 1,
    }  # fmt: skip
    assert [s.top_k for s in settings if s.ensemble == "clustering"] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert settings[0].ensemble == "clustering"
    assert len(set(settings)) == len(settings)


def test_sparse_scores_leave_the_ensembles_that_look_at_few_experts():
    kinds = {setting.ensemble for setting in EvaluateConfig().settings(8, scored_top_k=2)}
    assert kinds == {"clustering"}
    with pytest.raises(ConfigError, match=r"evaluate.ensembles has bayes, .* score.top_k=2"):
        EvaluateConfig(ensembles=("clustering", "bayes")).settings(8, scored_top_k=2)


def test_experts_on_purpose_must_have_been_trained():
    assert EvaluateConfig(experts=(2, 0)).experts_of([0, 1, 2]) == [0, 2]
    assert EvaluateConfig().experts_of([0, 1, 2]) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"evaluate.experts names cluster 3, which has no expert; trained are 0, 1"):
        EvaluateConfig(experts=(0, 3)).experts_of([0, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperatures": [0.0]}, r"temperatures: expected one or more numbers above 0, got \[0.0\]"),
        ({"temperatures": [-1.0]}, r"temperatures: expected one or more numbers above 0"),
        ({"temperatures": []}, r"temperatures: expected one or more numbers above 0, got \[\]"),
        ({"distance_powers": [0]}, r"distance_powers: expected one or more numbers above 0"),
        ({"ensembles": ["bayes"]}, r"ensembles: .*lacks clustering"),
        ({"ensembles": ["clusters"]}, r"ensembles"),
        ({"experts": [0, 0]}, r"experts: expected clusters from 0 on, each once, got \[0, 0\]"),
        ({"experts": [-1]}, r"experts: expected clusters from 0 on"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig.parse(values)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"lag": -1}, "lag"),
        ({"refresh": 0}, "refresh"),
        ({"refresh": "never"}, "refresh"),
        ({"context_ratio": 0}, "context_ratio"),
    ],
)
def test_wrong_routing_is_named(values, name):
    with pytest.raises(ConfigError, match=name):
        RoutingConfig.parse(values)
