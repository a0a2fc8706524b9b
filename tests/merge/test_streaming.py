import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cbtm.merge.router import PrefixRouter
from cbtm.merge.streaming import is_case_ignorable

SIGMA = "\u03a3"
# Words that end in both forms of sigma, hold one, are made of case-ignorable letters, or of what U+0130 becomes.
WORDS = [
    *(
        "aa",
        "ab",
        "ba",
        "ας",
        "ασ",
        "ασα",
        "ασας",
        "σα",
        "σσ",
        "σς",
        "αʰ",
        "ʰʰ",
        "ςʰ",
        "ασʰ",
        "αςʰ",
        "ασʰb",
        "is",
        "ss",
    ),
    *("東京", "é\u0301a", "ba_", "_b"),
    *("東σ", "東ς", "_σ", "7σ", "7ς", "7ʰσ", "7ʰς", "αʰσ", "αʰς"),
]
ALPHABET = [*"aAbBαΑʰ'.\u00b7\u0301 _7é東京\u0130\u00df", SIGMA, SIGMA, SIGMA]


def router_of(words, n_clusters=3, dimensions=5):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(words), dimensions)).astype(np.float32)
    return PrefixRouter(
        dict(zip(words, range(len(words)), strict=True)), vectors, rng.normal(size=(n_clusters, dimensions))
    )


ROUTER = router_of(WORDS)


def at_the_end(router, text):
    return router.distances(text, np.array([len(text)]))[0]


def pieces_of(text, cuts):
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(borders)]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(ALPHABET), max_size=30).map("".join), st.lists(st.integers(0, 30), max_size=12))
@example("ΑΣ" + "'ʰʰ.ʰʰ" + "α", range(8))  # words of ignorable letters stand before the letter that settles it
@example("ΑΣʰʰ'b ΑΣʰ", range(12))
@example("ΑΣΣ.Σ", range(6))
@example("'Σ aΣ", range(6))  # only what stands before tells that the first is medial
@example("a\u0130Σ\u0130", range(5))
def test_equals_the_prefix_router_bit_for_bit_however_the_text_is_cut(text, cuts):
    stream, read = ROUTER.stream(), ""
    for piece in pieces_of(text, cuts):
        stream.push(piece)
        read += piece
        np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, read))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20), st.lists(st.integers(0, 20), max_size=6))
def test_equals_the_prefix_router_on_any_unicode(text, cuts):
    router = router_of(sorted({text.lower()[a:b] for a in range(len(text)) for b in range(a + 2, a + 4)} | {"aa"}))
    stream = router.stream()
    for piece in pieces_of(text, cuts):
        stream.push(piece)
    np.testing.assert_array_equal(stream.distances(), at_the_end(router, text))


def test_nothing_read_is_the_empty_text():
    stream = ROUTER.stream()
    assert stream.distances().shape == (3,)
    assert stream.distances().dtype == np.float32
    np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, ""))
    stream.push("")
    np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, ""))


def test_a_word_counts_while_it_grows_for_what_its_beginning_is():
    # Vectors: as = 1, ash = -1 on a line with the centre at 1; "as" lies on it, "ash" is 2 away, "ashe" is no word.
    router = PrefixRouter({"as": 0, "ash": 1}, np.array([[1], [-1]], dtype=np.float32), np.array([[1.0]]))
    stream, seen = router.stream(), []
    for char in "ashe as":
        stream.push(char)
        seen.append(float(stream.distances()[0]))
    # "a", "as", "ash", "ashe", "ashe ", "ashe a", "ashe as"
    assert seen == [1, 0, 2, 1, 1, 1, 0]


def test_a_final_sigma_becomes_medial_when_a_letter_follows_behind_a_point():
    # With the centre at 1: ας = 1 is 0 away, ασ = -1 is 2 away; α = no word.
    router = PrefixRouter({"ας": 0, "ασ": 1}, np.array([[1], [-1]], dtype=np.float32), np.array([[1.0]]))
    stream, seen = router.stream(), []
    for char in "ΑΣ.'Α":
        stream.push(char)
        seen.append(float(stream.distances()[0]))
    assert seen == [1, 0, 0, 0, 2]
    stream = router.stream()
    for char in "ΑΣ.7Α":  # a digit settles it as final
        stream.push(char)
    assert stream.distances()[0] == 0


