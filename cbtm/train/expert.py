"""Training one member of a run: from a model and a token stream to a Hugging Face folder with expert.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtm.branch.seed import save_model
from cbtm.tokens import TokenDocuments
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.cost import cost_of
from cbtm.train.data import BlockOrder
from cbtm.train.member import Member
from cbtm.train.trainer import Report, train

if TYPE_CHECKING:
    from torch import nn

EXPERT_FILE, CURVE_FILE = "expert.json", "training.jsonl"


def train_member(
    member: Member,
    model: "nn.Module",
    documents: TokenDocuments,
    config: OptimizationConfig,
    *,
    sequences_per_step: int,
    bindings: Mapping[str, Any],
    checkpoints: Checkpoints,
    report: Report,
    progress: Callable[[int, float], None] | None,
    folder: Path,
) -> dict[str, Any]:
    """Train one member and write it as a Hugging Face folder with expert.json and its training curve.

    Args:
        member: Which one.
        model: Its start, trained in place.
        documents: Its token stream.
        config: Optimisation settings.
        sequences_per_step: Its share of the batch.
        bindings: Digests of what it is bound to (clusterer, tokenizer, seed), for expert.json.
        checkpoints: Where to resume from.
        report: Receives the training curve.
        progress: Receives every step.
        folder: Output folder.

    Returns:
        The content of expert.json.
    """
    order = BlockOrder(documents, context_length=config.context_length, seed=config.random_state)
    result = train(
        model,
        order,
        config,
        sequences_per_step=sequences_per_step,
        checkpoints=checkpoints,
        report=report,
        progress=progress,
    )
    save_model(model, folder)
    facts = {
        "format": 1,
        "member": member.name,
        "kind": member.kind,
        "cluster": member.cluster,
        **bindings,
        "documents": documents.n_documents,
        "corpus_tokens": documents.n_tokens,
        "tokens_seen": result.tokens,
        "epochs": round(result.epochs, 4),
        "steps": config.steps,
        "sequences_per_step": sequences_per_step,
        "cost": cost_of(model, config, device=result.device, tokens=result.tokens, seconds=result.seconds),
        "final_loss": result.curve[-1]["train/loss"],
    }
    (folder / EXPERT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(point) + "\n" for point in result.curve)
    (folder / CURVE_FILE).write_text(lines, encoding="utf-8")
    return facts
