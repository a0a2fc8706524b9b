"""Stages of a comparison: check it, and put the results of its arms side by side."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import cbtm
from cbtm import stages, storage
from cbtm.comparison import (
    COMPARISON_FILE,
    COMPARISON_REPORT_FILE,
    COMPARISON_TABLE_FILE,
    Arm,
    Comparison,
)
from cbtm.errors import ConfigError, ManifestError
from cbtm.manifest import Manifest, is_current, run_stage
from cbtm.merge.arms import ArmDocuments, compare_arms
from cbtm.merge.arms_report import comparison_csv, render_comparison, row_name
from cbtm.run import DOCUMENTS_FILE, Run
from cbtm.stages.tracked import child, finish_parent, settings

_FACTS = ("sp_id", "cluster", "label", "half", "tokens", "bytes")


def compare(comparison: Comparison) -> Manifest:
    """Write comparison.json, comparison.csv and comparison.html, and the figures into the tracker."""
    made = run_stage(comparison.spec(), lambda work: _compare(comparison, work))
    finish_parent(comparison.shared)
    return made


def finished(comparison: Comparison) -> bool:
    """Tell whether every arm and the comparison are there and belong to this configuration and this corpus."""
    shared = comparison.shared
    if not storage.exists(shared.uri("manifest.json")):
        return False
    try:
        shared.make_plan()
        if not all(stages.finished(comparison.run(arm)) for arm in comparison.arms):
            return False
        spec = comparison.spec()
        return is_current(spec, shared.load(spec))
    except (ManifestError, ConfigError):
        return False


def result(comparison: Comparison) -> dict[str, Any]:
    """The content of comparison.json."""
    values: dict[str, Any] = json.loads(storage.read_bytes(comparison.shared.uri(COMPARISON_FILE)))
    return values


def _compare(comparison: Comparison, work: Path) -> dict[str, Any]:
    config = comparison.config
    runs = {arm: comparison.run(arm) for arm in comparison.arms}
    results = {arm: run.result() for arm, run in runs.items()}
    compared = compare_arms(
        [_documents(arm, run) for arm, run in runs.items()],
        random_state=config.evaluate.random_state,
        n_resamples=config.evaluate.bootstrap_resamples,
    )
    _name_groups(compared["groups"], {arm.name: found for arm, found in results.items()})
    made = {
        "format": 1,
        "run": {
            "name": config.name,
            "root": config.root,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "cbtm_version": cbtm.__version__,
        },
        "tokens_per_arm": config.train.total_tokens,
        **compared,
        "arms": [_arm_facts(arm, run, results[arm]) for arm, run in runs.items()],
    }
    (work / COMPARISON_FILE).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / COMPARISON_TABLE_FILE).write_text(comparison_csv(made), encoding="utf-8")
    (work / COMPARISON_REPORT_FILE).write_text(render_comparison(made), encoding="utf-8")
    _track(comparison, made, work)
    whole = [row for row in made["rows"] if row["top_k"] in (None, row["n_clusters"])]
    return _known({row_name(row): row["perplexity"] for row in whole})


def _documents(arm: Arm, run: Run) -> ArmDocuments:
    text = storage.read_bytes(run.uri(DOCUMENTS_FILE)).decode()
    columns: dict[str, list[str]] = {}
    rows = csv.reader(io.StringIO(text, newline=""))
    names = next(rows)
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        columns[name] = list(values)
    return ArmDocuments(
        name=arm.name,
        kind=arm.kind,
        n_clusters=arm.n_clusters,
        random_state=arm.random_state,
        sp_ids=columns["sp_id"],
        clusters=np.array(columns["cluster"], dtype=np.int64),
        labels=columns["label"],
        reported=np.array(columns["half"]) == "reported",
        tokens=np.array(columns["tokens"], dtype=np.int64),
        nats={name: np.array(values, dtype=np.float64) for name, values in columns.items() if name not in _FACTS},
    )


def _name_groups(groups: dict[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the top terms of clusters to the groups."""
    if groups["by"] == "cluster":
        terms = {domain["cluster"]: domain["top_terms"][:5] for domain in results[groups["of"]]["domains"]}
        for row in groups["rows"]:
            row["terms"] = terms[row["name"]]


def _arm_facts(arm: Arm, run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    chosen = next(row for row in found["ensemble"] if row["selected"])
    train = run.config.train
    return {
        "name": arm.name,
        "kind": arm.kind,
        "n_clusters": run.config.cluster.n_clusters,
        "random_state": arm.random_state,
        "root": run.config.root,
        "steps": train.steps,
        "sequences_per_step": train.share(run.config.cluster.n_clusters),
        "tokens_seen": found["tokens_seen"]["experts"],
        "random_tokens_seen": found["tokens_seen"]["random"],
        "temperature": chosen["temperature"],
        "distance_power": chosen["distance_power"],
        "balance_documents": found["balance"]["documents"]["ratio"],
        "balance_tokens": found["balance"]["tokens"]["ratio"],
        "seconds": found["run"]["seconds"],
    }


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are finite: the others are None."""
    return {name: value for name, value in values.items() if value is not None}


def _track(comparison: Comparison, made: Mapping[str, Any], work: Path) -> None:
    """A run in the tracker for each row, and one for each line of the figure, whose steps are the values of k."""
    shared, step = comparison.shared, comparison.config.train.steps
    for row in made["rows"]:
        low, high = row["dense_ratio_interval"] or (None, None)
        params = {
            **settings(shared),
            "n_clusters": row["n_clusters"],
            "arm": row["kind"],
            "top_k": row["n_clusters"] if row["top_k"] is None else row["top_k"],
            "random_states": [one["random_state"] for one in row["by_random_state"]],
        }
        figures = {
            "eval/perplexity": row["perplexity"],
            "eval/perplexity_least": row["least"],
            "eval/perplexity_largest": row["largest"],
            "eval/dense_ratio": row["dense_ratio"],
            "eval/dense_ratio_low": low,
            "eval/dense_ratio_high": high,
        }
        name = f"comparison-{row['kind']}-k{row['n_clusters']}" + (f"-top{row['top_k']}" if row["top_k"] else "")
        with child(shared, name, "comparison", params=params) as tracker:
            tracker.log_metrics(_known(figures), step)
    with child(shared, "comparison", "comparison", own_task=True) as tracker:
        for name in (COMPARISON_FILE, COMPARISON_TABLE_FILE, COMPARISON_REPORT_FILE):
            tracker.log_artifact(work / name)
    for name, points in _lines(made["rows"]):
        with child(shared, f"line-{name}", "comparison", params={**settings(shared), "arm": name}) as tracker:
            for k, row in points:
                values = {"compare/perplexity": row["perplexity"], "compare/dense_ratio": row["dense_ratio"]}
                tracker.log_metrics(_known(values), k)


def _lines(rows: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[int, Mapping[str, Any]]]]]:
    """The lines of the figure: perplexity at each k; a dense model is the same at each."""
    ks = sorted({row["n_clusters"] for row in rows if row["kind"] == "clusters"})
    for name, kind in (("c-BTM", "clusters"), ("random", "random")):
        points = [
            (row["n_clusters"], row)
            for row in rows
            if row["kind"] == kind and row["top_k"] in (None, row["n_clusters"])
        ]
        if points:
            yield name, points
    dense = next(row for row in rows if row["kind"] == "dense")
    yield "dense", [(k, dense) for k in ks]
