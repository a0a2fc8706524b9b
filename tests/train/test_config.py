import subprocess
import sys

import pytest

from cbtm.errors import ConfigError
from cbtm.train.config import OptimizationConfig, SeedConfig, TrainConfig
from cbtm.train.member import Member

TRAINING = {"steps": 10, "sequences_per_step": 8, "learning_rate": 1e-3}


def test_settings_are_checked_without_importing_torch():
    code = "import sys; import cbtm.train.config, cbtm.train.member; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: Input should be a finite number"),
        ({"warmup_steps": 10}, "warmup_steps=10 must be smaller than steps=10"),
        ({"final_learning_rate_ratio": 1.5}, "final_learning_rate_ratio: Input should be less than or equal to 1"),
        ({"adam_betas": [0.9, 1.0]}, r"adam_betas\.1: Input should be less than 1"),
        ({"micro_batch_size": 0}, "micro_batch_size: Input should be greater than or equal to 1"),
        ({"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda'"),
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizationConfig.parse({**TRAINING, **values})


def test_total_tokens_are_steps_times_sequences_times_context():
    assert OptimizationConfig(**TRAINING, context_length=16).total_tokens == 10 * 8 * 16


def test_experts_share_the_batch():
    config = TrainConfig.parse(TRAINING)
    assert [config.share(k) for k in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("n_clusters", "remedy"),
    [(3, "use 9 or 6$"), (5, "use 10 or 5$"), (16, "use 16$")],
)
def test_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(n_clusters, remedy):
    with pytest.raises(ConfigError, match=f"sequences_per_step=8 .* cluster.n_clusters={n_clusters}; {remedy}"):
        TrainConfig.parse(TRAINING).share(n_clusters)


def test_micro_batch_larger_than_the_batch_is_refused():
    with pytest.raises(ConfigError, match="micro_batch_size=9 is larger than sequences_per_step=8"):
        TrainConfig.parse({**TRAINING, "micro_batch_size": 9})


def test_which_members_there_are_does_not_change_how_one_is_trained():
    both = TrainConfig.parse({**TRAINING, "dense": True, "random_clusters": True})
    neither = TrainConfig.parse({**TRAINING, "dense": False, "random_clusters": False})
    assert both.optimization() == neither.optimization() == OptimizationConfig(**TRAINING)
    assert both.optimization().digest() == neither.optimization().digest()
    assert both.digest() != neither.digest()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either path"),
        ({"path": "m", "scratch": {}, "training": TRAINING}, "give either path"),
        ({"scratch": {}}, "scratch and training go together"),
        ({"path": "m", "training": TRAINING}, "scratch and training go together"),
    ],
)
def test_seed_model_has_one_source(values, message):
    with pytest.raises(ConfigError, match=message):
        SeedConfig.parse(values)


def test_seed_model_from_a_folder_or_from_scratch():
    assert SeedConfig.parse({"path": "m"}).path == "m"
    made = SeedConfig.parse({"scratch": {"hidden_size": 16}, "training": TRAINING})
    assert made.scratch.hidden_size == 16
    assert made.training.steps == 10


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (Member("seed"), "seed"),
        (Member("dense"), "dense"),
        (Member("expert", 3), "cluster-00003"),
        (Member("random", 127), "random-00127"),
    ],
)
def test_a_member_and_its_name_are_inverse(member, name):
    assert member.name == name
    assert Member.parse(name) == member


def test_names_sort_like_their_clusters():
    # cluster-2 after cluster-10 would give an expert the weights of another.
    names = [Member("expert", cluster).name for cluster in (0, 2, 10, 100)]
    assert sorted(names) == names


@pytest.mark.parametrize(
    "name", ["", "seed-00000", "cluster", "cluster-", "cluster-x", "cluster--1", "cluster-²", "expert-1"]
)
def test_what_is_no_member_is_refused(name):
    with pytest.raises(ConfigError, match="is no member of a run; expected seed, dense, cluster-00000"):
        Member.parse(name)
