"""The evaluator of few-shot tasks: the accuracy of every model and every ensemble setting, from stored scores alone.

A prompt is routed once, by its whole text up to the answer, and all tokens of the answers are mixed with those weights,
as the code released with c-BTM does (Gururangan et al. 2023). So the ensembles are those whose weights can be had from
the text of the prompt (clustering) or without it (uniform, prior). Those that follow the experts' own probabilities
from token to token (bayes, posterior, product_of_experts) have nothing to follow but the one or two tokens of an
answer, whose probability is the very thing that is compared; they are left out.

Two scorings: plain takes the label whose answer is most probable; pmi the one whose answer gains most over its
probability behind the question alone, mixed with the same weights (Holtzman et al. 2021, "Surface form competition:
why the highest probability answer isn't always right", PMI_DC). Equal labels go to the first in sorted order.

Settings are chosen on every second test example (the order is random), and everything is reported on the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.ensembles import mix, token_blocks
from cbtm.merge.grid import EnsembleType, Setting
from cbtm.merge.router import routing_weights
from cbtm.merge.task_prompts import TaskPrompts
from cbtm.merge.task_scorer import TaskScores

TASK_ENSEMBLES: tuple[EnsembleType, ...] = ("clustering", "uniform", "prior")
"""Kinds of ensembles that answer tasks."""
SCORINGS = ("plain", "pmi")
_LEVEL = 0.95

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class TaskMembers:
    """Scores of one task, by member.

    Attributes:
        seed: Of the seed model.
        experts: Of each expert, in the order of the clusters.
        dense: Of the dense model, where it was trained.
        random: Of each random-cluster expert, where they were trained.
        averages: Of each average of the experts' parameters, by name (uniform, weighted, greedy).
        clusters: Cluster of each expert, in ascending order; None where every cluster has one.
    """

    seed: TaskScores
    experts: Sequence[TaskScores]
    dense: TaskScores | None = None
    random: Sequence[TaskScores] | None = None
    averages: Mapping[str, TaskScores] | None = None
    clusters: Sequence[int] | None = None


def evaluate_task(
    config: EvaluateConfig,
    task: TaskPrompts,
    members: TaskMembers,
    distances: NDArray[np.floating[Any]],
    *,
    prior: NDArray[np.floating[Any]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of every model and every ensemble setting in one task.

    Args:
        config: Which ensembles are compared; of its kinds, those in `TASK_ENSEMBLES`.
        task: The prompts.
        members: Their scores.
        distances: Euclidean distance from each of `task.routing_texts` to the centres of all clusters, those without an
            expert included, shape (n_seeds * n_examples, k).
        prior: Weights of the prior ensemble over the experts that are mixed, shape (n_mixed,), summing to 1; None
            leaves that ensemble out.
        progress: Called with settings done and in all.

    Returns:
        The entry of `tasks` in result.json. `n_examples`, `chance`, `accuracy`, `by_seed` and `interval` are of the
        reported half of the test examples; a setting is `selected` if it is the most accurate of its kind, top-k and
        scoring on the other half, the first of equals. Intervals resample test examples, each with all of its seeds.

    Raises:
        ConfigError: If a top-k is larger than the number of experts, or an expert is named that was not trained.
        DataError: If scores, distances and prompts do not fit, or a score is no log-probability.
    """
    _check(task, members, distances)
    clusters = list(range(distances.shape[1])) if members.clusters is None else [int(c) for c in members.clusters]
    mixed = config.experts_of(clusters)
    experts = _Pool(task, [one for cluster, one in zip(clusters, members.experts, strict=True) if cluster in mixed])
    near = distances[:, mixed]
    measured = _Measured(config, task)
    rows = [row for name, pool in _models(task, members) for row in measured.rows(name, pool.uniform())]
    chosen: dict[tuple[str, int, str], tuple[float, dict[str, Any]]] = {}
    settings = [
        setting
        for setting in config.settings(len(mixed), n_clusters=distances.shape[1])
        if setting.ensemble in TASK_ENSEMBLES and (setting.ensemble != "prior" or prior is not None)
    ]
    for number, setting in enumerate(settings, start=1):
        correct = experts.mixed(_weights(setting, near, prior))
        for row, right in zip(measured.rows("ensemble", correct, setting), correct.values(), strict=True):
            key = setting.ensemble, setting.top_k, row["scoring"]
            accuracy = float(right[:, measured.choosing].mean())
            row["selected"] = False
            if key not in chosen or accuracy > chosen[key][0]:
                chosen[key] = accuracy, row
            rows.append(row)
        if progress is not None:
            progress(number, len(settings))
    for _, row in chosen.values():
        row["selected"] = True
    reported = task.gold[~measured.choosing]
    return {
        "name": task.name,
        "shots": task.shots,
        "seeds": [one.seed for one in task.seeds],
        "n_examples": len(reported),
        "labels": list(task.labels),
        "chance": float(np.bincount(reported).max() / len(reported)),
        "cut": task.cut,
        "rows": rows,
    }


