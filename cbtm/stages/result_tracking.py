"""The result of a run in the tracker: a run for each model and each ensemble that people compare, with equal keys."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cbtm import storage
from cbtm.cluster.clusterer import DOMAINS_FILE
from cbtm.run import Run
from cbtm.stages.tracked import child
from cbtm.tracking import RunKind
from cbtm.train.member import Member

DOMAIN_TABLE_FILE = "domain_table.json"
"""Artifact of the evaluation's run in the tracker: the domains as MLflow's tables are stored."""

_TEMPERATURE_STEPS = 1000
"""Steps are whole numbers: a temperature of 0.05 is step 50."""


def track(run: Run, result: Mapping[str, Any], artifacts: Sequence[Path], clusterer: Path, scratch: Path) -> None:
    """Log every figure that people compare: the same keys for every model and ensemble.

    Args:
        run: The run.
        result: The content of result.json.
        artifacts: Files to keep with the ensemble's run.
        clusterer: The clusterer's folder.
        scratch: Folder for what is made on the way.
    """
    step = run.config.train.steps
    for name, kind, cluster, figures in _models(result):
        with child(run, name, kind, cluster=cluster) as tracker:
            tracker.log_metrics(figures, step)
    for name, row in _other_ensembles(result):
        with child(run, name, "ensemble") as tracker:
            tracker.log_params(_setting(row))
            tracker.log_metrics({**_figures(row), **task_figures(result, row)}, step)
    table = scratch / DOMAIN_TABLE_FILE
    table.write_text(json.dumps(domain_table(result["domains"]), ensure_ascii=False) + "\n", encoding="utf-8")
    _track_ensemble(run, result, [*artifacts, clusterer / DOMAINS_FILE, table])


def _track_ensemble(run: Run, result: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
    """The ensemble that the result is about, with what top-k and temperature do to it, and the files."""
    corpus, step = run.config.corpus, run.config.train.steps
    best = next(row for row in result["ensemble"] if row["selected"])
    with child(run, "ensemble", "ensemble", own_task=True) as tracker:
        digest = run.plan_made.digest("validation")[:32]
        tracker.log_dataset(corpus.root, storage.join(corpus.root, corpus.validation_split), digest, "validation")
        clustering = [row for row in result["ensemble"] if row["ensemble"] == "clustering"]
        for row in clustering:
            if row["selected"]:
                tracker.log_metrics(_stepped("top_k", row), row["top_k"])
            if row["top_k"] == best["top_k"] and row["distance_power"] == best["distance_power"]:
                tracker.log_metrics(_stepped("temperature", row), round(_TEMPERATURE_STEPS * row["temperature"]))
        tracker.log_params({**_setting(best), "clusters_trained": result["clusters_trained"]})
        tracker.log_metrics({**_figures(best), **task_figures(result, best)}, step)
        tracker.log_metrics(cluster_figures(result, run.load(run.cluster_spec()).metadata), step)
        for path in artifacts:
            tracker.log_artifact(path)
        # By this tag MLflow's pages know which artifacts are tables.
        tracker.set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": DOMAIN_TABLE_FILE, "type": "table"}])})


def _models(result: Mapping[str, Any]) -> Iterator[tuple[str, RunKind, int | None, dict[str, float]]]:
    """Name of the run, its kind, its cluster, and the figures of each single model."""
    kinds: tuple[RunKind, ...] = ("seed", "dense", "random")
    for kind in kinds:
        if result[kind]:
            name = f"evaluation-{kind}" if kind == "random" else kind
            yield name, kind, None, {**_figures(result[kind]), **task_figures(result, kind)}
    for average in result["averages"]:
        name = Member("average", recipe=average["name"]).name
        yield name, "average", None, {**_figures(average), **task_figures(result, name)}
    by_domain = {row["cluster"]: row for row in result["by_domain"]}
    for expert in result["experts"]:
        values = {"eval/perplexity": expert["perplexity"]}
        values["eval/own_domain_perplexity"] = by_domain[expert["cluster"]]["own_expert"]
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            yield Member("expert", expert["cluster"]).name, "expert", expert["cluster"], known


def _other_ensembles(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The chosen setting of every other top-k, and of every other kind with the most experts."""
    seen = {"clustering"}
    chosen = [row for row in result["ensemble"] if row["selected"]]
    for row in chosen[1:]:
        if row["ensemble"] == "clustering":
            yield f"ensemble-top-{row['top_k']}", row
        elif row["ensemble"] not in seen:
            seen.add(row["ensemble"])
            yield f"ensemble-{row['ensemble']}", row


def task_figures(result: Mapping[str, Any], of: str | Mapping[str, Any]) -> dict[str, float]:
    """Accuracies of a model, by name, or of an ensemble, by its row, in each few-shot task."""
    figures = {}
    for task in result.get("tasks") or []:
        for row in task["rows"]:
            same = row["model"] == of if isinstance(of, str) else _same_ensemble(row, of)
            if same and row["selected"]:
                figures[f"task/{task['name']}/accuracy_{row['scoring']}"] = row["accuracy"]
    return figures


def _same_ensemble(row: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """A task chooses temperature and exponent by itself, on its own examples."""
    return row["model"] == "ensemble" and (row["ensemble"], row["top_k"]) == (of["ensemble"], of["top_k"])


def domain_table(domains: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The domains as columns and rows, which is how MLflow stores a table (`mlflow.load_table` reads it)."""
    columns = ["cluster", "top_terms", "documents", "tokens", "share_documents", "share_tokens", "fit_documents"]
    rows = [
        [
            *(", ".join(domain[name]) if name == "top_terms" else domain[name] for name in columns),
            domain["radius"],
            ", ".join(str(one["cluster"]) for one in domain["neighbours"]),
            ", ".join(f"{one['label']} {one['share']:.2f}" for one in domain["labels"]),
        ]
        for domain in domains
    ]
    return {"columns": [*columns, "radius", "neighbours", "labels"], "data": rows}


def cluster_figures(result: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the clusterer for the tracker; what is not known, such as the ratio to an empty domain, is left out.

    Args:
        result: The content of result.json.
        facts: Metadata of the clusterer's manifest.
    """
    labels = result["labels"] or {}
    values = {
        "balance_documents": result["balance"]["documents"]["ratio"],
        "balance_tokens": result["balance"]["tokens"]["ratio"],
        "explained_energy": facts.get("explained_energy"),
        "inertia": facts.get("inertia"),
        "nmi": labels.get("nmi"),
        "purity": labels.get("purity"),
    }
    return {f"cluster/{name}": value for name, value in values.items() if value is not None}


def _setting(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("ensemble", "distance_power", "temperature", "top_k") if row[key] is not None}


def _stepped(by: str, row: Mapping[str, Any]) -> dict[str, float]:
    names = ("perplexity", "bits_per_byte", "temperature", "distance_power", "experts_used", "flops_relative")
    return {f"eval/{by}/{name}": row[name] for name in names if row[name] is not None}


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row of result.json, under keys that are the same in every run; infinite ones are left out."""
    low, high = row["interval"]
    low_ratio, high_ratio = row["dense_ratio_interval"] or (None, None)
    names = ("perplexity", "bits_per_byte", "nats", "impossible_tokens", "dense_ratio")
    values = {
        **{name: row[name] for name in names},
        "perplexity_low": low,
        "perplexity_high": high,
        "dense_ratio_low": low_ratio,
        "dense_ratio_high": high_ratio,
        **{name: row.get(name) for name in ("experts_used", "flops_relative", "routing_entropy")},
    }
    return {f"eval/{name}": value for name, value in values.items() if value is not None}
