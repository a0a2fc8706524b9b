"""One training on several machines: a TrainJob that is made, or found, followed to its end, and removed.

One TrainJob is one attempt. Machines that train together end together, so where one is lost all are started again, as
a new TrainJob that goes on from the last checkpoint; the number of times is bounded. An error that a machine can name
ends the training at once. The result counts, not the TrainJob: a launch that was killed comes back to a training that
goes on, or that has come to its end meanwhile.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cbtm import storage
from cbtm.errors import CbtmError, Interrupted
from cbtm.kubernetes import Kubernetes, KubernetesError, NodePod
from cbtm.manifest import Placed
from cbtm.process import stop_requested
from cbtm.train import trainjob
from cbtm.train.exchange import Exchange, NodeTask, outcome_of
from cbtm.train.launch import STOP_SECONDS
from cbtm.train.outcome import WorkerFailedError
from cbtm.train.pod_logs import PodLogs, parse_metrics
from cbtm.train.trainjob import Json

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float], int], None]

_POLL_SECONDS = 5.0
_SETTLE_SECONDS = 90.0  # for the other machines to say why they end, once one has: a checkpoint may be on its way
_LAST_WORDS_SECONDS = 10.0  # for the end of the logs to arrive
_WAITING_SECONDS = 600.0  # for a pod that cannot start for a reason that seldom passes
_HOPELESS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError", "RunContainerError"}


class MachineLost(CbtmError):
    """A machine went, and no error of the training's explains it: the others can go on with another one."""

    exit_code = 1


class _Ended(Exception):
    """An attempt has ended for a reason that another one would not change; all other errors leave it alone.

    Attributes:
        reason: What the user is told.
    """

    def __init__(self, reason: CbtmError) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class Launch:
    """What is to be trained, and where.

    Attributes:
        api: The cluster.
        exchange: The files that its machines and this process share.
        task: What they do.
        manifest: The TrainJob.
        root: URI that the trained model is placed below.
        n_ranks: Processes of all machines.
        restarts: How often in succession a lost machine is answered by a new attempt that comes no further.
    """

    api: Kubernetes
    exchange: Exchange
    task: NodeTask
    manifest: Json
    root: str
    n_ranks: int
    restarts: int

    @property
    def name(self) -> str:
        """Name of the TrainJob."""
        name: str = self.manifest["metadata"]["name"]
        return name


def train_on_nodes(launch: Launch, report: Report) -> Placed:
    """Have a member trained by a TrainJob.

    Args:
        launch: What, and where.
        report: Receives the metrics of rank 0 and their step; after a launch that was killed some of them again.

    Returns:
        What the machines have placed below the model's root.

    Raises:
        Interrupted: On SIGTERM or SIGINT, after the machines have saved a checkpoint and the TrainJob is gone.
        CbtmError: The error of the rank that failed first.
        WorkerFailedError: If that rank failed by a defect, or for want of memory.
        MachineLost: If machines were lost more often than is borne.
        KubernetesError: If the cluster refuses the TrainJob, or cannot start its pods.
    """
    with stop_requested() as stop:
        lost, furthest = 0, 0
        while True:
            if (placed := _result(launch)) is not None:
                return placed
            uid = _ensure(launch, stop)
            attempt = _Attempt(launch, uid, report, stop)
            try:
                return attempt.follow()
            except _Ended as end:
                launch.api.delete(launch.name, uid)
                raise end.reason from None
            except MachineLost as error:
                launch.api.delete(launch.name, uid)
                lost = 1 if attempt.step > furthest else lost + 1
                furthest = max(furthest, attempt.step)
                if lost > launch.restarts:
                    raise MachineLost(
                        f"{error}; that is {lost} times without having come further, and train.node.restarts="
                        f"{launch.restarts}"
                    ) from error
                logger.warning("TrainJob=%s %s; all machines are started again (%d)", launch.name, error, lost)


def retire(api: Kubernetes, exchange: Exchange, name: str) -> None:
    """Remove a TrainJob and what it has exchanged; one that still trains saves a checkpoint first.

    Raises:
        Interrupted: On SIGTERM or SIGINT.
    """
    with stop_requested() as stop:
        if (found := api.read(name)) is not None:
            _end(api, found, stop)
    exchange.clear()


