"""Component: compare every ensemble of a run."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CPU, install_kfp_package=False)
def evaluate_ensembles(
    config: str,
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Mix the experts by the context of each token, in every setting, and report.

    Args:
        config: The run's configuration, YAML or JSON text.
        manifest: Manifest of result.json and report.html.
        report: The report, for the Kubeflow UI.
        summary: The comparison in a few lines, for the Kubeflow UI.
        metrics: Perplexities of the seed, dense and random-cluster models and of the chosen ensemble.
    """
    from cbtm import stages, storage
    from cbtm.merge.summary import render_summary
    from cbtm.process import stage_process
    from cbtm.run import REPORT_FILE, Run

    with stage_process():
        run = Run.parse(config)
        made = stages.evaluate(run)
        page, text = storage.read_bytes(run.uri(REPORT_FILE)), render_summary(run.result())
    made.save(manifest.path)
    with open(report.path, "wb") as file:
        file.write(page)
    with open(summary.path, "w", encoding="utf-8") as file:
        file.write(text)
    for name, value in made.facts.items():
        metrics.log_metric(name, value)
