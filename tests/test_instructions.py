"""Instructions, `{"src", "tgt"}` a line: read, tokenised and stored so that it is known which tokens are given."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from cbtm import storage
from cbtm.branch.tokenizer import SEPARATOR, TextTokenizer
from cbtm.corpus import Document, ReadCounts, read_file
from cbtm.errors import DataError
from cbtm.tokens import DOCUMENTS, OFFSETS, PROMPTS, TOKENS, DocumentRecord, TokenDocuments, TokenShardWriter


def read(root: str, path: str, max_bad_lines: int = 10) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(read_file(root, path, max_bad_lines=max_bad_lines, counts=counts)), counts


def read_records(folder: Path, records: list[Any]) -> tuple[list[Document], ReadCounts]:
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read(str(folder), "a.jsonl")


# --- lines ---

JOINTS = {
    "a line end where neither brings white space": ("Q", "A", "Q\nA", 2),
    "a space at the end of src is kept": ("Q: ", "A", "Q: A", 3),
    "so is one at the start of tgt, which is of tgt": ("Q:", " A", "Q: A", 2),
    "or one at both": ("Q\n", "\nA", "Q\n\nA", 2),
    "any white space is one": ("Q\u2003", "A", "Q\u2003A", 2),
    "characters are counted and not bytes": ("東京?", "🎈", "東京?\n🎈", 4),
    "without src nothing is given": ("", "A", "A", 0),
    "src may be blank": (" ", "A", " A", 1),
}


@pytest.mark.parametrize(("src", "tgt", "text", "prompt"), JOINTS.values(), ids=JOINTS)
def test_an_instruction_is_one_document_of_both_parts(tmp_path: Path, src: str, tgt: str, text: str, prompt: int):
    documents, counts = read_records(tmp_path, [{"src": src, "tgt": tgt, "id": 1}])
    assert documents == [Document("a.jsonl|0", text, prompt)]
    assert counts == ReadCounts(documents=1)


some_text = st.text(st.sampled_from("ab東 \n\u2003"), max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(src=some_text, tgt=some_text)
def test_what_is_learned_is_tgt_to_the_character(src: str, tgt: str):
    with tempfile.TemporaryDirectory() as folder:
        documents, counts = read_records(Path(folder), [{"src": src, "tgt": tgt}])
    if not tgt.strip():
        assert documents == []
        assert sum(counts.skipped.values()) == 1
        return
    (document,) = documents
    assert document.text[document.prompt :] == tgt
    joint = document.text[len(src) : document.prompt]
    assert document.text.startswith(src)
    assert joint in ("", "\n")
    assert not src or any(part.isspace() for part in (src[-1], joint, tgt[0]))


def test_a_corpus_may_mix_text_and_instructions(tmp_path: Path):
    documents, counts = read_records(tmp_path, [{"text": "one"}, {"src": "Q", "tgt": "A"}, {"text": "two"}])
    assert documents == [Document("a.jsonl|0", "one"), Document("a.jsonl|1", "Q\nA", 2), Document("a.jsonl|2", "two")]
    assert counts == ReadCounts(documents=3)


def test_a_text_holds_whatever_else_the_line_has(tmp_path: Path):
    both = {"text": "one", "src": "Q", "tgt": "A"}
    documents, counts = read_records(tmp_path, [both, {**both, "text": " "}, {**both, "text": None}])
    assert documents == [Document("a.jsonl|0", "one"), Document("a.jsonl|2", "Q\nA", 2)]  # null is as if not there
    assert counts == ReadCounts(documents=2, skipped={"empty text": 1})


def test_half_an_instruction_is_a_bad_line(tmp_path: Path):
    bad = [{"src": "Q"}, {"tgt": "A"}, {"src": "Q", "tgt": 3}, {"src": None, "tgt": "A"}]
    documents, counts = read_records(tmp_path, [*bad, {"text": 3, "src": "Q", "tgt": "A"}, {"src": "Q", "tgt": "A"}])
    assert [document.sp_id for document in documents] == ["a.jsonl|5"]
    assert counts == ReadCounts(documents=1, skipped={"not JSON with a text": 5})


def test_an_instruction_without_an_answer_is_counted_and_is_no_bad_line(tmp_path: Path):
    lines = [{"src": "Q", "tgt": ""}, {"src": "Q ", "tgt": " \n"}, {"src": "", "tgt": ""}, {"src": "Q", "tgt": "A"}]
    documents, counts = read_records(tmp_path, lines)
    assert len(documents) == 1
    assert counts == ReadCounts(documents=1, skipped={"empty tgt": 2, "empty text": 1})
    assert read(str(tmp_path), "a.jsonl", max_bad_lines=0) == (documents, counts)


# --- Parquet ---


def packed(columns: dict[str, Any], **how: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **how)
    return out.getvalue()


def test_a_parquet_file_of_instructions_gives_what_lines_give(root: str):
    columns = {"src": ["Q", "Q: ", None, "Q", "Q"], "id": [1, 2, 3, 4, 5], "tgt": ["A", "B", "C", "", None]}
    storage.write_bytes(f"{root}/a.parquet", packed(columns, row_group_size=2))
    documents, counts = read(root, "a.parquet")
    assert documents == [Document("a.parquet|0", "Q\nA", 2), Document("a.parquet|1", "Q: B", 3)]
    assert counts == ReadCounts(documents=2, skipped={"not a text": 2, "empty tgt": 1})


def test_rows_with_a_null_text_are_the_instructions_of_a_mixed_file(tmp_path: Path):
    n = 300  # more than one batch of rows
    rows: list[dict[str, Any]] = [
        {"text": f"t{i}"} if i % 3 else {"src": f"s{i}", "tgt": f"a{i}"} if i % 2 else {"text": f"b{i}", "src": "x"}
        for i in range(n)
    ]
    columns = {name: [row.get(name) for row in rows] for name in ("src", "text", "tgt")}
    dictionary = pa.array(columns["tgt"]).dictionary_encode()
    (tmp_path / "a.parquet").write_bytes(packed({**columns, "tgt": dictionary}))
    documents, _ = read(str(tmp_path), "a.parquet")
    lines, _ = read_records(tmp_path, rows)
    assert [(d.text, d.prompt) for d in documents] == [(d.text, d.prompt) for d in lines]
    assert sum(d.prompt > 0 for d in documents) == n // 6


@pytest.mark.parametrize("column", ["src", "tgt"])
def test_a_parquet_file_with_half_of_an_instruction_is_read_by_its_text_or_refused(tmp_path: Path, column: str):
    (tmp_path / "a.parquet").write_bytes(packed({column: ["x"], "text": ["y"]}))
    assert read(str(tmp_path), "a.parquet")[0] == [Document("a.parquet|0", "y")]
    (tmp_path / "a.parquet").write_bytes(packed({column: ["x"]}))
    with pytest.raises(DataError, match=rf"has no column 'text', nor 'src' and 'tgt'; its columns: {column}$"):
        read(str(tmp_path), "a.parquet")


def test_an_answer_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(packed({"src": ["Q"], "tgt": [7]}))
    with pytest.raises(DataError, match=r"a\.parquet: column 'tgt' is of type int64, expected string"):
        read(str(tmp_path), "a.parquet")


# --- characters to tokens ---


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(["the cat sat on the mat", "the dog ate the cat\nthat sat"] * 3, 300)


def entries(tokenizer: TextTokenizer, folder: Path, text: str) -> list[str]:
    """Vocabulary entries of a text's tokens; of byte-level BPE each has one character for one byte."""
    tokenizer.save(folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [vocabulary.id_to_token(token) for token in tokenizer.encode_batch([text])[0][1:].tolist()]


def test_a_token_is_of_the_prompt_if_it_ends_within_it(tokenizer: TextTokenizer, tmp_path: Path):
    text = "the cat  sat\non the mats\n\n the dog"
    ends = np.cumsum([len(entry) for entry in entries(tokenizer, tmp_path, text)])
    assert len(ends) < len(text) - 10  # of several characters, most of them
    prompts = list(range(len(text) + 1))
    found = tokenizer.prompt_tokens([text] * len(prompts), prompts)
    assert found == [int(np.count_nonzero(ends <= prompt)) for prompt in prompts]


def test_an_answer_of_one_word_after_a_space_is_learned(tokenizer: TextTokenizer, tmp_path: Path):
    # " cat" is one token, which begins in the prompt: the answer would be lost if that decided.
    assert entries(tokenizer, tmp_path, "the cat") == ["the", "Ġcat"]
    assert tokenizer.prompt_tokens(["the cat"], [len("the ")]) == [1]


def test_a_prompt_is_counted_in_characters_and_its_tokens_in_bytes(tokenizer: TextTokenizer):
    # Three bytes each, of which nothing was merged.
    assert len(tokenizer.encode_batch(["東京都"])[0]) == 1 + 9
    assert tokenizer.prompt_tokens(["東京都"] * 4, [0, 1, 2, 3]) == [0, 3, 6, 9]


def test_offsets_without_their_spaces_give_the_same_prompts(tokenizer: TextTokenizer, tmp_path: Path):
    # Of some published tokenizers " cat" is said to begin at the c, and a line end to be of no length.
    tokenizer.save(tmp_path)
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    trimmed = TextTokenizer(inner, SEPARATOR)
    texts = ["the cat\nsat", "the cat sat", "the dog \nate", "a\n\nb"]
    prompts = [len("the cat\n"), len("the "), len("the dog \n"), 2]
    assert trimmed.encode_with_starts(texts[1])[1].tolist() != tokenizer.encode_with_starts(texts[1])[1].tolist()
    assert trimmed.prompt_tokens(texts, prompts) == tokenizer.prompt_tokens(texts, prompts)


def test_texts_without_a_prompt_have_none_beside_those_with_one(tokenizer: TextTokenizer):
    assert tokenizer.prompt_tokens([], []) == []
    assert tokenizer.prompt_tokens(["the cat", "the dog"], [0, 0]) == [0, 0]
    assert tokenizer.prompt_tokens(["the cat", "x\ny", "", "the dog"], [0, 2, 0, 3]) == [0, 2, 0, 1]


# --- token shards ---

Prompted = tuple[list[int], int]


def write_shard(folder: Path, stem: str, documents: list[Prompted], vocab_size: int = 100) -> tuple[Path, str]:
    with TokenShardWriter(folder, stem, vocab_size=vocab_size) as writer:
        for number, (tokens, prompt) in enumerate(documents):
            writer.add(DocumentRecord(f"{stem}|{number}", 1), np.array(tokens, dtype=np.int64), prompt)
    return folder, stem


def test_a_shard_without_prompts_has_no_file_of_them_and_everything_is_learned(tmp_path: Path):
    stream = TokenDocuments([write_shard(tmp_path, "s", [([0, 5], 0), ([0], 0)])])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"s{DOCUMENTS}", f"s{OFFSETS}", f"s{TOKENS}"]
    assert not stream.has_prompts
    assert stream.learned(0, 3).tolist() == [True, True, True]
    assert [row.tolist() for row in stream.learned_targets()] == [[True], []]
    assert list(stream.prompts()) == [0, 0]


