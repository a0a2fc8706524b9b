"""The pipeline of one run: find domains, train an expert for each, mix them, report.

Two loops: over shard groups, and over the models that branch from the seed. Each loop is a pipeline of its own
that receives its items as a parameter, because kfp.local resolves only those at the top level.

    plan ─▶ tokenizer ─▶ clusterer ─▶ assign[group] ─▶ seed ─▶ train[member] ─▶ score[member] ─▶ average ─▶ evaluate
"""

from typing import List  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components.assigner import assign_shards
from components.averager import average_experts
from components.clusterer import build_tokenizer, fit_clusterer
from components.evaluator import evaluate_ensembles
from components.planner import plan_run
from components.scorer import score_expert
from components.trainer import train_expert

SEED = "seed"


@dsl.pipeline(name="assign", description="Assign every shard group of the corpus to clusters.")
def assign_groups(config: str, groups: List[str]) -> None:  # noqa: UP006
    """Assign each shard group, at the same time."""
    with dsl.ParallelFor(groups, name="shard groups") as group:
        assign_shards(config=config, group=group).set_caching_options(False)


@dsl.pipeline(name="experts", description="Train and score every model that branches from the seed model.")
def train_and_score(config: str, members: List[str]) -> None:  # noqa: UP006
    """Train and score each member, at the same time and with no communication between them."""
    with dsl.ParallelFor(members, name="clusters") as member:
        trained = train_expert(config=config, member=member).set_caching_options(False)
        score_expert(config=config, member=member).set_caching_options(False).after(trained)


@dsl.pipeline(name="cbtm", description="Cluster-Branch-Train-Merge: experts for the domains of a corpus.")
def cbtm(config: str) -> None:
    """Run c-BTM as the configuration says.

    Args:
        config: The run's configuration, YAML or JSON text. Caching is off: every stage knows by its own manifest,
            which covers the content of its inputs, whether there is something to do.
    """
    plan = plan_run(config=config).set_caching_options(False)
    tokenizer = build_tokenizer(config=config).set_caching_options(False).after(plan)
    # Clusters may be balanced by tokens.
    clusterer = fit_clusterer(config=config).set_caching_options(False).after(tokenizer)
    assigned = assign_groups(config=config, groups=plan.outputs["groups"]).after(clusterer)
    seed = train_expert(config=config, member=SEED).set_caching_options(False).after(assigned)
    seed_scores = score_expert(config=config, member=SEED).set_caching_options(False).after(seed)
    experts = train_and_score(config=config, members=plan.outputs["members"]).after(seed)
    averages = average_experts(config=config).set_caching_options(False).after(experts)
    evaluate_ensembles(config=config).set_caching_options(False).after(averages, seed_scores)
