import pytest
import torch

from cbtm.branch.shapes import OPT_SIZES, OptShape, opt_shape, shape_of
from cbtm.errors import ConfigError, DataError

SMALL = OptShape(None, 2, 8, 2, 24, 8, vocab_size=11, n_positions=5)


def closed_form(layers, hidden, embedding, norm_first):
    """Parameters by arithmetic: four square matrices and two of 4h, their biases, and two layer norms a layer."""
    layer = 4 * (hidden**2 + hidden) + (4 * hidden**2 + 4 * hidden) + (4 * hidden**2 + hidden) + 2 * 2 * hidden
    around = 50272 * embedding + 2050 * hidden + (2 * hidden if norm_first else 0)
    return around + layers * layer + (2 * hidden * embedding if embedding != hidden else 0)


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "heads", "embedding", "n_parameters"),
    [
        # Layers, hidden size and heads of table 1 of arXiv:2205.01068; sums of the arithmetic above.
        ("125m", 12, 768, 12, 768, 125_239_296),
        ("350m", 24, 1024, 16, 512, 331_196_416),
        ("1.3b", 24, 2048, 32, 2048, 1_315_758_080),
        ("2.7b", 32, 2560, 32, 2560, 2_651_596_800),
        ("6.7b", 32, 4096, 32, 4096, 6_658_473_984),
        ("13b", 40, 5120, 40, 5120, 12_853_473_280),
        ("30b", 48, 7168, 56, 7168, 29_974_540_288),
        ("66b", 64, 9216, 72, 9216, 65_719_701_504),
    ],
)
def test_published_sizes_have_their_shape_and_number_of_parameters(
    size, layers, hidden, heads, embedding, n_parameters
):
    shape = opt_shape(size)
    assert (shape.size, shape.n_layers, shape.hidden_size, shape.n_heads) == (size, layers, hidden, heads)
    assert (shape.embedding_size, shape.feed_forward_size, shape.norm_first) == (embedding, 4 * hidden, size != "350m")
    assert shape.n_parameters == closed_form(layers, hidden, embedding, size != "350m") == n_parameters


@pytest.mark.parametrize("size", ["125m", "350m", "1.3b", "66b"])
def test_transformers_builds_the_same_tensors_from_the_configuration(size):
    from transformers.models.opt.configuration_opt import OPTConfig
    from transformers.models.opt.modeling_opt import OPTForCausalLM

    shape = opt_shape(size)
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**shape.to_config()))
    built = {name: tuple(weight.shape) for name, weight in model.named_parameters()}  # the tied head counts once
    assert built == shape.tensor_shapes()
    assert sum(weight.numel() for weight in model.parameters()) == shape.n_parameters
    assert model.config.num_attention_heads == shape.n_heads


@pytest.mark.parametrize("size", OPT_SIZES)
def test_a_published_size_is_recognised_by_its_tensors(size):
    assert shape_of(opt_shape(size).tensor_shapes()) == opt_shape(size)


def test_another_vocabulary_and_context_leave_the_size_as_it_is():
    shapes = opt_shape("125m").tensor_shapes()
    shapes["model.decoder.embed_tokens.weight"] = (50304, 768)
    shapes["model.decoder.embed_positions.weight"] = (1026, 768)
    found = shape_of(shapes)
    assert (found.size, found.n_heads, found.vocab_size, found.n_positions) == ("125m", 12, 50304, 1024)


def test_an_unpublished_shape_has_the_heads_it_is_given_and_no_size():
    found = shape_of(SMALL.tensor_shapes(), heads=2)
    assert found == SMALL
    assert shape_of(opt_shape("125m").tensor_shapes(), heads=6).size is None  # 125m has 12


def test_heads_that_are_not_known_or_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"no published OPT has 2 layers of 8, .* give it as heads"):
        shape_of(SMALL.tensor_shapes())
    with pytest.raises(ConfigError, match="heads=3 does not divide the hidden size 8"):
        shape_of(SMALL.tensor_shapes(), heads=3)


def test_an_unknown_size_is_refused_with_the_nearest():
    assert opt_shape("6.7B").size == "6.7b"
    with pytest.raises(ConfigError, match=r"no OPT of size '1\.5b'; did you mean '1\.3b'\?"):
        opt_shape("1.5b")
    with pytest.raises(ConfigError, match=r"'huge'; known are: 125m, 350m, 1\.3b, 2\.7b, 6\.7b, 13b, 30b, 66b"):
        opt_shape("huge")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.decoder.embed_tokens.weight", None, "no matrix 'model.decoder.embed_tokens.weight' among 35 tensors"),
        (
            "model.decoder.layers.1.fc2.bias",
            None,
            "1 tensors of an OPT of 2 layers .* 'model.decoder.layers.1.fc2.bias'",
        ),
        ("model.decoder.alibi", (2, 1), "1 tensors are none of an OPT of 2 layers .* 'model.decoder.alibi'"),
        ("model.decoder.layers.0.fc2.bias", (9,), r"has shape \(9,\), but an OPT .* hidden size 8 has \(8,\)"),
        ("model.decoder.embed_positions.weight", (2, 8), "leaves no position"),
        ("model.decoder.embed_positions.weight", (7,), "no matrix 'model.decoder.embed_positions.weight'"),
    ],
)
def test_tensors_that_are_no_opt_are_refused(name, shape, message):
    shapes = SMALL.tensor_shapes()
    if shape is None:
        del shapes[name]
    else:
        shapes[name] = shape
    with pytest.raises(DataError, match=message):
        shape_of(shapes, heads=2)
