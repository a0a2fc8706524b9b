"""fairscale's sharding on two ranks against one rank: the same losses, norms, weights and checkpoints.

fairscale makes its CUDA streams under CUDA alone, so on a CPU the two processes put streams that do nothing in their
place; the same tests run with nothing replaced where there are two GPUs.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

import cbtm
from cbtm.errors import ConfigError
from cbtm.train import fairscale_sharding
from cbtm.train.config import OptimizationConfig
from cbtm.train.fairscale_sharding import FairscaleSharding, _Weight
from cbtm.train.ranks import Ranks, joined
from cbtm.train.sharding import WrappedScores, shard

pytestmark = pytest.mark.slow  # two processes import torch and transformers

STEPS, SAVED_AT = 4, 2
VOCABULARY, LENGTH, SEQUENCES, MICRO_BATCH = 31, 8, 8, 2
ONE = Ranks(0, 1, torch.device("cpu"))
# 13 is odd, and all else even: a layer's vector does not halve, and the second rank's part is padded.
SHAPES = {
    "opt": OPTConfig(
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=13,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        init_std=0.3,
        tie_word_embeddings=True,
    ),
    "llama": LlamaConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(SHAPES[kind], dtype=torch.float32)


def settings(**changes):
    values = {
        "steps": STEPS,
        "sequences_per_step": SEQUENCES,
        "context_length": LENGTH,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "gradient_clip_norm": 0.5,
        "micro_batch_size": MICRO_BATCH,
    }
    return OptimizationConfig(**(values | changes))


def tokens(step, ranks):
    """This rank's rows of one step."""
    blocks = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return blocks.chunk(ranks.world_size)[ranks.rank].to(ranks.device)


def autocast(config, ranks):
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(ranks.device.type, dtype=getattr(torch, config.precision), cache_enabled=False)


def backward(sharding, config, ranks, step):
    """Sum of the losses of one step over all ranks, whose gradients are averaged then."""
    total = 0.0
    parts = tokens(step, ranks).split(MICRO_BATCH)
    for number, part in enumerate(parts, 1):
        with sharding.accumulate(last=number == len(parts)):
            with autocast(config, ranks):
                loss = sharding.module(part[:, :-1], part[:, 1:], n_targets=len(part) * LENGTH)
            (loss * ranks.world_size / (SEQUENCES * LENGTH)).backward()
        total += loss.item()
    return ranks.sum([total])[0] / (SEQUENCES * LENGTH)


def train(sharding, config, ranks, steps):
    """Losses and gradient norms of these steps."""
    losses, norms = [], []
    for step in steps:
        for group in sharding.optimizer.param_groups:
            group["lr"] = config.learning_rate / (1 + step)
        losses.append(backward(sharding, config, ranks, step))
        norms.append(float(sharding.gradient_norm()))
        factor = min(1.0, config.gradient_clip_norm / (norms[-1] + 1e-6))
        sharding.scale_gradients(torch.tensor(factor, device=ranks.device))
        sharding.optimizer.step()
        sharding.optimizer.zero_grad(set_to_none=True)
    return losses, norms


def score(sharding, config, ranks):
    """Mean log-probability of a step's targets, without a backward pass."""
    part = tokens(99, ranks)
    scores = WrappedScores(sharding.module)
    with scores.evaluating(), autocast(config, ranks):
        sums = scores.log_probs(part[:, :-1], part[:, 1:], n_targets=len(part) * LENGTH).sum().item()
    return ranks.sum([sums])[0] / (SEQUENCES * LENGTH)


def save(sharding, folder, ranks):
    tensors = sharding.tensors()
    one_file = dict.fromkeys(tensors, 1)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=one_file, save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=ranks.world_size == 1)


def restore(sharding, folder, ranks):
    tensors = sharding.tensors()
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.world_size == 1)
    sharding.adopt(tensors, SAVED_AT)


# --- what one rank does ---


def whole(kind, **changes):
    return shard(tiny(kind), settings(**changes), ONE)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """For each model: what it gives on one rank, and a folder with its checkpoint."""
    found = {}
    for kind in SHAPES:
        folder, config, sharding = tmp_path_factory.mktemp(kind), settings(), whole(kind)
        first = train(sharding, config, ONE, range(SAVED_AT))
        save(sharding, folder, ONE)
        scored = score(sharding, config, ONE)
        second = train(sharding, config, ONE, range(SAVED_AT, STEPS))
        found[kind] = {
            "losses": first[0] + second[0],
            "norms": first[1] + second[1],
            "score": scored,
            "weights": {name: tensor.clone() for name, tensor in sharding.weights().items()},
            "folder": folder,
        }
    return found


