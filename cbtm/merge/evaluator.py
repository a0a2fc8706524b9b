"""The evaluator stage: every ensemble setting at once, from scores and distances alone.

The weights of the experts at a token come from the text before it (Gururangan et al. 2023, equations 2 and 3), so
one pass over the text gives the distances, and temperature, exponent and top-k are arithmetic. Temperature and
exponent are chosen on one half of the validation documents; everything is reported on the other half.

Where experts of some clusters only were trained, the ensemble mixes those: weights are over the distances to their
centres, and documents of the other clusters are evaluated all the same. Where documents have prompts, the tokens of
a prompt are context: they route and they condition, but they do not count.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.config import Config
from cbtm.errors import ConfigError, DataError, ManifestError
from cbtm.merge.ensembles import (
    bits_per_byte,
    bootstrap_interval,
    clustering,
    experts_used,
    paired_bootstrap_interval,
    uniform,
)
from cbtm.merge.router import PrefixRouter, routing_weights

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]


class EvaluateConfig(Config):
    """Which ensembles are compared.

    Attributes:
        temperatures: Temperatures of the routing weights.
        distance_powers: Exponents of the distance: 2 in the paper, 4 in the reference code.
        top_k: Experts kept at each token; None takes all, half of them, and so on down to one.
        bootstrap_resamples: Resamples of documents behind each 95 % interval.
        random_state: Seed of the resampling.
    """

    temperatures: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    distance_powers: tuple[float, ...] = (2, 4)
    top_k: Annotated[tuple[int, ...], Field(min_length=1)] | None = None
    bootstrap_resamples: int = Field(default=1000, ge=100)
    random_state: int = Field(default=0, ge=0)

    @field_validator("temperatures", "distance_powers")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(np.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"expected one or more numbers above 0, got {list(values)}")
        return values

    def top_k_values(self, n_experts: int, *, n_clusters: int | None = None) -> list[int]:
        """The top-k settings for so many experts, largest first.

        Args:
            n_experts: Experts that were trained.
            n_clusters: Clusters that there are, where these may be more.

        Raises:
            ConfigError: If one is not in [1, n_experts].
        """
        if self.top_k is None:
            values = [n_experts]
            while values[-1] > 1:
                values.append(values[-1] // 2)
            return values
        wrong = [value for value in self.top_k if not 1 <= value <= n_experts]
        if wrong and n_clusters in (None, n_experts):
            raise ConfigError(f"evaluate.top_k={wrong[0]} is not in [1, cluster.n_clusters={n_experts}]")
        if wrong:
            raise ConfigError(
                f"evaluate.top_k={wrong[0]} is not in [1, {n_experts}]: train.clusters names {n_experts} of "
                f"cluster.n_clusters={n_clusters} clusters, and there are no more experts"
            )
        return sorted(set(self.top_k), reverse=True)


@dataclass(frozen=True)
class ValidationSet:
    """What is evaluated on, in the order of the scores.

    Attributes:
        texts: Text of each document.
        tokens: Token ids of each document, separator first.
        clusters: Nearest cluster of each document, shape (n_documents,).
        n_bytes: UTF-8 bytes of each document that its counted tokens spell, shape (n_documents,).
        counted: For each document, which of its tokens count, the separator left out; None counts all.
    """

    texts: Sequence[str]
    tokens: Sequence[NDArray[np.int64]]
    clusters: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    counted: Sequence[NDArray[np.bool_]] | None = None

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each document's scores begin, and the end; shape (n_documents + 1,)."""
        return np.concatenate([[0], np.cumsum([len(row) - 1 for row in self.tokens])]).astype(np.int64)

    @property
    def n_counted(self) -> NDArray[np.int64]:
        """Tokens of each document that count; shape (n_documents,)."""
        if self.counted is None:
            return np.diff(self.offsets)
        return np.array([np.count_nonzero(row) for row in self.counted], dtype=np.int64)


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities of all validation tokens, float32 of shape (n_tokens,) each, by member.

    Attributes:
        seed: Under the seed model.
        experts: Under each expert, shape (n_experts, n_tokens), in the order of the clusters.
        dense: Under the dense model, where it was trained.
        random: Under each random-cluster expert, shape (n_experts, n_tokens), where they were trained.
        clusters: Cluster of each expert, in ascending order; None where every cluster has one.
    """

    seed: NDArray[np.float32]
    experts: NDArray[np.float32]
    dense: NDArray[np.float32] | None = None
    random: NDArray[np.float32] | None = None
    clusters: Sequence[int] | None = None


def selection_documents(n_documents: int) -> NDArray[np.bool_]:
    """Mark the validation documents that settings are chosen on; the others are reported on.

    Args:
        n_documents: Documents of the validation split, in the order of the token shards: sorted by cluster, so that
            every second one is a half with the same mixture of domains.

    Returns:
        Mask of shape (n_documents,).
    """
    mask: NDArray[np.bool_] = np.arange(n_documents) % 2 == 0
    return mask


def context_distances(
    clusterer: Clusterer,
    tokenizer: TextTokenizer,
    validation: ValidationSet,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Distance of the text before every scored token to every cluster centre, shape (n_tokens, k).

    Raises:
        ManifestError: If the tokenizer cuts a text otherwise than when the scores were made.
    """
    router = PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)
    offsets = validation.offsets
    out = np.empty((int(offsets[-1]), clusterer.n_clusters), dtype=np.float32)
    for index, (text, tokens) in enumerate(zip(validation.texts, validation.tokens, strict=True)):
        again, starts = tokenizer.encode_with_starts(text)
        if not np.array_equal(again, tokens):
            raise ManifestError(
                f"validation document {index} has {len(again)} tokens now and {len(tokens)} in the token shards: "
                "tokenizer or corpus changed since the documents were assigned; run the assign stage again"
            )
        out[offsets[index] : offsets[index + 1]] = router.distances(text, starts[1:])
        if progress is not None:
            progress(index + 1, len(validation.texts))
    return out


