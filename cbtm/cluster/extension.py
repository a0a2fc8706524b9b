"""One more domain for a clusterer that is there, without touching the others.

Words, projection and centres stay as they are, bit for bit, so that the experts of the clusters that were there keep
their weights' meaning; behind them comes one centre, the mean of the added documents, as it is for given assignments
(`cluster.assignments`). Nothing is fitted again: that would move every centre, and with it every expert's domain.

All training documents of the added text are of the new cluster, whichever centre is nearest, for that is what adding
it says. How many of them another centre claims is counted (`nearest_documents`): where these are most, the text is no
domain of its own under this embedding. Words that the old text did not have stay unknown; texts made of nothing else
are the zero vector and are counted as well.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.clusterer import DOMAINS_FILE, Ancestor, Clusterer
from cbtm.cluster.config import ClusterConfig
from cbtm.cluster.domains import balance, describe_domains
from cbtm.cluster.drift import CLUSTER_PERCENTILES, PERCENTILES, DistanceProfile
from cbtm.cluster.fit import embed_sample
from cbtm.cluster.sample import Sample
from cbtm.corpus import Document
from cbtm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# What is said of a domain from its own documents, which are not read again; the rest depends on the other centres.
_KEPT = ("cluster", "fit_documents", "top_terms", "radius", "labels", "examples", "borderline")


class OneCluster:
    """Assignments of a corpus whose documents are all of one cluster; in the place of `FixedAssignments`.

    Args:
        cluster: The cluster.
    """

    def __init__(self, cluster: int) -> None:
        self._cluster = cluster

    def of_file(self, corpus_path: str) -> "_EveryLine":
        """The cluster of every line of a file, whichever it is."""
        return _EveryLine(self._cluster)


class _EveryLine(Mapping[int, int]):
    def __init__(self, cluster: int) -> None:
        self._cluster = cluster

    def __getitem__(self, line: int) -> int:
        return self._cluster

    def __contains__(self, line: object) -> bool:
        return True

    def __iter__(self) -> Any:
        raise TypeError("lines are not numbered here: every line has the same cluster")

    def __len__(self) -> int:
        raise TypeError("lines are not counted here: every line has the same cluster")


def extend_clusterer(
    config: ClusterConfig, documents: Iterable[Document], base: Path, folder: Path, *, digest: str
) -> dict[str, Any]:
    """Write a clusterer with one more centre than the one in `base`.

    Args:
        config: Settings; of them `n_clusters`, `max_documents`, `vocabulary_documents`, `random_state` and `examples`
            matter.
        documents: The training documents of the added domain. They are read twice if the sample is larger than
            `vocabulary_documents`.
        base: Folder of the clusterer that is extended; it is read only.
        folder: Folder to write.
        digest: Identity of the clusterer in `base`, which the experts of its clusters are bound to.

    Returns:
        Facts: documents of the sample, how many are nearest to the new centre, those without a known word, and the
        centre that is nearest to the new one with its distance.

    Raises:
        ConfigError: If `config.n_clusters` is not one more than there are.
        DataError: If there are no documents, or none has a word that the clusterer knows.
        ManifestError: If there is no clusterer in `base`.
    """
    old = Clusterer.load(base)
    if config.n_clusters != old.n_clusters + 1:
        raise ConfigError(
            f"cluster.n_clusters={config.n_clusters}, but the clusterer that is extended has {old.n_clusters}, and one "
            f"domain is added at a time; use {old.n_clusters + 1}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="fit-") as scratch,
        Sample(Path(scratch)) as sample,
    ):
        alone = config.model_copy(update={"n_clusters": 1})  # one document is enough for one centre
        _, vectors = embed_sample(alone, documents, sample, Path(scratch), old.embedder)
        centers = np.concatenate([old.centers, _mean(vectors)[None]])
        added = describe_domains(
            centers,
            vectors,
            np.full(len(vectors), old.n_clusters, dtype=np.int32),
            sample.snippet,
            old.embedder.top_terms(centers, 10),
            n_examples=config.examples,
        )
        profile = old.profile and joined_profile(old.profile, DistanceProfile.of([np.asarray(vectors)], centers))
    domains = joined_domains(json.loads((base / DOMAINS_FILE).read_text(encoding="utf-8")), added)
    ancestors = (*old.ancestors, Ancestor(old.n_clusters, digest))
    Clusterer(old.embedder, centers, profile, ancestors).save(folder, domains)
    return _facts(added)


def _mean(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre of the added documents, float32, shape (d,): those without a known word count, as in a fit."""
    if not vectors.any():
        raise DataError(
            f"none of {len(vectors)} documents has a word that the clusterer knows: this text cannot be told from the "
            "others by the words of the text that it was fitted on; fit a new clusterer on both"
        )
    return np.asarray(np.mean(vectors, axis=0, dtype=np.float64).astype(np.float32))


