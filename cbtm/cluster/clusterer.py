"""The clusterer stage: find the domains of a corpus and write down how to recognise them.

Number-dropping tf-idf, truncated SVD, unit length, balanced k-means (Gururangan et al. 2023, section 2.1). The
result is a folder of JSON and safetensors: the embedder, the centres, and a description of the domains for people.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.kmeans import balanced_kmeans, nearest_centers, squared_distances
from cbtm.config import Config
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError, ManifestError

logger = logging.getLogger(__name__)

CENTERS_FILE, SETTINGS_FILE, DOMAINS_FILE = "centers.safetensors", "clusterer.json", "domains.json"
_FORMAT = 1


class ClusterConfig(Config):
    """How domains are found.

    Attributes:
        n_clusters: Number of domains, and of experts.
        n_components: Length of a document's vector.
        min_document_frequency: Words in fewer documents than this are not counted.
        max_documents: Documents that the fit looks at; a larger training split is sampled evenly at random.
        n_init: Independent starts of k-means, of which the best is kept.
        max_iterations: Most rounds of one start.
        random_state: Seed of the sample, the SVD and k-means.
        examples: Most typical documents that are kept for the report, for each domain.
    """

    n_clusters: int = Field(default=8, ge=1)
    n_components: int = Field(default=100, ge=1)
    min_document_frequency: int = Field(default=1, ge=1)
    max_documents: int = Field(default=100_000, ge=1)
    n_init: int = Field(default=1, ge=1)
    max_iterations: int = Field(default=50, ge=1)
    random_state: int = Field(default=0, ge=0)
    examples: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _sample_is_large_enough(self) -> Self:
        if self.n_clusters > self.max_documents:
            raise ValueError(f"n_clusters={self.n_clusters} is larger than max_documents={self.max_documents}")
        return self


class Clusterer:
    """Embedder and centres: what is needed to say to which domain a text belongs.

    Attributes:
        embedder: Maps texts to unit vectors.
        centers: Cluster centres, float32, shape (k, d).
    """

    def __init__(self, embedder: TfidfSvdEmbedder, centers: NDArray[np.float32]) -> None:
        self.embedder, self.centers = embedder, centers

    @property
    def n_clusters(self) -> int:
        """Number of domains, k."""
        return len(self.centers)

    def predict(self, texts: Iterable[str]) -> NDArray[np.int32]:
        """Cluster of the nearest centre for each text; ties go to the lower number. Shape (n,)."""
        return nearest_centers(self.embedder.transform(texts), self.centers)

    def save(self, folder: Path) -> None:
        """Write the embedder, the centres and the settings."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        self.embedder.save(folder)
        save_file({"centers": np.ascontiguousarray(self.centers)}, folder / CENTERS_FILE)
        settings = {"format": _FORMAT, "n_clusters": self.n_clusters, "n_components": int(self.centers.shape[1])}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Clusterer":
        """Open a folder written by `save`.

        Raises:
            ManifestError: If the folder is incomplete, of another format, or its parts do not fit together.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            found, n_clusters = settings["format"], settings["n_clusters"]
            centers = load_file(folder / CENTERS_FILE)["centers"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ManifestError(f"{folder} is no clusterer folder: {error}; fit the clusterer again") from error
        if found != _FORMAT:
            raise ManifestError(f"{folder}: clusterer format {found!r}, this cbtm reads {_FORMAT}")
        embedder = TfidfSvdEmbedder.load(folder)
        if centers.shape != (n_clusters, embedder.n_components_):
            raise ManifestError(
                f"{folder}: centres of shape {centers.shape} do not fit {n_clusters} clusters and an embedder of "
                f"length {embedder.n_components_}; fit the clusterer again"
            )
        return cls(embedder, centers)


def fit_clusterer(config: ClusterConfig, documents: Iterable[Document], folder: Path) -> dict[str, Any]:
    """Fit on `documents` and write the clusterer folder.

    Returns:
        Facts about the fit: documents, sizes of the balanced clusters, inertia, rounds, explained energy.

    Raises:
        ConfigError: If there are more clusters than documents.
        DataError: If there are no documents, or none with a countable word.
    """
    sample = _sample(documents, config.max_documents, config.random_state)
    if not sample:
        raise DataError("the training split holds no document with text")
    if config.n_clusters > len(sample):
        raise ConfigError(
            f"cluster.n_clusters={config.n_clusters} is larger than the number of documents {len(sample)}; "
            f"use at most {len(sample)}"
        )
    embedder = TfidfSvdEmbedder(
        n_components=config.n_components,
        min_document_frequency=config.min_document_frequency,
        random_state=config.random_state,
    )
    vectors = embedder.fit_transform(document.text for document in sample)
    found = balanced_kmeans(
        vectors,
        config.n_clusters,
        random_state=config.random_state,
        n_init=config.n_init,
        max_iterations=config.max_iterations,
    )
    clusterer = Clusterer(embedder, found.cluster_centers_)
    clusterer.save(folder)
    domains = _describe(clusterer, sample, vectors, found.labels_, config.examples)
    (folder / DOMAINS_FILE).write_text(json.dumps(domains, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {
        "documents": len(sample),
        "n_clusters": config.n_clusters,
        "sizes": np.bincount(found.labels_, minlength=config.n_clusters).tolist(),
        "inertia": float(found.inertia_),
        "iterations": int(found.n_iter_),
        "explained_energy": float(embedder.explained_energy_),
    }


def _sample(documents: Iterable[Document], size: int, random_state: int) -> list[Document]:
    """Uniform sample in reading order (reservoir sampling: one pass, `size` documents in memory)."""
    rng = np.random.default_rng(random_state)
    kept: list[tuple[int, Document]] = []
    for index, document in enumerate(documents):
        if index < size:
            kept.append((index, document))
        elif (slot := int(rng.integers(index + 1))) < size:
            kept[slot] = (index, document)
    return [document for _, document in sorted(kept, key=lambda pair: pair[0])]


def _describe(
    clusterer: Clusterer,
    documents: list[Document],
    vectors: NDArray[np.float32],
    labels: NDArray[np.int32],
    n_examples: int,
) -> list[dict[str, Any]]:
    distances = squared_distances(vectors, clusterer.centers)[np.arange(len(labels)), labels]
    terms = clusterer.embedder.top_terms(clusterer.centers, 10)
    domains = []
    for cluster in range(clusterer.n_clusters):
        members = np.flatnonzero(labels == cluster)
        nearest = members[np.argsort(distances[members], kind="stable")[:n_examples]]
        examples = [{"sp_id": documents[i].sp_id, "text": documents[i].text[:600]} for i in nearest]
        domains.append(
            {"cluster": cluster, "fit_documents": len(members), "top_terms": terms[cluster], "examples": examples}
        )
    return domains