class _Pool:
    """Scores of some models on one task, which answer together."""

    def __init__(self, task: TaskPrompts, scores: Sequence[TaskScores]) -> None:
        self._gold, self._shape = task.gold, (len(task.seeds), len(task.gold))
        self._starts = task.answer_offsets[:-1]
        # One "token" for each prompt and answer token, as `mix` takes them.
        self._behind = np.stack([one.log_probs.reshape(-1) for one in scores])  # (E, M * A)
        self._neutral = np.stack([one.neutral for one in scores])  # (E, A)

    def uniform(self) -> dict[str, Mask]:
        """Which prompts are answered rightly under equal weights, by scoring, shape (n_seeds, n_examples)."""
        n_models = len(self._behind)
        return self.mixed(np.full((1, n_models), 1 / n_models))

    def mixed(self, weights: Array) -> dict[str, Mask]:
        """The same under given weights: of shape (M, E) for each prompt, or (1, E) for all of them."""
        n_prompts, n_tokens = math.prod(self._shape), self._neutral.shape[1]
        plain = np.empty((n_prompts, len(self._starts)))
        neutral = np.empty((len(weights), len(self._starts)))
        for block in token_blocks(n_prompts, self._behind.size // n_prompts):
            tokens = slice(block.start * n_tokens, block.stop * n_tokens)
            own = weights[block] if len(weights) > 1 else np.broadcast_to(weights, (n_prompts, weights.shape[1]))[block]
            plain[block] = self._label_log_probs(self._behind[:, tokens], own)
        # Weights that do not depend on the prompt have one neutral prompt between them.
        for block in token_blocks(len(weights), self._neutral.size):
            behind = np.tile(self._neutral, len(weights[block]))
            neutral[block] = self._label_log_probs(behind, weights[block])
        with np.errstate(invalid="ignore"):
            # An answer that is impossible here gains nothing, also where it is impossible without the text.
            gain = np.where(np.isneginf(plain), -np.inf, plain - neutral)
        return {name: self._right(values) for name, values in zip(SCORINGS, (plain, gain), strict=True)}

    def _label_log_probs(self, log_probs: NDArray[np.float32], weights: Array) -> Array:
        """Of each label at each prompt, (m, labels), from scores (E, m * A) and weights (m, E)."""
        n_tokens = self._neutral.shape[1]
        tokens = mix(log_probs, np.repeat(weights, n_tokens, axis=0)).reshape(-1, n_tokens)
        labels: Array = np.add.reduceat(tokens, self._starts, axis=1)
        return labels

    def _right(self, values: Array) -> Mask:
        right: Mask = values.argmax(axis=1).reshape(self._shape) == self._gold  # argmax takes the first of equals
        return right


class _Measured:
    """Accuracies on the reported half, and how sure they are: the same resamples for every row."""

    def __init__(self, config: EvaluateConfig, task: TaskPrompts) -> None:
        self.choosing: Mask = np.arange(len(task.gold)) % 2 == 0
        count = int((~self.choosing).sum())
        rng = np.random.default_rng(config.random_state)
        draws = [rng.integers(count, size=count) for _ in range(config.bootstrap_resamples)]
        self._times = np.stack([np.bincount(drawn, minlength=count) for drawn in draws])  # (resamples, count)

    def rows(self, model: str, correct: Mapping[str, Mask], setting: Setting | None = None) -> list[dict[str, Any]]:
        """Rows of result.json of one model or ensemble, one for each scoring."""
        return [
            {
                "model": model,
                "ensemble": None if setting is None else setting.ensemble,
                "top_k": None if setting is None else setting.top_k,
                "temperature": None if setting is None else setting.temperature,
                "distance_power": None if setting is None else setting.distance_power,
                "scoring": scoring,
                **self._figures(right[:, ~self.choosing]),
                "selected": True,
            }
            for scoring, right in correct.items()
        ]

    def _figures(self, right: Mask) -> dict[str, Any]:
        # Whole numbers until the division: resamples of equal accuracy are equal.
        means = np.sort(self._times @ right.sum(axis=0)) / right.size
        tail = math.floor((1 - _LEVEL) / 2 * (len(means) - 1))
        return {
            "accuracy": float(right.mean()),
            "by_seed": right.mean(axis=1).tolist(),
            "interval": [float(means[tail]), float(means[len(means) - 1 - tail])],
        }


def _models(task: TaskPrompts, members: TaskMembers) -> list[tuple[str, _Pool]]:
    """The models that answer by themselves; random-cluster experts as the plain mean of their probabilities."""
    pools = {"seed": [members.seed]}
    if members.dense is not None:
        pools["dense"] = [members.dense]
    if members.random:
        pools["random"] = list(members.random)
    pools |= {f"average-{name}": [scores] for name, scores in (members.averages or {}).items()}
    return [(name, _Pool(task, scores)) for name, scores in pools.items()]


def _weights(setting: Setting, distances: NDArray[np.floating[Any]], prior: NDArray[np.floating[Any]] | None) -> Array:
    """Weights of the experts, shape (n_prompts, n_mixed), or one row where they do not depend on the prompt."""
    if setting.temperature is not None and setting.distance_power is not None:
        return routing_weights(
            distances,
            temperature=setting.temperature,
            distance_power=setting.distance_power,
            top_k=setting.top_k,
        )
    if setting.ensemble == "prior" and prior is not None:
        return np.asarray(prior, dtype=np.float64)[np.newaxis]
    return np.full((1, distances.shape[1]), 1 / distances.shape[1])


def _check(task: TaskPrompts, members: TaskMembers, distances: NDArray[np.floating[Any]]) -> None:
    n_prompts = len(task.seeds) * len(task.gold)
    if distances.ndim != 2 or len(distances) != n_prompts:
        raise DataError(f"task {task.name}: distances of shape {distances.shape} for {n_prompts} prompts")
    n_clusters = distances.shape[1]
    clusters = range(n_clusters) if members.clusters is None else members.clusters
    if len(clusters) != len(members.experts) or not set(clusters) <= set(range(n_clusters)):
        raise DataError(
            f"task {task.name}: scores of {len(members.experts)} experts do not fit clusters {list(clusters)} of "
            f"{n_clusters}"
        )
    n_tokens = int(task.answer_offsets[-1])
    expected = (len(task.seeds), len(task.gold), n_tokens)
    others = [members.dense, *(members.random or ()), *(members.averages or {}).values()]
    for scores in (members.seed, *members.experts, *others):
        if scores is not None and (scores.log_probs.shape != expected or scores.neutral.shape != (n_tokens,)):
            raise DataError(
                f"task {task.name}: scores of shapes {scores.log_probs.shape} and {scores.neutral.shape}, expected "
                f"{expected} and {(n_tokens,)}; score the tasks again"
            )