def joined_domains(old: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """The content of domains.json for the clusters that were there and the added one.

    Args:
        old: That of the clusterer which is extended.
        added: A description of the added documents under all centres.
    """
    k = len(old["domains"])
    entries = [
        {**new, **{name: before[name] for name in _KEPT},
         "nearest_documents": before["nearest_documents"] + new["nearest_documents"]}
        for before, new in zip(old["domains"], added["domains"][:k], strict=True)
    ]  # fmt: skip
    entries.append(added["domains"][k])
    sizes = {name: balance([entry[f"{name}_documents"] for entry in entries]) for name in ("fit", "nearest")}
    return {
        **added,
        "domains": entries,
        "documents": old["documents"] + added["documents"],
        "without_words": old["without_words"] + added["without_words"],
        "balance": sizes,
        "agreement": None,  # the added documents have no labels
    }


def joined_profile(first: DistanceProfile, second: DistanceProfile) -> DistanceProfile:
    """The profile of the documents of two profiles; `second` may be of one cluster more.

    Quantiles are those of the two distributions together, each taken as straight between its percentiles. A document of
    the first profile that is now nearest to an added centre stays where it was: its vector is not known any more.
    """
    n_more = len(second.cluster_documents) - len(first.cluster_documents)
    sizes = (*first.cluster_documents, *(0,) * n_more)
    own = (*first.cluster_quantiles, *(None,) * n_more)
    n_first, n_second = (one.n_documents - one.n_zero_vectors for one in (first, second))
    joined = _joined_quantiles(first.quantiles, n_first, second.quantiles, n_second, PERCENTILES)
    assert joined is not None  # a profile has documents
    return DistanceProfile(
        n_documents=first.n_documents + second.n_documents,
        n_zero_vectors=first.n_zero_vectors + second.n_zero_vectors,
        cluster_documents=tuple(map(sum, zip(sizes, second.cluster_documents, strict=True))),
        quantiles=joined,
        cluster_quantiles=tuple(
            _joined_quantiles(*quantiles, CLUSTER_PERCENTILES)
            for quantiles in zip(own, sizes, second.cluster_quantiles, second.cluster_documents, strict=True)
        ),
    )


def _joined_quantiles(
    first: tuple[float, ...] | None,
    n_first: int,
    second: tuple[float, ...] | None,
    n_second: int,
    percentiles: Sequence[int],
) -> tuple[float, ...] | None:
    if first is None or second is None:
        return first or second
    shares = np.array(percentiles) / 100
    values = np.unique([*first, *second])
    parts = [n * np.interp(values, quantiles, shares) for n, quantiles in ((n_first, first), (n_second, second))]
    return tuple(np.interp(shares, sum(parts) / (n_first + n_second), values).round(6).tolist())


def _facts(added: Mapping[str, Any]) -> dict[str, Any]:
    domain = added["domains"][-1]
    nearest = domain["neighbours"][0]
    facts = {
        "documents": added["documents"],
        "n_clusters": len(added["domains"]),
        "nearest_documents": domain["nearest_documents"],
        "without_words": added["without_words"],
        "nearest_cluster": nearest["cluster"],
        "nearest_distance": nearest["distance"],
    }
    logger.info("added cluster=%d %s", domain["cluster"], " ".join(f"{name}={value}" for name, value in facts.items()))
    return facts
