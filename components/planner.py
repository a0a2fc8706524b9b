"""Component: check a run's inputs and say what the two loops go over."""

from typing import List, NamedTuple  # noqa: UP035 - KFP reads the annotation

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def plan_run(config: str) -> NamedTuple("Loops", groups=List[str], members=List[str]):  # type: ignore # noqa: UP006
    """Check the inputs of a run; name the shard groups and the models that its two loops go over.

    Args:
        config: The run's configuration, YAML or JSON text.

    Returns:
        groups: Names of the shard groups.
        members: Names of the models that are trained from the seed model.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run

    with stage_process():
        run = Run.parse(config)
        groups = [group.name for group in stages.plan(run).groups]
    return groups, [member.name for member in run.config.members]