def evaluate(
    config: EvaluateConfig, validation: ValidationSet, scores: Scores, distances: NDArray[np.float32]
) -> dict[str, Any]:
    """Perplexity of every model and every ensemble setting.

    Args:
        config: The settings.
        validation: The documents.
        scores: Log-probabilities of all their tokens, counted or not.
        distances: From `context_distances`, to the centres of all clusters, those without an expert included.

    Returns:
        The parts of result.json that come from scores: n_documents, n_tokens, n_bytes, n_prompt_tokens, selection,
        seed, dense, random, best_single_expert, ensemble, experts, by_domain.

    Raises:
        ConfigError: If a top-k is larger than the number of experts.
        DataError: If there are fewer than four documents, two for each half; one of them has no token, or none that
            counts; or experts, clusters and distances, or documents and counted tokens, do not fit.
    """
    if len(validation.tokens) < 4:
        raise DataError(
            f"the validation split has {len(validation.tokens)} documents; at least 4 are needed, half of them to "
            "choose the temperature and half to report on"
        )
    _check_tokens(validation)
    n_clusters = distances.shape[1]
    clusters = _expert_clusters(scores, n_clusters)
    if len(clusters) < n_clusters:
        distances = distances[:, clusters]
    scores, distances = _counted_only(validation, scores, distances)
    evaluation = _Evaluation(config, validation, scores, n_clusters)
    alone = {cluster: evaluation.document_nll(row) for cluster, row in zip(clusters, scores.experts, strict=True)}
    seed = evaluation.document_nll(scores.seed)
    dense = evaluation.document_nll(scores.dense) if scores.dense is not None else None
    random = evaluation.document_nll(uniform(scores.random)) if scores.random is not None else None
    settings = _grid(evaluation, distances, dense)
    best = min(alone, key=lambda cluster: evaluation.perplexity(alone[cluster], "selection"))
    chosen = next(row for row in settings if row["selected"])  # the largest top-k comes first
    mixed = evaluation.document_nll(_setting_log_probs(scores.experts, distances, chosen))
    arms = {"seed": seed, "dense": dense, "random": random, "ensemble": mixed}
    return {
        **evaluation.counts("report"),
        "selection": evaluation.counts("selection"),
        **{name: evaluation.summary(arms[name]) for name in ("seed", "dense", "random")},
        "best_single_expert": {"cluster": best, **(evaluation.summary(alone[best]) or {})},
        "ensemble": settings,
        "experts": [
            {"cluster": cluster, "perplexity": evaluation.perplexity(nll, "report")} for cluster, nll in alone.items()
        ],
        "by_domain": [evaluation.by_domain(cluster, arms, alone.get(cluster)) for cluster in range(n_clusters)],
    }


