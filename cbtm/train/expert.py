"""Training one member of a run: from a job to a Hugging Face folder with expert.json.

Runs in every process that trains the member; rank 0 reports and writes.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cbtm.branch.cluster_tokens import add_cluster_tokens, cluster_token, extend_vocabulary
from cbtm.branch.seed import load_model, save_model
from cbtm.branch.tokenizer import TOKENIZER_FILES, TextTokenizer
from cbtm.tokens import TokenDocuments
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.cost import cost_of
from cbtm.train.data import BlockOrder
from cbtm.train.job import CURVE_FILE, EXPERT_FILE, TrainJob
from cbtm.train.member import Member
from cbtm.train.ranks import Ranks, choose_device, joined
from cbtm.train.trainer import Report, TrainResult, train
from cbtm.train.validation import Validation

if TYPE_CHECKING:
    from torch import nn


def train_expert(
    job: TrainJob, *, report: Report, progress: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train one member and write it as a Hugging Face folder with expert.json and its training curve.

    Args:
        job: Everything about it.
        report: Receives the training curve, on rank 0.
        progress: Receives every step, on rank 0.

    Returns:
        The content of expert.json.
    """
    with joined(choose_device(job.config.device)) as ranks:
        model = load_model(job.start, dropout=job.config.dropout)
        prefix = _prefix_token(job, model)
        order = BlockOrder(
            job.documents(),
            context_length=job.config.context_length,
            seed=job.config.random_state,
            packing=job.config.packing,
            prefix_token=prefix,
        )
        result = train(
            model,
            order,
            job.config,
            sequences_per_step=job.sequences_per_step,
            checkpoints=Checkpoints(
                job.checkpoints,
                key=job.key,
                scratch=job.scratch / "checkpoints",
                keep=job.config.checkpoints_kept,
                ranks=ranks,
                describe=lambda folder: _describe(job, model, folder),
            ),
            report=report,
            progress=progress,
            validation=_validation(job, prefix),
            ranks=ranks,
        )
        facts = _facts(job, order, result, ranks)
        if ranks.is_first:
            _write(job, model, result, facts)
        ranks.wait()
    return facts


def _prefix_token(job: TrainJob, model: "nn.Module") -> int | None:
    """Id of the member's cluster token, for which the model's vocabulary is extended; None without one."""
    cluster = job.cluster
    if job.cluster_tokens is None or cluster is None:
        return None
    first = TextTokenizer.load(job.tokenizer).vocab_size
    extend_vocabulary(model, job.cluster_tokens, first_id=first)
    return first + cluster


def _validation(job: TrainJob, prefix: int | None) -> Validation | None:
    data = job.validation
    if data is None:
        return None
    return Validation(
        TokenDocuments(list(data.shards)),
        np.load(data.clusters),
        cluster=job.cluster,
        context_length=job.config.context_length,
        max_blocks=job.config.validation_sequences,
        prefix_token=prefix,
        documents_used=np.load(data.used),
    )


def _facts(job: TrainJob, order: BlockOrder, result: TrainResult, ranks: Ranks) -> dict[str, Any]:
    cost = cost_of(
        result.flops_per_token,
        job.config,
        device=result.device,
        n_devices=ranks.world_size,
        tokens=result.computed_tokens,
        seconds=result.seconds,
    )
    return {
        **_identity(job),
        "documents": order.documents.n_documents,
        "corpus_tokens": order.documents.n_tokens,
        "tokens_seen": result.tokens,
        "epochs": round(result.epochs, 4),
        "steps": result.steps,
        "sequences_per_step": job.sequences_per_step,
        "cost": cost,
        "final_loss": next(point["train/loss"] for point in reversed(result.curve) if "train/loss" in point),
        **({"validation": result.validation} if result.validation else {}),
        **({"cluster_token": cluster_token(job.cluster)} if job.cluster_tokens and job.cluster is not None else {}),
    }


def _identity(job: TrainJob) -> dict[str, Any]:
    member = Member.parse(job.member)
    return {"format": 1, "member": member.name, "kind": member.kind, "cluster": member.cluster, **job.bindings}


def _describe(job: TrainJob, model: "nn.Module", folder: Path) -> None:
    """Put beside a checkpoint's tensors what makes them a model: its configuration, its tokenizer, what it is."""
    whole: Any = model
    whole.config.save_pretrained(folder)
    if whole.can_generate():
        whole.generation_config.save_pretrained(folder)
    _save_tokenizer(job, folder)
    (folder / EXPERT_FILE).write_text(json.dumps(_identity(job), indent=1) + "\n", encoding="utf-8")


def _save_tokenizer(job: TrainJob, folder: Path) -> None:
    if job.cluster_tokens is not None and job.cluster is not None:
        add_cluster_tokens(job.tokenizer, folder, job.cluster_tokens)
        return
    for name in TOKENIZER_FILES:
        shutil.copyfile(job.tokenizer / name, folder / name)


def _write(job: TrainJob, model: "nn.Module", result: TrainResult, facts: Mapping[str, Any]) -> None:
    save_model(model, job.output, result.weights)
    _save_tokenizer(job, job.output)
    (job.output / EXPERT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(point) + "\n" for point in result.curve)
    (job.output / CURVE_FILE).write_text(lines, encoding="utf-8")
