"""What a pod says of itself before a run: with a real bucket, servers that answer as MLflow does, and no GPU."""

import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from small import settings

import cbtm
from cbtm.errors import ConfigError
from cbtm.run_config import PlaceOverrides, parse_config
from cbtm.stages import check_cluster, check_gpus
from cbtm.stages.readiness import NotReadyError

HERE = cbtm.__version__
NOTHING = PlaceOverrides()


def config(root: str, tracking: str | None = None, **train: Any) -> str:
    values = settings("s3://texts/corpus", root, tracking)
    values["train"] |= train
    return yaml.safe_dump(values)


@pytest.fixture
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request alike."""

    status, body = 404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no experiment"})

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self.body.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def mlflow_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a server that answers with the status and text of the parameter."""
    status, body = getattr(request, "param", (Answer.status, Answer.body))
    handler = type("Handler", (Answer,), {"status": status, "body": body})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_cluster_that_is_ready_gives_the_configuration_of_the_place(bucket, mlflow_server, in_a_pod):
    place = PlaceOverrides(
        root=f"{bucket}/here", tracking_uri=mlflow_server, price_per_hour="2.5", more=("train.steps=7",)
    )
    text = config("runs/elsewhere", "sqlite:///runs/mlflow.db")
    checked = check_cluster(text, place, compiled_by=HERE)
    assert (checked.root, checked.tracking.uri) == (f"{bucket}/here", mlflow_server)
    assert (checked.train.price_per_hour, checked.seed_model.training.price_per_hour) == (2.5, 2.5)
    assert checked.train.steps == 7
    assert parse_config(checked.model_dump_json(exclude_defaults=True)) == checked  # as the other tasks get it


def test_all_that_is_wrong_is_said_at_once(s3_settings, bucket, in_a_pod):
    s3_settings.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(NotReadyError) as error:
            check_cluster(config("s3://no-such-bucket-9f2c/run", away), NOTHING, compiled_by="0.0.9")
    message = str(error.value)
    assert message.startswith("not ready, 3 problems: (1) this image has cbtm")
    assert "the pipeline was compiled by cbtm 0.0.9" in message
    assert "(2) s3://no-such-bucket-9f2c/run" in message
    assert "the bucket is not there" in message
    assert "this pod has no AWS_SECRET_ACCESS_KEY and no role: the secret that the parameter s3_secret names" in message
    assert f"(3) tracking server {away} cannot be used" in message
    assert "testing" not in message  # the access key


def test_a_role_of_the_service_account_needs_no_secret(s3_settings, bucket, in_a_pod):
    s3_settings.delenv("AWS_ACCESS_KEY_ID")
    s3_settings.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/token")
    with pytest.raises(NotReadyError) as error:
        check_cluster(config("s3://no-such-bucket-9f2c/run"), NOTHING, compiled_by=HERE)
    assert "s3_secret" not in str(error.value)


def test_a_configuration_that_is_wrong_is_said_with_the_image_that_is(tmp_path):
    with pytest.raises(NotReadyError, match=r"\(1\) this image has .* \(2\) config: 'root' is missing"):
        check_cluster("corpus: {root: a}\nseed_model: {path: b}", NOTHING, compiled_by="0.0.9")


def test_overrides_of_the_pipeline_are_named_as_such():
    with pytest.raises(NotReadyError, match=r"overrides 'train': expected section\.key=value"):
        check_cluster(config("runs/x"), PlaceOverrides(more=("train",)), compiled_by=HERE)


def test_run_that_is_extended_is_no_folder_of_a_pod(bucket, in_a_pod):
    values = yaml.safe_load(config(f"{bucket}/runs/nine")) | {"extends": "runs/eight"}
    values["train"]["random_clusters"] = False
    with pytest.raises(NotReadyError, match="extends=runs/eight is a folder of this pod; give the s3:// prefix"):
        check_cluster(yaml.safe_dump(values), NOTHING, compiled_by=HERE)


def test_files_of_a_pod_are_no_place_for_results_or_tracking(in_a_pod):
    with pytest.raises(NotReadyError) as error:
        check_cluster(config("runs/mine", "sqlite:///runs/mlflow.db"), NOTHING, compiled_by=HERE)
    assert "root=runs/mine is a folder of this pod, and every task has a pod of its own" in str(error.value)
    assert "tracking goes to a file of this pod, which is lost with it" in str(error.value)