def _check_tokens(validation: ValidationSet) -> None:
    lengths = np.diff(validation.offsets)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise DataError(f"the tokenizer makes no token of validation document {empty[0]}; remove it from the corpus")
    if validation.counted is None:
        return
    marked = [len(row) for row in validation.counted]
    if marked != lengths.tolist():
        raise DataError(
            f"the marks of counted tokens are {sum(marked)} for {len(marked)} documents, the tokens {lengths.sum()} "
            f"for {len(lengths)}; run the assign stage again"
        )
    empty = np.flatnonzero(validation.n_counted == 0)
    if len(empty):
        raise DataError(
            f"validation document {empty[0]} has no token after its prompt, so nothing of it counts; "
            "remove it from the corpus"
        )


def _expert_clusters(scores: Scores, n_clusters: int) -> list[int]:
    """Cluster of each row of the experts' scores."""
    clusters = list(range(n_clusters)) if scores.clusters is None else [int(number) for number in scores.clusters]
    if len(clusters) != len(scores.experts) or not set(clusters) <= set(range(n_clusters)):
        raise DataError(f"scores of {len(scores.experts)} experts do not fit clusters {clusters} of {n_clusters}")
    return clusters


def _counted_only(
    validation: ValidationSet, scores: Scores, distances: NDArray[np.float32]
) -> tuple[Scores, NDArray[np.float32]]:
    """Scores and distances of the tokens that count."""
    if validation.counted is None:
        return scores, distances
    counted = np.concatenate(validation.counted)
    some = Scores(
        seed=scores.seed[counted],
        experts=scores.experts[:, counted],
        dense=None if scores.dense is None else scores.dense[counted],
        random=None if scores.random is None else scores.random[:, counted],
        clusters=scores.clusters,
    )
    return some, distances[counted]


