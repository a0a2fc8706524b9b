"""Whose run it is: the one that Kubeflow's MLflow plugin gave a pod, one below a given run, or one of its own."""

import itertools
import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run

from cbtm.errors import ConfigError
from cbtm.tracking import TrackingConfig, finish_parent_run, injected, open_run, start_parent_run

LOSS, PARENT = "train/loss", "mlflow.parentRunId"
_journals = itertools.count()


class Plugin:
    """What the plugin does: a run for the pipeline run, a nested one for each task, and the end of both."""

    def __init__(self, config: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        assert config.uri is not None
        self.client = MlflowClient(config.uri)
        self.experiment = self.client.create_experiment("kubeflow")
        self.pipeline_run = self.client.create_run(self.experiment, run_name="cbtm run").info.run_id
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", config.uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", self.experiment)

    def task(self, name: str) -> str:
        """Make the run of a task, and this process its pod."""
        run_id: str = self.client.create_run(
            self.experiment, run_name=name, tags={PARENT: self.pipeline_run}
        ).info.run_id
        self.pod(run_id)
        return run_id

    def pod(self, run_id: str) -> None:
        """Make this process a pod of a task that has its run already."""
        self._monkeypatch.setattr(injected, "_taken_here", {})  # a process of its own
        self._monkeypatch.setenv("MLFLOW_RUN_ID", run_id)

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """End a task's run: inputs as JSON, metrics, the status."""
        parameters = [Param("config", '"{}"'), Param("member", '"cluster-00003"')]
        self.client.log_batch(run_id, metrics=[Metric("perplexity", 7.0, 1, 0)], params=parameters)
        self.client.set_terminated(run_id, status)

    def run(self, run_id: str) -> Run:
        return self.client.get_run(run_id)

    def runs(self) -> list[Run]:
        return list(self.client.search_runs([self.experiment]))


@pytest.fixture
def plugin(local: TrackingConfig, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    return Plugin(local, monkeypatch)


def train(config: TrackingConfig, folder: Path, steps: range, *, own: bool = True, status: str = "FINISHED") -> None:
    """One life of an expert's stage, in a pod that has no journal of an earlier one."""
    journal = folder / f"pod-{next(_journals)}.jsonl"
    tracker = open_run(
        config,
        name="small/cluster-00003",
        kind="expert",
        run_key="key/cluster-00003",
        parent_run_key="key",
        journal=journal,
        cluster=3,
        take_injected=own,
    )
    tracker.log_params({"member": "cluster-00003", "config": "c-BTM"})
    for step in steps:
        tracker.log_metrics({LOSS: float(step)}, step)
    tracker.close(status)


def points(client: MlflowClient, run_id: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, LOSS))


# --- injected ---


def test_the_run_of_a_pod_is_gone_on_with_and_its_end_is_left_to_the_plugin(local, tmp_path, plugin):
    run_id = plugin.task("train-expert")
    train(local, tmp_path, range(3))
    run = plugin.run(run_id)
    assert run.info.status == "RUNNING"
    assert points(plugin.client, run_id) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert (run.data.tags["cbtm.kind"], run.data.tags["cbtm.cluster"]) == ("expert", "3")
    assert run.data.tags[PARENT] == plugin.pipeline_run
    assert run.info.run_name == "train-expert"  # the plugin's name
    assert len(plugin.runs()) == 2
    plugin.end(run_id)
    assert plugin.run(run_id).info.status == "FINISHED"
    assert plugin.client.get_experiment_by_name("cbtm") is None


def test_parameters_of_the_plugin_and_ours_have_different_names(local, tmp_path, plugin):
    # A parameter that is logged again with another value rejects the whole batch, metrics included.
    run_id = plugin.task("train-expert")
    train(local, tmp_path, range(1))
    plugin.end(run_id)
    run = plugin.run(run_id)
    assert run.data.params == {
        "cbtm.member": "cluster-00003", "cbtm.config": "c-BTM", "config": '"{}"', "member": '"cluster-00003"',
    }  # fmt: skip
    assert run.data.metrics["perplexity"] == 7.0


def test_a_failed_pod_leaves_the_status_to_the_plugin(local, tmp_path, plugin):
    run_id = plugin.task("train-expert")
    train(local, tmp_path, range(2), status="FAILED")
    assert plugin.run(run_id).info.status == "RUNNING"


def test_a_retried_pod_goes_on_in_its_run_and_makes_no_second(local, tmp_path, plugin):
    run_id = plugin.task("train-expert")
    train(local, tmp_path, range(4), status="KILLED")
    plugin.pod(run_id)
    train(local, tmp_path, range(2, 6))
    assert points(plugin.client, run_id) == [(step, float(step)) for step in range(6)]
    assert len(plugin.runs()) == 2


def test_a_task_that_is_submitted_again_passes_its_key_to_the_new_run(local, tmp_path, plugin):
    first = plugin.task("train-expert")
    train(local, tmp_path, range(2))
    plugin.end(first, "FAILED")
    second = plugin.task("train-expert")
    train(local, tmp_path, range(2, 4))
    assert "cbtm.run_key" not in plugin.run(first).data.tags
    assert plugin.run(first).data.tags["cbtm.superseded_by"] == second
    assert points(plugin.client, first) == [(0, 0.0), (1, 1.0)]
    assert plugin.run(second).data.tags["cbtm.run_key"] == "key/cluster-00003"
    # The evaluation, in a pod of its own, finds the latest.
    plugin.task("evaluate-ensembles")
    train(local, tmp_path, range(9, 10), own=False)
    assert (9, 9.0) in points(plugin.client, second)


