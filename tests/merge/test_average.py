import itertools
import json
import math
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbtm.branch.seed import ScratchModelConfig, create_model, load_model, save_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError, DataError
from cbtm.merge.average import AverageConfig, average_models, greedy_soup

CONTEXT = 8
SHAPE = {"hidden_size": 16, "n_layers": 2, "n_heads": 2}
EMBEDDING = "model.decoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["abc def ghi " * 30], 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders of three tiny OPTs with different weights; the first has the tokenizer beside it."""
    root = tmp_path_factory.mktemp("models")
    for number in range(3):
        save_model(make_model(tokenizer, random_state=number), root / str(number))
    tokenizer.save(root / "0")
    return [root / str(number) for number in range(3)]


def make_model(tokenizer, **shape):
    return create_model(
        ScratchModelConfig(**(SHAPE | shape)),
        vocab_size=tokenizer.vocab_size,
        separator_id=tokenizer.separator_id,
        context_length=CONTEXT,
    )


def averaged(folders, weights, output):
    output.mkdir()
    average_models(folders, weights, output)
    return load_file(output / "model.safetensors")


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def logits(model, tokenizer):
    tokens = torch.tensor([tokenizer.encode_batch(["abc def"])[0].tolist()])
    with torch.no_grad():
        return model(tokens).logits


def changed(folder: Path, output: Path, changes) -> Path:
    """A copy of a model with other tensors; None takes one away."""
    output.mkdir()
    for path in folder.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    tensors = weights_of(folder) | changes
    kept = {name: values for name, values in tensors.items() if values is not None}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
    return output


# --- the mean ---


def test_mean_is_that_of_every_tensor(models, tmp_path):
    found = averaged(models, [1, 1, 1], tmp_path / "mean")
    parts = [weights_of(folder) for folder in models]
    assert found.keys() == parts[0].keys()
    for name, values in found.items():
        assert values.dtype == torch.float32
        expected = sum(part[name].double() for part in parts) / 3
        torch.testing.assert_close(values, expected.float(), rtol=1e-6, atol=1e-9)
    assert not torch.equal(found[EMBEDDING], parts[0][EMBEDDING])


def test_weights_are_divided_by_their_sum(models, tmp_path):
    # 3 and 1 are three quarters and one quarter.
    found = averaged(models[:2], [3, 1], tmp_path / "mean")[EMBEDDING]
    first, second = (weights_of(folder)[EMBEDDING] for folder in models[:2])
    torch.testing.assert_close(found, 0.75 * first + 0.25 * second)
    again = averaged(models[:2], [0.3, 0.1], tmp_path / "again")[EMBEDDING]
    torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-9)


def test_average_of_one_model_is_that_model(models, tmp_path):
    found, there = averaged(models[1:2], [0.1], tmp_path / "mean"), weights_of(models[1])
    assert found.keys() == there.keys()
    assert all(torch.equal(found[name], there[name]) for name in found)


def test_sums_are_exact_beyond_float32(models, tmp_path):
    # A running sum in float32 has steps of 1/2 at 2^24 / 3, and would leave 2/3.
    values = [2.0**24, 1.0, -(2.0**24)]
    folders = [changed(models[0], tmp_path / str(n), {"extra": torch.tensor([one])}) for n, one in enumerate(values)]
    found = averaged(folders, [1, 1, 1], tmp_path / "mean")["extra"]
    assert found.item() == pytest.approx(1 / 3, rel=1e-6)


def test_type_of_the_tensors_is_kept(models, tmp_path):
    halves = [{name: values.bfloat16() for name, values in weights_of(folder).items()} for folder in models[:2]]
    folders = [changed(models[n], tmp_path / str(n), half) for n, half in enumerate(halves)]
    for name, values in averaged(folders, [1, 1], tmp_path / "mean").items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, ((halves[0][name].double() + halves[1][name].double()) / 2).bfloat16())


