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
from cbtm.merge.router import PrefixRouter, context_positions, mean_routing_weights, routing_weights

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


# Some of the clusters


def test_a_subset_has_the_columns_of_its_clusters_in_the_order_asked_for():
    _, _, _, router = vectorizer_and_router(["some words", "other text"])
    text, starts = "some other words", np.array([0, 4, 10, 16])
    all_clusters = router.distances(text, starts)
    # Equal up to the rounding of a matrix product of another shape.
    np.testing.assert_allclose(router.subset([2, 0]).distances(text, starts), all_clusters[:, [2, 0]], atol=1e-6)
    np.testing.assert_array_equal(router.distances(text, starts), all_clusters)  # itself unchanged
    assert router.n_clusters == 3
    assert router.subset([2, 0]).n_clusters == 2


def test_a_subset_of_a_subset_counts_from_its_own_clusters():
    router = PrefixRouter({"up": 0}, np.ones((1, 1), dtype=np.float32), np.array([[1.0], [3.0], [6.0]]))
    # "up" is at 1; centres 3 and 6 are left, of which 6 is number 1
    assert router.subset([1, 2]).subset([1]).distances("up", np.array([2])).tolist() == [[5]]


@pytest.mark.parametrize("clusters", [[], [3], [-1], [0, 0]])
def test_a_subset_of_clusters_that_are_not_there_is_refused(clusters):
    _, _, _, router = vectorizer_and_router(["some words"])
    message = f"clusters={clusters} is no choice of the 3 clusters; name one or more of 0 to 2, each once"
    with pytest.raises(ConfigError, match=re.escape(message)):
        router.subset(clusters)


# Contexts


def test_every_token_sees_all_text_before_it_unless_asked_otherwise():
    assert context_positions(4).tolist() == [1, 2, 3, 4]
    assert context_positions(4).dtype == np.int64
    assert context_positions(0).tolist() == []


def test_refresh_keeps_the_weights_of_the_first_of_so_many_tokens():
    assert context_positions(7, refresh=3).tolist() == [1, 1, 1, 4, 4, 4, 7]
    assert context_positions(7, refresh="once").tolist() == [1] * 7
    assert context_positions(7, refresh=100).tolist() == [1] * 7


def test_refresh_counts_from_the_first_token_behind_the_prompt():
    # Tokens 1 and 2 are the prompt; 3, 4, 5 and then 6, 7 share.
    assert context_positions(7, prompt=2, refresh=3).tolist() == [1, 2, 3, 3, 3, 6, 6]
    assert context_positions(7, prompt=2, refresh="once").tolist() == [1, 2, 3, 3, 3, 3, 3]
    assert context_positions(3, prompt=3, refresh="once").tolist() == [1, 2, 3]  # nothing behind it


def test_weights_freeze_after_a_part_of_the_document():
    assert context_positions(8, context_ratio=0.5).tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    assert context_positions(5, context_ratio=0.5).tolist() == [1, 2, 2, 2, 2]  # int(2.5)
    assert context_positions(3, context_ratio=0.01).tolist() == [1, 1, 1]  # at least one


def test_the_rules_apply_as_refresh_then_context_ratio_then_lag():
    # refresh 2 behind token 1: 1 2 2 4 4 6 6 8; int(.7 * 8) = 5: 1 2 2 4 4 5 5 5; one back: 0 1 1 3 3 4 4 4
    got = context_positions(8, prompt=1, refresh=2, context_ratio=0.7, lag=1)
    assert got.tolist() == [0, 1, 1, 3, 3, 4, 4, 4]


def test_a_lag_stops_at_the_empty_text():
    assert context_positions(4, lag=3).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("row", [["The", " cat", " sat", " down"], ["", "The", " cat", " sat", " down"]])
@pytest.mark.parametrize("lag", [0, 1])
def test_lag_1_is_the_released_code_which_does_not_see_the_last_token(row, lag):
    # With and without a separator, which has no text. The released code weighs the experts for the target after t
    # input tokens by the text of tokens[:t - 1], and by an empty text for the first; lag 0 sees all t.
    text = "".join(row)
    starts = np.cumsum([0, *map(len, row)])[:-1]
    contexts = [text[:start] for start in starts[context_positions(len(row) - 1, lag=lag)]]
    assert contexts == ["".join(row[: t - lag]) for t in range(1, len(row))]
    assert lag == 0 or contexts[0] == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": 0}, 'refresh=0 is not a number of tokens; use 1 or more, or "once"'),
        ({"refresh": -2}, "refresh=-2"),
        ({"context_ratio": 0}, "context_ratio=0 is not in (0, 1]; use 1 for the whole document"),
        ({"context_ratio": 1.5}, "context_ratio=1.5"),
        ({"context_ratio": float("nan")}, "context_ratio=nan"),
        ({"lag": -1}, "lag=-1 would show a token to its own weights; use 0, or 1 for the reference's"),
    ],
)
def test_settings_that_choose_no_context_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        context_positions(4, **settings)


@pytest.mark.parametrize("prompt", [-1, 5])
def test_a_prompt_longer_than_the_document_is_refused(prompt):
    message = f"prompt={prompt} is not in [0, 4]; count only tokens of this document that are scored"
    with pytest.raises(DataError, match=re.escape(message)):
        context_positions(4, prompt=prompt)


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


def test_mean_weights_are_those_of_the_chosen_tokens():
    # Power 1, T = 1: distances 0 and ln 3 weigh 3/4 and 1/4, equal ones 1/2 each; the third token is not chosen.
    distances = np.array([[0, np.log(3)], [1, 1], [0, 50]])
    chosen = np.array([True, True, False])
    weights = mean_routing_weights(distances, chosen, temperature=1, distance_power=1)
    np.testing.assert_allclose(weights, [5 / 8, 3 / 8])


def test_mean_weights_of_many_tokens_are_their_mean():
    distances = np.random.default_rng(2).random((40_000, 3)).astype(np.float32)
    weights = mean_routing_weights(distances, np.ones(40_000, dtype=bool), temperature=0.1)
    np.testing.assert_allclose(weights, routing_weights(distances, temperature=0.1).mean(axis=0))
    assert weights.sum() == pytest.approx(1)


def test_the_mean_of_no_token_is_refused():
    with pytest.raises(DataError, match="none of the 2 tokens is chosen"):
        mean_routing_weights(np.ones((2, 2)), np.zeros(2, dtype=bool), temperature=1)
