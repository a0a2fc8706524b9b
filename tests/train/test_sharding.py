"""Models spread over ranks: real processes that talk over gloo, compared with one process that has all to itself."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny_training import (
    CONTEXT,
    Trained,
    assert_close,
    assert_equal,
    go_on,
    make_job,
    start_ranks,
    train_here,
    train_on_ranks,
    wait_for,
    wait_until_held,
    write_run,
)

from cbtm import manifest
from cbtm.branch.seed import ScratchModelConfig, create_model, load_model
from cbtm.errors import ConfigError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.config import OptimizationConfig
from cbtm.train.data import BlockOrder
from cbtm.train.loss_module import decoder_layers
from cbtm.train.ranks import Ranks
from cbtm.train.sharding import shard

# An epsilon of the gradient's size: without it Adam would hide a gradient of the wrong length.
STEEP = {"learning_rate": 0.1, "adam_epsilon": 0.05}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Runs:
    """Trainings of this module, each done once."""

    def __init__(self, root):
        self.root = root
        self.done = {}
        self.sources = {}

    def source(self, architecture="opt", prompts=False):
        key = f"{architecture}-{prompts}"
        if key not in self.sources:
            self.sources[key] = write_run(self.root / key, architecture, prompts=prompts)
        return self.sources[key]

    def job(self, name, architecture="opt", sharding="auto", n=1, prompts=False, **changes):
        settings = STEEP | {"sharding": sharding, "devices": n} | changes
        return make_job(self.source(architecture, prompts), self.root / name, **settings)

    def once(self, name, n, **changes) -> Trained:
        job = self.job(name, n=n, **changes)
        return train_here(job) if n == 1 else train_on_ranks(job, n)

    def __call__(self, architecture="opt", sharding="auto", n=1, **changes) -> Trained:
        name = "-".join(map(str, (architecture, sharding, n, *changes.items())))
        if name not in self.done:
            self.done[name] = self.once(name, n, architecture=architecture, sharding=sharding, **changes)
        return self.done[name]

    def resumed(self, before: Trained, name, sharding, n, **changes) -> Trained:
        """A run that goes on from the checkpoint of step 4 of another, the only one that it has left."""
        job = self.job(name, sharding=sharding, n=n, **changes)
        shutil.copytree(before.folder.with_name("checkpoints"), job.checkpoints)
        return train_here(job) if n == 1 else train_on_ranks(job, n)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


# --- several ranks take the steps of one ---


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_two_ranks_take_the_same_steps_as_one(runs, architecture, sharding):
    # 4 sequences a step in micro-batches of one: four passes on one rank, two on each of two.
    one, two = runs(architecture), runs(architecture, sharding, 2)
    assert list(one.losses) == list(range(1, 9))
    norms = [point["train/gradient_norm"] for point in one.curve if "train/gradient_norm" in point]
    assert min(norms) > 0.5  # every step was clipped
    start = load_model(runs.source(architecture) / "start").state_dict()
    assert max((start[name] - tensor).abs().max().item() for name, tensor in one.weights.items()) > 0.05
    assert_close(two, one)
    assert (two.facts.pop("cost")["devices"], one.facts["cost"]["devices"]) == (2, 1)
    assert two.facts["validation"] == pytest.approx(one.facts["validation"], rel=1e-5)
    assert {name: two.facts[name] for name in ("tokens_seen", "steps", "epochs", "documents")} == {
        name: one.facts[name] for name in ("tokens_seen", "steps", "epochs", "documents")
    }


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_rank_that_has_nothing_to_learn_in_a_step_goes_along(runs, sharding):
    settings = {"sequences_per_step": 2, "prompts": True, "packing": "continuous"}
    source = TokenDocuments([(runs.source(prompts=True) / "tokens", "text")])
    order = BlockOrder(source, context_length=CONTEXT, seed=OptimizationConfig.model_fields["random_state"].default)
    targets = [[order.batch(2 * step + rank, 1).n_targets for rank in range(2)] for step in range(8)]
    assert any(0 in pair and sum(pair) for pair in targets)
    assert_close(runs("opt", sharding, 2, **settings), runs("opt", **settings))


def test_sharded_bfloat16_with_activation_checkpointing_follows_float32(runs):
    sharded = runs("opt", "fsdp2", 2, precision="bfloat16", activation_checkpointing=True)
    expected = runs("opt")
    assert sharded.losses == pytest.approx(expected.losses, rel=2e-2)
    assert sharded.losses != pytest.approx(expected.losses, rel=1e-6)
    assert {tensor.dtype for tensor in sharded.weights.values()} == {torch.float32}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_ranks_leave_out_the_same_steps_of_float16(runs, sharding):
    # Each rank's loss is doubled, because the mean over two is taken of what is to be their sum; so is the scale here.
    one = runs("opt", precision="float16", loss_scale=2.0**21)
    two = runs("opt", sharding, 2, precision="float16", loss_scale=2.0**20)
    assert two.losses == pytest.approx(one.losses, rel=1e-3)
    states = [
        json.loads((run.folder.with_name("checkpoints") / "step-00000004/state.json").read_text()) for run in (one, two)
    ]
    assert 0 < states[0]["optimizer_steps"] < 4
    assert states[1]["optimizer_steps"] == states[0]["optimizer_steps"]
    assert 2 * states[1]["loss_scale"]["value"] == states[0]["loss_scale"]["value"] < 2.0**21


def test_dropout_of_each_rank_is_its_own_and_seeded(runs, tmp_path):
    # All documents are one, so that the two ranks see the same: with the same masks they would lose the same, and
    # their mean would be what one rank alone loses on one sequence.
    with TokenShardWriter(tmp_path, "text", vocab_size=266) as writer:
        for number in range(10):
            writer.add(DocumentRecord(str(number), 1), np.arange(8))
    settings = {"shards": ((tmp_path, "text"),), "steps": 1, "warmup_steps": 0, "validate_every": None}
    first = {}
    for dropout in (0.0, 0.2):
        alone, pair, again = (
            runs.once(f"{name}-{dropout}", n, dropout=dropout, sequences_per_step=n, **settings).losses[1]
            for name, n in (("alone", 1), ("pair", 2), ("again", 2))
        )
        assert pair == again
        first[dropout] = alone, pair
    assert first[0.0][0] == pytest.approx(first[0.0][1], rel=1e-6)
    assert first[0.2][0] != pytest.approx(first[0.2][1], rel=1e-4)


# --- what they leave ---


@pytest.mark.parametrize("architecture", ["opt", "llama"])
def test_folder_at_the_end_is_a_plain_one(runs, architecture):
    start, folder = runs.source(architecture) / "start", runs(architecture, "fsdp2", 2).folder
    names = {path.name for path in folder.iterdir()} - {"losses.jsonl"}
    assert {path.name for path in start.iterdir()} <= names
    assert names - {path.name for path in start.iterdir()} == {
        "expert.json",
        "training.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((folder / "config.json").read_text())
    assert settings == json.loads((start / "config.json").read_text())
    assert settings["architectures"] == [{"opt": "OPTForCausalLM", "llama": "LlamaForCausalLM"}[architecture]]
    weights = runs(architecture, "fsdp2", 2).weights
    # A head that is tied to the embeddings is stored once, under one name.
    assert ("lm_head.weight" in weights) == (architecture == "llama")
    model = load_model(folder)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


# --- checkpoints ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("auto", 1), ("ddp", 2)),
        (("auto", 1), ("fsdp2", 2)),
        (("ddp", 2), ("auto", 1)),
        (("fsdp2", 2), ("auto", 1)),
        (("fsdp2", 2), ("fsdp2", 4)),
        (("ddp", 2), ("ddp", 4)),
        (("ddp", 2), ("fsdp2", 2)),
        (("fsdp2", 2), ("ddp", 2)),
    ],
    ids=lambda one: f"{one[0]}{one[1]}",
)
def test_training_goes_on_from_a_checkpoint_of_other_ranks(runs, before, after):
    name = f"{before}-to-{after}"
    resumed = runs.resumed(runs("opt", *before), name, *after)
    assert list(resumed.losses) == [5, 6, 7, 8]
    assert_close(resumed, runs("opt"))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_as_many_ranks_go_on_to_the_bit(runs, sharding):
    whole = runs("opt", sharding, 2)
    resumed = runs.resumed(whole, f"again-{sharding}", sharding, 2)
    assert list(resumed.losses) == [5, 6, 7, 8]
    assert_equal(resumed, whole)


def test_sigterm_to_one_rank_stops_all_behind_the_same_step(runs):
    settings = {"sharding": "fsdp2", "n": 2, "dropout": 0.2}
    whole = runs("opt", **settings)
    job = runs.job("stopped", **settings)
    processes = start_ranks(job, 2, hold_at=5)
    wait_until_held(job, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    go_on(job)
    assert wait_for(processes) == [75, 75]
    for rank in range(2):
        said = (job.output.parent / f"error-{rank}.txt").read_text()
        assert said == f"stopped at step 6 of 8; the checkpoint is at {job.checkpoints}"
    assert not list(job.output.glob("*.safetensors"))
    spec = manifest.StageSpec("checkpoint", f"{job.checkpoints}/step-00000006", "key")
    assert manifest.is_current(spec, manifest.load(spec.manifest_uri))
    (job.output / "losses.jsonl").unlink()
    resumed = train_on_ranks(job, 2)
    assert list(resumed.losses) == [7, 8]
    assert_equal(resumed, whole)


def test_best_weights_come_back_onto_all_ranks(runs):
    settings = {"steps": 30, "validate_every": 2, "patience": 2, "learning_rate": 1.0, "checkpoint_every": 100}
    one, two = runs("opt", **settings), runs("opt", "fsdp2", 2, **settings)
    assert one.facts["steps"] < max(one.losses) < 30
    assert two.facts["steps"] == one.facts["steps"]
    assert_close(two, one)


# --- what cannot be spread ---


def small():
    config = ScratchModelConfig(hidden_size=16, n_layers=3, n_heads=2)
    return create_model(config, vocab_size=300, separator_id=0, context_length=8)


def test_layers_are_the_entries_of_the_longest_list_of_modules():
    model = small()
    assert decoder_layers(model) == list(model.model.decoder.layers)
    with pytest.raises(ConfigError, match="Linear has no list of layers to be sharded or compiled; use sharding=ddp"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_optimiser_has_taken_no_step_until_it_has():
    config = OptimizationConfig(steps=2, sequences_per_step=1, learning_rate=0.1)
    one = shard(small(), config, Ranks(0, 1, torch.device("cpu")))
    assert one.optimizer_steps == 0
    tensors = one.tensors()
    # Each weight once, the tied head under the embeddings' name, and two moments for each, of zeros at first.
    weights = [name for name in tensors if name.startswith("model/")]
    assert len(tensors) == 3 * len(weights)
    assert "model/lm_head.weight" not in weights
    assert not any(tensor.any() for name, tensor in tensors.items() if not name.startswith("model/"))
    assert one.optimizer_steps == 0
