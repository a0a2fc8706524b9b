"""Few-shot tasks in a run: each model's answers are scored once, and mixed as the ensembles are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbtm.branch.seed import load_model
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.cluster.clusterer import Clusterer
from cbtm.manifest import Manifest, run_stage
from cbtm.merge.router import PrefixRouter
from cbtm.merge.task_evaluator import TaskMembers, evaluate_task
from cbtm.merge.task_prompts import TaskPrompts, build_prompts
from cbtm.merge.task_scorer import TaskScores, read_scores, score_tasks
from cbtm.merge.tasks import read_task
from cbtm.progress import progress
from cbtm.run import Run
from cbtm.stages.experts import prefix_token
from cbtm.train.member import Member
from cbtm.train.slots import device_slot


def score(run: Run, member: Member) -> Manifest:
    """Score the answers of all tasks under one member."""
    return run_stage(run.tasks_spec(member), lambda work: _score(run, member, work))


def _score(run: Run, member: Member, work: Path) -> dict[str, Any]:
    scratch, config = work.parent, run.config
    spec = run.train_spec(member)
    prompts = _prompts(run, TextTokenizer.load(run.fetch(run.tokenizer_spec(), scratch)))
    folder = run.fetch(spec, scratch)
    with device_slot(1, threads=config.score.threads), progress(f"tasks:{member.name}", "prompts") as shown:
        return score_tasks(
            load_model(folder),
            prompts,
            config=config.score,
            context_length=config.train.context_length,
            facts={"member": member.name, "cluster": member.cluster, "model_digest": run.load(spec).digest},
            folder=work,
            prefix_token=prefix_token(run, member, scratch),
            progress=shown.update,
        )


def evaluate_tasks(
    run: Run, clusterer: Clusterer, tokenizer: TextTokenizer, measured: Mapping[str, Any], scratch: Path
) -> list[dict[str, Any]]:
    """Accuracy of every model and ensemble in every task: the entries of `tasks` in result.json."""
    prompts = _prompts(run, tokenizer)
    folders = {one: run.fetch(run.tasks_spec(one), scratch / f"tasks-{one.name}") for one in run.scored_members}
    router = PrefixRouter(clusterer.embedder.vocabulary_, clusterer.embedder.word_vectors_, clusterer.centers)
    prior = None if measured["prior"] is None else np.array(measured["prior"])
    rows = []
    for task in prompts:
        with progress(f"evaluate:{task.name}", "settings") as shown:
            rows.append(
                evaluate_task(
                    run.config.evaluate,
                    task,
                    _members(run, {one: read_scores(folder, task) for one, folder in folders.items()}),
                    _distances(router, task),
                    prior=prior,
                    progress=shown.update,
                )
            )
    return rows


def _prompts(run: Run, tokenizer: TextTokenizer) -> list[TaskPrompts]:
    """The prompts of all tasks: the same for every member, so there is room for a cluster token where any has one."""
    room = run.config.train.context_length - int(run.config.train.cluster_token)
    return [build_prompts(task, read_task(task), tokenizer, max_tokens=room) for task in run.config.tasks]


def _members(run: Run, scores: Mapping[Member, TaskScores]) -> TaskMembers:
    def all_of(kind: str) -> list[TaskScores]:
        return [scores[member] for member in run.config.members if member.kind == kind]

    return TaskMembers(
        seed=scores[Member("seed")],
        experts=all_of("expert"),
        dense=scores[Member("dense")] if run.config.train.dense else None,
        random=all_of("random") if run.config.train.random_clusters else None,
        averages={str(member.recipe): scores[member] for member in run.config.averages},
        clusters=run.config.trained_clusters,
    )


def _distances(router: PrefixRouter, task: TaskPrompts) -> NDArray[np.float32]:
    """Distance of every prompt, up to its answer, to every cluster centre, shape (n_seeds * n_examples, k)."""
    return np.concatenate([router.distances(text, np.array([len(text)])) for text in task.routing_texts])
