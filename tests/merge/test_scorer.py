import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.errors import ConfigError, DataError
from cbtm.merge import scorer
from cbtm.merge.scorer import ScoreConfig, Window, score_documents, scored_rows, top_k_needed, windows
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


def score(folder, model, lengths, *, context_length=CONTEXT, prefix=None, needed=None, progress=None, **config):
    """Rows, scores by document, and facts."""
    out = folder / "scores"
    out.mkdir(parents=True, exist_ok=True)
    settings = ScoreConfig(**config)
    rows = scored_rows(documents(folder / "tokens", lengths).documents(), settings)
    facts = score_documents(
        model,
        rows,
        settings,
        context_length=context_length,
        facts={"member": "dense"},
        folder=out,
        prefix_token=prefix,
        needed=needed,
        progress=progress,
    )
    offsets = np.load(out / "offsets.npy")
    scores = np.load(out / "log_probs.npy")
    by_document = [scores[start:end] for start, end in pairwise(offsets)]
    return rows, by_document, facts


def naive(model, tokens, prefix=()):
    """Log-probability of tokens 1, 2, … from one forward pass over one document, by transformers' own logits."""
    row = torch.tensor([*prefix, *tokens.tolist()])[None]
    with torch.no_grad():  # on the device where scoring left the model
        log_probs = model(input_ids=row[:, :-1].to(model.device)).logits.log_softmax(dim=-1).cpu()
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes more at once")
def test_a_cpu_is_fed_1024_tokens_at_most(tmp_path, model):
    # 66 documents of 16: 64 of them, and 2.
    *_, facts = score(tmp_path, model, (17,) * 66)
    assert (facts["forward_passes"], facts["tokens_fed"]) == (2, 66 * 16)
    assert ScoreConfig().max_batch_tokens > 66 * 16


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
        "tokens": 74,  # the sum of the lengths less 9 separators
        "tokens_scored": 74,
        # To predict, sorted: 1, 1, 2, 4, 8 | 11, 15, 16, 16; padded to 5 x 8 and 4 x 16.
        "forward_passes": 2,
        "tokens_fed": 104,
        "compute_share": 1.0,
        # One OPT layer of 16: 4 x (16 x 16 + 16) attention, 2,128 feed-forward, three norms of 32; a head of 300 x 16.
        "body_share": 3312 / (3312 + 4800),
        "negative_log_prob": pytest.approx(-flat.astype(np.float64).mean(), rel=1e-12),
    }
    assert json.loads((tmp_path / "scores/scores.json").read_text()) == facts
    assert (flat <= 0).all()
    assert seen == [(16, 74), (74, 74)]


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


def test_broken_weights_are_found_in_the_first_block(tmp_path):
    config = ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2)
    broken = create_model(config, vocab_size=300, separator_id=0, context_length=CONTEXT)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(DataError, match="8 of 8 scores are NaN"):
        score(tmp_path, broken, (9, 9, 9), block_tokens=8)


def test_an_impossible_token_is_no_broken_weight(tmp_path):
    made = create_model(
        ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2), vocab_size=300, separator_id=0, context_length=16
    )
    head = torch.nn.Linear(16, 300)
    with torch.no_grad():
        head.bias[7] = -torch.inf
    made.set_output_embeddings(head)
    rows = [np.array([0, 5, 7, 9])]
    facts = score_documents(made, rows, ScoreConfig(), context_length=CONTEXT, facts={}, folder=tmp_path)
    first, second, third = np.load(tmp_path / "log_probs.npy").tolist()
    assert (first < 0, second, third < 0) == (True, -math.inf, True)
    assert (facts["tokens_scored"], facts["negative_log_prob"]) == (3, None)
    assert "Infinity" not in (tmp_path / "scores.json").read_text()


