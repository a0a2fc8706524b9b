import argparse
import json
import math
import os
import re
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, linear, relu

from cbtm.branch import metaseq
from cbtm.branch.metaseq import import_metaseq, to_metaseq
from cbtm.branch.metaseq_shards import read_checkpoint
from cbtm.branch.seed import load_model
from cbtm.branch.shapes import OptShape
from cbtm.errors import CbtmError, ConfigError, DataError, StorageError

PRE_NORM = OptShape(None, 3, 32, 4, 128, 32, vocab_size=40, n_positions=12)
POST_NORM = OptShape(None, 2, 32, 4, 128, 16, norm_first=False, vocab_size=40, n_positions=12)  # as 350m


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- metaseq, as far as a checkpoint needs it ---


def decoder(shape, seed=0, dtype=torch.float32):
    """State of a metaseq decoder with random weights; layer norms are not the identity."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype)

    width, narrow = shape.hidden_size, shape.embedding_size
    state = OrderedDict()
    state["decoder.version"] = torch.tensor([3.0])
    state["decoder.embed_tokens.weight"] = random(shape.vocab_size, narrow)
    state["decoder.embed_positions.weight"] = random(shape.n_positions + 2, width)
    if narrow != width:
        state["decoder.project_in_dim.weight"] = random(width, narrow)
        state["decoder.project_out_dim.weight"] = random(narrow, width)
    for number in range(shape.n_layers):
        layer = f"decoder.layers.{number}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[f"{layer}self_attn.{name}.weight"] = random(width, width)
            state[f"{layer}self_attn.{name}.bias"] = random(width)
        for name, (rows, columns) in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
            state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"] = random(rows, columns), random(rows)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            state[f"{layer}{name}.weight"], state[f"{layer}{name}.bias"] = 1 + random(width), random(width)
    if shape.norm_first:
        state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"] = 1 + random(width), random(width)
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    return state


def forward(state, tokens, heads):
    """Logits of shape (batch, length, vocabulary) of metaseq's decoder, written out."""

    def normed(x, name):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def projected(x, name):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    batch, length = tokens.shape
    norm_first = "decoder.layer_norm.weight" in state
    x = state["decoder.embed_tokens.weight"][tokens]
    if "decoder.project_in_dim.weight" in state:
        x = linear(x, state["decoder.project_in_dim.weight"])
    x = x + state["decoder.embed_positions.weight"][torch.arange(length) + 2]
    future = torch.full((length, length), -math.inf).triu(1)
    number = 0
    while f"decoder.layers.{number}.fc1.weight" in state:
        layer = f"decoder.layers.{number}."
        inner = normed(x, f"{layer}self_attn_layer_norm") if norm_first else x
        q, k, v = (
            projected(inner, f"{layer}self_attn.{name}").view(batch, length, heads, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + future).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + projected(attended, f"{layer}self_attn.out_proj")
        x = x if norm_first else normed(x, f"{layer}self_attn_layer_norm")
        inner = normed(x, f"{layer}final_layer_norm") if norm_first else x
        x = x + projected(relu(projected(inner, f"{layer}fc1")), f"{layer}fc2")
        x = x if norm_first else normed(x, f"{layer}final_layer_norm")
        number += 1
    if norm_first:
        x = normed(x, "decoder.layer_norm")
    if "decoder.project_out_dim.weight" in state:
        x = linear(x, state["decoder.project_out_dim.weight"])
    return linear(x, state["decoder.output_projection.weight"])


def fused(state, name="qkv_proj.", order="kvq"):
    """The three projections of each layer on top of each other, in the order that metaseq's qkv_proj has."""
    out = OrderedDict()
    for key, value in state.items():
        match = re.fullmatch(r"(.*self_attn\.)([kvq])_proj\.(weight|bias)", key)
        if match is None:
            out[key] = value
        elif match[2] == order[0]:
            parts = [state[f"{match[1]}{letter}_proj.{match[3]}"] for letter in order]
            out[f"{match[1]}{name}{match[3]}"] = torch.cat(parts)
    return out


def model_parts(state, n_parts):
    """Megatron's cut: rows of column-parallel layers and of the embedding, columns of row-parallel ones."""
    parts = [OrderedDict() for _ in range(n_parts)]
    for key, value in state.items():
        if re.search(r"[kvq]_proj|fc1|embed_tokens|output_projection", key):
            pieces = value.chunk(n_parts)
        elif re.search(r"(out_proj|fc2)\.weight", key):
            pieces = value.chunk(n_parts, dim=1)
        else:
            pieces = [value] * n_parts
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = piece.clone() if n_parts > 1 else piece
    return parts


def fsdp_shards(state, n_shards):
    """State and shard_metadata of each rank, with layer 1 wrapped by itself, as fairscale lays them out."""
    state = OrderedDict(state)
    buffers = {"decoder.version": state.pop("decoder.version")}
    state.pop("decoder.output_projection.weight")  # shared: it is metadata
    shards = [({}, {"param_metadata": [], "buffer_names": list(buffers)}) for _ in range(n_shards)]
    for path in ("", "decoder.layers.1"):
        inside = [key for key in state if key.startswith("decoder.layers.1.") == bool(path)]
        flat = torch.cat([state[key].flatten() for key in inside])
        chunks = list(flat.chunk(n_shards))
        chunks += [flat.new_empty(0)] * (n_shards - len(chunks))
        key = f"{path}.flat_param_0" if path else "flat_param_0"
        for (tensors, metadata), chunk in zip(shards, chunks, strict=True):
            padding = len(chunks[0]) - len(chunk)
            tensors[key] = torch.cat([chunk, chunk.new_full((padding,), 99.0)])
            layout = {
                "names": [name.removeprefix(f"{path}.") if path else name for name in inside],
                "shapes": [state[name].shape for name in inside],
                "numels": [state[name].numel() for name in inside],
                "padding": padding,
            }
            shared = [] if path else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
            metadata["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": layout},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": shared,
                }
            )
    for tensors, _ in shards:
        tensors.update(buffers)
    return shards


