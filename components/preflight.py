"""Components: check a cluster before anything expensive runs on it."""

from typing import List  # noqa: UP035 - KFP reads the annotation

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def check_cluster(
    config: str,
    root: str,
    tracking_uri: str,
    price_per_hour: str,
    overrides: List[str],  # noqa: UP006
    compiled_by: str,
) -> str:
    """Check configuration, image, bucket and tracking server, and say all that is wrong at once.

    Args:
        config: The run's configuration, YAML or JSON text.
        root: In place of the configuration's root; empty keeps that.
        tracking_uri: In place of the configuration's tracking.uri; empty keeps that.
        price_per_hour: In place of the configuration's train.price_per_hour; empty keeps that.
        overrides: Further values of the configuration, each as section.key=value.
        compiled_by: Version of cbtm that compiled the pipeline.

    Returns:
        Output: The configuration with its overrides, for all other tasks.
    """
    from cbtm import stages
    from cbtm.process import stage_process
    from cbtm.run_config import PlaceOverrides

    with stage_process():
        place = PlaceOverrides(root or None, tracking_uri or None, price_per_hour or None, tuple(overrides))
        checked = stages.check_cluster(config, place, compiled_by=compiled_by)
    return checked.model_dump_json(exclude_defaults=True)


@dsl.component(base_image=images.GPU, install_kfp_package=False)
def check_gpus(config: str, gpu_count: str, compiled_by: str) -> None:
    """Check a pod that has GPUs: its image, what it sees of them, and the way from there to the bucket.

    Args:
        config: The run's configuration, YAML or JSON text.
        gpu_count: GPUs that the pod asks for.
        compiled_by: Version of cbtm that compiled the pipeline.
    """
    from cbtm import stages
    from cbtm.process import stage_process

    with stage_process():
        stages.check_gpus(config, gpu_count, compiled_by=compiled_by)
