"""The last stage: from scores and text to result.json, settings.csv and report.html, and the run in the tracker."""

import csv
import io
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
from cbtm.cluster.clusterer import DOMAINS_FILE, Ancestor, Clusterer
from cbtm.cluster.domains import DOMAINS_FORMAT, balance
from cbtm.errors import ManifestError
from cbtm.manifest import Manifest, run_stage
from cbtm.merge.binding import check_experts
from cbtm.merge.evaluator import evaluate_documents
from cbtm.merge.report import render_report
from cbtm.merge.routed_text import routed_pieces, spread
from cbtm.merge.router import routing_weights
from cbtm.merge.scorer import LOG_PROBS_FILE, OFFSETS_FILE
from cbtm.merge.validation_set import Scores, ValidationSet, token_starts
from cbtm.plan import Part
from cbtm.progress import progress
from cbtm.run import DOCUMENTS_FILE, REPORT_FILE, RESULT_FILE, SETTINGS_FILE, Run
from cbtm.stages.few_shot import evaluate_tasks
from cbtm.stages.held_out import distances, held_out, validation_set
from cbtm.stages.result_tracking import track
from cbtm.stages.tracked import finish_parent
from cbtm.train.job import CURVE_FILE
from cbtm.train.member import Kind, Member


def evaluate(run: Run) -> Manifest:
    """Compare all ensembles, write the result, and close the run in the tracker."""
    made = run_stage(run.evaluate_spec(), lambda work: _evaluate(run, work))
    finish_parent(run)
    return made


def _evaluate(run: Run, work: Path) -> dict[str, Any]:
    scratch = work.parent
    clusterer_folder = run.fetch(run.cluster_spec(), scratch)
    clusterer = Clusterer.load(clusterer_folder)
    _check_bindings(run, clusterer.ancestors)
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch))
    held = held_out(run, scratch)
    validation = validation_set(run, held, tokenizer)
    scores = _scores(run, validation.offsets, scratch)
    near = distances(run, clusterer, tokenizer, validation, scratch)
    with progress("evaluate", "tokens") as shown:
        measured, documents = evaluate_documents(
            run.config.evaluate, validation, scores, near, body_share=_body_share(run), progress=shown.update
        )
    _write_documents(work / DOCUMENTS_FILE, validation, documents)
    measured["routing"] = _routed_documents(measured, validation, near, tokenizer)
    if run.config.tasks:
        measured["tasks"] = evaluate_tasks(run, clusterer, tokenizer, measured, scratch)
    result = _result(run, measured, read_domains(clusterer_folder / DOMAINS_FILE))
    (work / RESULT_FILE).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (work / SETTINGS_FILE).write_text(settings_table(result["ensemble"]), encoding="utf-8")
    (work / REPORT_FILE).write_text(render_report(result, _curves(run)), encoding="utf-8")
    track(run, result, [work / name for name in (RESULT_FILE, SETTINGS_FILE, REPORT_FILE)], clusterer_folder, scratch)
    dense = result["dense"]["perplexity"] if result["dense"] else None
    return {"dense": dense, "ensemble": best_setting(result)["perplexity"]}


def _write_documents(path: Path, validation: ValidationSet, nats: Mapping[str, NDArray[np.float64]]) -> None:
    """What each model gives to each held-out document, a row each: for comparisons of runs, document by document."""
    assert validation.sp_ids is not None  # a stage's documents have come from a corpus
    labels = validation.labels or [None] * len(validation.sp_ids)
    halves = np.where(validation.selection, "choosing", "reported")
    facts = (validation.sp_ids, validation.clusters, labels, halves, validation.n_counted, validation.n_bytes)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sp_id", "cluster", "label", "half", "tokens", "bytes", *nats])
        # As numbers of Python, whose repr is the shortest text that is the same number again.
        columns = [values.tolist() for values in nats.values()]
        for row in zip(*facts, *columns, strict=True):
            writer.writerow(row)


def _body_share(run: Run) -> float:
    """Part of the work of a forward pass at one token that is done before the head."""
    return float(run.load(run.score_spec(Member("seed"))).metadata["body_share"])


def _routed_documents(
    measured: Mapping[str, Any], validation: ValidationSet, near: NDArray[np.float32], tokenizer: TextTokenizer
) -> list[dict[str, Any]]:
    """Some reported documents, cut where the expert that is nearest changes, under the chosen setting."""
    best = best_setting(measured)
    mixed = measured["experts_evaluated"]
    offsets = validation.offsets
    shown = []
    for place in spread(validation.clusters, ~validation.selection):
        starts = token_starts(tokenizer, validation.texts[place], validation.tokens[place], validation.first, place)
        weights = routing_weights(
            near[offsets[place] : offsets[place + 1]][:, mixed],
            temperature=best["temperature"],
            distance_power=best["distance_power"],
            top_k=best["top_k"],
        )
        shown.append(
            {
                "sp_id": None if validation.sp_ids is None else validation.sp_ids[place],
                "cluster": int(validation.clusters[place]),
                "pieces": [list(piece) for piece in routed_pieces(validation.texts[place], starts[1:], weights, mixed)],
            }
        )
    return shown


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


def _check_bindings(run: Run, ancestors: Sequence[Ancestor]) -> None:
    """Refuse an expert that was trained for another cluster, or under another clusterer, than the router's."""
    for kind in ("expert", "random"):
        members = {one.cluster: one for one in run.config.members if one.kind == kind and one.cluster is not None}
        check_experts(
            {cluster: run.train_spec(member).root for cluster, member in members.items()},
            clusterer_digest=run.clusterer_digest,
            ancestors=ancestors,
            kind=kind,
        )


