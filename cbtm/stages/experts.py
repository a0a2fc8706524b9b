"""Stages on models: train a member, score the validation tokens under it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtm import storage
from cbtm.branch.seed import check_vocabulary, create_model, load_model, model_files
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.manifest import Manifest, run_stage
from cbtm.merge.scorer import score_documents
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.stages.tracked import child
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.expert import train_member
from cbtm.train.member import Member

if TYPE_CHECKING:
    from torch import nn


def train(run: Run, member: Member) -> Manifest:
    """Train one member, or take over a given seed model."""
    spec = run.train_spec(member)
    made = run_stage(spec, lambda work: _train(run, member, work))
    # After publication only: until then the checkpoint is all there is.
    Checkpoints(run.uri("checkpoints", member.name), key=spec.key, scratch=Path()).clear()
    return made


def _train(run: Run, member: Member, work: Path) -> dict[str, Any]:
    seed = run.config.seed_model
    if member.kind == "seed" and seed.path is not None:
        return _take_over_seed(run, seed.path, work)
    scratch = work.parent
    tokenizer_folder = run.fetch(run.tokenizer_spec(), scratch)
    tokenizer = TextTokenizer.load(tokenizer_folder)
    documents = run.train_documents(member, scratch)
    model = _start(run, member, tokenizer, scratch)
    optimization = _optimization(run, member)
    share = optimization.sequences_per_step if member.kind == "seed" else run.share(member)
    checkpoints = Checkpoints(
        run.uri("checkpoints", member.name), key=run.train_spec(member).key, scratch=scratch / "checkpoint"
    )
    with (
        child(run, member.name, member.kind, cluster=member.cluster) as tracker,
        progress(f"train:{member.name}", "steps") as shown,
    ):
        tracker.log_dataset(
            run.config.corpus.root, run.config.corpus.root, run.plan_made.digest("train")[:32], "training"
        )
        tracker.log_params({"member": member.name, "member_sequences_per_step": share})
        facts = train_member(
            member,
            model,
            documents,
            optimization,
            sequences_per_step=share,
            bindings=_bindings(run, member),
            checkpoints=checkpoints,
            report=tracker.log_metrics,
            progress=lambda step, loss: shown.update(step, optimization.steps, loss=f"{loss:.3f}"),
            folder=work,
        )
        cost = {f"cost/{name}": value for name, value in facts["cost"].items() if isinstance(value, float)}
        tracker.log_params({"device": facts["cost"]["device"]})
        tracker.log_metrics(
            {"train/tokens_seen": facts["tokens_seen"], "train/epochs": facts["epochs"], **cost}, facts["steps"]
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, work / name)
    return facts


def _start(run: Run, member: Member, tokenizer: TextTokenizer, scratch: Path) -> "nn.Module":
    """Model that a member's training starts from."""
    scratch_model = run.config.seed_model.scratch
    if member.kind == "seed" and scratch_model is not None:
        return create_model(
            scratch_model,
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            context_length=run.config.train.context_length,
        )
    folder = run.fetch(run.train_spec(Member("seed")), scratch)
    check_vocabulary(folder, tokenizer, run.config.train.context_length)
    return load_model(folder)


def _optimization(run: Run, member: Member) -> OptimizationConfig:
    training = run.config.seed_model.training
    if member.kind == "seed" and training is not None:
        return training
    return run.config.train.optimization()


def _bindings(run: Run, member: Member) -> dict[str, Any]:
    digests = {
        "clusterer": run.clusterer_digest,
        "tokenizer": run.load(run.tokenizer_spec()).digest,
        "seed": None if member.kind == "seed" else run.load(run.train_spec(Member("seed"))).digest,
    }
    return {f"{name}_digest": digest for name, digest in digests.items()}


def _take_over_seed(run: Run, path: str, work: Path) -> dict[str, Any]:
    names = model_files([file.path for file in storage.list_files(path)])
    storage.download(path, work, names)
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), work.parent))
    check_vocabulary(work, tokenizer, run.config.train.context_length)
    return {"member": "seed", "kind": "seed", "cluster": None, "source": path}


def score(run: Run, member: Member, work: Path) -> dict[str, Any]:
    """Build one member's scores in `work`."""
    scratch = work.parent
    config = run.config
    spec = run.train_spec(member)
    documents, _ = run.validation_documents(scratch)
    model = load_model(run.fetch(spec, scratch))
    with progress(f"score:{member.name}", "tokens") as shown:
        return score_documents(
            model,
            documents,
            config.score,
            context_length=config.train.context_length,
            facts={"member": member.name, "cluster": member.cluster, "model_digest": run.load(spec).digest},
            folder=work,
            progress=shown.update,
        )
