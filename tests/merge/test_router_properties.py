"""Prefix and streaming routers against scikit-learn's whole pipeline, which vectorises every prefix anew."""

import unicodedata
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from tokenizers import Tokenizer

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.merge.router import PrefixRouter, context_positions

DIMENSIONS, CLUSTERS = 24, 4
# Accents in both forms, CJK, emoji with a joiner, both sigmas, dotted I, marks, digits of three kinds, underscores.
WORDS = [
    *("café", "cafe\u0301", "naïve", "Straße", "STRASSE", "\u1e9eharp", "\ufb01sh", "x86_64", "snake_case", "_private"),
    *("ΟΔΟΣ", "ΟΔΟΣ'Α", "ΣΑΣ", "ὈΔΥΣΣΕΎΣ", "ΑΣ.Α", "ΑΣʰʰ", "\u0130stanbul", "D\u0130YARBAKIR", "東京", "東京タワー"),
    *("model", "models", "modelling", "cluster", "mixture", "river", "rivers", "mountain", "2nd", "b2b", "\u0663abc"),
]
STOP_WORDS_ONLY = "the of and it is, the WITH of"
ODD = [
    " ",
    "'",
    ".",
    "-",
    "\n",
    "_",
    "7",
    "1999",
    "\u0663",
    "\u00b2",
    "\U0001d7d8",
    "\U0001f600",
    "\u200d",
    "\u00ad",
    "\u0301",
]
ODD += ["Σ", "Σ", "\u0130", "ʰ", "a", "Α", "\u4e2d", "the ", "of", "THE", "\ufffd"]
texts = st.one_of(
    st.lists(st.sampled_from([*WORDS, *ODD, *[" "] * 15]), max_size=16).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=16),
)


class NumberDeletingVectorizer(TfidfVectorizer):
    def build_tokenizer(self):
        tokenize = super().build_tokenizer()
        return lambda text: [word for word in tokenize(text) if not word[0].isdigit()]


@dataclass(frozen=True)
class Fitted:
    pipeline: Pipeline
    centers: np.ndarray
    embedder: TfidfSvdEmbedder
    router: PrefixRouter

    def distances_of_each(self, prefixes):
        return euclidean_distances(self.pipeline.transform(prefixes), self.centers)


