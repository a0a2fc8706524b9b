"""The assigner stage: every document of a shard group to its cluster, as id lines and as token shards.

Two steps. First each corpus file becomes a *part*: its documents in reading order, tokenised, with their clusters.
Files are independent, so several processes share them, and one that is finished stays finished: an assigner that is
killed goes on at the next file. Then the parts of training documents are dealt out to one token shard for each
cluster. Held-out documents stay together in the order of the corpus, with their clusters beside them: they are the same
documents, in the same halves, under every clusterer. Neither step holds more than a batch of documents in memory.

For the control experiment the same pass also deals the training documents to random clusters: a stored partition,
drawn once from a seed, equal in size to within one document in every file.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field

from cbtm import storage
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.extension import OneCluster
from cbtm.cluster.fixed import NO_ASSIGNMENT, FixedAssignments
from cbtm.cluster.labelling import Labeller, Method
from cbtm.config import Config
from cbtm.corpus import CorpusConfig, Document, ReadCounts, plain_name, read_file
from cbtm.errors import CbtmError, DataError
from cbtm.plan import PlannedFile, ShardGroup
from cbtm.process import end_with_parent
from cbtm.progress import Progress, progress
from cbtm.tokens import DocumentRecord, Encoder, TokenDocuments, TokenShardWriter

LEARNED, RANDOM = "learned", "random"
CLUSTERS = ".clusters.npy"
"""Ending of the file with the clusters of held-out documents, int32 (n_documents,), beside their token shard."""
Tools = Callable[[], tuple[Clusterer, Encoder]]

_PART, _CLUSTERS, _COUNTS = "part", "clusters.i4", "counts.json"
_PART_FORMAT = 2  # with prompts
_OPEN_SHARDS = 200  # token shards written at once: three open files each, four where there are prompts


class AssignConfig(Config):
    """How documents are assigned.

    Attributes:
        max_groups: Most shard groups of one split, each a task of its own.
        processes: Processes that share the files of a group. One process tokenises on all cores already; several
            pay off on many cores and many files.
        method: nearest gives each document the nearest centre, as in the paper. balanced-documents and
            balanced-tokens give each cluster equally much of every few thousand training documents.
        random_clusters: Also deal the training documents to random clusters, for the control experiment.
        random_state: Seed of the random clusters.
    """

    max_groups: int = Field(default=16, ge=1)
    processes: int = Field(default=1, ge=1)
    method: Method = "nearest"
    random_clusters: bool = True
    random_state: int = Field(default=0, ge=0)


HELD_OUT_FORMAT = 2  # in the order of the corpus; before, they lay by cluster


def assignment_path(corpus_path: str) -> str:
    """Path of the assignment lines of one corpus file: same place, plain .jsonl."""
    return f"assignments/{plain_name(corpus_path)}"


def token_shard(partition: str, split: str, cluster: int, group: str) -> tuple[str, str]:
    """Folder and stem of one token shard, below the run's root."""
    return f"tokens/{partition}/{split}/cluster-{cluster:05d}", group


def held_out_shard(split: str, group: str) -> tuple[str, str]:
    """Folder and stem of the token shard of one group of held-out documents, below the run's root."""
    return f"tokens/held-out/{split}", group


def held_out_counts(
    documents: TokenDocuments, clusters: NDArray[np.int32], n_clusters: int
) -> dict[str, list[dict[str, int]]]:
    """Documents, tokens and bytes of every cluster among held-out documents, as the accounting of `assign_group`."""
    sizes = np.array([record.n_bytes for record in documents.records()], dtype=np.int64)
    columns = {
        "documents": np.bincount(clusters, minlength=n_clusters),
        "tokens": np.bincount(clusters, weights=documents.lengths(), minlength=n_clusters),
        "bytes": np.bincount(clusters, weights=sizes, minlength=n_clusters),
    }
    rows = zip(*(values.astype(np.int64).tolist() for values in columns.values()), strict=True)
    return {LEARNED: [dict(zip(columns, row, strict=True)) for row in rows]}


def assign_group(
    config: AssignConfig,
    corpus: CorpusConfig,
    group: ShardGroup,
    tools: Tools,
    folder: Path,
    *,
    scratch: Path,
    fixed: FixedAssignments | OneCluster | None = None,
) -> dict[str, Any]:
    """Assign one shard group and write its lines and token shards below `folder`.

    Args:
        config: Settings.
        corpus: Where the text lies.
        group: The files to assign.
        tools: Opens the clusterer and the tokenizer; to be pickled where there are several processes.
        folder: Folder to write.
        scratch: Folder for the parts. What is there already from a killed run of the same work is not done again.
        fixed: Given clusters of the training documents, or the one that all of them have.

    Returns:
        Accounting: documents read, skipped by reason, documents without a known word, and for each partition the
        documents, tokens and bytes of every cluster.

    Raises:
        DataError: If the group holds no document, or too many unreadable lines.
    """
    work = _Work(config, corpus, group, folder, scratch, fixed if group.part == "train" else None)
    todo = [number for number in range(len(group.files)) if work.counts(number) is None]
    done = len(group.files) - len(todo)
    with progress(f"assign:{group.name}", "files") as shown:
        if len(todo) > 1 and config.processes > 1:
            _share(work, tools, todo, shown, done)
        elif todo:
            assigner = _FileAssigner(work, *tools())
            for number in todo:
                shown.update(done, len(group.files))
                assigner.assign(number)
                done += 1
    found = [part for number in range(len(group.files)) if (part := work.counts(number)) is not None]
    counts = ReadCounts()
    for part in found:
        counts.add(ReadCounts(part["documents"], part["skipped"]))
    if counts.documents == 0:
        raise DataError(
            f"the files of shard group {group.name} hold no document{_reasons(counts)}: {', '.join(group.paths)}"
        )
    return {
        "documents": counts.documents,
        "skipped": counts.skipped,
        "without_words": sum(part["without_words"] for part in found),
        "clusters": (work.deal if group.part == "train" else work.join)(found[0]["n_clusters"], found[0]["vocab_size"]),
    }


