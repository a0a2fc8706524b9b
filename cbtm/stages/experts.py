"""Stages on models: train a member, score the validation tokens under it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.branch.seed import check_vocabulary, create_model, load_model, save_model
from cbtm.branch.source import fetch_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.manifest import Manifest, Placed, run_stage
from cbtm.merge.score_blocks import ScoreBlocks
from cbtm.merge.scorer import score_documents, top_k_needed
from cbtm.merge.validation_set import selection_documents
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.stages import nodes
from cbtm.stages.averages import average
from cbtm.stages.held_out import HeldOut, distances, held_out, open_router_parts, validation_set
from cbtm.stages.tracked import child
from cbtm.tracking import Tracker
from cbtm.train.checkpoint import Checkpoints
from cbtm.train.config import OptimizationConfig
from cbtm.train.job import TrainJob, ValidationData
from cbtm.train.launch import train_on
from cbtm.train.member import Member
from cbtm.train.slots import device_slot


def train(run: Run, member: Member) -> Manifest:
    """Train one member, or take over a given seed model."""
    spec = run.train_spec(member)
    if member.kind == "average":
        return run_stage(spec, lambda work: average(run, member, work))
    made = run_stage(spec, lambda work: _train(run, member, work))
    # After publication only: until then checkpoints and TrainJob are all there is.
    nodes.end_earlier(run, member)
    Checkpoints(run.uri("checkpoints", member.name), key=spec.key, scratch=Path()).clear()
    return made


def _train(run: Run, member: Member, work: Path) -> dict[str, Any] | Placed:
    seed = run.config.seed_model
    if member.kind == "seed" and seed.path is not None:
        return _take_over_seed(run, seed.path, work)
    config = run.optimization(member)
    if config.nodes > 1:
        with _tracked(run, member) as tracker:
            placed = nodes.train(run, member, tracker.log_metrics)
            _track_end(tracker, config, placed.metadata)
        return placed
    nodes.end_earlier(run, member)
    job = job_of(run, member, work)  # before there is a turn at a device: it is not to wait for downloads
    with (
        device_slot(config.devices, threads=config.threads, device=config.device),
        _tracked(run, member) as tracker,
        progress(f"train:{member.name}", "steps") as shown,
    ):
        facts = train_on(
            job,
            n_processes=config.devices,
            report=tracker.log_metrics,
            progress=lambda step, loss: shown.update(step, config.steps, loss=f"{loss:.3f}"),
        )
        _track_end(tracker, config, facts)
    return facts


@contextmanager
def _tracked(run: Run, member: Member) -> Iterator[Tracker]:
    """A member's run in the tracker, with what is known before it is trained."""
    assert member.kind != "average"
    with child(run, member.name, member.kind, cluster=member.cluster, own_task=True) as tracker:
        corpus = run.config.corpus.root
        tracker.log_dataset(corpus, corpus, run.plan_made.digest("train")[:32], "training")
        tracker.log_params({"member": member.name, "member_sequences_per_step": run.share(member)})
        yield tracker


def _track_end(tracker: Tracker, config: OptimizationConfig, facts: Mapping[str, Any]) -> None:
    cost = {f"cost/{name}": float(value) for name, value in facts["cost"].items() if isinstance(value, int | float)}
    tracker.log_params({"device": facts["cost"]["device"], "member_steps": config.steps})
    tracker.log_metrics(
        {"train/tokens_seen": facts["tokens_seen"], "train/epochs": facts["epochs"], **cost}, facts["steps"]
    )


def job_of(run: Run, member: Member, work: Path) -> TrainJob:
    """Bring everything that a member's training needs to this machine; `work` receives the trained model."""
    scratch = work.parent
    config = run.optimization(member)
    tokenizer = run.fetch(run.tokenizer_spec(), scratch)
    return TrainJob(
        member=member.name,
        start=_start(run, member, tokenizer, scratch),
        tokenizer=tokenizer,
        shards=run.train_shards(member, scratch),
        validation=_validation(run, scratch) if config.validate_every is not None else None,
        config=config,
        sequences_per_step=run.share(member),
        cluster_tokens=run.cluster_tokens(member),
        bindings=_bindings(run, member),
        checkpoints=run.uri("checkpoints", member.name),
        key=run.train_spec(member).key,
        scratch=scratch,
        output=work,
    )


