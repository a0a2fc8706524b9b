"""Commands for a cluster, against a server that answers as the API of Kubeflow Pipelines does."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_server import KubeflowServer, item, kubeflow_server, node, pod_tasks, self_signed, task
from pipeline_files import PipelineFile
from small import settings, write_config
from typer.testing import CliRunner

from cbtm import cli
from cbtm.errors import ConfigError
from cbtm.kubeflow import following
from cbtm.kubeflow.api import Kubeflow, KubeflowError, UnreachableError
from cbtm.kubeflow.following import RunFailedError, follow

ROOT = "s3://bucket/run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubeflowServer]:
    for name in ("KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT", "CBTM_KFP_TOKEN", "CBTM_KFP_COOKIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp reads a context from there
    monkeypatch.setattr(following, "_POLL_SECONDS", 0.01)
    with kubeflow_server() as running:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", running.host)
        yield running


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "run.yaml", settings("s3://bucket/corpus", ROOT, "http://mlflow:5000")))


def cbtm(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


def submitted(server: KubeflowServer) -> dict[str, Any]:
    [run] = server.runs.values()
    return run.runtime_config.parameters


# --- compile ---


def test_compile_writes_the_pipeline_with_its_options(tmp_path):
    digests = tmp_path / "digests.json"
    digests.write_text(json.dumps({"cpu": "sha256:" + "1" * 64, "gpu": "sha256:" + "2" * 64}))
    file = tmp_path / "pipeline.yaml"
    said = cbtm(
        *("compile", "--output", str(file), "--cpu-image", "mirror:5000/cbtm/cpu:1", "--image-digests", str(digests)),
        *("--parallelism", "2", "--shm-size", "1Gi", "--queue", "gpus"),
    )
    assert f"cpu-image=mirror:5000/cbtm/cpu@sha256:{'1' * 64}" in said
    compiled = PipelineFile.read(file)
    train = compiled.leaves()["experts/for-loop-1/train-expert"]
    assert compiled.container(train)["image"].endswith(f"cbtm-python-cuda@sha256:{'2' * 64}")
    assert compiled.kubernetes(train)["emptyDirMounts"][0]["sizeLimit"] == "1Gi"
    assert compiled.kubernetes(train)["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert [place.task["iteratorPolicy"] for place in compiled.places() if "parameterIterator" in place.task] == [
        {"parallelismLimit": 2}
    ] * 2


# --- submit ---


def test_submit_sends_both_documents_and_the_checked_configuration(server, config):
    said = cbtm("submit", config, "--set", "train.devices=2", "--service-account", "trainer", "--queue", "gpus")
    assert said == f"run=run-1 url={server.host}/#/runs/details/run-1\n"
    run = server.runs["run-1"]
    assert (run.display_name, run.service_account) == ("small", "trainer")
    assert set(run.pipeline_spec) == {"pipeline_spec", "platform_spec"}
    executors = run.pipeline_spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-plan-run"]["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}
    assert [one.display_name for one in server.experiments] == ["cbtm"]
    parameters = submitted(server)
    assert json.loads(parameters["config"])["train"]["devices"] == 2
    assert parameters["gpu_count"] == "2"  # as many as a model is trained on, and text


def test_parameters_come_from_a_file_and_from_the_command_line_which_goes_before(server, config, tmp_path):
    file = tmp_path / "params.yaml"
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    file.write_text(
        yaml.safe_dump({"gpu_count": 4, "cpu_limit": 8, "gpu_tolerations": tolerations, "root": "s3://x/y"})
    )
    cbtm(
        *("submit", config, "--params", str(file), "--param", "cpu_limit=500m"),
        *("--param", 'node_selector={"pool": "cheap"}', "--param", "price_per_hour=2.5"),
    )
    parameters = submitted(server)
    del parameters["config"]
    assert parameters == {
        "gpu_count": "4",
        "cpu_limit": "500m",
        "gpu_tolerations": tolerations,
        "root": "s3://x/y",
        "node_selector": {"pool": "cheap"},
        "price_per_hour": "2.5",
    }


def test_a_second_run_goes_into_the_experiment_that_is_there(server, config):
    cbtm("submit", config, "--experiment", "papers")
    cbtm("submit", config, "--experiment", "papers", "--name", "again")
    assert [one.display_name for one in server.experiments] == ["papers"]
    assert server.runs["run-2"].display_name == "again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--param", "gpu_cont=2"], "parameter 'gpu_cont' is not known; did you mean 'gpu_count'?"),
        (["--param", "cpu_limit=8 cores"], "cpu_limit='8 cores' is no quantity of Kubernetes"),
        (["--param", "gpu_tolerations=yes"], "gpu_tolerations=True is to be a list, as JSON or YAML"),
        (["--param", "root"], "--param 'root': expected name=value"),
        (["--param", "config=x"], "config is no parameter of its own here"),
        (["--set", "root=runs/mine"], "root=runs/mine is a folder, and the pods of a cluster share none"),
        (
            ["--set", "train.devices=2", "--param", "gpu_count=1"],
            "gpu_count=1, but the configuration trains a model on 2",
        ),
        (["--param", 'overrides=["train.stps=7"]'], "unknown key 'train.stps'; did you mean 'steps'?"),
        (["--pipeline", "nowhere.yaml"], "--pipeline nowhere.yaml cannot be read"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_before_anything_is_sent(server, config, arguments, message):
    with pytest.raises(ConfigError) as error:
        cbtm("submit", config, *arguments)
    assert message in str(error.value)
    assert server.runs == {}


def test_a_training_on_several_machines_asks_for_the_gpu_that_its_models_are_scored_on(server, config):
    # Eight devices on each of two machines are those of a TrainJob, and none of the pipeline's own pods.
    cbtm("submit", config, "--set", "train.devices=8", "--set", "train.nodes=2", "--set", "train.sequences_per_step=64")
    assert submitted(server)["gpu_count"] == "1"


def test_a_training_on_processors_asks_for_no_gpu(server, config):
    cbtm("submit", config, "--set", "train.device=cpu", "--set", "seed_model.training.device=cpu")
    assert submitted(server)["gpu_count"] == "0"


# --- what answers, or does not ---


def test_a_host_that_is_away_is_said_at_once_with_a_way_to_reach_it(config):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UnreachableError) as error:
            cbtm("submit", config, "--host", host)
    assert f"Kubeflow Pipelines at {host} does not answer (Connection refused)" in str(error.value).replace(
        "[Errno 111] ", ""
    )
    assert "kubectl port-forward -n kubeflow svc/ml-pipeline-ui" in str(error.value)


def test_a_host_without_a_scheme_is_refused(config):
    with pytest.raises(ConfigError, match="--host kubeflow:8080 has no scheme; write it as https://kubeflow:8080"):
        cbtm("submit", config, "--host", "kubeflow:8080")


def test_a_server_that_is_not_kubeflow_pipelines_is_told_from_one_that_is(server, config):
    with pytest.raises(KubeflowError, match=r"/pipelin is not the address of Kubeflow Pipelines \(404\)"):
        cbtm("submit", config, "--host", f"{server.host}/pipelin")
    server.login_page = True
    with pytest.raises(KubeflowError, match=r"answers with a page, probably one to log in; set CBTM_KFP_COOKIES"):
        cbtm("submit", config)


def test_a_token_of_the_environment_is_sent_and_shown_nowhere(server, config, monkeypatch):
    server.token = "secret-token"
    with pytest.raises(KubeflowError) as error:
        cbtm("submit", config)
    assert "refuses the credentials (401 Request header error: no valid token); set CBTM_KFP_TOKEN" in str(error.value)
    monkeypatch.setenv("CBTM_KFP_TOKEN", "wrong-token")
    with pytest.raises(KubeflowError) as error:
        cbtm("submit", config)
    assert "wrong-token" not in str(error.value)
    monkeypatch.setenv("CBTM_KFP_TOKEN", "secret-token")
    assert "secret-token" not in cbtm("submit", config)


def test_an_installation_of_many_users_needs_a_namespace_that_one_may_use(server, config):
    server.multi_user, server.allowed_namespaces = True, {"team-a"}
    with pytest.raises(ConfigError, match="has many users, each with a namespace; give yours with --namespace"):
        cbtm("submit", config)
    with pytest.raises(KubeflowError, match=r"does not allow this for namespace team-b .*; check --namespace"):
        cbtm("submit", config, "--namespace", "team-b")
    cbtm("submit", config, "--namespace", "team-a")
    assert server.experiments[0].namespace == "team-a"


def test_a_certificate_is_verified_and_an_authority_of_ones_own_can_be_given(config, tmp_path):
    certificate, key = self_signed(tmp_path)
    with kubeflow_server((certificate, key)) as secure:
        with pytest.raises(KubeflowError, match=r"is not trusted \(.*\); give the file .* with --ca-cert"):
            cbtm("submit", config, "--host", secure.host)
        assert "run=run-1" in cbtm("submit", config, "--host", secure.host, "--ca-cert", str(certificate))


@pytest.mark.parametrize("command", ["status", "retry", "logs"])
def test_an_unknown_run_is_named(server, command):
    more = ["--task", "plan-run"] if command == "logs" else []
    with pytest.raises(KubeflowError, match=r"knows no run 17 \(404 Failed to get a run.*\); check the id"):
        cbtm(command, "17", *more)


# --- following ---

PLANNED = pod_tasks("root.plan-run", "SUCCEEDED")
TRAINING = [one for number in range(5) for one in pod_tasks(f"{item('experts', number)}.train-expert", "RUNNING")]
TRAINED = [one for number in range(5) for one in pod_tasks(f"{item('experts', number)}.train-expert", "SUCCEEDED")]
FAILED = [
    *PLANNED,
    *pod_tasks(f"{item('experts', 0)}.train-expert", "SUCCEEDED"),
    *pod_tasks(f"{item('experts', 2)}.train-expert", "FAILED", attempts=4, error="main: Error (exit code 2)"),
    task("root.evaluate-ensembles", None),
]


def test_wait_shows_what_changes_until_the_run_succeeds(server, config, caplog):
    server.stages = [("RUNNING", PLANNED)] * 2 + [("RUNNING", PLANNED + TRAINING), ("SUCCEEDED", PLANNED + TRAINED)]
    with caplog.at_level(logging.INFO, "cbtm"):
        said = cbtm("submit", config, "--wait")
    assert said.splitlines()[-1] == "run=run-1 succeeded"
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("cbtm")]
    assert lines == ["task=plan-run succeeded=1", "task=train-expert running=5", "task=train-expert succeeded=5"]


def test_a_run_that_fails_says_which_task_and_how_to_go_on(server, config):
    server.stages = [("FAILED", FAILED)]
    with pytest.raises(RunFailedError) as error:
        cbtm("submit", config, "--wait")
    assert str(error.value) == (
        "run run-1 failed: train-expert: main: Error (exit code 2); cbtm logs run-1 shows what a task wrote, "
        "cbtm retry run-1 goes on from there"
    )
    assert error.value.exit_code == 1


def test_a_server_that_restarts_meanwhile_ends_nothing(server, config, monkeypatch):
    cbtm("submit", config)
    server.stages = [("SUCCEEDED", PLANNED)]
    kubeflow, answers = Kubeflow(None), iter([True, True, False])
    whole = kubeflow.run

    def sometimes(run_id: str) -> Any:
        if next(answers):
            raise UnreachableError("away")
        return whole(run_id)

    monkeypatch.setattr(kubeflow, "run", sometimes)
    assert follow(kubeflow, "run-1").state == "SUCCEEDED"
    monkeypatch.setattr(following, "_PATIENCE_SECONDS", -1.0)
    answers = iter([True])
    with pytest.raises(UnreachableError):
        follow(kubeflow, "run-1")


# --- status, logs, retry ---


def test_status_lists_the_tasks_and_what_failed_ones_say(server, config):
    cbtm("submit", config)
    server.stages = [("FAILED", FAILED)]
    lines = cbtm("status", "run-1").splitlines()
    assert lines[0] == f"run=run-1 name=small state=FAILED url={server.host}/#/runs/details/run-1"
    assert "plan-run succeeded (0:05:00)" in lines
    at = next(number for number, line in enumerate(lines) if line.startswith("train-expert"))
    assert lines[at : at + 2] == ["train-expert 1 of 5 succeeded, 1 failed (0:05:00)", "  main: Error (exit code 2)"]
    assert lines[-1] == "evaluate-ensembles omitted"


def test_logs_of_a_cluster_are_those_of_its_own_pods_try_after_try(server, config):
    cbtm("submit", config)
    server.stages = [("FAILED", FAILED)]
    path = f"{item('experts', 2)}.train-expert"  # dense, cluster 0, cluster 1
    for attempt in (0, 3):
        workflow, number = node(f"{path}.executor({attempt})").rsplit("-", 1)
        server.logs[f"{workflow}-retry-system-container-impl-{number}"] = f"step=5\nerror: try {attempt}\n"
    said = cbtm("logs", "run-1", "--cluster", "1").splitlines()
    assert [line for line in said if line.startswith(("step", "error"))] == [
        "step=5", "error: try 0", "step=5", "error: try 3",
    ]  # fmt: skip
    # Of the tries between the pods are gone, and with them what they wrote.
    gone = [line for line in said if "the server has no log of it" in line]
    number = node(f"{path}.executor(1)").rsplit("-", 1)[1]
    assert len(gone) == 2
    assert f"kubectl logs cbtm-x7k2p-retry-system-container-impl-{number} -c main" in gone[0]


def test_logs_of_pods_in_a_queue_are_found_under_their_other_name(server, config):
    cbtm("submit", config, "--queue", "gpus")
    server.stages = [("RUNNING", PLANNED)]
    workflow, number = node("root.plan-run.executor(0)").rsplit("-", 1)
    server.logs[f"{workflow}-metadata-0-1-retry-system-container-impl-{number}"] = "groups=3"
    assert "groups=3" in cbtm("logs", "run-1", "--task", "plan-run")


def test_logs_of_what_has_not_begun_name_the_pods_that_there_are(server, config):
    cbtm("submit", config)
    server.stages = [("RUNNING", PLANNED)]
    said = cbtm("logs", "run-1", "--cluster", "0", "--namespace", "team-a", exit_code=1)
    assert (
        "no pod was started for it yet; all pods of the run: kubectl -n team-a get pods -l pipeline/runid=run-1" in said
    )


def test_logs_want_to_know_of_which_task(server):
    with pytest.raises(ConfigError, match="give one of --cluster 3, --member dense and --task plan-run"):
        cbtm("logs", "run-1", "--cluster", "0", "--member", "dense")


def test_retry_is_for_runs_that_failed(server, config):
    cbtm("submit", config)
    server.stages = [("RUNNING", PLANNED)]
    with pytest.raises(ConfigError, match="run run-1 is running; only a run that failed or was cancelled is retried"):
        cbtm("retry", "run-1")
    server.stages = [("FAILED", FAILED), ("SUCCEEDED", PLANNED + TRAINED)]
    assert "run=run-1 is tried again\nrun=run-1 succeeded" in cbtm("retry", "run-1", "--wait")
    assert server.retried == ["run-1"]