def test_a_prompt_is_not_learned_and_the_separator_before_it_is(tmp_path: Path):
    documents = [([0, 5, 6], 0), ([0, 1, 2, 3], 2), ([0], 0), ([0, 4], 1), ([0, 7], 0)]
    stream = TokenDocuments([write_shard(tmp_path, "s", documents)])
    prompts = np.load(tmp_path / f"s{PROMPTS}")
    assert (prompts.tolist(), prompts.dtype) == ([0, 2, 0, 1, 0], np.int64)
    assert stream.has_prompts
    # Tokens:                                0  5  6  0  1  2  3  0  0  4  0  7
    assert stream.learned(0, 12).tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1]
    assert stream.learned(0, 12).dtype == np.bool_
    assert stream.learned(4, 1).tolist() == [False]
    assert [row.tolist() for row in stream.learned_targets()] == [[1, 1], [0, 0, 1], [], [0], [1]]
    assert [row.dtype for row in stream.learned_targets()] == [np.bool_] * 5
    assert [tokens.tolist() for tokens in stream.documents()] == [tokens for tokens, _ in documents]
    assert [record.sp_id for record in stream.records()] == [f"s|{number}" for number in range(5)]


def test_a_first_prompt_that_comes_late_stands_at_its_document(tmp_path: Path):
    write_shard(tmp_path, "s", [*([([0, 1], 0)] * 3000), ([0, 1, 2], 1), ([0], 0)])
    expected = np.zeros(3002, dtype=np.int64)
    expected[3000] = 1
    np.testing.assert_array_equal(np.load(tmp_path / f"s{PROMPTS}"), expected)


