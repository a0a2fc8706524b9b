"""The embedder: words, hand-computed weights, equality with scikit-learn's pipeline, odd texts, save and load."""

import inspect
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cbtm.cluster.embedder import ARRAYS_FILE, SETTINGS_FILE, TfidfSvdEmbedder
from cbtm.cluster.words import word_spans, words
from cbtm.errors import ConfigError, DataError, ManifestError

# Small texts of three subjects, with accents, numbers and identifiers.
TEXTS = [
    "The ship left the harbour at 7 with a cargo of salt, and the sailors sang.",
    "A storm broke the mast; the ship drifted towards the harbour for 12 days.",
    "Sailors mend a torn sail with salt-stiff fingers while the ship rolls.",
    "Fold the flour into the butter, add salt and bake the tart for 40 minutes.",
    "The café serves a crème brûlée and a tart; the naïve baker burnt both.",
    "Whisk butter, sugar and flour; bake until the crust is golden.",
    "def parse(line): return int(line) if line.isdigit() else snake_case_name",
    "The parser raises ValueError when line 3 holds no int; return None instead.",
    "import sys; for line in sys.stdin: parse(line) and return the int value",
]


def library_texts() -> list[str]:
    """Doc strings of the standard library: a few hundred short English texts about different subjects."""
    import argparse
    import collections
    import datetime
    import decimal
    import email.message
    import itertools
    import math
    import pathlib
    import random
    import shutil
    import statistics
    import zipfile

    modules = (argparse, collections, datetime, decimal, email.message, itertools, math, pathlib, random, shutil)
    texts = []
    for module in (*modules, statistics, zipfile):
        for name in sorted(vars(module)):
            member = getattr(module, name)
            texts.append(inspect.getdoc(member) or "" if callable(member) else "")
    return [text for text in texts if len(text) > 80]


@pytest.fixture(scope="module")
def embedder() -> TfidfSvdEmbedder:
    return TfidfSvdEmbedder(n_components=4).fit(TEXTS)


def test_words_are_lower_cased_runs_of_two_or_more_word_characters():
    assert words("The U.S.A's x2 snake_case, 42% of A_B-c!") == ["the", "x2", "snake_case", "42", "of", "a_b"]


@pytest.mark.parametrize(
    "text", ["Crème BRÛLÉE à la carte", "Ünïcödé ΣΊΣΥΦΟΣ İstanbul", "日本語 テキスト a 中", "ab\u00a0cd é ½x"]
)
def test_words_of_unicode_texts_are_the_matches_of_the_expression(text):
    import re

    assert words(text) == re.findall(r"(?u)\b\w\w+\b", text.lower())


def test_words_of_every_ascii_character_are_the_matches_of_the_expression():
    import re

    text = "".join(f"{chr(a)}{chr(b)}Q" for a in range(128) for b in range(128))
    assert text.isascii()
    assert words(text) == re.findall(r"\b\w\w+\b", text.lower())


def test_word_spans_cut_out_the_words():
    text = "a naïve Baker, 2x".lower()
    assert [text[start:end] for start, end in word_spans(text)] == words(text) == ["naïve", "baker", "2x"]


def test_numbers_and_stop_words_are_no_features(embedder):
    assert "ship" in embedder.vocabulary_
    assert "brûlée" in embedder.vocabulary_
    assert "snake_case_name" in embedder.vocabulary_
    assert not {"the", "and", "12", "40", "7", "a"} & set(embedder.vocabulary_)
    assert not [word for word in embedder.vocabulary_ if word[0].isdigit()]


def test_words_that_start_with_a_digit_of_any_script_are_deleted():
    fitted = TfidfSvdEmbedder(n_components=1).fit(["apple ٣٤٥ ²nd 2nd x2 pear"])
    assert list(fitted.vocabulary_) == ["apple", "pear", "x2"]


def test_vocabulary_is_sorted(embedder):
    assert list(embedder.vocabulary_) == sorted(embedder.vocabulary_)
    assert list(embedder.vocabulary_.values()) == list(range(len(embedder.vocabulary_)))


def test_idf_by_hand():
    fitted = TfidfSvdEmbedder(n_components=1).fit(["pear pear plum", "pear fig", "the"])
    # n = 3 documents: pear in 2, plum and fig in 1.
    assert fitted.idf_.dtype == np.float32
    expected = {"fig": math.log(4 / 2) + 1, "pear": math.log(4 / 3) + 1, "plum": math.log(4 / 2) + 1}
    assert dict(zip(fitted.vocabulary_, fitted.idf_, strict=True)) == pytest.approx(expected)
    assert fitted.n_documents_ == 3


def test_documents_without_a_common_word_have_unit_vectors_at_right_angles():
    fitted = TfidfSvdEmbedder(n_components=2).fit(["pear pear plum", "fig fig fig"])
    vectors = fitted.transform(["pear plum", "fig", "fig fig"])
    np.testing.assert_allclose(vectors @ vectors.T, [[1, 0, 0], [0, 1, 1], [0, 1, 1]], atol=1e-6)
    assert fitted.explained_energy_ == pytest.approx(1)