def _result(launch: Launch) -> Placed | None:
    """What an attempt has left, if all of it is there."""
    placed = launch.exchange.result(launch.task.key)
    if placed is None:
        return None
    sizes = storage.sizes(launch.root, [file.path for file in placed.files])
    return placed if all(sizes[file.path] == file.size for file in placed.files) else None


def _ensure(launch: Launch, stop: threading.Event) -> str:
    """Find the TrainJob of this training, or make it; returns its uid."""
    api, name = launch.api, launch.name
    made = False
    while True:
        found = api.read(name)
        if found is None:
            if stop.is_set():
                raise Interrupted("stopped before any machine was asked for")
            launch.exchange.clear()
            launch.exchange.write_task(launch.task)
            made = api.create(launch.manifest)
            continue
        if _is_on(found) and trainjob.is_of(found, launch.manifest):
            trainer = launch.manifest["spec"]["trainer"]
            how = "made" if made else "found, following it"
            logger.info(
                "TrainJob=%s/%s nodes=%d devices=%d %s",
                *(api.namespace, name, trainer["numNodes"], trainer["numProcPerNode"], how),
            )
            uid: str = found["metadata"]["uid"]
            return uid
        logger.info("TrainJob=%s/%s of an earlier try is removed first", api.namespace, name)
        _end(api, found, stop)


def _is_on(found: Json) -> bool:
    """Whether a TrainJob may still come to a result."""
    return "deletionTimestamp" not in found["metadata"] and not {"Failed", "Complete"} & _conditions(found)


def _conditions(found: Json) -> set[str]:
    conditions = found.get("status", {}).get("conditions", [])
    return {condition["type"] for condition in conditions if condition["status"] == "True"}


def _end(api: Kubernetes, found: Json, stop: threading.Event) -> None:
    """Delete a TrainJob and wait until it is gone, with its pods."""
    name, uid = found["metadata"]["name"], found["metadata"]["uid"]
    api.delete(name, uid)
    while (left := api.read(name)) is not None and left["metadata"]["uid"] == uid:
        if stop.wait(_POLL_SECONDS):
            raise Interrupted(f"stopped while TrainJob {name} was being removed; nothing was begun")


