"""Published clusterers: from the pickles of the reference implementation to a clusterer folder.

The reference (kernelmachine/cbtm, metaseq/scripts/train_clusterer.py) publishes two pickles: tfidf.pkl, a scikit-learn
pipeline of a tf-idf vectoriser that drops numbers, a truncated SVD and a row normaliser; and kmeans.pkl, an object
with the centres as a torch tensor, most often saved on a GPU. To load them is to run whatever they contain, and needs
scikit-learn, SciPy and torch of their time. Here they are read as data (`cbtm.cluster.unpickle`): names from the list
below are recognised, any other refuses the file, and nothing named in a file is imported or called.

What is written gives every document the cluster that the two originals give it, up to float32 rounding of two equally
near centres. A tf-idf pipeline can do more than our embedder; a setting that would change a vector refuses the file.
Some cannot: the vectoriser's row norm cancels (the last step rescales), missing idf is idf = 1, and stop words and
numbers, which the reference deletes from a text, are left out of the vocabulary instead.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.embedder import TfidfSvdEmbedder
from cbtm.cluster.pickled_arrays import (
    ARRAY_NAMES,
    TENSOR_NAMES,
    read_array,
    read_diagonal,
    read_integer,
    read_tensor,
    refusal,
)
from cbtm.cluster.unpickle import Name, Record, read_pickle, shown
from cbtm.cluster.words import words
from cbtm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_PIPELINE = {Name("sklearn.pipeline", "Pipeline")}
# A class of the script that was started is pickled as one of __main__.
_VECTORIZER = {
    Name(module, "NumberNormalizingVectorizer")
    for module in ("__main__", "metaseq.scripts.train_clusterer", "metaseq.scripts.cluster")
}
_TFIDF = {Name("sklearn.feature_extraction.text", "TfidfTransformer")}
_SVD = {Name(f"sklearn.decomposition.{module}", "TruncatedSVD") for module in ("_truncated_svd", "truncated_svd")}
_NORMALIZER = {Name(f"sklearn.preprocessing.{module}", "Normalizer") for module in ("_data", "data")}
_KMEANS = {Name("kmeans_pytorch", "KMeans")}
# Element types of the vectoriser, the device of k-means, and sets as protocol 2 spells them.
_OTHERS = {Name("numpy", "float64"), Name("numpy", "float32"), Name("torch", "device")} | {
    Name(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")
}
_NAMES = ARRAY_NAMES | TENSOR_NAMES | _PIPELINE | _VECTORIZER | _TFIDF | _SVD | _NORMALIZER | _KMEANS | _OTHERS

# What the vectoriser must be set to for our embedder to count the same words. Settings that are not here have no part
# in the vectors of a fitted pipeline.
_VECTORIZER_SETTINGS: dict[str, object] = {
    "input": "content",
    "strip_accents": None,
    "preprocessor": None,
    "tokenizer": None,
    "analyzer": "word",
    "lowercase": True,
    "token_pattern": r"(?u)\b\w\w+\b",
    "ngram_range": (1, 1),
    "binary": False,
}
_NUMBER = "#NUMBER"  # what the reference's vectoriser makes of every token that begins with a digit
# A vocabulary of ten million words with 100 components in float64 takes 8 GB.
_LARGEST_FILE = 16 * 1024**3
# Weights of a fitted model are below 30 (idf) or 1 (the others). Far larger ones overflow in float32 distances.
_LARGEST_NUMBER = 1e6


def import_clusterer(tfidf: Path, kmeans: Path, folder: Path) -> dict[str, Any]:
    """Write a clusterer folder that assigns documents as a published tfidf.pkl and kmeans.pkl do.

    The embedder's `n_documents_` and `explained_energy_` are 0: the pickles do not hold them.

    Args:
        tfidf: Pickled scikit-learn pipeline of the reference implementation.
        kmeans: Pickled `kmeans_pytorch.KMeans` of the reference implementation.
        folder: Folder to write; new or empty.

    Returns:
        Facts: "n_clusters", "n_components", "words" in the embedder's vocabulary, "words_left_out" of the published
        one, "scikit_learn" (version that wrote tfidf.pkl, or None), "device" (where the centres were when saved), and
        the sha256 of both files as "tfidf_sha256" and "kmeans_sha256".

    Raises:
        DataError: If a file is missing, is not what the reference writes, is damaged, has a setting that our embedder
            does not have, or the two do not belong together.
        ConfigError: If `folder` holds files already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; name another, or remove it first")
    tfidf_bytes, kmeans_bytes = _file_bytes(tfidf), _file_bytes(kmeans)
    embedder, tfidf_facts = _read_embedder(_read_whole(tfidf_bytes, str(tfidf)), str(tfidf))
    centers, device = _read_centers(_read_whole(kmeans_bytes, str(kmeans)), str(kmeans))
    if centers.shape[1] != embedder.n_components_:
        raise DataError(
            f"{kmeans}: centres have {centers.shape[1]} components, but the SVD of {tfidf} has "
            f"{embedder.n_components_}; give two files of the same clusterer"
        )
    Clusterer(embedder, centers).save(folder)
    logger.info("imported %d clusters and %d words from %s and %s", len(centers), len(embedder.idf_), kmeans, tfidf)
    return {
        "n_clusters": len(centers),
        "n_components": embedder.n_components_,
        **tfidf_facts,
        "device": device,
        "tfidf_sha256": hashlib.sha256(tfidf_bytes).hexdigest(),
        "kmeans_sha256": hashlib.sha256(kmeans_bytes).hexdigest(),
    }


