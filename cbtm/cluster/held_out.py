"""Clusters of held-out documents whose tokens another run has made: only the clusterer differs."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from cbtm.cluster.assigner import CLUSTERS, assignment_line, assignment_path, held_out_counts, held_out_shard
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.labelling import Labeller
from cbtm.corpus import CorpusConfig, ReadCounts, read_file
from cbtm.errors import DataError
from cbtm.plan import ShardGroup
from cbtm.progress import progress
from cbtm.tokens import TokenDocuments


def label_held_out(
    corpus: CorpusConfig, group: ShardGroup, clusterer: Clusterer, documents: TokenDocuments, folder: Path
) -> dict[str, Any]:
    """Write the clusters of one group of held-out documents, as lines and as an array, below `folder`.

    Args:
        corpus: Where the text lies.
        group: The files.
        clusterer: Gives each document its nearest centre.
        documents: The tokens of the same documents.
        folder: Folder to write.

    Returns:
        The accounting of `cbtm.cluster.assigner.assign_group`.

    Raises:
        DataError: If the text has other documents than `documents`.
    """
    labeller, counts = Labeller(clusterer, "nearest"), ReadCounts()
    lengths, found = documents.lengths(), [np.empty(0, dtype=np.int32)]
    done = 0
    with progress(f"assign:{group.name}", "documents") as shown:
        for path in group.paths:
            lines = folder / assignment_path(path)
            lines.parent.mkdir(parents=True, exist_ok=True)
            text = read_file(corpus.root, path, max_bad_lines=corpus.max_bad_lines, counts=counts)
            with lines.open("wb") as out:
                while batch := list(itertools.islice(text, labeller.batch)):
                    shown.update(done, documents.n_documents)
                    labels = labeller.label([one.text for one in batch], lengths[done : done + len(batch)])
                    out.write(b"".join(assignment_line(*pair) for pair in zip(batch, labels.tolist(), strict=True)))
                    found.append(labels)
                    done += len(batch)
    if done != documents.n_documents:
        raise DataError(
            f"shard group {group.name} has {done} documents, and tokens of {documents.n_documents}: the corpus has "
            "changed since they were made; run the assign stage of the shared run again"
        )
    clusters = np.concatenate(found)
    below, stem = held_out_shard(group.split, group.name)
    (folder / below).mkdir(parents=True, exist_ok=True)
    np.save(folder / below / f"{stem}{CLUSTERS}", clusters)
    return {
        "documents": counts.documents,
        "skipped": counts.skipped,
        "without_words": labeller.without_words,
        "clusters": held_out_counts(documents, clusters, clusterer.n_clusters),
    }