def test_model_of_weight_0_is_not_opened(models, tmp_path):
    # There is no such folder, be it the first or not.
    found = averaged([tmp_path / "none", models[1], models[2], tmp_path / "none"], [0, 1, 1, 0], tmp_path / "mean")
    expected = averaged(models[1:], [1, 1], tmp_path / "expected")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "mean/config.json").read_bytes() == (models[1] / "config.json").read_bytes()


def test_models_of_opposite_weights_cancel(models, tmp_path):
    opposite = {name: -values for name, values in weights_of(models[0]).items()}
    folders = [models[0], changed(models[0], tmp_path / "opposite", opposite)]
    for values in averaged(folders, [1, 1], tmp_path / "mean").values():
        assert not values.any()


# --- the folder ---


def test_folder_opens_as_a_model_with_its_tokenizer(models, tmp_path, tokenizer):
    found = averaged(models, [1, 1, 1], tmp_path / "mean")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mean", use_safetensors=True)
    for name, values in model.state_dict().items():
        if name in found:
            assert torch.equal(values, found[name])
    opened = AutoTokenizer.from_pretrained(tmp_path / "mean")
    assert opened("abc def")["input_ids"] == tokenizer.encode_batch(["abc def"])[0][1:].tolist()
    # What an expert says of itself is not true of an average.
    assert {path.name for path in (tmp_path / "mean").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }


def test_without_a_tokenizer_there_is_none(models, tmp_path):
    averaged(models[1:], [1, 1], tmp_path / "mean")
    assert not list((tmp_path / "mean").glob("tokenizer*"))
    load_model(tmp_path / "mean")


def test_tied_weights_stay_tied(models, tmp_path, tokenizer):
    found = averaged(models, [1, 1, 1], tmp_path / "mean")
    assert "lm_head.weight" not in found  # stored once, as in the models
    model = load_model(tmp_path / "mean")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, found[EMBEDDING])


def test_head_of_its_own_is_averaged_by_itself(tmp_path, tokenizer):
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "llama.json").write_text(json.dumps(config))
    made = [
        create_model(
            ScratchModelConfig(config=str(tmp_path / "llama.json"), random_state=number),
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            context_length=CONTEXT,
        )
        for number in range(2)
    ]
    for number, model in enumerate(made):
        save_model(model, tmp_path / str(number))
    averaged([tmp_path / "0", tmp_path / "1"], [1, 1], tmp_path / "mean")
    head = load_model(tmp_path / "mean").get_output_embeddings().weight
    expected = (made[0].get_output_embeddings().weight + made[1].get_output_embeddings().weight) / 2
    torch.testing.assert_close(head, expected)


