import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ({"packing": "greedy"}, "packing: Input should be 'continuous', 'documents' or 'separate'"),
        ({"sharding": "fsdp"}, "sharding: Input should be 'auto', 'none', 'ddp', 'fsdp2' or 'fairscale'"),
        ({"devices": 0}, "devices: Input should be greater than or equal to 1"),
        ({"devices": 2, "sharding": "none"}, "sharding=none is for one device, not for devices=2; use ddp or fsdp2"),
        (
            {"nodes": 2, "sharding": "none"},
            "sharding=none is for one device, not for devices=1 on each of nodes=2; use ddp or fsdp2",
        ),
        ({"node": {"memory": "64 GB"}}, r"node\.memory: String should match pattern"),
        ({"node": {"memori": "64Gi"}}, "unknown key 'node.memori'; did you mean 'memory'"),
        ({"patience": 2}, "patience=2 counts validations; set validate_every as well"),
        ({"patience": 0, "validate_every": 5}, "patience: Input should be greater than or equal to 1"),
        ({"validate_every": 11}, "validate_every=11 is larger than steps=10"),
        ({"validation_sequences": 0}, "validation_sequences: Input should be greater than or equal to 1"),
        ({"checkpoints_kept": 0}, "checkpoints_kept: Input should be greater than or equal to 1"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"precision": "int8"}, "precision: Input should be 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizationConfig.parse({**TRAINING, **values})


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_every": 1},
        {"checkpoints_kept": 7},
        {"log_every": 1},
        {"validate_every": 2},
        {"validation_sequences": 3},
        {"price_per_hour": 2.5},
        {"devices": 4, "sharding": "fsdp2"},
        {"sharding": "ddp"},
        {"nodes": 2, "node": {"memory": "64Gi"}},
    ],
)
def test_training_goes_on_with_other_settings_of_what_is_beside_the_result(changes):
    same = OptimizationConfig(**TRAINING).result_digest()
    assert OptimizationConfig(**TRAINING, **changes).result_digest() == same


BESIDE_THE_RESULT = {
    *("checkpoint_every", "checkpoints_kept", "log_every", "validate_every", "validation_sequences"),
    *("price_per_hour", "devices", "nodes", "node", "sharding"),
}
OTHER_VALUES = {
    "steps": 11,
    "sequences_per_step": 9,
    "context_length": 9,
    "micro_batch_size": 2,
    "learning_rate": 0.5,
    "warmup_steps": 1,
    "final_learning_rate_ratio": 0.5,
    "decay_power": 2.0,
    "adam_betas": (0.8, 0.9),
    "adam_epsilon": 1e-5,
    "weight_decay": 0.5,
    "gradient_clip_norm": 0.5,
    "precision": "bfloat16",
    "loss_scale": 64.0,
    "activation_checkpointing": True,
    "compile": True,
    "packing": "documents",
    "dropout": 0.5,
    "random_state": 1,
    "patience": 3,
    "threads": 1,
    "device": "cpu",
}


def test_every_setting_is_beside_the_result_or_among_those_tried_here():
    assert set(OptimizationConfig.model_fields) == BESIDE_THE_RESULT | set(OTHER_VALUES)


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_training_begins_anew_with_another_value_of_what_the_result_depends_on(name):
    base = {**TRAINING, "validate_every": 2}
    changed = OptimizationConfig(**(base | {name: OTHER_VALUES[name]}))
    assert changed.result_digest() != OptimizationConfig(**base).result_digest()


@pytest.mark.parametrize("changes", [{"validate_every": 5}, {"validation_sequences": 3}])
def test_with_patience_the_result_depends_on_the_validations(changes):
    patient = {**TRAINING, "patience": 2, "validate_every": 2}
    assert OptimizationConfig(**(patient | changes)).result_digest() != OptimizationConfig(**patient).result_digest()


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


