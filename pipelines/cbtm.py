"""The pipeline of one run: find domains, train an expert for each, mix them, report.

Two loops: over shard groups, and over the models that branch from the seed. Each loop is a pipeline of its own
that receives its items as a parameter, because kfp.local resolves only those at the top level.

    check ─▶ check GPUs ─▶ plan ─▶ tokenizer ─▶ clusterer ─▶ assign[group] ─▶ seed
        ─▶ train[member] ─▶ score[member] ─▶ average ─▶ evaluate

The first task checks the configuration with what the parameters override in it, and hands it on to all others. A
parameter that is empty overrides nothing: KFP loses a null on its way into a loop, and kfp.local refuses one.
"""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components.assigner import assign_shards
from components.averager import average_experts
from components.clusterer import build_tokenizer, fit_clusterer
from components.evaluator import evaluate_ensembles
from components.planner import plan_run
from components.scorer import score_expert
from components.trainer import train_expert
from pipelines.parameters import Cluster, with_parameters
from pipelines.pods import S3_VARIABLES, TRACKING_VARIABLES, Options, Pod, Secret, fit, named, persistent

SEED = "seed"


def build_assign(options: Options, *, of: str | None = None) -> Any:
    """The loop over shard groups.

    Args:
        options: Options of the compilation.
        of: What it belongs to, where a pipeline has this loop twice; a part of its names.
    """
    assign = assign_shards if of is None else named(assign_shards, f"assign-{of}-shards")

    @dsl.pipeline(
        name="assign" if of is None else f"assign-{of}",
        description="Assign every shard group of the corpus to clusters.",
    )
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
            persistent(fit(assign(config=config, group=group), pod, options, Secret(s3_secret, S3_VARIABLES)))

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


def _work(config: Any, checked: Any, loops: tuple[Any, Any], cluster: Cluster, options: Options) -> None:
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
    return with_parameters(
        "cbtm",
        "Cluster-Branch-Train-Merge: experts for the domains of a corpus.",
        options,
        lambda config, checked, cluster: _work(config, checked, loops, cluster, options),
    )


cbtm = build(Options())
