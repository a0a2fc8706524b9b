"""Cleaning, cutting and the near-duplicate filter."""

import pytest

from cbtm.corpora.documents import CutLimits, RawDocument, SeenShingles, clean_text, cut_text, text_digest
from cbtm.errors import ConfigError


def words(start: int, n: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + n))


def test_newlines_controls_and_trailing_spaces_are_normalised():
    assert clean_text("\ufeffa\r\nb \t\rc\x00\x07\x1b[0m\td\u2028e") == "a\nb\nc[0m\td\ne"


def test_more_than_two_blank_lines_become_two():
    assert clean_text("a\n\n\n\n\n\nb\n\n\nc\n\n") == "a\n\n\nb\n\n\nc"


def test_a_lone_surrogate_becomes_the_replacement_character():
    assert clean_text("a\ud800b") == "a\ufffdb"


def test_cutting_closes_at_paragraphs_and_loses_no_word():
    paragraphs = [words(20 * i, 20) for i in range(10)]
    limits = CutLimits(min_words=1, max_words=50, max_chars=10_000)
    pieces = cut_text("\n\n".join(paragraphs), limits)
    # 20 words are below half of 50, 40 are not: every document is two paragraphs.
    assert pieces == ["\n\n".join(paragraphs[i : i + 2]) for i in range(0, 10, 2)]


def test_code_is_cut_between_top_level_definitions():
    function = "def f{0}():\n    a = {0}\n\n    return a"
    code = "\n\n\n".join(function.format(i) for i in range(4))
    # A function is 7 words: two are 14, at least half of 20; a third would not fit.
    pieces = cut_text(code, CutLimits(min_words=1, max_words=20, max_chars=1000))
    assert [piece.count("def ") for piece in pieces] == [2, 2]
    assert "\n\n\n".join(pieces) == code


@pytest.mark.parametrize("text", [words(0, 1000), "\n".join(words(i, 7) for i in range(0, 700, 7)), "x" * 5000])
def test_every_piece_is_within_the_limits_and_no_character_is_lost(text: str):
    limits = CutLimits(min_words=1, max_words=30, max_chars=200)
    pieces = cut_text(text, limits)
    assert all(len(p.split()) <= 30 and len(p) <= 200 for p in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_piece_loses_its_common_indentation():
    body = "    a = 1\n        b = 2"
    # 2 + 6 words fit into 8; 5 + 6 do not fit into 10.
    assert cut_text(f"class A:\n\n{body}", CutLimits(1, 8, 1000)) == [f"class A:\n\n{body}"]
    assert cut_text(f"one two three four five\n\n{body}", CutLimits(1, 10, 1000))[1] == "a = 1\n    b = 2"


def test_limits_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="min_words=10, max_words=5"):
        CutLimits(min_words=10, max_words=5)


def test_the_digest_ignores_case_and_white_space():
    assert text_digest("A  b\nC") == text_digest("a b c") != text_digest("a bc")


def test_a_copy_with_a_few_new_words_is_not_new_and_another_text_is():
    seen = SeenShingles()
    assert seen.is_new(words(0, 200))
    # 20 of 200 words differ at the end: about 90 % of the shingles were seen.
    assert not seen.is_new(words(0, 180) + " " + words(5000, 20))
    assert seen.is_new(words(300, 200))
    # A quarter is a copy: new.
    assert seen.is_new(words(0, 50) + " " + words(9000, 150))


def test_texts_below_eight_words_are_left_to_the_digest():
    seen = SeenShingles()
    assert seen.is_new("one two three")
    assert seen.is_new("one two three")


def test_a_raw_document_names_text_kind_and_source():
    assert RawDocument("t", "k", "s") == RawDocument(text="t", kind="k", source="s")
