"""What every pipeline of cbtm takes: a configuration, and what belongs to the cluster that it runs on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Dict, List  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components import images
from components.preflight import check_cluster, check_gpus
from pipelines.pods import HUB_VARIABLES, S3_VARIABLES, TRACKING_VARIABLES, Options, Pod, Secret, fit, once


@dataclass(frozen=True)
class Cluster:
    """The two kinds of pods, and the secrets that a task may get."""

    cpu: Pod
    gpu: Pod
    s3: Secret
    tracking: Secret
    hub: Secret


Work = Callable[[Any, Any, Cluster], None]
"""The tasks after the checks: from the checked configuration, the last check, and the cluster's parameters."""


def with_parameters(name: str, description: str, options: Options, work: Work) -> Any:
    """A pipeline with all parameters, whose first tasks check everything before any work.

    Args:
        name: Its name.
        description: What it does.
        options: Options of the compilation.
        work: Makes the other tasks.
    """

    @dsl.pipeline(name=name, description=description)
    def pipeline(
        config: str,
        root: str = "",
        tracking_uri: str = "",
        price_per_hour: str = "",
        overrides: List[str] = [],  # noqa: UP006, B006 - the default is compiled, not shared
        gpu_type: str = "nvidia.com/gpu",
        gpu_count: str = "1",
        gpu_cpu_request: str = "4",
        gpu_cpu_limit: str = "16",
        gpu_memory_request: str = "32Gi",
        gpu_memory_limit: str = "64Gi",
        gpu_tolerations: List[Dict[str, str]] = [],  # noqa: UP006, B006
        gpu_node_selector: Dict[str, str] = {},  # noqa: UP006, B006
        cpu_request: str = "2",
        cpu_limit: str = "16",
        memory_request: str = "8Gi",
        memory_limit: str = "32Gi",
        tolerations: List[Dict[str, str]] = [],  # noqa: UP006, B006
        node_selector: Dict[str, str] = {},  # noqa: UP006, B006
        s3_secret: str = "cbtm-s3",
        tracking_secret: str = "cbtm-tracking",
        hub_secret: str = "cbtm-hub",
    ) -> None:
        """Run as the configuration says.

        Args:
            config: The run's configuration, YAML or JSON text.
            root: Folder or s3:// prefix that receives the run, in place of the configuration's; empty keeps that.
            tracking_uri: Address of the MLflow server, in place of the configuration's; empty keeps that.
            price_per_hour: Price of one GPU for an hour, in place of the configuration's; empty keeps that.
            overrides: Further values of the configuration, each as section.key=value.
            gpu_type: Resource name of the GPUs, such as nvidia.com/gpu.
            gpu_count: GPUs of a pod that trains or scores, as text; what train.devices says.
            gpu_cpu_request: CPUs that a pod with GPUs is given.
            gpu_cpu_limit: CPUs that it may use at most.
            gpu_memory_request: Memory that a pod with GPUs is given.
            gpu_memory_limit: Memory that it may use at most, /dev/shm included.
            gpu_tolerations: Tolerations of pods with GPUs, a JSON list.
            gpu_node_selector: Labels of the nodes for pods with GPUs, a JSON object.
            cpu_request: CPUs that a pod without GPUs is given.
            cpu_limit: CPUs that it may use at most.
            memory_request: Memory that a pod without GPUs is given.
            memory_limit: Memory that it may use at most.
            tolerations: Tolerations of pods without GPUs, a JSON list.
            node_selector: Labels of the nodes for pods without GPUs, a JSON object.
            s3_secret: Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed, AWS_SESSION_TOKEN,
                AWS_ENDPOINT_URL and AWS_DEFAULT_REGION. May be absent.
            tracking_secret: Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or
                MLFLOW_TRACKING_TOKEN. May be absent.
            hub_secret: Secret with HF_TOKEN, for tasks that fetch the seed model. May be absent.
        """
        settings = {
            "config": config,
            "root": root,
            "tracking_uri": tracking_uri,
            "price_per_hour": price_per_hour,
            "overrides": overrides,
        }
        cluster = Cluster(
            cpu=Pod(cpu_request, cpu_limit, memory_request, memory_limit, tolerations, node_selector),
            gpu=Pod(
                gpu_cpu_request,
                gpu_cpu_limit,
                gpu_memory_request,
                gpu_memory_limit,
                gpu_tolerations,
                gpu_node_selector,
                gpu_type,
                gpu_count,
            ),
            s3=Secret(s3_secret, S3_VARIABLES),
            tracking=Secret(tracking_secret, TRACKING_VARIABLES),
            hub=Secret(hub_secret, HUB_VARIABLES),
        )
        checked_config, checked = _check(settings, cluster, options)
        work(checked_config, checked, cluster)

    return pipeline


def _check(settings: dict[str, Any], cluster: Cluster, options: Options) -> tuple[Any, Any]:
    """Check everything before any work; returns the checked configuration, and the last of the checks."""
    ready = check_cluster(**settings, compiled_by=images.VERSION)
    once(fit(ready, cluster.cpu, options, cluster.s3, cluster.tracking))
    gpus = check_gpus(config=ready.output, gpu_count=cluster.gpu.gpu_count, compiled_by=images.VERSION)
    return ready.output, once(fit(gpus, cluster.gpu, options, cluster.s3))
