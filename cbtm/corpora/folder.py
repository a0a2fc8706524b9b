"""Own text as a corpus: a folder of text files, of JSON lines, or of a corpus that lacks a validation split.

A text file is one source, cut into documents; of a .jsonl file each record is a source of its own, since records
are documents already. The first folder below the given one names the kind, for the labels.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import orjson
import zstandard

from cbtm.corpora.build import CorpusSummary, Progress, write_corpus
from cbtm.corpora.documents import CutLimits, RawDocument
from cbtm.errors import ConfigError, DataError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "markdown", "rst", "adoc", "org", "tex", "srt"),
        *("py", "pyi", "pyx", "c", "h", "cc", "cpp", "cxx", "hpp", "cu", "cuh", "java", "kt", "scala", "cs", "go"),
        *("rs", "rb", "php", "pl", "lua", "js", "jsx", "ts", "tsx", "css", "sh", "sql", "r", "jl", "hs", "ml"),
        *("f", "f90", "swift", "yaml", "yml", "toml", "ini", "proto"),
    )
)
"""Suffixes read as UTF-8 text, in any case. Files of other suffixes are left out and counted."""

VALIDATION_NAMES = ("valid", "validation", "val", "test")
UNSORTED_KIND = "text"
CHUNK_BYTES = 2**18


def is_corpus(root: Path) -> bool:
    """Whether a folder has the corpus layout: train/<shard>/<name> with .jsonl, .jsonl.gz or .jsonl.zst."""
    return _has_shards(root / "train")


def find_validation_split(root: Path) -> str | None:
    """Return the path of the validation split below a corpus, such as "valid" or "valid/C8_small"; None without one.

    The names valid, validation, val and test are tried in this order; below each the folder itself, then its
    subfolders by name.
    """
    for name in VALIDATION_NAMES:
        folder = root / name
        if _has_shards(folder):
            return name
        for nested in sorted(folder.iterdir()) if folder.is_dir() else []:
            if _has_shards(nested):
                return f"{name}/{nested.name}"
    return None


def _has_shards(split: Path) -> bool:
    return split.is_dir() and any(
        path.is_file() and _has_suffix(path.name, JSONL_SUFFIXES) for path in split.glob("*/[!.]*")
    )


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def import_folder(
    source: Path,
    root: Path,
    *,
    name: str = "text",
    n_shards: int = 4,
    limits: CutLimits | None = None,
    max_bad_lines: int = 100,
    replace: bool = False,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Make a corpus with a held-out split from a folder of own text.

    Args:
        source: Folder, read with its subfolders; names that begin with a dot are skipped. Text files as in
            `TEXT_SUFFIXES`, JSON lines with a field "text" as in `JSONL_SUFFIXES`. In a corpus without a
            validation split only the train files are read.
        root: The corpus folder to make; if it holds one from the same files and settings, that is returned.
        name: File name of every shard, without suffix.
        n_shards: Number of training shards.
        limits: Sizes of a document; None means 10 to 600 words.
        max_bad_lines: Lines that are not JSON with a text, and files that are not UTF-8, up to which the import goes
            on; they are counted under `dropped`.
        replace: Whether a corpus of other settings at `root` is replaced rather than refused.
        progress: Receives one line per step.

    Returns:
        What the corpus holds.

    Raises:
        DataError: If the folder is missing, empty or without usable text, or has too many bad lines.
        ConfigError: If `source` is a complete corpus already, or `root` holds a corpus of other settings.
        StorageError: If the disk refuses.
    """
    files, dropped = _files_of(source, root)
    reader = _Reader(source, max_bad_lines, dropped)
    try:
        return write_corpus(
            root,
            reader.documents(files),
            name=name,
            settings={"made_by": "import_folder", "files": len(files), "files_sha256": _digest(source, files)},
            n_shards=n_shards,
            limits=limits or CutLimits(min_words=10),
            dropped=dropped,
            replace=replace,
            progress=progress,
        )
    except DataError as error:
        raise DataError(f"cannot make a corpus of {source}: {error}") from error


