"""Reading a corpus: `<root>/<split>/<shard>/<name>.jsonl[.gz|.zst]`, one `{"text": str, "id": …}` a line.

A document is known by its `sp_id`, "<path relative to the corpus root>|<line>", so that a corpus may be moved.
Files come in sorted order and lines in file order: every stage sees the same documents in the same order.
"""

import gzip
import io
import logging
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
from pydantic import Field, field_validator

from cbtm import storage
from cbtm.config import Config
from cbtm.errors import DataError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_PACKED_BYTES = 1 << 17


class CorpusConfig(Config):
    """Where the text lies.

    Attributes:
        root: Folder or s3:// prefix of the corpus.
        train_split: Path of the training split below the root.
        validation_split: Path of the validation split below the root, such as valid/C8_small.
        max_bad_lines: Lines per file that may be unreadable (no JSON, no text); they are counted and skipped.
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
    """One document: its identity and its text."""

    sp_id: str
    text: str


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
        DataError: If the split has no file that could hold documents, or one twice, compressed and not.
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
        name = file.path.removesuffix(".gz").removesuffix(".zst")
        if name in plain:
            raise DataError(f"{file.path} and {plain[name]} are one file in two forms; remove one of them")
        plain[name] = file.path
    return files


def shard_of(path: str, split: str) -> str:
    """Name of the shard that holds a corpus file: the first folder below the split, or "" for a file in it."""
    below = path.removeprefix(f"{split}/")
    return below.split("/")[0] if "/" in below else ""


def read_file(root: str, path: str, *, max_bad_lines: int, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of one file, counting into `counts`.

    Raises:
        DataError: When more lines are bad than `max_bad_lines`, with file and line; or the file is damaged.
    """
    bad = 0
    for number, line in enumerate(_lines(storage.join(root, path))):
        text = _text_of(line)
        if text is None:
            bad += 1
            counts.skip("not JSON with a text")
            if bad > max_bad_lines:
                raise DataError(
                    f"{storage.join(root, path)}, line {number + 1}: not JSON with a text field; "
                    f"{bad} bad lines are more than corpus.max_bad_lines={max_bad_lines}"
                )
        elif not text.strip():
            counts.skip("empty text")
        else:
            counts.documents += 1
            yield Document(f"{path}|{number}", text)


def read_files(root: str, paths: Iterable[str], *, max_bad_lines: int, counts: ReadCounts) -> Iterator[Document]:
    """Stream the documents of several files, in the order given."""
    for path in paths:
        yield from read_file(root, path, max_bad_lines=max_bad_lines, counts=counts)


def _text_of(line: bytes) -> str | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    text = record.get("text") if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _lines(uri: str) -> Iterator[bytes]:
    import zstandard

    with storage.open_read(uri) as raw:
        try:
            yield from _decompressed(raw, uri)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{uri} is cut short or damaged: {error}") from error


def _decompressed(raw: BinaryIO, uri: str) -> Iterable[bytes]:
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
