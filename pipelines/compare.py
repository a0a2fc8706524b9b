"""The pipeline of a comparison: what all arms share is made once, then each arm is a run by itself.

    check ─▶ check GPUs ─▶ plan comparison ─▶ plan ─▶ tokenizer ─▶ clusterer ─▶ assign[group] ─▶ seed ─▶ score seed
        ─▶ arm[arm]: configure ─▶ plan ─▶ clusterer ─▶ assign[group] ─▶ train, score[member] ─▶ evaluate
        ─▶ compare

Loops lie within the loop over arms. Components that are used both inside of it and outside have a second name
(`pipelines.pods.named`).
"""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components.clusterer import build_tokenizer, fit_clusterer
from components.comparator import compare_arms, configure_arm, plan_comparison
from components.evaluator import evaluate_ensembles
from components.planner import plan_run
from components.scorer import score_expert
from components.trainer import train_expert
from pipelines.cbtm import SEED, build_assign, build_experts
from pipelines.parameters import Cluster, with_parameters
from pipelines.pods import HUB_VARIABLES, S3_VARIABLES, TRACKING_VARIABLES, Options, Pod, Secret, fit, named, persistent


def build_arms(options: Options) -> Any:
    """The loop over arms."""
    assign_groups, train_and_score = build_assign(options, of="arm"), build_experts(options)

    @dsl.pipeline(name="arms", description="Cluster, train and evaluate each arm of the comparison.")
    def run_arms(
        config: str,
        arms: List[str],  # noqa: UP006
        cpu_request: str,
        cpu_limit: str,
        memory_request: str,
        memory_limit: str,
        tolerations: List[Dict[str, str]],  # noqa: UP006
        node_selector: Dict[str, str],  # noqa: UP006
        gpu_cpu_request: str,
        gpu_cpu_limit: str,
        gpu_memory_request: str,
        gpu_memory_limit: str,
        gpu_tolerations: List[Dict[str, str]],  # noqa: UP006
        gpu_node_selector: Dict[str, str],  # noqa: UP006
        gpu_type: str,
        gpu_count: str,
        s3_secret: str,
        tracking_secret: str,
        hub_secret: str,
    ) -> None:
        """Run each arm, at the same time."""
        cpu = Pod(cpu_request, cpu_limit, memory_request, memory_limit, tolerations, node_selector)
        gpu = Pod(
            gpu_cpu_request,
            gpu_cpu_limit,
            gpu_memory_request,
            gpu_memory_limit,
            gpu_tolerations,
            gpu_node_selector,
            gpu_type,
            gpu_count,
        )
        s3, tracking = Secret(s3_secret, S3_VARIABLES), Secret(tracking_secret, TRACKING_VARIABLES)
        hub = Secret(hub_secret, HUB_VARIABLES)

        def small(task: dsl.PipelineTask, *secrets: Secret) -> Any:
            return persistent(fit(task, cpu, options, s3, *secrets))

        with dsl.ParallelFor(arms, name="arms", parallelism=options.parallelism) as arm:
            own = small(configure_arm(config=config, arm=arm)).output
            plan = small(named(plan_run, "plan-arm")(config=own), tracking, hub)
            clusterer = small(named(fit_clusterer, "fit-arm")(config=own)).after(plan)
            assigned = assign_groups(
                config=own, groups=plan.outputs["groups"], s3_secret=s3_secret, **cpu.parameters()
            ).after(clusterer)
            experts = train_and_score(
                config=own,
                members=plan.outputs["members"],
                s3_secret=s3_secret,
                tracking_secret=tracking_secret,
                **gpu.parameters(),
            ).after(assigned)
            small(evaluate_ensembles(config=own), tracking).after(experts)

    return run_arms


def _work(config: Any, checked: Any, loops: tuple[Any, Any], cluster: Cluster, options: Options) -> None:
    assign_groups, run_arms = loops
    s3, tracking, hub = cluster.s3, cluster.tracking, cluster.hub

    def small(task: dsl.PipelineTask, *secrets: Secret) -> Any:
        return persistent(fit(task, cluster.cpu, options, s3, *secrets))

    def large(task: dsl.PipelineTask, *secrets: Secret) -> Any:
        return persistent(fit(task, cluster.gpu, options, s3, *secrets), gpu=True)

    comparison = small(plan_comparison(config=config)).after(checked)
    shared = comparison.outputs["shared"]
    plan = small(plan_run(config=shared), tracking, hub)
    tokenizer = small(build_tokenizer(config=shared), hub).after(plan)
    clusterer = small(fit_clusterer(config=shared)).after(tokenizer)
    assigned = assign_groups(
        config=shared, groups=plan.outputs["groups"], s3_secret=s3.name, **cluster.cpu.parameters()
    ).after(clusterer)
    seed = large(named(train_expert, "train-seed")(config=shared, member=SEED), tracking, hub).after(assigned)
    scored = large(named(score_expert, "score-seed")(config=shared, member=SEED)).after(seed)
    gpu = cluster.gpu.parameters()
    arms = run_arms(
        config=config,
        arms=comparison.outputs["arms"],
        s3_secret=s3.name,
        tracking_secret=tracking.name,
        hub_secret=hub.name,
        **cluster.cpu.parameters(),
        **{name if name.startswith("gpu_") else f"gpu_{name}": value for name, value in gpu.items()},
    ).after(scored)
    small(compare_arms(config=config), tracking).after(arms)


def build(options: Options) -> Any:
    """The pipeline, as it is compiled with these options."""
    loops = build_assign(options), build_arms(options)  # KFP builds no pipeline while it builds another
    return with_parameters(
        "compare",
        "Compare dense models, random clusters and several numbers of experts at equal tokens.",
        options,
        lambda config, checked, cluster: _work(config, checked, loops, cluster, options),
    )


compare = build(Options())
