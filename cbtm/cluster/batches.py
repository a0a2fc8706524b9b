"""Points of k-means as one matrix, or as batches that are read in turn so that no two need to be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.cluster.devices import Array, Device
from cbtm.errors import ConfigError, DataError


class Batches:
    """Checked points, and their weights where there are any, on the device where they are worked on.

    One matrix goes to the device once. Of several, `x[i]` is read each time that its turn comes and let go
    afterwards, so a list of memory-mapped files or a sequence of the caller that reads a file per item will do.
    A last batch of fewer points than clusters joins the one before it.

    Attributes:
        sizes: Points in each batch.
        n_columns: Length of a point, d.
        device: Where the points are worked on.
    """

    def __init__(
        self,
        x: NDArray[np.float32] | Sequence[NDArray[np.float32]],
        n_clusters: int,
        *,
        weights: NDArray[np.floating[Any]] | None,
        device: Device,
    ) -> None:
        """Read every point once and check it.

        Raises:
            ConfigError: If there are more clusters than points in all, or in a batch that is not the last, or the
                weights are not one for each point.
            DataError: If what should be a matrix is none, lengths of points differ, a value is not finite, or a
                weight is negative.
        """
        self.device = device
        self._matrices: Sequence[NDArray[np.float32]] = [x] if isinstance(x, np.ndarray) else x
        is_one = len(self._matrices) == 1
        names = ["x" if is_one else f"batch {number} of x" for number in range(len(self._matrices))]
        shapes = [_checked_shape(matrix, name) for matrix, name in zip(self._matrices, names, strict=True)]
        if not shapes:
            raise DataError("x has no batches; pass at least one matrix of (documents, dimensions)")
        self.n_columns = shapes[0][1]
        for (_, n_columns), name in zip(shapes, names, strict=True):
            if n_columns != self.n_columns:
                raise DataError(f"{name} has {n_columns} columns, but the first batch has {self.n_columns}")
        lengths = [n_points for n_points, _ in shapes]
        if n_clusters > sum(lengths):
            raise ConfigError(
                f"n_clusters={n_clusters} is larger than the number of documents {sum(lengths)}; "
                f"use at most {sum(lengths)}"
            )
        self._groups = _groups(lengths, n_clusters)  # numbers of the matrices that make up each batch
        self.sizes = [sum(lengths[number] for number in group) for group in self._groups]
        self._ends = np.cumsum(lengths)
        self._weights = None if weights is None else _checked_weights(weights, len(self))
        self._kept = device.put(_as_points(self._matrices[0])) if is_one else None

    def __len__(self) -> int:
        """Number of points in all batches."""
        return sum(self.sizes)

    def __iter__(self) -> Iterator[tuple[Array, NDArray[np.float64] | None]]:
        """Points of each batch on the device, float32, shape (n, d), and their weights (n,)."""
        start = 0
        for group, size in zip(self._groups, self.sizes, strict=True):
            weights = None if self._weights is None else self._weights[start : start + size]
            yield self._kept if self._kept is not None else self.device.put(self._read(group)), weights
            start += size

    def host_points(self) -> NDArray[np.float32]:
        """All points as one array of numpy: for a sample."""
        return self._read(range(len(self._matrices)))

    def sample(self, n_points: int, n_clusters: int, rng: np.random.Generator) -> Batches:
        """Points drawn from all batches without replacement, in their order; all of them if there are no more."""
        if n_points >= len(self):
            if len(self._matrices) == 1:
                return self
            return Batches(self.host_points(), n_clusters, weights=self._weights, device=self.device)
        chosen = np.sort(rng.choice(len(self), n_points, replace=False))
        parts = []
        for number, end in enumerate(self._ends):
            start = 0 if number == 0 else self._ends[number - 1]
            own = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, end)] - start
            parts.append(_as_points(self._matrices[number][own]))
        weights = None if self._weights is None else self._weights[chosen]
        return Batches(np.concatenate(parts), n_clusters, weights=weights, device=self.device)

    def _read(self, group: Sequence[int]) -> NDArray[np.float32]:
        parts = [_as_points(self._matrices[number]) for number in group]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _as_points(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(matrix, dtype=np.float32)


def _checked_shape(matrix: NDArray[np.float32], name: str) -> tuple[int, int]:
    x = _as_points(matrix)
    if x.ndim != 2 or x.shape[1] == 0:
        raise DataError(f"{name} has shape {x.shape}; pass a matrix of (documents, dimensions)")
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise DataError(
            f"row {int(np.flatnonzero(~finite)[0])} of {name} is not finite ({int((~finite).sum())} such rows); "
            "remove or mend these documents"
        )
    return len(x), x.shape[1]


def _groups(lengths: list[int], n_clusters: int) -> list[list[int]]:
    groups = [[number] for number in range(len(lengths))]
    if len(groups) > 1 and lengths[-1] < n_clusters:
        groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        if (size := sum(lengths[number] for number in group)) < n_clusters:
            raise ConfigError(
                f"batch {group[0]} of x has {size} documents, fewer than n_clusters={n_clusters}; each batch is "
                "balanced by itself, so make larger batches"
            )
    return groups


def _checked_weights(weights: NDArray[np.floating[Any]], n_points: int) -> NDArray[np.float64]:
    checked = np.asarray(weights, dtype=np.float64)
    if checked.shape != (n_points,):
        raise ConfigError(f"weights has shape {checked.shape}; pass one weight for each of {n_points} documents")
    wrong = ~(np.isfinite(checked) & (checked >= 0))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(f"weights[{first}] is {checked[first]}; every weight must be finite and 0 or more")
    return checked
