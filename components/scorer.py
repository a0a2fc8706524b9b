"""Component: score the validation tokens under one model of a run."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GPU, install_kfp_package=False)
def score_expert(config: str, member: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Score every validation token under one member of a run.

    Args:
        config: The run's configuration, YAML or JSON text.
        member: seed, dense, cluster-00000 … or random-00000 ….
        manifest: Manifest of the scores.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run
    from cbtm.train.member import Member

    with stage_process():
        made = stages.score(Run.parse(config), Member.parse(member))
    made.save(manifest.path)
    manifest.metadata.update(made.facts)
