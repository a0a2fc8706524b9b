"""The Kubernetes API as far as cbtm needs it: TrainJobs of Kubeflow Trainer, their pods, logs and events.

The one module that uses the kubernetes client. A server that is away, or asks to be left alone for a while, is waited
for as long as an object store is; what it refuses is an error that says what and why.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cbtm.errors import CbtmError, ConfigError
from cbtm.outage import GivenUp, Patience, persist

logger = logging.getLogger(__name__)

Json = dict[str, Any]

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CONTAINER = "node"  # of a TrainJob's pods, and the replicated job that they belong to
POD_LABEL = "jobset.sigs.k8s.io/jobset-name"  # on a TrainJob's pods, with its name
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"  # on a pod, the number of its machine
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Answers as they come: the client's own classes refuse what a newer cluster says. Seconds for connection and answer.
_PLAIN: Json = {"_preload_content": False, "_request_timeout": (10.0, 60.0)}
_LOG_SECONDS = (10.0, 120.0)  # a log that is silent for so long is asked for anew: the connection may be dead
_CLOCK_SECONDS = 60  # by which clocks may differ
_CONNECTIONS = 64  # one for each log that is followed, and some more
_PASSING = {0, 429, 500, 502, 503, 504}
_TIME = re.compile(r"^(\d{4}-\d\d-\d\dT\S+) (.*)$", re.DOTALL)


class KubernetesError(CbtmError):
    """The cluster refused something or cannot be reached: its operator can mend it."""


@dataclass(frozen=True)
class Ended:
    """How a container ended: its exit code, and Kubernetes' reason, such as OOMKilled."""

    exit_code: int
    reason: str


@dataclass(frozen=True)
class NodePod:
    """One pod of a TrainJob.

    Attributes:
        name: Its name.
        uid: Its identity.
        node: Number of its machine.
        restarts: How often its container was started again.
        runs: Whether its container runs.
        waiting: Why its container does not run yet: Kubernetes' reason and message.
        ended: How its container ended: now, or, where it was started again, the last time.
        leaves: Whether it is being removed, as from a machine that is emptied.
    """

    name: str
    uid: str
    node: int
    restarts: int
    runs: bool
    waiting: tuple[str, str] | None
    ended: Ended | None
    leaves: bool = False

    @classmethod
    def of(cls, pod: Mapping[str, Any]) -> "NodePod":
        """The pod that the API describes."""
        meta, status = pod["metadata"], pod.get("status", {})
        labels = {**meta.get("annotations", {}), **meta.get("labels", {})}
        found = [one for one in status.get("containerStatuses", []) if one["name"] == CONTAINER]
        container: Mapping[str, Any] = found[0] if found else {}
        state, last = container.get("state", {}), container.get("lastState", {})
        ended = state.get("terminated") or last.get("terminated")
        reason = state.get("waiting")
        if ended is None and status.get("phase") == "Failed":  # evicted, or its node is gone
            ended = {"exitCode": -1, "reason": status.get("reason", "Failed")}
        return cls(
            name=meta["name"],
            uid=meta["uid"],
            node=int(labels.get(INDEX_LABEL, 0)),
            restarts=container.get("restartCount", 0),
            runs="running" in state,
            waiting=(reason.get("reason", ""), reason.get("message", "")) if reason else None,
            ended=Ended(ended["exitCode"], ended.get("reason", "")) if ended else None,
            leaves="deletionTimestamp" in meta,
        )