def _file_bytes(path: Path) -> memoryview:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise DataError(
                f"{path}: {size} bytes, above the limit of {_LARGEST_FILE}; no published clusterer is so large"
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; check the path") from error
    if content[:2] == b"PK":
        raise DataError(
            f"{path} is a zip archive (perhaps of torch.save); the reference implementation writes plain pickles"
        )
    return memoryview(content)


def _read_whole(content: memoryview, source: str) -> Any:
    value, end = read_pickle(content, _NAMES, source=source)
    if end != len(content):
        raise DataError(f"{source}: {len(content) - end} bytes follow the pickle; the file is damaged, copy it again")
    return value


def _read_embedder(pipeline: object, source: str) -> tuple[TfidfSvdEmbedder, dict[str, Any]]:
    """Our embedder with the arrays of a published pipeline, and facts about them."""
    vectorizer, svd, normalizer, version = _steps(pipeline, source)
    _check_settings(vectorizer, _VECTORIZER_SETTINGS, "the vectoriser", source)
    _check_settings(normalizer, {"norm": "l2"}, "the normaliser", source)
    column_of = _vocabulary(vectorizer.get("vocabulary_"), source)
    idf = _numbers(_idf(vectorizer.get("_tfidf"), len(column_of), source), source, "idf")
    components = _numbers(read_array(svd.get("components_"), source, "components_"), source, "components_")
    if (
        idf.shape != (len(column_of),)
        or components.ndim != 2
        or components.shape[1:] != idf.shape
        or not len(components)
    ):
        raise DataError(
            f"{source}: {len(column_of)} words, idf of shape {idf.shape} and components of shape {components.shape} "
            "do not belong together; the file is damaged"
        )
    stop_words = _stop_words(vectorizer.get("stop_words"), source)
    if _NUMBER in column_of and _NUMBER not in stop_words:
        raise DataError(
            f"{source}: numbers count as a word here ({_NUMBER} is no stop word), and cbtm's embedder drops them; "
            "fit a clusterer with cbtm instead"
        )
    kept = sorted(word for word in column_of if word not in stop_words and _is_ever_counted(word))
    if not kept:
        raise DataError(f"{source}: none of its {len(column_of)} words can be counted; the file is damaged")
    columns = np.array([column_of[word] for word in kept])
    embedder = TfidfSvdEmbedder.from_arrays(kept, idf[columns], np.ascontiguousarray(components[:, columns]))
    return embedder, {
        "words": len(kept),
        "words_left_out": len(column_of) - len(kept),
        "scikit_learn": version if isinstance(version, str) else None,
    }


def _steps(pipeline: object, source: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], object]:
    """Attributes of the vectoriser, the SVD and the normaliser, and the version of scikit-learn."""
    if isinstance(pipeline, Record) and pipeline.name in _KMEANS:
        raise DataError(f"{source} holds {shown(pipeline)}, not a tf-idf pipeline; are the two files exchanged?")
    state = _attributes(pipeline, _PIPELINE, "the file", source)
    match state.get("steps"):
        case [(str(), vectorizer), (str(), svd), (str(), normalizer)]:
            return (
                _attributes(vectorizer, _VECTORIZER, "the first step of the pipeline", source),
                _attributes(svd, _SVD, "the second step of the pipeline", source),
                _attributes(normalizer, _NORMALIZER, "the third step of the pipeline", source),
                state.get("_sklearn_version"),
            )
        case steps:
            raise refusal(source, "the pipeline", f"has {shown(steps)} for steps, not vectoriser, SVD and normaliser")


def _attributes(value: object, names: Collection[Name], what: str, source: str) -> dict[str, Any]:
    if not isinstance(value, Record) or value.name not in names or value.arguments:
        wanted = " or ".join(sorted(map(str, names)))
        raise refusal(source, what, f"is {shown(value)}, not a {wanted}")
    if not isinstance(value.state, dict):
        raise refusal(source, what, f"has {shown(value.state)} for its attributes")
    return value.state