@dataclass(frozen=True)
class _Work:
    """One group to assign; small, so that every process can have it."""

    config: AssignConfig
    corpus: CorpusConfig
    group: ShardGroup
    folder: Path
    scratch: Path
    fixed: FixedAssignments | OneCluster | None

    @property
    def partitions(self) -> list[str]:
        with_random = self.config.random_clusters and self.group.part == "train"
        return [LEARNED, RANDOM] if with_random else [LEARNED]

    def part(self, number: int) -> Path:
        return self.scratch / f"{number:05d}"

    def counts(self, number: int) -> dict[str, Any] | None:
        """What a finished part says of itself, None if it is not finished."""
        path, file = self.part(number) / _COUNTS, self.group.files[number]
        # A stage that was killed while it published has moved some of the lines away.
        if not path.is_file() or not (self.folder / assignment_path(file.path)).is_file():
            return None
        counts: dict[str, Any] = json.loads(path.read_text())
        return counts if counts.get("format") == _PART_FORMAT and counts["file"] == _identity(file) else None

    def deal(self, n_clusters: int, vocab_size: int) -> dict[str, list[dict[str, int]]]:
        """Write the token shards of all clusters, as many at once as files may be open."""
        keys = [(partition, cluster) for partition in self.partitions for cluster in range(n_clusters)]
        counts: dict[str, list[dict[str, int]]] = {partition: [] for partition in self.partitions}
        for start in range(0, len(keys), _OPEN_SHARDS):
            some = keys[start : start + _OPEN_SHARDS]
            with contextlib.ExitStack() as stack:
                writers = {key: stack.enter_context(self._writer(*key, vocab_size)) for key in some}
                for number in range(len(self.group.files)):
                    self._deal_part(number, writers)
            for partition, cluster in some:
                counts[partition].append(writers[partition, cluster].counts)
        return counts

    def join(self, n_clusters: int, vocab_size: int) -> dict[str, list[dict[str, int]]]:
        """Write the token shard of held-out documents, in the order of the corpus, and their clusters."""
        below, stem = held_out_shard(self.group.split, self.group.name)
        found: list[int] = []
        with TokenShardWriter(self.folder / below, stem, vocab_size=vocab_size) as writer:
            for number in range(len(self.group.files)):
                for record, tokens, prompt, row in self._documents(number):
                    writer.add(record, tokens, prompt)
                    found.append(int(row[0]))
        clusters = np.array(found, dtype=np.int32)
        np.save(self.folder / below / f"{stem}{CLUSTERS}", clusters)
        return held_out_counts(TokenDocuments([(self.folder / below, stem)]), clusters, n_clusters)

    def _deal_part(self, number: int, writers: Mapping[tuple[str, int], TokenShardWriter]) -> None:
        for record, tokens, prompt, row in self._documents(number):
            for key in zip(self.partitions, row.tolist(), strict=True):
                if (writer := writers.get(key)) is not None:
                    writer.add(record, tokens, prompt)

    def _documents(
        self, number: int
    ) -> Iterator[tuple[DocumentRecord, NDArray[np.integer[Any]], int, NDArray[np.int32]]]:
        """Documents of one part, each with its tokens, those of its prompt, and its cluster in each partition."""
        part = TokenDocuments([(self.part(number), _PART)])
        if part.n_documents == 0:
            return
        clusters = np.memmap(self.part(number) / _CLUSTERS, dtype=np.int32, mode="r")
        rows = clusters.reshape(part.n_documents, len(self.partitions))
        yield from zip(part.records(), part.documents(), part.prompts(), rows, strict=True)

    def _writer(self, partition: str, cluster: int, vocab_size: int) -> TokenShardWriter:
        below, stem = token_shard(partition, self.group.split, cluster, self.group.name)
        return TokenShardWriter(self.folder / below, stem, vocab_size=vocab_size)


