"""Token shards: what is written is read, one shard or many, to the byte."""

import subprocess
import sys
import tempfile
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.errors import DataError
from cbtm.tokens import DOCUMENTS, OFFSETS, TOKENS, DocumentRecord, TokenDocuments, TokenShardWriter, token_dtype


def write_shard(folder: Path, stem: str, documents: list[list[int]], vocab_size: int = 1000) -> tuple[Path, str]:
    with TokenShardWriter(folder, stem, vocab_size=vocab_size) as writer:
        for number, tokens in enumerate(documents):
            writer.add(DocumentRecord(f"{stem}|{number}", 10 * number), np.array(tokens, dtype=np.int64))
    return folder, stem


def test_documents_come_back_as_they_were_written(tmp_path: Path):
    documents = [[0, 5, 6], [0], [0, 7, 8, 9]]
    stream = TokenDocuments([write_shard(tmp_path / "deep/er", "s", documents)])
    assert [tokens.tolist() for tokens in stream.documents()] == documents
    assert [tokens.dtype for tokens in stream.documents()] == [np.int64] * 3
    assert stream.lengths().tolist() == [3, 1, 4]
    assert (stream.n_documents, stream.n_tokens) == (3, 8)
    assert stream.read(2, 3).tolist() == [6, 0, 0]


def test_the_files_are_plain_arrays_and_lines_as_documented(tmp_path: Path):
    write_shard(tmp_path, "s", [[0, 5], [0, 7, 8]])
    assert np.load(tmp_path / f"s{TOKENS}").tolist() == [0, 5, 0, 7, 8]
    offsets = np.load(tmp_path / f"s{OFFSETS}")
    assert (offsets.tolist(), offsets.dtype) == ([0, 2, 5], np.int64)
    assert (tmp_path / f"s{DOCUMENTS}").read_text() == '{"sp_id":"s|0","bytes":0}\n{"sp_id":"s|1","bytes":10}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"s{DOCUMENTS}", f"s{OFFSETS}", f"s{TOKENS}"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(300, np.uint16), (50_257, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (256_000, np.uint32)],
)
def test_tokens_take_two_bytes_while_every_id_fits(tmp_path: Path, vocab_size: int, dtype: type):
    assert token_dtype(vocab_size) == dtype
    stream = TokenDocuments([write_shard(tmp_path, "s", [[0, vocab_size - 1]], vocab_size)])
    assert np.load(tmp_path / f"s{TOKENS}").dtype == dtype
    assert stream.read(0, 2).tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("token", [-1, 65_536])
def test_a_token_that_would_wrap_around_is_refused(tmp_path: Path, token: int):
    with pytest.raises(DataError, match=r"s\|0: token ids .* do not fit vocab_size=65536"):
        write_shard(tmp_path, "s", [[0, token]], 65_536)


def test_counts_are_of_documents_tokens_and_bytes(tmp_path: Path):
    with TokenShardWriter(tmp_path, "s", vocab_size=10) as writer:
        assert writer.counts == {"documents": 0, "tokens": 0, "bytes": 0}
        writer.add(DocumentRecord("a", 11), np.array([0, 1, 2]))
        writer.add(DocumentRecord("b", 5), np.array([0], dtype=np.uint16))
    assert writer.counts == {"documents": 2, "tokens": 4, "bytes": 16}


def test_the_header_has_room_for_any_number_of_tokens(tmp_path: Path):
    tokens = np.zeros(1_234_567, dtype=np.int64)
    with TokenShardWriter(tmp_path, "s", vocab_size=10) as writer:
        writer.add(DocumentRecord("a", 1), tokens)
    assert np.load(tmp_path / f"s{TOKENS}").shape == (1_234_567,)


