"""Looking at domains outside of a run: how many there are, and whether new text still falls into them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.drift import DriftReport, measure_drift
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.labels import read_labels
from cbtm.cluster.sample import reservoir
from cbtm.cluster.selection import Candidate, compare_k
from cbtm.corpus import CorpusConfig, Document, ReadCounts, list_split, read_files
from cbtm.errors import ConfigError, DataError
from cbtm.progress import progress
from cbtm.run_config import RunConfig


def suggest_k(config: RunConfig, ks: Sequence[int], *, repeats: int = 3) -> list[Candidate]:
    """Fit several numbers of clusters on the training split of a run's corpus, which need not be planned.

    Args:
        config: The run: its corpus, and of `cluster` the settings of the sample, the embedder and the labels.
        ks: Numbers of clusters.
        repeats: Fits of each k on other samples, from which its stability is told.

    Raises:
        ConfigError: If a k is larger than the sample allows.
        DataError: If the training split holds no document.
    """
    cluster, corpus = config.cluster, config.corpus
    paths = [file.path for file in list_split(corpus.root, corpus.train_split)]
    labels = read_labels(cluster.labels, paths) if cluster.labels is not None else None
    size = min(cluster.max_documents, cluster.vocabulary_documents)
    sample, _ = reservoir(_documents(corpus, paths, "sample"), size, cluster.random_state)
    if not sample:
        raise DataError("the training split holds no document with text")
    embedder = TfidfSvdEmbedder(
        n_components=cluster.n_components,
        min_document_frequency=cluster.min_document_frequency,
        random_state=cluster.random_state,
    )
    vectors = embedder.fit_transform(document.text for document in sample)
    true_labels = None if labels is None else [labels.get(document.sp_id, "") for document in sample]
    with progress("suggest-k", "fits") as shown:
        return compare_k(
            vectors,
            ks,
            repeats=repeats,
            random_state=cluster.random_state,
            true_labels=true_labels,
            progress=shown.update,
        )


def drift(clusterer: str, corpus: str, split: str, scratch: Path) -> DriftReport:
    """Compare the documents of a split with those that a clusterer was fitted on.

    Args:
        clusterer: Folder or s3:// prefix of the clusterer.
        corpus: Root of the corpus.
        split: Split below it.
        scratch: Folder for what has to be brought to this machine.

    Raises:
        ConfigError: If the clusterer does not say how its own documents lie, as an imported one does not.
        ManifestError: If the clusterer folder is damaged or of another version.
        DataError: If the split holds no document.
    """
    found = Clusterer.fetch(clusterer, scratch)
    if found.profile is None:
        raise ConfigError(
            f"{clusterer} does not say how far its own documents lie from the centres, as imported clusterers do "
            "not; run the cluster stage with cluster.path set to it, and compare with the clusterer that this writes"
        )
    config = CorpusConfig(root=corpus)
    documents = _documents(config, [file.path for file in list_split(corpus, split)], "drift")
    blocks = found.embedder.transform_blocks(document.text for document in documents)
    return measure_drift(found.profile, blocks, np.asarray(found.centers))


def _documents(corpus: CorpusConfig, paths: Sequence[str], task: str) -> Iterator[Document]:
    found = read_files(corpus.root, paths, max_bad_lines=corpus.max_bad_lines, counts=ReadCounts())
    with progress(task, "documents") as shown:
        for number, document in enumerate(found, start=1):
            shown.update(number, None)
            yield document
