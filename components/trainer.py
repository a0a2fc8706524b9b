"""Component: train one model of a run."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.GPU, install_kfp_package=False)
def train_expert(config: str, member: str, manifest: dsl.Output[dsl.Model]) -> None:
    """Train one member of a run: the seed model, the dense baseline, or the expert of one cluster.

    It resumes from its own checkpoint, so a retry after a pre-emption loses little.

    Args:
        config: The run's configuration, YAML or JSON text.
        member: seed, dense, cluster-00000 … or random-00000 ….
        manifest: Manifest of the trained model, which stays where the configuration's root says.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run
    from cbtm.train.member import Member

    with stage_process():
        made = stages.train(Run.parse(config), Member.parse(member))
    made.save(manifest.path)
    manifest.metadata.update(made.facts)
