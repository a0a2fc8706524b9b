"""Documents as points on a sphere: tf-idf, truncated SVD, unit length.

The features are those of c-BTM (Gururangan et al. 2023, arXiv 2303.14177): scikit-learn's default tf-idf without
English stop words and without numbers, projected by a truncated SVD and scaled to unit length. Two choices differ
from the way this is usually written:

* The SVD is linear and the last step rescales every row, so tf-idf's own row norm cancels, and a document is
  normalise(sum over its words of idf * component). One float32 row per word is all that `transform` needs, and the
  embedding of a growing prefix is a running sum.
* Numbers and stop words need no test per token: they are not in the vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.counts import chosen, count_matrix, merged, renumbered, stacked
from cbtm.cluster.projection import leading_directions
from cbtm.cluster.words import WordTable, blocks_of
from cbtm.errors import ConfigError, DataError, ManifestError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SETTINGS_FILE = "embedder.json"
ARRAYS_FILE = "embedder.safetensors"

_SETTINGS = ("n_components", "min_document_frequency", "svd_iterations", "random_state")


def _is_feature(word: str) -> bool:
    return len(word) > 1 and not word[0].isdigit()


class TfidfSvdEmbedder:
    """Map texts to unit vectors whose distances follow the words that they share.

    Args:
        n_components: Length of a vector, d. Reduced, with a warning in the log, where the texts allow fewer.
        min_document_frequency: Words found in fewer documents than this are left out of the vocabulary.
        svd_iterations: Steps of the block Krylov method; more find directions of slightly higher energy.
        random_state: Seed of the SVD.

    Attributes:
        vocabulary_: Word to column, in sorted order; V entries.
        idf_: ln((1 + n) / (1 + document frequency)) + 1, float32, shape (V,).
        components_: Right singular vectors, float32, shape (d, V).
        n_components_: d after fitting.
        explained_energy_: ||A V||^2 / ||A||^2 over the tf-idf matrix A, between 0 and 1.
        n_documents_: Number of documents seen by `fit`.
    """

    vocabulary_: dict[str, int]
    idf_: NDArray[np.float32]
    components_: NDArray[np.float32]
    n_components_: int
    explained_energy_: float
    n_documents_: int

    def __init__(
        self,
        *,
        n_components: int = 100,
        min_document_frequency: int = 1,
        svd_iterations: int = 9,
        random_state: int = 0,
    ) -> None:
        for name, value, least in (
            ("n_components", n_components, 1),
            ("min_document_frequency", min_document_frequency, 1),
            ("svd_iterations", svd_iterations, 0),
            ("random_state", random_state, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value} is too small; use at least {least}")
        self.n_components = n_components
        self.min_document_frequency = min_document_frequency
        self.svd_iterations = svd_iterations
        self.random_state = random_state

    def fit(self, texts: Iterable[str]) -> TfidfSvdEmbedder:
        """Learn the vocabulary, the weights and the projection from `texts`, read once.

        Raises:
            DataError: If there is no text, something is not a string, or no word is left to count.
        """
        self.fit_transform(texts)
        return self

    def fit_transform(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """`fit`, and the vectors of the same texts without reading them twice.

        Returns:
            Unit rows (zero where a text has no known word), float32, shape (n, d); equal to `transform` of the
            same texts up to float32 rounding.

        Raises:
            DataError: As for `fit`.
        """
        counts, words = self._count(texts)
        tfidf, idf = _weighed(counts)
        _, directions = leading_directions(
            tfidf, self.n_components, iterations=self.svd_iterations, random_state=self.random_state
        )
        self._warn_if_reduced(tfidf, directions.shape[1])
        vectors: NDArray[np.float32] = tfidf @ directions
        filled_rows = int(np.count_nonzero(np.diff(tfidf.indptr)))  # ||A||^2: every row with a word has norm 1
        self.explained_energy_ = min(1.0, float(np.square(vectors, dtype=np.float64).sum() / filled_rows))
        order = sorted(range(len(words)), key=words.__getitem__)
        self.vocabulary_ = {words[column]: place for place, column in enumerate(order)}
        self._set_arrays(idf[order], directions[order].T)
        return _unit_rows(vectors)

    def transform(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Embed `texts`, in blocks of bounded memory.

        Returns:
            Unit rows, float32, shape (n, d); a text without any known word gives a row of zeros.

        Raises:
            DataError: If something in `texts` is not a string.
        """
        blocks = list(self.transform_blocks(texts))
        return np.concatenate(blocks) if blocks else np.empty((0, self.n_components_), dtype=np.float32)

    def transform_blocks(self, texts: Iterable[str]) -> Iterator[NDArray[np.float32]]:
        """`transform`, a block of rows at a time, for more texts than memory holds."""
        for block in blocks_of(texts):
            table, vectors = self._ranked
            columns = table.find(block)
            yield _unit_rows(count_matrix(*chosen(columns, columns >= 0, block.offsets), len(table)) @ vectors)

    def top_terms(self, centers: NDArray[np.floating[Any]], n: int = 10) -> list[list[str]]:
        """Words that set each centre apart: the highest tf-idf weight above the mean of all centres.

        A centre is carried back to tf-idf weights by the transposed projection. The mean is taken off so that
        words which are frequent in every cluster do not open every list; a single centre is shown as it is.
        Words of three or more letters come first; shorter ones and identifiers only fill up.

        Args:
            centers: Points in the embedding, shape (k, d).
            n: Words for each centre.

        Returns:
            k lists of min(n, V) words, strongest first.

        Raises:
            ConfigError: If `centers` has another number of columns than the embedding.
        """
        centers = np.atleast_2d(np.asarray(centers, dtype=np.float32))
        if centers.shape[1] != self.n_components_:
            raise ConfigError(
                f"centers has {centers.shape[1]} columns but the embedding has {self.n_components_}; "
                "pass centres found in this embedding"
            )
        if len(centers) > 1:
            centers = centers - centers.mean(axis=0)
        vocabulary = list(self.vocabulary_)
        is_plain = np.array([len(word) > 2 and word.isalpha() for word in vocabulary])
        plain, others = np.flatnonzero(is_plain), np.flatnonzero(~is_plain)
        terms = []
        for center in centers:
            weights = center @ self.components_  # (V,)
            strongest = [group[np.argsort(-weights[group], kind="stable")[:n]] for group in (plain, others)]
            terms.append([vocabulary[column] for column in np.concatenate(strongest)[:n]])
        return terms

    def save(self, folder: Path) -> None:
        """Write the fitted embedder as `embedder.json` and `embedder.safetensors` into `folder`."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"idf": self.idf_, "components": np.ascontiguousarray(self.components_)}, folder / ARRAYS_FILE)
        settings = {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in _SETTINGS},
            "n_documents": self.n_documents_,
            "explained_energy": self.explained_energy_,
            "vocabulary": list(self.vocabulary_),
        }
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TfidfSvdEmbedder:
        """Read what `save` wrote; the embedder gives the same vectors, bit for bit.

        Raises:
            ManifestError: If a file is missing or unreadable, is of another format version, or the vocabulary and
                the arrays do not belong together.
        """
        settings, arrays = _read_files(folder)
        if settings.get("format_version") != FORMAT_VERSION:
            raise ManifestError(
                f"{folder / SETTINGS_FILE} has format_version={settings.get('format_version')}, "
                f"this cbtm reads {FORMAT_VERSION}; fit the clusterer again"
            )
        try:
            embedder = cls(**{name: settings[name] for name in _SETTINGS})
            embedder.n_documents_ = int(settings["n_documents"])
            embedder.explained_energy_ = float(settings["explained_energy"])
            vocabulary, idf, components = list(settings["vocabulary"]), arrays["idf"], arrays["components"]
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{folder} lacks an entry or holds a wrong one: {error!r}") from error
        _check_shapes(folder, vocabulary, idf, components)
        embedder.vocabulary_ = {word: column for column, word in enumerate(vocabulary)}
        embedder._set_arrays(idf, components)
        return embedder

    @classmethod
    def from_arrays(
        cls,
        words: Sequence[str],
        idf: NDArray[np.float32],
        components: NDArray[np.float32],
        *,
        n_documents: int = 0,
        explained_energy: float = 0.0,
    ) -> TfidfSvdEmbedder:
        """An embedder that was fitted elsewhere.

        Args:
            words: The vocabulary, sorted.
            idf: Weight of each word, shape (V,).
            components: Right singular vectors, shape (d, V).
            n_documents: Number of documents that it was fitted on, 0 if nobody knows.
            explained_energy: See the class; 0 if nobody knows.

        Raises:
            DataError: If the arrays do not fit the words, or one of these is not what the embedder takes for a word.
        """
        if list(words) != sorted(set(words)):
            raise DataError("the vocabulary is not sorted, or repeats a word")
        if idf.shape != (len(words),) or components.ndim != 2 or components.shape[1] != len(words) or not len(words):
            raise DataError(
                f"{len(words)} words, idf {list(idf.shape)} and components {list(components.shape)} do not belong "
                "together"
            )
        embedder = cls(n_components=len(components))
        embedder.n_documents_, embedder.explained_energy_ = n_documents, explained_energy
        embedder.vocabulary_ = {word: column for column, word in enumerate(words)}
        embedder._set_arrays(idf.astype(np.float32), np.ascontiguousarray(components, dtype=np.float32))
        if sorted(embedder._ranked[0].words) != sorted(map(_utf8, words)):
            wrong = next((word for word in words if not _is_word(word)), words[0])
            raise DataError(f"the vocabulary holds {wrong!r}, which is no word of two or more characters")
        return embedder

    def _set_arrays(self, idf: NDArray[np.float32], components: NDArray[np.float32]) -> None:
        self.idf_ = idf
        self.components_ = components
        self.n_components_ = len(components)
        for cached in ("word_vectors_", "_ranked"):
            self.__dict__.pop(cached, None)

    @cached_property
    def word_vectors_(self) -> NDArray[np.float32]:
        """`idf_` times the column of `components_`, float32, shape (V, d)."""
        return np.ascontiguousarray((self.components_ * self.idf_).T)

    @cached_property
    def _ranked(self) -> tuple[WordTable, NDArray[np.float32]]:
        """The words, and their vectors, by frequency: those that a text is full of share a part of the cache."""
        order = np.argsort(self.idf_, kind="stable")
        words = list(self.vocabulary_)
        return WordTable(words[column] for column in order.tolist()), self.word_vectors_[order]

    def _count(self, texts: Iterable[str]) -> tuple[csr_matrix, list[str]]:
        """Count the words that are features, in one pass.

        Returns:
            Counts, float32, shape (n, V), and the words, in the order in which they are first seen: frequent ones come
            early, so that products with the matrix find their rows in the cache.
        """
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

        table = WordTable(sorted(ENGLISH_STOP_WORDS))
        n_stop_words = len(table)  # they have the first columns: half of a text is left out before it is counted
        blocks = []
        for block in blocks_of(texts):
            columns = table.add(block)
            blocks.append(merged(*chosen(columns, columns >= n_stop_words, block.offsets), len(table)))
        counts = stacked(blocks)
        self.n_documents_ = counts.shape[0]
        if self.n_documents_ == 0:
            raise DataError("there is no text to fit on; check that the corpus split is not empty")
        frequent = np.bincount(counts.indices, minlength=len(table)) >= self.min_document_frequency
        words = [word.decode("utf-8", "surrogatepass") for word in table.words]
        kept = [
            column
            for column, (word, is_frequent) in enumerate(zip(words, frequent.tolist(), strict=True))
            if is_frequent and _is_feature(word)
        ]
        if not kept:
            raise DataError(
                f"no word is left in {self.n_documents_} documents without stop words, numbers and words in fewer "
                f"than min_document_frequency={self.min_document_frequency} documents; "
                "check the texts or lower min_document_frequency"
            )
        return renumbered(counts, np.array(kept)), [words[column] for column in kept]

    def _warn_if_reduced(self, tfidf: csr_matrix, n_components: int) -> None:
        if n_components < self.n_components:
            logger.warning(
                "n_components=%d reduced to %d: %d documents with %d words span no more directions",
                self.n_components,
                n_components,
                *tfidf.shape,
            )


def _weighed(counts: csr_matrix) -> tuple[csr_matrix, NDArray[np.float32]]:
    """Counts (n, V) scaled to tf-idf rows of unit length, in place, and the idf (V,)."""
    n_documents, n_words = counts.shape
    document_frequency = np.bincount(counts.indices, minlength=n_words)
    idf = (np.log((1 + n_documents) / (1 + document_frequency)) + 1).astype(np.float32)
    counts.data *= idf[counts.indices]
    rows = np.repeat(np.arange(n_documents), np.diff(counts.indptr))
    lengths = np.sqrt(np.bincount(rows, weights=np.square(counts.data, dtype=np.float64), minlength=n_documents))
    counts.data /= lengths[rows].astype(np.float32)
    return counts, idf


def _is_word(word: str) -> bool:
    return WordTable([word]).words == [_utf8(word)]


def _utf8(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")


def _unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale the rows of `vectors` to length 1 in place; a row of zeros stays."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    lengths[lengths == 0] = 1
    vectors /= lengths[:, None]
    return vectors


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ManifestError(f"{folder} holds no readable embedder: {error}") from error
    if not isinstance(settings, dict):
        raise ManifestError(f"{folder / SETTINGS_FILE} is not a JSON object; fit the clusterer again")
    return settings, arrays


def _check_shapes(folder: Path, vocabulary: list[str], idf: NDArray[Any], components: NDArray[Any]) -> None:
    n_words = len(vocabulary)
    if vocabulary != sorted(set(vocabulary)):
        raise ManifestError(f"{folder / SETTINGS_FILE} has a vocabulary that is not sorted, or repeats a word")
    fits = idf.shape == (n_words,) and components.ndim == 2 and components.shape[1] == n_words and n_words > 0
    if not fits or {idf.dtype, components.dtype} != {np.dtype(np.float32)}:
        raise ManifestError(
            f"{folder} holds parts that do not belong together: {n_words} words, idf {idf.dtype}{list(idf.shape)}, "
            f"components {components.dtype}{list(components.shape)}; fit the clusterer again"
        )