def test_on_a_machine_of_ones_own_files_are_what_is_meant(tmp_path):
    database = tmp_path / "mlflow.db"
    checked = check_cluster(config(str(tmp_path / "run"), f"sqlite:///{database}"), NOTHING, compiled_by=HERE)
    assert checked.root == str(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []  # the probe is removed
    assert not database.exists()  # it takes seconds to make, and the first run makes it


@pytest.mark.parametrize(
    ("mlflow_server", "advice"),
    [
        ((401, "You are not authenticated"), "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the secret"),
        ((403, "Invalid Host header - possible DNS rebinding attack detected"), "--allowed-hosts that names the host"),
        ((500, "database is locked"), "check the address, or set tracking.enabled=false"),
    ],
    indirect=["mlflow_server"],
    ids=["401", "403", "500"],
)
def test_what_the_tracking_server_says_is_told_with_what_to_do(bucket, mlflow_server, advice):
    with pytest.raises(NotReadyError) as error:
        check_cluster(config(f"{bucket}/run", mlflow_server), NOTHING, compiled_by=HERE)
    assert advice in str(error.value)


def test_credentials_in_an_address_are_refused_and_not_repeated(bucket):
    place = PlaceOverrides(tracking_uri="http://me:hunter2@mlflow:5000")
    with pytest.raises(NotReadyError) as error:
        check_cluster(config(f"{bucket}/run"), place, compiled_by=HERE)
    assert "was given with a credential in it" in str(error.value)
    assert "hunter2" not in str(error.value)


# --- pods with GPUs; this machine has none ---

torch = pytest.importorskip("torch")
# --- several machines ---

NODES = {"nodes": 2, "sequences_per_step": 8}


def test_trainjobs_are_asked_for_where_a_training_is_on_several_machines(bucket, kubernetes):
    check_cluster(config(f"{bucket}/run"), NOTHING, compiled_by=HERE)
    assert kubernetes.requests == []
    check_cluster(config(f"{bucket}/run", **NODES), NOTHING, compiled_by=HERE)
    kubernetes.has_trainer = False
    with pytest.raises(
        NotReadyError, match=r"not ready: train\.nodes above 1: cannot read TrainJob .* Kubeflow Trainer"
    ):
        check_cluster(config(f"{bucket}/run", **NODES), NOTHING, compiled_by=HERE)
    kubernetes.has_trainer, kubernetes.refuse = True, ("GET", "trainjobs")
    with pytest.raises(NotReadyError, match="give the service account the rights in deploy/trainjobs"):
        check_cluster(config(f"{bucket}/run", **NODES), NOTHING, compiled_by=HERE)


def test_task_that_has_its_machines_elsewhere_needs_no_gpus_of_its_own(bucket, in_a_pod):
    text = config(f"{bucket}/run", devices=8, nodes=2, sequences_per_step=32)
    check_gpus(text, "0", compiled_by=HERE)
    with pytest.raises(NotReadyError, match=r"train\.devices=8, but the parameter gpu_count=1"):
        check_gpus(config(f"{bucket}/run", devices=8, sequences_per_step=32), "1", compiled_by=HERE)


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_a_training_on_more_devices_than_the_pod_has_is_refused(bucket, in_a_pod):
    text = config(f"{bucket}/run", devices=2)
    with pytest.raises(NotReadyError, match=r"train\.devices=2, but the parameter gpu_count=1; make them equal"):
        check_gpus(text, "1", compiled_by=HERE)


@without_gpu
def test_gpus_that_a_pod_asks_for_and_does_not_see_are_missed(bucket, in_a_pod):
    with pytest.raises(NotReadyError, match=r"GPUs: 2 expected, 0 visible \(PyTorch .*\); check the GPU image"):
        check_gpus(config(f"{bucket}/run"), "2", compiled_by=HERE)


@without_gpu
def test_outside_of_kubernetes_gpus_are_missed_where_the_configuration_demands_them(tmp_path):
    root = str(tmp_path / "run")
    check_gpus(config(root), "2", compiled_by=HERE)  # nobody promised any: kfp.local gives what is there
    with pytest.raises(NotReadyError, match="GPUs: 1 expected, 0 visible"):
        check_gpus(config(root, device="cuda"), "0", compiled_by=HERE)


def test_more_groups_than_a_loop_holds_are_refused_on_a_cluster(bucket, in_a_pod):
    values = yaml.safe_load(config(f"{bucket}/run")) | {"assign": {"max_groups": 501}}
    with pytest.raises(NotReadyError, match=r"assign\.max_groups=501 is more than the 500 tasks that a loop"):
        check_cluster(json.dumps(values), PlaceOverrides(), compiled_by=HERE)


def test_a_compilation_without_a_compiler_is_refused(bucket, in_a_pod, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    text = config(f"{bucket}/run", compile=True)
    with pytest.raises(NotReadyError, match=r"train: compile=true needs a compiler, and g\+\+ is not on the PATH"):
        check_gpus(text, "0", compiled_by=HERE)
    with pytest.raises(NotReadyError, match="train: compile=true needs a compiler, and gcc or clang is not on"):
        check_gpus(text, "1", compiled_by=HERE)


@pytest.mark.parametrize(
    ("sees_gpus", "train", "compiler"),
    [
        (False, {}, "CXX"),
        (True, {}, "CC"),  # outside of Kubernetes nobody promises a GPU, and the trainer takes what it sees
        (True, {"device": "cpu"}, "CXX"),
        (False, {"nodes": 2}, "CC"),  # in pods of their own, which have GPUs
    ],
)
def test_the_compiler_of_the_device_that_will_be_taken_is_asked_for(bucket, monkeypatch, sees_gpus, train, compiler):
    monkeypatch.setattr("cbtm.stages.readiness._sees_gpus", lambda: sees_gpus)
    monkeypatch.setenv("PATH", "/nowhere")
    other = {"CC": "CXX", "CXX": "CC"}[compiler]
    monkeypatch.setenv(compiler, "no-such-compiler -O2")
    monkeypatch.setenv(other, f"{sys.executable} -O2")
    text = config(f"{bucket}/run", compile=True, **train)
    with pytest.raises(NotReadyError, match="and no-such-compiler is not on the PATH; install one"):
        check_gpus(text, "0", compiled_by=HERE)
    monkeypatch.setenv(compiler, f"{sys.executable} -O2")
    check_gpus(text, "0", compiled_by=HERE)


@pytest.mark.parametrize("count", ["0", ""])
def test_a_cluster_without_gpus_trains_on_processors(bucket, in_a_pod, count):
    check_gpus(config(f"{bucket}/run"), count, compiled_by=HERE)


def test_a_count_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="gpu_count='two' is no number of GPUs"):
        check_gpus(config(str(tmp_path)), "two", compiled_by=HERE)


def test_the_image_with_gpus_has_a_version_of_its_own_to_be_right(bucket, in_a_pod):
    with pytest.raises(NotReadyError, match=r"the pipeline was compiled by cbtm 0\.0\.9"):
        check_gpus(config(f"{bucket}/run"), "0", compiled_by="0.0.9")
