"""The servers of deploy/ as it starts them: same programs, arguments and variables, on this machine.

Paths and ports alone differ, because nothing here has a file system or a network of its own.
"""

import os

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from deployment import SECRET, container, overlay
from servers import status

from cbtm import storage
from cbtm.errors import StorageError
from cbtm.tracking import TrackingConfig, open_run

pytestmark = pytest.mark.slow  # MLflow takes 10 to 25 s to start

NAMESPACE = "team-a"  # as the fixture mlflow_server has it


def test_the_store_takes_the_key_of_the_secret_and_makes_the_bucket(as_a_pod, tmp_path):
    storage.check_writable("s3://cbtm/runs/first")
    (tmp_path / "large").write_bytes(os.urandom(70 << 20))  # more than one part
    storage.upload(tmp_path, "s3://cbtm/runs/first", ["large"])
    storage.download("s3://cbtm/runs/first", tmp_path / "back", ["large"])
    assert storage.sha256_file(tmp_path / "back/large") == storage.sha256_file(tmp_path / "large")
    storage.delete("s3://cbtm/runs/first", ["large"])
    assert storage.list_files("s3://cbtm/runs/first") == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "the secret is wrong; check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "nobody", "the access key is unknown to the store; check AWS_ACCESS_KEY_ID"),
    ],
)
def test_the_store_refuses_another_key(as_a_pod, variable, value, message):
    as_a_pod.setenv(variable, value)
    with pytest.raises(StorageError, match=message):
        storage.check_writable("s3://cbtm/runs/first")


def test_the_store_refuses_who_has_no_key(as_a_pod, store):
    anonymous = boto3.client("s3", endpoint_url=store, config=Config(signature_version=UNSIGNED))
    for request in (anonymous.list_buckets, lambda: anonymous.put_object(Bucket="cbtm", Key="x", Body=b"x")):
        with pytest.raises(ClientError) as refused:
            request()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


SERVED = ["mlflow", f"mlflow.{NAMESPACE}", f"mlflow.{NAMESPACE}.svc", f"mlflow.{NAMESPACE}.svc.cluster.local"]


@pytest.mark.parametrize("host", [*SERVED, "localhost", "127.0.0.1"])
def test_mlflow_answers_to_its_names_in_the_cluster_and_to_a_forwarded_port(mlflow_server, host):
    assert status(f"{mlflow_server}/version", {"Host": f"{host}:5000"}) == 200
    assert status(f"{mlflow_server}/", {"Host": f"{host}:5000"}) == 200
    if host != "127.0.0.1":
        assert status(f"{mlflow_server}/", {"Host": host}) == 200


@pytest.mark.parametrize("host", ["mlflow.example.com", "mlflow.team-b:5000", "evil.example.com:5000"])
def test_mlflow_refuses_other_names(mlflow_server, host):
    assert status(f"{mlflow_server}/", {"Host": host}) == 403


def test_a_kubelet_may_ask_for_health_by_the_address_of_the_pod(mlflow_server):
    assert status(f"{mlflow_server}/health", {"Host": "10.1.2.3:5000"}) == 200


def test_an_artifact_of_a_run_lies_in_the_bucket(mlflow_server, as_a_pod, tmp_path):
    (tmp_path / "of-this-test.html").write_text("<p>figures</p>")
    tracker = open_run(
        TrackingConfig(uri=mlflow_server),
        name="ensemble",
        kind="ensemble",
        run_key="key",
        journal=tmp_path / "journal.jsonl",
    )
    tracker.log_artifact(tmp_path / "of-this-test.html")
    tracker.close()
    paths = [file.path for file in storage.list_files("s3://cbtm/mlflow")]
    (stored,) = [path for path in paths if path.endswith("/of-this-test.html")]
    assert storage.read_bytes(f"s3://cbtm/mlflow/{stored}") == b"<p>figures</p>"


def test_the_servers_hold_no_secret_in_their_arguments(filled):
    manifests = overlay("development", filled)
    for name in ("mlflow", "seaweedfs"):
        assert not any(SECRET in word for word in container(manifests, name)["args"])
