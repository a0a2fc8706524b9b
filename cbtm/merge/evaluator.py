"""The evaluator: every ensemble setting at once, from scores and distances alone.

The weights of the experts at a token come from the text before it (Gururangan et al. 2023, equations 2 and 3), so
one pass over the text gives the distances, and kind of ensemble, temperature, exponent and top-k are arithmetic.
Settings are chosen on one half of the validation documents; everything is reported on the other half.

Where experts of some clusters only were trained, or are mixed on purpose, the ensemble is of those: weights are over
the distances to their centres, and documents of the other clusters are evaluated all the same. Where documents have
prompts, the tokens of a prompt are context: they route and they condition, but they do not count. A token that a model
finds impossible makes its perplexity infinite, and is counted; it is never left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.grid import DocumentSums, Setting
from cbtm.merge.measured import Arm, Array, Measured, Progress, finite
from cbtm.merge.router import mean_routing_weights
from cbtm.merge.validation_set import Scores, ValidationSet


def evaluate(
    config: EvaluateConfig,
    validation: ValidationSet,
    scores: Scores,
    distances: NDArray[np.float32],
    *,
    body_share: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of every model and every ensemble setting: the first part of what `evaluate_documents` returns."""
    return evaluate_documents(config, validation, scores, distances, body_share=body_share, progress=progress)[0]


