"""From raw texts to a corpus on disk: drop repeats, hold out, shard, write. Shared by the sample and by own text.

- A document that was seen, or nearly (see `cbtm.corpora.documents`), goes. One filter serves all kinds and both
  splits, so a near-copy of a training document cannot sit in the validation split either.
- Held out are whole *sources* (a file, a service, a record), never pieces of one on both sides. Only where a kind has
  too few sources for that is the tail of its largest one held out, as one block; corpus.json names it.
- Every choice (which documents under a cap, which sources, which shard) is by hash, so the output is the same to the
  byte for the same input, whatever the order of the file system. There is no date in it.
- Files are written to a folder beside the final one, corpus.json last, and the folder is renamed: a killed run leaves
  nothing at the final path.

Texts wait in a spool file, not in memory.
"""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cbtm.corpora.documents import (
    CutLimits,
    RawDocument,
    SeenShingles,
    clean_text,
    cut_text,
    text_digest,
)
from cbtm.errors import CbtmError, ConfigError, DataError, ManifestError, StorageError

FORMAT = 1
CARD_NAME = "corpus.json"
VALID_FRACTION = 0.06
VALID_MIN = 400  # below this the perplexity of one kind rests on a few dozen documents
VALID_MAX = 1000
VALID_LARGEST_PART = 0.2  # a small corpus gives up at most this part, even below VALID_MIN
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds.

    Attributes:
        root: The corpus folder.
        name: File name of its shards, without suffix.
        documents: Number of documents by split, then by kind.
        n_bytes: Bytes of text (UTF-8) by split, then by kind.
        dropped: Documents left out, by reason.
        reused: Whether the corpus was there already and nothing was written.
    """

    root: Path
    name: str
    documents: dict[str, dict[str, int]]
    n_bytes: dict[str, dict[str, int]]
    dropped: dict[str, int]
    reused: bool = False

    @property
    def n_train(self) -> int:
        """Number of training documents."""
        return sum(self.documents["train"].values())

    @property
    def n_valid(self) -> int:
        """Number of held-out documents."""
        return sum(self.documents["valid"].values())


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a document waits in the spool."""

    digest: str
    kind: str
    source: str
    offset: int
    length: int