class _FileAssigner:
    """Makes parts, in one process."""

    def __init__(self, work: _Work, clusterer: Clusterer, encoder: Encoder) -> None:
        self._work, self._clusterer, self._encoder = work, clusterer, encoder

    def assign(self, number: int) -> None:
        """Make the part of one corpus file; `counts.json` is written last."""
        work, file = self._work, self._work.group.files[number]
        part, lines = work.part(number), work.folder / assignment_path(file.path)
        for folder in (part, lines.parent):
            folder.mkdir(parents=True, exist_ok=True)
        method = work.config.method if work.group.part == "train" else "nearest"
        labeller, counts = Labeller(self._clusterer, method), ReadCounts()
        dealer = _deal(work.config.random_state, file.path, self._clusterer.n_clusters)
        with (
            TokenShardWriter(part, _PART, vocab_size=self._encoder.vocab_size) as writer,
            (part / _CLUSTERS).open("wb") as clusters,
            lines.open("wb") as out,
        ):
            for batch, labels, tokens, prompts in self._batches(file.path, labeller, counts):
                out.write(b"".join(assignment_line(*pair) for pair in zip(batch, labels.tolist(), strict=True)))
                columns = [labels]
                if RANDOM in work.partitions:
                    columns.append(np.fromiter(dealer, dtype=np.int32, count=len(batch)))
                clusters.write(np.stack(columns, axis=1).astype(np.int32).tobytes())
                for document, row, prompt in zip(batch, tokens, prompts, strict=True):
                    writer.add(DocumentRecord(document.sp_id, len(document.text.encode())), row, prompt)
        content = {
            "format": _PART_FORMAT,
            "file": _identity(file),
            "documents": counts.documents,
            "skipped": counts.skipped,
            "without_words": labeller.without_words,
            "n_clusters": self._clusterer.n_clusters,
            "vocab_size": self._encoder.vocab_size,
        }
        storage.write_bytes(str(part / _COUNTS), json.dumps(content).encode())

    def _batches(
        self, path: str, labeller: Labeller, counts: ReadCounts
    ) -> Iterator[tuple[list[Document], NDArray[np.int32], list[NDArray[np.int64]], list[int]]]:
        """Documents of one file with their clusters, tokens and tokens of their prompts."""
        corpus, fixed = self._work.corpus, self._work.fixed
        documents = read_file(corpus.root, path, max_bad_lines=corpus.max_bad_lines, counts=counts)
        given = fixed.of_file(path) if fixed is not None else None
        if given is not None:
            documents = _assigned(documents, given, counts)
        while batch := list(itertools.islice(documents, labeller.batch)):
            texts = [document.text for document in batch]
            tokens = self._encoder.encode_batch(texts)
            prompts = [document.prompt for document in batch]
            if any(prompts):
                prompts = self._encoder.prompt_tokens(texts, prompts)
            if given is not None:
                labels = np.array([given[_number(document)] for document in batch], dtype=np.int32)
            else:
                labels = labeller.label(texts, np.array([len(row) for row in tokens]))
            yield batch, labels, tokens, prompts


def _share(work: _Work, tools: Tools, todo: list[int], shown: Progress, done: int) -> None:
    """Assign files in several processes. After an error those under way are finished, and the others left."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with OpenMP threads hangs
    n_processes = min(work.config.processes, len(todo))
    with ProcessPoolExecutor(n_processes, context, initializer=_begin, initargs=(work, tools)) as pool:
        futures = [pool.submit(_assign, number) for number in todo]
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                shown.update(done, len(work.group.files))
        except BrokenProcessPool as error:
            raise CbtmError(
                "a process of the assigner was ended by the system, most often for want of memory; lower "
                f"assign.processes={work.config.processes}, and the same command goes on at the next file"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_open_assigner: Callable[[], _FileAssigner]  # of a process of the pool


def _begin(work: _Work, tools: Tools) -> None:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threadpool_limits(limits=1)
    global _open_assigner
    # Opened with the first file: an error here would reach the other process as a broken pool.
    _open_assigner = cache(lambda: _FileAssigner(work, *tools()))


def _assign(number: int) -> None:
    _open_assigner().assign(number)


def _identity(file: PlannedFile) -> list[str]:
    return [file.path, file.digest]


def assignment_line(document: Document, cluster: int) -> bytes:
    """One line of an assignment file."""
    return orjson.dumps({"sp_id": document.sp_id, "cluster": cluster}) + b"\n"


def _number(document: Document) -> int:
    return int(document.sp_id.rpartition("|")[2])


def _assigned(documents: Iterator[Document], given: Mapping[int, int], counts: ReadCounts) -> Iterator[Document]:
    for document in documents:
        if _number(document) in given:
            yield document
        else:
            counts.documents -= 1
            counts.skip(NO_ASSIGNMENT)


def _reasons(counts: ReadCounts) -> str:
    return f" ({', '.join(f'{n} x {reason}' for reason, n in counts.skipped.items())})" if counts.skipped else ""


def _deal(random_state: int, path: str, n_clusters: int) -> Iterator[int]:
    """Endless clusters for the documents of one file: each run of k documents gets every cluster once."""
    rng: np.random.Generator = np.random.default_rng([random_state, zlib.crc32(path.encode())])
    while True:
        deck: NDArray[np.int64] = rng.permutation(n_clusters)
        yield from deck.tolist()