def _scores(run: Run, offsets: NDArray[np.int64], scratch: Path) -> Scores:
    def read(member: Member) -> NDArray[np.float32]:
        folder = run.fetch(run.score_spec(member), scratch / member.name)
        if not np.array_equal(np.load(folder / OFFSETS_FILE), offsets):
            raise ManifestError(f"the scores of {member.name} are of other documents; run the score stage again")
        values: NDArray[np.float32] = np.load(folder / LOG_PROBS_FILE, mmap_mode="r")
        return values

    def all_of(kind: str) -> list[NDArray[np.float32]]:
        return [read(member) for member in run.config.members if member.kind == kind]

    return Scores(
        seed=read(Member("seed")),
        experts=all_of("expert"),
        dense=read(Member("dense")) if run.config.train.dense else None,
        random=all_of("random") if run.config.train.random_clusters else None,
        averages={str(member.recipe): read(member) for member in run.config.averages},
        clusters=run.config.trained_clusters,
        top_k=run.config.score.top_k,
    )


def _counts(run: Run, part: Part) -> list[dict[str, int]]:
    """Documents, tokens and bytes of each learned cluster in one part of the corpus.

    What experts that are taken over were trained on is a part of it.
    """
    total = [dict.fromkeys(("documents", "tokens", "bytes"), 0) for _ in range(run.config.cluster.n_clusters)]
    found = [
        run.load(run.assign_spec(group.name)).metadata["clusters"]["learned"] for group in run.plan_made.part(part)
    ]
    if run.base is not None and part == "train":
        found.append(_counts(run.base, part))
    for clusters in found:
        for sums, counts in zip(total, clusters, strict=False):  # the run that is extended has a cluster less
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


def _result(run: Run, measured: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    config = run.config
    train, validation = _counts(run, "train"), _counts(run, "validation")
    documents, tokens = (sum(counts[key] for counts in train) for key in ("documents", "tokens"))
    trained = {member: run.load(run.train_spec(member)).metadata for member in config.members}
    averages = {member.recipe: run.load(run.train_spec(member)).metadata for member in config.averages}
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
            "extends": config.extends,
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
        "routing_settings": {**config.routing.model_dump(mode="json"), "preset": config.preset},
        "scoring": _scoring(run),
        **measured,
        "averages": [
            {**row, **{name: averages[row["name"]][name] for name in ("experts", "weights")}}
            for row in measured["averages"]
        ],
        "experts": experts,
        "domains": domains,
        "map": described["map"],
        "balance": sizes,
        "labels": described["agreement"],
    }


def _seconds(run: Run) -> dict[str, float]:
    """Seconds of work in each stage, summed over its tasks; of a task that was resumed, its last try."""
    members = _made_here(run)
    averages = run.config.averages
    specs = {
        "tokenizer": [run.tokenizer_spec()] if run.base is None else [],
        "cluster": [run.cluster_spec()],
        "assign": [run.assign_spec(group.name) for group in run.plan_made.groups],
        "seed": [run.train_spec(member) for member in members if member.kind == "seed"],
        "train": [run.train_spec(member) for member in members if member.kind != "seed"],
        "average": [run.train_spec(member) for member in averages],
        "score": [run.score_spec(member) for member in run.scored_members],
        "tasks": [run.tasks_spec(member) for member in run.scored_members if run.config.tasks],
    }
    found = {stage: [run.load(spec).metadata["seconds"] for spec in some] for stage, some in specs.items() if some}
    return {stage: round(sum(seconds), 1) for stage, seconds in found.items()}


def _made_here(run: Run) -> list[Member]:
    """The seed and what branches from it, without what another run has made."""
    return [member for member in (Member("seed"), *run.config.members) if not run.taken_over(member)]


def _cost(run: Run) -> list[dict[str, Any]]:
    """The cost line of each model that was trained here, the seed first."""
    found = ((member, run.load(run.train_spec(member)).metadata) for member in _made_here(run))
    return [{"member": member.name, **facts["cost"]} for member, facts in found if "cost" in facts]


def _curves(run: Run) -> dict[str, list[dict[str, float]]]:
    root = f"{run.config.root}/"
    members = (Member("seed"), *run.config.members)
    paths = [storage.join(run.member_root(member), CURVE_FILE).removeprefix(root) for member in members]
    texts = storage.read_each(run.config.root, paths).values()
    # A seed model that was given has no curve.
    found = {member.name: text for member, text in zip(members, texts, strict=True) if text is not None}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in found.items()}


def _scoring(run: Run) -> dict[str, Any]:
    """What the scores cost: one pass of each model, whatever the number of settings."""
    members = run.scored_members
    facts = [run.load(run.score_spec(member)).metadata for member in members]
    experts = [one["compute_share"] for member, one in zip(members, facts, strict=True) if member.kind == "expert"]
    sums = {name: sum(one[name] for one in facts) for name in ("forward_passes", "tokens_scored", "tokens_fed")}
    return {
        "models": len(members),
        **sums,
        "compute_share": sum(experts) / len(experts),
        "top_k": run.config.score.top_k,
    }


def best_setting(result: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen setting of the paper's ensemble with the most experts."""
    best: dict[str, Any] = next(row for row in result["ensemble"] if row["selected"])
    return best


def settings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every ensemble setting as CSV, one a line; intervals in two columns, infinity as nothing."""
    out = io.StringIO()
    intervals = [name for name, value in rows[0].items() if name.endswith("interval")]
    names = [name for name in rows[0] if name not in intervals]
    columns = [*names, *(f"{name}_{end}" for name in intervals for end in ("low", "high"))]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        ends = [end for name in intervals for end in (row[name] or (None, None))]
        writer.writerow([row[name] for name in names] + ends)
    return out.getvalue()
