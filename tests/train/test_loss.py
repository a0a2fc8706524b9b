import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cbtm.errors import ConfigError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train import head as module
from cbtm.train.data import IGNORED, BlockOrder
from cbtm.train.head import CHUNK_ROWS, GPU_CHUNK_ROWS, _fused_losses, linear_cross_entropy
from cbtm.train.loss import CausalLoss

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
# Models that cannot keep documents apart: two that take no mask of the whole attention (ALiBi from a padding mask;
# a recurrence alone), and two that take one and mix the documents all the same.
MIXING = {
    "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "Rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "RecurrentGemma": {**LLAMA, "head_dim": 8, "lru_width": 16},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name, scale=1.0, attention=None, **changes):
    """A tiny model with random weights; `scale` makes its head large, so that its logits are like a trained one's."""
    import transformers

    stem = name.split()[0]
    sizes = {**(ARCHITECTURES[name][0] if name in ARCHITECTURES else MIXING[name]), **changes}
    settings = getattr(transformers, f"{stem}Config")(vocab_size=300, pad_token_id=None, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
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


def shapes_normalised(monkeypatch):
    """Shapes of the logits whose sums of exponentials are taken from now on: by the loss, and by the scores."""
    shapes = []
    for name in ("softmax", "logsumexp"):
        original = getattr(torch, name)

        def noted(logits, dim, original=original, **out):
            shapes.append(tuple(logits.shape))
            return original(logits, dim, **out)

        monkeypatch.setattr(torch, name, noted)
    return shapes


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


@pytest.mark.parametrize("ignored", [False, True])
def test_fused_loss_is_the_plain_one(monkeypatch, ignored):
    # Uncompiled: a compiler is not on every machine. On a GPU it is compiled below.
    monkeypatch.setattr("cbtm.train.head._compiled_losses", lambda: _fused_losses)
    hidden, weight, targets = rows(2 * CHUNK_ROWS + 37)
    if ignored:
        targets = some_ignored(targets)
    settings = {"all_learned": not ignored}
    plain, fused = (linear_cross_entropy(hidden, weight, targets, fused=way, **settings) for way in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(3 * total, (hidden, weight)) for total in (fused, plain)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("vocabulary", [300, 50_272])
def test_compiled_loss_is_the_plain_one_on_a_gpu_in_bfloat16(vocabulary):
    hidden, weight, targets = (part.detach().cuda() for part in rows(2 * GPU_CHUNK_ROWS + 37, 64, vocabulary))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = []
        for fused in (False, True):
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            total = linear_cross_entropy(*leaves, targets, all_learned=True, fused=fused)
            found.append((total, *torch.autograd.grad(total, leaves)))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_no_piece_of_logits_has_more_rows_than_a_chunk(monkeypatch):
    # What the module is for: at most CHUNK_ROWS x V logits exist at once.
    shapes = shapes_normalised(monkeypatch)
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
    monkeypatch.setattr(module, "CPU_TILE", 10)  # 27 tokens: rows of 10, 10 and 7, and 30 tiles beside each other
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


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 5, 1024])
def test_a_token_is_found_in_whichever_tile_it_lies_and_padding_of_minus_infinity_adds_nothing(monkeypatch, tile):
    # Probabilities 1/8, 2/8, 4/8, 1/8, and two tokens that there are not: with tiles of 2 they fill one.
    monkeypatch.setattr(module, "CPU_TILE", tile)
    logits = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, 0.0]).log().expand(1, 6, 6)
    found = CausalLoss(Certain(logits)).log_probs(torch.zeros((1, 6)), torch.arange(6)[None])
    expected = torch.tensor([[1 / 8, 2 / 8, 4 / 8, 1 / 8, 0, 0]]).log()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_nan_stays_nan():
    logits = torch.full((1, 2, 3), torch.nan)
    found = CausalLoss(Certain(logits)).log_probs(torch.zeros((1, 2)), torch.tensor([[0, 1]]))
    assert found.isnan().all()


# --- targets that are not learned ---