class _Evaluation:
    """Sums over the counted tokens of each document, on the half that chooses and the half that is reported."""

    def __init__(self, config: EvaluateConfig, validation: ValidationSet, scores: Scores, n_clusters: int) -> None:
        self.config, self.scores, self.n_clusters = config, scores, n_clusters
        self._tokens = validation.n_counted
        self._starts = np.cumsum(self._tokens) - self._tokens
        self._prompt_tokens = np.diff(validation.offsets) - self._tokens
        self._bytes = validation.n_bytes
        self._clusters = validation.clusters
        choosing = selection_documents(len(self._tokens))
        self.halves: dict[str, NDArray[np.bool_]] = {"selection": choosing, "report": ~choosing}

    def document_nll(self, log_probs: NDArray[np.floating[Any]]) -> Array:
        """Sum of negative log-probabilities of each document, shape (n_documents,)."""
        # reduceat gives the next element for an empty document; `evaluate` refuses those.
        return -np.add.reduceat(log_probs.astype(np.float64), self._starts)

    def perplexity(self, nll: Array, half: str, among: NDArray[np.bool_] | None = None) -> float:
        chosen = self.halves[half] if among is None else self.halves[half] & among
        return math.exp(nll[chosen].sum() / self._tokens[chosen].sum())

    def counts(self, half: str) -> dict[str, int]:
        chosen = self.halves[half]
        return {
            "n_documents": int(chosen.sum()),
            "n_tokens": int(self._tokens[chosen].sum()),
            "n_bytes": int(self._bytes[chosen].sum()),
            "n_prompt_tokens": int(self._prompt_tokens[chosen].sum()),
        }

    def summary(self, nll: Array | None) -> dict[str, Any] | None:
        if nll is None:
            return None
        chosen = self.halves["report"]
        low, high = bootstrap_interval(
            nll[chosen],
            self._tokens[chosen],
            random_state=self.config.random_state,
            n_resamples=self.config.bootstrap_resamples,
        )
        return {
            "perplexity": self.perplexity(nll, "report"),
            "bits_per_byte": bits_per_byte(-nll[chosen], int(self._bytes[chosen].sum())),
            "interval": [low, high],
        }

    def ratio(self, nll: Array, other: Array | None) -> dict[str, Any]:
        if other is None:
            return {"dense_ratio": None, "dense_ratio_interval": None}
        chosen = self.halves["report"]
        low, high = paired_bootstrap_interval(
            nll[chosen],
            other[chosen],
            self._tokens[chosen],
            random_state=self.config.random_state,
            n_resamples=self.config.bootstrap_resamples,
        )
        ratio = self.perplexity(nll, "report") / self.perplexity(other, "report")
        return {"dense_ratio": ratio, "dense_ratio_interval": [low, high]}

    def by_domain(self, cluster: int, arms: Mapping[str, Array | None], expert: Array | None) -> dict[str, Any]:
        among = self._clusters == cluster
        chosen = self.halves["report"] & among
        row: dict[str, Any] = {
            "cluster": cluster,
            "n_documents": int(chosen.sum()),
            "n_tokens": int(self._tokens[chosen].sum()),
        }
        for name, nll in {**arms, "own_expert": expert}.items():
            row[name] = None if nll is None or not chosen.any() else self.perplexity(nll, "report", among)
        return row


def _grid(evaluation: _Evaluation, distances: NDArray[np.float32], dense: Array | None) -> list[dict[str, Any]]:
    """All settings, the chosen temperature and exponent marked for each top-k, and the uniform mean."""
    config, experts = evaluation.config, evaluation.scores.experts
    rows: list[dict[str, Any]] = []
    for top_k in config.top_k_values(len(experts), n_clusters=evaluation.n_clusters):
        group: list[dict[str, Any]] = []
        for power in config.distance_powers:
            for temperature in config.temperatures:
                setting = {
                    "ensemble": "clustering",
                    "distance_power": power,
                    "temperature": temperature,
                    "top_k": top_k,
                }
                log_probs = _setting_log_probs(experts, distances, setting)
                weights = routing_weights(distances, temperature=temperature, distance_power=power, top_k=top_k)
                group.append(setting | _row(evaluation, log_probs, dense) | {"experts_used": experts_used(weights)})
        best = min(group, key=lambda row: row["selection_perplexity"])
        rows += [row | {"selected": row is best} for row in group]
    flat = {"ensemble": "uniform", "distance_power": None, "temperature": None, "top_k": len(experts)}
    used = {"experts_used": float(len(experts)), "selected": False}
    return [*rows, flat | _row(evaluation, uniform(experts), dense) | used]


def _row(evaluation: _Evaluation, log_probs: Array, dense: Array | None) -> dict[str, Any]:
    nll = evaluation.document_nll(log_probs)
    return {
        **(evaluation.summary(nll) or {}),
        "selection_perplexity": evaluation.perplexity(nll, "selection"),
        **evaluation.ratio(nll, dense),
    }


def _setting_log_probs(
    experts: NDArray[np.float32], distances: NDArray[np.float32], setting: Mapping[str, Any]
) -> Array:
    return clustering(
        experts,
        distances,
        temperature=setting["temperature"],
        distance_power=setting["distance_power"],
        top_k=setting["top_k"],
    )