def test_sharded_models_are_averaged_as_whole_ones(models, tmp_path, tokenizer):
    for number in range(2):
        make_model(tokenizer, random_state=number).save_pretrained(tmp_path / str(number), max_shard_size="20KB")
        assert len(list((tmp_path / str(number)).glob("model-*.safetensors"))) > 1
    found = averaged([tmp_path / "0", tmp_path / "1"], [1, 1], tmp_path / "mean")
    expected = averaged(models[:2], [1, 1], tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_large_average_is_sharded_and_opens_the_same(models, tmp_path, tokenizer, monkeypatch):
    averaged(models, [1, 1, 1], tmp_path / "whole")
    real = huggingface_hub.save_torch_state_dict
    monkeypatch.setattr(  # 5 GB are too many for a test
        huggingface_hub,
        "save_torch_state_dict",
        lambda tensors, folder, **options: real(tensors, folder, **(options | {"max_shard_size": "20KB"})),
    )
    (tmp_path / "mean").mkdir()
    average_models(models, [1, 1, 1], tmp_path / "mean")
    index = json.loads((tmp_path / "mean/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not (tmp_path / "mean/model.safetensors").exists()
    torch.testing.assert_close(
        logits(load_model(tmp_path / "mean"), tokenizer), logits(load_model(tmp_path / "whole"), tokenizer)
    )


# --- what has no average ---


def test_whole_numbers_are_taken_over(models, tmp_path):
    ids = {"position_ids": torch.arange(5), "mask": torch.tensor([True, False])}
    folders = [changed(models[n], tmp_path / str(n), ids) for n in range(2)]
    found = averaged(folders, [1, 1], tmp_path / "mean")
    assert found["position_ids"].dtype == torch.int64
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert found["mask"].tolist() == [True, False]


def test_whole_numbers_that_differ_are_refused(models, tmp_path):
    folders = [changed(models[n], tmp_path / str(n), {"position_ids": torch.arange(5) + n}) for n in range(2)]
    with pytest.raises(DataError, match="position_ids holds whole numbers that differ between the models"):
        averaged(folders, [1, 1], tmp_path / "mean")


def test_models_of_different_sizes_are_refused(models, tmp_path, tokenizer):
    save_model(make_model(tokenizer, hidden_size=32), tmp_path / "wide")
    with pytest.raises(DataError, match=r"has shape \[.*16.*\] in .*/0 and \[.*32.*\] in .*/wide: models of different"):
        averaged([models[0], tmp_path / "wide"], [1, 1], tmp_path / "mean")
    assert not (tmp_path / "mean/config.json").exists()  # before anything is written


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_of_other_tensors_are_refused(models, tmp_path, order):
    folders = [models[0], changed(models[1], tmp_path / "more", {"extra": torch.zeros(2)})]
    with pytest.raises(DataError, match=r"extra is in one of .* alone: models of different architectures have no av"):
        averaged([folders[place] for place in order], [1, 1], tmp_path / "mean")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_average_that_is_not_finite_is_refused(models, tmp_path, wrong):
    broken = weights_of(models[1])[EMBEDDING].clone()
    broken[3, 2] = wrong
    folders = [models[0], changed(models[1], tmp_path / "broken", {EMBEDDING: broken})]
    with pytest.raises(DataError, match=f"{EMBEDDING} is not finite in the average: the weights of one of the models"):
        averaged(folders, [1, 1], tmp_path / "mean")
    # Without weight it does no harm.
    averaged(folders, [1, 0], tmp_path / "first")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "2 weights for 3 models; give one for each"),
        ([0, 0, 0], r"weights \[0, 0, 0\] are not numbers of at least 0 with a finite sum above 0"),
        ([2, -1, 1], r"weights \[2, -1, 1\] are not numbers of at least 0"),
        ([1, math.nan, 1], r"weights \[1, nan, 1\] are not numbers of at least 0"),
        ([1, math.inf, 1], r"weights \[1, inf, 1\] are not numbers of at least 0"),
    ],
)
def test_weights_that_are_none_are_refused(models, tmp_path, weights, message):
    with pytest.raises(ConfigError, match=message):
        averaged(models, weights, tmp_path / "mean")


def test_no_model_has_no_average(tmp_path):
    with pytest.raises(ConfigError, match="no model to average; give at least one"):
        averaged([], [], tmp_path / "mean")


def test_folder_without_safetensors_is_refused(models, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"/pickled has no \*\.safetensors weights"):
        averaged([models[0], tmp_path / "pickled"], [1, 1], tmp_path / "mean")


# --- the greedy soup ---


def soup_by_hand(order, loss_of):
    """The soup by its definition, with `loss_of(clusters)`, and the sets that were tried."""
    chosen, best, tried = (), math.inf, []
    for cluster in order:
        loss = loss_of((*chosen, cluster))
        tried.append((*chosen, cluster))
        if not chosen or loss <= best:
            chosen, best = (*chosen, cluster), loss
    return list(chosen), tried


def make_soup(models, order, loss, tmp_path):
    """Soup of the tiny models, with the mean of the embedding of each candidate as what is evaluated."""
    output = tmp_path / "soup"
    output.mkdir()
    seen = []

    def evaluate(folder):
        seen.append(weights_of(folder)[EMBEDDING])
        return loss(seen[-1])

    facts = greedy_soup(dict(enumerate(models)), order, evaluate, output, tmp_path / "candidate")
    return facts, seen, weights_of(output)


