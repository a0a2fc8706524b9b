"""Which held-out documents are scored, which of their tokens, and how many bytes those spell."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import settings, write_corpus

from cbtm import stages
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.corpus import Document
from cbtm.errors import DataError, ManifestError
from cbtm.merge.router import PrefixRouter
from cbtm.merge.validation_set import context_distances, selection_documents
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages.held_out import distances, held_out, open_router_parts, spelled_bytes, validation_set
from cbtm.tokens import DocumentRecord

PLAIN = [
    "argument parsing of the command line and its help",
    "a",  # one token
    "the decimal context sets precision and rounding",
    "é",  # two bytes; the tokenizer has seen none
    "return self.value if name in other",
    "über die naïve Uhrzeit: ein café",
    "b",
    "def parse(text): return int(text)",
    "messages have headers and a payload",
    "日本語 text",
]
ASKED = [
    {"src": "What is a thread?\n", "tgt": "a line of work"},
    {"src": "Name:", "tgt": " value of the argument"},
    {"src": "How many bytes has é, and how many has the letter before it?\n", "tgt": "two é"},
    {"text": "no prompt at all"},
    {"src": "a", "tgt": "\nb"},
]


def assigned(folder, lines):
    """A run that has got as far as its token shards, with these validation documents."""
    corpus = write_corpus(folder / "corpus")
    path = corpus / "valid/small/00000/text.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = Run(parse_config(json.dumps(settings(str(corpus), str(folder / "out"), None))))
    stages.plan(run)
    stages.tokenizer(run)
    stages.cluster(run)
    for group in run.plan_made.groups:
        stages.assign(run, group.name)
    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return assigned(tmp_path_factory.mktemp("plain"), [{"text": text} for text in PLAIN])


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return assigned(tmp_path_factory.mktemp("asked"), ASKED)


def scored_with(run, **score):
    """The same run with other settings of the scores."""
    values = run.config.model_dump(mode="json")
    return Run(parse_config(json.dumps(values | {"score": values["score"] | score})))


@pytest.fixture
def tokenizer(plain, tmp_path):
    return TextTokenizer.load(plain.fetch(plain.tokenizer_spec(), tmp_path))


def token_bytes(tokenizer, row):
    """UTF-8 bytes of tokens: the vocabulary writes a token with one character for each byte."""
    return sum(len(tokenizer._tokenizer.id_to_token(token)) for token in row.tolist())


def sp_ids(held):
    return [record.sp_id for record in held.records]


def text_of(record, lines=PLAIN):
    return lines[int(record.sp_id.rpartition("|")[2])]


# --- documents ---


def test_all_documents_are_taken_whole_in_the_order_of_the_corpus(plain, tokenizer, tmp_path):
    held = held_out(plain, tmp_path)
    assert sp_ids(held) == [f"valid/small/00000/text.jsonl|{number}" for number in range(10)]
    lines = Path(plain.uri("assignments/valid/small/00000/text.jsonl")).read_text().splitlines()
    assert held.clusters.tolist() == [json.loads(line)["cluster"] for line in lines]
    assert set(held.clusters.tolist()) == {0, 1}
    for row, record in zip(held.rows, held.records, strict=True):
        assert row.tolist() == tokenizer.encode_batch([text_of(record)])[0].tolist()
    assert held.first == 0
    assert held.counted is None


@pytest.mark.parametrize(
    ("asked_for", "places"), [(1, [0]), (3, [0, 1, 4]), (7, [0, 1, 2, 3, 4, 6, 7]), (25, range(10))]
)
def test_max_documents_are_exactly_that_many_over_the_whole_split(plain, tmp_path, asked_for, places):
    whole = held_out(plain, tmp_path)
    held = held_out(scored_with(plain, max_documents=asked_for), tmp_path)
    assert sp_ids(held) == [sp_ids(whole)[place] for place in places]
    assert held.clusters.tolist() == [whole.clusters[place] for place in places]
    for row, place in zip(held.rows, places, strict=True):
        assert row.tolist() == whole.rows[place].tolist()
    # What a training is validated on is never reported on, however many are scored.
    assert held.choosing.tolist() == [bool(selection_documents(10)[place]) for place in places]


def test_without_the_separator_a_document_of_one_token_is_left_out_and_logged(plain, tmp_path, caplog):
    caplog.set_level("WARNING", "cbtm")
    whole = held_out(plain, tmp_path)
    assert caplog.messages == []  # after the separator its token is predicted
    held = held_out(scored_with(plain, separator=False), tmp_path)
    assert caplog.messages == ["2 of 10 held-out documents have no token that counts and are left out"]
    assert [text_of(record) for record in whole.records if record not in held.records] == ["a", "b"]
    rows = dict(zip(sp_ids(whole), whole.rows, strict=True))
    clusters = dict(zip(sp_ids(whole), whole.clusters.tolist(), strict=True))
    assert held.first == 1
    assert [row.tolist() for row in held.rows] == [rows[name][1:].tolist() for name in sp_ids(held)]
    assert held.clusters.tolist() == [clusters[name] for name in sp_ids(held)]


def test_split_of_which_nothing_can_be_scored_is_refused(asked, tmp_path):
    run = scored_with(asked, max_documents=1, max_tokens=5)  # within its prompt
    with pytest.raises(DataError, match=r"none of 1 held-out documents has a token to score .* score.max_tokens=5"):
        held_out(run, tmp_path)


# --- bytes ---


def test_bytes_of_whole_documents_are_those_of_their_text(plain, tokenizer, tmp_path):
    held = held_out(plain, tmp_path)
    validation = validation_set(plain, held, tokenizer)
    assert validation.texts == [text_of(record) for record in held.records]
    assert validation.n_bytes.tolist() == [len(text.encode()) for text in validation.texts]
    assert [validation.tokens, validation.sp_ids, validation.labels] == [held.rows, sp_ids(held), None]


# Without the separator the first token is given: one alone is refused by the configuration.
CUTS = [
    (1, True),
    (None, False),
    *((max_tokens, separator) for max_tokens in (2, 5, 12, 25, 100) for separator in (True, False)),
]


@pytest.mark.parametrize(("max_tokens", "separator"), CUTS)
def test_bytes_of_cut_documents_are_those_that_their_scored_tokens_spell(
    plain, tokenizer, tmp_path, max_tokens, separator
):
    run = scored_with(plain, max_tokens=max_tokens, separator=separator)
    held = held_out(run, tmp_path)
    validation = validation_set(run, held, tokenizer)
    assert max(map(len, held.rows)) == min((max_tokens or 27) + 1, 28) - (not separator)
    ascii_only = 0
    for row, text, n_bytes in zip(validation.tokens, validation.texts, validation.n_bytes, strict=True):
        # The tokens of a character of several bytes begin at that character: up to 3 bytes at either end.
        spelled = token_bytes(tokenizer, row[1:])
        assert abs(spelled - n_bytes) <= (0 if text.isascii() else 3)
        ascii_only += text.isascii()
    assert ascii_only >= 5


def test_cut_within_a_character_does_not_count_it(plain, tokenizer):
    # Three tokens, of a byte each, make one character.
    text = "日本語 text"
    tokens = tokenizer.encode_batch([text])[0]
    document = Document("d", text)
    counts = [spelled_bytes(document, tokenizer, tokens[: 1 + n], 0, 0) for n in range(1, 11)]
    assert counts == [0, 0, 3, 3, 3, 6, 6, 6, 9, 11]


def test_bytes_of_tokens_of_another_tokenizer_are_refused(plain, tokenizer):
    document = Document("d", "the name of the argument")
    other = tokenizer.encode_batch(["no such text"])[0]
    with pytest.raises(ManifestError, match=r"validation document 4 has .* run the assign stage again"):
        spelled_bytes(document, tokenizer, other, 0, 4)


def test_document_that_left_the_corpus_is_named(plain, tokenizer, tmp_path):
    held = held_out(plain, tmp_path)
    gone = replace(held, records=[*held.records[:-1], DocumentRecord("valid/small/00000/text.jsonl|10", 1)])
    message = r"validation document valid/small/00000/text.jsonl\|10 is no longer in the corpus; run the assign stage"
    with pytest.raises(ManifestError, match=message):
        validation_set(plain, gone, tokenizer)


# --- prompts ---


def answer(line):
    return line["tgt"] if "tgt" in line else line["text"]


def test_tokens_and_bytes_of_prompts_do_not_count(asked, tokenizer, tmp_path):
    held = held_out(asked, tmp_path)
    validation = validation_set(asked, held, tokenizer)
    for index, record in enumerate(held.records):
        tgt = answer(text_of(record, ASKED))
        assert validation.texts[index].endswith(tgt)
        assert validation.n_bytes[index] == len(tgt.encode())
        counted = held.rows[index][1:][held.counted[index]]
        assert token_bytes(tokenizer, counted) == len(tgt.encode())
        # What counts is the end.
        assert held.counted[index].tolist() == sorted(held.counted[index].tolist())


def test_without_the_separator_the_marks_are_of_the_same_tokens(asked, tmp_path):
    whole, held = held_out(asked, tmp_path), held_out(scored_with(asked, separator=False), tmp_path)
    assert sp_ids(held) == sp_ids(whole)
    for before, after, row in zip(whole.counted, held.counted, held.rows, strict=True):
        assert after.tolist() == before[1:].tolist()
        assert len(after) == len(row) - 1


def test_document_that_is_cut_within_its_prompt_is_left_out_and_logged(asked, tokenizer, tmp_path, caplog):
    caplog.set_level("WARNING", "cbtm")
    run = scored_with(asked, max_tokens=12)
    held = held_out(run, tmp_path)
    assert caplog.messages == ["1 of 5 held-out documents have no token that counts and are left out"]
    assert ASKED[2] not in [text_of(record, ASKED) for record in held.records]
    validation = validation_set(run, held, tokenizer)
    for index, record in enumerate(held.records):
        counted = held.rows[index][1:][held.counted[index]]
        assert validation.n_bytes[index] == token_bytes(tokenizer, counted), record
    # Of ten tokens of prompt and eight of answer two are left: "a" and a space.
    place = [text_of(record, ASKED) for record in held.records].index(ASKED[0])
    assert (validation.n_counted[place], validation.n_bytes[place]) == (2, 2)


# --- distances ---


def test_distances_are_those_of_the_routing_settings_in_a_file(plain, tmp_path):
    values = plain.config.model_dump(mode="json") | {"routing": {"lag": 1, "refresh": 4, "context_ratio": 0.5}}
    run = Run(parse_config(json.dumps(values)))
    clusterer, tokenizer = open_router_parts(run, tmp_path)
    validation = validation_set(run, held_out(run, tmp_path), tokenizer)
    found = distances(run, clusterer, tokenizer, validation, tmp_path)
    router = PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)
    np.testing.assert_array_equal(found, context_distances(router, tokenizer, validation, run.config.routing))
    assert not np.array_equal(found, context_distances(router, tokenizer, validation))
    np.testing.assert_array_equal(np.load(tmp_path / "distances.npy", mmap_mode="r"), found)
