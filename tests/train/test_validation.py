import numpy as np
import pytest
import torch

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import ConfigError, DataError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.loss import CausalLoss
from cbtm.train.validation import Validation

CONTEXT = 8
LENGTHS = [9, 1, 4, 20, 17, 2, 6, 30]  # tokens of each document, separator included
CLUSTERS = np.array([0, 1, 1, 0, 2, 2, 1, 0])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [np.concatenate([[0], rng.integers(1, 99, length - 1)]) for length in LENGTHS]


def write(folder, texts, prompts=None):
    """The documents in two shards, so that their places in the stream run across them."""
    for number, half in enumerate((slice(0, 3), slice(3, None))):
        with TokenShardWriter(folder, f"s{number}", vocab_size=100) as writer:
            for text, prompt in zip(texts[half], (prompts or [0] * len(texts))[half], strict=True):
                writer.add(DocumentRecord(f"d{len(text)}", 1), text, prompt)
    return TokenDocuments([(folder, "s0"), (folder, "s1")])


@pytest.fixture(scope="module")
def source(texts, tmp_path_factory):
    return write(tmp_path_factory.mktemp("tokens"), texts)


@pytest.fixture(scope="module")
def model():
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2, dropout=0.3)
    model = create_model(config, vocab_size=100, separator_id=0, context_length=CONTEXT)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.train()


def windows(length, limit):
    """(begin, end) in a document: tokens begin + 1 … end - 1 are predicted from begin … end - 2."""
    return [(begin, min(begin + limit + 1, length)) for begin in range(0, length - 1, limit)]