def some_ignored(targets, share=0.6, seed=4):
    out = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < share
    return targets.masked_fill(out, IGNORED)


def test_ignored_rows_by_hand():
    # As above, probabilities 1/4 and 3/4: what is left is the second row's ln(4/3), and slopes 1/4 and 3/4 - 1.
    hidden = torch.ones(3, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3.0)]], requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.tensor([IGNORED, 1, IGNORED]))
    torch.testing.assert_close(total, torch.tensor(math.log(4 / 3)))
    total.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[0.25], [-0.25]]))
    # d/dh of ln(1 + 3^h) - h ln 3 at h = 1 is (3/4 - 1) ln 3.
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.0], [-0.25 * math.log(3.0)], [0.0]]))


@pytest.mark.parametrize("n", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 37])
def test_value_and_gradients_with_ignored_rows_are_those_of_cross_entropy(n):
    hidden, weight, targets = rows(n)
    targets = some_ignored(targets)
    total = linear_cross_entropy(hidden, weight, targets)
    found = torch.autograd.grad(3 * total, (hidden, weight))
    plain = cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORED)
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not found[0][targets == IGNORED].any()


def test_a_negative_target_that_is_not_ignored_is_an_error():
    hidden, weight, targets = rows(5)
    targets[2] = -1
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        linear_cross_entropy(hidden, weight, targets)


