"""Reading a corpus: every form alike, every line accounted for, nothing lost in silence."""

import gzip
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cbtm import corpus, storage
from cbtm.corpus import (
    CorpusConfig,
    Document,
    ReadCounts,
    list_split,
    plain_name,
    read_file,
    read_files,
    read_lines,
    shard_of,
)
from cbtm.errors import ConfigError, DataError, StorageError

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def line(text: str, **more: object) -> bytes:
    return json.dumps({"text": text, **more}).encode() + b"\n"


def read(root: str, path: str, max_bad_lines: int = 10) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(read_file(root, path, max_bad_lines=max_bad_lines, counts=counts)), counts


def long_text(n_lines: int) -> bytes:
    rng = random.Random(0)
    return b"".join(line(rng.randbytes(40).hex()) for _ in range(n_lines))


# --- every form ---


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_plain_gzip_and_zstd_files_give_the_same_documents(root: str, suffix: str):
    lines = line("one", id=1) + line("zwei\nΣ 🎈", id="b") + line("three")
    path = f"train/00000/a.jsonl{suffix}"
    storage.write_bytes(storage.join(root, path), PACK[suffix](lines))
    documents, counts = read(root, path)
    assert documents == [
        Document(f"{path}|0", "one"),
        Document(f"{path}|1", "zwei\nΣ 🎈"),
        Document(f"{path}|2", "three"),
    ]
    assert counts == ReadCounts(documents=3)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_last_line_without_a_line_end_is_read(tmp_path: Path, suffix: str):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](line("one") + line("two").rstrip()))
    assert [document.text for document in read(str(tmp_path), f"a.jsonl{suffix}")[0]] == ["one", "two"]