def brute_force(model, texts, chosen, *, limit=CONTEXT, prefix=(), prompts=None):
    """Sum of nats and count over the given documents, one window at a time, from the model's own logits."""
    total, count = 0.0, 0
    for number in chosen:
        for begin, end in windows(len(texts[number]), limit):
            tokens = torch.tensor([*prefix, *texts[number][begin:end].tolist()])
            model.eval()
            with torch.no_grad():
                logits = model(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(dim=-1)
            model.train()
            for place in range(begin + 1, end):
                if prompts is None or place > prompts[number]:
                    at = place - begin + len(prefix)
                    total -= logits[at - 1, tokens[at]].item()
                    count += 1
    return total, count


def everything(source, **changes):
    settings = {"cluster": 0, "context_length": CONTEXT, "max_blocks": 1000, **changes}
    return Validation(source, CLUSTERS, **settings)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_losses_are_those_of_each_document_alone(source, texts, model, micro_batch):
    found = everything(source).measure(CausalLoss(model), "cpu", micro_batch)
    assert list(found) == ["own", "all"]
    for name, chosen in (("own", [0, 3, 7]), ("all", range(8))):
        total, count = brute_force(model, texts, chosen)
        assert found[name] == (pytest.approx(total, rel=1e-5), count)
    assert found["all"][1] == sum(LENGTHS) - len(LENGTHS)  # each token but the separators


def test_a_model_of_all_has_one_loss_twice(source, model):
    found = everything(source, cluster=None).measure(CausalLoss(model), "cpu", 4)
    assert found["own"] == found["all"] == everything(source).measure(CausalLoss(model), "cpu", 4)["all"]


def test_prefix_is_in_front_of_each_window_and_takes_the_place_of_a_token(source, texts, model):
    found = everything(source, cluster=1, prefix_token=99).measure(CausalLoss(model), "cpu", 4)
    for name, chosen in (("own", [1, 2, 6]), ("all", range(8))):
        total, count = brute_force(model, texts, chosen, limit=CONTEXT - 1, prefix=[99])
        assert found[name] == (pytest.approx(total, rel=1e-5), count)


def test_prompts_are_left_out(tmp_path, texts, model):
    prompts = [3, 0, 3, 12, 0, 1, 2, 0]
    found = everything(write(tmp_path, texts, prompts)).measure(CausalLoss(model), "cpu", 4)
    total, count = brute_force(model, texts, [0, 3, 7], prompts=prompts)
    assert found["own"] == (pytest.approx(total, rel=1e-5), count)
    assert count == 8 + 19 + 29 - 3 - 12


def test_documents_that_are_not_to_be_used_are_not(source, texts, model):
    used = np.array([True, True, False, False, True, True, False, True])
    found = everything(source, documents_used=used).measure(CausalLoss(model), "cpu", 4)
    for name, chosen in (("own", [0, 7]), ("all", [0, 1, 4, 5, 7])):
        total, count = brute_force(model, texts, chosen)
        assert found[name] == (pytest.approx(total, rel=1e-5), count)


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_losses_of_ranks_add_up_to_those_of_one(source, model, world_size):
    validation, loss = everything(source), CausalLoss(model)
    found = [validation.measure(loss, "cpu", 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    for name, (total, count) in validation.measure(loss, "cpu", 2).items():
        assert sum(one[name][0] for one in found) == pytest.approx(total, rel=1e-5)
        assert sum(one[name][1] for one in found) == count
    # 8, 0, 3, 19, 16, 1, 5 and 29 tokens to predict are 1 + 0 + 1 + 3 + 2 + 1 + 1 + 4 windows; 1 + 3 + 4 are own.
    assert validation.n_windows == {"own": 8, "all": 13}
    assert any(one["own"] == (0.0, 0) for one in found) == (world_size == 20)


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_every_rank_makes_as_many_forward_passes(source, model, world_size):
    # A sharded model gathers its weights in each: a rank that makes one less would leave the others waiting.
    passes = []
    for rank in range(world_size):
        seen = []
        handle = model.base_model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        loss = CausalLoss(model)
        seen.clear()
        everything(source).measure(loss, "cpu", 2, rank=rank, world_size=world_size)
        handle.remove()
        passes.append(len(seen))
    # Of 8 and 13 windows, a rank's share is at most ceil(8 / w) and ceil(13 / w), two in a pass.
    expected = {1: 4 + 7, 3: 2 + 3, 20: 1 + 1}[world_size]
    assert passes == [expected] * world_size


def test_windows_are_spread_evenly_and_no_more_than_asked_for(tmp_path, model):
    # 100 documents of one window each; the middles of 4 equal parts are documents 12, 37, 62 and 87.
    texts = [np.array([0, 1 + number % 90, 5]) for number in range(100)]
    source = write(tmp_path, texts)
    clusters = np.arange(100) % 2
    validation = Validation(source, clusters, cluster=1, context_length=CONTEXT, max_blocks=4)
    assert validation.n_windows == {"own": 4, "all": 4}
    found = validation.measure(CausalLoss(model), "cpu", 4)
    # The own ones are 1, 3, 5 …: of those, numbers 6, 18, 31 and 43 are documents 13, 37, 63 and 87.
    for name, chosen in (("own", [13, 37, 63, 87]), ("all", [12, 37, 62, 87])):
        total, count = brute_force(model, texts, chosen)
        assert found[name] == (pytest.approx(total, rel=1e-5), count)


def test_long_documents_give_as_many_windows_as_they_have(tmp_path, texts, model):
    # 40 tokens to predict in 5 windows and 8 in 1: of 6, the middles of 2 parts are 1 and 4, both of the first.
    rng = np.random.default_rng(1)
    texts = [np.concatenate([[0], rng.integers(1, 99, n)]) for n in (40, 8)]
    source = write(tmp_path, texts)
    validation = Validation(source, np.zeros(2, np.int64), cluster=None, context_length=CONTEXT, max_blocks=2)
    pieces = [texts[0][8:17], texts[0][32:41]]
    total, count = brute_force(model, pieces, range(2))
    assert validation.measure(CausalLoss(model), "cpu", 4)["all"] == (pytest.approx(total, rel=1e-5), count)
    assert count == 16


@pytest.mark.parametrize("changes", [{"cluster": 3}, {"cluster": 2, "documents_used": CLUSTERS != 2}])
def test_a_cluster_without_a_validation_document_has_no_own_loss(source, model, changes):
    found = everything(source, **changes).measure(CausalLoss(model), "cpu", 4)
    assert list(found) == ["all"]


def test_measuring_leaves_the_model_and_the_generator_as_they_were(source, model):
    before = torch.get_rng_state()
    everything(source).measure(CausalLoss(model), "cpu", 4)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("used", [np.zeros(8, np.bool_), np.arange(8) == 1], ids=["none", "no text"])
def test_nothing_to_predict_is_refused(source, used):
    with pytest.raises(DataError, match=f"none of the {used.sum()} validation documents that may be used has a token"):
        everything(source, documents_used=used)


def test_wrong_settings_are_refused(source):
    with pytest.raises(DataError, match=r"clusters has shape \(3,\) but there are 8 documents"):
        Validation(source, CLUSTERS[:3], cluster=0, context_length=CONTEXT, max_blocks=4)
    with pytest.raises(DataError, match=r"documents_used has shape \(2,\) but there are 8 documents"):
        everything(source, documents_used=np.ones(2, np.bool_))
    with pytest.raises(ConfigError, match="context_length=1 and max_blocks=1000 has no token to predict"):
        everything(source, context_length=1, prefix_token=99)
    with pytest.raises(ConfigError, match="max_blocks=0 has no token to predict"):
        everything(source, max_blocks=0)
