"""Fixtures that several tests share: an S3 server that speaks HTTP, and a root that is local or in it."""

import functools
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbtm import s3, storage

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


def _set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, Any]]:
    """URL of an S3 server (moto) on this machine, over real sockets, and the client that storage makes for it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        _set_credentials(monkeypatch)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3.client.cache_clear()
        client = s3.client(attempts=8)
        s3.client.cache_clear()
    yield f"http://{host}:{port}", client
    server.stop()


@pytest.fixture
def s3_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Credentials in the environment, for this test and its child processes; no endpoint yet, and no patience."""
    _set_credentials(monkeypatch)
    monkeypatch.setenv("CBTM_SCRATCH", str(tmp_path / "scratch"))
    s3.client.cache_clear()
    storage.be_patient(0)
    yield monkeypatch
    s3.client.cache_clear()
    storage.be_patient(0)


@pytest.fixture
def bucket(s3_server: tuple[str, Any], s3_settings: pytest.MonkeyPatch) -> str:
    """`s3://` URI of a new, empty bucket."""
    endpoint, client = s3_server
    s3_settings.setenv("AWS_ENDPOINT_URL", endpoint)
    # One client for all tests: making one takes half a second.
    s3_settings.setattr(s3, "client", functools.cache(lambda attempts: client))
    name = f"test-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to store below: a folder that is not there yet, or a prefix of a bucket."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('bucket')}/some/prefix"


@pytest.fixture
def kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A cluster with Kubeflow Trainer that KUBECONFIG leads to, as `kubernetes_server.Cluster`."""
    from kubernetes_server import Server

    server = Server(tmp_path / "kubernetes")
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    storage.be_patient(0)
    yield server.cluster
    server.close()
    storage.be_patient(0)