def write_corpus(
    root: Path,
    documents: Iterable[RawDocument],
    *,
    name: str,
    settings: Mapping[str, Any],
    n_shards: int = 4,
    limits: CutLimits | None = None,
    max_per_kind: int | None = None,
    packages: Mapping[str, str] | None = None,
    dropped: Counter[str] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Write a corpus of training shards, a held-out split and labels, all at once or not at all.

    Args:
        root: The corpus folder to make. If it holds a corpus of the same settings, that one is returned and
            `documents` is not touched.
        documents: Texts in an order that does not depend on the machine.
        name: File name of every shard, without suffix.
        settings: What the caller chose, JSON values; compared with those of an existing corpus.
        n_shards: Number of training shards; their sizes differ by at most one document.
        limits: Sizes of a document; None means the defaults.
        max_per_kind: Most documents of one kind, chosen by hash; None means all.
        packages: Name and version of what the texts were taken from, for the record; not compared.
        dropped: What the reading of `documents` leaves out, by reason; counted on while it is consumed.
        replace: Whether a corpus of other settings at `root` is replaced rather than refused.
        progress: Receives one line per step.

    Returns:
        What the corpus holds.

    Raises:
        ConfigError: If `root` holds a corpus of other settings, or `n_shards` is below 1.
        DataError: If `root` holds something else, or the documents are too few.
        StorageError: If the disk refuses.
    """
    limits = limits or CutLimits()
    if n_shards < 1:
        raise ConfigError(f"n_shards={n_shards} is below 1; a corpus needs at least one shard")
    full_settings = {**settings, **asdict(limits), "n_shards": n_shards, "max_per_kind": max_per_kind}
    existing = _existing(root, name, full_settings, replace=replace)
    if existing is not None:
        return existing
    try:
        with _folder_beside(root) as partial:
            report, counter = progress or (lambda _: None), Counter() if dropped is None else dropped
            card = _Builder(partial, name, n_shards, limits, max_per_kind, report, counter).build(documents)
            card |= {"settings": full_settings, "packages": dict(sorted((packages or {}).items()))}
            text = json.dumps(card, indent=2, sort_keys=True) + "\n"
            (partial / CARD_NAME).write_text(text, encoding="utf-8")
            return _publish(partial, root, card, replace=replace)
    except CbtmError:
        raise
    except OSError as error:
        raise StorageError(f"could not make the corpus {root}: {error}; check space and permissions") from error


@dataclass
class _Builder:
    """The steps of one corpus, in the folder that is later renamed."""

    folder: Path
    name: str
    n_shards: int
    limits: CutLimits
    max_per_kind: int | None
    progress: Progress
    dropped: Counter[str]

    def build(self, documents: Iterable[RawDocument]) -> dict[str, Any]:
        """Write shards and labels; return the card, less settings and packages."""
        spool_path = self.folder / "spool"
        with spool_path.open("w+b") as spool:
            entries = self._spool(documents, spool)
            chosen = self._choose(entries, spool)
            self.progress(f"{len(chosen)} documents kept, dropped: {dict(self.dropped)}")
            if len(chosen) < 2 * (self.n_shards + 1):
                raise DataError(
                    f"{len(chosen)} usable documents are too few for {self.n_shards} shards and a held-out split "
                    f"(at least {2 * (self.n_shards + 1)}); dropped: {dict(self.dropped)}. Give more text, "
                    f"or lower min_words={self.limits.min_words}"
                )
            valid, tails = _hold_out(chosen)
            if not valid:
                raise DataError(
                    f"nothing can be held out of {len(chosen)} documents from {len({e.source for e in chosen})} "
                    "source(s); give more files or longer ones"
                )
            splits = {"train": [e for e in chosen if e not in valid], "valid": [e for e in chosen if e in valid]}
            files = [record for split in splits for record in self._write_split(split, splits[split], spool)]
        spool_path.unlink()
        return {
            "format": FORMAT,
            "name": self.name,
            "documents": {s: dict(sorted(Counter(e.kind for e in es).items())) for s, es in splits.items()},
            "bytes": {s: _bytes_by_kind(es) for s, es in splits.items()},
            "dropped": dict(sorted(self.dropped.items())),
            "held_out_tails": tails,
            "files": files,
        }

    def _spool(self, documents: Iterable[RawDocument], spool: IO[bytes]) -> list[_Entry]:
        """Clean and cut every text and drop short and repeated pieces; the rest waits in the spool."""
        entries: list[_Entry] = []
        digests: set[str] = set()
        for document in documents:
            for text in cut_text(clean_text(document.text), self.limits):
                if len(text.split()) < self.limits.min_words:
                    self.dropped["too_short"] += 1
                    continue
                digest = text_digest(text)
                if digest in digests:
                    self.dropped["duplicate"] += 1
                    continue
                digests.add(digest)
                data = text.encode()
                entry = _Entry(digest, document.kind, document.source, spool.tell(), len(data))
                spool.write(data)
                entries.append(entry)
        return entries

    def _choose(self, entries: list[_Entry], spool: IO[bytes]) -> list[_Entry]:
        """Drop near-duplicates and cap each kind; return the rest in hash order."""
        by_kind: defaultdict[str, list[_Entry]] = defaultdict(list)
        for entry in entries:
            by_kind[entry.kind].append(entry)
        shingles = SeenShingles()
        chosen: list[_Entry] = []
        for kind in sorted(by_kind):
            kept = 0
            for position, entry in enumerate(sorted(by_kind[kind], key=lambda e: e.digest)):
                if kept == self.max_per_kind:
                    self.dropped["over_max_per_kind"] += len(by_kind[kind]) - position
                    break
                if shingles.is_new(_read(spool, entry)):
                    chosen.append(entry)
                    kept += 1
                else:
                    self.dropped["near_duplicate"] += 1
            self.progress(f"{kind}: {kept} of {len(by_kind[kind])} documents")
        return sorted(chosen, key=lambda e: e.digest)

    def _write_split(self, split: str, entries: list[_Entry], spool: IO[bytes]) -> Iterator[dict[str, Any]]:
        """Write the shards of a split and their labels; yield path, bytes and sha256 of each."""
        n_shards = self.n_shards if split == "train" else 1
        for shard in range(n_shards):
            members = entries[shard * len(entries) // n_shards : (shard + 1) * len(entries) // n_shards]
            path = f"{split}/{shard:05d}/{self.name}.jsonl"
            texts = ({"text": _read(spool, e), "id": e.digest[:16]} for e in members)
            labels = ({"sp_id": f"{path}|{line}", "domain": e.kind} for line, e in enumerate(members))
            yield _write_lines(self.folder, path, texts)
            yield _write_lines(self.folder, f"labels/{path}", labels)


def _hold_out(entries: list[_Entry]) -> tuple[set[_Entry], list[str]]:
    """Choose the validation documents: whole sources in hash order, each kind in proportion.

    Returns:
        The held-out entries, and the sources of which only the tail is held out because the kind has too few.
    """
    target = min(max(VALID_FRACTION * len(entries), VALID_MIN), VALID_MAX, VALID_LARGEST_PART * len(entries))
    sizes = Counter(e.kind for e in entries)
    wanted = {kind: min(max(1, int(target * n / len(entries))), n // 2) for kind, n in sizes.items()}
    sources: defaultdict[str, list[_Entry]] = defaultdict(list)
    for entry in entries:
        sources[entry.source].append(entry)
    held: set[_Entry] = set()
    count: Counter[str] = Counter()
    for source in sorted(sources, key=lambda s: hashlib.sha256(s.encode()).digest()):
        parts = Counter(e.kind for e in sources[source])
        if all(count[kind] + n <= wanted[kind] for kind, n in parts.items()):
            held.update(sources[source])
            count.update(parts)
    tails: list[str] = []
    for kind in sorted(sizes):
        missing = wanted[kind] - count[kind]
        if 2 * missing > wanted[kind]:
            source, tail = _tail([e for e in entries if e.kind == kind and e not in held], missing)
            held.update(tail)
            tails.extend([source] if tail else [])
    return held, tails


def _tail(entries: list[_Entry], n: int) -> tuple[str, list[_Entry]]:
    """Return the source with most entries and its last `n` of them, at most a quarter."""
    counts = Counter(e.source for e in entries)
    largest = min(counts, key=lambda source: (-counts[source], source))
    members = sorted((e for e in entries if e.source == largest), key=lambda e: e.offset)
    return largest, members[len(members) - min(n, len(members) // 4) :]


def _read(spool: IO[bytes], entry: _Entry) -> str:
    spool.seek(entry.offset)
    return spool.read(entry.length).decode()


def _bytes_by_kind(entries: list[_Entry]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.kind] += entry.length
    return dict(sorted(sizes.items()))


def _write_lines(folder: Path, path: str, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with target.open("wb") as file:
        for record in records:
            line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            file.write(line)
            digest.update(line)
            size += len(line)
    return {"path": path, "bytes": size, "sha256": digest.hexdigest()}


def _existing(root: Path, name: str, settings: Mapping[str, Any], *, replace: bool) -> CorpusSummary | None:
    """Return the corpus at `root` if it is the one asked for; None if there is room for a new one."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    card_path = root / CARD_NAME
    if not card_path.is_file():
        raise DataError(f"{root} is not empty and holds no {CARD_NAME}; choose another folder for the corpus")
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
        summary = _summary(root, card, reused=True)
        found = {"name": card["name"], **card["settings"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{card_path} cannot be read ({error}); remove {root} and build it again") from error
    asked = json.loads(json.dumps({"name": name, **settings}))
    if found != asked or card["format"] != FORMAT:
        if replace:
            return None
        keys = sorted(k for k in found.keys() | asked.keys() if found.get(k) != asked.get(k))
        differences = ", ".join(f"{k}: {found.get(k)!r} there, {asked.get(k)!r} asked" for k in keys)
        raise ConfigError(
            f"{root} holds a corpus of other settings ({differences or 'format'}); "
            "remove it, choose another folder, or ask to replace it"
        )
    for record in card["files"]:
        path = root / record["path"]
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            raise ManifestError(
                f"{path} is missing or not {record['bytes']} bytes long as {CARD_NAME} says; "
                f"remove {root} and build it again"
            )
    return summary


def _summary(root: Path, card: Mapping[str, Any], *, reused: bool) -> CorpusSummary:
    return CorpusSummary(root, card["name"], card["documents"], card["bytes"], card["dropped"], reused)


@contextmanager
def _folder_beside(root: Path) -> Iterator[Path]:
    """A new folder beside `root`, removed at the end if it is still there; those of killed processes are removed."""
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{root.name}.partial-{socket.gethostname()}-"
    for folder in sorted(root.parent.glob(f"{glob.escape(prefix)}*")):
        pid = folder.name.removeprefix(prefix)
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
    partial = root.parent / f"{prefix}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(partial: Path, root: Path, card: Mapping[str, Any], *, replace: bool) -> CorpusSummary:
    """Rename the finished folder to its final place; if another process was first, take its corpus."""
    if replace and (root / CARD_NAME).is_file():
        (root / CARD_NAME).unlink()  # what is half removed must not pass for a corpus
        shutil.rmtree(root)
    try:
        partial.rename(root)
    except OSError:
        existing = _existing(root, card["name"], card["settings"], replace=False)
        if existing is None:
            raise
        return existing
    return _summary(root, card, reused=False)
