"""Sums of each held-out document under one model or ensemble, and the figures that are made of them."""

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
from cbtm.merge.validation_set import ValidationSet

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Arm:
    """What one model or ensemble gives each document: summed negative log-probability, and impossible tokens."""

    nll: Array
    impossible: NDArray[np.int64]


class Measured:
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

    def arm(self, log_probs: NDArray[np.float32]) -> Arm:
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
        return Arm(-np.add.reduceat(values, starts), np.add.reduceat(np.isneginf(values).astype(np.int64), starts))

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

    def uniform(self, experts: Sequence[NDArray[np.float32]]) -> Arm:
        """The plain mean of several models' probabilities."""
        nowhere = np.broadcast_to(np.float32(0), (int(self.offsets[-1]), len(experts)))
        (sums,) = self.mix(experts, nowhere, [Setting("uniform", len(experts))])
        return Arm(sums.nll, sums.impossible)

    def perplexity(self, nll: Array, half: str, among: Mask | None = None) -> float:
        """Perplexity of a model on one half, or on some documents of it."""
        chosen = self.halves[half] if among is None else self.halves[half] & among
        return exp(nll[chosen].sum() / self.tokens[chosen].sum())

    def tokens_of(self, half: str) -> Mask:
        """The counted tokens of one half, shape (n_tokens,)."""
        chosen: Mask = np.repeat(self.halves[half], self._scored)
        return chosen if self.counted is None else chosen & self.counted

    def counts(self, half: str) -> dict[str, int]:
        """Documents, counted tokens, their bytes, and tokens of prompts of one half."""
        chosen = self.halves[half]
        return {
            "n_documents": int(chosen.sum()),
            "n_tokens": int(self.tokens[chosen].sum()),
            "n_bytes": int(self._bytes[chosen].sum()),
            "n_prompt_tokens": int((self._scored - self.tokens)[chosen].sum()),
        }

    @staticmethod
    def documents(arms: Mapping[str, Arm | None], averages: Mapping[str, Arm]) -> dict[str, Array]:
        """Sums of each document under the single models."""
        named = {name: arms[name] for name in ("seed", "dense", "random")}
        named |= {f"average-{name}": arm for name, arm in averages.items()}
        return {name: arm.nll for name, arm in named.items() if arm is not None}

    def resamples(self, chosen: Mask) -> Resamples:
        """Resamples of some documents."""
        config = self.config
        return Resamples(self.tokens[chosen], random_state=config.random_state, n_resamples=config.bootstrap_resamples)

    def summaries(self, arms: Mapping[str, Arm], dense: Arm | None) -> dict[str, dict[str, Any]]:
        """Figures of each arm on the reported half, and its ratio to the dense model on the same documents."""
        chosen = self.halves["report"]
        n_tokens, n_bytes = int(self.tokens[chosen].sum()), int(self._bytes[chosen].sum())
        nll = np.stack([arm.nll[chosen] for arm in arms.values()])  # (arms, documents)
        resamples = self.resamples(chosen)
        intervals = resamples.intervals(nll)
        ratios = None if dense is None else ratio_intervals(resamples, nll, dense.nll[chosen])
        rows: dict[str, dict[str, Any]] = {}
        for index, (name, arm) in enumerate(arms.items()):
            total = float(nll[index].sum())
            rows[name] = {
                "perplexity": exp(total / n_tokens),
                # Tokens that are each a part of a character spell none.
                "bits_per_byte": total / (math.log(2) * n_bytes) if n_bytes else math.inf,
                "nats": total / n_tokens,
                "interval": intervals[index].tolist(),
                "impossible_tokens": int(arm.impossible[chosen].sum()),
                "dense_ratio": None if dense is None else ratio(total, float(dense.nll[chosen].sum()), n_tokens),
                "dense_ratio_interval": None if ratios is None or ratios[index] is None else ratios[index],
            }
        return rows

    def group(self, among: Mask, arms: Mapping[str, Arm | None]) -> dict[str, Any]:
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
            row["dense_ratio"] = ratio(ensemble.nll[chosen].sum(), dense.nll[chosen].sum(), row["n_tokens"])
        if row["n_documents"] < 2:
            return row
        resamples = self.resamples(chosen)
        row["interval"] = resamples.intervals(ensemble.nll[None, chosen])[0].tolist()
        if dense is not None:
            row["dense_interval"] = resamples.intervals(dense.nll[None, chosen])[0].tolist()
            row["dense_ratio_interval"] = ratio_intervals(resamples, ensemble.nll[None, chosen], dense.nll[chosen])[0]
        return row


def ratio(nll: float, base: float, n_tokens: int) -> float | None:
    """Perplexity over that of the base; None where both are infinite."""
    return None if math.isinf(nll) and math.isinf(base) else exp((nll - base) / n_tokens)


def ratio_intervals(resamples: Resamples, nll: Array, base: Array) -> list[list[float] | None]:
    """Intervals of the ratios of perplexities; None where both sides find some token impossible."""
    if not np.isinf(base).any():
        return [list(map(float, pair)) for pair in resamples.ratio_intervals(nll, base)]
    return [
        None if np.isinf(row).any() else [float(end) for end in resamples.ratio_intervals(row[None], base)[0]]
        for row in nll
    ]


def exp(exponent: float) -> float:
    """e to a power, infinity where that is too large for a float."""
    return math.exp(exponent) if exponent < 700 else math.inf


def finite(value: Any) -> Any:
    """The same with None for what is infinite, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