def test_more_shards_than_a_process_may_open_files_are_read(tmp_path: Path):
    shards = [(tmp_path, f"s{number}") for number in range(900)]
    for number, (folder, stem) in enumerate(shards):
        with TokenShardWriter(folder, stem, vocab_size=1000) as writer:
            writer.add(DocumentRecord(f"{number}", 1), np.array([0, number]))
    program = """
import resource, sys
import numpy as np
from pathlib import Path
from cbtm.tokens import TokenDocuments
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
found = TokenDocuments([(Path(sys.argv[1]), f"s{number}") for number in range(900)])
assert found.read(1, 1798)[::2].tolist() == list(range(899)), "tokens"
assert [len(tokens) for tokens in found.documents()] == [2] * 900, "documents"
assert found.lengths().sum() == found.n_tokens == 1800, "lengths"
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_equal_documents_give_equal_bytes(tmp_path: Path):
    for name in "ab":
        write_shard(tmp_path / name, "s", [[0, 1], [0, 2]])
    for suffix in (TOKENS, OFFSETS, DOCUMENTS):
        assert (tmp_path / f"a/s{suffix}").read_bytes() == (tmp_path / f"b/s{suffix}").read_bytes()


def test_records_stand_in_the_order_of_the_documents_across_shards(tmp_path: Path):
    shards = [write_shard(tmp_path, "b", [[0], [0]]), write_shard(tmp_path, "e", []), write_shard(tmp_path, "a", [[0]])]
    assert list(TokenDocuments(shards).records()) == [
        DocumentRecord("b|0", 0),
        DocumentRecord("b|1", 10),
        DocumentRecord("a|0", 0),
    ]


def test_an_identity_of_any_characters_comes_back(tmp_path: Path):
    name = 'train/ü "x"\n\r\u2028/a.jsonl|3'
    with TokenShardWriter(tmp_path, "s", vocab_size=10) as writer:
        writer.add(DocumentRecord(name, 3), np.array([0]))
    assert list(TokenDocuments([(tmp_path, "s")]).records()) == [DocumentRecord(name, 3)]


def test_an_empty_shard_among_others_adds_nothing(tmp_path: Path):
    shards = [
        write_shard(tmp_path, "e1", []),
        write_shard(tmp_path, "a", [[1, 2]]),
        write_shard(tmp_path, "e2", []),
        write_shard(tmp_path, "e3", []),
        write_shard(tmp_path, "b", [[3, 4]]),
        write_shard(tmp_path, "e4", []),
    ]
    stream = TokenDocuments(shards)
    without = TokenDocuments([shards[1], shards[4]])
    for start, end in combinations_with_replacement(range(5), 2):
        assert stream.read(start, end - start).tolist() == [1, 2, 3, 4][start:end]
        assert without.read(start, end - start).tolist() == [1, 2, 3, 4][start:end]
    assert stream.lengths().tolist() == [2, 2]
    assert [tokens.tolist() for tokens in stream.documents()] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("n_shards", [0, 2])
def test_a_stream_without_documents_is_empty(tmp_path: Path, n_shards: int):
    stream = TokenDocuments([write_shard(tmp_path, f"e{number}", []) for number in range(n_shards)])
    assert (stream.n_documents, stream.n_tokens) == (0, 0)
    assert stream.lengths().tolist() == []
    assert list(stream.records()) == []
    assert stream.read(0, 0).tolist() == []


document = st.lists(st.integers(0, 70_000), min_size=1, max_size=6)
shard = st.lists(document, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shards=st.lists(shard, max_size=5), data=st.data())
def test_reading_across_shards_is_reading_from_one_long_list(shards: list[list[list[int]]], data: st.DataObject):
    naive = [token for documents in shards for tokens in documents for token in tokens]
    start = data.draw(st.integers(0, len(naive)))
    length = data.draw(st.integers(0, len(naive) - start))
    with tempfile.TemporaryDirectory() as folder:
        stream = TokenDocuments([write_shard(Path(folder), str(i), shards[i], 70_001) for i in range(len(shards))])
        assert stream.n_tokens == len(naive)
        assert stream.read(start, length).tolist() == naive[start : start + length]
        assert stream.read(0, len(naive)).tolist() == naive
        assert [d.tolist() for d in stream.documents()] == [tokens for documents in shards for tokens in documents]


@pytest.mark.parametrize(("start", "length"), [(0, 5), (4, 1), (5, 0), (3, 2), (-1, 1)])
def test_reading_beyond_the_stream_is_an_error(tmp_path: Path, start: int, length: int):
    stream = TokenDocuments([write_shard(tmp_path, "a", [[0, 1]]), write_shard(tmp_path, "b", [[0, 2]])])
    with pytest.raises(IndexError, match=f"tokens {start} to {start + length} are not all in the stream of 4"):
        stream.read(start, length)


def test_offsets_of_another_shard_are_refused(tmp_path: Path):
    write_shard(tmp_path, "a", [[0, 1, 2]])
    write_shard(tmp_path, "b", [[0]])
    (tmp_path / f"b{OFFSETS}").replace(tmp_path / f"a{OFFSETS}")
    with pytest.raises(DataError, match=f"{tmp_path}/a: 3 tokens but the last document ends at 1"):
        TokenDocuments([(tmp_path, "a")])


@pytest.mark.parametrize("suffix", [TOKENS, OFFSETS])
@pytest.mark.parametrize("kept", [0, 20, -1])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str, kept: int):
    write_shard(tmp_path, "a", [[0, 1, 2]])
    path = tmp_path / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"{path} is cut short or no array: .*remove its manifest"):
        TokenDocuments([(tmp_path, "a")])


def test_a_shard_whose_writing_failed_is_not_there(tmp_path: Path):
    with pytest.raises(DataError), TokenShardWriter(tmp_path, "a", vocab_size=10) as writer:
        writer.add(DocumentRecord("a", 1), np.array([0, 10]))
    with pytest.raises(DataError, match="cut short"):
        TokenDocuments([(tmp_path, "a")])