def checkpoint(state, heads=4, n_updates=500, **more):
    settings = {
        "decoder_attention_heads": heads,
        "decoder_layers": 3,
        "activation_fn": "relu",
        "no_scale_embedding": True,
        "dropout": 0.25,
        "attention_dropout": 0.125,
        "distributed_rank": 0,
        **more.pop("settings", {}),
    }
    return {
        "cfg": {"_name": None, "model": Namespace(**settings)},
        "args": None,
        "model": state,
        "optimizer_history": [{"num_updates": n_updates}],
        "extra_state": {"train_iterator": {"epoch": 1}, "val_loss": None},
        **more,
    }


def save(folder, state, n_parts=1, n_shards=1, stem="checkpoint_last", fuse=False, **more):
    """Write a checkpoint in the files that metaseq would, and return the folder."""
    folder.mkdir(exist_ok=True)
    for part, tensors in enumerate(model_parts(state, n_parts)):
        suffix = f"-model_part-{part}" if n_parts > 1 else ""
        if fuse:
            tensors = fused(tensors)
        if n_shards == 1:
            torch.save(checkpoint(tensors, **more), folder / f"{stem}{suffix}.pt")
            continue
        for shard, (weights, metadata) in enumerate(fsdp_shards(tensors, n_shards)):
            content = checkpoint(weights, shard_metadata=metadata, **more)
            torch.save(content, folder / f"{stem}{suffix}-shard{shard}.pt")
    return folder


def logits(folder, tokens):
    model = load_model(folder).eval()
    with torch.no_grad():
        return model(tokens).logits


def some_tokens(shape):
    return torch.randint(shape.vocab_size, (2, shape.n_positions), generator=torch.Generator().manual_seed(5))


def refusal(error, message, source, folder, **more):
    with pytest.raises(error, match=message):
        import_metaseq(source, folder, **more)
    assert not folder.exists()
    assert not list(folder.parent.glob(f".{folder.name}*"))  # nothing is left of the attempt


# --- the same model ---


