import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from cbtm.errors import ConfigError, DataError
from cbtm.merge.router import PrefixRouter, routing_weights

STOP_WORDS = ["the", "of", "aa"]
DIMENSIONS, CLUSTERS = 12, 3
SIGMA = "\u03a3"
# Letters that lower-case by context or to two characters, that carry marks, are no letters, or are digits.
NASTY = [
    *"abZ\u00df\u00e9\u0391\u03b1\u03c2\u03c3_ .'\u00b7\u00ad:-\n\t7\u0663\u00b2\u4e2d\u6587\u02b0\u1e9e",
    SIGMA,
    SIGMA,  # twice as often
    "\u0130",
    "e\u0301",
    "\u0301",
    "\u0307",
    "\U0001f600",
    "\U0001d7d8",
    "\u200d",
    "the ",
    "of",
    "AA",
]


class NumberDeletingVectorizer(TfidfVectorizer):
    def build_tokenizer(self):
        tokenize = super().build_tokenizer()
        return lambda text: [word for word in tokenize(text) if not word[0].isdigit()]


def vectorizer_and_router(fitted_on, seed=0):
    vectorizer = NumberDeletingVectorizer(stop_words=STOP_WORDS).fit([*fitted_on, "anchor words"])
    rng = np.random.default_rng(seed)
    projection = rng.normal(size=(len(vectorizer.vocabulary_), DIMENSIONS))
    centers = rng.normal(size=(CLUSTERS, DIMENSIONS)) / 3
    word_vectors = (vectorizer.idf_[:, np.newaxis] * projection).astype(np.float32)
    return vectorizer, projection, centers, PrefixRouter(vectorizer.vocabulary_, word_vectors, centers)


def distances_of_every_prefix(vectorizer, projection, centers, prefixes):
    embeddings = normalize(vectorizer.transform(prefixes) @ projection)
    return np.linalg.norm(embeddings[:, np.newaxis] - centers, axis=2)


def assert_routes_like_scikit_learn(text, fitted_on=None):
    prefixes = [text[:end] for end in range(len(text) + 1)]
    # Fitted on the prefixes, nearly every piece of a word is a word: the hardest vocabulary.
    vectorizer, projection, centers, router = vectorizer_and_router(fitted_on or prefixes)
    expected = distances_of_every_prefix(vectorizer, projection, centers, prefixes)
    got = router.distances(text, np.arange(len(text) + 1))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(NASTY), max_size=24).map("".join))
