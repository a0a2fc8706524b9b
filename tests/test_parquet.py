"""Parquet files as corpus files: the rows of every form of column, in bounded memory, from disk and from S3."""

import io
import itertools
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cbtm import storage
from cbtm.corpus import Document, ReadCounts, list_split, read_file
from cbtm.errors import ConfigError, DataError, StorageError
from cbtm.parquet import read_texts


def packed(columns: dict[str, Any], **settings: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **settings)
    return out.getvalue()


def read(root: str, path: str, max_bad_lines: int = 10) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return list(read_file(root, path, max_bad_lines=max_bad_lines, counts=counts)), counts


def texts_of(content: bytes) -> list[str | None]:
    return [text for (text,) in read_texts(io.BytesIO(content), "a.parquet", ("text",))]


def long_texts(n: int) -> list[str]:
    rng = random.Random(0)
    return [rng.randbytes(100).hex() for _ in range(n)]


# --- rows ---


def test_a_row_is_a_document_and_its_number_counts_over_row_groups(root: str):
    texts = ["one", "zwei\nΣ 🎈", None, "", " \t", "six", "seven"]
    content = packed({"id": list(range(7)), "text": texts}, row_group_size=2)
    storage.write_bytes(f"{root}/train/0/a.parquet", content)
    (file,) = list_split(root, "train")
    documents, counts = read(root, file.path)
    assert documents == [
        Document("train/0/a.parquet|0", "one"),
        Document("train/0/a.parquet|1", "zwei\nΣ 🎈"),
        Document("train/0/a.parquet|5", "six"),
        Document("train/0/a.parquet|6", "seven"),
    ]
    assert counts == ReadCounts(documents=4, skipped={"not a text": 1, "empty text": 2})


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_many_row_groups_are_read_in_order_whatever_their_codec(root: str, codec: str):
    texts = long_texts(5000)  # 1 MB
    storage.write_bytes(f"{root}/a.parquet", packed({"text": texts}, row_group_size=777, compression=codec))
    assert [document.text for document in read(root, "a.parquet")[0]] == texts


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_every_type_of_text_gives_the_same_texts(kind: pa.DataType):
    values = pa.array(["a", None, "ü", "a"])
    values = values.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else values.cast(kind)
    assert texts_of(packed({"text": values})) == ["a", None, "ü", "a"]


def test_a_column_whose_name_begins_alike_is_another():
    assert texts_of(packed({"text.raw": ["x"], "text": ["y"], "texts": ["z"]})) == ["y"]


def test_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path):
    offsets = pa.array([0, 2, 3], pa.int32()).buffers()[1]
    values = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfex")])  # "\xff\xfe", "x"
    (tmp_path / "a.parquet").write_bytes(packed({"text": values}))
    documents, counts = read(str(tmp_path), "a.parquet")
    assert documents == [Document("a.parquet|1", "x")]
    assert counts.skipped == {"not a text": 1}


def test_a_file_without_rows_has_no_documents(root: str):
    storage.write_bytes(f"{root}/a.parquet", packed({"text": pa.array([], pa.string())}))
    assert read(root, "a.parquet") == ([], ReadCounts())


def test_one_null_more_than_the_limit_is_an_error_that_names_file_and_row(root: str):
    storage.write_bytes(f"{root}/train/0/a.parquet", packed({"text": ["1", None, "3", None, "5"]}))
    with pytest.raises(DataError) as caught:
        read(root, "train/0/a.parquet", max_bad_lines=1)
    assert str(caught.value) == (
        f"{root}/train/0/a.parquet, row 4: not a text; 2 bad rows are more than corpus.max_bad_lines=1"
    )


# --- memory ---


def peak_of(columns: dict[str, Any], row_group_size: int, folder: Path) -> int:
    """Most bytes that pyarrow holds at once while a file is read."""
    path = folder / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, compression="none", use_dictionary=False)
    columns.clear()
    before, peak = pa.total_allocated_bytes(), 0
    documents = read_file(str(folder), path.name, max_bad_lines=0, counts=ReadCounts())
    for _ in itertools.islice(documents, 0, None, 100):
        peak = max(peak, pa.total_allocated_bytes() - before)
    return peak


