"""The last stage: from scores and text to result.json, report.html, and the evaluation's run in the tracker."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cbtm
from cbtm import storage
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import DOMAINS_FILE, Clusterer
from cbtm.errors import ManifestError
from cbtm.manifest import Manifest, run_stage
from cbtm.merge.evaluator import Scores, ValidationSet, context_distances
from cbtm.merge.evaluator import evaluate as evaluate_scores
from cbtm.merge.report import render_report
from cbtm.merge.scorer import LOG_PROBS_FILE, OFFSETS_FILE
from cbtm.plan import Part
from cbtm.progress import progress
from cbtm.run import REPORT_FILE, RESULT_FILE, Run
from cbtm.stages.tracked import child, finish_parent
from cbtm.tracking import RunKind
from cbtm.train.expert import CURVE_FILE, EXPERT_FILE
from cbtm.train.member import Member


def evaluate(run: Run) -> Manifest:
    """Compare all ensembles, write the result, and close the run in the tracker."""
    made = run_stage(run.evaluate_spec(), lambda work: _evaluate(run, work))
    finish_parent(run)
    return made


def _evaluate(run: Run, work: Path) -> dict[str, Any]:
    scratch = work.parent
    _check_bindings(run, scratch)
    clusterer_folder = run.fetch(run.cluster_spec(), scratch)
    clusterer = Clusterer.load(clusterer_folder)
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))
    validation = _validation_set(run, scratch)
    scores = _scores(run, validation.offsets, scratch)
    with progress("evaluate", "documents") as shown:
        distances = context_distances(clusterer, tokenizer, validation, shown.update)
    measured = evaluate_scores(run.config.evaluate, validation, scores, distances)
    domains = json.loads((clusterer_folder / DOMAINS_FILE).read_text(encoding="utf-8"))
    result = _result(run, measured, domains)
    (work / RESULT_FILE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / REPORT_FILE).write_text(render_report(result, _curves(run)), encoding="utf-8")
    _track(run, result, work)
    dense = result["dense"]["perplexity"] if result["dense"] else None
    return {"dense": dense, "ensemble": _best(result)["perplexity"]}


def _check_bindings(run: Run, scratch: Path) -> None:
    """Refuse an expert that was trained for another cluster, or under another clusterer, than the router's."""
    clusterer = run.load(run.cluster_spec()).digest
    for member in run.config.members:
        spec = run.train_spec(member)
        found = json.loads(storage.read_bytes(storage.join(spec.root, EXPERT_FILE)))
        if found["clusterer_digest"] != clusterer:
            raise ManifestError(
                f"{spec.root} was trained under clusterer {found['clusterer_digest'][:12]}, the router has "
                f"{clusterer[:12]}: weights would go to the wrong experts; train it again"
            )
        if found["cluster"] != member.cluster:
            raise ManifestError(f"{spec.root} is the expert of cluster {found['cluster']}, not of {member.cluster}")


def _validation_set(run: Run, scratch: Path) -> ValidationSet:
    documents, clusters = run.validation_documents(scratch)
    records = documents.records()
    texts = {document.sp_id: document.text for document in run.documents("validation")}
    missing = [record.sp_id for record in records if record.sp_id not in texts]
    if missing:
        raise ManifestError(f"validation document {missing[0]} is no longer in the corpus; run the assign stage again")
    return ValidationSet(
        texts=[texts[record.sp_id] for record in records],
        tokens=list(documents.documents()),
        clusters=clusters,
        n_bytes=np.array([record.n_bytes for record in records], dtype=np.int64),
    )


def _scores(run: Run, offsets: NDArray[np.int64], scratch: Path) -> Scores:
    def read(member: Member) -> NDArray[np.float32]:
        folder = run.fetch(run.score_spec(member), scratch / member.name)
        if not np.array_equal(np.load(folder / OFFSETS_FILE), offsets):
            raise ManifestError(f"the scores of {member.name} are of other documents; run the score stage again")
        values: NDArray[np.float32] = np.load(folder / LOG_PROBS_FILE)
        return values

    def stack(kind: str) -> NDArray[np.float32]:
        return np.stack([read(member) for member in run.config.members if member.kind == kind])

    return Scores(
        seed=read(Member("seed")),
        experts=stack("expert"),
        dense=read(Member("dense")) if run.config.train.dense else None,
        random=stack("random") if run.config.train.random_clusters else None,
    )


def _counts(run: Run, part: Part) -> list[dict[str, int]]:
    """Documents, tokens and bytes of each learned cluster in one part of the corpus."""
    total = [dict.fromkeys(("documents", "tokens", "bytes"), 0) for _ in range(run.config.cluster.n_clusters)]
    for group in run.plan_made.part(part):
        for sums, counts in zip(
            total, run.load(run.assign_spec(group.name)).metadata["clusters"]["learned"], strict=True
        ):
            for key in sums:
                sums[key] += counts[key]
    return total