def _files_of(source: Path, root: Path) -> tuple[list[str], Counter[str]]:
    """Return the files to read, relative to `source` and sorted, and the count of those left out."""
    if not source.is_dir():
        what = "a file, not a folder; give the folder that holds it" if source.exists() else "not there"
        raise DataError(f"{source} is {what}")
    if is_corpus(source) and (split := find_validation_split(source)):
        raise ConfigError(f"{source} is a corpus with the validation split {split} already; use it as it is")
    start = source / "train" if is_corpus(source) else source
    root = root.resolve()
    files, dropped = [], Counter[str]()
    for path in start.rglob("*"):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or root in path.resolve().parents:
            continue
        if _has_suffix(path.name, (*TEXT_SUFFIXES, *JSONL_SUFFIXES)):
            files.append(relative.as_posix())
        else:
            dropped["other_files"] += 1
    if not files:
        raise DataError(
            f"{source} holds no text ({dropped['other_files']} files of other kinds); expected files that end in "
            f"{', '.join(JSONL_SUFFIXES)} or one of {' '.join(TEXT_SUFFIXES)}"
        )
    return sorted(files), dropped


def _digest(source: Path, files: list[str]) -> str:
    """Return the sha256 of all names and contents, so that a changed file is noticed."""
    total = hashlib.sha256()
    for name in files:
        with (source / name).open("rb") as file:
            total.update(json.dumps([name, hashlib.file_digest(file, "sha256").hexdigest()]).encode())
    return total.hexdigest()


@dataclass
class _Reader:
    """Reads files one after the other and keeps count of what cannot be read."""

    source: Path
    max_bad_lines: int
    dropped: Counter[str]
    n_bad: int = field(default=0)

    def documents(self, files: list[str]) -> Iterator[RawDocument]:
        """Yield the text of every file, or of every record of a .jsonl file."""
        in_corpus = is_corpus(self.source)
        for name in files:
            folder, slash, _ = name.partition("/")
            kind = folder if slash and not in_corpus else UNSORTED_KIND
            if _has_suffix(name, JSONL_SUFFIXES):
                for line, text in self._records(name):
                    yield RawDocument(text, kind, f"{name}|{line}")
            else:
                yield RawDocument(self._text(name), kind, name)

    def _text(self, name: str) -> str:
        try:
            return (self.source / name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self._count_bad("files_not_utf8", f"{self.source / name}: {error}")
            return ""

    def _records(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield (0-based line, text); blank lines are skipped."""
        path = self.source / name
        try:
            for line, data in enumerate(_lines(path)):
                if not data.strip():
                    continue
                try:
                    yield line, _text_of(data)
                except ValueError as error:
                    self._count_bad("bad_lines", f"{path} line {line + 1}: {error}")
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} is damaged ({error}); replace or remove it") from error

    def _count_bad(self, reason: str, what: str) -> None:
        self.dropped[reason] += 1
        self.n_bad += 1
        if self.n_bad > self.max_bad_lines:
            raise DataError(
                f"more than max_bad_lines={self.max_bad_lines} lines or files cannot be read, the last is {what}"
            )


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.lower().endswith(".zst"):
        yield from _zstd_lines(path)
        return
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield from cast("IO[bytes]", file)


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of all frames; EOFError if the last is cut short, which zstandard's own reader does not tell."""
    rest, frame, inside = b"", zstandard.ZstdDecompressor().decompressobj(), False
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            while chunk:
                rest += frame.decompress(chunk)
                inside, chunk = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = rest.split(b"\n")
            yield from lines
    if inside:
        raise EOFError("the last frame is cut short")
    if rest:
        yield rest


def _text_of(line: bytes) -> str:
    """Return the text of one JSON line; ValueError says what is wrong with it."""
    record = orjson.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('not a JSON object with a string under "text"')
    return cast("str", record["text"])


@dataclass(frozen=True)
class DemoCorpus:
    """A corpus ready to run on: its folder and its two splits."""

    root: Path
    train_split: str
    validation_split: str


def demo_corpus(source: Path | None, cache: Path, *, progress: Progress | None = None) -> DemoCorpus:
    """Corpus of the demo: a sample of installed packages, or own text, imported below `cache` where it needs it.

    Args:
        source: Folder of own text; None gathers the sample. A folder in corpus layout with a validation split is
            used where it lies; anything else is imported with a held-out split.
        cache: Folder for what is gathered or imported; what is there already is used again.
        progress: Receives lines about the work.

    Raises:
        DataError: If the folder is missing or holds no text.
    """
    from cbtm.corpora.sample import gather_sample

    if source is None:
        return DemoCorpus(gather_sample(cache / "sample", progress=progress).root, "train", "valid")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; CORPUS takes a folder of text files or a corpus")
    if is_corpus(source) and (split := find_validation_split(source)):
        return DemoCorpus(source, "train", split)
    # The source's own path is part of the name, so that two folders called "text" do not share an import.
    name = f"{source.resolve().name}-{zlib.crc32(str(source.resolve()).encode()):08x}"
    return DemoCorpus(import_folder(source, cache / name, replace=True, progress=progress).root, "train", "valid")
