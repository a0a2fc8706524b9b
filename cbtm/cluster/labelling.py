"""How a document gets its cluster: the nearest centre, as in the paper, or a balanced share of a batch."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.assignment import balanced_assignment
from cbtm.cluster.clusterer import Clusterer
from cbtm.cluster.kmeans import nearest_centers, squared_distances
from cbtm.cluster.weighted import weighted_assignment

Method: TypeAlias = Literal["nearest", "balanced-documents", "balanced-tokens"]

_BATCH = 1000  # documents that are embedded and tokenised at once
# Documents that are balanced at once: enough of each cluster for the constraint to cost little.
_BALANCED_BATCH = 5000
_BALANCED_PER_CLUSTER = 16


class Labeller:
    """Gives documents their clusters, a batch at a time.

    Args:
        clusterer: Embedder and centres.
        method: nearest gives each document its nearest centre. The others give every cluster equally many documents,
            or tokens, of each batch, at the least total squared distance.

    Attributes:
        batch: Documents that a batch should have.
        without_words: Documents so far that hold no known word. They are the zero vector, and go to the centre that
            is nearest to it, or where the balance sends them.
    """

    def __init__(self, clusterer: Clusterer, method: Method) -> None:
        self._clusterer, self._method = clusterer, method
        balanced = max(_BALANCED_BATCH, _BALANCED_PER_CLUSTER * clusterer.n_clusters)
        self.batch = _BATCH if method == "nearest" else balanced
        self.without_words = 0
        self._prices: NDArray[np.float64] | None = None

    def label(self, texts: Sequence[str], n_tokens: NDArray[np.int64]) -> NDArray[np.int32]:
        """Clusters of one batch, shape (n,).

        Args:
            texts: The documents.
            n_tokens: Tokens of each, shape (n,).
        """
        vectors = self._clusterer.embedder.transform(texts)
        self.without_words += int(np.count_nonzero(~vectors.any(axis=1)))
        if self._method == "nearest":
            return nearest_centers(vectors, self._clusterer.centers)
        cost = squared_distances(vectors, self._clusterer.centers)
        if len(cost) < self._clusterer.n_clusters:
            return _one_each(cost)
        if self._method == "balanced-documents":
            found = balanced_assignment(cost, initial_prices=self._prices)
            self._prices = found.prices
            return found.labels
        weighted = weighted_assignment(cost, n_tokens.astype(np.float64), initial_prices=self._prices)
        self._prices = weighted.prices
        return weighted.labels


def _one_each(cost: NDArray[np.float32]) -> NDArray[np.int32]:
    """Fewer documents than clusters: at most one each, at the least total cost."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(cost)[1].astype(np.int32)  # type: ignore[no-any-return]
