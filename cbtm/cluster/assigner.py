"""The assigner stage: every document of a shard group to its cluster, as id lines and as token shards.

Assignment is greedy, to the nearest centre, as in the paper. For the control experiment the same pass also deals
the training documents to random clusters: a stored partition, drawn once from a seed, equal in size to within one
document in every file.
"""

import contextlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field

from cbtm.cluster.clusterer import Clusterer
from cbtm.config import Config
from cbtm.corpus import CorpusConfig, Document, ReadCounts, read_file
from cbtm.errors import DataError
from cbtm.plan import ShardGroup
from cbtm.tokens import DocumentRecord, Encoder, TokenShardWriter

LEARNED, RANDOM = "learned", "random"
_BATCH = 1000  # documents embedded and tokenised at once


class AssignConfig(Config):
    """How documents are assigned.

    Attributes:
        max_groups: Most shard groups of one split, each a task of its own.
        random_clusters: Also deal the training documents to random clusters, for the control experiment.
        random_state: Seed of the random clusters.
    """

    max_groups: int = Field(default=16, ge=1)
    random_clusters: bool = True
    random_state: int = Field(default=0, ge=0)


def assignment_path(corpus_path: str) -> str:
    """Path of the assignment lines of one corpus file: same place, plain .jsonl."""
    stem = corpus_path.removesuffix(".gz").removesuffix(".zst")
    return f"assignments/{stem}"


def token_shard(partition: str, split: str, cluster: int, group: str) -> tuple[str, str]:
    """Folder and stem of one token shard, below the run's root."""
    return f"tokens/{partition}/{split}/cluster-{cluster:05d}", group


def assign_group(
    config: AssignConfig,
    corpus: CorpusConfig,
    group: ShardGroup,
    clusterer: Clusterer,
    tokenizer: Encoder,
    folder: Path,
) -> dict[str, Any]:
    """Assign one shard group and write its lines and token shards below `folder`.

    Returns:
        Accounting: documents read, skipped by reason, and for each partition the documents, tokens and bytes of
        every cluster.

    Raises:
        DataError: If the group holds no document, or too many unreadable lines.
    """
    partitions = [LEARNED]
    if config.random_clusters and group.part == "train":
        partitions.append(RANDOM)
    counts = ReadCounts()
    with contextlib.ExitStack() as stack:
        writers = {
            (partition, cluster): stack.enter_context(_writer(folder, partition, group, cluster, tokenizer))
            for partition in partitions
            for cluster in range(clusterer.n_clusters)
        }
        for path in group.paths:
            dealer = _deal(config.random_state, path, clusterer.n_clusters)
            lines = folder / assignment_path(path)
            lines.parent.mkdir(parents=True, exist_ok=True)
            with lines.open("wb") as out:
                documents = read_file(corpus.root, path, max_bad_lines=corpus.max_bad_lines, counts=counts)
                for batch in _batches(documents):
                    labels = clusterer.predict([document.text for document in batch])
                    tokens = tokenizer.encode_batch([document.text for document in batch])
                    for document, label, row in zip(batch, labels.tolist(), tokens, strict=True):
                        out.write(orjson.dumps({"sp_id": document.sp_id, "cluster": label}) + b"\n")
                        record = DocumentRecord(document.sp_id, len(document.text.encode()))
                        writers[LEARNED, label].add(record, row)
                        if RANDOM in partitions:
                            writers[RANDOM, next(dealer)].add(record, row)
        clusters = {
            partition: [writers[partition, cluster].counts for cluster in range(clusterer.n_clusters)]
            for partition in partitions
        }
    if counts.documents == 0:
        raise DataError(f"the files of shard group {group.name} hold no document: {', '.join(group.paths)}")
    return {"documents": counts.documents, "skipped": counts.skipped, "clusters": clusters}


def _writer(folder: Path, partition: str, group: ShardGroup, cluster: int, tokenizer: Encoder) -> TokenShardWriter:
    below, stem = token_shard(partition, group.split, cluster, group.name)
    return TokenShardWriter(folder / below, stem, vocab_size=tokenizer.vocab_size)


def _deal(random_state: int, path: str, n_clusters: int) -> Iterator[int]:
    """Endless clusters for the documents of one file: each run of k documents gets every cluster once."""
    rng: np.random.Generator = np.random.default_rng([random_state, zlib.crc32(path.encode())])
    while True:
        deck: NDArray[np.int64] = rng.permutation(n_clusters)
        yield from deck.tolist()


def _batches(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    while batch := list(itertools.islice(documents, _BATCH)):
        yield batch