def test_equal_to_the_pipeline_of_scikit_learn():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    texts = library_texts() + TEXTS
    assert len(texts) > 150

    def tokenise(text: str) -> list[str]:
        import re

        found = re.findall(r"(?u)\b\w\w+\b", text)
        return [word for word in found if not word[0].isdigit() and word not in ENGLISH_STOP_WORDS]

    vectoriser = TfidfVectorizer(tokenizer=tokenise, token_pattern=None)
    svd = TruncatedSVD(n_components=8, algorithm="arpack", random_state=0)
    # Not fit_transform, whose U S differs from A V by what the iterations left.
    expected = make_pipeline(vectoriser, svd, Normalizer()).fit(texts).transform(texts)

    fitted = TfidfSvdEmbedder(n_components=8, random_state=3).fit(texts)
    assert list(fitted.vocabulary_) == vectoriser.get_feature_names_out().tolist()
    np.testing.assert_allclose(fitted.idf_, vectoriser.idf_, rtol=1e-6)
    # Few documents are decomposed exactly, up to float32 rounding, which turns directions of nearly equal strength.
    signs = np.sign((fitted.components_ * svd.components_).sum(axis=1))
    np.testing.assert_allclose(fitted.components_ * signs[:, None], svd.components_, atol=5e-5)
    np.testing.assert_allclose(fitted.transform(texts) * signs, expected, atol=2e-4)
    # With the same directions the vectors are the same: the running sum replaces the pipeline.
    fitted._set_arrays(fitted.idf_, svd.components_.astype(np.float32))
    np.testing.assert_allclose(fitted.transform(texts), expected, atol=1e-5)
    tfidf = vectoriser.transform(texts)
    energy = np.square(tfidf @ svd.components_.T).sum() / tfidf.multiply(tfidf).sum()
    assert fitted.explained_energy_ == pytest.approx(energy, rel=1e-5)


def test_fit_transform_gives_the_vectors_of_transform():
    texts = library_texts()
    fitted = TfidfSvdEmbedder(n_components=15)
    vectors = fitted.fit_transform(iter(texts))
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(texts), 15)
    np.testing.assert_allclose(vectors, fitted.transform(texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_embedding_is_the_sum_of_word_vectors(embedder):
    text = "The ship's cargo of 12 salt barrels; salt!"
    columns = [embedder.vocabulary_[word] for word in ("ship", "cargo", "salt", "salt")]
    total = embedder.word_vectors_[columns].sum(axis=0)
    np.testing.assert_allclose(embedder.transform([text])[0], total / np.linalg.norm(total), atol=1e-6)
    np.testing.assert_array_equal(embedder.word_vectors_, (embedder.components_ * embedder.idf_).T)


def test_blocks_of_transform_do_not_change_a_vector(embedder, monkeypatch):
    whole = embedder.transform(TEXTS)
    monkeypatch.setattr("cbtm.cluster.words.BLOCK_CHARACTERS", 100)
    np.testing.assert_array_equal(embedder.transform(TEXTS), whole)


@pytest.mark.parametrize("text", ["", "the and of", "12 345", "zyxw", "!?"])
def test_a_text_without_known_words_is_a_zero_vector(embedder, text):
    vectors = embedder.transform([TEXTS[0], text, TEXTS[1]])
    assert not vectors[1].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2]], axis=1), 1, atol=1e-6)


def test_no_texts_give_no_vectors(embedder):
    assert embedder.transform([]).shape == (0, embedder.n_components_)