def test_a_sigma_is_final_by_the_last_letter_that_is_not_ignorable():
    # With the centre at 1, the final form is 0 away and the medial one 2.
    words = {"7ς": 0, "7σ": 1, "αʰς": 0, "αʰσ": 1}
    router = PrefixRouter(words, np.array([[1], [-1]], dtype=np.float32), np.array([[1.0]]))
    for text, distance in (("7Σ", 2), ("Α 7Σ", 2), ("ΑʰΣ", 0)):
        stream = router.stream()
        for char in text:
            stream.push(char)
        assert stream.distances().tolist() == [distance]


def test_a_dotted_capital_i_ends_a_word_at_its_dot():
    # "İS" is "i̇s": i, a combining dot, s; no word of two letters, where "is" would be one.
    router = PrefixRouter({"is": 0, "si": 1}, np.array([[1], [1]], dtype=np.float32), np.array([[1.0]]))
    stream = router.stream()
    for char in "\u0130S":
        stream.push(char)
    assert stream.distances()[0] == 1
    for char in "\u0130":  # and now "s" goes on to "si"
        stream.push(char)
    assert stream.distances()[0] == 0


@pytest.mark.parametrize("begun", ["aa a", "aa ΑΣ", "aa ΑΣ."])  # a word, or a sigma, that may go on
@pytest.mark.parametrize("other_text", ["b", "Α ba", " ba"])
@pytest.mark.parametrize("text", ["a", "Α ab", " ab"])
def test_a_copy_goes_its_own_way(begun, other_text, text):
    stream = ROUTER.stream()
    stream.push(begun)
    other = stream.copy()
    other.push(other_text)
    np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, begun))
    stream.push(text)
    np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, begun + text))
    np.testing.assert_array_equal(other.distances(), at_the_end(ROUTER, begun + other_text))


def test_distances_that_were_given_do_not_change_later():
    stream = ROUTER.stream()
    stream.push("aa")
    before = stream.distances()
    kept = before.copy()
    stream.push(" ba")
    stream.distances()
    np.testing.assert_array_equal(before, kept)


def test_a_stream_of_a_subset_has_its_clusters():
    stream = ROUTER.subset([2, 1]).stream()
    stream.push("ΑΣ aa")
    np.testing.assert_allclose(stream.distances(), at_the_end(ROUTER, "ΑΣ aa")[[2, 1]], atol=1e-6)


def test_no_words_at_all_leave_the_empty_text():
    router = PrefixRouter({}, np.empty((0, 2), dtype=np.float32), np.array([[3.0, 4.0]]))
    stream = router.stream()
    stream.push("some ΑΣ words")
    assert stream.distances().tolist() == [5]


@pytest.mark.parametrize(
    "text",
    ["a" * 3000, "ΑΣ" + "." * 3000 + "Α", "ΑΣ" + "ʰ" * 3000 + "Α", "ΑΣ" * 1500, "." * 3000, "ΑΣ'ʰʰ" * 600],
    ids=lambda text: text[:5],
)
def test_no_character_is_classified_again_however_long_the_word_or_the_ignorable_run(text):
    stream = ROUTER.stream()
    before = is_case_ignorable.cache_info()
    for char in text:
        stream.push(char)
    after = is_case_ignorable.cache_info()
    # Each character at most twice: from the front where a sigma is open, from the back for the next one.
    assert after.hits + after.misses - before.hits - before.misses <= 2 * len(text)
    np.testing.assert_array_equal(stream.distances(), at_the_end(ROUTER, text))


class CountingVocabulary(dict):
    characters = 0

    def get(self, word, default=None):
        self.characters += len(word)
        return super().get(word, default)


def test_a_word_longer_than_all_words_is_not_looked_up():
    vocabulary = CountingVocabulary({"ab": 0, "abc": 1})
    stream = PrefixRouter(vocabulary, np.eye(2, dtype=np.float32), np.eye(2)).stream()
    for _ in range(1000):
        stream.push("a")
        stream.distances()
    assert vocabulary.characters == 2 + 3  # "aa" and "aaa"


@pytest.mark.parametrize("piece", ["a" * 100, "." * 100, "ΑΣ" * 50], ids=lambda text: text[:5])
def test_an_endless_word_takes_no_memory(piece):
    stream = ROUTER.stream()
    stream.push("ΑΣ" + piece)
    tracemalloc.start()
    try:
        for _ in range(500):
            stream.push(piece)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 5_000  # of 50,000 characters
