"""The pipeline of one run: find domains, train an expert for each, mix them, report.

Two loops: over shard groups, and over the models that branch from the seed. Each loop is a pipeline of its own
that receives its items as a parameter, because kfp.local resolves only those at the top level.

    check ─▶ check GPUs ─▶ plan ─▶ tokenizer ─▶ clusterer ─▶ assign[group] ─▶ seed
        ─▶ train[member] ─▶ score[member] ─▶ average ─▶ evaluate

The first task checks the configuration with what the parameters override in it, and hands it on to all others. A
parameter that is empty overrides nothing: KFP loses a null on its way into a loop, and kfp.local refuses one.
"""

from dataclasses import dataclass
from typing import Any, Dict, List  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components import images
from components.assigner import assign_shards
from components.averager import average_experts
from components.clusterer import build_tokenizer, fit_clusterer
from components.evaluator import evaluate_ensembles
from components.planner import plan_run
from components.preflight import check_cluster, check_gpus
from components.scorer import score_expert
from components.trainer import train_expert
from pipelines.pods import (
    HUB_VARIABLES,
    S3_VARIABLES,
    TRACKING_VARIABLES,
    Options,
    Pod,
    Secret,
    fit,
    named,
    once,
    persistent,
)

SEED = "seed"


def build_assign(options: Options) -> Any:
    """The loop over shard groups."""

    @dsl.pipeline(name="assign", description="Assign every shard group of the corpus to clusters.")
    def assign_groups(
        config: str,
        groups: List[str],  # noqa: UP006
        cpu_request: str,
        cpu_limit: str,
        memory_request: str,
        memory_limit: str,
        tolerations: List[Dict[str, str]],  # noqa: UP006
        node_selector: Dict[str, str],  # noqa: UP006
        s3_secret: str,
    ) -> None:
        """Assign each shard group, at the same time."""
        pod = Pod(cpu_request, cpu_limit, memory_request, memory_limit, tolerations, node_selector)
        with dsl.ParallelFor(groups, name="shard groups", parallelism=options.parallelism) as group:
            persistent(fit(assign_shards(config=config, group=group), pod, options, Secret(s3_secret, S3_VARIABLES)))

    return assign_groups


def build_experts(options: Options) -> Any:
    """The loop over the models that branch from the seed."""

    @dsl.pipeline(name="experts", description="Train and score every model that branches from the seed model.")
    def train_and_score(
        config: str,
        members: List[str],  # noqa: UP006
        cpu_request: str,
        cpu_limit: str,
        memory_request: str,
        memory_limit: str,
        tolerations: List[Dict[str, str]],  # noqa: UP006
        node_selector: Dict[str, str],  # noqa: UP006
        gpu_type: str,
        gpu_count: str,
        s3_secret: str,
        tracking_secret: str,
    ) -> None:
        """Train and score each member, at the same time and with no communication between them."""
        pod = Pod(cpu_request, cpu_limit, memory_request, memory_limit, tolerations, node_selector, gpu_type, gpu_count)
        s3, tracking = Secret(s3_secret, S3_VARIABLES), Secret(tracking_secret, TRACKING_VARIABLES)
        with dsl.ParallelFor(members, name="clusters", parallelism=options.parallelism) as member:
            trained = persistent(fit(train_expert(config=config, member=member), pod, options, s3, tracking), gpu=True)
            scored = persistent(fit(score_expert(config=config, member=member), pod, options, s3), gpu=True)
            scored.after(trained)

    return train_and_score


@dataclass(frozen=True)
class _Cluster:
    """The two kinds of pods, and the secrets that a task may get."""

    cpu: Pod
    gpu: Pod
    s3: Secret
    tracking: Secret
    hub: Secret


def _check(settings: dict[str, Any], cluster: _Cluster, options: Options) -> tuple[Any, Any]:
    """Check everything before any work; returns the checked configuration, and the last of the checks."""
    ready = check_cluster(**settings, compiled_by=images.VERSION)
    once(fit(ready, cluster.cpu, options, cluster.s3, cluster.tracking))
    gpus = check_gpus(config=ready.output, gpu_count=cluster.gpu.gpu_count, compiled_by=images.VERSION)
    return ready.output, once(fit(gpus, cluster.gpu, options, cluster.s3))


def _work(config: Any, checked: Any, loops: tuple[Any, Any], cluster: _Cluster, options: Options) -> None:
    """The stages of the run, in their order; the loops are those over shard groups and over members."""
    assign_groups, train_and_score = loops
    s3, tracking, hub = cluster.s3, cluster.tracking, cluster.hub

    def small(task: dsl.PipelineTask, *secrets: Secret) -> Any:
        return persistent(fit(task, cluster.cpu, options, s3, *secrets))

    def large(task: dsl.PipelineTask, *secrets: Secret) -> Any:
        return persistent(fit(task, cluster.gpu, options, s3, *secrets), gpu=True)

    plan = small(plan_run(config=config), tracking, hub).after(checked)
    tokenizer = small(build_tokenizer(config=config), hub).after(plan)
    # Clusters may be balanced by tokens.
    clusterer = small(fit_clusterer(config=config)).after(tokenizer)
    assigned = assign_groups(
        config=config, groups=plan.outputs["groups"], s3_secret=s3.name, **cluster.cpu.parameters()
    ).after(clusterer)
    seed = large(named(train_expert, "train-seed")(config=config, member=SEED), tracking, hub).after(assigned)
    seed_scores = large(named(score_expert, "score-seed")(config=config, member=SEED)).after(seed)
    experts = train_and_score(
        config=config,
        members=plan.outputs["members"],
        s3_secret=s3.name,
        tracking_secret=tracking.name,
        **cluster.gpu.parameters(),
    ).after(seed)
    averages = large(average_experts(config=config)).after(experts)
    small(evaluate_ensembles(config=config), tracking).after(averages, seed_scores)


def build(options: Options) -> Any:
    """The pipeline, as it is compiled with these options."""
    loops = build_assign(options), build_experts(options)  # KFP builds no pipeline while it builds another

    @dsl.pipeline(name="cbtm", description="Cluster-Branch-Train-Merge: experts for the domains of a corpus.")
    def cbtm(
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
        """Run c-BTM as the configuration says.

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
        cluster = _Cluster(
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
        _work(checked_config, checked, loops, cluster, options)

    return cbtm


cbtm = build(Options())
