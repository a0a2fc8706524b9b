"""The store with the corpus in a bucket, the tracking server, and runs of the pipeline in containers."""

from collections.abc import Iterator
from typing import Any

import docker
import pytest
from container_servers import ObjectStore, TrackingServer
from in_containers import ARTIFACTS, BUCKET, Containers
from small import write_corpus


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """Client of the container engine."""
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="session")
def store(engine: Any) -> Iterator[ObjectStore]:
    """Object store with the corpus in it."""
    store = ObjectStore("cbtm-test-ceph:latest")
    store.start(engine)
    yield store
    store.running.remove(force=True)


@pytest.fixture(scope="session")
def tracking(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """MLflow server that keeps artifacts in the store; it starts while the store does."""
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"), store, ARTIFACTS)
    try:
        store.wait()
        client = store.client()
        for bucket in (BUCKET, ARTIFACTS):
            client.create_bucket(Bucket=bucket)
        corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
        for file in corpus.rglob("*.jsonl"):
            client.upload_file(str(file), BUCKET, f"corpus/{file.relative_to(corpus).as_posix()}")
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def containers(
    engine: Any, store: ObjectStore, tracking: TrackingServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Containers]:
    """Runs in containers; none of their containers is left."""
    folder = tmp_path_factory.mktemp("containers")
    yield Containers(engine, store, tracking, folder)
    for left in engine.containers.list(filters={"label": "cbtm.test"}, ignore_removed=True):
        left.remove(force=True)