def _start(run: Run, member: Member, tokenizer_folder: Path, scratch: Path) -> Path:
    """Folder of the model that a member's training starts from."""
    scratch_model = run.config.seed_model.scratch
    tokenizer = TextTokenizer.load(tokenizer_folder)
    if member.kind == "seed" and scratch_model is not None:
        model = create_model(
            scratch_model,
            vocab_size=tokenizer.vocab_size,
            separator_id=tokenizer.separator_id,
            context_length=run.config.train.context_length,
        )
        folder = scratch / "start"
        save_model(model, folder)
        return folder
    folder = run.fetch(run.train_spec(Member("seed")), scratch)
    check_vocabulary(folder, tokenizer, run.config.train.context_length)
    return folder


def _validation(run: Run, scratch: Path) -> ValidationData:
    """The half of the validation documents that nothing is reported on."""
    shards, clusters = run.validation_shards(scratch)
    folder = scratch / "validation"
    folder.mkdir(exist_ok=True)
    np.save(folder / "clusters.npy", clusters)
    np.save(folder / "used.npy", selection_documents(len(clusters)))
    return ValidationData(shards=shards, clusters=folder / "clusters.npy", used=folder / "used.npy")


def _bindings(run: Run, member: Member) -> dict[str, Any]:
    digests = {
        "clusterer": run.clusterer_digest,
        "tokenizer": run.load(run.tokenizer_spec()).digest,
        "seed": None if member.kind == "seed" else run.load(run.train_spec(Member("seed"))).digest,
    }
    return {f"{name}_digest": digest for name, digest in digests.items()}


def _take_over_seed(run: Run, path: str, work: Path) -> dict[str, Any]:
    source = run.given(path)
    fetch_model(source, work)
    tokenizer = TextTokenizer.load(run.fetch(run.tokenizer_spec(), work.parent))
    check_vocabulary(work, tokenizer, run.config.train.context_length)
    return {"member": "seed", "kind": "seed", "cluster": None, "source": source}


def score(run: Run, member: Member) -> Manifest:
    """Score the validation tokens under one member."""
    spec = run.score_spec(member)
    blocks = ScoreBlocks(run.uri("checkpoints", f"scores-{member.name}"), key=spec.key)
    made = run_stage(spec, lambda work: _score(run, member, work, blocks))
    blocks.clear()  # after publication only, as a training's checkpoints
    return made


def _score(run: Run, member: Member, work: Path, blocks: ScoreBlocks) -> dict[str, Any]:
    scratch = work.parent
    config = run.config
    spec = run.train_spec(member)
    held = held_out(run, scratch)
    needed = _needed(run, member, held, scratch) if run.scored_sparsely(member) else None
    folder = run.fetch(spec, scratch)
    with device_slot(1, threads=config.score.threads), progress(f"score:{member.name}", "tokens") as shown:
        return score_documents(
            load_model(folder),
            held.rows,
            config.score,
            context_length=config.train.context_length,
            facts={"member": member.name, "cluster": member.cluster, "model_digest": run.load(spec).digest},
            folder=work,
            prefix_token=prefix_token(run, member, scratch),
            needed=needed,
            blocks=blocks,
            progress=shown.update,
        )


def prefix_token(run: Run, member: Member, scratch: Path) -> int | None:
    """The cluster token that a member was trained with in front of each sequence; None without."""
    if run.cluster_tokens(member) is None or member.cluster is None:
        return None
    return TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch)).vocab_size + member.cluster


def _needed(run: Run, member: Member, held: HeldOut, scratch: Path) -> list[NDArray[np.bool_]]:
    """The tokens whose context has this expert among the nearest."""
    top_k = run.config.score.top_k
    assert top_k is not None  # asked only where the run scores sparsely
    clusterer, tokenizer = open_router_parts(run, scratch)
    validation = validation_set(run, held, tokenizer)
    near = distances(run, clusterer, tokenizer, validation, scratch)
    trained = run.config.trained_clusters
    if len(trained) < clusterer.n_clusters:
        near = near[:, trained]
    assert member.cluster is not None
    return top_k_needed(near, validation.offsets, trained.index(member.cluster), top_k)