def test_documents_of_no_scored_token_have_no_score(tmp_path, model):
    rows, scores, facts = score(tmp_path, model, (1, 9, 1))
    assert [len(part) for part in scores] == [0, 8, 0]
    np.testing.assert_allclose(scores[1], naive(model, rows[1]), rtol=1e-5, atol=1e-5)
    _, scores, facts = score(tmp_path / "none", model, (1, 1))
    assert [len(part) for part in scores] == [0, 0]
    assert (facts["tokens"], facts["forward_passes"], facts["negative_log_prob"]) == (0, 0, None)
    # Without its separator, a document of nothing else is no token at all.
    rows, scores, _ = score(tmp_path / "without", model, (1, 2, 9), separator=False)
    assert [len(row) for row in rows] == [0, 1, 8]
    assert [len(part) for part in scores] == [0, 0, 7]


# --- which tokens there are ---


def test_rows_by_hand():
    found = [np.array([0, 5, 6, 7], dtype=np.uint16), np.array([0], dtype=np.uint16), np.array([0, 8], dtype=np.uint16)]

    def cut(**config):
        rows = scored_rows(found, ScoreConfig(**config))
        assert all(row.dtype == np.int64 for row in rows)
        return [row.tolist() for row in rows]

    assert cut() == [[0, 5, 6, 7], [0], [0, 8]]
    assert cut(max_tokens=2) == [[0, 5, 6], [0], [0, 8]]  # the separator is none of the two
    assert cut(max_tokens=1) == [[0, 5], [0], [0, 8]]
    assert cut(separator=False) == [[5, 6, 7], [], [8]]
    assert cut(separator=False, max_tokens=2) == [[5, 6], [], [8]]


@pytest.mark.parametrize("prefix", [None, 299])
def test_without_separator_the_model_sees_the_text_alone(tmp_path, model, prefix):
    # As in the reference implementation: no BOS, the first token given, cut after so many tokens.
    _, scores, facts = score(tmp_path, model, (9, 16, 4), prefix=prefix, separator=False, max_tokens=10)
    assert [len(part) for part in scores] == [7, 9, 2]  # 8, 10 and 3 tokens, less the first
    front = [] if prefix is None else [prefix]
    for tokens, part in zip(documents(tmp_path / "again", (9, 16, 4)).documents(), scores, strict=True):
        text = tokens[1:11]
        row = torch.tensor([front + text.tolist()])
        with torch.no_grad():
            log_probs = model(input_ids=row.to(model.device)).logits[0].cpu().double().log_softmax(dim=-1)
        expected = [log_probs[len(front) + place - 1, text[place]].item() for place in range(1, len(text))]
        np.testing.assert_allclose(part, expected, rtol=1e-5, atol=1e-5)
    assert facts["tokens"] == 18
    _, seen, _ = score(tmp_path / "with", model, (9, 16, 4), prefix=prefix)
    assert np.abs(seen[0][1:] - scores[0]).max() > 0.1


def test_settings_that_score_nothing_are_refused():
    with pytest.raises(ConfigError, match="max_tokens=1 with separator=false leaves no token to score"):
        ScoreConfig.parse({"separator": False, "max_tokens": 1})
    assert ScoreConfig.parse({"separator": False, "max_tokens": 2}).max_tokens == 2
    for name in ("max_tokens", "max_documents", "top_k", "block_tokens"):
        with pytest.raises(ConfigError, match=name):
            ScoreConfig.parse({name: 0})


def test_digest_is_of_what_decides_the_scores():
    usual = ScoreConfig().result_digest()
    for same in ({"threads": 3}, {"max_batch_tokens": 5}, {"block_tokens": 5}, {"top_k": 2}):
        assert ScoreConfig(**same).result_digest() == usual
    for other in ({"stride": 3}, {"separator": False}, {"max_tokens": 5}, {"max_documents": 5}):
        assert ScoreConfig(**other).result_digest() != usual


# --- where an expert is needed ---


