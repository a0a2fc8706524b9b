"""What a task's pod gets on a cluster: resources, a place, secrets, shared memory, a deadline, retries, labels.

Whatever differs between clusters is a parameter of the pipeline; what KFP takes no parameter for is an option of the
compilation. All resource parameters are text: the backend of KFP 2.17 reads a number in a resource setting as empty
text, and a GPU count that is empty asks for no GPU and says nothing.
"""

import copy
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

# In a secret a key has the name of the variable that it becomes.
S3_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
TRACKING_VARIABLES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
HUB_VARIABLES = ("HF_TOKEN",)

_HOUR = 3600
# Long enough for an image of some GB to be pulled onto a new node.
_CHECK_SECONDS = 1 * _HOUR
_CPU_SECONDS = 2 * 24 * _HOUR
# A training that is ended by this goes on from its checkpoint in the next try.
_GPU_SECONDS = 7 * 24 * _HOUR
_RETRIES = 3


@dataclass(frozen=True)
class Options:
    """What is settled when the pipeline is compiled.

    Attributes:
        parallelism: Tasks of one loop that run at once; 0 is all of them.
        shm_size: Size of /dev/shm of a pod with GPUs. It is memory, and counts towards the pod's memory limit.
        queue: Kueue's queue for all pods; None leaves them to the default scheduler.
    """

    parallelism: int = 0
    shm_size: str = "8Gi"
    queue: str | None = None


@dataclass(frozen=True)
class Pod:
    """Parameters of the pipeline for one kind of pod.

    Quantities are text, as Kubernetes writes them; tolerations are a list and the selector an object of JSON. A pod
    without `gpu_type` and `gpu_count` asks for no GPU.
    """

    cpu_request: Any
    cpu_limit: Any
    memory_request: Any
    memory_limit: Any
    tolerations: Any
    node_selector: Any
    gpu_type: Any = None
    gpu_count: Any = None

    def parameters(self) -> dict[str, Any]:
        """What a pipeline within the pipeline takes to have pods of this kind."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Secret:
    """Name of a secret, a parameter of the pipeline, and the variables that it gives."""

    name: Any
    variables: tuple[str, ...]


def fit(task: dsl.PipelineTask, pod: Pod, options: Options, *secrets: Secret) -> dsl.PipelineTask:
    """Give a task's pod what it needs.

    Args:
        task: The task.
        pod: What the pod asks for, and where it runs.
        options: Options of the compilation.
        secrets: Secrets that become variables. One that is not there gives none: a pod may have its credentials from
            its service account.
    """
    task.set_cpu_request(pod.cpu_request).set_cpu_limit(pod.cpu_limit)
    task.set_memory_request(pod.memory_request).set_memory_limit(pod.memory_limit)
    if pod.gpu_count is not None:
        task.set_accelerator_type(pod.gpu_type).set_accelerator_limit(pod.gpu_count)
        # Kubernetes gives 64 MiB, and processes that train together, or load data, exchange tensors there.
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=options.shm_size)
    # KFP 2.17.0 leaves a parameter that only a resource setting names out of the inputs of a loop.
    task.register_pipeline_channels(list(pod.parameters().values()))
    kubernetes.add_toleration_json(task, pod.tolerations)
    kubernetes.add_node_selector_json(task, pod.node_selector)
    for secret in secrets:
        kubernetes.use_secret_as_env(task, secret.name, {name: name for name in secret.variables}, optional=True)
    if options.queue is not None:
        kubernetes.add_pod_label(task, QUEUE_LABEL, options.queue)
    # Every stage knows by its own manifest, which covers the content of its inputs, whether there is something to do.
    task.set_caching_options(False)
    return task


def named(component: Any, name: str) -> Any:
    """The component under another name, for a second use of it outside of the loop that has the first.

    KFP 2.17.0 gives what Kubernetes is asked for by a task in a pipeline within the pipeline to a task outside of it
    with the same component name (`_merge_deployment_spec` merges before it has renamed all).
    """
    twin = copy.deepcopy(component)
    twin.name = twin.component_spec.name = name
    return twin


def persistent(task: dsl.PipelineTask, *, gpu: bool = False) -> dsl.PipelineTask:
    """Have a task tried again where its pod was lost; each try goes on from what the last one has stored."""
    task.set_retry(_RETRIES, backoff_duration="60s", backoff_factor=2.0, backoff_max_duration="900s")
    kubernetes.set_timeout(task, _GPU_SECONDS if gpu else _CPU_SECONDS)
    return task


def once(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Have a check fail the first time: what it finds does not mend itself."""
    kubernetes.set_timeout(task, _CHECK_SECONDS)
    return task
