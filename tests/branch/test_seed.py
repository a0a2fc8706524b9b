import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbtm import storage
from cbtm.branch import seed
from cbtm.branch.seed import (
    ScratchModelConfig,
    check_scratch,
    check_vocabulary,
    create_model,
    load_model,
    model_files,
    save_model,
    set_dropout,
)
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.config import digest_of
from cbtm.errors import ConfigError, StorageError

TINY = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
WIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
SHAPES = {
    "llama": {**WIDE, "intermediate_size": 32},
    "qwen2": {**WIDE, "intermediate_size": 32, "num_key_value_heads": 1},
    "gpt_neox": {**WIDE, "intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "opt": {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Words:
    """An encoder of which only the size matters."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def encode_batch(self, texts):
        raise NotImplementedError


def tiny(random_state=0, **changes):
    config = TINY.model_copy(update={"random_state": random_state, **changes})
    return create_model(config, vocab_size=300, separator_id=7, context_length=16)


def equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def config_file(folder, **settings):
    path = folder / "shape.json"
    path.write_text(json.dumps(settings))
    seed._content.cache_clear()
    return str(path)


def described(folder, kind, *, rate=0.0, random_state=0, context_length=16, **changes):
    path = config_file(folder, model_type=kind, **SHAPES.get(kind, {}), **changes)
    config = ScratchModelConfig(config=path, dropout=rate, random_state=random_state)
    return create_model(config, vocab_size=300, separator_id=7, context_length=context_length)


def losses(model):
    """Loss of the same sixteen tokens, twice."""
    tokens = torch.arange(16)[None]
    return [model(tokens, labels=tokens).loss.item() for _ in range(2)]


def folder_of(settings, folder):
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    assert equal(tiny(3), tiny(3))
    assert not equal(tiny(3), tiny(4))


def test_global_generator_is_left_as_it_was():
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first = tiny(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert equal(tiny(3), first)  # nor does the model depend on it


def test_shape_is_what_the_configuration_says():
    model = create_model(
        ScratchModelConfig(hidden_size=24, n_layers=2, n_heads=3, feed_forward_ratio=2, dropout=0.25),
        vocab_size=301,
        separator_id=7,
        context_length=10,
    )
    settings = model.config
    assert (settings.hidden_size, settings.num_hidden_layers, settings.num_attention_heads) == (24, 2, 3)
    assert (settings.ffn_dim, settings.dropout, settings.max_position_embeddings) == (48, 0.25, 10)
    assert (settings.bos_token_id, settings.eos_token_id) == (7, 7)
    # Ten positions are ten: the longest context goes through.
    assert model(torch.zeros((1, 10), dtype=torch.int64)).logits.shape == (1, 10, 301)
    # No embedding is a padding one that gets no gradient: token 1, OPT's padding, is a word like others here.
    assert model.get_input_embeddings().padding_idx is None


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="hidden_size=10 is not a multiple of n_heads=4"):
        ScratchModelConfig.parse({"hidden_size": 10, "n_heads": 4})


def test_saved_model_opens_with_the_same_weights(tmp_path):
    model = tiny()
    save_model(model, tmp_path)
    opened = load_model(tmp_path)
    assert equal(model, opened)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]


def test_half_precision_weights_are_opened_in_float32(tmp_path):
    save_model(tiny().half(), tmp_path)
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.float32}


def test_no_progress_bar_is_drawn(tmp_path, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_progress_bar()
    save_model(tiny(), tmp_path)
    transformers_logging.enable_progress_bar()
    load_model(tmp_path)
    assert "%|" not in capfd.readouterr().err


def test_save_takes_transformers_models_only(tmp_path):
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path)


def test_model_files_are_configuration_and_safetensors():
    names = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "pytorch_model.bin",
        "tokenizer.json",
        "onnx/model.safetensors",
        "README.md",
    ]
    assert model_files(names) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_weights_that_stand_twice_are_taken_once():
    assert model_files(["config.json", "model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]) == [
        "config.json",
        "model.safetensors",
    ]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = "model.safetensors.index.json"
    assert model_files(["config.json", index, *shards, "consolidated.safetensors"]) == sorted(
        ["config.json", index, *shards]
    )


def test_pickled_weights_alone_are_refused():
    with pytest.raises(ConfigError, match=r"no \*\.safetensors weights; pickled weights are not read: save the model"):
        model_files(["config.json", "pytorch_model.bin"])


def test_folder_without_a_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"no config\.json; seed_model\.path takes a Hugging Face folder"):
        model_files(["model.safetensors"])


def test_pickled_weights_are_not_opened(tmp_path):
    save_model(tiny(), tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be opened as a causal language model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"not safetensors at all"),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "no-such-model"}'),
    ],
)
def test_damaged_folder_is_refused(tmp_path, name, content):
    save_model(tiny(), tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be opened as a causal language model"):
        load_model(tmp_path)


def test_weights_cut_short_are_refused(tmp_path):
    save_model(tiny(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be opened as a causal language model"):
        load_model(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    save_model(tiny(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    folder_of({**settings, "ffn_dim": 8}, tmp_path)
    with pytest.raises(ConfigError, match="cannot be opened as a causal language model"):
        load_model(tmp_path)


def test_missing_weights_are_not_made_up(tmp_path):
    # transformers fills a missing tensor with random numbers and goes on with a warning.
    save_model(tiny(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.weight"))
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no weights for 1 tensors of its model, such as .*fc1\.weight"):
        load_model(tmp_path)


def test_tokenizer_larger_than_the_vocabulary_is_refused_with_both_numbers(tmp_path):
    folder_of({"vocab_size": 300, "max_position_embeddings": 16}, tmp_path)
    check_vocabulary(tmp_path, Words(300), 16)
    with pytest.raises(ConfigError, match="the tokenizer has 301 entries but the seed model's vocabulary is 300"):
        check_vocabulary(tmp_path, Words(301), 16)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_context_longer_than_the_models_is_refused(tmp_path, key):
    folder_of({"vocab_size": 300, key: 16}, tmp_path)
    with pytest.raises(
        ConfigError, match="context_length=17 is longer than the seed model's 16 positions; use at most"
    ):
        check_vocabulary(tmp_path, Words(300), 17)


def test_numbers_of_a_multimodal_models_text_part_count(tmp_path):
    folder_of({"vocab_size": 9, "text_config": {"vocab_size": 300, "max_position_embeddings": 16}}, tmp_path)
    check_vocabulary(tmp_path, Words(300), 16)
    with pytest.raises(ConfigError, match="vocabulary is 300"):
        check_vocabulary(tmp_path, Words(301), 16)


def test_model_without_a_longest_context_takes_any(tmp_path):
    folder_of({"vocab_size": 300}, tmp_path)
    check_vocabulary(tmp_path, Words(300), 100_000)


def test_a_published_size_stands_for_its_numbers():
    shape = ScratchModelConfig(size="125m").shape()
    assert (shape["num_hidden_layers"], shape["hidden_size"], shape["num_attention_heads"]) == (12, 768, 12)
    with pytest.raises(ConfigError, match=r"size=125m and n_layers=3: give a size or numbers"):
        ScratchModelConfig.parse({"size": "125m", "n_layers": 3})
    with pytest.raises(ConfigError, match=r"1\.3b"):
        ScratchModelConfig.parse({"size": "1.3"})
    # A checked configuration is passed on with every default.
    assert ScratchModelConfig.parse(ScratchModelConfig(size="125m").model_dump()).size == "125m"


def test_a_model_of_a_published_size_has_its_shape_and_the_tokenizer_s_vocabulary():
    model = create_model(ScratchModelConfig(size="125m"), vocab_size=50, separator_id=0, context_length=16)
    # 12 layers of 768, 16 + 2 positions, 50 words: 12 * (4 * 768^2 + 4 * 768 + 8 * 768^2 + 5 * 768 + 4 * 768) …
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert sum(parameter.numel() for parameter in model.parameters()) == 12 * layer + (50 + 18) * 768 + 2 * 768


@pytest.mark.parametrize("kind", SHAPES)
def test_config_file_gives_a_model_of_its_architecture(tmp_path, kind):
    model = described(tmp_path, kind, dtype="bfloat16", torch_dtype="float16", pad_token_id=3, bos_token_id=1)
    settings = model.config
    assert settings.model_type == kind
    assert model(torch.zeros((1, 16), dtype=torch.int64)).logits.shape == (1, 16, 300)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (7, 7, None)
    assert equal(model, described(tmp_path, kind))
    assert not equal(model, described(tmp_path, kind, random_state=1))


def test_config_file_of_an_opt_gives_the_model_of_the_same_numbers(tmp_path):
    # 64 = 4 * 16, the feed-forward width of TINY.
    path = config_file(tmp_path, model_type="opt", **{**SHAPES["opt"], "ffn_dim": 64})
    model = create_model(ScratchModelConfig(config=path), vocab_size=300, separator_id=7, context_length=16)
    assert equal(model, tiny())


def test_what_a_config_file_says_beside_the_shape_is_left_out(tmp_path):
    # Quantisation would keep the trained model from being opened; auto_map names code that is never run.
    model = described(
        tmp_path,
        "llama",
        auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"},
        quantization_config={"quant_method": "gptq", "bits": 4},
    )
    save_model(model, tmp_path / "saved")
    assert not {"auto_map", "quantization_config"} & set(json.loads((tmp_path / "saved/config.json").read_text()))
    assert equal(load_model(tmp_path / "saved"), model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is no causal language model of transformers; did you mean 'llama'"),
        ({}, "model_type 'None' is no causal language model of transformers; use llama, qwen2"),
        ({"model_type": "vit"}, "model_type 'vit' is no causal language model"),
        ({"model_type": "t5"}, "model_type 't5' is no causal language model"),
        ({"model_type": "bert"}, "bert has an encoder, which sees later tokens; use a decoder such as llama"),
        ({"model_type": "bart"}, "bart has an encoder"),
        ({"model_type": "gemma3"}, "gemma3 reads more than text; give the configuration of its text model alone"),
        ({"model_type": "git"}, "git reads more than text"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot be read as the configuration of a llama"),
        ({"model_type": "llama", **WIDE, "num_attention_heads": 3}, "configuration of a llama: .* not a multiple"),
    ],
)
def test_config_file_of_no_causal_language_model_is_refused(tmp_path, settings, message):
    config = ScratchModelConfig(config=config_file(tmp_path, **settings))
    with pytest.raises(ConfigError, match=message) as caught:
        create_model(config, vocab_size=300, separator_id=7, context_length=16)
    assert str(tmp_path / "shape.json") in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"{", "is not JSON"), (b"[1]", "expected the JSON object of a con")])
def test_config_file_that_is_no_object_is_refused(tmp_path, content, message):
    config = ScratchModelConfig(config=config_file(tmp_path))
    (tmp_path / "shape.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check_scratch(config, 16)


def test_config_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=f"{tmp_path}/none.json is not there"):
        check_scratch(ScratchModelConfig(config=f"{tmp_path}/none.json"), 16)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_context_longer_than_the_config_files_positions_is_refused_before_training(tmp_path, kind):
    config = ScratchModelConfig(config=config_file(tmp_path, model_type=kind, **SHAPES[kind]))
    check_scratch(config, 16)
    with pytest.raises(ConfigError, match="context_length=17 is longer than the seed model's 16 positions; use at mos"):
        check_scratch(config, 17)


def test_bert_as_a_decoder_is_a_causal_language_model(tmp_path):
    model = described(tmp_path, "bert", is_decoder=True, intermediate_size=32, **WIDE).eval()
    one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 9]])
    assert torch.equal(model(one).logits[:, :2], model(other).logits[:, :2])  # a later token changes nothing before


def test_size_file_and_numbers_exclude_each_other():
    with pytest.raises(ConfigError, match=r"size=125m and config=a\.json: give one of them"):
        ScratchModelConfig.parse({"size": "125m", "config": "a.json"})
    with pytest.raises(ConfigError, match=r"config=a\.json and n_heads=2: give a config or numbers"):
        ScratchModelConfig.parse({"config": "a.json", "n_heads": 2})


def test_digest_is_of_the_config_files_content_and_not_of_its_place(root, tmp_path):
    text = json.dumps({"model_type": "llama", **SHAPES["llama"]}).encode()
    storage.write_bytes(f"{root}/config.json", text)
    (tmp_path / "copy.json").write_bytes(text)
    one, copy = ScratchModelConfig(config=f"{root}/config.json"), ScratchModelConfig(config=f"{tmp_path}/copy.json")
    assert one.result_digest() == copy.result_digest()
    assert one.result_digest() != ScratchModelConfig(config=one.config, random_state=1).result_digest()
    storage.write_bytes(f"{root}/config.json", text + b" ")
    seed._content.cache_clear()  # another process
    assert one.result_digest() != copy.result_digest()


def test_digest_of_numbers_is_that_of_all_settings_but_the_file():
    # Written out, so that a new setting does not train existing seeds again unseen.
    settings = {"size": None, "hidden_size": 16, "n_layers": 1, "n_heads": 2, "feed_forward_ratio": 4}
    assert TINY.result_digest() == digest_of({**settings, "dropout": 0.0, "random_state": 0})


DROPOUT = {
    "llama": ["attention_dropout"],
    "qwen2": ["attention_dropout"],
    "gpt_neox": ["attention_dropout", "hidden_dropout"],
    "gpt2": ["attn_pdrop", "resid_pdrop"],
    "opt": ["attention_dropout", "dropout"],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_dropout_acts_in_training_and_not_in_scoring(tmp_path, kind):
    save_model(described(tmp_path, kind), tmp_path / "model")
    for rate in (None, 0.0):
        first, second = losses(load_model(tmp_path / "model", dropout=rate).train())
        assert first == second
    model = load_model(tmp_path / "model", dropout=0.3)
    torch.manual_seed(0)
    first, second = losses(model.train())
    assert first != second
    scored = losses(model.eval())
    assert scored[0] == scored[1] == losses(load_model(tmp_path / "model").eval())[0]
    found = {name: value for name, value in model.config.to_dict().items() if value == 0.3}
    assert sorted(found) == DROPOUT[kind]


def test_dropout_of_a_config_file_gives_way(tmp_path):
    rates = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2, "summary_first_dropout": 0.2}
    for rate in (0.0, 0.1):
        settings = described(tmp_path, "gpt2", rate=rate, **rates).config
        # None on embeddings, as in the reference; a summary head is no part of a language model.
        assert (settings.resid_pdrop, settings.attn_pdrop, settings.embd_pdrop) == (rate, rate, 0.0)
        assert settings.summary_first_dropout == 0.2


def test_dropout_is_set_in_nested_configurations():
    from transformers import DbrxConfig

    settings = DbrxConfig()
    assert set_dropout(settings, 0.25) == ["attn_config.attn_pdrop", "resid_pdrop"]
    assert (settings.attn_config.attn_pdrop, settings.resid_pdrop, settings.emb_pdrop) == (0.25, 0.25, 0.0)


def test_trained_model_says_which_dropout_it_was_trained_with(tmp_path):
    save_model(tiny(), tmp_path / "seed")
    save_model(load_model(tmp_path / "seed", dropout=0.1), tmp_path / "expert")
    assert json.loads((tmp_path / "expert/config.json").read_text())["attention_dropout"] == 0.1
    assert json.loads((tmp_path / "seed/config.json").read_text())["attention_dropout"] == 0.0


def test_architecture_without_dropout_is_refused_unless_there_shall_be_none(tmp_path):
    model = described(tmp_path, "mamba", hidden_size=16, num_hidden_layers=1, state_size=4)
    save_model(model, tmp_path / "model")
    assert equal(load_model(tmp_path / "model", dropout=0.0), model)
    with pytest.raises(ConfigError, match=r"dropout=0\.1, but model_type 'mamba' has no dropout; leave it out"):
        load_model(tmp_path / "model", dropout=0.1)


def test_separator_beyond_the_models_vocabulary_is_refused(tmp_path):
    # A separator that was added behind 300 entries has id 300, which a model of 300 rows has no embedding for.
    trained = TextTokenizer.train(["the cat sat on the mat"] * 3, 270)
    folder = tmp_path / "tokenizer"
    trained.save(folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    added = {**settings["added_tokens"][0], "id": trained.vocab_size, "content": "<|end|>"}
    (folder / "tokenizer.json").write_text(json.dumps({**settings, "added_tokens": [*settings["added_tokens"], added]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|end|>"}))
    given = TextTokenizer.load(folder)
    assert given.separator_id == trained.vocab_size
    folder_of({"vocab_size": trained.vocab_size}, tmp_path)
    with pytest.raises(ConfigError, match=f"has {trained.vocab_size + 1} entries but .* is {trained.vocab_size}:"):
        check_vocabulary(tmp_path, given, 16)


@pytest.mark.parametrize(("rows", "entries"), [(50272, 50265), (50304, 50257), (152064, 151643), (300, 172)])
def test_padding_of_a_vocabulary_is_no_reason_to_warn(tmp_path, caplog, rows, entries):
    check_vocabulary(folder_of({"vocab_size": rows}, tmp_path), Words(entries), 16)
    assert caplog.text == ""


def test_model_with_far_more_rows_than_the_tokenizer_is_warned_of(tmp_path, caplog):
    check_vocabulary(folder_of({"vocab_size": 50272}, tmp_path), Words(32000), 16)
    assert "the seed model's vocabulary is 50272 but the tokenizer has 32000 entries only" in caplog.text