def evaluate_documents(
    config: EvaluateConfig,
    validation: ValidationSet,
    scores: Scores,
    distances: NDArray[np.float32],
    *,
    body_share: float = 1.0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Perplexity of every model and every ensemble setting, and what the chosen ones give to each document.

    Args:
        config: The settings.
        validation: The documents.
        scores: Log-probabilities of all their tokens, counted or not.
        distances: From `context_distances`, to the centres of all clusters, those without an expert included.
        body_share: Part of a forward pass's work at one token that is done before the head; the head runs only where
            an expert has weight.
        progress: Called with tokens done and in all.

    Returns:
        The parts of result.json that come from scores: n_documents, n_tokens, n_bytes, n_prompt_tokens, selection,
        seed, dense, random, averages, best_single_expert, ensemble, experts, experts_evaluated, prior (the mean routing
        weight of each expert that is mixed at the counted tokens of the selecting half, where the prior ensemble is
        compared), by_domain, by_label, domain_by_expert. Infinity is None. And, by name, the summed negative
        log-probability in nats of each document, of both halves, under seed, dense, random, averages and the chosen
        setting of each kind and top-k: arrays of shape (n_documents,).

    Raises:
        ConfigError: If a top-k is larger than the number of experts, or a setting needs scores that were not made.
        DataError: If there are fewer than four documents, one of them has no token, or none that counts; experts,
            clusters and distances, or documents and counted tokens, do not fit; or a score is no log-probability.
    """
    validation.check()
    trained = _expert_clusters(scores, distances.shape[1])
    mixed = config.experts_of(trained)
    measured = Measured(config, validation)
    whole = scores.top_k is None
    alone = {c: measured.arm(row) for c, row in zip(trained, scores.experts, strict=True) if whole and c in mixed}
    arms: dict[str, Arm | None] = {
        "seed": measured.arm(scores.seed),
        "dense": None if scores.dense is None else measured.arm(scores.dense),
        "random": None if scores.random is None else measured.uniform(scores.random),
    }
    averages = {name: measured.arm(row) for name, row in (scores.averages or {}).items()}
    grid = _Grid(config, measured, scores, distances, mixed, body_share=body_share, progress=progress)
    arms["ensemble"] = grid.chosen
    everything = {**arms, **averages, **{f"expert {cluster}": arm for cluster, arm in alone.items()}}
    summaries = measured.summaries({name: arm for name, arm in everything.items() if arm is not None}, arms["dense"])
    arms["ensemble_all"] = _of_all(config, measured, scores, distances, trained) if mixed != trained else None
    best = min(alone, key=lambda cluster: measured.perplexity(alone[cluster].nll, "selection")) if alone else None
    result = {
        **measured.counts("report"),
        "selection": measured.counts("selection"),
        **{name: summaries.get(name) for name in ("seed", "dense", "random")},
        "averages": [{"name": name, **summaries[name]} for name in averages],
        "best_single_expert": None if best is None else {"cluster": best, **summaries[f"expert {best}"]},
        "ensemble": grid.rows(arms["dense"]),
        "experts": [{"cluster": c, "perplexity": summaries.get(f"expert {c}", {}).get("perplexity")} for c in trained],
        "experts_evaluated": mixed,
        "prior": None if grid.prior is None else grid.prior.tolist(),
        "by_domain": _by_domain(measured, distances.shape[1], arms, alone),
        "by_label": _by_label(measured, validation.labels, arms),
        "domain_by_expert": _domain_by_expert(measured, distances.shape[1], alone) if alone else None,
    }
    return finite(result), {**measured.documents(arms, averages), **grid.documents()}


def _expert_clusters(scores: Scores, n_clusters: int) -> list[int]:
    """Cluster of each of the experts' scores."""
    clusters = list(range(n_clusters)) if scores.clusters is None else [int(number) for number in scores.clusters]
    if len(clusters) != len(scores.experts) or clusters != sorted(set(clusters) & set(range(n_clusters))):
        raise DataError(f"scores of {len(scores.experts)} experts do not fit clusters {clusters} of {n_clusters}")
    return clusters


class _Grid:
    """All settings; the best of each kind and top-k, by the selecting half, is marked."""

    def __init__(
        self,
        config: EvaluateConfig,
        measured: Measured,
        scores: Scores,
        distances: NDArray[np.float32],
        mixed: list[int],
        *,
        body_share: float,
        progress: Progress | None = None,
    ) -> None:
        self._measured, self._body_share, self._n_experts = measured, body_share, len(mixed)
        experts, near = _of_clusters(scores, distances, mixed)
        settings = config.settings(len(mixed), n_clusters=distances.shape[1], scored_top_k=scores.top_k)
        routed = [setting for setting in settings if setting.ensemble != "prior"]
        sums = dict(zip(routed, measured.mix(experts, near, routed, progress=progress), strict=True))
        top_k = max(setting.top_k for setting in routed if setting.ensemble == "clustering")
        chosen = _best_of(measured, {s: sums[s] for s in routed if (s.ensemble, s.top_k) == ("clustering", top_k)})
        self.prior: Array | None = None
        for setting in [setting for setting in settings if setting.ensemble == "prior"]:
            temperature, power = chosen.temperature, chosen.distance_power
            assert temperature is not None  # as of every clustering setting
            assert power is not None
            self.prior = mean_routing_weights(
                near, measured.tokens_of("selection"), temperature=temperature, distance_power=power
            )
            (sums[setting],) = measured.mix(experts, near, [setting], prior=self.prior)
        self._sums = {setting: sums[setting] for setting in settings}
        self.chosen = Arm(sums[chosen].nll, sums[chosen].impossible)
        groups: dict[tuple[str, int], dict[Setting, DocumentSums]] = {}
        for setting, one in self._sums.items():
            groups.setdefault((setting.ensemble, setting.top_k), {})[setting] = one
        self._selected = {key: _best_of(measured, group) for key, group in groups.items()}

    def documents(self) -> dict[str, Array]:
        """Sums of each document under the chosen setting of each kind and top-k."""
        return {f"{kind}-top-{top_k}": self._sums[one].nll for (kind, top_k), one in self._selected.items()}

    def rows(self, dense: Arm | None) -> list[dict[str, Any]]:
        """Rows of result.json, in the order of the settings."""
        measured = self._measured
        arms = {str(index): Arm(one.nll, one.impossible) for index, one in enumerate(self._sums.values())}
        summaries = measured.summaries(arms, dense)
        selected = set(self._selected.values())
        return [
            {
                "ensemble": setting.ensemble,
                "distance_power": setting.distance_power,
                "temperature": setting.temperature,
                "top_k": setting.top_k,
                **summary,
                "selection_perplexity": measured.perplexity(one.nll, "selection"),
                **self._cost(one),
                "selected": setting in selected,
            }
            for (setting, one), summary in zip(self._sums.items(), summaries.values(), strict=True)
        ]

    def _cost(self, sums: DocumentSums) -> dict[str, float]:
        chosen = self._measured.halves["report"]
        counted = float(self._measured.tokens[chosen].sum())
        scored = float(np.diff(self._measured.offsets)[chosen].sum())
        used, passes = sums.experts_used[chosen].sum() / counted, sums.passes[chosen].sum() / scored
        return {
            "experts_used": used,
            "flops_relative": self._body_share * passes + (1 - self._body_share) * min(used, passes),
            "routing_entropy": sums.entropy[chosen].sum() / counted,
        }


def _best_of(measured: Measured, group: Mapping[Setting, DocumentSums]) -> Setting:
    """The setting of the lowest perplexity on the selecting half; the first of equals."""
    return min(group, key=lambda setting: measured.perplexity(group[setting].nll, "selection"))


def _of_clusters(
    scores: Scores, distances: NDArray[np.float32], clusters: list[int]
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Scores of the experts of some clusters, and the distances to their centres."""
    trained = _expert_clusters(scores, distances.shape[1])
    experts = [row for cluster, row in zip(trained, scores.experts, strict=True) if cluster in clusters]
    if len(clusters) == distances.shape[1]:
        return experts, distances
    return experts, np.ascontiguousarray(distances[:, clusters])


def _of_all(
    config: EvaluateConfig,
    measured: Measured,
    scores: Scores,
    distances: NDArray[np.float32],
    trained: list[int],
) -> Arm:
    """The ensemble of all trained experts, its temperature and exponent chosen as ever."""
    experts, near = _of_clusters(scores, distances, trained)
    whole = config.model_copy(update={"ensembles": ("clustering",), "top_k": (len(trained),)})
    settings = whole.settings(len(trained))
    sums = dict(zip(settings, measured.mix(experts, near, settings), strict=True))
    best = sums[_best_of(measured, sums)]
    return Arm(best.nll, best.impossible)


def _by_domain(
    measured: Measured, n_clusters: int, arms: Mapping[str, Arm | None], alone: Mapping[int, Arm]
) -> list[dict[str, Any]]:
    return [
        {"cluster": cluster, **measured.group(measured.clusters == cluster, {**arms, "own_expert": alone.get(cluster)})}
        for cluster in range(n_clusters)
    ]


def _by_label(
    measured: Measured, labels: Sequence[str | None] | None, arms: Mapping[str, Arm | None]
) -> list[dict[str, Any]] | None:
    if labels is None:
        return None
    known = np.array([label or "" for label in labels])
    rows = [{"label": label, **measured.group(known == label, arms)} for label in sorted(set(known) - {""})]
    return [row for row in rows if row["n_documents"]]


def _domain_by_expert(measured: Measured, n_clusters: int, alone: Mapping[int, Arm]) -> dict[str, Any]:
    rows = []
    for cluster in range(n_clusters):
        among = measured.clusters == cluster
        there = (measured.halves["report"] & among).any()
        rows.append([measured.perplexity(arm.nll, "report", among) if there else None for arm in alone.values()])
    return {"clusters": list(alone), "perplexity": rows}