@pytest.mark.parametrize("fuse", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize(("n_parts", "n_shards"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_converted_model_has_the_logits_of_the_checkpoint_however_it_is_split(tmp_path, n_parts, n_shards, fuse):
    state = decoder(PRE_NORM)
    source = save(tmp_path / "run", state, n_parts, n_shards, fuse=fuse)
    facts = import_metaseq(source, tmp_path / "opt")
    tokens = some_tokens(PRE_NORM)
    torch.testing.assert_close(logits(tmp_path / "opt", tokens), forward(state, tokens, 4), rtol=0, atol=1e-5)
    assert (facts["model_parts"], facts["fsdp_shards"], facts["replica_drift"]) == (n_parts, n_shards, 0)
    assert len(facts["files"]) == n_parts * n_shards
    # Nothing is computed: the weights are the checkpoint's to the bit.
    assert load_file(tmp_path / "opt" / "model.safetensors").keys() == PRE_NORM.tensor_shapes().keys()
    back = to_metaseq(load_file(tmp_path / "opt" / "model.safetensors"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("n_shards", [1, 3])
def test_350m_variant_with_late_norms_and_projections_has_the_same_logits(tmp_path, n_shards):
    state = decoder(POST_NORM)
    source = save(tmp_path / "run", state, n_shards=n_shards, settings={"decoder_layers": 2})
    import_metaseq(source, tmp_path / "opt")
    tokens = some_tokens(POST_NORM)
    torch.testing.assert_close(logits(tmp_path / "opt", tokens), forward(state, tokens, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [PRE_NORM, POST_NORM], ids=["pre-norm", "post-norm"])
def test_a_hugging_face_model_computes_the_same_under_metaseqs_names(shape):
    from transformers.models.opt.configuration_opt import OPTConfig
    from transformers.models.opt.modeling_opt import OPTForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = OPTForCausalLM(OPTConfig(**shape.to_config())).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    state = to_metaseq(model.state_dict())
    assert state.keys() == decoder(shape).keys()
    tokens = some_tokens(shape)
    with torch.no_grad():
        torch.testing.assert_close(forward(state, tokens, 4), model(tokens).logits, rtol=0, atol=2e-5)


def test_shards_are_laid_out_as_fairscale_reads_them():
    fully_sharded = pytest.importorskip("fairscale.nn.data_parallel").FullyShardedDataParallel
    state = decoder(PRE_NORM)
    shards = fsdp_shards(state, 4)
    for _, metadata in shards:
        # fairscale looks at the shared parameters of the last module only.
        metadata["param_metadata"].reverse()
    read = fully_sharded.consolidate_shard_weights([one for one, _ in shards], [two for _, two in shards])
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_fairseqs_in_proj_is_query_key_value(tmp_path):
    state = decoder(PRE_NORM)
    torch.save(
        {"model": fused(state, "in_proj_", "qkv"), "args": Namespace(decoder_attention_heads=4)}, tmp_path / "a.pt"
    )
    import_metaseq(tmp_path / "a.pt", tmp_path / "opt")
    back = to_metaseq(load_file(tmp_path / "opt" / "model.safetensors"))
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_flat_parameters_in_one_file_are_told_apart(tmp_path):
    # metaseq's resharded files: one shard, whose parameters are flat still.
    state = decoder(PRE_NORM)
    for part, tensors in enumerate(model_parts(state, 2)):
        ((weights, metadata),) = fsdp_shards(fused(tensors), 1)
        torch.save(checkpoint(weights, shard_metadata=metadata), tmp_path / f"reshard-model_part-{part}.pt")
    import_metaseq(tmp_path / "reshard", tmp_path / "opt")
    back = to_metaseq(load_file(tmp_path / "opt" / "model.safetensors"))
    assert all(torch.equal(back[name], state[name]) for name in state)


# --- what is written ---


def test_facts_and_configuration_say_what_was_imported(tmp_path):
    source = save(tmp_path / "run", decoder(PRE_NORM), stem="consolidated") / "consolidated.pt"
    facts = import_metaseq(source, tmp_path / "opt")
    assert facts == json.loads((tmp_path / "opt" / "import.json").read_text())
    assert facts["n_parameters"] == PRE_NORM.n_parameters
    assert (facts["size"], facts["n_heads"], facts["dtype"], facts["n_updates"]) == (None, 4, "float32", 500)
    ((name, size, digest),) = [tuple(file.values()) for file in facts["files"]]
    assert (name, size, len(digest)) == ("consolidated.pt", source.stat().st_size, 64)
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    assert config["architectures"] == ["OPTForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (2, 2, 1)
    assert (config["dropout"], config["attention_dropout"], config["vocab_size"]) == (0.25, 0.125, 40)
    written = sorted(path.name for path in (tmp_path / "opt").iterdir())
    assert written == ["config.json", "import.json", "model.safetensors"]


def test_half_precision_stays_half_precision(tmp_path):
    state = decoder(PRE_NORM, dtype=torch.float16)
    assert import_metaseq(save(tmp_path / "run", state, 2, 2), tmp_path / "opt")["dtype"] == "float16"
    weights = load_file(tmp_path / "opt" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert json.loads((tmp_path / "opt" / "config.json").read_text())["dtype"] == "float16"


def test_large_models_are_written_in_several_files_that_transformers_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(metaseq, "_LARGEST_FILE", 60_000)
    state = decoder(PRE_NORM)
    import_metaseq(save(tmp_path / "run", state, 2, 2), tmp_path / "opt")
    files = sorted((tmp_path / "opt").glob("*.safetensors"))
    # 3 layers of 12,704 numbers and 1,792 around them are 159,616 bytes.
    assert [file.name for file in files] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "opt" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * PRE_NORM.n_parameters == 159_616
    assert max(sum(4 * weight.numel() for weight in load_file(file).values()) for file in files) <= 60_000
    tokens = some_tokens(PRE_NORM)
    torch.testing.assert_close(logits(tmp_path / "opt", tokens), forward(state, tokens, 4), rtol=0, atol=1e-5)


def test_a_published_size_needs_no_settings(tmp_path, monkeypatch):
    # 125m in the shape of its tensors alone: a file of zeros would be 500 MB.
    shape = replace(PRE_NORM, size="tiny")
    monkeypatch.setattr("cbtm.branch.shapes._SHAPES", (shape,))
    torch.save(decoder(PRE_NORM), tmp_path / "bare.pt")  # a state dict and nothing around it
    facts = import_metaseq(tmp_path / "bare.pt", tmp_path / "opt")
    assert (facts["size"], facts["n_heads"], facts["n_updates"]) == ("tiny", 4, None)


def test_replicas_that_drifted_are_reported(tmp_path, caplog):
    state = decoder(PRE_NORM)
    save(tmp_path / "run", state, 2)
    path = tmp_path / "run" / "checkpoint_last-model_part-1.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    content["model"]["decoder.layer_norm.weight"] *= 1.01
    torch.save(content, path)
    facts = import_metaseq(tmp_path / "run", tmp_path / "opt")
    assert facts["replica_drift"] == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert "differ by 0.0099 of their size" in caplog.text
    weights = load_file(tmp_path / "opt" / "model.safetensors")
    assert torch.equal(weights["model.decoder.final_layer_norm.weight"], state["decoder.layer_norm.weight"])


def test_tensors_that_share_memory_in_the_checkpoint_are_written_apart(tmp_path):
    state = decoder(PRE_NORM)
    for number in (0, 1):
        state[f"decoder.layers.{number}.fc1.weight"] = state["decoder.layers.2.fc1.weight"]
        state[f"decoder.layers.{number}.fc2.weight"] = state["decoder.layers.2.fc1.weight"].t()
    import_metaseq(save(tmp_path / "run", state), tmp_path / "opt")
    back = to_metaseq(load_file(tmp_path / "opt" / "model.safetensors"))
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_an_old_file_that_is_no_zip_archive_is_read(tmp_path):
    state = decoder(PRE_NORM)
    torch.save(checkpoint(state), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    tensors = read_checkpoint(tmp_path / "a.pt").tensors
    assert torch.equal(tensors["decoder.embed_tokens.weight"].read(), state["decoder.embed_tokens.weight"])


# --- which files ---


def test_one_of_several_checkpoints_is_named_by_the_beginning_of_its_files(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM, 1), n_shards=2, stem="checkpoint_1_500")
    save(tmp_path / "run", decoder(PRE_NORM, 2), n_shards=2)
    refusal(ConfigError, r"several checkpoints \(checkpoint_1_500, checkpoint_last\)", tmp_path / "run", tmp_path / "o")
    for source in ("checkpoint_last", "checkpoint_last.pt", "checkpoint_last-shard1.pt"):
        read = read_checkpoint(tmp_path / "run" / source)
        assert [path.name for path in read.files] == ["checkpoint_last-shard0.pt", "checkpoint_last-shard1.pt"]


def test_shards_are_taken_in_the_order_of_their_numbers(tmp_path):
    state = decoder(PRE_NORM)
    save(tmp_path / "run", state, n_shards=11)  # by name, shard10 comes before shard2
    tensors = read_checkpoint(tmp_path / "run").tensors
    assert all(torch.equal(tensor.read(), state[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("n_parts", "n_shards", "lost", "message"),
    [
        (1, 4, "-shard2", r"the shards of checkpoint_last are numbered to 3, but \[2\] are missing"),
        (1, 4, "-shard3", "3 shards .* hold .*: a shard is missing, or one is of another checkpoint"),
        (2, 2, "-model_part-0-shard1", "have 1, 2 shards; a file is missing"),
        (3, 1, "-model_part-1", r"the model parts of checkpoint_last are numbered to 2, but \[1\] are missing"),
        (4, 1, "-model_part-3", r"has shape \(\d+, \d+\), but an OPT of 3 layers"),
    ],
)
def test_a_missing_file_is_noticed(tmp_path, n_parts, n_shards, lost, message):
    shape = replace(PRE_NORM, hidden_size=48, embedding_size=48, feed_forward_size=192, vocab_size=48)
    save(tmp_path / "run", decoder(shape), n_parts, n_shards)
    (tmp_path / "run" / f"checkpoint_last{lost}.pt").unlink()
    refusal(DataError, message, tmp_path / "run", tmp_path / "opt")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    refusal(ConfigError, "there is no metaseq checkpoint", tmp_path, tmp_path / "opt")
    refusal(ConfigError, "there is no metaseq checkpoint", tmp_path / "consolidated.pt", tmp_path / "opt")


def test_a_whole_file_beside_shards_of_the_same_name_is_ambiguous(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM), n_shards=2)
    save(tmp_path / "run", decoder(PRE_NORM))
    refusal(ConfigError, "in one file and split over several", tmp_path / "run", tmp_path / "opt")
    import_metaseq(tmp_path / "run" / "checkpoint_last.pt", tmp_path / "opt")


# --- files that do not belong together ---


@pytest.mark.parametrize(("n_parts", "n_shards"), [(1, 2), (2, 1)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_updates": 501}, "has n_updates=500 and .* has 501: they are of different checkpoints"),
        ({"heads": 8}, "has settings={'decoder_layers': 3, 'decoder_attention_heads': 4.* different checkpoints"),
    ],
)
def test_files_of_different_runs_are_refused(tmp_path, n_parts, n_shards, change, message):
    save(tmp_path / "run", decoder(PRE_NORM), n_parts, n_shards)
    save(tmp_path / "other", decoder(PRE_NORM), n_parts, n_shards, **change)
    name = f"checkpoint_last-{'shard' if n_shards > 1 else 'model_part-'}1.pt"
    os.replace(tmp_path / "other" / name, tmp_path / "run" / name)
    refusal(DataError, message, tmp_path / "run", tmp_path / "opt")


def test_shards_that_divide_other_models_are_refused(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM), n_shards=2)
    save(tmp_path / "other", decoder(replace(PRE_NORM, n_positions=13)), n_shards=2)
    os.replace(tmp_path / "other" / "checkpoint_last-shard1.pt", tmp_path / "run" / "checkpoint_last-shard1.pt")
    refusal(DataError, "divide 'flat_param_0' differently", tmp_path / "run", tmp_path / "opt")


def test_shards_of_a_split_into_another_number_are_refused(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM), n_shards=4)
    save(tmp_path / "other", decoder(PRE_NORM), n_shards=2)
    os.replace(tmp_path / "other" / "checkpoint_last-shard1.pt", tmp_path / "run" / "checkpoint_last-shard1.pt")
    refusal(DataError, "4 shards from checkpoint_last-shard0.pt on hold", tmp_path / "run", tmp_path / "opt")


def test_model_parts_whose_replicas_have_nothing_in_common_are_refused(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM), 2)
    save(tmp_path / "other", decoder(PRE_NORM, seed=1), 2)
    name = "checkpoint_last-model_part-1.pt"
    os.replace(tmp_path / "other" / name, tmp_path / "run" / name)
    refusal(DataError, "different copies of 'decoder.embed_positions.weight'", tmp_path / "run", tmp_path / "opt")


def test_a_shard_without_its_metadata_is_refused(tmp_path):
    for shard, (weights, _) in enumerate(fsdp_shards(decoder(PRE_NORM), 2)):
        torch.save(checkpoint(weights), tmp_path / f"a-shard{shard}.pt")
    refusal(DataError, "without shard_metadata, so its flat parameters", tmp_path / "a", tmp_path / "opt")


@pytest.mark.parametrize("metadata", [{"param_metadata": [{}]}, {"param_metadata": [{"fsdp_path": "", "params": 3}]}])
def test_metadata_that_fairscale_does_not_write_is_refused(tmp_path, metadata):
    for shard, (weights, _) in enumerate(fsdp_shards(decoder(PRE_NORM), 2)):
        torch.save(checkpoint(weights, shard_metadata=metadata), tmp_path / f"a-shard{shard}.pt")
    refusal(DataError, "its shard_metadata is not what fairscale writes", tmp_path / "a", tmp_path / "opt")


# --- damaged and foreign files ---


class Malice:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save(checkpoint(decoder(PRE_NORM), extra=Malice()), "a.pt", _use_new_zipfile_serialization=zipped)
        refusal(DataError, r"a.pt holds (posix|nt).system, which is neither", tmp_path / "a.pt", tmp_path / "opt")
    assert not (tmp_path / "pwned").exists()


def test_a_checkpoint_with_a_class_beyond_namespace_is_refused(tmp_path):
    torch.save(checkpoint(decoder(PRE_NORM), cfg_class=PRE_NORM), tmp_path / "a.pt")
    refusal(DataError, r"a.pt holds cbtm.branch.shapes.OptShape, which", tmp_path / "a.pt", tmp_path / "opt")
    from torch.serialization import get_safe_globals

    assert Namespace not in get_safe_globals()  # allowed while a checkpoint is read, and not after


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    save(tmp_path, decoder(PRE_NORM), stem="a")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refusal(
        DataError, "a.pt cannot be read as a torch checkpoint: .*; copy it again", tmp_path / "a.pt", tmp_path / "opt"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a checkpoint"),
        ({"model": {}}, "holds no state dict"),
        ({"model": {"decoder.version": 3}}, "'decoder.version' of the model is a int, not a dense tensor"),
        ({"model": {"encoder.fc": torch.zeros(2)}}, "'encoder.fc' is no tensor of a metaseq decoder"),
        ({"model": {"decoder.fc": torch.zeros(2)}}, "no matrix 'model.decoder.embed_tokens.weight' among 1 tensors"),
    ],
)
def test_a_file_that_is_no_opt_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    refusal(DataError, message, tmp_path / "a.pt", tmp_path / "opt")


def changed(**tensors):
    state = decoder(PRE_NORM)
    for name, tensor in tensors.items():
        state[f"decoder.{name.replace('__', '.')}"] = tensor
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(alibi=torch.zeros(4, 1, 1)), "1 tensors are none of an OPT .* 'model.decoder.alibi'"),
        (changed(output_projection__weight=torch.zeros(40, 32)), "is not the word embedding"),
        (changed(output_projection__weight=torch.zeros(41, 32)), "is not the word embedding"),
        (changed(final_layer_norm__bias=torch.zeros(32)), "two tensors are 'model.decoder.final_layer_norm.bias'"),
        (changed(layer_norm__bias=torch.zeros(32).long()), r"holds torch.int64, not float16"),
        (changed(layer_norm__bias=torch.full((32,), math.nan)), "holds NaN or infinity"),
        (changed(layers__0__self_attn__qkv_proj__bias=torch.zeros(96)), "there twice, fused and separate"),
        (
            changed(layers__3__self_attn__qkv_proj__bias=torch.zeros(97)),
            r"of shape \(97,\) is not query, key and value",
        ),
    ],
)
def test_tensors_that_opt_does_not_have_are_refused(tmp_path, state, message):
    torch.save(checkpoint(state), tmp_path / "a.pt")
    refusal(DataError, message, tmp_path / "a.pt", tmp_path / "opt")


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_fn": "gelu"},
        {"no_scale_embedding": False},
        {"decoder_layers": 4},
        {"decoder_normalize_before": False},
        {"share_decoder_input_output_embed": False},
    ],
)
def test_settings_under_which_opt_would_compute_something_else_are_refused(tmp_path, settings):
    save(tmp_path, decoder(PRE_NORM), stem="a", settings=settings)
    ((name, value),) = settings.items()
    refusal(
        DataError, f"trained with {name}={value!r}, and an OPT .* something else", tmp_path / "a.pt", tmp_path / "opt"
    )