def embedding_mean(models, clusters):
    return sum(weights_of(models[one])[EMBEDDING].double() for one in clusters) / len(clusters)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("target", [(0, 1), (2,), (0, 1, 2)], ids=str)
def test_soup_is_that_of_brute_force(models, tmp_path, order, target):
    # The loss is the distance from the mean of some of the models, so those help and others hurt.
    aim = embedding_mean(models, target)
    facts, seen, found = make_soup(models, order, lambda values: float((values - aim).norm()), tmp_path)
    chosen, tried = soup_by_hand(order, lambda clusters: float((embedding_mean(models, clusters) - aim).norm()))
    assert facts["chosen"] == chosen
    assert [(one["cluster"], one["kept"]) for one in facts["tried"]] == [(one, one in chosen) for one in order]
    for values, clusters, fact in zip(seen, tried, facts["tried"], strict=True):
        expected = embedding_mean(models, clusters)
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-8)
        assert fact["negative_log_prob"] == pytest.approx(float((expected - aim).norm()), abs=1e-6)
    torch.testing.assert_close(found[EMBEDDING].double(), embedding_mean(models, chosen), rtol=1e-6, atol=1e-8)
    load_model(tmp_path / "soup")
    assert not (tmp_path / "candidate").exists()


def test_model_that_hurts_is_left_out_and_one_that_changes_nothing_is_kept(models, tmp_path):
    losses = iter([2.0, 3.0, 2.0])
    facts, seen, found = make_soup(models, [2, 0, 1], lambda values: next(losses), tmp_path)
    assert facts == {
        "chosen": [2, 1],
        "tried": [
            {"cluster": 2, "negative_log_prob": 2.0, "kept": True},
            {"cluster": 0, "negative_log_prob": 3.0, "kept": False},
            {"cluster": 1, "negative_log_prob": 2.0, "kept": True},
        ],
    }
    # The third is tried with the first alone.
    torch.testing.assert_close(seen[2].double(), embedding_mean(models, (2, 1)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[EMBEDDING], seen[2])


def test_first_model_is_kept_whatever_its_loss(models, tmp_path):
    losses = iter([math.inf, 5.0])
    facts, _, _ = make_soup(models, [1, 0], lambda values: next(losses), tmp_path)
    assert facts["tried"][0] == {"cluster": 1, "negative_log_prob": None, "kept": True}
    assert facts["chosen"] == [1, 0]
    json.dumps(facts, allow_nan=False)


def test_soup_of_one_is_that_model(models, tmp_path):
    facts, _, found = make_soup(models, [2], lambda values: 1.0, tmp_path)
    assert facts["chosen"] == [2]
    assert all(torch.equal(found[name], values) for name, values in weights_of(models[2]).items())


def test_soup_that_was_killed_is_made_again(models, tmp_path):
    (tmp_path / "candidate").mkdir()
    (tmp_path / "candidate/model-00001-of-00002.safetensors").write_bytes(b"cut short")
    facts, _, _ = make_soup(models, [0, 1], lambda values: 1.0, tmp_path)
    assert facts["chosen"] == [0, 1]


def test_no_expert_makes_no_soup(tmp_path):
    with pytest.raises(ConfigError, match="no expert to make a soup of; train at least one"):
        greedy_soup({}, [], lambda folder: 1.0, tmp_path, tmp_path / "candidate")


# --- settings ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"averages": ["uniform", "uniform"]}, r"averages are \['uniform', 'uniform'\], one of them twice"),
        ({"averages": ["mean"]}, "averages"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"distance_power": -1}, "distance_power: Input should be greater than 0"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        AverageConfig.parse(values)


def test_weights_depend_on_temperature_and_exponent_alone():
    plain = AverageConfig()
    assert AverageConfig(averages=("weighted", "greedy")).weighting_digest() == plain.weighting_digest()
    assert AverageConfig(temperature=0.2).weighting_digest() != plain.weighting_digest()
    assert AverageConfig(distance_power=4).weighting_digest() != plain.weighting_digest()
