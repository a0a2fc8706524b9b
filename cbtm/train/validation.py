"""Losses during training, on the model's own domain and on all of them, over a few windows of the validation split.

The windows are spread evenly over the documents and are the same at every step, so that two points of the curve
differ by the model alone. They are cut as the scorer cuts documents: every token of a document is predicted once, the
first from the separator. Few windows make a noisy figure, which is for watching; what is reported is scored on all.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbtm.errors import ConfigError, DataError
from cbtm.tokens import TokenDocuments
from cbtm.train.data import IGNORED, Batch

OWN, ALL = "own", "all"


class Scores(Protocol):
    """A model as it is scored: `cbtm.train.loss.CausalLoss`, or one that is spread over ranks."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, nothing is dropped out."""
        ...

    def log_probs(self, inputs: Tensor, targets: Tensor, *, n_targets: int) -> Tensor:
        """Log-probability of each target in nats, 0 where it is `IGNORED`; shapes (B, T)."""
        ...


class Validation:
    """Windows of validation documents: some of the model's own cluster, some of all.

    Args:
        documents: The validation split.
        clusters: Cluster of each document, int64 (n_documents,).
        cluster: The model's own; None for a model of all, whose two losses are one.
        context_length: Most inputs of a window.
        max_blocks: Most windows of each of the two sets.
        prefix_token: First input of each window, in place of a text token, as in training.
        documents_used: Which documents may be looked at, bool (n_documents,); None takes all. A training that stops
            by its validation must not see the documents that its result is reported on.

    Raises:
        DataError: If the arrays are not one value a document, or no document is left that has a token to predict.
        ConfigError: If the prefix leaves no room for text, or no window is asked for.
    """

    def __init__(
        self,
        documents: TokenDocuments,
        clusters: NDArray[np.int64],
        *,
        cluster: int | None,
        context_length: int,
        max_blocks: int,
        prefix_token: int | None = None,
        documents_used: NDArray[np.bool_] | None = None,
    ) -> None:
        used = np.ones(documents.n_documents, np.bool_) if documents_used is None else documents_used
        for name, values in (("clusters", clusters), ("documents_used", used)):
            if values.shape != (documents.n_documents,):
                raise DataError(f"{name} has shape {values.shape} but there are {documents.n_documents} documents")
        self._limit = context_length - (prefix_token is not None)
        if self._limit < 1 or max_blocks < 1:
            raise ConfigError(
                f"validation with context_length={context_length} and max_blocks={max_blocks} has no token to predict; "
                "use at least 2 and 1"
            )
        self.documents = documents
        self.prefix_token = prefix_token
        self._offsets = np.concatenate([[0], np.cumsum(documents.lengths())])
        everything = self._windows(np.flatnonzero(used), max_blocks)
        if not len(everything):
            raise DataError(
                f"none of the {int(used.sum())} validation documents that may be used has a token to predict; "
                "use a larger validation split"
            )
        own = everything if cluster is None else self._windows(np.flatnonzero(used & (clusters == cluster)), max_blocks)
        self._sets = {name: found for name, found in ((OWN, own), (ALL, everything)) if len(found)}
        self._own_is_all = cluster is None

    @property
    def n_windows(self) -> dict[str, int]:
        """Windows of each set; an empty one is left out."""
        return {name: len(found) for name, found in self._sets.items()}

    def measure(
        self, loss: Scores, device: torch.device | str, micro_batch: int, *, rank: int = 0, world_size: int = 1
    ) -> dict[str, tuple[float, int]]:
        """Sum of the losses in nats, and how many tokens it is over, of each set.

        The model is in evaluation mode meanwhile and draws no random number. Autocast is the caller's. Every rank
        takes as many forward passes as every other, a rank without a window one that counts nothing: where the
        model is sharded, they meet in each.

        Args:
            loss: The model.
            device: Where it is.
            micro_batch: Windows in one forward pass.
            rank: This process; it takes windows rank, rank + world_size, …
            world_size: How many share the windows. Their sums add to those of one that takes all.

        Returns:
            By "own" and "all"; "own" is missing where its cluster has no document here. A count may be 0.
        """
        found = {
            name: self._measure(windows, loss, device, micro_batch, rank, world_size)
            for name, windows in self._sets.items()
            if not (self._own_is_all and name == OWN)
        }
        return {OWN: found[ALL], **found} if self._own_is_all else found

    def _measure(
        self,
        windows: NDArray[np.int64],
        loss: Scores,
        device: torch.device | str,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> tuple[float, int]:
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        with loss.evaluating():
            for batch in self._batches(windows, micro_batch, rank, world_size):
                inputs, targets = (torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets))
                n_targets = batch.n_targets
                total -= loss.log_probs(inputs, targets, n_targets=n_targets).sum(dtype=torch.float64)
                count += n_targets
        return total.item(), count

    def _batches(self, windows: NDArray[np.int64], micro_batch: int, rank: int, world_size: int) -> Iterator[Batch]:
        mine = windows[rank::world_size]
        for start in range(0, -(-len(windows) // world_size), micro_batch):
            rows = mine[start : start + micro_batch]
            yield self._batch(rows) if len(rows) else self._batch(windows[:1], counts=False)

    def _batch(self, windows: NDArray[np.int64], counts: bool = True) -> Batch:
        """Windows padded behind to the longest: a causal model's predictions do not depend on what follows."""
        n_prefix = int(self.prefix_token is not None)
        shape = (len(windows), n_prefix + int(windows[:, 1].max()))
        batch = Batch(np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64))
        if self.prefix_token is not None:
            batch.inputs[:, 0] = self.prefix_token
        for row, (start, length) in enumerate(windows.tolist()):
            tokens = self.documents.read(start, length + 1)
            text = slice(n_prefix, n_prefix + length)
            batch.inputs[row, text] = tokens[:-1]
            if counts:
                learned = self.documents.learned(start + 1, length)
                batch.targets[row, text] = np.where(learned, tokens[1:], IGNORED)
        return batch

    def _windows(self, documents: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """Start in the stream and length of at most `limit` windows, spread evenly, (W, 2), the longest first."""
        predicted = np.diff(self._offsets)[documents] - 1
        per_document = np.maximum(0, -(-predicted // self._limit))
        ends = np.cumsum(per_document)
        n_windows = int(ends[-1]) if len(ends) else 0
        n_taken = min(limit, n_windows)
        numbers = (2 * np.arange(n_taken) + 1) * n_windows // (2 * max(n_taken, 1))
        which = np.searchsorted(ends, numbers, side="right")
        begin = (numbers - (ends - per_document)[which]) * self._limit  # within its document
        lengths = np.minimum(self._limit, predicted[which] - begin)
        # Those of one length are neighbours: little is padded, and ranks get like shares.
        order = np.argsort(-lengths, kind="stable")
        return np.stack([self._offsets[documents[which]] + begin, lengths], axis=1)[order]
