"""A root that holds runs of several settings, one after the other: each has runs of its own in the tracker."""

from pathlib import Path

from mlflow import MlflowClient
from small import settings, write_config, write_corpus

from cbtm.run import Run
from cbtm.run_config import load_config
from cbtm.stages.tracked import child, open_parent, replay_all


def evaluated(config: Path, temperature: float, perplexity: float) -> Run:
    run = Run(load_config(config, [f"evaluate.temperatures=[{temperature}]"]))
    run.make_plan()
    open_parent(run)
    with child(run, "ensemble", "ensemble") as tracker:
        tracker.log_params({"temperature": temperature})
        tracker.log_metrics({"eval/perplexity": perplexity}, 20)
    return run


def test_another_evaluation_in_one_root_has_runs_of_its_own(tmp_path):
    corpus, uri = write_corpus(tmp_path / "corpus"), f"sqlite:///{tmp_path}/mlflow.db"
    config = write_config(tmp_path / "run.yaml", settings(str(corpus), str(tmp_path / "run"), uri))
    first, second = evaluated(config, 0.1, 30.0), evaluated(config, 0.5, 40.0)
    assert first.key != second.key
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("cbtm")
    found = client.search_runs([experiment.experiment_id], "tags.`cbtm.kind` = 'ensemble'")
    assert {run.data.params["cbtm.temperature"]: run.data.metrics["eval/perplexity"] for run in found} == {
        "0.1": 30.0,
        "0.5": 40.0,
    }
    for run in found:
        assert len(client.get_metric_history(run.info.run_id, "eval/perplexity")) == 1
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert run.data.tags["cbtm.run_key"] == f"{parent.data.tags['cbtm.run_key']}/ensemble"
    # All journals of the root are looked through: nothing is left to be sent.
    report = replay_all(second)
    assert (report.journals, report.records_left) == (4, 0)
