"""The held-out documents, the scores of their tokens, and how far the text before each token lies from each domain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import DataError, ManifestError
from cbtm.merge.config import RoutingConfig
from cbtm.merge.router import PrefixRouter, context_positions

_LOTS = 20230324  # any number; another one would be another benchmark


@dataclass(frozen=True)
class ValidationSet:
    """What is evaluated on, in the order of the scores.

    Attributes:
        texts: Text of each document.
        tokens: Token ids of each document: the first is given, the others are scored.
        clusters: Nearest cluster of each document, shape (n_documents,).
        n_bytes: UTF-8 bytes of each document that its counted tokens spell, shape (n_documents,).
        counted: For each document, which of its scored tokens count; None counts all.
        first: Which token of its document a row begins with: 0 is the separator, 1 the first of the text.
        sp_ids: Identity of each document in the corpus.
        labels: Known domain of each document, where it has one; None where there are no labels.
        choosing: Documents that settings are chosen on, shape (n_documents,); the others are reported on. None is every
            second one, from the first.
    """

    texts: Sequence[str]
    tokens: Sequence[NDArray[np.int64]]
    clusters: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    counted: Sequence[NDArray[np.bool_]] | None = None
    first: int = 0
    sp_ids: Sequence[str] | None = None
    labels: Sequence[str | None] | None = None
    choosing: NDArray[np.bool_] | None = None

    @property
    def selection(self) -> NDArray[np.bool_]:
        """Documents that settings are chosen on; shape (n_documents,)."""
        return np.arange(len(self.tokens)) % 2 == 0 if self.choosing is None else self.choosing

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document's scores begin, and the end; shape (n_documents + 1,)."""
        return token_offsets(self.tokens)

    @property
    def n_counted(self) -> NDArray[np.int64]:
        """Tokens of each document that count; shape (n_documents,)."""
        if self.counted is None:
            return np.diff(self.offsets)
        return np.array([np.count_nonzero(row) for row in self.counted], dtype=np.int64)

    def check(self) -> None:
        """Refuse what nothing can be measured on.

        Raises:
            DataError: If there are fewer than two documents in either half; one of them has no token, or none that
                counts; or tokens and their marks do not fit.
        """
        halves = np.bincount(self.selection, minlength=2)  # reported, choosing
        if halves.min() < 2:
            raise DataError(
                f"the validation split has {len(self.tokens)} documents that can be scored, {halves[1]} of them to "
                f"choose the temperature and {halves[0]} to report on; at least 2 of each are needed"
            )
        lengths = np.diff(self.offsets)
        if (empty := np.flatnonzero(lengths == 0)).size:
            raise DataError(
                f"the tokenizer makes no token of validation document {empty[0]}; remove it from the corpus"
            )
        if self.counted is None:
            return
        marked = [len(row) for row in self.counted]
        if marked != lengths.tolist():
            raise DataError(
                f"the marks of counted tokens are {sum(marked)} for {len(marked)} documents, the tokens "
                f"{lengths.sum()} for {len(lengths)}; run the assign stage again"
            )
        if (empty := np.flatnonzero(self.n_counted == 0)).size:
            raise DataError(
                f"validation document {empty[0]} has no token after its prompt, so nothing of it counts; "
                "remove it from the corpus"
            )


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities of all validation tokens, float32 of shape (n_tokens,) each, by member.

    Arrays may be memory maps. Those of the experts hold NaN where `top_k` says that a token was not scored.

    Attributes:
        seed: Under the seed model.
        experts: Under each expert, in the order of the clusters.
        dense: Under the dense model, where it was trained.
        random: Under each random-cluster expert, where they were trained.
        averages: Under each average of the experts' parameters, by name.
        clusters: Cluster of each expert, in ascending order; None where every cluster has one.
        top_k: How many nearest experts each token was scored under; None is all.
    """

    seed: NDArray[np.float32]
    experts: Sequence[NDArray[np.float32]]
    dense: NDArray[np.float32] | None = None
    random: Sequence[NDArray[np.float32]] | None = None
    averages: dict[str, NDArray[np.float32]] | None = None
    clusters: Sequence[int] | None = None
    top_k: int | None = None


def token_offsets(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Where the scores of each row begin, and the end; shape (rows + 1,). The first token of a row has none."""
    return np.cumsum([0, *(len(row) - 1 for row in rows)], dtype=np.int64)


def evenly_spaced(n_documents: int, at_most: int | None) -> NDArray[np.int64]:
    """Places of the documents that are scored: all, or exactly `at_most`, with the same mixture of domains.

    Half of them, and of an odd number one more, are among those that `selection_documents` marks: a document is in the
    same half however many are scored, so that what a training was validated on is never reported on.
    """
    count = n_documents if at_most is None else min(at_most, n_documents)
    chosen = selection_documents(n_documents)
    halves = ((np.flatnonzero(chosen), (count + 1) // 2), (np.flatnonzero(~chosen), count // 2))
    places = [half[np.arange(share) * len(half) // max(share, 1)] for half, share in halves]
    return np.sort(np.concatenate(places)).astype(np.int64)


def selection_documents(n_documents: int) -> NDArray[np.bool_]:
    """Mark the validation documents that settings are chosen on; the others are reported on.

    One of each two neighbours, by lot, and the last of an odd number: neighbours in a corpus are often of one kind, so
    that both halves have about the same mixture, and kinds that take turns do not meet a rule that takes turns as well.
    The lots are the same for every clusterer and on every machine.

    Args:
        n_documents: All documents of the validation split, in the order of the corpus.

    Returns:
        Mask of shape (n_documents,).
    """
    n_pairs = -(-n_documents // 2)
    # Raw bits of a generator do not change between versions of numpy; what is drawn from them may.
    first = np.atleast_1d(np.random.PCG64(_LOTS).random_raw(n_pairs)) >> np.uint64(63) == 0
    mask: NDArray[np.bool_] = np.stack([first, ~first], axis=1).ravel()[:n_documents]
    mask[2 * (n_documents // 2) :] = True
    return mask


def context_distances(
    router: PrefixRouter,
    tokenizer: TextTokenizer,
    validation: ValidationSet,
    routing: RoutingConfig | None = None,
    *,
    out: NDArray[np.float32] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Distance of the text before every scored token to every cluster centre, shape (n_tokens, k).

    Args:
        router: The router.
        tokenizer: The tokenizer that made the tokens.
        validation: The documents.
        routing: Which part of the text before a token counts; None is all of it.
        out: Where to write, of that shape, such as a memory map; None makes an array.
        progress: Called with documents done and in all.

    Raises:
        ManifestError: If the tokenizer cuts a text otherwise than when the scores were made.
    """
    routing = routing or RoutingConfig()
    offsets = validation.offsets
    if out is None:
        out = np.empty((int(offsets[-1]), router.n_clusters), dtype=np.float32)
    for index, (text, tokens) in enumerate(zip(validation.texts, validation.tokens, strict=True)):
        starts = token_starts(tokenizer, text, tokens, validation.first, index)
        prompt = 0
        if validation.counted is not None:
            prompt = int(np.argmax(validation.counted[index])) if validation.counted[index].any() else 0
        places = context_positions(
            len(tokens) - 1,
            prompt=prompt,
            refresh=routing.refresh,
            context_ratio=routing.context_ratio,
            lag=routing.lag,
        )
        out[offsets[index] : offsets[index + 1]] = router.distances(text, starts[places])
        if progress is not None:
            progress(index + 1, len(validation.texts))
    return out


def token_starts(
    tokenizer: TextTokenizer, text: str, tokens: NDArray[np.int64], first: int, index: int
) -> NDArray[np.int64]:
    """Character at which each token of a row begins, shape (len(tokens),).

    Raises:
        ManifestError: If the tokenizer cuts the text otherwise.
    """
    again, starts = tokenizer.encode_with_starts(text)
    row = slice(first, first + len(tokens))
    if not np.array_equal(again[row], tokens):
        raise ManifestError(
            f"validation document {index} has {len(again)} tokens now, which are not the {len(tokens)} in the token "
            "shards: tokenizer or corpus changed since the documents were assigned; run the assign stage again"
        )
    return starts[row]