@example("\u0391\u03a3\u0391 \u0391\u03a3")  # medial, then final
@example("\u0391\u03a3.\u0391")  # final in "ΑΣ." until the letter after the point comes
@example("\u0391\u03a3''\u02b0\u02b0b")  # the ignorable run holds a word of modifier letters
@example("\u0391\u03a3\u02b0\u02b0b")  # and here they extend the word of the sigma
@example("a.\u03a3\u02b0b")  # a word that is one letter long before it grows
@example("a\u0130\u03a3\u0130b ab")  # positions move behind each U+0130
@example("\u03a3\u03a3\u03a3\u03a3")
@example("7ab ab7 a7 77 _7 \u0663ab \u00b2ab")  # only the first character makes a number
@example("a ab abc the then theb")
@example("")
def test_equals_vectorising_every_prefix_on_odd_text(text):
    assert_routes_like_scikit_learn(text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_equals_vectorising_every_prefix_on_any_unicode(text):
    assert_routes_like_scikit_learn(text)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_equals_vectorising_every_prefix_of_prose_with_words_outside_the_vocabulary(form):
    text = unicodedata.normalize(
        form,
        "The café of Ὀδυσσεύς, naïve in 1999 and 2nd to none: ΟΔΟΣ. ὉΔΟΣ'Α İstanbul STRASSE straße x86_64 "
        "snake_case 東京 タワー 😀 e\u0301 it's a_b I am; cafés, cafe.",
    )
    corpus = ["the café of none", "naïve in istanbul", "οδος οδοσ strasse", "snake_case cafés cafe am it", "ca"]
    assert_routes_like_scikit_learn(text, [unicodedata.normalize(form, document) for document in corpus])


def test_hand_computed_distances():
    # Words: north = (0, 3), east = (4, 0). Centres: (0, 1) and (1, 0).
    router = PrefixRouter(
        {"north": 0, "east": 1}, np.array([[0, 3], [4, 0]], dtype=np.float32), np.array([[0.0, 1.0], [1.0, 0.0]])
    )
    text = "north east"
    got = router.distances(text, np.array([0, 2, 5, 6, 9, 10]))
    expected = [
        [1, 1],  # "": the zero vector
        [1, 1],  # "no": not a word
        [0, 2**0.5],  # "north": (0, 1)
        [0, 2**0.5],  # "north "
        [0, 2**0.5],  # "north eas"
        [(0.8**2 + 0.4**2) ** 0.5, (0.2**2 + 0.6**2) ** 0.5],  # (4, 3) / 5 = (.8, .6)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_repeated_word_counts_each_time():
    router = PrefixRouter({"up": 0, "on": 1}, np.eye(2, dtype=np.float32), np.zeros((1, 2)))
    far = PrefixRouter({"up": 0, "on": 1}, np.eye(2, dtype=np.float32), np.array([[1.0, 0.0]]))
    # up up on: (2, 1) / sqrt(5), at squared distance 2 - 2 * 2 / sqrt(5) from (1, 0)
    assert far.distances("up up on", np.array([8]))[0, 0] == pytest.approx((2 - 4 / 5**0.5) ** 0.5)
    assert router.distances("up up on", np.array([8]))[0, 0] == pytest.approx(1)  # unit length


def test_the_longest_word_is_found_as_the_beginning_of_a_longer_one():
    router = PrefixRouter({"north": 0}, np.ones((1, 1), dtype=np.float32), np.array([[1.0]]))
    # "nort" and "northe" are no words; "north" lies on the centre
    np.testing.assert_array_equal(router.distances("northern", np.array([4, 5, 6]))[:, 0], [1, 0, 1])


def test_starts_may_come_in_any_order_and_repeat():
    vectorizer, projection, centers, router = vectorizer_and_router(["some words", "som other ασ ας"])
    text = "İ some ΑΣ.Α other words"
    starts = np.array([9, 3, 23, 0, 9, 10, 11])
    expected = distances_of_every_prefix(vectorizer, projection, centers, [text[:start] for start in starts])
    np.testing.assert_allclose(router.distances(text, starts), expected, atol=1e-5)


def test_text_after_the_last_start_has_no_influence():
    _, _, _, router = vectorizer_and_router(["ας ασα some"])
    starts = np.arange(3)
    np.testing.assert_array_equal(router.distances("ΑΣΑ", starts), router.distances("ΑΣ", starts))


def test_no_starts_give_no_distances():
    _, _, _, router = vectorizer_and_router(["some words"])
    assert router.distances("some", np.array([], dtype=np.int64)).shape == (0, CLUSTERS)
    assert router.distances("", np.array([0, 0])).shape == (2, CLUSTERS)


def test_lower_depends_on_the_context_for_sigma_alone():
    # What the router relies on; a Unicode version that breaks it breaks this test first.
    depends = []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if ("a" + char + "a").lower() != "a" + char.lower() + "a" or ("a" + char).lower() != "a" + char.lower():
            depends.append(char)
    assert depends == [SIGMA]


class CountingVocabulary(dict):
    characters = 0

    def get(self, word, default=None):
        self.characters += len(word)
        return super().get(word, default)


@pytest.mark.parametrize("text", ["ab" * 2000, "ab " * 1300, "ΑΣ" * 2000, "ΑΣ." * 1300, "ΑΣ" + "." * 4000 + "Α"])
def test_looked_up_characters_grow_linearly_with_the_text(text):
    vocabulary = CountingVocabulary({"ab": 0, "ας": 1, "ασ": 2})
    router = PrefixRouter(vocabulary, np.eye(3, dtype=np.float32), np.eye(3))
    router.distances(text, np.arange(len(text) + 1))
    # Whole words once, and at each start a piece of at most 2 characters, twice more where a sigma is swapped.
    assert vocabulary.characters <= 7 * len(text)


@pytest.mark.parametrize("starts", [[5], [-1], [0, 9]])
def test_starts_outside_of_the_text_are_refused(starts):
    _, _, _, router = vectorizer_and_router(["some words"])
    with pytest.raises(DataError, match=r"the text has 4 characters; give offsets in characters, not in bytes"):
        router.distances("some", np.array(starts))


def test_starts_must_be_a_vector_of_integers():
    _, _, _, router = vectorizer_and_router(["some words"])
    with pytest.raises(DataError, match=r"dtype float64; expected a vector of integers"):
        router.distances("some", np.array([1.0]))


def test_arrays_of_different_clusterers_are_refused():
    with pytest.raises(DataError, match=r"word_vectors of shape \(1, 2\) and centers of shape \(1, 3\)"):
        PrefixRouter({"ab": 0}, np.ones((1, 2)), np.ones((1, 3)))
    with pytest.raises(DataError, match=r"names rows 0 to 1, word_vectors has 1"):
        PrefixRouter({"ab": 0, "cd": 1}, np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(DataError, match="centers holds values that are not finite"):
        PrefixRouter({"ab": 0}, np.ones((1, 2)), np.array([[np.nan, 0]]))


# Weights


def test_weights_are_the_papers_formula():
    # exp(-d^2 / T), d = 1 and 2, T = 2: exp(-.5), exp(-2); ratio exp(1.5)
    weights = routing_weights(np.array([1.0, 2.0]), temperature=2)
    assert weights[0] / weights[1] == pytest.approx(np.exp(1.5))
    assert weights.sum() == pytest.approx(1)


def test_power_4_gives_the_weights_of_the_released_code():
    # Squared distances .6, .8, 1.0 at T = .1: exp(-10 d^4) ∝ exp(0), exp(-2.8), exp(-6.4)
    distances = np.sqrt([0.6, 0.8, 1.0])
    by_hand = np.exp([0, -2.8, -6.4])
    weights = routing_weights(distances, temperature=0.1, distance_power=4)
    np.testing.assert_allclose(weights, by_hand / by_hand.sum())
    np.testing.assert_allclose(weights, [0.941, 0.057, 0.002], atol=1e-3)
    by_hand = np.exp([0, -2.0, -4.0])
    np.testing.assert_allclose(routing_weights(distances, temperature=0.1), by_hand / by_hand.sum())


def test_top_k_keeps_the_nearest_and_renormalises():
    # Of exp(-1), exp(-2), exp(-3) at T = 1 and power 1, the first two: 1 / (1 + exp(-1))
    weights = routing_weights(np.array([[3.0, 1.0, 2.0]]), temperature=1, distance_power=1, top_k=2)
    first = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(weights, [[0, first, 1 - first]])
    assert weights[0, 0] == 0


def test_ties_go_to_the_lowest_index():
    weights = routing_weights(np.array([[2.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]), temperature=1, top_k=2)
    np.testing.assert_array_equal(weights > 0, [[True, True, False, False], [True, True, False, False]])


def test_top_k_equal_to_k_is_the_dense_ensemble():
    distances = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    dense = routing_weights(distances, temperature=0.1)
    np.testing.assert_array_equal(routing_weights(distances, temperature=0.1, top_k=4), dense)


def test_a_tiny_temperature_takes_the_nearest_without_dividing_by_zero():
    weights = routing_weights(np.array([[1e3, 1e3 + 1, 5e3]]), temperature=1e-300)
    np.testing.assert_array_equal(weights, [[1, 0, 0]])


def test_a_huge_temperature_weighs_all_alike():
    np.testing.assert_allclose(routing_weights(np.array([0.1, 0.9]), temperature=1e30), [0.5, 0.5])


def test_leading_axes_are_kept():
    distances = np.random.default_rng(1).random((2, 3, 4))
    weights = routing_weights(distances, temperature=0.1, top_k=3)
    assert weights.shape == (2, 3, 4)
    np.testing.assert_allclose(weights[1, 2], routing_weights(distances[1, 2], temperature=0.1, top_k=3))
    assert routing_weights(np.empty((0, 4)), temperature=0.1, top_k=1).shape == (0, 4)


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ConfigError, match=re.escape(f"temperature={temperature} is not a positive finite number")):
        routing_weights(np.ones(2), temperature=temperature)


def test_a_distance_power_of_zero_is_refused():
    with pytest.raises(ConfigError, match="distance_power=0 is not a positive finite number"):
        routing_weights(np.ones(2), temperature=1, distance_power=0)


@pytest.mark.parametrize("top_k", [0, -1, 3])
def test_top_k_outside_of_the_experts_is_refused(top_k):
    with pytest.raises(ConfigError, match=re.escape(f"top_k={top_k} is not in [1, 2]")):
        routing_weights(np.ones(2), temperature=1, top_k=top_k)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, 1e200])
def test_distances_that_are_no_distances_are_refused(wrong):
    with pytest.raises(DataError, match="distances must be finite and not negative"):
        routing_weights(np.array([1.0, wrong]), temperature=1)
