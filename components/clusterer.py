"""Components: the tokenizer of a run, and the clusterer that finds its domains."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def build_tokenizer(config: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Take over the seed model's tokenizer, or train one on the corpus.

    Args:
        config: The run's configuration, YAML or JSON text.
        manifest: Manifest of the tokenizer.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run

    with stage_process():
        made = stages.tokenizer(Run.parse(config))
    made.save(manifest.path)
    manifest.metadata.update(made.facts)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def fit_clusterer(config: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Find the domains of the corpus: tf-idf, SVD, balanced k-means.

    Args:
        config: The run's configuration, YAML or JSON text.
        manifest: Manifest of the clusterer.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run import Run

    with stage_process():
        made = stages.cluster(Run.parse(config))
    made.save(manifest.path)
    manifest.metadata.update(made.facts)
