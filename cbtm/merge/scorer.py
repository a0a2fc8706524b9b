"""The scorer stage: the log-probability of every validation token under one model, one float32 a token.

Every token of every document is scored exactly once; the first one is predicted from the separator. A document
longer than the context goes through in windows; with a stride below the context length each later window repeats
some tokens as context. An expert with a cluster token sees it in front of every window, as in its training. One
pass per model: whatever is mixed later is arithmetic on these arrays.

An ensemble of the nearest experts looks at an expert only where it is among them. Told so, the scorer feeds no window
further than to its last such token, and runs the head on these tokens alone; the others are NaN.

Documents go in blocks, each saved once it is done, so that a scoring that is stopped or killed goes on after the last
one. What a block feeds together depends on nothing else, so the scores are the same to the bit.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cbtm.config import Config, digest_of
from cbtm.errors import ConfigError, DataError
from cbtm.merge.score_blocks import Block, Fed, ScoreBlocks, block_bounds, score_blocks
from cbtm.train.data import IGNORED

if TYPE_CHECKING:
    import threading

    from torch import nn

LOG_PROBS_FILE, OFFSETS_FILE, SCORES_FILE = "log_probs.npy", "offsets.npy", "scores.json"
_CPU_BATCH_TOKENS = 1024  # with 8192 the body of an OPT of 4 x 256 takes 1.3 times as long, out of the cache
_RANKED_ROWS = 1 << 16  # tokens whose distances are in memory at a time

Score = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


class ScoreConfig(Config):
    """How validation tokens are scored.

    Attributes:
        max_documents: Validation documents that are scored, spread evenly over the split; None scores all.
        stride: Tokens that each window of a long document moves on; None is the context length, which scores
            every token once with no repeated context and costs one forward pass over the text.
        top_k: Score each expert only where it is among so many nearest ones of a token's context; None scores every
            token under every expert, which ensembles that do not go by distance need.
        separator: Whether models see the separator in front of a document, from which its first token is predicted.
            Without it the first token is given and not scored, as in the reference implementation.
        max_tokens: Documents are cut after so many tokens, the separator not counted; None leaves them whole. The
            reference implementation cuts after 2049.
        block_tokens: Scored tokens between two points that a stopped scoring can go on from.
        max_batch_tokens: Most tokens in one forward pass. A CPU takes 1024 at most, which is faster than more.
        threads: CPU threads; None takes PyTorch's default.
    """

    max_documents: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    top_k: int | None = Field(default=None, ge=1)
    separator: bool = True
    max_tokens: int | None = Field(default=None, ge=1)
    block_tokens: int = Field(default=262_144, ge=1)
    max_batch_tokens: int = Field(default=8192, ge=1)
    threads: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _something_is_scored(self) -> "ScoreConfig":
        if not self.separator and self.max_tokens == 1:
            raise ValueError(
                "max_tokens=1 with separator=false leaves no token to score, as the first is given: use at least 2"
            )
        return self

    def result_digest(self) -> str:
        """Digest of what the scores of a model on all tokens depend on, but for rounding.

        `top_k` is left out: it only says which of the scores are made, and of which models, which the caller knows.
        """
        return digest_of(self.model_dump(mode="json", exclude={"top_k", "block_tokens", "max_batch_tokens", "threads"}))


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

    @property
    def n_fed(self) -> int:
        """Tokens that are fed, without a prefix token."""
        return self.end - self.begin - 1


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


def scored_rows(documents: Iterable[NDArray[np.integer[Any]]], config: ScoreConfig) -> list[NDArray[np.int64]]:
    """Cut documents to what is fed and scored: the first token of a row is given, the others are scored.

    Args:
        documents: Token ids of each document, the separator first.
        config: Whether the separator stays, and how many tokens after it.

    Returns:
        Int64 rows. One of a single token, or of none, has nothing to score.
    """
    first = 0 if config.separator else 1
    end = None if config.max_tokens is None else 1 + config.max_tokens
    return [np.asarray(document[first:end], dtype=np.int64) for document in documents]


def top_k_needed(
    distances: NDArray[np.floating[Any]], offsets: NDArray[np.int64], expert: int, top_k: int
) -> list[NDArray[np.bool_]]:
    """Mark the tokens whose context has an expert among its `top_k` nearest; of equal distances the lower index wins.

    Args:
        distances: To the centre of each expert, shape (n_tokens, k); may be a memory map.
        offsets: Where each document's tokens begin, and the end; int64 (n_documents + 1,).
        expert: Column of the expert.
        top_k: How many count.

    Returns:
        For each document a mask of its scored tokens.

    Raises:
        ConfigError: If the expert or `top_k` is out of range.
        DataError: If distances and offsets do not fit, or a distance is NaN.
    """
    n_tokens, n_experts = distances.shape
    if not 1 <= top_k <= n_experts or not 0 <= expert < n_experts:
        raise ConfigError(f"top_k={top_k} of expert {expert}: there are {n_experts} experts, counted from 0")
    if int(offsets[-1]) != n_tokens:
        raise DataError(f"{n_tokens} rows of distances for {int(offsets[-1])} scored tokens")
    near = np.empty(n_tokens, dtype=np.bool_)
    for start in range(0, n_tokens, _RANKED_ROWS):
        rows = np.asarray(distances[start : start + _RANKED_ROWS])
        if np.isnan(rows).any():
            raise DataError(f"the distances of tokens {start} to {start + len(rows)} have a NaN")
        own = rows[:, expert, None]
        rank = np.count_nonzero(rows < own, axis=1) + np.count_nonzero(rows[:, :expert] == own, axis=1)
        near[start : start + len(rows)] = rank < top_k
    return [near[begin:end] for begin, end in pairwise(offsets)]


def score_documents(
    model: "nn.Module",
    rows: Sequence[NDArray[np.int64]],
    config: ScoreConfig,
    *,
    context_length: int,
    facts: dict[str, Any],
    folder: Path,
    prefix_token: int | None = None,
    needed: Sequence[NDArray[np.bool_]] | None = None,
    blocks: ScoreBlocks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score all documents and write log_probs.npy, offsets.npy and scores.json.

    The share of compute counts 2 FLOPs for each weight of the model's body and token that is fed, padding included,
    and 2 for each weight of the head and token that is scored. Attention over the context is left out: a window that
    is cut short saves more of it than of the rest.

    Args:
        model: A Hugging Face causal language model.
        rows: Token ids of each document, from `scored_rows`: the first is given, the others are scored.
        config: Settings.
        context_length: Most tokens that are fed to the model at once.
        facts: What the scores belong to, written to scores.json.
        folder: Output folder.
        prefix_token: Token in front of every window, where the model was trained with one.
        needed: For each document which of its tokens to score, shape (tokens - 1,); the others become NaN. None
            scores all.
        blocks: Where finished blocks are saved and looked for; None scores all in one go.
        progress: Called with tokens scored so far and in all.

    Returns:
        `facts` with documents, tokens, tokens_scored, forward_passes, tokens_fed (padding and prefix tokens included;
        blocks of an interrupted scoring count), compute_share (over that of scoring every token), body_share (part of a
        forward pass's work at one token that is done before the head), and negative_log_prob (mean over the scored
        tokens in nats; None where there is none, or it is infinite).

    Raises:
        DataError: If there is no document, the marks of needed tokens are not one a token, or the model gives NaN.
        Interrupted: On SIGTERM or SIGINT, between two forward passes; finished blocks stay.
    """
    from cbtm.train.ranks import choose_device

    if len(rows) == 0:
        raise DataError("the validation split holds no document")
    # Score token t of a document at offsets[d] + t - 1: the first token has no probability.
    offsets = np.cumsum([0, *(max(len(row) - 1, 0) for row in rows)], dtype=np.int64)
    if needed is not None:
        _check_marks(needed, offsets)
    device = choose_device("auto")
    batch_tokens = min(config.max_batch_tokens, _CPU_BATCH_TOKENS) if device.type == "cpu" else config.max_batch_tokens
    prefix = () if prefix_token is None else (prefix_token,)
    limit = context_length - len(prefix)
    plan = _Plan(rows, needed, limit, min(config.stride or limit, limit), batch_tokens, prefix)
    bounds = block_bounds(offsets, config.block_tokens)
    score_block = partial(_score_block, plan, _scores_of(model.to(device), config.threads), offsets)
    n_needed = None if needed is None else sum(int(np.count_nonzero(marks)) for marks in needed)
    out, fed = score_blocks(score_block, offsets, bounds, blocks, progress, n_needed=n_needed)
    weights = _weights(model)
    n_scored = int(np.count_nonzero(~np.isnan(out)))
    mean = -float(np.nansum(out, dtype=np.float64)) / n_scored if n_scored else np.inf
    result = {
        **facts,
        "documents": len(rows),
        "tokens": len(out),
        "tokens_scored": n_scored,
        "forward_passes": fed.forward_passes,
        "tokens_fed": fed.tokens,
        "compute_share": _compute_share(weights, plan, bounds, fed, n_scored, len(out)),
        "body_share": weights[0] / sum(weights) if sum(weights) else 1.0,
        "negative_log_prob": mean if np.isfinite(mean) else None,
    }
    np.save(folder / LOG_PROBS_FILE, out)
    np.save(folder / OFFSETS_FILE, offsets)
    (folder / SCORES_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _check_marks(needed: Sequence[NDArray[np.bool_]], offsets: NDArray[np.int64]) -> None:
    if len(needed) != len(offsets) - 1:
        raise DataError(f"marks of needed tokens for {len(needed)} documents, but there are {len(offsets) - 1}")
    for document, (marks, n_tokens) in enumerate(zip(needed, np.diff(offsets).tolist(), strict=True)):
        if len(marks) != n_tokens:
            raise DataError(
                f"document {document} has {len(marks)} marks of needed tokens for its {n_tokens} scored ones"
            )


@dataclass(frozen=True)
class _Plan:
    """What is fed together, which depends on nothing but the documents and the settings.

    Attributes:
        limit: Most tokens of a document that a window feeds.
        stride: Tokens that each of its windows moves on.
        batch_tokens: Most tokens that are fed at once, unless a window has more.
    """

    rows: Sequence[NDArray[np.int64]]
    needed: Sequence[NDArray[np.bool_]] | None
    limit: int
    stride: int
    batch_tokens: int
    prefix: tuple[int, ...]

    def batches(self, first: int, end: int) -> Iterator[list[Window]]:
        """Windows of documents first … end, those of similar length together so that little is padded."""
        pieces = [window for document in range(first, end) for window in self._windows(document)]
        pieces.sort(key=lambda window: (window.n_fed, window.document, window.begin))
        batch: list[Window] = []
        for piece in pieces:
            # Sorted by length: the newest piece is the longest of its batch.
            if batch and (len(batch) + 1) * piece.n_fed > self.batch_tokens:
                yield batch
                batch = []
            batch.append(piece)
        if batch:
            yield batch

    def _windows(self, document: int) -> Iterator[Window]:
        length = len(self.rows[document])
        for window in windows(length, context_length=self.limit, stride=self.stride, document=document):
            marks = self._marks(window)
            if marks is None:
                yield window
            elif marks.any():  # what follows the last needed token is not fed
                yield replace(window, end=window.first + int(np.flatnonzero(marks)[-1]) + 1)

    def _marks(self, window: Window) -> NDArray[np.bool_] | None:
        """Which of the tokens that a window scores are needed."""
        return None if self.needed is None else self.needed[window.document][window.first - 1 : window.end - 1]

    def fed(self, batch: list[Window]) -> Fed:
        """What a batch costs."""
        return Fed(1, len(batch) * (len(self.prefix) + batch[-1].n_fed))

    def scored_places(self, window: Window) -> slice:
        """Where the scored tokens of a window are among its targets."""
        n_prefix = len(self.prefix)
        return slice(n_prefix + window.first - window.begin - 1, n_prefix + window.n_fed)

    def arrays(self, batch: list[Window]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, int64 (B, T), targets `IGNORED` where nothing is scored.

        Padded behind: a causal model's scores do not depend on what follows.
        """
        shape = (len(batch), len(self.prefix) + batch[-1].n_fed)
        inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        inputs[:, : len(self.prefix)] = self.prefix
        for given, wanted, window in zip(inputs, targets, batch, strict=True):
            row = self.rows[window.document]
            given[len(self.prefix) : len(self.prefix) + window.n_fed] = row[window.begin : window.end - 1]
            marks = self._marks(window)
            scored = row[window.first : window.end]
            wanted[self.scored_places(window)] = scored if marks is None else np.where(marks, scored, IGNORED)
        return inputs, targets


def _scores_of(model: "nn.Module", threads: int | None) -> Score:
    """Log-probabilities of targets under a model, on its device."""
    import torch

    from cbtm.train.loss import CausalLoss

    if threads is not None:
        torch.set_num_threads(threads)
    device = next(model.parameters()).device
    loss = CausalLoss(model.eval())

    def score(inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float32]:
        found = loss.log_probs(
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(targets).to(device),
            n_targets=int(np.count_nonzero(targets != IGNORED)),
        )
        values: NDArray[np.float32] = found.cpu().numpy()
        return values

    return score


def _score_block(
    plan: _Plan,
    score: Score,
    offsets: NDArray[np.int64],
    first: int,
    end: int,
    stop: "threading.Event",
    count: Callable[[int], None],
) -> Block | None:
    """Scores of the documents first … end, or None where there is a request to stop."""
    begin = int(offsets[first])
    out, fed, n_wanted = np.full(int(offsets[end]) - begin, np.nan, dtype=np.float32), Fed(), 0
    for batch in plan.batches(first, end):
        if stop.is_set():
            return None
        inputs, targets = plan.arrays(batch)
        scores = np.where(targets == IGNORED, np.float32(np.nan), score(inputs, targets))
        for window, row in zip(batch, scores, strict=True):
            start = int(offsets[window.document]) + window.first - 1 - begin
            out[start : start + window.end - window.first] = row[plan.scored_places(window)]
        n_new = int(np.count_nonzero(targets != IGNORED))
        fed, n_wanted = fed + plan.fed(batch), n_wanted + n_new
        count(n_new)
    if missing := n_wanted - int(np.count_nonzero(~np.isnan(out))):
        raise DataError(f"{missing} of {n_wanted} scores are NaN: the model's weights are broken")
    return Block(first, end, out, fed)


def _compute_share(
    weights: tuple[int, int], plan: _Plan, bounds: Sequence[tuple[int, int]], fed: Fed, n_scored: int, n_tokens: int
) -> float:
    """FLOPs of what was fed and scored over those of feeding and scoring everything."""
    if plan.needed is None:
        return 1.0
    dense = replace(plan, needed=None)
    full = sum(dense.fed(batch).tokens for first, end in bounds for batch in dense.batches(first, end))
    body, head = weights
    whole = body * full + head * n_tokens
    return (body * fed.tokens + head * n_scored) / whole if whole else 1.0


def _weights(model: Any) -> tuple[int, int]:
    """Parameters that each fed token is multiplied with, and those of the head; what is looked up is neither."""
    from torch import nn

    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    body = sum(one.numel() for one in model.parameters() if id(one) not in looked_up | of_head)
    return body, 0 if head is None else int(head.weight.numel())