def test_heads_come_from_the_checkpoint_or_the_caller(tmp_path):
    state = decoder(PRE_NORM)
    torch.save({"model": state}, tmp_path / "a.pt")
    refusal(
        ConfigError, "a.pt: no published OPT has 3 layers of 32.* give it as heads", tmp_path / "a.pt", tmp_path / "o"
    )
    assert import_metaseq(tmp_path / "a.pt", tmp_path / "opt", heads=8)["n_heads"] == 8
    torch.save(checkpoint(state), tmp_path / "a.pt")
    refusal(ConfigError, "heads=8, but .*a.pt was trained with 4", tmp_path / "a.pt", tmp_path / "o", heads=8)


# --- the folder and the tokenizer ---


def test_a_folder_that_holds_files_is_left_alone(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM))
    (tmp_path / "opt").mkdir()
    import_metaseq(tmp_path / "run", tmp_path / "opt")  # empty is well
    with pytest.raises(ConfigError, match="is not an empty folder"):
        import_metaseq(tmp_path / "run", tmp_path / "opt")


def test_a_folder_that_cannot_be_made_is_the_operators_to_mend(tmp_path):
    save(tmp_path / "run", decoder(PRE_NORM))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"opt cannot be written: .*; check space and permissions"):
        import_metaseq(tmp_path / "run", tmp_path / "file" / "opt")


