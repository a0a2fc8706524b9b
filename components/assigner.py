"""Component: assign the documents of one shard group to clusters."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def assign_shards(config: str, group: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Assign the documents of one shard group to clusters and tokenise them.

    Args:
        config: The run's configuration, YAML or JSON text.
        group: Name of the shard group.
        manifest: Manifest of the group's assignment and token shards.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run

    with stage_process():
        made = stages.assign(Run.parse(config), group)
    made.save(manifest.path)
    manifest.metadata.update(made.facts)