def test_looking_for_ignored_rows_changes_no_bit_where_there_are_none():
    hidden, weight, targets = rows(CHUNK_ROWS + 30)
    found = []
    for all_learned in (False, True):
        total = linear_cross_entropy(hidden, weight, targets, all_learned=all_learned)
        found.append([total.detach(), *torch.autograd.grad(total, (hidden, weight))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("counted", [False, True], ids=["looked for", "counted"])
@pytest.mark.parametrize("name", ["OPT", "Gemma2"], ids=["plain head", "other head"])
def test_ignored_targets_add_nothing_to_the_loss_of_a_model(name, counted):
    model = build(name, scale=50.0).train()
    inputs, targets = blocks(batch=4)
    targets = some_ignored(targets)
    n_targets = int((targets != IGNORED).sum()) if counted else None
    causal = CausalLoss(model)
    total = causal.sum_loss(inputs, targets, n_targets=n_targets)
    total.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(input_ids=inputs, use_cache=False).logits
    plain = cross_entropy(logits.reshape(-1, 300), targets.reshape(-1), reduction="sum", ignore_index=IGNORED)
    plain.backward()
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-4)
    for key, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5 * max(1, largest), msg=key)
    log_probs = causal.log_probs(inputs, targets, n_targets=n_targets)
    expected = logits.log_softmax(dim=-1).gather(2, targets.clamp(min=0)[:, :, None])[:, :, 0]
    torch.testing.assert_close(log_probs, expected.masked_fill(targets == IGNORED, 0.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(-log_probs.sum(), plain.detach(), rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_learned_do_not_go_through_the_head(monkeypatch):
    shapes = shapes_normalised(monkeypatch)
    causal = CausalLoss(build("OPT"))
    inputs, targets = blocks(batch=4)  # 36 rows
    targets = targets.clone()
    targets[:, 3:] = IGNORED
    causal.sum_loss(inputs, targets, n_targets=12)
    causal.log_probs(inputs, targets, n_targets=12)
    assert shapes == [(12, 300), (1, 12)]  # all logits of the loss; of the scores the sums of one tile, of 12 rows


@pytest.mark.parametrize("name", ["OPT", "Gemma2"], ids=["plain head", "other head"])
@pytest.mark.parametrize("n_targets", [None, 0])
def test_nothing_to_learn_is_a_loss_of_0_with_gradients_of_0(name, n_targets):
    # Ranks that meet in each backward pass need one also where a block is all prompt.
    model = build(name)
    inputs, targets = blocks()
    total = CausalLoss(model).sum_loss(inputs, torch.full_like(targets, IGNORED), n_targets=n_targets)
    assert total.item() == 0
    total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    log_probs = CausalLoss(model).log_probs(inputs, torch.full_like(targets, IGNORED), n_targets=n_targets)
    assert torch.equal(log_probs, torch.zeros(targets.shape))


# --- lower precision ---


@pytest.mark.parametrize("name", ["OPT", "Gemma2"], ids=["plain head", "other head"])
def test_log_probs_under_autocast_are_those_of_the_loss_and_near_float32(name):
    model = build(name, scale=50.0).eval()
    inputs, targets = blocks(batch=8)
    causal = CausalLoss(model)
    exact = causal.log_probs(inputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        found = causal.log_probs(inputs, targets)
        loss = causal.sum_loss(inputs, targets)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().max() < 0.5  # bfloat16 has 8 bits: logits of up to 20 are off by up to 0.1
    torch.testing.assert_close(-found.sum(), loss.detach(), rtol=1e-5, atol=1e-4)


def test_the_head_is_converted_once_and_not_for_each_chunk(monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE", 10)  # 72 rows of 300: 8 x 30 tiles
    causal = CausalLoss(build("OPT").eval())
    weight = causal._weight()
    converted = []
    original = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        converted.append(tensor is weight)
        return original(tensor, *args, **kwargs)

    inputs, targets = blocks(batch=8)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        monkeypatch.setattr(torch.Tensor, "to", to)
        causal.log_probs(inputs, targets)
    assert sum(converted) == 1


# --- documents kept apart ---

APART = ["OPT", "Llama", "GPT2", "Qwen2", "GPTNeoX", "Phi"]  # the last one by its own logits
DEEP = {"OPT": {"num_hidden_layers": 2}, "GPT2": {"n_layer": 2}}  # what leaks in one layer spreads in the next
LENGTHS = [[4, 6, 2], [9, 3], [12]]  # three blocks of 12; the third piece of the first one is padding


def packed(seed=6):
    """Tokens, targets, positions and segments of the blocks, int64 (3, 12), and the documents one by one."""
    tokens = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(seed))
    targets = torch.randint(300, (3, 12), generator=torch.Generator().manual_seed(seed + 1))
    targets[0, 10:] = IGNORED
    positions = torch.stack([torch.cat([torch.arange(n) for n in block]) for block in LENGTHS])
    segments = torch.stack([torch.cat([torch.full((n,), i) for i, n in enumerate(block)]) for block in LENGTHS])
    alone = []
    for row, block in enumerate(LENGTHS):
        begin = 0
        for n in block:
            alone.append((tokens[row : row + 1, begin : begin + n], targets[row : row + 1, begin : begin + n]))
            begin += n
    return (tokens, targets, positions, segments), alone


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", APART)
def test_packed_documents_have_the_loss_and_the_gradients_that_each_has_alone(name, attention):
    model = build(name, scale=50.0, attention=attention, **DEEP.get(name, {"num_hidden_layers": 2})).eval()
    blocks_, alone = packed()
    causal = CausalLoss(model)
    assert causal.keeps_documents_apart()
    expected = torch.cat([causal.log_probs(*document)[0] for document in alone]).reshape(3, 12)
    torch.testing.assert_close(causal.log_probs(*blocks_), expected, rtol=1e-5, atol=1e-5)
    total = causal.sum_loss(*blocks_, n_targets=34)
    total.backward()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    single = sum(causal.sum_loss(*document) for document in alone)
    single.backward()
    torch.testing.assert_close(total, single, rtol=1e-6, atol=1e-4)
    for key, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-5 * max(1, largest), msg=key)
    # And the mask is what does it.
    assert (causal.log_probs(*blocks_[:2]) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["OPT", "Llama"])
def test_documents_are_apart_under_autocast_and_activation_checkpointing(name):
    model = build(name, scale=50.0).train()
    # transformers 5 calls it by the first name and warns about the second; 4 knows the second alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    causal = CausalLoss(model)
    blocks_, alone = packed()
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        total = causal.sum_loss(*blocks_, n_targets=34)
        single = sum(causal.sum_loss(*document) for document in alone)
    total.backward()
    torch.testing.assert_close(total, single, rtol=2e-3, atol=0)


@pytest.mark.parametrize("prefix", [None, 299])
def test_separate_blocks_of_a_corpus_have_the_loss_of_its_documents(tmp_path, prefix):
    generator = np.random.default_rng(0)
    texts = [generator.integers(1, 298, n - 1) for n in [5, 9, 2, 11, 3, 7, 1, 8]]
    with TokenShardWriter(tmp_path, "s", vocab_size=300) as writer:
        for number, text in enumerate(texts):
            writer.add(DocumentRecord(f"d{number}", 1), np.concatenate([[0], text]), prompt=min(2, len(text)))
    order = BlockOrder(
        TokenDocuments([(tmp_path, "s")]), context_length=14, seed=3, packing="separate", prefix_token=prefix
    )
    batch = order.batch(0, order.n_blocks)
    causal = CausalLoss(build("OPT", scale=50.0).eval())
    arrays = (batch.inputs, batch.targets, batch.positions, batch.segments)
    total = causal.sum_loss(*map(torch.from_numpy, arrays), n_targets=batch.n_targets)
    single = 0.0
    front = [] if prefix is None else [prefix]
    for text in texts:
        tokens = torch.tensor([*front, 0, *text.tolist(), 0])[None]  # the separator ends it, too
        targets = tokens[:, 1:].clone()
        targets[:, : len(front) + min(2, len(text))] = IGNORED
        single += causal.sum_loss(tokens[:, :-1], targets)
    assert batch.n_targets == sum(len(text) + 1 - min(2, len(text)) for text in texts)
    torch.testing.assert_close(total, single, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_documents_is_refused(name):
    causal = CausalLoss(build(name))
    assert not causal.keeps_documents_apart()
    with pytest.raises(ConfigError, match=rf"{name}ForCausalLM does not keep the documents .* use packing=documents"):
        causal.sum_loss(*packed()[0])
    with pytest.raises(ConfigError, match=f"{name}ForCausalLM does not keep"):
        causal.log_probs(*packed()[0])


def test_positions_that_a_model_does_not_take_are_found(monkeypatch):
    # OPT with a mask alone would learn the second document at the places behind the first.
    model = build("OPT")
    original = type(model.base_model).forward
    monkeypatch.setattr(
        type(model.base_model), "forward", lambda self, position_ids=None, **given: original(self, **given)
    )
    assert not CausalLoss(model).keeps_documents_apart()


def test_a_window_that_a_given_mask_would_open_is_refused():
    # The mask takes the place of the one with the window; in 12 tokens a window of 8 is never wider than a block.
    model = build("Gemma2", sliding_window=8)
    with pytest.raises(ConfigError, match="sliding_window=8 cannot keep documents apart in blocks of 12 tokens"):
        CausalLoss(model).sum_loss(*packed()[0])
    assert CausalLoss(build("Gemma2", sliding_window=12)).log_probs(*packed()[0]).shape == (3, 12)


def test_looking_whether_documents_stay_apart_leaves_the_model_as_it_was():
    model = build("OPT", dropout=0.3).train()
    causal = CausalLoss(model)
    before = torch.get_rng_state()
    assert causal.keeps_documents_apart()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_segments_a_model_gets_no_mask_and_no_positions():
    # The fused causal attention is for calls without a mask.
    model = build("OPT")
    seen = []
    model.base_model.register_forward_pre_hook(lambda _, args, given: seen.append(sorted(given)), with_kwargs=True)
    causal = CausalLoss(model)
    seen.clear()
    causal.sum_loss(*blocks())
    causal.log_probs(*blocks())
    assert seen == [["input_ids", "use_cache"]] * 2


def test_evaluation_mode_ends_with_the_block_also_after_an_error():
    model = build("OPT").train()
    causal = CausalLoss(model)
    with pytest.raises(RuntimeError, match="within"), causal.evaluating():
        assert_evaluating(model)
    assert model.training
    model.eval()
    with causal.evaluating():
        assert not model.training
    assert not model.training


def assert_evaluating(model):
    assert not model.training
    raise RuntimeError("within")