def _check_settings(found: Mapping[str, Any], wanted: Mapping[str, object], what: str, source: str) -> None:
    for name, value in wanted.items():
        if name not in found:
            raise refusal(source, what, f"has no attribute {name}")
        if type(found[name]) is not type(value) or found[name] != value:
            raise DataError(
                f"{source}: {what} has {name}={shown(found[name])}, and cbtm's embedder is {name}={value!r} only; "
                "fit a clusterer with cbtm instead"
            )


def _vocabulary(value: object, source: str) -> dict[str, int]:
    if not isinstance(value, dict) or not value:
        raise refusal(source, "vocabulary_", f"is {shown(value)}; was the pipeline fitted?")
    column_of = {word: read_integer(column, source, "a column of vocabulary_") for word, column in value.items()}
    # Each column is in range and taken once. (Not by sorting a range of the largest: it may be of any size.)
    if (
        min(column_of.values()) < 0
        or max(column_of.values()) >= len(column_of)
        or len(set(column_of.values())) < len(column_of)
    ):
        raise refusal(source, "vocabulary_", f"does not number its {len(column_of)} words from 0 on")
    return column_of


def _idf(tfidf: object, n_words: int, source: str) -> NDArray[Any]:
    """Inverse document frequencies, under the two names that versions of scikit-learn gave them. Shape (V,)."""
    state = _attributes(tfidf, _TFIDF, "_tfidf of the vectoriser", source)
    _check_settings(state, {"sublinear_tf": False}, "the vectoriser", source)
    if state.get("use_idf") is False:
        return np.ones(n_words)
    if "idf_" in state:
        return read_array(state["idf_"], source, "idf_")
    if "_idf_diag" in state:
        return read_diagonal(state["_idf_diag"], source, "_idf_diag")
    raise refusal(source, "_tfidf of the vectoriser", "has neither idf_ nor _idf_diag; was the pipeline fitted?")


def _stop_words(value: object, source: str) -> Collection[str]:
    match value:
        case None:
            return frozenset()
        case "english":
            from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

            return frozenset(ENGLISH_STOP_WORDS)
        case Record(Name(_, "set" | "frozenset"), (list(members),), None):
            pass
        case list(members) | tuple(members) | set(members) | frozenset(members):
            pass
        case _:
            raise refusal(source, "stop_words", f"is {shown(value)}, not a list of words")
    if not all(type(member) is str for member in members):
        raise refusal(source, "stop_words", "has a member that is not a text")
    return frozenset(members)


def _is_ever_counted(word: str) -> bool:
    """Whether the published vectoriser finds `word` in any text: a whole lower-cased token that is no number."""
    return words(word) == [word] and not word[0].isdigit()


def _read_centers(value: object, source: str) -> tuple[NDArray[np.float32], str]:
    """Centres of a published k-means, shape (k, d), and the device that they were on."""
    if isinstance(value, Record) and value.name in _PIPELINE:
        raise DataError(f"{source} holds {shown(value)}, not k-means; are the two files exchanged?")
    # KMeans.save writes the attributes without the object.
    state = value if isinstance(value, dict) else _attributes(value, _KMEANS, "the file", source)
    if state.get("distance", "euclidean") != "euclidean":
        raise DataError(
            f"{source}: k-means has distance={shown(state['distance'])}, and cbtm's is 'euclidean' only; "
            "fit a clusterer with cbtm instead"
        )
    if "cluster_centers" not in state:
        raise refusal(source, "k-means", "has no attribute cluster_centers")
    if state["cluster_centers"] is None:
        raise DataError(f"{source}: k-means has no centres; it was saved before it was fitted")
    tensor, device = read_tensor(state["cluster_centers"], source, "cluster_centers")
    centers = np.ascontiguousarray(_numbers(tensor, source, "cluster_centers"))
    n_clusters = read_integer(state.get("n_clusters"), source, "n_clusters of k-means")
    if centers.ndim != 2 or len(centers) != n_clusters or n_clusters < 1:
        raise DataError(f"{source}: centres of shape {centers.shape} for n_clusters={n_clusters}; the file is damaged")
    return centers, device


def _numbers(array: NDArray[Any], source: str, what: str) -> NDArray[np.float32]:
    """`array` as float32, if it holds numbers that a fitted clusterer can hold."""
    if array.dtype.kind != "f":
        raise refusal(source, what, f"holds {array.dtype.name}, not floats")
    # A NaN fails the comparison too. The minimum and the maximum need no copy of the array.
    if array.size and not (array.min() >= -_LARGEST_NUMBER and array.max() <= _LARGEST_NUMBER):
        raise refusal(source, what, f"has a NaN or a number beyond {_LARGEST_NUMBER:g}")
    return array.astype(np.float32)
