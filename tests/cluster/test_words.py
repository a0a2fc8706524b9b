"""Words of many texts as columns: against the regular expression and scikit-learn's analyser."""

import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cbtm.cluster import words as module
from cbtm.cluster.words import WordTable, blocks_of, find_words, word_spans, words
from cbtm.errors import DataError

ODD = [
    "",
    " ",
    "a",
    "é",
    "ab",
    "naïve café, NAÏVE CAFÉ",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ σς",
    "İstanbul İİ ı",
    "snake_case __init__ _ __",
    "x1 1x 12 3 1_000",
    "don't e-mail a.b",
    "中文字 中 文，字。",
    "日本語とEnglish混ぜ",
    "👍🏽 thumbs👍up 👍",
    "superscript x² ½ ⅷ",
    "a\x00b\x00cd",
    "tab\tnew\nline\r\nfeed\x0b\x0c\x1c\u2028\u2029end",
    "lone \ud800 surrogate\udfff here",
    "combining e\u0301te\u0301 \u0301\u0301",
    "ünïcödé_wörds_longer_than_eight_bytes_and_more",
    "exactly8 ninebytes sixteen_bytes_ok seventeen_bytes_x",
    "\ufeffbom \u200bzero\u200bwidth\u00a0nbsp",
    "हिन्दी भाषा ไทย العربية עברית",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐨 𐐀",
]


def found(texts: list[str]) -> list[list[str]]:
    """Words of each text by way of the arrays; single characters, which the block may hold, left out."""
    block = find_words(texts)
    return [
        [word for i in range(start, end) if len(word := block.word(i).decode()) > 1]
        for start, end in zip(block.offsets[:-1], block.offsets[1:], strict=True)
    ]


def test_words_are_those_of_the_regular_expression():
    assert found(ODD) == [re.findall(r"\b\w\w+\b", text.lower()) for text in ODD]
    assert [words(text) for text in ODD] == found(ODD)


def test_words_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    analyse = TfidfVectorizer().build_analyzer()
    assert found(ODD) == [analyse(text) for text in ODD]


def test_every_code_point_is_in_a_word_exactly_if_the_regular_expression_says_so():
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    texts = ["".join(f"x{c}y " for c in characters[start : start + 4096]) for start in range(0, len(characters), 4096)]
    assert found(texts) == [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=6))
def test_words_of_any_texts(texts: list[str]):
    assert found(texts) == [words(text) for text in texts]


def test_texts_do_not_run_into_each_other():
    assert found(["one", "two", "", "three"]) == [["one"], ["two"], [], ["three"]]


def test_spans_are_those_of_the_words():
    text = "some_words, größer than one"
    assert [text[start:end] for start, end in word_spans(text)] == words(text)


class TestTable:
    def test_columns_follow_the_first_sight(self):
        table = WordTable()
        assert table.add(find_words(["pear plum pear", "fig plum"])).tolist() == [0, 1, 0, 2, 1]
        assert table.words == [b"pear", b"plum", b"fig"]

    def test_unknown_words_have_no_column(self):
        table = WordTable(["fig", "pear", "extraordinarily"])
        assert table.find(find_words(["pear apple fig extraordinary extraordinarily"])).tolist() == [1, -1, 0, -1, 2]

    def test_a_table_that_has_nothing_finds_nothing(self):
        assert WordTable().find(find_words(["pear plum"])).tolist() == [-1, -1]
        assert WordTable(["pear"]).find(find_words([""])).tolist() == []

    def test_many_words_of_every_length_are_found_again(self):
        # 50,000 words of 2 to 40 bytes: the table grows several times, and its chains of slots become long.
        rng = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz_éßω中"))
        several = {"".join(rng.choice(letters, rng.integers(2, 30))) for _ in range(50_000)}
        known, unknown = sorted(several)[::2], sorted(several)[1::2]
        table = WordTable(known)
        columns = np.concatenate([table.find(block) for block in blocks_of(known)])
        assert columns.tolist() == list(range(len(known)))
        assert all((table.find(block) == -1).all() for block in blocks_of(unknown))

    def test_words_that_differ_in_any_one_byte_have_different_keys(self):
        # 16, 24 and 32 bytes end with a piece; 17 has one of a single byte.
        for length in (9, 15, 16, 17, 24, 31, 32):
            several = [
                "a" * place + letter + "a" * (length - place - 1) for place in range(length) for letter in "bcxyz"
            ]
            assert len(set(find_words(several).keys.tolist())) == len(several)

    def test_a_table_of_many_similar_words_numbers_them_in_order(self):
        several = sorted(f"{stem}_{i:x}" for stem in ("_node_position", "node_positions", "pos") for i in range(5000))
        assert WordTable(several).words == [word.encode() for word in several]

    @pytest.mark.parametrize("weak", ["mixed to nothing", "one slot for all"])
    def test_words_of_equal_keys_keep_their_own_columns(self, monkeypatch: pytest.MonkeyPatch, weak: str):
        if weak == "mixed to nothing":  # all long words of one beginning have one key
            real = module._keys

            def keys(buffer: bytes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
                made = real(buffer, starts, lengths)
                made[lengths > 8] = module._LONG
                return made

            monkeypatch.setattr(module, "_keys", keys)
        else:
            monkeypatch.setattr(
                WordTable, "_first_slots", lambda self, keys: np.zeros(len(keys), dtype=np.int64) + self._last_slot
            )
        several = ["short", "long_word_one", "long_word_two", "long_word_three_and_more", "other", "long_word_on"]
        table = WordTable()
        text = find_words([" ".join(several + several[::-1])])
        assert table.add(text).tolist() == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
        columns = table.find(text).tolist()
        assert columns == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
        assert [table.words[column].decode() for column in columns] == several + several[::-1]
        assert table.find(find_words(["long_word_four long_word_two short"])).tolist()[0] == -1
        assert len(table) == 6
        # It also holds after the slots are made anew.
        table.add(find_words([" ".join(f"filler{i}" for i in range(3000))]))
        assert table.find(text).tolist() == columns


class TestBlocks:
    def test_a_block_ends_when_it_is_full(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(module, "BLOCK_CHARACTERS", 10)
        sizes = [len(block.offsets) - 1 for block in blocks_of(["12345", "67890", "a" * 30, "b", ""])]
        assert sizes == [2, 1, 2]

    def test_one_string_is_refused(self):
        with pytest.raises(DataError, match="one string"):
            list(blocks_of("a text"))

    def test_what_is_no_string_is_refused(self):
        with pytest.raises(DataError, match="text 1 is a NoneType"):
            list(blocks_of(["a text", None]))