class _Attempt:
    """One TrainJob, from its beginning to its end."""

    def __init__(self, launch: Launch, uid: str, report: Report, stop: threading.Event) -> None:
        self._launch, self._uid, self._report, self._stop = launch, uid, report, stop
        self._logs = PodLogs(launch.api)
        self._first_seen: dict[str, NodePod] = {}
        self.step = 0  # the last that was heard of
        self._trouble_since: float | None = None
        self._waiting_since: float | None = None
        self._said: set[str] = set()

    def follow(self) -> Placed:
        """Follow it to its result; `train_on_nodes` says what else may happen."""
        while True:
            found = self._launch.api.read(self._launch.name)
            if (placed := _result(self._launch)) is not None:
                self._hear_out(all_end=True)
                return placed
            if found is None or found["metadata"]["uid"] != self._uid or "deletionTimestamp" in found["metadata"]:
                raise KubernetesError(
                    f"TrainJob {self._launch.name} was removed by somebody else; run this again to go on from the last "
                    "checkpoint"
                )
            pods = self._launch.api.pods(self._launch.name)
            self._listen(pods)
            self._look_at_the_end(found, pods)
            self._look_at_the_start(found, pods)
            if self._stop.wait(_POLL_SECONDS):
                return self._stopped()

    def _listen(self, pods: list[NodePod]) -> None:
        """Pass on what the pods have written."""
        self._logs.follow(pods)
        for node, line in self._logs.take():
            metrics = parse_metrics(line)
            if metrics is None:
                logger.info("%s%s", f"node {node}: " if node else "", line)
            elif node == 0:
                self.step = metrics[1]
                self._report(*metrics)

    def _hear_out(self, *, all_end: bool = False) -> None:
        """Pass on the last words of the pods that have ended, or of all that are about to."""
        pods = self._launch.api.pods(self._launch.name)
        self._listen(pods)
        self._logs.wait(_LAST_WORDS_SECONDS, [pod for pod in pods if all_end or not pod.runs])
        self._listen([])

    # --- how it ends ---

    def _look_at_the_end(self, found: Json, pods: list[NodePod]) -> None:
        """Raise what has ended the training, once it is clear what that is."""
        trouble = self._trouble(found, pods)
        if trouble is None:
            self._trouble_since = None
            return
        outcome = outcome_of(self._launch.exchange.failures(), self._launch.n_ranks)
        if (cause := outcome.cause()) is not None:
            self._hear_out()
            raise _Ended(cause)
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()
        if any(pod.runs for pod in pods) and time.monotonic() - self._trouble_since < _SETTLE_SECONDS:
            return
        self._hear_out()
        raise trouble if isinstance(trouble, MachineLost) else _Ended(trouble)

    def _trouble(self, found: Json, pods: list[NodePod]) -> CbtmError | None:
        """What the cluster knows of an end that is none of the training's making."""
        for pod in pods:
            first = self._first_seen.setdefault(pod.uid, pod)
            if pod.leaves:
                return MachineLost(f"pod {pod.name} of node {pod.node} is being removed")
            if pod.ended is None or (pod.runs and pod.restarts == first.restarts):
                continue  # one that was started again before this launch came has joined the others
            if pod.ended.reason == "OOMKilled":
                memory = self._launch.manifest["spec"]["trainer"]["resourcesPerNode"]["limits"].get("memory", "unset")
                return WorkerFailedError(
                    f"node {pod.node} was ended for want of memory (OOMKilled, its limit is {memory}); raise "
                    "train.node.memory, or use sharding=fsdp2, a smaller micro_batch_size or more nodes"
                )
            if pod.ended.exit_code != 0:
                code = f"code {pod.ended.exit_code}" if pod.ended.exit_code > 0 else "no exit code"
                return MachineLost(f"node {pod.node} ended with {code} ({pod.ended.reason}) and named no error")
        conditions = _conditions(found)
        here = {pod.uid for pod in pods}
        gone = [pod for uid, pod in self._first_seen.items() if uid not in here]
        if gone and not conditions & {"Complete"}:
            return MachineLost(f"pod {gone[0].name} of node {gone[0].node} is gone")
        if conditions & {"Failed", "Complete"}:
            told = [one for one in found["status"]["conditions"] if one["type"] in ("Failed", "Complete")]
            return MachineLost(f"it ended as {told[0]['type']} ({told[0].get('message', '')}) and left no result")
        return None

    def _stopped(self) -> Placed:
        """Have the machines save, remove the TrainJob, and say what became of it."""
        launch = self._launch
        logger.info("stopping: the machines save a checkpoint, and TrainJob %s is removed", launch.name)
        launch.api.delete(launch.name, self._uid)
        until, pods = time.monotonic() + STOP_SECONDS, list[NodePod]()
        while time.monotonic() < until:
            found = launch.api.read(launch.name)
            if found is None or found["metadata"]["uid"] != self._uid:
                break
            pods = launch.api.pods(launch.name) or pods
            self._listen(pods)
            time.sleep(min(1.0, _POLL_SECONDS))
        self._logs.wait(_LAST_WORDS_SECONDS, pods)
        self._listen([])
        if (placed := _result(launch)) is not None:
            return placed  # it had come to its end already
        outcome = outcome_of(launch.exchange.failures(), launch.n_ranks)
        raise (
            outcome.cause()
            or outcome.error()
            or Interrupted("stopped before its machines trained; the same command goes on from the last checkpoint")
        )

    # --- how it starts ---

    def _look_at_the_start(self, found: Json, pods: list[NodePod]) -> None:
        """Say what pods wait for; raise it where it seldom passes and has not for a while."""
        hopeless = None
        if "Suspended" in _conditions(found):
            self._say_once(f"TrainJob={self._launch.name} waits: it is suspended, as by a queue that is full")
        for pod in pods:
            if pod.waiting is None and (pod.runs or pod.ended is not None):
                continue
            reason, message = pod.waiting or ("", "")
            if reason in _HOPELESS:
                hopeless = f"pod {pod.name} of node {pod.node} cannot start: {reason}: {message}"
            for told in self._launch.api.warnings(pod.name):
                self._say_once(f"node {pod.node} waits: {told}")
        if not pods:
            for told in self._launch.api.warnings(self._launch.name):
                self._say_once(f"TrainJob={self._launch.name} waits: {told}")
        if hopeless is None:
            self._waiting_since = None
            return
        self._say_once(hopeless)
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        if time.monotonic() - self._waiting_since > _WAITING_SECONDS:
            raise _Ended(KubernetesError(f"{hopeless}; for {_WAITING_SECONDS:.0f} s now"))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s", text)