def test_a_file_of_several_frames_is_read_to_its_end(tmp_path: Path):
    # pzstd writes skippable frames (magic 0x184D2A50, size, content) between the others; a frame may be empty.
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"size"
    halves = line("one") + line("two")[:5], line("two")[5:] + line("three")
    packed = skippable + zstandard.compress(halves[0]) + zstandard.compress(b"") + zstandard.compress(halves[1])
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(halves[0]) + gzip.compress(halves[1]))
    for name in ("a.jsonl.zst", "a.jsonl.gz"):
        assert [document.text for document in read(str(tmp_path), name)[0]] == ["one", "two", "three"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_of_many_blocks_is_read_whole(root: str, suffix: str):
    lines = long_text(20_000)  # 1.8 MB, several blocks of every reader
    storage.write_bytes(storage.join(root, f"a.jsonl{suffix}"), PACK[suffix](lines))
    documents, _ = read(root, f"a.jsonl{suffix}")
    assert b"".join(line(document.text) for document in documents) == lines


def test_sp_id_is_relative_so_that_a_corpus_may_be_moved(tmp_path: Path, bucket: str):
    for root in (str(tmp_path / "here"), f"{bucket}/there", f"{tmp_path}/trailing/"):
        storage.write_bytes(storage.join(root, "valid/C8/0/a.jsonl"), line("") + line("x"))
        assert read(root, "valid/C8/0/a.jsonl")[0] == [Document("valid/C8/0/a.jsonl|1", "x")]


def test_several_files_are_read_in_the_order_given_into_one_count(root: str):
    storage.write_bytes(f"{root}/b.jsonl", line("b") + b"no\n")
    storage.write_bytes(f"{root}/a.jsonl", line("a") + line(" "))
    counts = ReadCounts()
    documents = read_files(root, ["b.jsonl", "a.jsonl"], max_bad_lines=1, counts=counts)
    assert [document.sp_id for document in documents] == ["b.jsonl|0", "a.jsonl|0"]
    assert counts == ReadCounts(documents=2, skipped={"not JSON with a text": 1, "empty text": 1})


# --- lines that give no document ---

BAD = [b"{", b"", b"null", b"[]", b'"text"', b'{"id": 1}', b'{"text": 3}', b'{"text": null}', b'{"text": "\xff"}']


def test_bad_lines_are_counted_and_skipped_up_to_the_limit(root: str):
    lines = line("first") + b"".join(bad + b"\n" for bad in BAD) + line("last")
    storage.write_bytes(f"{root}/a.jsonl", lines)
    documents, counts = read(root, "a.jsonl", max_bad_lines=len(BAD))
    assert [document.sp_id for document in documents] == ["a.jsonl|0", f"a.jsonl|{len(BAD) + 1}"]
    assert counts == ReadCounts(documents=2, skipped={"not JSON with a text": len(BAD)})


def test_one_bad_line_more_is_an_error_that_names_file_and_line(root: str):
    storage.write_bytes(f"{root}/train/0/a.jsonl", line("1") + b"{\n" + line("3") + b"{\n" + line("5"))
    with pytest.raises(DataError) as caught:
        read(root, "train/0/a.jsonl", max_bad_lines=1)
    assert str(caught.value) == (
        f"{root}/train/0/a.jsonl, line 4: not JSON with a text field, nor with src and tgt; "
        "2 bad lines are more than corpus.max_bad_lines=1"
    )


def test_the_limit_is_of_each_file(tmp_path: Path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"{\n" + line(name))
    counts = ReadCounts()
    found = list(read_files(str(tmp_path), ["a.jsonl", "b.jsonl"], max_bad_lines=1, counts=counts))
    assert len(found) == 2
    assert counts.skipped == {"not JSON with a text": 2}


def test_empty_text_is_counted_and_is_no_bad_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(line("") + line(" \n\t ") + line("x"))
    documents, counts = read(str(tmp_path), "a.jsonl", max_bad_lines=0)
    assert [document.sp_id for document in documents] == ["a.jsonl|2"]
    assert counts == ReadCounts(documents=1, skipped={"empty text": 2})


def test_counts_add_up():
    counts = ReadCounts(documents=1, skipped={"a": 1})
    counts.add(ReadCounts(documents=2, skipped={"a": 2, "b": 1}))
    assert counts == ReadCounts(documents=3, skipped={"a": 3, "b": 1})


# --- what writers of JSON lines do ---

UNUSUAL = {
    "an escaped surrogate pair is one character": (rb'{"text": "\ud83c\udf88"}', "🎈"),
    "half a surrogate pair is no text": (rb'{"text": "\ud83c"}', None),
    "the other half neither": (rb'{"text": "\udf88 x"}', None),
    "nor one that was encoded": (b'{"text": "\xed\xa0\xbc"}', None),
    "Latin-1 is not UTF-8": ('{"text": "é"}'.encode("latin-1"), None),
    "a carriage return ends no text": (b'{"text": "x"}\r', "x"),
    "NUL may be escaped": (rb'{"text": "a\u0000b"}', "a\x00b"),
    "NUL as such is no JSON": (b'{"text": "a\x00b"}', None),
    "nor after the object": (b'{"text": "a"}\x00\x00', None),
    "the last of equal keys holds": (b'{"text": "first", "text": "last"}', "last"),
    "deep nesting is refused": (b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
}


@pytest.mark.parametrize(("raw", "text"), UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_line_is_read_or_counted(tmp_path: Path, raw: bytes, text: str | None):
    (tmp_path / "a.jsonl").write_bytes(raw + b"\n" + line("next"))
    documents, counts = read(str(tmp_path), "a.jsonl")
    assert [document.text for document in documents] == [*([] if text is None else [text]), "next"]
    assert counts.skipped == ({"not JSON with a text": 1} if text is None else {})
    assert all(document.text.encode() for document in documents)  # whatever is read can be written


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_byte_order_mark_at_the_start_of_a_file_is_no_part_of_the_line(tmp_path: Path, suffix: str):
    mark = b"\xef\xbb\xbf"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](mark + line("one") + mark + line("two")))
    documents, counts = read(str(tmp_path), f"a.jsonl{suffix}")
    assert documents == [Document(f"a.jsonl{suffix}|0", "one")]
    assert counts.skipped == {"not JSON with a text": 1}  # within a file it is not one


def test_windows_line_ends_change_nothing(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes((line("one\r\n") + line("two")).replace(b"\n", b"\r\n"))
    assert read(str(tmp_path), "a.jsonl")[0] == [Document("a.jsonl|0", "one\r\n"), Document("a.jsonl|1", "two")]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_file_has_no_documents(root: str, suffix: str, packed: bool):
    storage.write_bytes(f"{root}/a.jsonl{suffix}", PACK[suffix](b"") if packed else b"")
    assert read(root, f"a.jsonl{suffix}") == ([], ReadCounts())


def test_a_line_that_memory_may_not_hold_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "_MAX_LINE_BYTES", len(line("12345")))
    (tmp_path / "a.jsonl").write_bytes(line("12345") * 2)
    assert len(read(str(tmp_path), "a.jsonl")[0]) == 2
    (tmp_path / "a.jsonl").write_bytes(line("12345") + line("123456"))
    with pytest.raises(
        DataError, match=rf"{tmp_path}/a\.jsonl, line 2: longer than 18 bytes; expected one JSON object"
    ):
        read(str(tmp_path), "a.jsonl")  # {"text": "12345"} and a line end: 10 + 5 + 2 + 1 = 18


# --- files that change ---


def test_a_file_that_goes_between_listing_and_reading_is_named(root: str):
    storage.write_bytes(f"{root}/train/0/a.jsonl", line("x"))
    (file,) = list_split(root, "train")
    storage.delete(root, [file.path])
    with pytest.raises(StorageError, match=rf"{root}/train/0/a\.jsonl.* is not there"):
        read(root, file.path)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_file_that_goes_while_it_is_read_is_read_to_its_old_end(root: str, change: str):
    lines = long_text(20_000)
    storage.write_bytes(f"{root}/a.jsonl", lines)
    reader = read_lines(f"{root}/a.jsonl")
    first = next(reader)
    if change == "removed":
        storage.delete(root, ["a.jsonl"])
    else:
        storage.write_bytes(f"{root}/a.jsonl", line("new"))
    assert first + b"".join(reader) == lines


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("change", ["cut", "longer", "overwritten"])
def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path: Path, suffix: str, change: str):
    path, packed = tmp_path / f"a.jsonl{suffix}", PACK[suffix](long_text(20_000))
    path.write_bytes(packed)
    os.utime(path, ns=(0, 0))
    reader = read_lines(str(path))
    next(reader)
    if change == "cut":
        os.truncate(path, len(packed) // 2)
    else:
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END if change == "longer" else os.SEEK_SET)
            file.write(PACK[suffix](line("more")) if change == "longer" else packed[:1])
    expected = rf"{path} (was changed while it was read \({len(packed)} bytes before|is cut short or damaged)"
    with pytest.raises(DataError, match=expected):
        list(reader)


