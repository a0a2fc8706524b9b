"""Reading a corpus: `<root>/<split>/<shard>/<name>.jsonl[.gz|.zst]`, one `{"text": str, "id": …}` a line.

A document is known by its `sp_id`, "<path relative to the corpus root>|<line>", so that a corpus may be moved.
Files come in sorted order and lines in file order: every stage sees the same documents in the same order.
"""

import gzip
import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import orjson
from pydantic import Field

from cbtm import storage
from cbtm.config import Config
from cbtm.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class CorpusConfig(Config):
    """Where the text lies.

    Attributes:
        root: Folder or s3:// prefix of the corpus.
        train_split: Path of the training split below the root.
        validation_split: Path of the validation split below the root, such as valid/C8_small.
        max_bad_lines: Lines per file that may be unreadable (no JSON, no text); they are counted and skipped.
    """

    root: str
    train_split: str = "train"
    validation_split: str = "valid"
    max_bad_lines: int = Field(default=10, ge=0)


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
        DataError: If the split has no file that could hold documents.
    """
    files = [
        storage.StoredFile(f"{split}/{file.path}", file.size, file.version)
        for file in storage.list_files(storage.join(root, split))
        if file.path.endswith(SUFFIXES) and not any(part.startswith(".") for part in file.path.split("/"))
    ]
    if not files:
        raise DataError(
            f"no corpus files below {storage.join(root, split)}; expected <shard>/<name> with one of the suffixes "
            f"{', '.join(SUFFIXES)} (a folder of other text: cbtm corpus import FOLDER)"
        )
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
        except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(f"{uri} is cut short or damaged: {error}") from error


def _decompressed(raw: BinaryIO, uri: str) -> Iterable[bytes]:
    import zstandard

    if uri.endswith(".gz"):
        return gzip.open(raw)
    if uri.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw
