"""Every ensemble setting in one pass over the stored scores: what `cbtm.merge.ensembles` defines, made quick.

Sixty settings of a hundred experts over a million tokens are 10^10 weights, so nothing is done twice. The experts of a
token are sorted by weight, and since settings of one temperature differ in where the sorted list ends, running sums of
weight times probability and of weight give every top-k at once. Temperature and exponent do not change the order of
the distances, so clustering sorts once for all of them; the other kinds sort once for each temperature and exponent.

Tokens go through in chunks that stay in a core's cache, from documents that are never shared between threads: results
do not depend on their number, and scores may be memory maps.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError, DataError
from cbtm.merge.log_space import best_expert, check_offsets, log_closeness, log_prior, log_weights_or
from cbtm.merge.ranked import Kept, mix_prefixes, rank, ranked_cells

EnsembleType = Literal["clustering", "product_of_experts", "bayes", "posterior", "uniform", "prior", "oracle"]
_ROUTED = ("clustering", "product_of_experts")
# Chunks of 1 MiB of float64: of 2^15 to 2^19 elements the quickest at 128 experts.
_CHUNK_ELEMENTS = 2**17
# Documents that one thread takes at a time.
_UNIT_ELEMENTS = 2**21

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Indices = NDArray[np.intp]
# Numbers of the settings of each top-k that have all else in common.
_Family = dict[int, list[int]]


@dataclass(frozen=True)
class Setting:
    """One ensemble.

    Attributes:
        ensemble: Its kind, as the function of that name in `cbtm.merge.ensembles`; prior is `fixed_prior`.
        top_k: Experts kept at each token; of no meaning for uniform, prior and oracle.
        temperature: Temperature of the routing weights, for clustering and product_of_experts; None for the others.
        distance_power: Exponent of the distance, for the same.
    """

    ensemble: EnsembleType
    top_k: int
    temperature: float | None = None
    distance_power: float | None = None


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the counted tokens of each document, of one setting; all of shape (n_documents,).

    Attributes:
        nll: Negative natural log-probabilities, float64; inf where a token is impossible.
        experts_used: Experts with weight above 0, float64.
        entropy: Entropies of the weights in nats, float64.
        impossible: Tokens to which no expert with weight gives a probability, int64.
        passes: Token-passes of all experts, counted or not, int64. Under clustering an expert reads a document up to
            the last token that has it among the top-k; uniform and prior read all of it with each expert that has
            weight. Ensembles that weigh by the experts' own probabilities, and the oracle, read all of it with all.
    """

    nll: Array
    experts_used: Array
    entropy: Array
    impossible: NDArray[np.int64]
    passes: NDArray[np.int64]


def mix_grid(
    experts: Sequence[Floats],
    distances: Floats,
    offsets: NDArray[np.int64],
    settings: Sequence[Setting],
    *,
    prior: Floats | None = None,
    counted: NDArray[np.bool_] | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[DocumentSums]:
    """Mix the experts in every setting.

    Args:
        experts: Natural log-probability of each token under each expert, shape (n_tokens,) each; -inf is an impossible
            token, NaN one that was not scored, which is allowed where no setting looks. Clustering looks at the top-k
            experts of counted tokens; uniform, oracle and prior (where that is above 0) at all experts of counted
            tokens; the others at everything.
        distances: Euclidean distances from each token's context to the centres, shape (n_tokens, k).
        offsets: Where each document begins, and the end, shape (n_documents + 1,).
        settings: The ensembles.
        prior: Weights of the prior ensemble and prior weights of bayes and posterior, shape (k,), summing to 1; None
            is uniform for the last two.
        counted: Which tokens count, shape (n_tokens,); None counts all. The others are context all the same, but the
            oracle chooses by those that count.
        threads: Threads over documents.
        progress: Called with tokens done and in all.

    Returns:
        The sums of each setting, in their order.

    Raises:
        ConfigError: If a setting is out of range or lacks what it needs.
        DataError: If shapes disagree, or a score or distance that a setting looks at is no log-probability or distance.
    """
    _check_shapes(experts, distances, offsets, counted)
    for setting in settings:
        _check_setting(setting, len(experts), prior)
    if threads < 1:
        raise ConfigError(f"threads={threads} is below 1")
    job = _Job(experts, distances, offsets, settings, log_prior(prior, len(experts)), counted)
    # glibc hands freed arrays of a chunk's size back to the kernel until it has seen a larger one go (mallopt(3),
    # M_MMAP_THRESHOLD); to get them again, cleared, was measured to take more than half of the time.
    np.empty(16 * _CHUNK_ELEMENTS)
    units, done, total = _units(offsets, len(experts)), 0, int(offsets[-1])

    def work(unit: tuple[int, int]) -> int:
        with np.errstate(divide="ignore", over="ignore", under="ignore"):  # of this thread alone
            return _Worker(job).run(*unit)

    with ThreadPoolExecutor(threads) as pool:
        for tokens in pool.map(work, units) if threads > 1 else map(work, units):
            done += tokens
            if progress is not None:
                progress(done, total)
    return job.sums


class _Job:
    """What all threads read, and the sums, of which each writes those of its documents."""

    def __init__(
        self,
        experts: Sequence[Floats],
        distances: Floats,
        offsets: NDArray[np.int64],
        settings: Sequence[Setting],
        before: Array,
        counted: NDArray[np.bool_] | None,
    ) -> None:
        self.experts, self.distances, self.offsets, self.counted = experts, distances, offsets, counted
        self.before = before
        # (temperature, exponent) -> top-k -> settings, for each kind
        self.kinds: dict[EnsembleType, dict[tuple[float, float], _Family]] = {}
        self.sums: list[DocumentSums] = []
        n_documents, lengths = len(offsets) - 1, np.diff(offsets).astype(np.int64)
        for number, setting in enumerate(settings):
            key = (setting.temperature or 0.0, setting.distance_power or 0.0)
            self.kinds.setdefault(setting.ensemble, {}).setdefault(key, {}).setdefault(setting.top_k, []).append(number)
            # Of clustering with a top-k below all, this is set chunk by chunk.
            passes = lengths * int(np.isfinite(before).sum() if setting.ensemble == "prior" else len(experts))
            nll, used, entropy = np.zeros((3, n_documents))
            self.sums.append(DocumentSums(nll, used, entropy, np.zeros(n_documents, np.int64), passes))


class _Worker:
    """Takes whole documents through in chunks of tokens; what an unfinished document needs next is carried over."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        n_experts = len(job.experts)
        self._last_scores = np.zeros(n_experts)
        self._read = np.zeros(n_experts)  # log-probability of the document so far
        self._reached: dict[int, NDArray[np.int64]] = {}  # passes of each expert, by top-k
        self._oracle_totals = np.zeros((2, n_experts))  # impossible tokens, log-probability of the others

    def run(self, first: int, last: int) -> int:
        """Add up the documents from `first` up to but without `last`; gives the number of their tokens."""
        begin, end = int(self._job.offsets[first]), int(self._job.offsets[last])
        step = max(1, _CHUNK_ELEMENTS // len(self._job.experts))
        for at in range(begin, end, step):
            self._load(slice(at, min(at + step, end)))
            for kind, families in self._job.kinds.items():
                if kind == "clustering":
                    self._clustering(families)
                elif kind == "oracle":
                    self._oracle(families)
                elif kind in ("uniform", "prior"):
                    self._constant(kind, families)
                else:
                    self._by_probability(kind, families)
            self._last_scores = self._scores[-1]
        return end - begin

    def _load(self, tokens: slice) -> None:
        job = self._job
        self._tokens = tokens
        owner = np.searchsorted(job.offsets, np.arange(tokens.start, tokens.stop), side="right") - 1  # (t,)
        self._starts = np.flatnonzero(np.diff(owner, prepend=-1))  # first token in this chunk of each document
        self._documents = owner[self._starts]
        self._position = np.arange(tokens.start, tokens.stop) - job.offsets[owner]  # in the document
        self._scores = np.stack([row[tokens] for row in job.experts]).T.astype(np.float64, order="C")  # (t, k)
        self._counted = np.arange(len(owner)) if job.counted is None else np.flatnonzero(job.counted[tokens])
        self._counted_starts = np.flatnonzero(np.diff(owner[self._counted], prepend=-1))
        self._counted_documents = owner[self._counted][self._counted_starts]

    def _of_counted(self, values: NDArray[Any]) -> NDArray[Any]:
        """Rows of the tokens that count, of those of the chunk."""
        return values if len(self._counted) == len(values) else values[self._counted]

    def _clustering(self, families: dict[tuple[float, float], _Family]) -> None:
        bounds = sorted({top_k for family in families.values() for top_k in family})
        distances = self._near([power for _, power in families])
        order = rank(distances, bounds)  # (t, largest top-k)
        self._count_passes(order, bounds, families)
        if not len(self._counted):
            return
        cells = ranked_cells(self._of_counted(order), self._counted, len(self._job.experts))  # (largest top-k, n)
        kept = Kept(self._checked(self._scores.ravel().take(cells), self._of_counted(order).T))
        near = distances.ravel().take(cells).astype(np.float64)
        energies = {power: near**power for _, power in families}
        for (temperature, power), family in families.items():
            logs = log_closeness(energies[power][: max(family)].T, temperature).T
            self._add(family, logs, kept, weights_underflow=True)

    def _by_probability(self, kind: EnsembleType, families: dict[tuple[float, float], _Family]) -> None:
        scores, before = self._checked(self._scores.T).T, self._job.before
        first = self._position == 0
        previous = np.concatenate([self._last_scores[np.newaxis], scores[:-1]])  # of no meaning for first tokens
        energies = self._energies(families) if kind == "product_of_experts" else {}
        for (temperature, power), family in families.items():
            if kind == "product_of_experts":
                closeness = log_closeness(energies[power], temperature)
                logs = log_weights_or(closeness + previous, closeness)
                logs[first] = 0
            elif kind == "bayes":
                logs = log_weights_or(before + previous, before)
                logs[first] = before
            else:
                logs = log_weights_or(before + self._read_before(), before)
            self._by_weight(family, logs)

    def _energies(self, families: dict[tuple[float, float], _Family]) -> dict[float, Array]:
        near = self._near([power for _, power in families]).astype(np.float64)
        return {power: near**power for _, power in families}

    def _read_before(self) -> Array:
        """Log-probability of the text of the document before each token, shape (t, k)."""
        read = np.zeros_like(self._scores)
        ends = [*self._starts[1:].tolist(), len(read)]
        for begin, end in zip(self._starts.tolist(), ends, strict=True):
            if self._position[begin] > 0:
                read[begin] = self._read
            # In the order of the tokens, whatever the chunks, as in the definition.
            read[begin + 1 : end] = self._scores[begin : end - 1]
            np.cumsum(read[begin:end], axis=0, out=read[begin:end])
        self._read = read[-1] + self._scores[-1]
        return read

    def _by_weight(self, family: _Family, logs: Array) -> None:
        """Add settings whose weights have these logarithms, shape (t, k), up to a constant for each token."""
        if not len(self._counted):
            return
        bounds, n_experts = sorted(family), logs.shape[1]
        if bounds == [n_experts]:
            chosen = np.ascontiguousarray(self._of_counted(logs).T)
            kept = Kept(np.ascontiguousarray(self._of_counted(self._scores).T))
        else:
            cells = ranked_cells(rank(-self._of_counted(logs), bounds), self._counted, n_experts)
            chosen = logs.ravel().take(cells)
            kept = Kept(self._scores.ravel().take(cells))
        chosen -= chosen.max(axis=0)
        self._add(family, chosen, kept)

    def _constant(self, kind: EnsembleType, families: dict[tuple[float, float], _Family]) -> None:
        before = self._job.before if kind == "prior" else np.zeros(len(self._job.experts))
        with_weight = np.flatnonzero(np.isfinite(before))
        if len(self._counted):
            logs = (before - before.max())[with_weight, np.newaxis]
            scores = self._checked(self._of_counted(self._scores).T[with_weight], with_weight[:, np.newaxis])
            self._add({len(with_weight): _numbers(families)}, np.broadcast_to(logs, scores.shape), Kept(scores))

    def _oracle(self, families: dict[tuple[float, float], _Family]) -> None:
        seen = np.zeros_like(self._scores)
        seen[self._counted] = self._checked(self._of_counted(self._scores).T).T
        impossible = np.isneginf(seen)
        seen[impossible] = 0
        counts = np.add.reduceat(impossible, self._starts, axis=0, dtype=np.float64)  # (documents, k)
        totals = np.add.reduceat(seen, self._starts, axis=0)
        if self._position[0] > 0:
            counts[0] += self._oracle_totals[0]
            totals[0] += self._oracle_totals[1]
        self._oracle_totals = np.stack([counts[-1], totals[-1]])
        # The best so far; the last chunk of a document has seen all of it.
        best = best_expert(counts, totals)[:, np.newaxis]
        count, total = (np.take_along_axis(values, best, axis=1)[:, 0] for values in (counts, totals))
        used = np.diff(self._counted_starts, append=len(self._counted))
        for number in _numbers(families):
            sums = self._job.sums[number]
            sums.nll[self._documents] = np.where(count > 0, np.inf, 0 - total)
            sums.impossible[self._documents] = count.astype(np.int64)
            sums.experts_used[self._counted_documents] += used

    def _add(self, family: _Family, logs: Array, kept: Kept, *, weights_underflow: bool = False) -> None:
        """Add settings that keep the first so many experts, as `mix_prefixes` has them."""
        bounds = sorted(family)
        measured = mix_prefixes(logs, kept, bounds, weights_underflow=weights_underflow)
        for name, values in measured._asdict().items():
            parts = np.add.reduceat(values, self._counted_starts, axis=1)  # (bounds, documents)
            for bound, part in zip(bounds, parts, strict=True):
                for number in family[bound]:
                    getattr(self._job.sums[number], name)[self._counted_documents] += part

    def _count_passes(self, order: Indices, bounds: list[int], families: dict[tuple[float, float], _Family]) -> None:
        n_experts, begin = len(self._job.experts), 0
        reached = np.zeros((len(self._documents), n_experts), dtype=np.int64)
        local = np.repeat(np.arange(len(self._starts)), np.diff(self._starts, append=len(order)))
        for bound in (bound for bound in bounds if bound < n_experts):
            cells = local[:, np.newaxis] * n_experts + order[:, begin:bound]
            until = np.broadcast_to(self._position[:, np.newaxis] + 1, cells.shape)
            np.maximum.at(reached.ravel(), cells.ravel(), until.ravel())
            if self._position[0] > 0 and bound in self._reached:
                np.maximum(reached[0], self._reached[bound], out=reached[0])
            self._reached[bound] = reached[-1].copy()
            passes = reached.sum(axis=1)  # so far; the last chunk of a document has seen all of it
            for number in [number for family in families.values() for number in family.get(bound, [])]:
                self._job.sums[number].passes[self._documents] = passes
            begin = bound

    def _near(self, powers: list[float]) -> Floats:
        """Distances of the chunk's tokens, shape (t, k), checked as by `routing_weights`."""
        distances = np.ascontiguousarray(self._job.distances[self._tokens])
        # NaN fails both comparisons.
        if not (distances.min() >= 0 and np.isfinite(np.float64(distances.max()) ** max(powers))):
            raise DataError(
                f"distances of tokens {self._tokens.start} to {self._tokens.stop - 1} run from {distances.min()} to "
                f"{distances.max()}; expected finite ones of at least 0, also raised to distance_power={max(powers)}"
            )
        return distances

    def _checked(self, scores: Array, experts: Indices | None = None) -> Array:
        """The scores, shape (rows, tokens of the chunk or counted ones); `experts` says whose they are."""
        if (scores <= 0).all():
            return scores
        row, column = (int(found[0]) for found in np.nonzero(~(scores <= 0)))
        whose = row if experts is None else int(np.broadcast_to(experts, scores.shape)[row, column])
        among = self._counted if scores.shape[1] == len(self._counted) else np.arange(scores.shape[1])
        raise DataError(
            f"log-probability {scores[row, column]} at token {self._tokens.start + among[column]} of expert {whose} is "
            "not in [-inf, 0]; the scores are damaged, were not made, or are not natural log-probabilities: score that "
            "expert again"
        )


def _numbers(families: dict[tuple[float, float], _Family]) -> list[int]:
    return [number for family in families.values() for those in family.values() for number in those]


def _units(offsets: NDArray[np.int64], n_experts: int) -> list[tuple[int, int]]:
    """Ranges of whole documents of about equal work."""
    size, n_documents, units = max(1, _UNIT_ELEMENTS // n_experts), len(offsets) - 1, []
    first = 0
    while first < n_documents:
        last = int(np.searchsorted(offsets, offsets[first] + size, side="right")) - 1
        units.append((first, max(last, first + 1)))
        first = units[-1][1]
    return units


def _check_shapes(
    experts: Sequence[Floats], distances: Floats, offsets: NDArray[np.int64], counted: NDArray[np.bool_] | None
) -> None:
    if distances.ndim != 2 or distances.shape[1] != len(experts) or not len(experts):
        raise DataError(
            f"distances of shape {distances.shape} for {len(experts)} experts; expected (tokens, experts), at least one"
        )
    check_offsets(offsets, len(distances))
    for number, row in enumerate(experts):
        if row.shape != (len(distances),):
            raise DataError(
                f"scores of expert {number} of shape {row.shape}; expected {(len(distances),)}, as distances"
            )
    if counted is not None and (counted.shape != (len(distances),) or counted.dtype != np.bool_):
        raise DataError(
            f"counted has shape {counted.shape} and dtype {counted.dtype}; expected a truth value for each of "
            f"{len(distances)} tokens"
        )


def _check_setting(setting: Setting, n_experts: int, prior: Floats | None) -> None:
    if setting.ensemble not in get_args(EnsembleType):
        raise ConfigError(f"ensemble={setting.ensemble!r} is not one of {', '.join(get_args(EnsembleType))}")
    if not 1 <= setting.top_k <= n_experts:
        raise ConfigError(
            f"top_k={setting.top_k} of {setting.ensemble} is not in [1, {n_experts}], the number of experts"
        )
    for name, value in (("temperature", setting.temperature), ("distance_power", setting.distance_power)):
        if setting.ensemble not in _ROUTED:
            if value is not None:
                raise ConfigError(f"{name}={value} is set for {setting.ensemble}, which does not look at distances")
        elif value is None or not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}={value} of {setting.ensemble} is not a positive finite number")
    if setting.ensemble == "prior" and prior is None:
        raise ConfigError("the prior ensemble takes its weights from prior, which is None")