# --- what two ranks do: this file, run as a program ---


def replace_streams():
    """No-op streams for a CPU: everything that fairscale orders by them happens in order there."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    class Stream:
        def wait_stream(self, other):
            pass

    stream, make = Stream(), FullyShardedDataParallel._setup_streams

    def setup(self):
        make(self)
        self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), stream))

    FullyShardedDataParallel._setup_streams = setup
    torch.cuda.current_stream = lambda: stream
    torch.cuda.stream = lambda _: nullcontext()
    torch.Tensor.record_stream = lambda self, _: None
    fairscale_sharding._check_device = lambda ranks: None


def sharded(kind, config, ranks, seed=0):
    sharding = shard(tiny(kind, seed).to(ranks.device), config, ranks)
    assert isinstance(sharding, FairscaleSharding)
    return sharding


def one_model(kind, folder, elsewhere, ranks):
    # Activations of one of the two are computed again.
    config = settings(sharding="fairscale", activation_checkpointing=kind == "llama")
    model = tiny(kind).to(ranks.device)
    sharding = shard(model, config, ranks)
    first = train(sharding, config, ranks, range(SAVED_AT))
    save(sharding, folder, ranks)
    scored = score(sharding, config, ranks)
    second = train(sharding, config, ranks, range(SAVED_AT, STEPS))
    weights = sharding.weights()
    if ranks.is_first:
        model.save_pretrained(folder / "model", state_dict=dict(weights))  # which it empties
    found = {
        "losses": first[0] + second[0],
        "norms": first[1] + second[1],
        "score": scored,
        "elements": sum(part.numel() for part in sharding.optimizer.param_groups[-1]["params"]),
        "optimizer_steps": sharding.optimizer_steps,
        "tied": {name: weights[name].data_ptr() for name in weights if "embed_tokens" in name or "lm_head" in name},
        "n_weights": ranks.sum([float(len(weights))])[0],
    }
    for source, place in (("resumed", folder), ("resumed_from_one_rank", elsewhere)):
        other = sharded(kind, config, ranks, seed=1)  # other weights, gathered before they are replaced
        score(other, config, ranks)
        restore(other, place, ranks)
        found[source] = train(other, config, ranks, range(SAVED_AT, STEPS))[0]
    return found


def low_precision(ranks):
    config = settings(sharding="fairscale", precision="bfloat16")
    sharding = sharded("llama", config, ranks)
    return train(sharding, config, ranks, range(STEPS))[0]


def overflow_on_one_rank(ranks):
    """The norm that each rank sees when one element of one rank's gradient overflows."""
    config = settings(sharding="fairscale", precision="float16")
    sharding = sharded("opt", config, ranks)
    backward(sharding, config, ranks, 0)
    fine = float(sharding.gradient_norm())
    if ranks.rank == 1:
        next(sharding.module.parameters()).grad[0] = torch.inf
    return fine, ranks.sum([float(torch.isinf(sharding.gradient_norm()))])[0]