# --- damage ---


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9999])
def test_a_file_that_is_cut_short_is_an_error(root: str, suffix: str, kept: float):
    whole = PACK[suffix](long_text(5000))
    storage.write_bytes(f"{root}/a.jsonl{suffix}", whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=re.escape(f"{root}/a.jsonl{suffix} is cut short or damaged: ")):
        read(root, f"a.jsonl{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("place", [0, 0.3, 0.7])
def test_a_file_with_overwritten_bytes_is_an_error(tmp_path: Path, suffix: str, place: float):
    # The zstd program writes a checksum into each frame, Python's zstandard only when asked to.
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    damaged = bytearray(pack(long_text(5000)))
    start = int(len(damaged) * place)
    damaged[start : start + 2000] = bytes(2000)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(damaged)
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix}(, line \d+: not JSON| is cut short or damaged: )"):
        read(str(tmp_path), f"a.jsonl{suffix}")


def test_damaged_deflate_data_is_an_error(tmp_path: Path):
    # Bytes 10 and 11 begin the deflate stream; block type 3 does not exist (RFC 1951, 3.2.3).
    damaged = bytearray(gzip.compress(line("x")))
    damaged[10] = 0b111
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"is cut short or damaged: .*invalid block type"):
        read(str(tmp_path), "a.jsonl.gz")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_packed_as_its_name_says_is_an_error(tmp_path: Path, suffix: str):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(line("plain"))
    with pytest.raises(DataError, match="is cut short or damaged: "):
        read(str(tmp_path), f"a.jsonl{suffix}")


