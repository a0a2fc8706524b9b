"""The TrainJob of Kubeflow Trainer that trains one member on several machines: a manifest, made of settings alone.

One place that is written to has one TrainJob, by its name: two launches of one training come to the same one, and a
training with other settings finds what it has to end first. Fields are those of the API of Trainer 2.3.

Written as plain data and not by the Kubeflow SDK (docs/decisions/0035-trainjob.md).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cbtm.config import digest_of
from cbtm.errors import ConfigError
from cbtm.kubernetes import CONTAINER, GROUP, VERSION
from cbtm.train.config import OptimizationConfig
from cbtm.train.launch import STOP_SECONDS
from cbtm.train.node import NodeConfig

logger = logging.getLogger(__name__)

Json = dict[str, Any]

MODULE = "cbtm.stages.node"  # what a pod runs
MEMBER_LABEL, RUN_LABEL = "cbtm/member", "cbtm/run"
_KEY, _SETTINGS = "cbtm/key", "cbtm/settings"  # annotations
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_GRACE_SECONDS = int(STOP_SECONDS) + 60  # for a checkpoint, and what comes after
_S3_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
)
# What of a task's own variables its machines need; tracking stays with the task.
_PASSED_ON = re.compile(
    r"AWS_.*|NCCL_.*|TORCH_NCCL_.*|PYTORCH_.*|OMP_NUM_THREADS|GOMP_.*|CBTM_(LOG_LEVEL|S3_PATIENCE|PROGRESS_SECONDS)"
    r"|(HTTPS?|NO)_PROXY|(https?|no)_proxy|SSL_CERT_FILE|REQUESTS_CA_BUNDLE"
)
_OF_THE_CLUSTER = re.compile(r"AWS_(ROLE|WEB_IDENTITY|CONTAINER|STS)_.*")  # it gives them to each pod by itself
_CREDENTIAL = re.compile(r"SECRET|TOKEN|PASSWORD")


@dataclass(frozen=True)
class OwnPod:
    """What a task's own pod has and its machines get, where the settings say nothing else.

    Attributes:
        image: Its image.
        env: Its variables, as Kubernetes writes them.
        resources: Requests and limits of what every pod has: no GPUs.
        spec: Tolerations, node selector, service account, pull secrets and security context of the pod.
        security_context: That of the container.
        queue: Its queue.
    """

    image: str | None = None
    env: Sequence[Json] = ()
    resources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    security_context: Json | None = None
    queue: str | None = None

    @classmethod
    def of(cls, pod: Json | None) -> "OwnPod":
        """What the API says of a pod; None is a process outside of one."""
        if pod is None:
            return cls()
        containers = pod["spec"]["containers"]
        main = next((one for one in containers if one["name"] == "main"), containers[0])  # Argo's name
        names = ("tolerations", "nodeSelector", "serviceAccountName", "imagePullSecrets", "securityContext")
        plain = {"cpu", "memory", "ephemeral-storage"}
        return cls(
            image=main["image"],
            env=[one for one in main.get("env", []) if _is_passed_on(one)],
            resources={
                kind: {name: amount for name, amount in amounts.items() if name in plain}
                for kind, amounts in main.get("resources", {}).items()
                if kind in ("requests", "limits")
            },
            spec={name: pod["spec"][name] for name in names if pod["spec"].get(name)},
            security_context=main.get("securityContext"),
            queue=pod["metadata"].get("labels", {}).get(_QUEUE_LABEL),
        )


def _is_passed_on(variable: Json) -> bool:
    name = variable["name"]
    source = variable.get("valueFrom", {})
    if "secretKeyRef" in source or "configMapKeyRef" in source:
        return not name.startswith("MLFLOW_")
    if not _PASSED_ON.fullmatch(name) or _OF_THE_CLUSTER.fullmatch(name) or "valueFrom" in variable:
        return False
    if _CREDENTIAL.search(name):
        logger.warning("%s stands in this pod as plain text, and is not given to its machines; use a secret", name)
        return False
    return True


def job_name(root: str, member: str) -> str:
    """Name of the TrainJob that trains a member of the run below `root`: the same whenever it is asked for."""
    return f"cbtm-{member}-{digest_of(root)[:12]}"


def manifest(
    config: OptimizationConfig, own: OwnPod, *, root: str, member: str, key: str, run_key: str, task_uri: str
) -> Json:
    """The TrainJob of one training.

    Args:
        config: Settings of the training; `nodes`, `devices` and `node` say what it runs on.
        own: What the machines get where `node` says nothing.
        root: The run's root.
        member: Name of the member.
        key: Identity of the training.
        run_key: Identity of the run, for people who look for its TrainJobs.
        task_uri: Address of the task that each machine reads.

    Raises:
        ConfigError: If there is no image.
    """
    node = config.node
    image = node.image or own.image
    if image is None:
        raise ConfigError("train.node.image is needed where the training is not started from a pod with an image")
    queue = node.queue or own.queue
    labels = {
        "app.kubernetes.io/managed-by": "cbtm",
        MEMBER_LABEL: member,
        RUN_LABEL: run_key[:32],
        **({_QUEUE_LABEL: queue} if queue else {}),
    }
    spec = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": node.runtime},
        "trainer": {
            "image": image,
            "command": ["python3", "-m", MODULE],
            "args": [task_uri],
            "numNodes": config.nodes,
            "numProcPerNode": config.devices,
            "resourcesPerNode": _resources(config, own),
            "env": _env(node, own),
        },
        "runtimePatches": [{"manager": "cbtm/trainer", "trainingRuntimeSpec": _patch(node, own, labels)}],
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": job_name(root, member),
            "labels": labels,
            "annotations": {_KEY: key, _SETTINGS: digest_of([labels, spec])},
        },
        "spec": spec,
    }


def is_of(found: Json, wanted: Json) -> bool:
    """Whether a TrainJob that is there was made for the same training, with the same settings."""
    names = (_KEY, _SETTINGS)
    there, here = (one["metadata"].get("annotations", {}) for one in (found, wanted))
    return all(there.get(name) == here[name] for name in names)


def _env(node: NodeConfig, own: OwnPod) -> list[Json]:
    variables: dict[str, Json] = {one["name"]: one for one in own.env}
    if node.secret is not None:
        for name in _S3_VARIABLES:
            reference = {"name": node.secret, "key": name, "optional": True}
            variables[name] = {"name": name, "valueFrom": {"secretKeyRef": reference}}
    variables["PYTHONUNBUFFERED"] = {"name": "PYTHONUNBUFFERED", "value": "1"}
    return list(variables.values())


def _resources(config: OptimizationConfig, own: OwnPod) -> Json:
    node = config.node
    given = {"cpu": node.cpu, "memory": node.memory}
    given = {name: amount for name, amount in given.items() if amount is not None}
    gpus = {} if config.device == "cpu" else {node.gpu_type: str(config.devices)}
    return {kind: {**own.resources.get(kind, {}), **given, **gpus} for kind in ("requests", "limits")}


def _patch(node: NodeConfig, own: OwnPod, labels: Mapping[str, str]) -> Json:
    """What the pods get beyond what the runtime gives them."""
    pod: Json = {
        **own.spec,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": node.shm_size}}],
        "containers": [
            {
                "name": CONTAINER,
                # Kubernetes gives 64 MiB, and processes that train together exchange tensors there.
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],  # noqa: S108 - it is no file
                **({"securityContext": own.security_context} if own.security_context else {}),
            }
        ],
    }
    if node.tolerations is not None:
        pod["tolerations"] = [dict(one) for one in node.tolerations]
    if node.node_selector is not None:
        pod["nodeSelector"] = dict(node.node_selector)
    if node.service_account is not None:
        pod["serviceAccountName"] = node.service_account
    # A service mesh's proxy would outlive the training, and stand between the machines.
    marks = {**labels, "sidecar.istio.io/inject": "false"}
    marks.pop(_QUEUE_LABEL, None)  # the TrainJob is admitted as a whole
    template = {"metadata": {"labels": marks}, "spec": pod}
    job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
