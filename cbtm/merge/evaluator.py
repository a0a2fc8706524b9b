"""The evaluator: every ensemble setting at once, from scores and distances alone.

The weights of the experts at a token come from the text before it (Gururangan et al. 2023, equations 2 and 3), so
one pass over the text gives the distances, and kind of ensemble, temperature, exponent and top-k are arithmetic.
Settings are chosen on one half of the validation documents; everything is reported on the other half.

Where experts of some clusters only were trained, or are mixed on purpose, the ensemble is of those: weights are over
the distances to their centres, and documents of the other clusters are evaluated all the same. Where documents have
prompts, the tokens of a prompt are context: they route and they condition, but they do not count. A token that a model
finds impossible makes its perplexity infinite, and is counted; it is never left out.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError
from cbtm.merge.config import EvaluateConfig
from cbtm.merge.grid import DocumentSums, Setting, mix_grid
from cbtm.merge.intervals import Resamples
from cbtm.merge.router import mean_routing_weights
from cbtm.merge.validation_set import Scores, ValidationSet

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Arm:
    """What one model or ensemble gives each document: summed negative log-probability, and impossible tokens."""

    nll: Array
    impossible: NDArray[np.int64]


def evaluate(
    config: EvaluateConfig,
    validation: ValidationSet,
    scores: Scores,
    distances: NDArray[np.float32],
    *,
    body_share: float = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of every model and every ensemble setting.

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
        compared), by_domain, by_label, domain_by_expert. Infinity is None.

    Raises:
        ConfigError: If a top-k is larger than the number of experts, or a setting needs scores that were not made.
        DataError: If there are fewer than four documents, one of them has no token, or none that counts; experts,
            clusters and distances, or documents and counted tokens, do not fit; or a score is no log-probability.
    """
    validation.check()
    trained = _expert_clusters(scores, distances.shape[1])
    mixed = config.experts_of(trained)
    measured = _Measured(config, validation)
    whole = scores.top_k is None
    alone = {c: measured.arm(row) for c, row in zip(trained, scores.experts, strict=True) if whole and c in mixed}
    arms: dict[str, _Arm | None] = {
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
    return dict(_finite(result))


def _expert_clusters(scores: Scores, n_clusters: int) -> list[int]:
    """Cluster of each of the experts' scores."""
    clusters = list(range(n_clusters)) if scores.clusters is None else [int(number) for number in scores.clusters]
    if len(clusters) != len(scores.experts) or clusters != sorted(set(clusters) & set(range(n_clusters))):
        raise DataError(f"scores of {len(scores.experts)} experts do not fit clusters {clusters} of {n_clusters}")
    return clusters


class _Measured:
    """Sums over the counted tokens of each document, on the half that chooses and the half that is reported."""

    def __init__(self, config: EvaluateConfig, validation: ValidationSet) -> None:
        self.config, self.offsets = config, validation.offsets
        self.counted = None if validation.counted is None else np.concatenate(validation.counted)
        self.tokens = validation.n_counted
        self.clusters = validation.clusters
        self._scored = np.diff(self.offsets)
        self._bytes = validation.n_bytes
        choosing = validation.selection
        self.halves: dict[str, Mask] = {"selection": choosing, "report": ~choosing}
        self.threads = config.threads or os.cpu_count() or 1

    def arm(self, log_probs: NDArray[np.float32]) -> _Arm:
        """One model by itself."""
        if log_probs.shape != (self.offsets[-1],):
            raise DataError(f"scores of shape {log_probs.shape} for {self.offsets[-1]} tokens; score the model again")
        values = np.asarray(log_probs, dtype=np.float64)
        if not (values <= 0).all():
            token = int(np.argmax(~(values <= 0)))
            raise DataError(
                f"log-probability {values[token]} at token {token} is not in [-inf, 0]; the scores are damaged or are "
                "not natural log-probabilities: score that model again"
            )
        if self.counted is not None:
            values = np.where(self.counted, values, 0)
        starts = self.offsets[:-1]
        # reduceat gives the next element for an empty document; `ValidationSet.check` refuses those.
        return _Arm(-np.add.reduceat(values, starts), np.add.reduceat(np.isneginf(values).astype(np.int64), starts))

    def mix(
        self,
        experts: Sequence[NDArray[np.float32]],
        distances: NDArray[np.float32],
        settings: Sequence[Setting],
        *,
        prior: Array | None = None,
        progress: Progress | None = None,
    ) -> list[DocumentSums]:
        """Each setting's sums over the counted tokens of each document."""
        return mix_grid(
            experts,
            distances,
            self.offsets,
            settings,
            prior=prior,
            counted=self.counted,
            threads=self.threads,
            progress=progress,
        )

    def uniform(self, experts: Sequence[NDArray[np.float32]]) -> _Arm:
        """The plain mean of several models' probabilities."""
        nowhere = np.broadcast_to(np.float32(0), (int(self.offsets[-1]), len(experts)))
        (sums,) = self.mix(experts, nowhere, [Setting("uniform", len(experts))])
        return _Arm(sums.nll, sums.impossible)

    def perplexity(self, nll: Array, half: str, among: Mask | None = None) -> float:
        chosen = self.halves[half] if among is None else self.halves[half] & among
        return _exp(nll[chosen].sum() / self.tokens[chosen].sum())

    def tokens_of(self, half: str) -> Mask:
        """The counted tokens of one half, shape (n_tokens,)."""
        chosen: Mask = np.repeat(self.halves[half], self._scored)
        return chosen if self.counted is None else chosen & self.counted

    def counts(self, half: str) -> dict[str, int]:
        chosen = self.halves[half]
        return {
            "n_documents": int(chosen.sum()),
            "n_tokens": int(self.tokens[chosen].sum()),
            "n_bytes": int(self._bytes[chosen].sum()),
            "n_prompt_tokens": int((self._scored - self.tokens)[chosen].sum()),
        }

    def resamples(self, chosen: Mask) -> Resamples:
        config = self.config
        return Resamples(self.tokens[chosen], random_state=config.random_state, n_resamples=config.bootstrap_resamples)

    def summaries(self, arms: Mapping[str, _Arm], dense: _Arm | None) -> dict[str, dict[str, Any]]:
        """Figures of each arm on the reported half, and its ratio to the dense model on the same documents."""
        chosen = self.halves["report"]
        n_tokens, n_bytes = int(self.tokens[chosen].sum()), int(self._bytes[chosen].sum())
        nll = np.stack([arm.nll[chosen] for arm in arms.values()])  # (arms, documents)
        resamples = self.resamples(chosen)
        intervals = resamples.intervals(nll)
        ratios = None if dense is None else _ratio_intervals(resamples, nll, dense.nll[chosen])
        rows: dict[str, dict[str, Any]] = {}
        for index, (name, arm) in enumerate(arms.items()):
            total = float(nll[index].sum())
            rows[name] = {
                "perplexity": _exp(total / n_tokens),
                # Tokens that are each a part of a character spell none.
                "bits_per_byte": total / (math.log(2) * n_bytes) if n_bytes else math.inf,
                "nats": total / n_tokens,
                "interval": intervals[index].tolist(),
                "impossible_tokens": int(arm.impossible[chosen].sum()),
                "dense_ratio": None if dense is None else _ratio(total, float(dense.nll[chosen].sum()), n_tokens),
                "dense_ratio_interval": None if ratios is None or ratios[index] is None else ratios[index],
            }
        return rows

    def group(self, among: Mask, arms: Mapping[str, _Arm | None]) -> dict[str, Any]:
        """Perplexities of the reported documents of one group, and how sure the difference to dense is."""
        chosen = self.halves["report"] & among
        there = bool(chosen.any())
        row: dict[str, Any] = {"n_documents": int(chosen.sum()), "n_tokens": int(self.tokens[chosen].sum())}
        for name, arm in arms.items():
            row[name] = None if arm is None or not there else self.perplexity(arm.nll, "report", among)
        dense, ensemble = arms["dense"], arms["ensemble"]
        row |= dict.fromkeys(("interval", "dense_interval", "dense_ratio", "dense_ratio_interval"))
        if ensemble is None or not there:
            return row
        if dense is not None:
            row["dense_ratio"] = _ratio(ensemble.nll[chosen].sum(), dense.nll[chosen].sum(), row["n_tokens"])
        if row["n_documents"] < 2:
            return row
        resamples = self.resamples(chosen)
        row["interval"] = resamples.intervals(ensemble.nll[None, chosen])[0].tolist()
        if dense is not None:
            row["dense_interval"] = resamples.intervals(dense.nll[None, chosen])[0].tolist()
            row["dense_ratio_interval"] = _ratio_intervals(resamples, ensemble.nll[None, chosen], dense.nll[chosen])[0]
        return row


class _Grid:
    """All settings; the best of each kind and top-k, by the selecting half, is marked."""

    def __init__(
        self,
        config: EvaluateConfig,
        measured: _Measured,
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
        self.chosen = _Arm(sums[chosen].nll, sums[chosen].impossible)

    def rows(self, dense: _Arm | None) -> list[dict[str, Any]]:
        """Rows of result.json, in the order of the settings."""
        measured = self._measured
        arms = {str(index): _Arm(one.nll, one.impossible) for index, one in enumerate(self._sums.values())}
        summaries = measured.summaries(arms, dense)
        groups: dict[tuple[str, int], dict[Setting, DocumentSums]] = {}
        for setting, one in self._sums.items():
            groups.setdefault((setting.ensemble, setting.top_k), {})[setting] = one
        selected = {_best_of(measured, group) for group in groups.values()}
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


def _best_of(measured: _Measured, group: Mapping[Setting, DocumentSums]) -> Setting:
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
    measured: _Measured,
    scores: Scores,
    distances: NDArray[np.float32],
    trained: list[int],
) -> _Arm:
    """The ensemble of all trained experts, its temperature and exponent chosen as ever."""
    experts, near = _of_clusters(scores, distances, trained)
    whole = config.model_copy(update={"ensembles": ("clustering",), "top_k": (len(trained),)})
    settings = whole.settings(len(trained))
    sums = dict(zip(settings, measured.mix(experts, near, settings), strict=True))
    best = sums[_best_of(measured, sums)]
    return _Arm(best.nll, best.impossible)


def _by_domain(
    measured: _Measured, n_clusters: int, arms: Mapping[str, _Arm | None], alone: Mapping[int, _Arm]
) -> list[dict[str, Any]]:
    return [
        {"cluster": cluster, **measured.group(measured.clusters == cluster, {**arms, "own_expert": alone.get(cluster)})}
        for cluster in range(n_clusters)
    ]


def _by_label(
    measured: _Measured, labels: Sequence[str | None] | None, arms: Mapping[str, _Arm | None]
) -> list[dict[str, Any]] | None:
    if labels is None:
        return None
    known = np.array([label or "" for label in labels])
    rows = [{"label": label, **measured.group(known == label, arms)} for label in sorted(set(known) - {""})]
    return [row for row in rows if row["n_documents"]]


def _domain_by_expert(measured: _Measured, n_clusters: int, alone: Mapping[int, _Arm]) -> dict[str, Any]:
    rows = []
    for cluster in range(n_clusters):
        among = measured.clusters == cluster
        there = (measured.halves["report"] & among).any()
        rows.append([measured.perplexity(arm.nll, "report", among) if there else None for arm in alone.values()])
    return {"clusters": list(alone), "perplexity": rows}


def _ratio(nll: float, base: float, n_tokens: int) -> float | None:
    """Perplexity over that of the base; None where both are infinite."""
    return None if math.isinf(nll) and math.isinf(base) else _exp((nll - base) / n_tokens)


def _ratio_intervals(resamples: Resamples, nll: Array, base: Array) -> list[list[float] | None]:
    """Intervals of the ratios of perplexities; None where both sides find some token impossible."""
    if not np.isinf(base).any():
        return [list(map(float, pair)) for pair in resamples.ratio_intervals(nll, base)]
    return [
        None if np.isinf(row).any() else [float(end) for end in resamples.ratio_intervals(row[None], base)[0]]
        for row in nll
    ]


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700 else math.inf


def _finite(value: Any) -> Any:
    """The same with None for what is infinite, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