@pytest.fixture(scope="module")
def documents():
    """Half of the beginnings of every word, so that a prefix often ends in a word, in documents that share some."""
    beginnings = [word[:end] for word in WORDS for end in range(2, len(word) + 1)] + ["οδοσ", "ασ", "σασ"]
    rng = np.random.default_rng(0)
    chosen = rng.permutation(beginnings)[: len(beginnings) * 3 // 4]
    return [" ".join(rng.choice(chosen, size=8)) + f" the {index}" for index in range(150)]


@pytest.fixture(scope="module")
def fitted(documents):
    vectorizer = NumberDeletingVectorizer(stop_words="english")
    svd = TruncatedSVD(DIMENSIONS, random_state=0)
    pipeline = make_pipeline(vectorizer, svd, Normalizer())
    kmeans = KMeans(CLUSTERS, n_init=1, random_state=0).fit(pipeline.fit_transform(documents))
    # The embedder as a run has it: float32, and its own idea of what a word is.
    embedder = TfidfSvdEmbedder.from_arrays(
        vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, svd.components_
    )
    router = PrefixRouter(embedder.vocabulary_, embedder.word_vectors_, kmeans.cluster_centers_)
    return Fitted(pipeline, kmeans.cluster_centers_, embedder, router)


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory):
    """A byte-level BPE with so few merges that characters outside of ASCII come in pieces; and how it decodes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = TextTokenizer.train(documents, vocab_size=257 + 40)
    tokenizer.save(folder)
    return tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_embedder_takes_the_same_words_as_the_pipeline(fitted, documents):
    words = fitted.pipeline.named_steps["numberdeletingvectorizer"].get_feature_names_out().tolist()
    assert list(TfidfSvdEmbedder(n_components=2).fit(documents).vocabulary_) == words
    assert {"οδος", "οδοσ", "東京", "stanbul", "café", "x86_64", "ʰʰ"} & set(words)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts)
@example("")
@example(STOP_WORDS_ONLY)
@example("1999 2nd 7 \u0663\u0664 \u00b2 64_x")
@example("ΟΔΟΣ. ΟΔΟΣ'Α ὈΔΥΣΣΕΎΣ ΣΑΣΑΣ ΑΣʰʰ Σ")
@example("\u0130stanbul'da D\u0130YARBAKIR\u0130")
@example(unicodedata.normalize("NFD", "café naïve 東京タワー") + " \U0001f468\u200d\U0001f469 x86_64_")
def test_every_prefix_is_routed_as_the_pipeline_does(fitted, text):
    expected = fitted.distances_of_each([text[:end] for end in range(len(text) + 1)])
    np.testing.assert_allclose(fitted.router.distances(text, np.arange(len(text) + 1)), expected, atol=1e-5)
    stream, streamed = fitted.router.stream(), []
    for char in ["", *text]:
        stream.push(char)
        streamed.append(stream.distances())
    np.testing.assert_allclose(streamed, expected, atol=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(texts, st.lists(st.integers(0, 60), max_size=10))
def test_any_cuts_in_any_order_are_routed_as_the_pipeline_does(fitted, text, cuts):
    cuts = [cut for cut in cuts if cut <= len(text)]
    if cuts:
        expected = fitted.distances_of_each([text[:cut] for cut in cuts])
        np.testing.assert_allclose(fitted.router.distances(text, np.array(cuts)), expected, atol=1e-5)
    borders = sorted({0, *cuts, len(text)})
    stream, streamed = fitted.router.stream(), [fitted.router.stream().distances()]
    for begin, end in pairwise(borders):
        stream.push(text[begin:end])
        streamed.append(stream.copy().distances())
    np.testing.assert_allclose(streamed, fitted.distances_of_each([text[:end] for end in borders]), atol=1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts)
@example("\U0001f600\u4e2d\u6587 ΑΣ\U0001f600 café\U0001f468\u200d\U0001f469")
def test_tokens_that_are_pieces_of_a_character_are_routed_by_the_text_before_them(fitted, tokenizer, text):
    ours, decoder = tokenizer
    tokens, starts = ours.encode_with_starts(text)
    assert starts[0] == 0
    # An unfinished character is decoded as U+FFFD, which belongs to no word and settles no sigma.
    prefixes = ["", *(decoder.decode(tokens[1:end].tolist()) for end in range(1, len(tokens)))]
    expected = fitted.distances_of_each(prefixes)
    np.testing.assert_allclose(fitted.router.distances(text, starts), expected, atol=1e-5)
    # What a context shows the released code: for the target after t inputs, tokens[:t - 1]; the separator has no text.
    lagging = starts[context_positions(len(tokens) - 1, lag=1)]
    np.testing.assert_allclose(fitted.router.distances(text, lagging), expected[: len(tokens) - 1], atol=1e-5)


def test_characters_do_come_in_pieces(tokenizer):
    tokens, starts = tokenizer[0].encode_with_starts("\U0001f600")
    assert len(tokens) > 2
    assert set(starts.tolist()) == {0}  # the pieces all begin where the character does


def test_a_text_without_any_known_word_is_as_far_as_the_empty_one(fitted):
    starts = np.arange(len(STOP_WORDS_ONLY) + 1)
    for text in (STOP_WORDS_ONLY, "1999 2024, 7 - 64_bit! ...".ljust(len(starts))):
        distances = fitted.router.distances(text, starts[: len(text) + 1])
        np.testing.assert_array_equal(distances, np.tile(distances[0], (len(distances), 1)))
        # |0 - c|
        np.testing.assert_allclose(distances[0], np.linalg.norm(fitted.centers, axis=1), atol=1e-6)