def test_another_pod_adds_to_an_ended_run_and_does_not_open_it_again(local, tmp_path, plugin):
    run_id = plugin.task("train-expert")
    train(local, tmp_path, range(2))
    plugin.end(run_id)
    ended = plugin.run(run_id).info.end_time
    own = plugin.task("evaluate-ensembles")
    train(local, tmp_path, range(2, 3), own=False)
    assert points(plugin.client, run_id)[-1] == (2, 2.0)
    assert (plugin.run(run_id).info.status, plugin.run(run_id).info.end_time) == ("FINISHED", ended)
    assert points(plugin.client, own) == []


def test_the_parent_is_the_run_of_the_pipeline_and_is_ended_by_the_plugin(local, tmp_path, plugin):
    task = plugin.task("plan-run")
    options = {"name": "small", "run_key": "key", "take_injected": True, "params": {"n_clusters": 4}}
    assert start_parent_run(local, journal=tmp_path / "plan.jsonl", **options) == plugin.pipeline_run
    parent = plugin.run(plugin.pipeline_run)
    assert parent.data.params == {"cbtm.n_clusters": "4"}
    assert "cbtm.kind" not in plugin.run(task).data.tags

    plugin.task("evaluate-ensembles")
    own = {"kind": "ensemble", "parent_run_key": "key"}
    open_run(local, name="top", run_key="key/top", journal=tmp_path / "top.jsonl", **own).close()
    finish_parent_run(local, name="small", run_key="key", journal=tmp_path / "end.jsonl")
    assert plugin.run(plugin.pipeline_run).info.status == "RUNNING"
    [made] = [run for run in plugin.runs() if run.info.run_name == "top"]
    assert (made.data.tags[PARENT], made.info.status) == (plugin.pipeline_run, "FINISHED")


def test_a_pod_has_one_run_and_the_first_work_that_asks_gets_it(local, tmp_path, plugin):
    run_id = plugin.task("by-hand")
    train(local, tmp_path, range(1))
    options = {"name": "dense", "kind": "dense", "run_key": "key/dense", "take_injected": True}
    open_run(local, journal=tmp_path / "dense.jsonl", **options).close()
    assert plugin.run(run_id).data.tags["cbtm.kind"] == "expert"
    assert {run.data.tags.get("cbtm.kind") for run in plugin.runs()} == {None, "expert", "dense"}


def test_a_run_that_the_server_does_not_have_is_replaced_with_a_warning(local, tmp_path, plugin, caplog):
    plugin.pod("0" * 32)
    train(local, tmp_path, range(1))
    [made] = [run for run in plugin.runs() if "cbtm.kind" in run.data.tags]
    assert made.info.status == "FINISHED"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("which this pod was given, is not on" in warning for warning in warnings)


def test_outside_of_kubernetes_somebody_elses_run_is_left_alone(local, tmp_path, plugin, monkeypatch):
    run_id = plugin.task("a notebook's")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    train(local, tmp_path, range(1))
    assert "cbtm.kind" not in plugin.run(run_id).data.tags


def test_tracking_that_goes_to_another_server_takes_no_run_of_the_plugin(local, tmp_path, plugin, monkeypatch):
    run_id = plugin.task("train-expert")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://plugin:5000")
    train(local, tmp_path, range(1))
    assert "cbtm.kind" not in plugin.run(run_id).data.tags


# --- given, and neither ---


@pytest.mark.parametrize("by", ["configuration", "environment"])
def test_a_given_parent_makes_a_child(local, tmp_path, monkeypatch, by):
    client = MlflowClient(local.uri)
    sweep = client.create_run(client.create_experiment("cbtm"), run_name="sweep").info.run_id
    if by == "configuration":
        local = local.model_copy(update={"parent_run_id": sweep})
    else:
        monkeypatch.setenv("CBTM_TRACKING_PARENT_RUN_ID", sweep)
    run_id = start_parent_run(local, name="small", run_key="key", journal=tmp_path / "parent.jsonl")
    train(local, tmp_path, range(1))
    finish_parent_run(local, name="small", run_key="key", journal=tmp_path / "parent.jsonl")
    run = client.get_run(run_id)
    assert (run.data.tags[PARENT], run.info.status) == (sweep, "FINISHED")
    [expert] = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
    assert expert.data.tags["cbtm.kind"] == "expert"
    assert client.get_run(sweep).info.status == "RUNNING"


def test_without_either_a_run_stands_by_itself(local, tmp_path):
    run_id = start_parent_run(local, name="small", run_key="key", journal=tmp_path / "parent.jsonl", take_injected=True)
    assert PARENT not in MlflowClient(local.uri).get_run(run_id).data.tags


# --- credentials ---


def test_credentials_of_one_server_are_not_sent_to_another(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hunter2@plugin.example.com")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-the-pod")
    config = TrackingConfig(uri="https://elsewhere.example.com")
    with pytest.raises(ConfigError) as error:
        train(config, tmp_path, range(1))
    assert "MLFLOW_TRACKING_URI=https://plugin.example.com and MLFLOW_TRACKING_TOKEN are for another server" in str(
        error.value
    )
    assert "hunter2" not in str(error.value)
    assert "token-of-the-pod" not in str(error.value)


def test_credentials_without_an_address_are_for_the_configured_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    TrackingConfig(uri="https://mlflow.example.com").check_credentials()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com/")
    TrackingConfig(uri="https://mlflow.example.com").check_credentials()