def test_memory_does_not_grow_with_the_file_nor_with_its_row_groups(tmp_path: Path):
    def columns(n: int) -> dict[str, Sequence[Any]]:
        return {"text": ["x" * 1000] * n, "other": [b"y" * 1000] * n}

    small = peak_of(columns(5_000), 5_000, tmp_path)
    larger_group = peak_of(columns(40_000), 40_000, tmp_path)  # 80 MB in one group
    more_groups = peak_of(columns(40_000), 5_000, tmp_path)
    assert small < 8 << 20
    assert larger_group < 1.5 * small
    assert more_groups < 1.5 * small


# --- S3 ---


def test_an_object_leaves_nothing_on_this_machine(bucket: str, tmp_path: Path):
    storage.write_bytes(f"{bucket}/a.parquet", packed({"text": ["one", "two"]}))
    reader = read_file(bucket, "a.parquet", max_bad_lines=0, counts=ReadCounts())
    assert next(reader).text == "one"
    assert list((tmp_path / "scratch").iterdir()) == []  # even while it is read
    storage.delete(bucket, ["a.parquet"])
    assert next(reader).text == "two"


def test_a_scratch_folder_that_cannot_be_is_named(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CBTM_SCRATCH", f"{tmp_path}/file/scratch")
    storage.write_bytes(f"{bucket}/a.parquet", packed({"text": ["one"]}))
    with pytest.raises(StorageError, match=rf"cannot write below {tmp_path}/file/scratch: .*; set CBTM_SCRATCH"):
        read(bucket, "a.parquet")


# --- what is wrong ---


def test_a_file_that_is_gone_is_named(root: str):
    with pytest.raises(StorageError, match=f"{root}/train/a.parquet.* not there"):
        read(root, "train/a.parquet")


def test_a_file_without_the_column_is_an_error_with_the_columns_that_are_there(root: str):
    storage.write_bytes(f"{root}/a.parquet", packed({"content": ["x"], "url": ["y"]}))
    expected = f"{root}/a.parquet has no column 'text', nor 'src' and 'tgt'; its columns: content, url"
    with pytest.raises(DataError, match=re.escape(expected)):
        read(root, "a.parquet")


def test_a_column_that_is_there_twice_is_an_error():
    out = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), out)
    with pytest.raises(DataError, match="has 2 columns named 'text', expected one"):
        texts_of(out.getvalue())


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1], "int64"), ([["x"]], "list<element: string>"), ([{"x": "y"}], "struct<x: string>"), ([None], "null")],
)
def test_a_column_of_another_type_is_an_error(values: list[Any], kind: str):
    with pytest.raises(DataError, match=re.escape(f"a.parquet: column 'text' is of type {kind}, expected string")):
        texts_of(packed({"text": values}))


@pytest.mark.parametrize("kept", [0, 0.05, 0.5, 0.9999])
def test_a_file_that_is_cut_short_is_an_error(root: str, kept: float):
    whole = packed({"text": long_texts(2000)})
    storage.write_bytes(f"{root}/a.parquet", whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=rf"{root}/a\.parquet is cut short or damaged: \S"):
        read(root, "a.parquet")


def test_a_changed_byte_is_found_where_the_writer_left_checksums():
    texts = long_texts(2000)
    whole = packed({"text": texts}, write_page_checksum=True, compression="none", use_dictionary=False)
    damaged = whole.replace(texts[1000].encode(), b"f" * 200)
    assert damaged != whole
    with pytest.raises(DataError, match=r"a\.parquet is cut short or damaged: .*CRC checksum verification failed"):
        texts_of(damaged)


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 0.9999])
def test_a_file_with_overwritten_bytes_is_an_error_in_one_line(place: float):
    damaged = bytearray(packed({"text": long_texts(2000)}, compression="zstd"))
    start = int(len(damaged) * place)
    damaged[start : start + 2000] = bytes(len(damaged[start : start + 2000]))
    with pytest.raises(DataError, match=r"^a\.parquet is cut short or damaged: .+$") as caught:
        texts_of(bytes(damaged))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_written_to_while_it_is_read_is_an_error(tmp_path: Path):
    path, content = tmp_path / "a.parquet", packed({"text": long_texts(2000)})
    path.write_bytes(content)
    reader = read_file(str(tmp_path), path.name, max_bad_lines=0, counts=ReadCounts())
    next(reader)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=rf"{path} was changed while it was read \({len(content)} bytes before"):
        list(reader)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(packed({"text": ["x"]}))
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a\.parquet needs pyarrow .*: pip install 'cbtm\[parquet\]'"):
        read(str(tmp_path), "a.parquet")
