"""The scorer stage: the log-probability of every validation token under one model, one float32 a token.

Every token of every document is scored exactly once; the first one is predicted from the separator. A document
longer than the context goes through in windows; with a stride below the context length each later window repeats
some tokens as context. An expert with a cluster token sees it in front of every window, as in its training. One
pass per model: whatever is mixed later is arithmetic on these arrays.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cbtm.config import Config
from cbtm.errors import DataError
from cbtm.tokens import TokenDocuments

if TYPE_CHECKING:
    from torch import nn

LOG_PROBS_FILE, OFFSETS_FILE, SCORES_FILE = "log_probs.npy", "offsets.npy", "scores.json"


class ScoreConfig(Config):
    """How validation tokens are scored.

    Attributes:
        stride: Tokens that each window of a long document moves on; None is the context length, which scores
            every token once with no repeated context and costs one forward pass over the text.
        max_batch_tokens: Tokens in one forward pass.
        threads: CPU threads; None takes PyTorch's default.
    """

    stride: int | None = Field(default=None, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    threads: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Window:
    """One piece of a document: tokens begin … end are fed or predicted, those from `first` on are scored.

    Attributes:
        begin: First token that is fed to the model.
        first: First token whose probability is kept; first > begin.
        end: One past the last token predicted.
    """

    document: int
    begin: int
    first: int
    end: int


def windows(length: int, *, context_length: int, stride: int, document: int = 0) -> Iterator[Window]:
    """Cut a document of `length` tokens (separator included) so that tokens 1 … length - 1 are each scored once.

    A window predicts at most `context_length` tokens, and `stride` is at most that. The first window scores all of
    its tokens; each later one moves on by `stride` and scores the tokens that those before it did not.
    """
    scored = 1
    begin = 0
    while scored < length:
        end = min(length, begin + context_length + 1)
        yield Window(document, begin, scored, end)
        scored = end
        begin += stride


def score_documents(
    model: "nn.Module",
    documents: TokenDocuments,
    config: ScoreConfig,
    *,
    context_length: int,
    facts: dict[str, Any],
    folder: Path,
    prefix_token: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score all documents and write log_probs.npy, offsets.npy and scores.json.

    Args:
        model: A Hugging Face causal language model.
        documents: Validation documents.
        config: Settings.
        context_length: Most tokens that are fed to the model at once.
        facts: What the scores belong to, written to scores.json.
        folder: Output folder.
        prefix_token: Token in front of every window, where the model was trained with one.
        progress: Called with tokens scored so far and in all.

    Returns:
        `facts` with the number of documents, tokens and forward passes, and the mean negative log-probability.

    Raises:
        DataError: If there is no document, or the model gives NaN.
    """
    import torch

    from cbtm.train.loss import CausalLoss
    from cbtm.train.ranks import choose_device

    if documents.n_documents == 0:
        raise DataError("the validation split holds no document")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device("auto")
    loss = CausalLoss(model.to(device).eval())
    rows = list(documents.documents())
    # Score token t of a document at offsets[d] + t - 1: the separator itself has no probability.
    offsets = np.concatenate([[0], np.cumsum([len(row) - 1 for row in rows])]).astype(np.int64)

    def score(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        scores = loss.log_probs(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        values: NDArray[np.float32] = scores.cpu().numpy()
        return values

    batches = list(_batches(rows, context_length - (prefix_token is not None), config))
    out = _score_batches(rows, offsets, batches, score, prefix_token, progress)
    if np.isnan(out).any():
        raise DataError(f"{int(np.isnan(out).sum())} of {len(out)} scores are NaN: the model's weights are broken")
    np.save(folder / LOG_PROBS_FILE, out)
    np.save(folder / OFFSETS_FILE, offsets)
    result = {
        **facts,
        "documents": documents.n_documents,
        "tokens": len(out),
        "forward_passes": len(batches),
        "negative_log_prob": float(-out.mean(dtype=np.float64)),
    }
    (folder / SCORES_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _score_batches(
    rows: list[NDArray[np.int64]],
    offsets: NDArray[np.int64],
    batches: list[list[Window]],
    score: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]],
    prefix_token: int | None,
    progress: Callable[[int, int], None] | None,
) -> NDArray[np.float32]:
    """Scores of all tokens, float32 of shape (offsets[-1],); each batch is one call of `score`."""
    out = np.full(int(offsets[-1]), np.nan, dtype=np.float32)
    done = 0
    for batch in batches:
        scores = score(*_pad(rows, batch, prefix_token))[:, int(prefix_token is not None) :]
        for window, row in zip(batch, scores, strict=True):
            kept = row[window.first - window.begin - 1 : window.end - window.begin - 1]
            start = int(offsets[window.document]) + window.first - 1
            out[start : start + len(kept)] = kept
            done += len(kept)
        if progress is not None:
            progress(done, len(out))
    return out


def _batches(rows: list[NDArray[np.int64]], context_length: int, config: ScoreConfig) -> Iterator[list[Window]]:
    """Windows of similar length together, so that little is padded; in a fixed order."""
    stride = min(config.stride or context_length, context_length)
    pieces = [
        window
        for document, row in enumerate(rows)
        for window in windows(len(row), context_length=context_length, stride=stride, document=document)
    ]
    pieces.sort(key=lambda window: (window.end - window.begin, window.document, window.begin))
    batch: list[Window] = []
    for piece in pieces:
        # Sorted by length: the newest piece is the longest of its batch.
        if batch and (len(batch) + 1) * (piece.end - piece.begin - 1) > config.max_batch_tokens:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _pad(
    rows: list[NDArray[np.int64]], batch: list[Window], prefix_token: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Inputs and targets, int64 (B, T), padded behind: a causal model's scores do not depend on what follows."""
    width = max(window.end - window.begin for window in batch)
    tokens = np.zeros((len(batch), width), dtype=np.int64)
    for row, window in zip(tokens, batch, strict=True):
        row[: window.end - window.begin] = rows[window.document][window.begin : window.end]
    if prefix_token is not None:
        tokens = np.concatenate([np.full((len(batch), 1), prefix_token), tokens], axis=1)
    return tokens[:, :-1], tokens[:, 1:]