def _result(run: Run, measured: Mapping[str, Any], domains: list[dict[str, Any]]) -> dict[str, Any]:
    config = run.config
    train, validation = _counts(run, "train"), _counts(run, "validation")
    documents, tokens = (sum(counts[key] for counts in train) for key in ("documents", "tokens"))
    experts = [
        {**row, "documents": counts["documents"], "tokens": counts["tokens"], "top_terms": domain["top_terms"]}
        for row, counts, domain in zip(measured["experts"], train, domains, strict=True)
    ]
    return {
        "format": 1,
        "run": {
            "name": config.name,
            "root": config.root,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "cbtm_version": cbtm.__version__,
            "seconds": _seconds(run),
        },
        "corpus": {
            "root": config.corpus.root,
            "train_split": config.corpus.train_split,
            "validation_split": config.corpus.validation_split,
            "train_documents": documents,
            "train_tokens": tokens,
            "validation_documents": sum(counts["documents"] for counts in validation),
            "validation_tokens": sum(counts["tokens"] for counts in validation),
            "digest": run.plan_made.digest("train"),
        },
        "n_clusters": config.cluster.n_clusters,
        "tokens_per_arm": config.train.total_tokens,
        "steps": config.train.steps,
        **measured,
        "experts": experts,
        "domains": [
            {
                "cluster": domain["cluster"],
                "documents": counts["documents"],
                "tokens": counts["tokens"],
                "share_documents": counts["documents"] / documents,
                "share_tokens": counts["tokens"] / tokens,
                "top_terms": domain["top_terms"],
                "examples": domain["examples"],
            }
            for domain, counts in zip(domains, train, strict=True)
        ],
        "labels": None,
    }


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of work in each stage, summed over its tasks; of a task that was resumed, its last try."""
    members = (Member("seed"), *run.config.members)
    specs = {
        "tokenizer": [run.tokenizer_spec()],
        "cluster": [run.cluster_spec()],
        "assign": [run.assign_spec(group.name) for group in run.plan_made.groups],
        "seed": [run.train_spec(members[0])],
        "train": [run.train_spec(member) for member in members[1:]],
        "score": [run.score_spec(member) for member in members],
    }
    return {stage: round(sum(run.load(spec).metadata["seconds"] for spec in some), 1) for stage, some in specs.items()}


def _curves(run: Run) -> dict[str, list[dict[str, float]]]:
    curves = {}
    for member in (Member("seed"), *run.config.members):
        uri = storage.join(run.member_root(member), CURVE_FILE)
        if storage.exists(uri):  # a seed model that was given has no curve
            curves[member.name] = [json.loads(line) for line in storage.read_bytes(uri).splitlines()]
    return curves


def _best(result: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen setting with the most experts."""
    best: dict[str, Any] = next(row for row in result["ensemble"] if row["selected"])
    return best


def _track(run: Run, result: Mapping[str, Any], work: Path) -> None:
    """Log every figure that people compare: the same keys for every model, top-k as the step of the ensemble."""
    corpus = run.config.corpus
    kinds: tuple[RunKind, ...] = ("seed", "dense", "random")
    for name in kinds:
        if result[name]:
            with child(
                run, f"evaluation-{name}" if name == "random" else name, "random" if name == "random" else name
            ) as tracker:
                tracker.log_metrics(_figures(result[name]), run.config.train.steps)
    for expert in result["experts"]:
        member = Member("expert", expert["cluster"])
        with child(run, member.name, "expert", cluster=member.cluster) as tracker:
            tracker.log_metrics({"eval/perplexity": expert["perplexity"]}, run.config.train.steps)
    with child(run, "ensemble", "ensemble") as tracker:
        digest = run.plan_made.digest("validation")[:32]
        tracker.log_dataset(corpus.root, storage.join(corpus.root, corpus.validation_split), digest, "validation")
        chosen = [row for row in result["ensemble"] if row["selected"]]
        for row in chosen:
            tracker.log_metrics({f"eval/top_k/{name}": value for name, value in _plain(row).items()}, row["top_k"])
        best = _best(result)
        tracker.log_params({key: best[key] for key in ("distance_power", "temperature", "top_k")})
        tracker.log_metrics(_figures(best), run.config.train.steps)
        tracker.log_artifact(work / RESULT_FILE)
        tracker.log_artifact(work / REPORT_FILE)


def _plain(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("perplexity", "bits_per_byte", "temperature", "distance_power")}


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    low, high = row["interval"]
    return {
        "eval/perplexity": row["perplexity"],
        "eval/bits_per_byte": row["bits_per_byte"],
        "eval/perplexity_low": low,
        "eval/perplexity_high": high,
    }