def test_a_file_that_is_gone_is_named(root: str):
    with pytest.raises(StorageError, match=f"{root}/train/a.jsonl.* not there"):
        read(root, "train/a.jsonl")


# --- which files ---


def test_a_split_is_its_corpus_files_sorted_and_nothing_else(root: str):
    wanted = ["train/0/a.jsonl", "train/0/b.jsonl.gz", "train/1/deep/a.jsonl.zst", "train/loose.jsonl"]
    others = [
        "train/0/README.md",
        "train/0/.hidden.jsonl",
        "train/.cache/a.jsonl",
        "train/0/a.jsonl.tmp",
        "train/0/a.json",
        "training/0/a.jsonl",
        "valid/0/a.jsonl",
    ]
    for path in [*reversed(wanted), *others]:
        storage.write_bytes(f"{root}/{path}", line(path))
    assert [file.path for file in list_split(root, "train")] == wanted


def test_a_split_may_lie_deeper(root: str):
    for path in ("valid/C8_small/0/a.jsonl", "valid/C8/0/a.jsonl"):
        storage.write_bytes(f"{root}/{path}", line("x"))
    files = list_split(root, "valid/C8_small")
    assert [(file.path, file.size) for file in files] == [("valid/C8_small/0/a.jsonl", len(line("x")))]
    assert shard_of(files[0].path, "valid/C8_small") == "0"


def test_a_hidden_folder_above_the_corpus_hides_nothing(tmp_path: Path):
    storage.write_bytes(f"{tmp_path}/.data/train/0/a.jsonl", line("x"))
    assert len(list_split(f"{tmp_path}/.data", "train")) == 1


def test_a_split_without_files_is_an_error_with_the_layout_and_the_way_out(root: str):
    storage.write_bytes(f"{root}/train/0/a.txt", b"x")
    expected = rf"no corpus files below {root}/train; expected <shard>/<name> .*\.jsonl\.zst.*cbtm corpus import"
    with pytest.raises(DataError, match=expected):
        list_split(root, "train")


@pytest.mark.parametrize("twin", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_one_file_in_two_forms_is_refused(root: str, twin: str):
    for name in ("a.jsonl", twin):
        storage.write_bytes(f"{root}/train/0/{name}", b"")
    with pytest.raises(DataError, match=rf"^train/0/{twin} and train/0/a\.jsonl are one file in two forms; remove one"):
        list_split(root, "train")


def test_the_plain_name_is_that_of_json_lines():
    assert {plain_name(f"train/0/a.b{suffix}") for suffix in corpus.SUFFIXES} == {"train/0/a.b.jsonl"}


def test_the_shard_is_the_first_folder_below_the_split():
    assert shard_of("train/00001/a.jsonl", "train") == "00001"
    assert shard_of("train/00001/deep/a.jsonl", "train") == "00001"
    assert shard_of("train/a.jsonl", "train") == ""


# --- settings ---


def test_a_split_is_spelled_in_one_way():
    config = CorpusConfig(root="c", train_split="train/", validation_split="./valid//C8")
    assert (config.train_split, config.validation_split) == ("train", "valid/C8")


@pytest.mark.parametrize("split", ["", ".", "/train", "../train", "a/../../b"])
def test_a_split_outside_of_the_corpus_is_refused(split: str):
    with pytest.raises(ConfigError, match=r"train_split: .* names no folder below corpus\.root"):
        CorpusConfig.parse({"root": "c", "train_split": split})


def test_a_corpus_without_a_root_is_refused():
    with pytest.raises(ConfigError, match="root: String should have at least 1 character"):
        CorpusConfig.parse({"root": ""})
