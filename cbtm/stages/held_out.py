"""The held-out documents of a run as its scores and its evaluation see them.

Which documents, and which tokens of each, is decided here once: by score.max_documents, score.separator and
score.max_tokens. Text is read only where something is routed.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.labels import read_labels
from cbtm.corpus import Document
from cbtm.errors import DataError, ManifestError
from cbtm.merge.router import PrefixRouter
from cbtm.merge.scorer import scored_rows
from cbtm.merge.validation_set import (
    ValidationSet,
    context_distances,
    evenly_spaced,
    selection_documents,
    token_starts,
)
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.tokens import DocumentRecord

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents without their text.

    Attributes:
        rows: Token ids of each document, the first given, the others scored.
        clusters: Nearest cluster of each, shape (n_documents,).
        records: Identity and size of each.
        counted: Which scored tokens of each count; None counts all.
        first: Which token of its document a row begins with: 0 is the separator, 1 the first of the text.
        choosing: Which documents settings are chosen on, shape (n_documents,); the others are reported on.
    """

    rows: list[NDArray[np.int64]]
    clusters: NDArray[np.int64]
    records: list[DocumentRecord]
    counted: list[NDArray[np.bool_]] | None
    first: int
    choosing: NDArray[np.bool_]


def held_out(run: Run, scratch: Path) -> HeldOut:
    """Bring the token shards of the held-out documents to this machine, and cut them as the settings say.

    Documents of which nothing is left that counts are left out, and counted in the log.

    Raises:
        DataError: If nothing is left to score.
    """
    config = run.config.score
    documents, clusters = run.validation_documents(scratch)
    first = 0 if config.separator else 1
    places = evenly_spaced(documents.n_documents, config.max_documents)
    rows = scored_rows(_take(documents.documents(), places), config)
    marks = _take(documents.learned_targets(), places)
    counted = [mark[first : first + len(row) - 1] for mark, row in zip(marks, rows, strict=True)]
    kept = [place for place, mark in enumerate(counted) if mark.any()]
    if not kept:
        raise DataError(
            f"none of {len(rows)} held-out documents has a token to score with score.separator={config.separator} and "
            f"score.max_tokens={config.max_tokens}; check corpus.validation_split"
        )
    if len(kept) < len(rows):
        # Of one token without the separator, or cut within its prompt: found here, and not after all is scored.
        logger.warning(
            "%d of %d held-out documents have no token that counts and are left out", len(rows) - len(kept), len(rows)
        )
    places = places[kept]
    return HeldOut(
        rows=[rows[place] for place in kept],
        clusters=clusters[places],
        records=_take(documents.records(), places),
        counted=[counted[place] for place in kept] if documents.has_prompts else None,
        first=first,
        choosing=selection_documents(documents.n_documents)[places],
    )


def validation_set(run: Run, held: HeldOut, tokenizer: TextTokenizer) -> ValidationSet:
    """The held-out documents with their text, and their labels where there are some.

    Raises:
        ManifestError: If a document is no longer in the corpus.
    """
    wanted = {record.sp_id for record in held.records}
    there = {document.sp_id: document for document in run.documents("validation") if document.sp_id in wanted}
    missing = [record.sp_id for record in held.records if record.sp_id not in there]
    if missing:
        raise ManifestError(f"validation document {missing[0]} is no longer in the corpus; run the assign stage again")
    found = [there[record.sp_id] for record in held.records]
    cut = not run.config.score.separator or run.config.score.max_tokens is not None
    n_bytes = [
        spelled_bytes(document, tokenizer, row, held.first, index) if cut else answer_bytes(document, record)
        for index, (document, record, row) in enumerate(zip(found, held.records, held.rows, strict=True))
    ]
    labels = None
    if run.validation_labels is not None:
        known = read_labels(run.validation_labels, run.paths("validation"))
        labels = [known.get(record.sp_id) for record in held.records]
    return ValidationSet(
        texts=[document.text for document in found],
        tokens=held.rows,
        clusters=held.clusters,
        n_bytes=np.array(n_bytes, dtype=np.int64),
        counted=held.counted,
        first=held.first,
        sp_ids=[record.sp_id for record in held.records],
        labels=labels,
        choosing=held.choosing,
    )


def answer_bytes(document: Document, record: DocumentRecord) -> int:
    """UTF-8 bytes of a document after its prompt.

    A token that begins in the prompt and ends after it counts, and its bytes in the prompt do not: bits per byte are
    then of the same text for every tokenizer, and never too low.
    """
    return record.n_bytes - len(document.text[: document.prompt].encode())


def spelled_bytes(document: Document, tokenizer: TextTokenizer, row: NDArray[np.int64], first: int, index: int) -> int:
    """UTF-8 bytes that the scored tokens of a row spell, where a row is a part of its document; prompts left out."""
    longer, starts = tokenizer.encode_with_starts(document.text)
    token_starts(tokenizer, document.text, row, first, index)  # refuses tokens of another tokenizer
    end = int(starts[first + len(row)]) if first + len(row) < len(longer) else len(document.text)
    begin = max(int(starts[first + 1]), document.prompt)
    return len(document.text[begin:end].encode())


def distances(
    run: Run, clusterer: Clusterer, tokenizer: TextTokenizer, validation: ValidationSet, scratch: Path
) -> NDArray[np.float32]:
    """Distances of every scored token's context to all centres, (n_tokens, k), in a file of `scratch`."""
    router = PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)
    shape = (int(validation.offsets[-1]), clusterer.n_clusters)
    # Larger than memory where there are many experts.
    out = np.lib.format.open_memmap(scratch / "distances.npy", mode="w+", dtype=np.float32, shape=shape)
    with progress("route", "documents") as shown:
        return context_distances(router, tokenizer, validation, run.config.routing, out=out, progress=shown.update)


def open_router_parts(run: Run, scratch: Path) -> tuple[Clusterer, TextTokenizer]:
    """The run's clusterer and tokenizer, brought to this machine."""
    clusterer = Clusterer.load(run.fetch(run.cluster_spec(), scratch))
    return clusterer, TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))


def _take(items: Iterable[Item], places: NDArray[np.int64]) -> list[Item]:
    """The items at ascending places."""
    wanted = set(places.tolist())
    return [item for place, item in enumerate(items) if place in wanted]
