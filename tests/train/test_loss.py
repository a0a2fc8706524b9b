import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cbtm.train import loss as module
from cbtm.train.loss import CHUNK_ROWS, CausalLoss, linear_cross_entropy

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
DROPOUT_FREE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Transformers class stem, sizes of a tiny one, and whether its head is one plain matrix.
ARCHITECTURES = {
    "OPT": ({**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "dropout": 0.0}, True),
    "OPT with a projection": ({**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8, "dropout": 0.0}, True),
    "Llama": (LLAMA, True),
    "Qwen2": (LLAMA, True),
    "GPTNeoX": ({**SIZES, "intermediate_size": 32, "max_position_embeddings": 32}, True),
    "GPT2": ({**GPT2, **DROPOUT_FREE}, True),
    # A bias on the head.
    "GPTJ": ({**GPT2, **DROPOUT_FREE, "rotary_dim": 4}, False),
    "Phi": ({**SIZES, "intermediate_size": 32, "max_position_embeddings": 32}, False),
    # 30 tanh(logit / 30): the logits of a fresh model are too small to show it, those of a trained one are not.
    "Gemma2": ({**LLAMA, "head_dim": 8, "final_logit_softcapping": 30.0}, False),
    # A factor behind the head.
    "Cohere": ({**LLAMA, "num_key_value_heads": 2, "logit_scale": 0.0625}, False),
    # A divisor behind the head.
    "Granite": ({**LLAMA, "logits_scaling": 8.0}, False),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, scale=1.0):
    """A tiny model with random weights; `scale` makes its head large, so that its logits are like a trained one's."""
    import transformers

    stem = name.split()[0]
    sizes, _ = ARCHITECTURES[name]
    settings = getattr(transformers, f"{stem}Config")(vocab_size=300, pad_token_id=None, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


def blocks(batch=3, length=9, vocab=300, seed=1):
    tokens = torch.randint(vocab, (batch, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def rows(n, width=16, vocab=300, seed=2):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(vocab, (n,), generator=generator)


def test_loss_by_hand():
    # Logits (ln 1, ln 3): probabilities 1/4 and 3/4; the loss is ln 4 + ln(4/3).
    weight = torch.tensor([[0.0], [torch.log(torch.tensor(3.0))]])
    total = linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([0, 1]))
    torch.testing.assert_close(total, torch.log(torch.tensor(16 / 3)))


@pytest.mark.parametrize("n", [1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 37])
def test_value_and_gradients_are_those_of_cross_entropy(n):
    hidden, weight, targets = rows(n)
    total = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(3 * total, (hidden, weight))  # the factor is the outer gradient
    plain = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_piece_of_logits_has_more_rows_than_a_chunk(monkeypatch):
    # What the module is for: at most CHUNK_ROWS x V logits exist at once.
    shapes = []
    original = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: shapes.append(tuple(x.shape)) or original(x, dim))
    hidden, weight, targets = rows(2 * CHUNK_ROWS + 37)
    linear_cross_entropy(hidden, weight, targets)
    assert shapes == [(CHUNK_ROWS, 300), (CHUNK_ROWS, 300), (37, 300)]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("scale", [1.0, 200.0], ids=["fresh", "large logits"])
def test_loss_and_gradients_of_a_model_are_those_of_its_own_logits(name, scale):
    model = build(name, scale).train()
    inputs, targets = blocks()
    causal = CausalLoss(model)
    assert causal.plain_head == ARCHITECTURES[name][1]
    assert model.training
    total = causal.sum_loss(inputs, targets)
    torch.autograd.backward(total)
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=inputs, use_cache=False).logits
    plain = cross_entropy(logits.reshape(-1, 300), targets.reshape(-1), reduction="sum")
    torch.autograd.backward(plain)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-4)
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[key] is None, key
        else:
            largest = parameter.grad.abs().max().item()
            torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5 * max(1, largest), msg=key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_the_log_softmax_at_the_targets(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 10)  # 27 tokens: chunks of 10, 10 and 7
    model = build(name, scale=200.0).eval()
    inputs, targets = blocks()
    found = CausalLoss(model).log_probs(inputs, targets)
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits
    expected = logits.log_softmax(dim=-1).gather(2, targets[:, :, None])[:, :, 0]
    assert found.shape == targets.shape
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_soft_cap_is_found_where_the_logits_are_too_small_to_show_it():
    # |logit| < 0.3: 30 tanh(0.3 / 30) differs from 0.3 by 0.3^3 / 2700 = 1e-5, and by 9.6 at 60.
    model = build("Gemma2")
    with torch.no_grad():
        assert model(input_ids=blocks()[0]).logits.abs().max() < 0.5
    assert not CausalLoss(model).plain_head
    model.config.final_logit_softcapping = None
    assert CausalLoss(model).plain_head


def test_a_factor_before_the_head_is_found():
    model = build("OPT")
    assert CausalLoss(model).plain_head
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    assert not CausalLoss(model).plain_head
    with torch.no_grad():  # also where a head that is all 0 gives the same logits either way
        model.get_output_embeddings().weight.zero_()
        model.get_input_embeddings().weight = torch.nn.Parameter(torch.randn(300, 16))
    assert not CausalLoss(model).plain_head


def test_probing_the_head_leaves_the_model_as_it_was():
    model = build("OPT").train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    CausalLoss(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_hooks
    model.eval()
    CausalLoss(model)
    assert not model.training


class Certain(nn.Module):
    """A model whose logits are given: what CausalLoss sees of any head that is not one matrix."""

    def __init__(self, logits):
        super().__init__()
        self.given = logits

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, use_cache):
        class Output:
            logits = self.given

        return Output


def test_above_0_by_rounding_is_0(monkeypatch):
    # One part in 10^7 is what float32 leaves open; the ensembles refuse it.
    original = torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: original(x, dim) - 1e-5)
    logits = torch.tensor([[[100.0, 0.0], [1.0, 2.0]]])
    found = CausalLoss(Certain(logits)).log_probs(torch.zeros((1, 2)), torch.tensor([[0, 0]]))
    assert found[0, 0] == 0
    # ln(1 + e) = 1.3133 after the first logit, 1: the token itself is untouched.
    torch.testing.assert_close(found[0, 1], torch.tensor(-1.31326), rtol=1e-4, atol=0)


def test_nan_stays_nan():
    logits = torch.full((1, 2, 3), torch.nan)
    found = CausalLoss(Certain(logits)).log_probs(torch.zeros((1, 2)), torch.tensor([[0, 1]]))
    assert found.isnan().all()
