"""The clusterer stage: find the domains of a corpus and write down how to recognise them.

Number-dropping tf-idf, truncated SVD, unit length, balanced k-means (Gururangan et al. 2023, section 2.1). The
embedder and the centres may also be given; what is not given is fitted. The result is a folder of JSON and
safetensors: the embedder, the centres, how far documents lie from them, and a description of the domains for people.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.backends import fit_kmeans
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.domains import describe_domains
from cbtm.cluster.drift import DistanceProfile
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.fixed import FixedAssignments
from cbtm.cluster.kmeans import nearest_centers, squared_distances
from cbtm.cluster.sample import CountTokens, FixedClusters, RowBatches, Sample, dealt, drawn, reservoir
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError
from cbtm.progress import progress

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 65_536


def fit_clusterer(
    config: ClusterConfig,
    documents: Iterable[Document],
    folder: Path,
    *,
    given: Clusterer | None = None,
    fixed: FixedAssignments | None = None,
    labels: Mapping[str, str] | None = None,
    count_tokens: CountTokens | None = None,
) -> dict[str, Any]:
    """Fit on `documents`, or measure a given clusterer on them, and write the clusterer folder.

    Args:
        config: Settings.
        documents: The training documents. They are read twice if the sample is larger than
            `config.vocabulary_documents`, so they must allow that.
        folder: Folder to write.
        given: A clusterer that is there already (`config.path`).
        fixed: Given clusters of the documents (`config.assignments`).
        labels: Known domains by sp_id (`config.labels`).
        count_tokens: Counts the tokens of texts; `config.balance="tokens"` needs it.

    Returns:
        Facts about the fit: documents, sizes of the clusters, inertia, rounds, explained energy.

    Raises:
        ConfigError: If there are more clusters than documents, a fixed cluster has none, a given clusterer has another
            number of clusters, or nothing counts the tokens that are to be balanced.
        DataError: If there are no documents, or none with a countable word, or their number changed before they
            were read a second time.
    """
    _check(config, given, count_tokens)
    assigned = None if fixed is None else FixedClusters(fixed)
    if assigned is not None:
        documents = assigned.only_with(documents)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="fit-") as scratch,
        Sample(Path(scratch), labels=labels, count_tokens=count_tokens, fixed=assigned) as sample,
    ):
        embedder, vectors = embed_sample(config, documents, sample, Path(scratch), given.embedder if given else None)
        if given is not None:
            found = _measured(vectors, given.centers, nearest_centers(vectors, given.centers))
        elif fixed is not None:
            found = _means(vectors, np.array(sample.clusters, dtype=np.int32), config.n_clusters)
        else:
            found = _kmeans(config, vectors, sample.tokens)
        clusterer = Clusterer(embedder, found.centers, DistanceProfile.of(_blocks(vectors), found.centers))
        domains = describe_domains(
            found.centers,
            vectors,
            found.labels,
            sample.snippet,
            embedder.top_terms(found.centers, 10),
            n_examples=config.examples,
            true_labels=sample.true_labels,
        )
        clusterer.save(folder, domains)
        facts = _facts(clusterer, found, domains, sample.tokens)
        return facts if assigned is None else {**facts, "unassigned": assigned.missing}


def _check(config: ClusterConfig, given: Clusterer | None, count_tokens: CountTokens | None) -> None:
    if given is not None and given.n_clusters != config.n_clusters:
        raise ConfigError(f"cluster.n_clusters={config.n_clusters}, but the given clusterer has {given.n_clusters}")
    if config.needs_tokens and count_tokens is None:
        raise ConfigError("cluster.balance='tokens' needs a tokenizer that counts them; pass count_tokens")


@dataclass(frozen=True)
class _Found:
    centers: NDArray[np.float32]
    labels: NDArray[np.int32]
    history: tuple[float, ...]


def embed_sample(
    config: ClusterConfig,
    documents: Iterable[Document],
    sample: Sample,
    scratch: Path,
    embedder: TfidfSvdEmbedder | None,
) -> tuple[TfidfSvdEmbedder, NDArray[np.float32]]:
    """The embedder, fitted where none is given, and the vectors of the sample, in memory or on disk; shape (n, d).

    Raises:
        ConfigError: If there are more clusters than documents.
        DataError: If there are no documents, or their number changed before they were read a second time.
    """
    some, total = reservoir(documents, min(config.max_documents, config.vocabulary_documents), config.random_state)
    if not some:
        raise DataError("the training split holds no document with text")
    size = min(total, config.max_documents)
    if config.n_clusters > size:
        raise ConfigError(
            f"cluster.n_clusters={config.n_clusters} is larger than the number of documents {size}; use at most {size}"
        )
    is_all = len(some) == size
    if embedder is None:
        embedder = TfidfSvdEmbedder(
            n_components=config.n_components,
            min_document_frequency=config.min_document_frequency,
            random_state=config.random_state,
        )
        if is_all:
            return embedder, embedder.fit_transform(sample.texts(_let_go(some)))
        embedder.fit(document.text for document in _let_go(some))
    elif is_all:
        return embedder, embedder.transform(sample.texts(_let_go(some)))
    logger.info("documents=%d sampled=%d; reading the corpus a second time", total, size)
    path = scratch / "vectors.f4"
    with path.open("wb") as out:
        for block in embedder.transform_blocks(sample.texts(drawn(documents, size, total, config.random_state))):
            out.write(block.tobytes())
    return embedder, np.memmap(path, dtype=np.float32, mode="r", shape=(size, embedder.n_components_))


def _let_go(documents: list[Document]) -> Iterator[Document]:
    """The documents in order, each let go of once it is passed on: what is made of them needs the memory."""
    documents.reverse()
    while documents:
        yield documents.pop()


def _kmeans(config: ClusterConfig, vectors: NDArray[np.float32], tokens: NDArray[np.float64] | None) -> _Found:
    # Each batch is balanced by itself, so it needs as many documents as there are clusters.
    n_batches = min(-(-len(vectors) // config.batch_documents), len(vectors) // config.n_clusters)
    rows = dealt(len(vectors), n_batches, config.random_state)
    order = np.concatenate(rows)
    with progress("kmeans", "rounds") as shown:
        found = fit_kmeans(
            RowBatches(vectors, rows) if n_batches > 1 else np.asarray(vectors),
            config.n_clusters,
            backend=config.backend,
            random_state=config.random_state,
            n_init=config.n_init,
            max_iterations=config.max_iterations,
            weights=tokens[order] if tokens is not None and config.balance == "tokens" else None,
            device=config.device,
            progress=lambda done, inertia: shown.update(done, None, inertia=f"{inertia:.6g}"),
        )
    labels = np.empty_like(found.labels_)
    labels[order] = found.labels_
    return _Found(found.cluster_centers_, labels, found.history_)


def _means(vectors: NDArray[np.float32], labels: NDArray[np.int32], n_clusters: int) -> _Found:
    """Centres of given clusters."""
    sums, sizes = np.zeros((n_clusters, vectors.shape[1])), np.bincount(labels, minlength=n_clusters)
    if (sizes == 0).any():
        empty = np.flatnonzero(sizes == 0)
        raise ConfigError(
            f"cluster {empty[0]} ({len(empty)} such) has no document among those of cluster.assignments that were "
            f"sampled; set cluster.n_clusters to the number of clusters that there are, or raise max_documents"
        )
    for start in range(0, len(vectors), _BLOCK_ROWS):
        block, own = vectors[start : start + _BLOCK_ROWS], labels[start : start + _BLOCK_ROWS]
        for cluster in np.unique(own):
            sums[cluster] += block[own == cluster].sum(axis=0, dtype=np.float64)
    return _measured(vectors, (sums / sizes[:, None]).astype(np.float32), labels)


def _measured(vectors: NDArray[np.float32], centers: NDArray[np.float32], labels: NDArray[np.int32]) -> _Found:
    inertia = 0.0
    for start in range(0, len(vectors), _BLOCK_ROWS):
        own = labels[start : start + _BLOCK_ROWS]
        distances = squared_distances(vectors[start : start + _BLOCK_ROWS], centers)
        inertia += float(distances[np.arange(len(own)), own].sum(dtype=np.float64))
    return _Found(centers, labels, (inertia,))


def _blocks(vectors: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    return (vectors[start : start + _BLOCK_ROWS] for start in range(0, len(vectors), _BLOCK_ROWS))


def _facts(
    clusterer: Clusterer, found: _Found, domains: Mapping[str, Any], tokens: NDArray[np.float64] | None
) -> dict[str, Any]:
    k = clusterer.n_clusters
    agreement = domains["agreement"] or {}
    return {
        "documents": len(found.labels),
        "n_clusters": k,
        "sizes": np.bincount(found.labels, minlength=k).tolist(),
        "inertia": found.history[-1],
        "iterations": len(found.history),
        "history": list(found.history),
        "explained_energy": float(clusterer.embedder.explained_energy_),
        **({} if tokens is None else {"tokens": np.bincount(found.labels, weights=tokens, minlength=k).tolist()}),
        **{name: agreement[name] for name in ("nmi", "purity") if name in agreement},
    }