def test_steps_in_proportion_to_tokens_by_hand():
    # 3 experts x 10 steps for 60 tokens are half a step a token.
    config = TrainConfig.parse({**TRAINING, "steps_by": "tokens"})
    assert [config.in_proportion([10, 20, 30], cluster).steps for cluster in range(3)] == [5, 10, 15]
    # For 7 tokens 30/7 = 4.29 each: ends at 4.29, 12.86 and 30 are cut down to whole steps, so that nothing is lost.
    assert [config.in_proportion([1, 2, 4], cluster).steps for cluster in range(3)] == [4, 8, 18]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(1, 10**12), min_size=1, max_size=12), steps=st.integers(1, 10**5))
def test_experts_together_take_k_times_the_steps_each_by_its_tokens(tokens, steps):
    config = TrainConfig.parse({**TRAINING, "steps": steps, "steps_by": "tokens"})
    taken = []
    for cluster, own in enumerate(tokens):
        share = steps * len(tokens) * own / sum(tokens)
        try:
            taken.append(config.in_proportion(tokens, cluster).steps)
        except ConfigError:
            taken.append(0)
            assert share <= 1
        assert abs(taken[-1] - share) <= 1 + 1e-9 * share
    assert sum(taken) == steps * len(tokens)


def test_schedule_of_steps_in_proportion_keeps_its_shape():
    # Half the steps: half the warm-up. A validation is due once at least.
    values = {**TRAINING, "steps": 100, "warmup_steps": 20, "validate_every": 60, "steps_by": "tokens"}
    config = TrainConfig.parse(values)
    half, more = (config.in_proportion([1, 3], cluster) for cluster in range(2))
    assert (half.steps, half.warmup_steps, half.validate_every) == (50, 10, 50)
    assert (more.steps, more.warmup_steps, more.validate_every) == (150, 30, 60)
    assert type(half) is OptimizationConfig
    assert half.model_copy(update={"steps": 100, "warmup_steps": 20, "validate_every": 60}) == config.optimization()
    # Of one step none is left for the warm-up.
    tiny = config.in_proportion([1, 199], 0)
    assert (tiny.steps, tiny.warmup_steps, tiny.validate_every) == (1, 0, 1)


@pytest.mark.parametrize("own", [0, 1])
def test_cluster_that_is_worth_less_than_one_step_is_refused(own):
    # 2 x 10 steps for 1000 tokens are 50 tokens a step.
    config = TrainConfig.parse({**TRAINING, "steps_by": "tokens"})
    with pytest.raises(
        ConfigError,
        match=f"cluster 0 has {own} of 1000 tokens, which is less than one of the 20 steps that all experts take "
        "together; raise train.steps, use fewer clusters or steps_by=equal",
    ):
        config.in_proportion([own, 1000 - own], 0)


def test_micro_batch_larger_than_the_batch_is_refused():
    with pytest.raises(ConfigError, match="micro_batch_size=9 is larger than sequences_per_step=8"):
        TrainConfig.parse({**TRAINING, "micro_batch_size": 9})


def test_which_members_there_are_does_not_change_how_one_is_trained():
    both = TrainConfig.parse({**TRAINING, "dense": True, "random_clusters": True})
    neither = TrainConfig.parse({**TRAINING, "dense": False, "random_clusters": False})
    assert both.optimization() == neither.optimization() == OptimizationConfig(**TRAINING)
    assert both.optimization().digest() == neither.optimization().digest()
    assert both.digest() != neither.digest()
    some = TrainConfig.parse({**TRAINING, "clusters": [1, 3]})
    assert some.optimization() == both.optimization()


def test_clusters_to_train_are_sorted_and_all_by_default():
    assert TrainConfig.parse({**TRAINING, "clusters": [5, 1, 3]}).trained_clusters(8) == (1, 3, 5)
    assert TrainConfig.parse(TRAINING).trained_clusters(3) == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"names cluster 5; with cluster\.n_clusters=4 they are 0 to 3"):
        TrainConfig.parse({**TRAINING, "clusters": [1, 5, 3]}).trained_clusters(4)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([], "clusters: names no cluster; leave it out to train the experts of all"),
        ([2, 0, 2], r"clusters: \[2, 0, 2\] names cluster 2 more than once"),
        ([-1], "clusters.0: Input should be greater than or equal to 0"),
    ],
)
def test_wrong_clusters_to_train_are_named(clusters, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.parse({**TRAINING, "clusters": clusters})


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
