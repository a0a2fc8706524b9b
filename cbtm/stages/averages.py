"""Averages of the experts' parameters: one model that costs what a single expert costs to run."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cbtm.branch.seed import load_model
from cbtm.merge.average import average_models, greedy_soup
from cbtm.merge.router import mean_routing_weights
from cbtm.merge.scorer import LOG_PROBS_FILE, score_documents
from cbtm.merge.validation_set import token_offsets
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.stages.held_out import HeldOut, distances, held_out, open_router_parts, validation_set
from cbtm.train.job import EXPERT_FILE
from cbtm.train.member import Member
from cbtm.train.slots import device_slot


def average(run: Run, member: Member, work: Path) -> dict[str, Any]:
    """Build one average in `work`."""
    scratch = work.parent
    clusters = run.config.trained_clusters
    with progress(f"average:{member.recipe}", "experts") as shown:
        folders = {}
        for cluster, expert in zip(clusters, run.experts, strict=True):
            folders[cluster] = run.fetch(run.train_spec(expert), scratch / expert.name)
            shown.update(len(folders), len(clusters))
        if member.recipe == "greedy":
            facts = _greedy(run, folders, work)
        else:
            weights = [1.0] * len(clusters) if member.recipe == "uniform" else _prior(run, scratch)
            average_models(list(folders.values()), weights, work)
            total = sum(weights)
            facts = {"experts": clusters, "weights": [weight / total for weight in weights]}
    facts = {"format": 1, "member": member.name, "kind": "average", "cluster": None, **facts}
    (work / EXPERT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _prior(run: Run, scratch: Path) -> list[float]:
    """Mean routing weight of each expert over the documents that nothing is reported on."""
    config = run.config.average
    clusterer, tokenizer = open_router_parts(run, scratch)
    validation = validation_set(run, held_out(run, scratch), tokenizer)
    near = distances(run, clusterer, tokenizer, validation, scratch)
    if len(run.config.trained_clusters) < clusterer.n_clusters:
        near = near[:, run.config.trained_clusters]
    chosen = np.repeat(validation.selection, np.diff(validation.offsets))
    if validation.counted is not None:
        chosen &= np.concatenate(validation.counted)
    weights = mean_routing_weights(near, chosen, temperature=config.temperature, distance_power=config.distance_power)
    return [float(weight) for weight in weights]


def _greedy(run: Run, folders: dict[int, Path], work: Path) -> dict[str, Any]:
    """The soup that is best on the documents that nothing is reported on."""
    scratch = work.parent
    documents = held_out(run, scratch)
    held = _selection(documents)
    found = {cluster: _alone(run, cluster, documents, scratch) for cluster in folders}
    numbers = iter(range(len(folders) + 1))

    def evaluate(folder: Path) -> float:
        output = scratch / f"soup-scores-{next(numbers)}"
        output.mkdir(exist_ok=True)  # an earlier try may have left it
        score_documents(
            load_model(folder),
            held.rows,
            run.config.score,
            context_length=run.config.train.context_length,
            facts={},
            folder=output,
        )
        values: np.ndarray[Any, np.dtype[np.float32]] = np.load(output / LOG_PROBS_FILE)
        counted = slice(None) if held.counted is None else np.concatenate(held.counted)
        return -float(values[counted].mean(dtype=np.float64))

    with device_slot(1, threads=run.config.score.threads):
        facts = greedy_soup(
            folders, sorted(found, key=lambda cluster: found[cluster]), evaluate, work, scratch / "soup"
        )
    chosen = facts["chosen"]
    return {"experts": sorted(chosen), "weights": [1 / len(chosen)] * len(chosen), "tried": facts["tried"]}


def _alone(run: Run, cluster: int, held: HeldOut, scratch: Path) -> float:
    """Mean negative log-probability of one expert by itself, on the documents that nothing is reported on."""
    folder = run.fetch(run.score_spec(Member("expert", cluster)), scratch / f"scores-{cluster}")
    values: np.ndarray[Any, np.dtype[np.float32]] = np.load(folder / LOG_PROBS_FILE)
    chosen = np.repeat(held.choosing, np.diff(token_offsets(held.rows)))
    if held.counted is not None:
        chosen &= np.concatenate(held.counted)
    return -float(values[chosen].mean(dtype=np.float64))


def _selection(held: HeldOut) -> HeldOut:
    chosen = np.flatnonzero(held.choosing)
    return HeldOut(
        rows=[held.rows[place] for place in chosen],
        clusters=held.clusters[chosen],
        records=[held.records[place] for place in chosen],
        counted=None if held.counted is None else [held.counted[place] for place in chosen],
        first=held.first,
        choosing=held.choosing[chosen],
    )
