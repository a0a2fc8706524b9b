import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbtm.branch.seed import ScratchModelConfig, check_vocabulary, create_model, load_model, model_files, save_model
from cbtm.errors import ConfigError

TINY = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)


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
