import re
from dataclasses import replace

import numpy as np
import pytest

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.fit import fit_clusterer
from cbtm.corpus import Document
from cbtm.errors import DataError, ManifestError
from cbtm.merge.config import RoutingConfig
from cbtm.merge.router import PrefixRouter
from cbtm.merge.validation_set import (
    ValidationSet,
    context_distances,
    evenly_spaced,
    selection_documents,
    token_offsets,
    token_starts,
)

TEXTS = [
    "the cat sat on the mat while the dogs slept",
    "stocks fell as banks raised interest rates again",
    "naïve café owners sell crème brûlée at night",
    "a goal in the last minute won the match 3:2",
    "cats and dogs chase mice around old houses",
    "interest in bank shares rose after the market closed",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A fitted clusterer of three clusters, a tokenizer of two letters a token, and the documents."""
    folder = tmp_path_factory.mktemp("clusterer")
    documents = [Document(f"d|{number}", text) for number, text in enumerate(TEXTS)]
    fit_clusterer(ClusterConfig(n_clusters=3, n_components=4), documents, folder)
    tokenizer = TextTokenizer.train(TEXTS, 300)
    validation = ValidationSet(
        texts=TEXTS,
        tokens=tokenizer.encode_batch(TEXTS),
        clusters=np.zeros(len(TEXTS), dtype=np.int64),
        n_bytes=np.array([len(text.encode()) for text in TEXTS]),
    )
    return Clusterer.load(folder), tokenizer, validation


def router_of(clusterer):
    return PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)


def embedded(clusterer, contexts):
    """Distances of texts to the centres, each embedded by itself."""
    vectors = clusterer.embedder.transform(contexts)
    return np.linalg.norm(vectors[:, None] - clusterer.centers[None], axis=2)


def contexts(tokenizer, validation, seen):
    """The text before `seen(token, n_tokens, document)` tokens, for each scored token 1 … n_tokens of each document."""
    found = []
    for index, (text, row) in enumerate(zip(validation.texts, validation.tokens, strict=True)):
        starts = tokenizer.encode_with_starts(text)[1][validation.first :]
        found += [text[: starts[seen(token, len(row) - 1, index)]] for token in range(1, len(row))]
    return found


# --- distances of contexts ---


def test_distances_are_those_of_the_text_before_each_token(parts):
    clusterer, tokenizer, validation = parts
    seen = []
    found = context_distances(router_of(clusterer), tokenizer, validation, progress=lambda *so_far: seen.append(so_far))
    assert found.shape == (validation.offsets[-1], 3)
    assert found.dtype == np.float32
    before = contexts(tokenizer, validation, lambda token, n, index: token)
    np.testing.assert_allclose(found, embedded(clusterer, before), atol=1e-5)
    # The first token of a text is routed by the empty text, the same for all: its distances are the centres' lengths.
    np.testing.assert_allclose(
        found[validation.offsets[:-1]], np.tile(np.linalg.norm(clusterer.centers, axis=1), (6, 1)), atol=1e-6
    )
    assert seen == [(number, 6) for number in range(1, 7)]


PROMPTS = [0, 3, 1, 12, 5, 20]  # tokens


@pytest.mark.parametrize(
    ("routing", "seen"),
    [
        # Token t of n, behind a prompt of p, sees the text before token …
        ({"lag": 1}, lambda t, n, p: t - 1),
        ({"lag": 4}, lambda t, n, p: max(t - 4, 0)),
        ({"refresh": 3}, lambda t, n, p: t if t <= p else p + 1 + 3 * ((t - p - 1) // 3)),
        ({"refresh": "once"}, lambda t, n, p: min(t, p + 1)),
        ({"context_ratio": 0.5}, lambda t, n, p: min(t, n // 2)),
        ({"context_ratio": 0.25, "lag": 2}, lambda t, n, p: max(min(t, n // 4) - 2, 0)),
        ({"refresh": 4, "lag": 1}, lambda t, n, p: (t if t <= p else p + 1 + 4 * ((t - p - 1) // 4)) - 1),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("prompts", [[0] * 6, PROMPTS], ids=["plain", "prompts"])
def test_routing_settings_say_which_text_a_token_sees(parts, routing, seen, prompts):
    clusterer, tokenizer, validation = parts
    if any(prompts):
        marks = [np.arange(len(row) - 1) >= prompt for row, prompt in zip(validation.tokens, prompts, strict=True)]
        assert all(mark.any() for mark in marks)
        validation = replace(validation, counted=marks)
    found = context_distances(router_of(clusterer), tokenizer, validation, RoutingConfig(**routing))
    before = contexts(tokenizer, validation, lambda token, n, index: seen(token, n, prompts[index]))
    np.testing.assert_allclose(found, embedded(clusterer, before), atol=1e-5)


def test_once_is_the_prompt_for_the_whole_answer(parts):
    clusterer, tokenizer, validation = parts
    marks = [np.arange(len(row) - 1) >= prompt for row, prompt in zip(validation.tokens, PROMPTS, strict=True)]
    asked = replace(validation, counted=marks)
    found = context_distances(router_of(clusterer), tokenizer, asked, RoutingConfig(refresh="once"))
    for index, prompt in enumerate(PROMPTS):
        text, starts = TEXTS[index], tokenizer.encode_with_starts(TEXTS[index])[1]
        answer = found[validation.offsets[index] + prompt : validation.offsets[index + 1]]
        np.testing.assert_allclose(
            answer, np.tile(embedded(clusterer, [text[: starts[prompt + 1]]]), (len(answer), 1)), atol=1e-5
        )


def test_rows_that_are_a_part_of_their_document_see_the_text_before_them(parts):
    # Without the separator, and cut after seven tokens: the first is given, and six are scored.
    clusterer, tokenizer, validation = parts
    cut = replace(validation, tokens=[row[1:8] for row in validation.tokens], first=1)
    found = context_distances(router_of(clusterer), tokenizer, cut)
    whole = context_distances(router_of(clusterer), tokenizer, validation)
    assert found.shape == (6 * 6, 3)
    for index, start in enumerate(validation.offsets[:-1]):
        np.testing.assert_array_equal(found[6 * index : 6 * index + 6], whole[start + 1 : start + 7])


def test_distances_go_into_a_file_that_is_given(parts, tmp_path):
    clusterer, tokenizer, validation = parts
    shape = (int(validation.offsets[-1]), 3)
    out = np.lib.format.open_memmap(tmp_path / "distances.npy", mode="w+", dtype=np.float32, shape=shape)
    assert context_distances(router_of(clusterer), tokenizer, validation, out=out) is out
    expected = context_distances(router_of(clusterer), tokenizer, validation)
    np.testing.assert_array_equal(np.load(tmp_path / "distances.npy"), expected)


# --- places of tokens in the text ---


def test_starts_are_where_each_token_of_a_row_begins(parts):
    _, tokenizer, _ = parts
    row, starts = tokenizer.encode_with_starts("the café")
    assert token_starts(tokenizer, "the café", row, 0, 0).tolist() == starts.tolist()
    assert token_starts(tokenizer, "the café", row[1:4], 1, 0).tolist() == starts[1:4].tolist()
    assert (starts[0], starts[1]) == (0, 0)  # the separator has no width


def test_tokenizer_that_cuts_otherwise_is_refused(parts):
    clusterer, tokenizer, validation = parts
    other = TextTokenizer.train(["entirely other words make entirely other merges"] * 3, 300)
    again, there = len(other.encode_batch(TEXTS)[0]), len(validation.tokens[0])
    message = f"document 0 has {again} tokens now, which are not the {there} in the token shards"
    with pytest.raises(ManifestError, match=message):
        context_distances(router_of(clusterer), other, validation)
    # As many tokens, but not the same.
    turned = [*validation.tokens[:2], validation.tokens[2][::-1], *validation.tokens[3:]]
    with pytest.raises(ManifestError, match=r"validation document 2 has .* tokens now"):
        context_distances(router_of(clusterer), tokenizer, replace(validation, tokens=turned))
    changed = replace(validation, texts=[*TEXTS[:4], TEXTS[4].replace("mice", "rats"), TEXTS[5]])
    with pytest.raises(ManifestError, match=r"validation document 4 has .*; run the assign stage again"):
        context_distances(router_of(clusterer), tokenizer, changed)
    # Of a text that became shorter than its row.
    with pytest.raises(ManifestError, match="validation document 7 has"):
        token_starts(tokenizer, TEXTS[0][:10], validation.tokens[0], 0, 7)


# --- which documents ---


@pytest.mark.parametrize(
    ("n_documents", "at_most", "places"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (5, 9, [0, 1, 2, 3, 4]),
        (5, 5, [0, 1, 2, 3, 4]),
        (10, 4, [0, 1, 4, 5]),  # of 0, 3, 4, 6, 8 that choose the places 0 and 2.5; of 1, 2, 5, 7, 9 the same
        (10, 5, [0, 1, 3, 5, 6]),  # three of those that choose, at 0, 1.7 and 3.3
        (10, 1, [0]),
        (7, 6, [0, 1, 2, 3, 4, 5]),
        (0, 3, []),
        (0, None, []),
    ],
)
def test_places_are_evenly_spaced(n_documents, at_most, places):
    assert evenly_spaced(n_documents, at_most).tolist() == places


def test_as_many_places_as_asked_for_half_of_them_from_either_half_and_none_far_from_the_next():
    for n_documents in range(1, 40):
        for at_most in range(1, n_documents + 1):
            places = evenly_spaced(n_documents, at_most)
            assert len(set(places.tolist())) == at_most
            choosing = selection_documents(n_documents)
            for mask, wanted in ((choosing, (at_most + 1) // 2), (~choosing, at_most // 2)):
                half = np.cumsum(mask)[[place for place in places if mask[place]]] - 1
                size = np.count_nonzero(mask)
                assert len(half) == wanted
                gaps = np.diff([*half, size])
                assert all(size // wanted <= gap <= -(-size // wanted) for gap in gaps) or not wanted


def test_one_of_each_two_neighbours_is_in_either_half():
    for n_documents in (0, 1, 2, 5, 40, 1001):
        mask = selection_documents(n_documents)
        pairs = mask[: 2 * (n_documents // 2)].reshape(-1, 2)
        assert (pairs.sum(axis=1) == 1).all()
        assert mask[2 * len(pairs) :].all()  # the last of an odd number


def test_halves_are_the_same_for_ever_and_grow_with_the_split():
    # Another rule would report on documents that earlier trainings were validated on.
    assert selection_documents(9).tolist() == [True, False, False, True, True, False, True, False, True]
    np.testing.assert_array_equal(selection_documents(1000)[:400], selection_documents(400))


@pytest.mark.parametrize("period", [2, 3, 4, 8])
def test_kinds_that_take_turns_are_in_both_halves_alike(period):
    mask = selection_documents(4000)
    shares = [mask[kind::period].mean() for kind in range(period)]
    assert max(abs(share - 0.5) for share in shares) < 0.08


def test_offsets_count_scored_tokens_alone():
    assert token_offsets([np.zeros(3), np.zeros(1), np.zeros(5)]).tolist() == [0, 2, 2, 6]
    assert token_offsets([]).tolist() == [0]


def test_counted_tokens_of_documents():
    rows = [np.arange(4), np.arange(3)]
    validation = ValidationSet(["a", "b"], rows, np.zeros(2, np.int64), np.ones(2, np.int64))
    assert validation.n_counted.tolist() == [3, 2]
    marks = [np.array([False, True, True]), np.array([False, True])]
    assert replace(validation, counted=marks).n_counted.tolist() == [2, 1]


# --- what cannot be measured on ---


def four(**changes):
    rows = [np.zeros(3, np.int64)] * 4
    plain = ValidationSet(["ab"] * 4, rows, np.zeros(4, np.int64), np.full(4, 2))
    return replace(plain, **changes)


def test_four_documents_of_a_token_each_are_enough():
    four(tokens=[np.zeros(2, np.int64)] * 4).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokens": [np.zeros(3, np.int64)] * 3},
            "has 3 documents that can be scored, 2 of them to choose the temperature and 1 to report on",
        ),
        (
            {"tokens": [np.zeros(length, np.int64) for length in (3, 2, 1, 3)]},
            "the tokenizer makes no token of validation document 2; remove it from the corpus",
        ),
        (
            {"counted": [np.ones(2, bool)] * 3},
            "the marks of counted tokens are 6 for 3 documents, the tokens 8 for 4; run the assign stage again",
        ),
        (
            # As many in all, but not of each document.
            {"counted": [np.ones(length, bool) for length in (1, 3, 2, 2)]},
            "the marks of counted tokens are 8 for 4 documents, the tokens 8 for 4; run the assign stage again",
        ),
        (
            {"counted": [np.ones(2, bool), np.zeros(2, bool), np.ones(2, bool), np.ones(2, bool)]},
            "validation document 1 has no token after its prompt, so nothing of it counts; remove it from the corpus",
        ),
    ],
)
def test_documents_that_nothing_can_be_measured_on_are_refused(changes, message):
    with pytest.raises(DataError, match=re.escape(message)):
        four(**changes).check()