class Kubernetes:
    """One namespace of a cluster.

    Args:
        configuration: The client's, with address and credentials.
        namespace: The namespace.
        own_namespace: That of the pod of this process; None outside of the cluster.
    """

    def __init__(self, configuration: Any, namespace: str, own_namespace: str | None = None) -> None:
        from kubernetes import client

        self.namespace, self._own_namespace = namespace, own_namespace
        api = client.ApiClient(configuration)
        self._custom, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    # --- TrainJobs ---

    def create(self, manifest: Json) -> bool:
        """Create a TrainJob; False if there is one with its name.

        Raises:
            KubernetesError: If the cluster has no TrainJobs, or refuses this one.
        """
        made = self._request(
            "create a TrainJob",
            lambda: self._custom.create_namespaced_custom_object(
                # Strict: an older Trainer must not leave out silently what it does not know.
                *(GROUP, VERSION, self.namespace, PLURAL, manifest),
                field_validation="Strict",
                **_PLAIN,
            ),
            unless=(409,),
        )
        return made is not None

    def read(self, name: str) -> Json | None:
        """A TrainJob as it is; None where there is none."""
        found: Json | None = self._request(
            f"read TrainJob {name}",
            lambda: self._custom.get_namespaced_custom_object(
                *(GROUP, VERSION, self.namespace, PLURAL, name), **_PLAIN
            ),
            unless=(404,),
        )
        return found

    def delete(self, name: str, uid: str) -> None:
        """Ask for a TrainJob to be removed, once its pods are; they get SIGTERM and the time that they are given."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self._request(
            f"delete TrainJob {name}",
            lambda: self._custom.delete_namespaced_custom_object(
                *(GROUP, VERSION, self.namespace, PLURAL, name), body=options, **_PLAIN
            ),
            unless=(404, 409),  # gone already, or another one by now
        )

    # --- pods ---

    def pods(self, name: str) -> list[NodePod]:
        """Pods of a TrainJob, by the numbers of their machines."""
        found = self._request(
            f"list the pods of TrainJob {name}",
            lambda: self._core.list_namespaced_pod(self.namespace, label_selector=f"{POD_LABEL}={name}", **_PLAIN),
        )
        return sorted(map(NodePod.of, found["items"]), key=lambda pod: (pod.node, pod.name))

    def own_pod(self) -> Json | None:
        """The pod that this process runs in; None where it runs in none, or may not read it."""
        name, namespace = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME"), self._own_namespace
        if namespace is None or not name:
            return None
        try:
            found: Json | None = self._request(
                f"read pod {name}",
                lambda: self._core.read_namespaced_pod(name, namespace, **_PLAIN),
                unless=(404,),
            )
        except KubernetesError as error:
            logger.warning("%s; the machines get what train.node says, and nothing of this pod's", error)
            return None
        return found

    def warnings(self, name: str) -> list[str]:
        """What the cluster warns of about an object, each reason once with its newest message, the newest last."""
        found = self._request(
            f"list the events of {name}",
            lambda: self._core.list_namespaced_event(
                self.namespace, field_selector=f"involvedObject.name={name}", **_PLAIN
            ),
        )
        events = [event for event in found["items"] if event.get("type") == "Warning"]
        events.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return list(
            {event.get("reason", ""): f"{event.get('reason')}: {event.get('message')}" for event in events}.values()
        )

    def log(self, pod: str, since: str | None) -> Iterator[tuple[str, str]]:
        """Follow the log of a pod's container from its beginning, or behind a time, to its end.

        Yields:
            Time (as text that sorts by it) and text of each line.

        Raises:
            KubernetesError: If it cannot be read.
            ConnectionError: If it broke off.
        """
        from urllib3.exceptions import HTTPError

        seconds = None
        if since:
            seconds = max(1, int(time.time() - datetime.fromisoformat(since).timestamp()) + _CLOCK_SECONDS)
        stream = self._answer(
            f"read the log of pod {pod}",
            lambda: self._core.read_namespaced_pod_log(
                *(pod, self.namespace),
                container=CONTAINER,
                follow=True,
                timestamps=True,
                _preload_content=False,
                _request_timeout=_LOG_SECONDS,
                **({} if seconds is None else {"since_seconds": seconds}),
            ),
        )
        try:
            for line in _lines(stream.stream(amt=None, decode_content=False)):
                found = _TIME.match(line)
                at, text = found.groups() if found else (since or "", line)
                if not since or at > since:
                    yield at, text
        except HTTPError as error:
            raise ConnectionError(str(error)) from error
        finally:
            stream.close()

    def _request(self, what: str, call: Callable[[], Any], *, unless: tuple[int, ...] = ()) -> Any:
        """Make a request and read its answer; None if it is refused with a status of `unless`."""
        answer = self._answer(what, call, unless=unless)
        return None if answer is None else json.loads(answer.data)

    def _answer(self, what: str, call: Callable[[], Any], *, unless: tuple[int, ...] = ()) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        def is_passing(error: Exception) -> bool:
            return isinstance(error, HTTPError) or (isinstance(error, ApiException) and error.status in _PASSING)

        try:
            return persist("Kubernetes", call, Patience.of_this_call(), is_passing)
        except (GivenUp, ApiException, HTTPError) as error:
            reason = error.reason if isinstance(error, GivenUp) else error
            if isinstance(reason, ApiException) and reason.status in unless and _status(reason):
                return None
            raise KubernetesError(f"cannot {what} in namespace {self.namespace}: {_explain(reason)}") from error


def connect(namespace: str | None) -> Kubernetes:
    """Find the cluster: that of this pod, or that of the kubeconfig file.

    Args:
        namespace: None takes that of the pod, or of the kubeconfig's context.

    Raises:
        ConfigError: If the client is not installed, or there is no cluster to be found.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError("train.nodes above 1 needs the kubernetes client: pip install 'cbtm[kubernetes]'") from None
    configuration = client.Configuration()
    configuration.connection_pool_maxsize = _CONNECTIONS
    configuration.retries = False  # of urllib3, at once and with warnings; `persist` repeats
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise ConfigError(
                f"this pod has no access to Kubernetes ({error}); give it a service account whose token is mounted"
            ) from None
        own = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.is_file() else "default"
        return Kubernetes(configuration, namespace or own, own)
    file = os.environ.get("KUBECONFIG")  # the client looks at the variable but once, when it is imported
    try:
        config.load_kube_config(file, client_configuration=configuration)
        context = config.list_kube_config_contexts(file)[1]["context"]
    except config.ConfigException as error:
        raise ConfigError(
            f"train.nodes above 1 needs a Kubernetes cluster, and none is found: {error}; set KUBECONFIG"
        ) from None
    return Kubernetes(configuration, namespace or context.get("namespace", "default"))


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", errors="replace")


def _status(error: Any) -> Json:
    """The API's own account of a refusal; empty where something else answered."""
    try:
        told = json.loads(getattr(error, "body", None) or "")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _explain(error: Any) -> str:
    status = getattr(error, "status", None)
    told = str(_status(error).get("message") or getattr(error, "reason", None) or error)
    if status == 404 and not _status(error):
        return "it has no TrainJobs; install Kubeflow Trainer 2.3 or newer"
    if status in (401, 403):
        return f"{told}; give the service account the rights in deploy/trainjobs"
    if "unknown field" in told:
        return f"{told}; Kubeflow Trainer 2.3 or newer knows it"
    return told