def test_nearest_experts_by_hand():
    distances = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.2], [0.2, 0.2, 0.2], [0.3, 0.1, 0.2]], dtype=np.float32)
    offsets = np.array([0, 1, 4])

    def near(expert, top_k):
        return [marks.tolist() for marks in top_k_needed(distances, offsets, expert, top_k)]

    # Nearest first: 0 1 2, 1 2 0, 0 1 2 and 1 2 0; of equal ones the lower index.
    assert near(0, 1) == [[True], [False, True, False]]
    assert near(1, 1) == [[False], [True, False, True]]
    assert near(2, 1) == [[False], [False, False, False]]
    assert near(2, 2) == [[False], [True, False, True]]
    assert near(1, 2) == [[True], [True, True, True]]
    assert near(0, 3) == [[True], [True, True, True]]


def test_nearest_experts_are_those_of_a_stable_sort(monkeypatch):
    monkeypatch.setattr(scorer, "_RANKED_ROWS", 7)  # 40 rows in 6 parts
    rng = np.random.default_rng(0)
    distances = rng.integers(0, 4, size=(40, 6)).astype(np.float32)  # many ties
    offsets = np.array([0, 13, 13, 40])
    order = np.argsort(distances, axis=1, kind="stable")
    for top_k in range(1, 7):
        for expert in range(6):
            marks = top_k_needed(distances, offsets, expert, top_k)
            assert [len(row) for row in marks] == [13, 0, 27]
            np.testing.assert_array_equal(np.concatenate(marks), (order[:, :top_k] == expert).any(axis=1))


def test_wrong_distances_are_errors():
    distances = np.zeros((4, 3), dtype=np.float32)
    for expert, top_k in ((0, 0), (0, 4), (3, 1), (-1, 1)):
        with pytest.raises(ConfigError, match=f"top_k={top_k} of expert {expert}: there are 3 experts"):
            top_k_needed(distances, np.array([0, 4]), expert, top_k)
    with pytest.raises(DataError, match="4 rows of distances for 5 scored tokens"):
        top_k_needed(distances, np.array([0, 5]), 0, 1)
    distances[2, 1] = np.nan
    with pytest.raises(DataError, match="have a NaN"):
        top_k_needed(distances, np.array([0, 4]), 0, 1)


def marks_of(lengths, share, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.random(length - 1) < share for length in lengths]


@pytest.mark.parametrize("prefix", [None, 299])
@pytest.mark.parametrize("stride", [None, 4])
def test_needed_scores_are_those_of_the_full_pass_and_the_others_nan(tmp_path, model, prefix, stride):
    lengths = (*LENGTHS, 40, 33, 90)
    needed = marks_of(lengths, 0.2)
    needed[-1][:50] = False  # whole windows
    settings = {"prefix": prefix, "stride": stride, "max_batch_tokens": 64}
    _, full, full_facts = score(tmp_path / "full", model, lengths, **settings)
    _, some, facts = score(tmp_path / "some", model, lengths, needed=needed, **settings)
    for marks, one, other in zip(needed, full, some, strict=True):
        np.testing.assert_allclose(other[marks], one[marks], rtol=0, atol=1e-5)
        assert np.isnan(other[~marks]).all()
    n_needed = sum(int(marks.sum()) for marks in needed)
    assert facts["tokens_scored"] == n_needed
    assert facts["tokens"] == full_facts["tokens"] == full_facts["tokens_scored"]
    assert facts["tokens_fed"] < full_facts["tokens_fed"]
    assert facts["compute_share"] < full_facts["compute_share"] == 1
    mean = -np.concatenate(some)[np.concatenate(needed)].mean(dtype=np.float64)
    assert facts["negative_log_prob"] == pytest.approx(mean, rel=1e-12)


def test_needing_everything_changes_no_bit(tmp_path, model):
    lengths = (*LENGTHS, 40)
    _, full, facts = score(tmp_path / "full", model, lengths)
    _, some, its_facts = score(tmp_path / "some", model, lengths, needed=marks_of(lengths, 2.0))
    np.testing.assert_array_equal(np.concatenate(full), np.concatenate(some))
    assert facts == its_facts


def test_what_is_not_needed_does_not_reach_the_model(tmp_path, model):
    # Contexts of 16. Document 0 is 41 tokens, windows of 16, 16 and 8 to predict; 1 and 2 are one window of 8 each.
    needed = [np.zeros(length - 1, dtype=bool) for length in (41, 9, 9)]
    needed[0][[16, 19, 39]] = True  # in window 1, whose 4th is the last, and the end of window 2
    needed[2][0] = True
    fed = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, out: fed.append(tuple(given[0].shape)))
    try:
        _, scores, facts = score(tmp_path, model, (41, 9, 9), needed=needed, max_batch_tokens=1)
    finally:
        hook.remove()
    assert fed[:2] == [(1, 4), (1, 4)]  # how CausalLoss finds out about the head
    assert fed[2:] == [(1, 1), (1, 4), (1, 8)]
    assert (facts["forward_passes"], facts["tokens_fed"], facts["tokens_scored"]) == (3, 13, 4)
    assert [int((~np.isnan(part)).sum()) for part in scores] == [3, 0, 1]


def test_an_expert_that_is_nowhere_needed_costs_nothing(tmp_path, model):
    seen = []
    _, scores, facts = score(
        tmp_path,
        model,
        LENGTHS,
        needed=marks_of(LENGTHS, 0.0),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert np.isnan(np.concatenate(scores)).all()
    assert (facts["forward_passes"], facts["tokens_fed"], facts["tokens_scored"]) == (0, 0, 0)
    assert (facts["compute_share"], facts["negative_log_prob"]) == (0, None)
    assert seen == []


def test_share_of_compute_by_hand(tmp_path, model):
    # Width 16, one layer: attention 4 (16 * 16 + 16) = 1088, feed-forward 2 * 16 * 64 + 64 + 16 = 2128, three layer
    # norms of 32: a body of 3312. The head, which is the embeddings, 300 * 16 = 4800.
    needed = [np.array([True, False, True, *[False] * 5]), np.zeros(4, dtype=bool)]
    _, _, facts = score(tmp_path, model, (9, 5), needed=needed, max_batch_tokens=8)
    # 3 tokens fed and 2 scored, of 8 + 4 each: (3 * 3312 + 2 * 4800) / (12 * 3312 + 12 * 4800).
    assert facts["tokens_fed"] == 3
    assert facts["compute_share"] == pytest.approx(19536 / 97344, rel=1e-12)


def test_padding_counts_as_compute(tmp_path, model):
    # Together, document 1 is padded from 4 to 8: 16 tokens fed where all are needed, and 8 where its own are not.
    needed = [np.ones(8, dtype=bool), np.zeros(4, dtype=bool)]
    _, _, full = score(tmp_path / "full", model, (9, 5))
    assert full["tokens_fed"] == 16
    _, _, facts = score(tmp_path / "some", model, (9, 5), needed=needed)
    assert facts["compute_share"] == pytest.approx((8 * 3312 + 8 * 4800) / (16 * 3312 + 12 * 4800), rel=1e-12)


def test_a_head_of_its_own_is_no_part_of_the_body(tmp_path):
    made = create_model(
        ScratchModelConfig(hidden_size=16, n_layers=1, n_heads=2), vocab_size=300, separator_id=0, context_length=16
    )
    made.set_output_embeddings(torch.nn.Linear(16, 300, bias=False))
    needed = [np.array([True, False, True, *[False] * 5]), np.zeros(4, dtype=bool)]
    _, _, facts = score(tmp_path, made, (9, 5), needed=needed, max_batch_tokens=8)
    assert facts["compute_share"] == pytest.approx(19536 / 97344, rel=1e-12)


def test_marks_of_other_documents_are_an_error(tmp_path, model):
    with pytest.raises(DataError, match="marks of needed tokens for 1 documents, but there are 2"):
        score(tmp_path, model, (9, 5), needed=[np.ones(8, dtype=bool)])
    with pytest.raises(DataError, match="document 1 has 5 marks of needed tokens for its 4 scored ones"):
        score(tmp_path, model, (9, 5), needed=[np.ones(8, dtype=bool), np.ones(5, dtype=bool)])
