"""The documents that a clusterer is fitted on: which they are, and what is kept of them besides their vectors.

A sample may be larger than memory. What is kept of a document is its start, on disk, and a few numbers.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from cbtm.cluster.domains import Snippet
from cbtm.cluster.fixed import FixedAssignments
from cbtm.corpus import Document
from cbtm.errors import DataError

CountTokens = Callable[[Sequence[str]], NDArray[np.int64]]
_SNIPPET_CHARACTERS = 600
_BATCH = 1000  # documents whose tokens are counted at once


def reservoir(documents: Iterable[Document], size: int, random_state: int) -> tuple[list[Document], int]:
    """Draw a uniform sample in one pass, with at most `size` documents in memory.

    Returns:
        The sample in reading order, and the number of documents read.
    """
    rng = np.random.default_rng(random_state)
    kept: list[tuple[int, Document]] = []
    index = -1
    for index, document in enumerate(documents):
        if index < size:
            kept.append((index, document))
        elif (slot := int(rng.integers(index + 1))) < size:
            kept[slot] = (index, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])], index + 1


def drawn(documents: Iterable[Document], size: int, total: int, random_state: int) -> Iterator[Document]:
    """Stream a uniform sample of `size` of `total` documents, in reading order (Knuth 1997, algorithm 3.4.2S).

    Raises:
        DataError: At the end, if there are not `total` documents: the corpus is no longer the one that was counted.
    """
    rng = np.random.default_rng(random_state)
    wanted, n_read = size, 0
    for n_read, document in enumerate(documents, start=1):
        if wanted and rng.random() * (total - n_read + 1) < wanted:
            wanted -= 1
            yield document
    if n_read != total:
        raise DataError(f"the corpus changed while it was read: {total} documents at first, then {n_read}; run again")


class FixedClusters:
    """Looks up the fixed assignment of documents; those of one file come one after the other.

    Attributes:
        missing: Documents without an assignment in the last pass.
    """

    def __init__(self, fixed: FixedAssignments) -> None:
        self._fixed, self._path = fixed, ""
        self.missing = 0
        self._of_line: Mapping[int, int] = {}

    def get(self, document: Document) -> int | None:
        """Cluster of a document, None if it has no assignment."""
        path, _, line = document.sp_id.rpartition("|")
        if path != self._path:
            self._path, self._of_line = path, self._fixed.of_file(path)
        return self._of_line.get(int(line))

    def only_with(self, documents: Iterable[Document]) -> "_Reiterable":
        """Those of `documents` that have an assignment; as often as one likes."""
        return _Reiterable(lambda: self._with_cluster(documents))

    def _with_cluster(self, documents: Iterable[Document]) -> Iterator[Document]:
        self.missing = 0
        for document in documents:
            if self.get(document) is not None:
                yield document
            else:
                self.missing += 1


class _Reiterable:
    def __init__(self, make: Callable[[], Iterator[Document]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Document]:
        return self._make()


class Sample:
    """What is kept of the documents of a sample besides their vectors.

    Args:
        folder: Empty folder for what is too large for memory.
        labels: Known domains by sp_id, if there are any.
        count_tokens: Counts the tokens of texts, if clusters are balanced by tokens.
        fixed: Fixed assignments, if there are any.

    Attributes:
        clusters: Fixed cluster of each document, if there are fixed assignments.
        true_labels: Known domain of each document, None where it has none; None if no labels were given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        labels: Mapping[str, str] | None = None,
        count_tokens: CountTokens | None = None,
        fixed: FixedClusters | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._labels, self._count_tokens, self._fixed = labels, count_tokens, fixed
        self.clusters = array("i")
        self._snippets = (folder / "snippets.jsonl").open("w+b")
        self._starts = array("q")
        self._tokens = array("q")
        self.true_labels: list[str | None] | None = None if labels is None else []

    def __len__(self) -> int:
        return len(self._starts)

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """Pass the texts on, and note what is needed later."""
        iterator = iter(documents)
        while batch := list(itertools.islice(iterator, _BATCH if self._count_tokens else 1)):
            if self._count_tokens is not None:
                self._tokens.extend(self._count_tokens([document.text for document in batch]).tolist())
            for document in batch:
                self._note(document)
                yield document.text

    def snippet(self, row: int) -> Snippet:
        """Start of the document of a row."""
        self._snippets.seek(self._starts[row])
        return Snippet(*orjson.loads(self._snippets.readline()))

    @property
    def tokens(self) -> NDArray[np.float64] | None:
        """Tokens of each document, None if they were not counted."""
        return np.array(self._tokens, dtype=np.float64) if self._count_tokens is not None else None

    def _note(self, document: Document) -> None:
        self._starts.append(self._snippets.seek(0, 2))
        start = document.text[:_SNIPPET_CHARACTERS]
        self._snippets.write(orjson.dumps([document.sp_id, start]) + b"\n")
        if self.true_labels is not None and self._labels is not None:
            self.true_labels.append(self._labels.get(document.sp_id))
        if self._fixed is not None and (cluster := self._fixed.get(document)) is not None:
            self.clusters.append(cluster)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._snippets.close()


def dealt(n_rows: int, n_batches: int, random_state: int) -> list[NDArray[np.int64]]:
    """Deal rows into batches of equal size, to within one; each int64, increasing.

    Of every `n_batches` rows each batch gets one, at random: a corpus may take turns between its sources, as well as
    hold one after the other.
    """
    rng = np.random.default_rng(random_state)
    decks = rng.permuted(np.arange(-(-n_rows // n_batches) * n_batches).reshape(-1, n_batches), axis=1)
    return [rows[rows < n_rows] for rows in decks.T]


class RowBatches(Sequence[NDArray[np.float32]]):
    """Batches of the rows of a matrix that may lie on disk, shape (n, d); each is read when it is asked for."""

    def __init__(self, vectors: NDArray[np.float32], rows: Sequence[NDArray[np.int64]]) -> None:
        self._vectors, self._rows = vectors, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return self._vectors[self._rows[number]]
