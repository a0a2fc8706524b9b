"""Reading a corpus: `<root>/<split>/<shard>/<name>.jsonl[.gz|.zst]`, one `{"text": str, "id": …}` a line, or
`<name>.parquet` with a column `text`, one document a row.

A line `{"src": str, "tgt": str}`, or a row of columns so named, is an instruction: a document whose text is both, of
which only tgt is learned. Where neither brings white space to the joint they meet at a line end, which belongs to what
is given: words must not run together, and a line end is how prompts end that a model is asked with. Text that has its
own space there is left as it is. Where a line has a text, that is the document, whatever else it has.

A document is known by its `sp_id`, "<path relative to the corpus root>|<line or row, from 0>", so that a corpus may
be moved. Files come in sorted order and lines in file order: every stage sees the same documents in the same order.

What is read is UTF-8: a line that is not, or that escapes half of a surrogate pair, is a bad line. A byte order mark
at the start of a file and \\r before a line end mean nothing; of a key that is there twice the last one holds. A file
that is replaced or removed while it is open is read to its old end; one that is changed in place is an error.
"""

import codecs
import contextlib
import gzip
import io
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
from pydantic import Field, field_validator

from cbtm import parquet, storage
from cbtm.config import Config
from cbtm.errors import DataError, StorageError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", parquet.SUFFIX)
_MAX_LINE_BYTES = 1 << 28  # a line is in memory whole; beyond this it is one JSON document and not one a line
_PACKED_BYTES = 1 << 17


class CorpusConfig(Config):
    """Where the text lies.

    Attributes:
        root: Folder or s3:// prefix of the corpus.
        train_split: Path of the training split below the root.
        validation_split: Path of the validation split below the root, such as valid/C8_small.
        max_bad_lines: Lines or rows per file that may be unreadable (no JSON, no text); they are counted and skipped.
    """

    root: str = Field(min_length=1)
    train_split: str = "train"
    validation_split: str = "valid"
    max_bad_lines: int = Field(default=10, ge=0)

    @field_validator("train_split", "validation_split")
    @classmethod
    def _is_below_the_root(cls, split: str) -> str:
        parts = PurePosixPath(split).parts
        if not parts or split.startswith("/") or ".." in parts:
            raise ValueError(f"{split!r} names no folder below corpus.root")
        return "/".join(parts)


@dataclass(frozen=True)
class Document:
    """One document: its identity, its text, and how many characters at the text's start are given, not learned."""

    sp_id: str
    text: str
    prompt: int = 0


@dataclass
class ReadCounts:
    """Accounting of one pass: read = documents + skipped, by reason."""

    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count one line that gives no document."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def add(self, other: "ReadCounts") -> None:
        """Add the counts of another pass."""
        self.documents += other.documents
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count


def list_split(root: str, split: str) -> list[storage.StoredFile]:
    """List the corpus files of a split, sorted; paths are relative to the corpus root.

    Raises:
        DataError: If the split has no file that could hold documents, or one in two forms: a.jsonl beside a.jsonl.gz
            is most likely the same text twice, and a.parquet beside them would share the name of its assignments.
    """
    files = [
        storage.StoredFile(f"{split}/{file.path}", file.size, file.version)
        for file in storage.list_files(storage.join(root, split))
        if file.path.endswith(SUFFIXES) and not any(part.startswith(".") for part in file.path.split("/"))
    ]
    if not files:
        raise DataError(
            f"no corpus files below {storage.join(root, split)}; expected <shard>/<name> with one of the suffixes "
            f"{', '.join(SUFFIXES)} (a folder of other text: cbtm corpus import FOLDER OUTPUT)"
        )
    plain: dict[str, str] = {}
    for file in files:
        name = plain_name(file.path)
        if name in plain:
            raise DataError(f"{file.path} and {plain[name]} are one file in two forms; remove one of them")
        plain[name] = file.path
    return files


def plain_name(path: str) -> str:
    """Path of a corpus file as if it were plain JSON lines: a.jsonl for a.jsonl.gz, a.jsonl.zst and a.parquet."""
    if path.endswith(parquet.SUFFIX):
        return path.removesuffix(parquet.SUFFIX) + ".jsonl"
    return path.removesuffix(".gz").removesuffix(".zst")


def shard_of(path: str, split: str) -> str:
    """Name of the shard that holds a corpus file: the first folder below the split, or "" for a file in it."""
    below = path.removeprefix(f"{split}/")
    return below.split("/")[0] if "/" in below else ""


