"""The stages of a run, each a function of the run that returns the manifest of what it made.

The command line, the Kubeflow components and the tests all call these. A stage whose output is there, under the
same configuration and from the same inputs, returns at once. Modules are imported when their stage runs, so that
clustering needs no torch, and that a task with nothing to do does not spend its time on importing it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.errors import ManifestError
from cbtm.manifest import Manifest, StageSpec, run_stage
from cbtm.plan import Plan
from cbtm.run import Run
from cbtm.run_config import PlaceOverrides, RunConfig
from cbtm.stages.tracked import finish_parent
from cbtm.train.member import Member


def check_cluster(text: str, place: PlaceOverrides, *, compiled_by: str) -> RunConfig:
    """Check configuration, image, bucket and tracking server; returns the configuration of this place."""
    from cbtm.stages import readiness

    return readiness.check_cluster(text, place, compiled_by=compiled_by)


def check_gpus(text: str, gpu_count: str, *, compiled_by: str) -> None:
    """Check a pod that was to have `gpu_count` GPUs."""
    from cbtm.stages import readiness

    readiness.check_gpus(text, gpu_count, compiled_by=compiled_by)


def plan(run: Run) -> Plan:
    """Check what can be checked before any work, list the corpus, write plan.json, open the run in the tracker."""
    from cbtm.stages import preflight

    return preflight.plan(run)


def tokenizer(run: Run) -> Manifest:
    """Take over the given tokenizer, or train one."""
    if run.base is not None:
        return _taken_over(run, run.tokenizer_spec())
    from cbtm.stages import prepare

    return run_stage(run.tokenizer_spec(), lambda work: prepare.tokenizer(run, work))


def cluster(run: Run) -> Manifest:
    """Find the domains, or add one to those of another run."""
    from cbtm.stages import extension, prepare

    if run.base is not None:
        return run_stage(run.cluster_spec(), lambda work: extension.cluster(run, work))
    return run_stage(run.cluster_spec(), lambda work: prepare.cluster(run, work))


def assign(run: Run, group: str) -> Manifest:
    """Assign the documents of one shard group to clusters and tokenise them."""
    from cbtm.stages import prepare

    return run_stage(run.assign_spec(group), lambda work: prepare.assign(run, group, work))


def train(run: Run, member: Member) -> Manifest:
    """Train one member; the seed is trained from scratch or taken over, an average is made of the experts."""
    if run.taken_over(member):
        return _taken_over(run, run.train_spec(member))
    run = run.owner(member)
    left = (run.uri("checkpoints", member.name), run.exchange_root(member))
    if (made := _made_before(run.train_spec(member), *left)) is not None:
        return made
    from cbtm.stages import experts

    return experts.train(run, member)


def score(run: Run, member: Member) -> Manifest:
    """Score the validation tokens, and the answers of the few-shot tasks, under one member.

    Returns the manifest of the scores of the validation tokens.
    """
    run = run.owner(member)
    made = _made_before(run.score_spec(member), run.uri("checkpoints", f"scores-{member.name}"))
    if made is not None and not run.config.tasks:
        return made
    from cbtm.stages import experts, few_shot

    made = experts.score(run, member)
    if run.config.tasks:
        few_shot.score(run, member)
    return made


def average(run: Run) -> list[Manifest]:
    """Average the experts' parameters in every way that is configured, and score each average."""
    made = []
    for member in run.config.averages:
        train(run, member)
        made.append(score(run, member))
    return made


def evaluate(run: Run) -> Manifest:
    """Compare all ensembles; write result.json and report.html; close the run in the tracker."""
    if (made := manifests.made_before(run.evaluate_spec())) is not None:
        finish_parent(run)
        return made
    from cbtm.stages import result

    return result.evaluate(run)


def _made_before(spec: StageSpec, *left: str) -> Manifest | None:
    """Manifest of an output that is there, unless something is left below `left` that its stage has still to remove."""
    made = manifests.made_before(spec)
    return made if made is not None and not any(storage.list_files(uri) for uri in left) else None


def _taken_over(run: Run, spec: StageSpec) -> Manifest:
    """Manifest of what the extended run has made, which is never made from here.

    Raises:
        ManifestError: If it is not whole.
    """
    made = manifests.made_before(spec)
    if made is None:
        raise ManifestError(
            f"{spec.root} is not there or not whole, and {run.config.root} takes it over; run the run in "
            f"{run.config.extends} again"
        )
    return made


@dataclass(frozen=True)
class Task:
    """One unit of work of a planned run: what it is called, how to tell that it is done, and how to do it."""

    name: str
    spec: Callable[[], StageSpec]
    run: Callable[[], Manifest]


def tasks(run: Run) -> Iterator[Task]:
    """Every task of a planned run, in an order in which each finds its inputs."""
    yield Task("tokenizer", run.tokenizer_spec, lambda: tokenizer(run))
    yield Task("cluster", run.cluster_spec, lambda: cluster(run))
    for group in run.plan_made.groups:
        yield _assign_task(run, group.name)
    for member in run.scored_members:
        yield from _member_tasks(run, member)
    yield Task("evaluate", run.evaluate_spec, lambda: evaluate(run))


def finished(run: Run) -> bool:
    """Tell whether every output is there and belongs to this configuration and this corpus."""
    if not storage.exists(run.uri("manifest.json")):
        return False
    run.make_plan()
    # One listing in the place of a request for each of all files.
    listed = storage.listed_sizes(run.config.root)
    try:
        return all(_is_there(run, task.spec(), listed) for task in tasks(run))
    except ManifestError:
        return False


def _is_there(run: Run, spec: StageSpec, listed: Mapping[str, int] | None) -> bool:
    manifest, root = run.load(spec), run.config.root
    if listed is None or not (spec.root == root or spec.root.startswith(f"{root}/")):
        return manifests.is_current(spec, manifest)
    below = spec.root.removeprefix(root).removeprefix("/")
    return manifests.is_current(spec, manifest, size_of=lambda path: listed.get(f"{below}/{path}" if below else path))


def _assign_task(run: Run, group: str) -> Task:
    return Task(f"assign:{group}", lambda: run.assign_spec(group), lambda: assign(run, group))


def _member_tasks(run: Run, member: Member) -> Iterator[Task]:
    yield Task(f"train:{member.name}", lambda: run.train_spec(member), lambda: train(run, member))
    yield Task(f"score:{member.name}", lambda: run.score_spec(member), lambda: score(run, member))
    if run.config.tasks:
        yield Task(f"tasks:{member.name}", lambda: run.tasks_spec(member), lambda: score(run, member))
