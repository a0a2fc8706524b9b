"""The last stage: from scores and text to result.json, report.html, and the evaluation's run in the tracker."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cbtm
from cbtm import storage
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import DOMAINS_FILE, Clusterer
from cbtm.cluster.domains import DOMAINS_FORMAT, balance
from cbtm.corpus import Document
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
from cbtm.tokens import DocumentRecord
from cbtm.tracking import RunKind
from cbtm.train.expert import CURVE_FILE, EXPERT_FILE
from cbtm.train.member import Kind, Member

DOMAIN_TABLE_FILE = "domain_table.json"
"""Artifact of the evaluation's run in the tracker: the domains as MLflow's tables are stored."""


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
    described = read_domains(clusterer_folder / DOMAINS_FILE)
    result = _result(run, measured, described)
    (work / RESULT_FILE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / REPORT_FILE).write_text(render_report(result, _curves(run)), encoding="utf-8")
    table = scratch / DOMAIN_TABLE_FILE
    table.write_text(json.dumps(domain_table(result["domains"]), ensure_ascii=False) + "\n", encoding="utf-8")
    _track(run, result, [work / RESULT_FILE, work / REPORT_FILE, clusterer_folder / DOMAINS_FILE, table])
    dense = result["dense"]["perplexity"] if result["dense"] else None
    return {"dense": dense, "ensemble": _best(result)["perplexity"]}


def read_domains(path: Path) -> dict[str, Any]:
    """Read the description of the domains that the clusterer stage wrote.

    Raises:
        ManifestError: If it is of another version.
    """
    described = json.loads(path.read_text(encoding="utf-8"))
    found = described.get("format") if isinstance(described, dict) else 1  # the first was a plain list
    if found != DOMAINS_FORMAT:
        raise ManifestError(
            f"{path.name} has format {found!r}, this cbtm reads {DOMAINS_FORMAT}; fit the clusterer again"
        )
    return dict(described)


def _check_bindings(run: Run, scratch: Path) -> None:
    """Refuse an expert that was trained for another cluster, or under another clusterer, than the router's."""
    clusterer = run.clusterer_digest
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
    records = list(documents.records())
    there = {document.sp_id: document for document in run.documents("validation")}
    missing = [record.sp_id for record in records if record.sp_id not in there]
    if missing:
        raise ManifestError(f"validation document {missing[0]} is no longer in the corpus; run the assign stage again")
    found = [there[record.sp_id] for record in records]
    return ValidationSet(
        texts=[document.text for document in found],
        tokens=list(documents.documents()),
        clusters=clusters,
        n_bytes=np.array([answer_bytes(*pair) for pair in zip(found, records, strict=True)], dtype=np.int64),
        counted=list(documents.learned_targets()) if documents.has_prompts else None,
    )


def answer_bytes(document: Document, record: DocumentRecord) -> int:
    """UTF-8 bytes of a document after its prompt.

    A token that begins in the prompt and ends after it counts, and its bytes in the prompt do not: bits per byte are
    then of the same text for every tokenizer, and never too low.
    """
    return record.n_bytes - len(document.text[: document.prompt].encode())


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
        clusters=run.config.train.trained_clusters(run.config.cluster.n_clusters),
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


def domain_entries(
    described: Mapping[str, Any], counts: Sequence[Mapping[str, int]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The domains of result.json and their balance.

    Args:
        described: The content of domains.json.
        counts: Documents and tokens of each cluster in the training split, as assigned.

    Returns:
        The entries of domains.json with documents, tokens and their shares; and the balance (smallest, largest,
        ratio) in documents and tokens, as assigned, and in documents of the fit.
    """
    documents, tokens = ([count[unit] for count in counts] for unit in ("documents", "tokens"))
    entries = [
        {
            "cluster": domain["cluster"],
            "documents": n_documents,
            "tokens": n_tokens,
            "share_documents": n_documents / sum(documents),
            "share_tokens": n_tokens / sum(tokens),
            **domain,
        }
        for domain, n_documents, n_tokens in zip(described["domains"], documents, tokens, strict=True)
    ]
    return entries, {
        "documents": balance(documents),
        "tokens": balance(tokens),
        "fit": described["balance"]["fit"],
    }


def expert_entry(row: Mapping[str, Any], domain: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `experts` in result.json.

    Args:
        row: Cluster and perplexity of the expert.
        domain: The entry of `domains` of its cluster.
        facts: Metadata of its training's manifest.
    """
    return {
        **row,
        **{name: domain[name] for name in ("documents", "tokens", "top_terms")},
        **{name: facts[name] for name in ("tokens_seen", "steps")},
    }


def tokens_seen(trained: Mapping[Member, Mapping[str, Any]]) -> dict[str, int | None]:
    """Training tokens of the dense model, of all experts and of all random-cluster experts; None where there is none.

    Args:
        trained: Metadata of the training's manifest of each member.
    """
    kinds: dict[str, Kind] = {"dense": "dense", "experts": "expert", "random": "random"}
    seen = {
        name: [facts["tokens_seen"] for member, facts in trained.items() if member.kind == kind]
        for name, kind in kinds.items()
    }
    return {name: sum(counts) if counts else None for name, counts in seen.items()}


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


def _result(run: Run, measured: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    config = run.config
    train, validation = _counts(run, "train"), _counts(run, "validation")
    documents, tokens = (sum(counts[key] for counts in train) for key in ("documents", "tokens"))
    trained = {member: run.load(run.train_spec(member)).metadata for member in config.members}
    domains, sizes = domain_entries(described, train)
    by_cluster = {domain["cluster"]: domain for domain in domains}
    experts = [
        expert_entry(row, by_cluster[row["cluster"]], trained[Member("expert", row["cluster"])])
        for row in measured["experts"]
    ]
    return {
        "format": 1,
        "run": {
            "name": config.name,
            "root": config.root,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "cbtm_version": cbtm.__version__,
            "seconds": _seconds(run),
            "cost": _cost(run),
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
        "tokens_seen": tokens_seen(trained),
        "steps": config.train.steps,
        "clusters_trained": [row["cluster"] for row in experts],
        **measured,
        "experts": experts,
        "domains": domains,
        "map": described["map"],
        "balance": sizes,
        "labels": described["agreement"],
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


def _cost(run: Run) -> list[dict[str, Any]]:
    """The cost line of each model that was trained here, the seed first."""
    found = ((member, run.load(run.train_spec(member)).metadata) for member in (Member("seed"), *run.config.members))
    return [{"member": member.name, **facts["cost"]} for member, facts in found if "cost" in facts]


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


def _track(run: Run, result: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
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
        chosen_by = {key: best[key] for key in ("distance_power", "temperature", "top_k")}
        tracker.log_params({**chosen_by, "clusters_trained": result["clusters_trained"]})
        tracker.log_metrics(_figures(best), run.config.train.steps)
        tracker.log_metrics(cluster_figures(result, run.load(run.cluster_spec()).metadata), run.config.train.steps)
        for path in artifacts:
            tracker.log_artifact(path)
        # By this tag MLflow's pages know which artifacts are tables.
        tracker.set_tags({"mlflow.loggedArtifacts": json.dumps([{"path": DOMAIN_TABLE_FILE, "type": "table"}])})


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