def read_lines(uri: str) -> Iterator[bytes]:
    """Stream the lines of a plain, .gz or .zst file, each with its line end; the last one may lack it.

    Raises:
        DataError: If a packed file is cut short or damaged, or not packed as its name says; a line is longer than
            256 MiB; or the file was changed in place meanwhile.
        StorageError: If the file is not there or cannot be read.
    """
    import zstandard

    with _open_unchanged(uri) as raw:
        try:
            lines = iter(partial(_unpacked(raw, uri).readline, _MAX_LINE_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                if len(line) > _MAX_LINE_BYTES:
                    raise DataError(
                        f"{uri}, line {number}: longer than {_MAX_LINE_BYTES} bytes; expected one JSON object a line"
                    )
                yield line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{uri} is cut short or damaged: {error}") from error


def read_file(root: str, path: str, *, max_bad_lines: int, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of one file, counting into `counts`; an empty file has none.

    Raises:
        ConfigError: For a Parquet file where pyarrow is not installed.
        DataError: When more lines are bad than `max_bad_lines`, with file and line; or the file is damaged, or was
            changed in place while it was read.
        StorageError: If the file is not there (any more) or cannot be read.
    """
    uri = storage.join(root, path)
    in_rows = path.endswith(parquet.SUFFIX)
    unit, wanted = ("row", "a text") if in_rows else ("line", "JSON with a text")
    bad = 0
    for number, found in enumerate(_rows(uri) if in_rows else map(_parsed, read_lines(uri))):
        if found is None:
            bad += 1
            counts.skip(f"not {wanted}")
            if bad > max_bad_lines:
                raise DataError(
                    f"{uri}, {unit} {number + 1}: not {wanted}{'' if in_rows else ' field, nor with src and tgt'}; "
                    f"{bad} bad {unit}s are more than corpus.max_bad_lines={max_bad_lines}"
                )
            continue
        text, prompt = found
        if not text.strip():
            counts.skip("empty text")
        elif prompt and not text[prompt:].strip():
            counts.skip("empty tgt")
        else:
            counts.documents += 1
            yield Document(f"{path}|{number}", text, prompt)


def read_files(root: str, paths: Iterable[str], *, max_bad_lines: int, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of several files, in the order given."""
    for path in paths:
        yield from read_file(root, path, max_bad_lines=max_bad_lines, counts=counts)


def _parsed(line: bytes) -> tuple[str, int] | None:
    """Text of a line and the characters of it that are given; None for a bad line."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict):
        return None
    text = record.get("text")
    if isinstance(text, str):
        return text, 0
    return _joined(record.get("src"), record.get("tgt")) if text is None else None


def _rows(uri: str) -> Iterator[tuple[str, int] | None]:
    with _open_seekable(uri) as file:
        for text, src, tgt in parquet.read_texts(file, uri, ("text",), ("src", "tgt")):
            yield (text, 0) if text is not None else _joined(src, tgt)


def _joined(src: object, tgt: object) -> tuple[str, int] | None:
    """Text of an instruction and the length of what stands before its answer."""
    if not (isinstance(src, str) and isinstance(tgt, str)):
        return None
    joint = "\n" if src and not src[-1].isspace() and not tgt[:1].isspace() else ""
    return f"{src}{joint}{tgt}", len(src) + len(joint)


@contextlib.contextmanager
def _open_unchanged(uri: str) -> Iterator[BinaryIO]:
    """Open for reading to the end; a local file that was written to meanwhile is an error, in S3 a read is of one
    version.
    """
    with storage.open_read(uri) as file:
        before = None if storage.is_s3(uri) else os.fstat(file.fileno())
        try:
            yield file
        except (StorageError, gzip.BadGzipFile):
            raise
        except OSError as error:  # a disk or a mount that fails under the open file
            raise StorageError(f"{uri} cannot be read to its end: {error}") from error
        if before is not None:
            after = os.fstat(file.fileno())
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise DataError(
                    f"{uri} was changed while it was read ({before.st_size} bytes before, {after.st_size} after); "
                    "run again when nothing writes to the corpus"
                )


@contextlib.contextmanager
def _open_seekable(uri: str) -> Iterator[BinaryIO]:
    """Open for reads at any place: an S3 object by way of a file on this machine, as large as the object."""
    if not storage.is_s3(uri):
        with _open_unchanged(uri) as file:
            yield file
        return
    with _fetched(uri) as file:
        yield file


def _fetched(uri: str) -> BinaryIO:
    """The content of an object in a file that has no name any more: a killed process leaves nothing behind."""
    folder, _, name = uri.rpartition("/")
    scratch = os.environ.get("CBTM_SCRATCH") or tempfile.gettempdir()
    try:
        os.makedirs(scratch, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="cbtm-", dir=scratch) as temporary:
            storage.download(folder, Path(temporary), [name])
            return Path(temporary, name).open("rb")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write below {scratch}: {error}; set CBTM_SCRATCH to a folder with room") from error


def _unpacked(raw: BinaryIO, uri: str) -> BinaryIO | gzip.GzipFile | io.BufferedReader:
    if uri.endswith(".gz"):
        return gzip.open(raw)
    if uri.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(raw))
    return raw


class _ZstdFrames(io.RawIOBase):
    """The text of one zstd frame after the other.

    zstandard's own stream_reader takes a file that is cut short for one that ends there, and loses the rest in
    silence; this one raises EOFError, as gzip does.
    """

    def __init__(self, packed: BinaryIO) -> None:
        import zstandard

        self._packed, self._decompressor = packed, zstandard.ZstdDecompressor()
        self._frame: ZstdDecompressionObj | None = None
        self._left = b""  # packed bytes after the end of a frame
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            packed = self._left or self._packed.read(_PACKED_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends before its last zstd frame does")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(packed))
            self._left = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n
