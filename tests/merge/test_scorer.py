import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import DataError
from cbtm.merge.scorer import ScoreConfig, Window, score_documents, windows
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter

CONTEXT = 16
LENGTHS = (2, 9, 17, 5, 2, 12, 16, 17, 3)  # all fit one window: at most 16 tokens to predict


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
    made = create_model(config, vocab_size=300, separator_id=0, context_length=CONTEXT)
    with torch.no_grad():  # weights as large as trained ones, so that the context matters
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return made.eval()


def documents(folder, lengths):
    """Random documents of so many tokens each, separator 0 first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(lengths))
    with TokenShardWriter(folder, "text", vocab_size=300) as writer:
        for number, length in enumerate(lengths):
            tokens = np.concatenate([[0], rng.integers(1, 300, size=length - 1)])
            writer.add(DocumentRecord(str(number), 1), tokens)
    return TokenDocuments([(folder, "text")])


def score(folder, model, lengths, *, context_length=CONTEXT, prefix=None, progress=None, **config):
    out = folder / "scores"
    out.mkdir(parents=True, exist_ok=True)
    found = documents(folder / "tokens", lengths)
    facts = score_documents(
        model,
        found,
        ScoreConfig(**config),
        context_length=context_length,
        facts={"member": "dense"},
        folder=out,
        prefix_token=prefix,
        progress=progress,
    )
    offsets = np.load(out / "offsets.npy")
    scores = np.load(out / "log_probs.npy")
    by_document = [scores[start:end] for start, end in pairwise(offsets)]
    return list(found.documents()), by_document, facts


def naive(model, tokens, prefix=()):
    """Log-probability of tokens 1, 2, … from one forward pass over one document, by transformers' own logits."""
    row = torch.tensor([*prefix, *tokens.tolist()])[None]
    with torch.no_grad():
        log_probs = model(input_ids=row[:, :-1]).logits.log_softmax(dim=-1)
    return log_probs[0, torch.arange(row.shape[1] - 1), row[0, 1:]].numpy()[len(prefix) :]


# --- windows ---


def test_windows_by_hand():
    # 11 tokens, contexts of 4, moving on by 2: the first scores 1-4, each later one 2 more with 2 as context.
    assert list(windows(11, context_length=4, stride=2, document=7)) == [
        Window(7, begin=0, first=1, end=5),
        Window(7, begin=2, first=5, end=7),
        Window(7, begin=4, first=7, end=9),
        Window(7, begin=6, first=9, end=11),
    ]


def test_windows_without_overlap_by_hand():
    # Token 4 is predicted last in the first window and fed first in the second: no token goes unscored.
    assert list(windows(10, context_length=4, stride=4)) == [
        Window(0, 0, 1, 5),
        Window(0, 4, 5, 9),
        Window(0, 8, 9, 10),
    ]


def test_separator_alone_has_nothing_to_score():
    assert list(windows(1, context_length=4, stride=4)) == []


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 200), context=st.integers(1, 40), data=st.data())
def test_every_token_but_the_separator_is_scored_once(length, context, data):
    stride = data.draw(st.integers(1, context))
    found = list(windows(length, context_length=context, stride=stride))
    scored = [token for window in found for token in range(window.first, window.end)]
    assert scored == list(range(1, length))
    for number, window in enumerate(found):
        assert window.begin < window.first < window.end <= length
        assert window.end - window.begin - 1 <= context
        if number:  # a later window keeps at least the context that the stride promises
            assert window.first - window.begin >= min(context - stride + 1, window.first)


# --- scores ---


def test_scores_of_short_documents_are_the_naive_ones(tmp_path, model):
    rows, scores, _ = score(tmp_path, model, LENGTHS)
    assert [len(part) for part in scores] == [length - 1 for length in LENGTHS]
    for tokens, part in zip(rows, scores, strict=True):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, naive(model, tokens), rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_what_shares_a_batch(tmp_path, model):
    lengths = (*LENGTHS, 40, 33, 90)
    _, one, facts = score(tmp_path / "a", model, lengths, max_batch_tokens=8192)
    _, other, its_facts = score(tmp_path / "b", model, lengths, max_batch_tokens=64)
    _, alone, _ = score(tmp_path / "c", model, lengths, max_batch_tokens=1)
    assert facts["forward_passes"] == 1
    assert its_facts["forward_passes"] > 3
    for first, second, third in zip(one, other, alone, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
        np.testing.assert_allclose(first, third, atol=1e-5)


def test_forward_passes_by_hand(tmp_path, model):
    # Tokens to predict, sorted: 1, 1, 2, 4 | 8, 8 | 16; padded to the longest: 4 x 4, 2 x 8 and 1 x 16.
    *_, facts = score(tmp_path, model, (9, 3, 17, 2, 5, 2, 9), max_batch_tokens=16)
    assert facts["forward_passes"] == 3
    # A window that is longer than the limit goes alone.
    *_, facts = score(tmp_path, model, (17, 17), max_batch_tokens=5)
    assert facts["forward_passes"] == 2


def test_long_document_is_scored_window_by_window(tmp_path, model):
    # 41 tokens, contexts of 16: windows feed 0-15, 16-31 and 32-39.
    (tokens,), (scores,), _ = score(tmp_path, model, (41,))
    pieces = [naive(model, tokens[begin : begin + 17]) for begin in (0, 16, 32)]
    np.testing.assert_allclose(scores, np.concatenate(pieces), rtol=1e-5, atol=1e-5)


def test_stride_gives_later_windows_context(tmp_path, model):
    (tokens,), (scores,), facts = score(tmp_path, model, (41,), stride=4)
    # 16 tokens from the first window, then 24 / 4 = 6 windows of 4 with the 12 before them as context.
    expected = [naive(model, tokens[:17])]
    expected += [naive(model, tokens[begin : begin + 17])[-4:] for begin in range(4, 25, 4)]
    np.testing.assert_allclose(scores, np.concatenate(expected), rtol=1e-5, atol=1e-5)
    assert facts["tokens"] == 40
    _, (without,), _ = score(tmp_path, model, (41,))
    np.testing.assert_allclose(scores[:16], without[:16], rtol=1e-5, atol=1e-5)
    assert np.abs(scores[16:] - without[16:]).max() > 0.1


def test_stride_costs_nothing_where_documents_fit_the_context(tmp_path, model):
    _, one, facts = score(tmp_path / "a", model, LENGTHS, stride=4, max_batch_tokens=32)
    _, other, its_facts = score(tmp_path / "b", model, LENGTHS, max_batch_tokens=32)
    assert facts == its_facts
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))


