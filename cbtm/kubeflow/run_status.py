"""What the API of Kubeflow Pipelines says about a run, as people ask: which tasks are done, and which pod is whose.

The API lists the nodes of Argo's workflow, without order and with more of them than there are tasks: for each task a
driver, the task, and below it the pod and its retries; for a loop a node for each item. A node names those that come
next by their ids and does not say its own. But Argo makes an id of the node's place: a hash (FNV-1a) of the path from
the workflow's name down. So the place of a task in the pipeline gives the ids of its pods, also within a loop, and a
node is known by the ids of those that come next. The hash was checked against the answer of a server of KFP 2.16.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Any

import yaml

from cbtm.errors import ConfigError
from cbtm.kubeflow.parameters import CONFIG
from cbtm.kubeflow.pipeline_file import shipped_pipeline
from cbtm.run_config import PlaceOverrides, RunConfig, parse_config
from cbtm.train.member import Member

ENDED = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}
OMITTED = "OMITTED"  # what comes after a failure has no state in the API
_MEMBER_TASKS = ("train-expert", "score-expert")
_LOOP_ITEM = "iteration-iterations({item}:{item}).iteration-item"
# Of which template a pod is made, and so what its name has in the middle: with retries or without, with a label or not.
_TEMPLATES = (
    "retry-system-container-impl",
    "metadata-0-1-retry-system-container-impl",
    "system-container-impl",
    "metadata-0-1-system-container-impl",
)


@dataclass
class TaskStatus:
    """One task of the pipeline; in a loop all of its items together.

    Attributes:
        name: Name of the task.
        states: Number of items in each state, as the API calls them (`SUCCEEDED`, `RUNNING` …).
        expected: Number of items; None where it is not known.
        errors: What failed items say.
    """

    name: str
    states: Counter[str] = field(default_factory=Counter)
    expected: int | None = 1
    errors: list[str] = field(default_factory=list)
    started: datetime | None = None
    ended: datetime | None = None

    @property
    def state(self) -> str:
        """The state of all items together: failed if one has failed, done if all are."""
        for state in ("FAILED", "CANCELED", "RUNNING", "PENDING", OMITTED):
            if self.states[state]:
                return state
        if not self.states:
            return "WAITING"
        done = sum(self.states.values())
        return "SUCCEEDED" if self.expected is None or done >= self.expected else "RUNNING"

    def __str__(self) -> str:
        count = sum(self.states.values())
        if count <= 1 and self.expected in (None, 1):
            words = self.state.lower()
        else:
            known = f" of {self.expected}" if self.expected else ""
            words = f"{self.states['SUCCEEDED']}{known} succeeded"
            others = {state: n for state, n in self.states.items() if state != "SUCCEEDED"}
            words += "".join(f", {n} {state.lower()}" for state, n in sorted(others.items()))
        return f"{self.name} {words}" + (f" ({_duration(self.started, self.ended)})" if self.started else "")


@dataclass(frozen=True)
class PodStatus:
    """A pod of a task.

    Attributes:
        task: Name of the task that it does.
        node: Id that Argo has for it, of which the pod's name is made.
        state: State of the task, as the API calls it.
        attempt: 0 for the first try.
    """

    task: str
    node: str
    state: str
    attempt: int = 0

    @property
    def pod_names(self) -> list[str]:
        """Names that the pod may have, the likeliest first."""
        workflow, _, number = self.node.rpartition("-")
        return [*(f"{workflow}-{template}-{number}" for template in _TEMPLATES), self.node]


def task_statuses(run: Any) -> list[TaskStatus]:
    """The tasks of a run (a `V2beta1Run`) in the order in which they run."""
    config = run_config(run)
    expected: dict[str, int | None] = {"assign-shards": None}
    expected |= dict.fromkeys(_MEMBER_TASKS, len(config.members) if config else None)
    found = {name: TaskStatus(name, expected=expected.get(name, 1)) for name in _task_paths(run)}
    for one in _details(run):
        if one.display_name in found:
            _count(found[one.display_name], one)
    return list(found.values())


def _count(status: TaskStatus, one: Any) -> None:
    status.states[_state(one)] += 1
    if _state(one) == OMITTED:
        return
    status.started = min(_times(status.started, one.start_time), default=None)
    status.ended = max(_times(status.ended, one.end_time), default=None)
    if one.error is not None and one.error.message:
        status.errors.append(one.error.message)


def run_config(run: Any) -> RunConfig | None:
    """The configuration that a run was submitted with; None if it is not one of this cbtm."""
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    if not isinstance(given.get(CONFIG), str):
        return None
    place = PlaceOverrides(given.get("root") or None, more=tuple(given.get("overrides") or ()))
    try:
        return parse_config(given[CONFIG], place)
    except ConfigError:
        return None


def member_pods(run: Any, member: Member) -> list[PodStatus]:
    """The pods that train and score one member, in the order of the work and of the tries; those that were started.

    Raises:
        ConfigError: If the run trains no such member, or was submitted by something else than this cbtm.
    """
    if member.kind == "seed":
        return [*task_pods(run, "train-seed"), *task_pods(run, "score-seed")]
    config = run_config(run)
    if config is None:
        raise ConfigError(f"run {run.run_id} has no configuration of this cbtm; give a task, as --task train-expert")
    names = [one.name for one in config.members]
    if member.name not in names:
        raise ConfigError(f"this run trains no {member.name}; it trains seed, {', '.join(names)}")
    return [pod for task in _MEMBER_TASKS for pod in task_pods(run, task, item=names.index(member.name))]


def task_pods(run: Any, task: str, item: int | None = None) -> list[PodStatus]:
    """Pods of a task that were started, the latest try last; of one item of its loop, or of all.

    Raises:
        ConfigError: If the pipeline has no such task.
    """
    paths = _task_paths(run)
    if task not in paths:
        raise ConfigError(f"the pipeline has no task {task}; it has {', '.join(paths)}")
    workflow = _workflow(run)
    if workflow is None:
        return []
    in_a_loop = "{item}" in paths[task]
    items = range(_count_of(run, task)) if in_a_loop and item is None else [item or 0]
    return [pod for number in items for pod in _pods_at(run, workflow, task, paths[task].format(item=number))]


def _pods_at(run: Any, workflow: str, task: str, path: str) -> Iterator[PodStatus]:
    """Pods of the task at one place of the workflow."""
    details = _details(run)
    executor = node_id(workflow, f"{path}.executor")
    own = next((one for one in details if one.display_name == task and executor in _next_nodes(one)), None)
    if own is None:
        return
    first = node_id(workflow, f"{path}.executor(0)")
    over_tries = next((one for one in details if one.display_name == "executor" and first in _next_nodes(one)), None)
    if over_tries is None:
        yield PodStatus(task, executor, _state(own))
        return
    n_tries = len(_next_nodes(over_tries))
    tries = [node_id(workflow, f"{path}.executor({number})") for number in range(n_tries)]
    for number, node in enumerate(tries):
        if node in _next_nodes(over_tries):
            last = number == n_tries - 1
            yield PodStatus(task, node, _state(own) if last else "FAILED", number)


def node_id(workflow: str, path: str) -> str:
    """Id that Argo gives to the node at `path` (without the workflow's name) of a workflow."""
    code = 0x811C9DC5  # FNV-1a of 32 bits
    for byte in f"{workflow}.{path}".encode():
        code = ((code ^ byte) * 0x01000193) & 0xFFFFFFFF
    return f"{workflow}-{code}"


def _workflow(run: Any) -> str | None:
    """Name of the workflow: what all ids of nodes begin with."""
    nodes = (node for one in _details(run) for node in _next_nodes(one))
    return next((node.rpartition("-")[0] for node in nodes), None)


def _count_of(run: Any, task: str) -> int:
    return sum(one.display_name == task for one in _details(run))


def _next_nodes(one: Any) -> list[str]:
    return [child.pod_name for child in one.child_tasks or () if child.pod_name]


def _state(one: Any) -> str:
    return str(one.state) if one.state else OMITTED


def _times(*times: datetime | None) -> list[datetime]:
    return [time for time in times if time is not None and time.timestamp() > 0]  # 0 is what has not happened


def _details(run: Any) -> Sequence[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _task_paths(run: Any) -> dict[str, str]:
    """Name to path of every task that is a pod, each after those that it waits for; `{item}` is that of its loop."""
    spec = run.pipeline_spec or yaml.safe_load(shipped_pipeline().partition("\n---\n")[0])
    spec = spec.get("pipeline_spec", spec)
    components, root = spec.get("components", {}), spec.get("root", {})

    def below(dag: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
        tasks = dag.get("tasks", {})
        graph = {name: sorted(task.get("dependentTasks", [])) for name, task in sorted(tasks.items())}
        for name in TopologicalSorter(graph).static_order():
            component = components.get(tasks[name]["componentRef"]["name"], {})
            own = f"{path}.{name}" + (f".{_LOOP_ITEM}" if "parameterIterator" in tasks[name] else "")
            if "dag" in component:
                yield from below(component["dag"], own)
            else:
                yield name, own

    return dict(below(root.get("dag", {}), "root"))


def _duration(start: datetime, end: datetime | None) -> str:
    seconds = int(((end or datetime.now(start.tzinfo)) - start).total_seconds())
    hours, rest = divmod(max(seconds, 0), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
