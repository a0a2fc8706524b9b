"""Fixtures of the tests of deploy/: what it renders to, and its servers, started as it starts them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import container, filled_copy, overlay, variables
from servers import Server, free_ports

NAMESPACE = "team-a"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ with secrets filled in."""
    return filled_copy(tmp_path_factory.mktemp("deployment") / "deploy")


def environment(given: dict[str, str], home: Path) -> dict[str, str]:
    """Only what the manifest gives, and what finds programs."""
    return given | {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="session")
def store(filled: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the S3 store of the development overlay."""
    folder = tmp_path_factory.mktemp("store")
    manifests = overlay("development", filled)
    of = container(manifests, "seaweedfs")
    s3, *others = free_ports(4, highest=55000)  # each has a second one for gRPC, 10000 higher
    arguments = [word.replace("/data", str(folder)).replace("8333", str(s3)) for word in of["args"]]
    arguments += [f"-{name}.port={port}" for name, port in zip(("master", "volume", "filer"), others, strict=True)]
    address = f"http://127.0.0.1:{s3}"
    server = Server(
        [str(BIN / of["command"][0]), *arguments],
        environment(variables(manifests, "seaweedfs", NAMESPACE), folder),
        address + of["readinessProbe"]["httpGet"]["path"],
        folder / "log",
    )
    try:
        server.wait()
        yield address
    finally:
        server.kill()


@pytest.fixture(scope="session")
def mlflow_server(filled: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the MLflow server of the development overlay, which keeps artifacts in the store."""
    folder = tmp_path_factory.mktemp("mlflow")
    manifests = overlay("development", filled)
    of = container(manifests, "mlflow")
    given = variables(manifests, "mlflow", NAMESPACE)
    given |= {
        "MLFLOW_BACKEND_STORE_URI": given["MLFLOW_BACKEND_STORE_URI"].replace("/data/", f"{folder}/"),
        "AWS_ENDPOINT_URL": store,
    }
    (port,) = free_ports(1)
    arguments = [
        word.replace("$(NAMESPACE)", NAMESPACE).replace("0.0.0.0", "127.0.0.1").replace("5000", str(port))
        for word in of["args"]
    ]
    address = f"http://127.0.0.1:{port}"
    server = Server(
        [str(BIN / of["command"][0]), *of["command"][1:], *arguments],
        environment(given, folder),
        address + of["readinessProbe"]["httpGet"]["path"],
        folder / "log",
    )
    try:
        server.wait()
        yield address
    finally:
        server.kill()


@pytest.fixture
def as_a_pod(store: str, filled: Path, s3_settings: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables that a pod of a run has from the secret."""
    manifests = overlay("development", filled)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        s3_settings.setenv(name, variables(manifests, "mlflow", NAMESPACE)[name])
    s3_settings.setenv("AWS_ENDPOINT_URL", store)
    return s3_settings