document = st.integers(0, 5).flatmap(lambda n: st.tuples(st.just([0] * (n + 1)), st.integers(0, n)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shards=st.lists(st.lists(document, max_size=5), max_size=5), data=st.data())
def test_what_is_learned_is_that_of_one_long_list(shards: list[list[Prompted]], data: st.DataObject):
    documents = [document for some in shards for document in some]
    naive = [place == 0 or place > prompt for tokens, prompt in documents for place in range(len(tokens))]
    start = data.draw(st.integers(0, len(naive)))
    length = data.draw(st.integers(0, len(naive) - start))
    with tempfile.TemporaryDirectory() as folder:
        stream = TokenDocuments([write_shard(Path(folder), str(i), some) for i, some in enumerate(shards)])
        assert stream.has_prompts == (not all(naive))
        assert stream.learned(start, length).tolist() == naive[start : start + length]
        assert list(stream.prompts()) == [prompt for _, prompt in documents]
        targets = [[place >= prompt for place in range(len(tokens) - 1)] for tokens, prompt in documents]
        assert [row.tolist() for row in stream.learned_targets()] == targets


@pytest.mark.parametrize(("start", "length"), [(0, 5), (4, 1), (-1, 1)])
@pytest.mark.parametrize("prompt", [0, 1])
def test_asking_beyond_the_stream_is_an_error(tmp_path: Path, start: int, length: int, prompt: int):
    stream = TokenDocuments([write_shard(tmp_path, "a", [([0, 1], prompt)]), write_shard(tmp_path, "b", [([0, 2], 0)])])
    with pytest.raises(IndexError, match=f"tokens {start} to {start + length} are not all in the stream of 4"):
        stream.learned(start, length)


@pytest.mark.parametrize("prompt", [-1, 3])
def test_a_prompt_that_its_document_cannot_hold_is_refused(tmp_path: Path, prompt: int):
    with pytest.raises(DataError, match=rf"s\|1: a prompt of {prompt} tokens in a document of 2$"):
        write_shard(tmp_path, "s", [([0, 1, 2], 2), ([0, 1, 2], prompt)])


def test_prompts_that_a_killed_writer_left_are_gone(tmp_path: Path):
    write_shard(tmp_path, "s", [([0, 1, 2], 2)])
    assert not TokenDocuments([write_shard(tmp_path, "s", [([0, 1, 2], 0)])]).has_prompts


@pytest.mark.parametrize("kept", [0, 20, -1])
def test_prompts_that_are_cut_short_are_refused(tmp_path: Path, kept: int):
    shard = write_shard(tmp_path, "a", [([0, 1, 2], 2)])
    path = tmp_path / f"a{PROMPTS}"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"{path} is cut short or no array: .*remove its manifest"):
        TokenDocuments([shard])


