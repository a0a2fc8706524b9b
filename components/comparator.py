"""Components: the arms of a comparison, and what they come to side by side."""

from typing import List, NamedTuple  # noqa: UP035 - KFP reads the annotations

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def plan_comparison(config: str) -> NamedTuple("Arms", shared=str, arms=List[str]):  # type: ignore # noqa: UP006
    """Check a comparison; name its arms, and make the configuration of what they share.

    Args:
        config: The comparison's configuration, YAML or JSON text.

    Returns:
        shared: Configuration of the run that has what all arms share.
        arms: Names of the arms.
    """
    from cbtm.comparison import Comparison
    from cbtm.process import stage_process

    with stage_process():
        comparison = Comparison.parse(config)
        shared = comparison.shared.config.model_dump_json(exclude_defaults=True)
    return shared, [arm.name for arm in comparison.arms]


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def configure_arm(config: str, arm: str) -> str:
    """Make the configuration of one arm.

    Args:
        config: The comparison's configuration, YAML or JSON text.
        arm: Name of the arm.

    Returns:
        Output: Configuration of the arm's run.
    """
    from cbtm.comparison import Arm, Comparison
    from cbtm.process import stage_process

    with stage_process():
        made = Comparison.parse(config).arm_config(Arm.parse(arm))
    return made.model_dump_json(exclude_defaults=True)


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def compare_arms(
    config: str,
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Put the results of all arms side by side.

    Args:
        config: The comparison's configuration, YAML or JSON text.
        manifest: Manifest of comparison.json and comparison.html.
        report: The report, for the Kubeflow UI.
        summary: The table, for the Kubeflow UI.
        metrics: Perplexity of each arm.
    """
    from cbtm import storage
    from cbtm.comparison import COMPARISON_REPORT_FILE, Comparison
    from cbtm.merge.arms_report import comparison_markdown
    from cbtm.process import stage_process
    from cbtm.stages import comparison as stage

    with stage_process():
        comparison = Comparison.parse(config)
        made = stage.compare(comparison)
        page = storage.read_bytes(comparison.shared.uri(COMPARISON_REPORT_FILE))
        text = comparison_markdown(stage.result(comparison))
    made.save(manifest.path)
    with open(report.path, "wb") as file:
        file.write(page)
    with open(summary.path, "w", encoding="utf-8") as file:
        file.write(text)
    for name, value in made.facts.items():
        metrics.log_metric(name, value)
