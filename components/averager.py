"""Component: average the experts' parameters."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GPU, install_kfp_package=False)
def average_experts(config: str, manifests: dsl.Output[dsl.Artifact]) -> None:
    """Make one model of all experts, in every way that is configured, and score each; nothing if none is.

    Args:
        config: The run's configuration, YAML or JSON text.
        manifests: Manifests of the scores of the averages, a JSON array.
    """
    import json

    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run

    with stage_process():
        made = stages.average(Run.parse(config))
    with open(manifests.path, "w", encoding="utf-8") as file:
        json.dump([one.facts for one in made], file)