def test_same_seed_same_vectors():
    first, second = (TfidfSvdEmbedder(n_components=5, random_state=1).fit_transform(TEXTS) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_rare_words_are_left_out():
    fitted = TfidfSvdEmbedder(n_components=2, min_document_frequency=2).fit(["fig pear pear", "fig plum", "pear kiwi"])
    assert list(fitted.vocabulary_) == ["fig", "pear"]


def test_components_are_reduced_to_what_the_texts_span(caplog):
    # Four documents but only two directions: the third and fourth repeat the first two.
    texts = ["pear plum", "fig kiwi", "pear plum", "fig kiwi"]
    with caplog.at_level(logging.WARNING):
        fitted = TfidfSvdEmbedder(n_components=50).fit(texts)
    assert fitted.n_components_ == 2
    assert fitted.components_.shape == (2, 4)
    assert "n_components=50 reduced to 2: 4 documents with 4 words" in caplog.text


def test_top_terms_are_the_words_that_set_a_centre_apart(embedder):
    vectors = embedder.transform(TEXTS)
    centers = np.stack([vectors[start : start + 3].mean(axis=0) for start in (0, 3, 6)])
    terms = embedder.top_terms(centers, 3)
    assert [len(group) for group in terms] == [3, 3, 3]
    assert "ship" in terms[0]
    assert {"butter", "flour"} & set(terms[1])
    assert {"line", "int"} & set(terms[2])


def test_top_terms_put_words_of_three_letters_first_and_fill_up_with_others():
    fitted = TfidfSvdEmbedder(n_components=1).fit(["xy xy xy snake_case apple"])
    center = fitted.transform(["xy snake_case apple"])
    assert fitted.top_terms(center, 1) == [["apple"]]
    assert fitted.top_terms(center, 9) == [["apple", "xy", "snake_case"]]


def test_top_terms_refuse_centres_of_another_length(embedder):
    with pytest.raises(ConfigError, match="centers has 7 columns but the embedding has 4"):
        embedder.top_terms(np.zeros((2, 7)))


def test_save_and_load_give_the_same_embedder_to_the_bit(embedder, tmp_path):
    embedder.save(tmp_path / "embedder")
    loaded = TfidfSvdEmbedder.load(tmp_path / "embedder")
    assert loaded.vocabulary_ == embedder.vocabulary_
    assert list(loaded.vocabulary_) == list(embedder.vocabulary_)
    for name in ("idf_", "components_", "word_vectors_"):
        assert getattr(loaded, name).tobytes() == getattr(embedder, name).tobytes()
    for name in (
        "n_components",
        "n_components_",
        "svd_iterations",
        "random_state",
        "n_documents_",
        "explained_energy_",
    ):
        assert getattr(loaded, name) == getattr(embedder, name)
    assert loaded.transform(TEXTS).tobytes() == embedder.transform(TEXTS).tobytes()


def test_save_writes_the_same_bytes_twice(embedder, tmp_path):
    for folder in ("a", "b"):
        embedder.save(tmp_path / folder)
    for name in (SETTINGS_FILE, ARRAYS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    (folder / SETTINGS_FILE).write_text(json.dumps({**settings, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "has format_version=99, this cbtm reads 1"),
        ({"vocabulary": ["fig", "pear"]}, r"parts that do not belong together: 2 words, idf float32\[\d+\]"),
        ({"vocabulary": ["pear", "fig"]}, "not sorted, or repeats a word"),
        ({"vocabulary": None}, "lacks an entry or holds a wrong one"),
        ({"n_components": 0}, "n_components=0 is too small"),
    ],
)
def test_changed_settings_are_refused(embedder, tmp_path, changes, message):
    embedder.save(tmp_path)
    change_settings(tmp_path, **changes)
    with pytest.raises(ManifestError, match=message):
        TfidfSvdEmbedder.load(tmp_path)


def test_missing_or_broken_files_are_refused(embedder, tmp_path):
    with pytest.raises(ManifestError, match="holds no readable embedder"):
        TfidfSvdEmbedder.load(tmp_path)
    embedder.save(tmp_path)
    (tmp_path / ARRAYS_FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(ManifestError, match="holds no readable embedder"):
        TfidfSvdEmbedder.load(tmp_path)


def test_texts_without_a_countable_word_are_refused():
    with pytest.raises(DataError, match="no word is left in 2 documents"):
        TfidfSvdEmbedder().fit(["the", "12 of 13"])
    with pytest.raises(DataError, match="there is no text to fit on"):
        TfidfSvdEmbedder().fit([])


def test_what_is_not_a_string_is_refused_with_its_number(embedder):
    with pytest.raises(DataError, match="text 1 is a NoneType, not a string"):
        embedder.transform(["fig", None])
    with pytest.raises(DataError, match="texts is one string; pass a sequence"):
        TfidfSvdEmbedder().fit("fig pear")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_components": 0}, "n_components=0 is too small; use at least 1"),
        ({"min_document_frequency": 0}, "min_document_frequency=0 is too small; use at least 1"),
        ({"svd_iterations": -1}, "svd_iterations=-1 is too small; use at least 0"),
        ({"random_state": -5}, "random_state=-5 is too small; use at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        TfidfSvdEmbedder(**setting)


def test_import_is_light():
    code = "import sys, cbtm.cluster.embedder; print([m for m in ('sklearn', 'scipy', 'torch') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_vocabulary_of_many_similar_words_embeds_alike_in_fit_and_transform():
    # Words that differ in one byte, at the end of every piece of eight, and more of them than the first table holds.
    rng = np.random.default_rng(0)
    stems = ["callback_plugin", "node_position_", "createdelegationrequest", "abcdefg", "identifier_of_the_"]
    words = np.array([stem + suffix for stem in stems for suffix in "abcdefghijklmnopqrstuvwxyzs"])
    texts = [
        " ".join([*rng.choice(words, 12), *(f"w{number:x}" for number in rng.integers(0, 30_000, 20))])
        for _ in range(1500)
    ]
    fitted = TfidfSvdEmbedder(n_components=20)
    vectors = fitted.fit_transform(texts)
    assert len(fitted.vocabulary_) > 15_000
    np.testing.assert_allclose(fitted.transform(texts), vectors, atol=1e-5)