def test_prefix_token_stands_in_front_of_every_window(tmp_path, model):
    # It takes one of the 16 places: windows predict 15 tokens, after 299 and the one in front of them.
    rows, scores, facts = score(tmp_path, model, (*LENGTHS, 41), prefix=299)
    assert facts["tokens"] == sum(LENGTHS) - len(LENGTHS) + 40
    for tokens, part in zip(rows, scores, strict=True):
        begins = range(0, len(tokens) - 1, 15)
        expected = [naive(model, tokens[begin : begin + 16], prefix=[299]) for begin in begins]
        assert len(part) == len(tokens) - 1
        np.testing.assert_allclose(part, np.concatenate(expected), rtol=1e-5, atol=1e-5)
    _, without, _ = score(tmp_path / "without", model, (*LENGTHS, 41))
    assert np.abs(scores[-1] - without[-1]).max() > 0.1
    _, other, _ = score(tmp_path / "other", model, (*LENGTHS, 41), prefix=298)
    assert np.abs(scores[-1] - other[-1]).max() > 0.1


def test_prefix_token_and_stride_by_hand(tmp_path, model):
    (tokens,), (scores,), facts = score(tmp_path, model, (40,), prefix=299, stride=4)
    # 15 tokens from the first window, then 24 / 4 = 6 windows of 4 with the 11 before them as context.
    expected = [naive(model, tokens[:16], prefix=[299])]
    expected += [naive(model, tokens[begin : begin + 16], prefix=[299])[-4:] for begin in range(4, 25, 4)]
    np.testing.assert_allclose(scores, np.concatenate(expected), rtol=1e-5, atol=1e-5)
    assert facts["tokens"] == 39


def test_prefix_token_does_not_change_with_what_shares_a_batch(tmp_path, model):
    lengths = (*LENGTHS, 40, 33)
    _, one, _ = score(tmp_path / "a", model, lengths, prefix=299, stride=5)
    _, other, _ = score(tmp_path / "b", model, lengths, prefix=299, stride=5, max_batch_tokens=1)
    for first, second in zip(one, other, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_facts_are_returned_and_written(tmp_path, model):
    seen = []
    _, scores, facts = score(
        tmp_path, model, LENGTHS, max_batch_tokens=64, progress=lambda done, total: seen.append((done, total))
    )
    flat = np.concatenate(scores)
    assert facts == {
        "member": "dense",
        "documents": 9,
        "tokens": sum(LENGTHS) - 9,
        "forward_passes": len(seen),
        "negative_log_prob": pytest.approx(-flat.astype(np.float64).mean(), rel=1e-12),
    }
    assert json.loads((tmp_path / "scores/scores.json").read_text()) == facts
    assert (flat <= 0).all()
    assert seen[-1] == (74, 74)
    assert seen == sorted(seen)


def test_a_model_that_knows_nothing_gives_every_token_the_same(tmp_path, model):
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
    ignorant = create_model(config, vocab_size=300, separator_id=0, context_length=CONTEXT)
    with torch.no_grad():
        ignorant.get_output_embeddings().weight.zero_()
    _, scores, facts = score(tmp_path, ignorant, LENGTHS)
    np.testing.assert_allclose(np.concatenate(scores), -math.log(300), rtol=1e-6)
    assert facts["negative_log_prob"] == pytest.approx(math.log(300), rel=1e-6)


def test_dropout_is_off(tmp_path):
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2, dropout=0.5)
    dropping = create_model(config, vocab_size=300, separator_id=0, context_length=CONTEXT).train()
    _, one, _ = score(tmp_path / "a", dropping, LENGTHS)
    _, other, _ = score(tmp_path / "b", dropping, LENGTHS)
    np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))


def test_broken_weights_are_an_error_that_counts_the_tokens(tmp_path):
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
    broken = create_model(config, vocab_size=300, separator_id=0, context_length=CONTEXT)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(DataError, match="74 of 74 scores are NaN: the model's weights are broken"):
        score(tmp_path, broken, LENGTHS)
    assert not (tmp_path / "scores/log_probs.npy").exists()


def test_no_document_is_an_error(tmp_path, model):
    with pytest.raises(DataError, match="the validation split holds no document"):
        score(tmp_path, model, ())