def test_a_writer_that_failed_leaves_no_prompts_to_read(tmp_path: Path):
    with pytest.raises(DataError, match="do not fit"):
        write_shard(tmp_path, "a", [([0, 1], 1), ([0, 100], 0)])
    write_shard(tmp_path, "b", [([0, 1], 1)])
    (tmp_path / f"a{PROMPTS}").replace(tmp_path / f"b{PROMPTS}")  # the other files are whole
    with pytest.raises(DataError, match=f"b{PROMPTS} is cut short"):
        TokenDocuments([(tmp_path, "b")])


def test_prompts_of_another_shard_are_refused(tmp_path: Path):
    shard = write_shard(tmp_path, "a", [([0, 1, 2], 1)])
    path = tmp_path / f"a{PROMPTS}"
    np.save(path, np.array([1, 1]))
    with pytest.raises(DataError, match=rf"{path} has int64 of shape \(2,\) but the shard has 1 documents; remove"):
        TokenDocuments([shard])
    np.save(path, np.array([0.5]))
    with pytest.raises(DataError, match=rf"{path} has float64 of shape \(1,\)"):
        TokenDocuments([shard])
    np.save(path, np.array([3]))
    with pytest.raises(DataError, match=f"{path} has prompts that are longer than their documents"):
        TokenDocuments([shard]).learned(0, 3)
