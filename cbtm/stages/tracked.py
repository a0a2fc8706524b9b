"""The runs of a pipeline run in the tracker: one parent, one child per trained member, one for the evaluation."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cbtm import storage
from cbtm.errors import Interrupted
from cbtm.run import Run
from cbtm.tracking import (
    ReplayReport,
    RunKind,
    RunStatus,
    Tracker,
    finish_parent_run,
    open_run,
    replay,
    start_parent_run,
)


def open_parent(run: Run) -> None:
    """Open the parent run, or find the one of an earlier try."""
    config = run.config
    start_parent_run(
        config.tracking,
        name=config.name,
        run_key=run.key,
        journal=_journal(run, "parent"),
        tags={"cbtm.root": config.root, **_pod()},
        params=settings(run),
        take_injected=True,
    )


def finish_parent(run: Run, status: RunStatus = "FINISHED") -> None:
    """End the parent run."""
    finish_parent_run(
        run.config.tracking, name=run.config.name, run_key=run.key, journal=_journal(run, "parent"), status=status
    )


def replay_all(run: Run) -> ReplayReport:
    """Send what an outage of the tracking server kept back, for every run of this pipeline run."""
    return replay(_journals(run), run.config.tracking)


@contextmanager
def child(
    run: Run,
    name: str,
    kind: RunKind,
    *,
    cluster: int | None = None,
    own_task: bool = False,
    params: Mapping[str, object] | None = None,
) -> Iterator[Tracker]:
    """Tracker of one child run; it ends with the block, as failed if the block fails.

    Args:
        run: The run.
        name: Name of the child.
        kind: What it is about.
        cluster: Its cluster.
        own_task: Whether this is what the task's pod is for; a run that the pod was given is then this one.
        params: What it is logged under, in place of the run's settings.
    """
    tracker = open_run(
        run.config.tracking,
        name=f"{run.config.name}/{name}",
        kind=kind,
        run_key=f"{run.key}/{name}",
        parent_run_key=run.key,
        journal=_journal(run, name),
        cluster=cluster,
        tags=_pod(),
        take_injected=own_task,
    )
    try:
        tracker.log_params(settings(run) if params is None else params)
        yield tracker
    except (Interrupted, KeyboardInterrupt):
        tracker.close("KILLED")
        raise
    except BaseException:
        tracker.close("FAILED")
        raise
    tracker.close()


def _pod() -> dict[str, str]:
    """The pod of Kubeflow Pipelines that this is, for whoever looks for its log."""
    name = os.environ.get("KFP_POD_NAME")
    return {"cbtm.pod": name} if name else {}


def settings(run: Run) -> dict[str, object]:
    """The settings that people compare, under the same keys in every run."""
    config = run.config
    return {
        "n_clusters": config.cluster.n_clusters,
        "random_state": config.cluster.random_state,
        "steps": config.train.steps,
        "sequences_per_step": config.train.sequences_per_step,
        "context_length": config.train.context_length,
        "learning_rate": config.train.learning_rate,
        "tokens_per_arm": config.train.total_tokens,
        "corpus": config.corpus.root,
        "seed_model": config.seed_model.path or "from scratch",
    }


def _journals(run: Run) -> Path:
    """Folder of the journals of a root; those of a root in S3 lie on this machine's disk, a folder for each run."""
    if not storage.is_s3(run.config.root):
        return storage.local_path(run.config.root) / "tracking"
    return Path(tempfile.gettempdir()) / "cbtm-tracking" / run.key


def _journal(run: Run, name: str) -> Path:
    # A root may hold runs of several settings one after the other; lines of one are not sent to another.
    return _journals(run) / run.key[:16] / f"{name}.jsonl"