def bpe(folder, specials=("<s>", "<pad>", "</s>", "<unk>"), words=30, names=("gpt2-vocab.json", "gpt2-merges.txt")):
    """A byte-level BPE of single letters, with metaseq's special tokens first."""
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate((*specials, *map(chr, range(97, 97 + words))))}
    (folder / names[0]).write_text(json.dumps(vocabulary))
    (folder / names[1]).write_text("#version: 0.2\n")
    return folder


def test_metaseqs_tokenizer_becomes_one_that_begins_documents_with_its_separator(tmp_path):
    from transformers import AutoTokenizer

    from cbtm.branch.tokenizer import TextTokenizer

    save(tmp_path / "run", decoder(PRE_NORM))
    import_metaseq(tmp_path / "run", tmp_path / "opt", tokenizer=bpe(tmp_path / "bpe"))
    ours = TextTokenizer.load(tmp_path / "opt")
    assert (ours.separator, ours.separator_id, ours.vocab_size) == ("</s>", 2, 34)
    assert ours.encode_batch(["abc"])[0].tolist() == [2, 4, 5, 6]
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "opt"))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 2, 1)
    assert theirs("abc", add_special_tokens=False)["input_ids"] == [4, 5, 6]


def test_a_tokenizer_that_names_its_bos_is_taken_at_its_word(tmp_path):
    folder = bpe(tmp_path / "bpe", names=("vocab.json", "merges.txt"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    save(tmp_path / "run", decoder(PRE_NORM))
    import_metaseq(tmp_path / "run", tmp_path / "opt", tokenizer=folder)
    assert json.loads((tmp_path / "opt" / "config.json").read_text())["bos_token_id"] == 0
    assert json.loads((tmp_path / "opt" / "tokenizer_config.json").read_text()) == {"bos_token": "<s>"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: bpe(path, words=60), "the tokenizer has 64 entries but the seed model's vocabulary is 40"),
        (lambda path: bpe(path, specials=("<|endoftext|>",)), "whose documents begin with </s>: .* no token '</s>'"),
        (lambda path: bpe(path, specials=("</s>",)), "</s> has id 0, and metaseq's models have 2"),
        (lambda path: path, "is not a folder"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path, make, message):
    save(tmp_path / "run", decoder(PRE_NORM))
    refusal(ConfigError, message, tmp_path / "run", tmp_path / "opt", tokenizer=make(tmp_path / "bpe"))


def test_what_is_no_opt_does_not_get_metaseqs_names():
    weights = {name: torch.zeros(shape) for name, shape in PRE_NORM.tensor_shapes().items()}
    with pytest.raises(DataError, match=r"lm_head\.weight is not the word embedding"):
        to_metaseq({**weights, "lm_head.weight": torch.ones(40, 32)})
    with pytest.raises(CbtmError, match="1 tensors are none of an OPT"):
        to_metaseq({**weights, "model.decoder.extra": torch.zeros(1)})