def two_ranks(device, folder, elsewhere):
    torch.set_num_threads(1)
    if device == "cpu":
        replace_streams()
    target = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    with joined(target) as ranks:
        found = {kind: one_model(kind, folder / kind, Path(elsewhere[kind]), ranks) for kind in SHAPES}
        found["bfloat16"] = low_precision(ranks)
        found["overflow"] = overflow_on_one_rank(ranks)
        if ranks.is_first:
            (folder / "found.json").write_text(json.dumps(found))


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def two(request, tmp_path_factory, one_rank):
    """What two ranks gave, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [request.param, str(folder), json.dumps({kind: str(one_rank[kind]["folder"]) for kind in SHAPES})]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(cbtm.__file__).parents[1]), *sys.path]),
    }
    if request.param == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # PyTorch would use streams that are replaced here
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return json.loads((folder / "found.json").read_text()) | {"folder": folder}


@pytest.mark.parametrize("kind", SHAPES)
def test_two_ranks_take_the_steps_of_one(two, one_rank, kind):
    assert two[kind]["losses"] == pytest.approx(one_rank[kind]["losses"], rel=1e-5)
    assert two[kind]["norms"] == pytest.approx(one_rank[kind]["norms"], rel=1e-4)
    assert min(two[kind]["norms"]) > settings().gradient_clip_norm  # clipping is at work in every step
    assert two[kind]["score"] == pytest.approx(one_rank[kind]["score"], rel=1e-5)
    assert two[kind]["optimizer_steps"] == STEPS


def test_a_rank_holds_half_of_each_group(two):
    layer = 4 * (8 * 8 + 8) + 2 * 13 * 8 + 13 + 8 + 2 * 2 * 8  # attention, feed-forward, norms: 549
    outside = 31 * 8 + (8 + 2) * 8 + 2 * 8  # tied embeddings once, positions (OPT has two more), last norm: 344
    assert two["opt"]["elements"] == 2 * (layer + 1) / 2 + outside / 2


@pytest.mark.parametrize("kind", SHAPES)
def test_the_weights_are_those_of_one_rank_and_open_as_a_plain_model(two, one_rank, kind):
    model, info = AutoModelForCausalLM.from_pretrained(two["folder"] / kind / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = tiny(kind)
    expected.load_state_dict(one_rank[kind]["weights"])
    found = model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        # Four steps of decay change a weight of 0.3 by 0.3 * 0.1 * 1e-2 * (1 + 1/2 + 1/3 + 1/4) = 6e-4.
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=name)
    probe = tokens(0, ONE)[:, :-1]
    torch.testing.assert_close(model(probe).logits, expected.eval()(probe).logits, rtol=1e-3, atol=1e-3)


def test_tied_weights_are_one_tensor_and_only_rank_0_has_any(two):
    assert len(two["opt"]["tied"]) == 2
    assert len(set(two["opt"]["tied"].values())) == 1
    assert len(set(two["llama"]["tied"].values())) == 2
    assert two["opt"]["n_weights"] == len(tiny("opt").state_dict())


@pytest.mark.parametrize("kind", SHAPES)
def test_a_fresh_instance_goes_on_from_a_checkpoint(two, kind):
    assert two[kind]["resumed"] == two[kind]["losses"][SAVED_AT:]


@pytest.mark.parametrize("kind", SHAPES)
def test_a_checkpoint_of_one_rank_is_gone_on_from_on_two(two, one_rank, kind):
    assert two[kind]["resumed_from_one_rank"] == pytest.approx(one_rank[kind]["losses"][SAVED_AT:], rel=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_checkpoint_of_two_ranks_is_gone_on_from_on_one(two, one_rank, kind):
    sharding = shard(tiny(kind, seed=1), settings(), ONE)
    restore(sharding, two["folder"] / kind, ONE)
    losses = train(sharding, settings(), ONE, range(SAVED_AT, STEPS))[0]
    assert losses == pytest.approx(one_rank[kind]["losses"][SAVED_AT:], rel=1e-5)
    assert sharding.optimizer_steps == STEPS


def test_bfloat16_follows_one_rank_in_bfloat16(two):
    config = settings(precision="bfloat16")
    expected = train(whole("llama", precision="bfloat16"), config, ONE, range(STEPS))[0]
    assert two["bfloat16"] == pytest.approx(expected, rel=1e-3)


def test_every_rank_knows_of_an_overflow_on_one(two):
    fine, ranks_with_an_infinite_norm = two["overflow"]
    assert 0 < fine < 1e6
    assert ranks_with_an_infinite_norm == 2


def test_a_part_of_the_vector_finds_its_elements_of_a_weight():
    weight = _Weight("w", torch.Size([2, 3]), 4, 10)  # elements 4..9 of a vector that is cut in parts of 6
    assert weight.overlap(0, 6) == (slice(4, 6), slice(0, 2))
    assert weight.overlap(6, 12) == (slice(0, 4), slice(2, 6))
    here, of_weight = weight.overlap(12, 18)
    assert here.stop - here.start == of_weight.stop - of_weight.start == 0


# --- what is refused ---

GPU = Ranks(0, 2, torch.device("cuda", 0))  # none is touched before these errors


def refused(model, ranks, match, **changes):
    with pytest.raises(ConfigError, match=match):
        shard(model, settings(sharding="fairscale", **changes), ranks)


def test_a_cpu_is_refused():
    refused(tiny("opt"), Ranks(0, 2, torch.device("cpu")), "needs GPUs, and device is cpu; use fsdp2 or ddp")


def test_one_device_is_refused():
    refused(tiny("opt"), Ranks(0, 1, torch.device("cuda", 0)), "over several GPUs, and devices=1; use sharding=none")


def test_compilation_is_refused():
    refused(tiny("opt"), GPU, "does not go with compile=true", compile=True)


def test_a_weight_that_is_not_trained_is_refused_by_name():
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    refused(model, GPU, r"model\.norm\.weight is not trained")


def test_weights_tied_across_layers_are_refused_by_name():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, GPU, r"model\.layers\.1\.mlp\.up_proj\.weight is tied to a weight of another layer")


def test_a_missing_fairscale_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairscale.nn.data_parallel", None)
    refused(tiny("opt"), GPU, r"pip install 'cbtm\[train\]'")


if __name__ == "__main__":
    two_ranks(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
