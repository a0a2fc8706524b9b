"""An expert on two machines, from the stage that launches it to the manifest: real processes, a real S3 server."""

import json
import os
import re
import signal
import threading
import time

import pytest
from safetensors.torch import load_file
from small import settings

from cbtm import manifest, stages, storage
from cbtm.cluster.assigner import LEARNED, token_shard
from cbtm.errors import Interrupted, ManifestError
from cbtm.kubernetes import connect
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.stages.node import run_node
from cbtm.train import nodes, trainjob
from cbtm.train.exchange import Exchange, NodeTask
from cbtm.train.member import Member

pytestmark = pytest.mark.slow
EXPERT = Member("expert", 1)


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(nodes, "_POLL_SECONDS", 0.3)
    monkeypatch.setattr(nodes, "_SETTLE_SECONDS", 3.0)


def make_run(corpus, bucket, **train):
    values = settings(str(corpus), f"{bucket}/run", None)
    values["train"] |= {"node": {"image": "cbtm:test", "secret": "cbtm-s3"}, "device": "cpu", **train}
    return Run(parse_config(json.dumps(values)))


@pytest.fixture
def planned(corpus, bucket, kubernetes):
    """A run whose experts are to be trained, and a cluster that has the credentials as a secret."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    kubernetes.secrets["cbtm-s3"] = {name: os.environ[name] for name in names}
    run = make_run(corpus, bucket)
    stages.plan(run)
    for task in stages.tasks(run):
        if task.name == f"train:{EXPERT.name}":
            break
        if not task.name.startswith(("score:", "train:dense", "train:cluster")):
            task.run()
    return corpus, bucket


def weights(run, folder):
    return load_file(run.fetch(run.train_spec(EXPERT), folder) / "model.safetensors")


def curve(run):
    lines = storage.read_bytes(storage.join(run.member_root(EXPERT), "training.jsonl")).decode().splitlines()
    return {point["step"]: point["train/loss"] for point in map(json.loads, lines)}


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_expert_on_two_machines_is_the_one_of_two_devices(planned, kubernetes, tmp_path, caplog):
    caplog.set_level("INFO")
    run = make_run(*planned, nodes=2)
    made = stages.train(run, EXPERT)

    assert made == manifest.load(storage.join(run.member_root(EXPERT), "manifest.json"))
    assert made.metadata["cost"]["devices"] == 2
    assert {"config.json", "expert.json", "model.safetensors", "tokenizer.json"} <= set(made.paths())
    two_machines, two_machines_curve = weights(run, tmp_path / "nodes"), curve(run)
    # Nothing is left of it: no TrainJob, no checkpoint, nothing that was exchanged.
    assert kubernetes.jobs == {}
    assert [pod.ended["exitCode"] for pod in kubernetes.pods] == [0, 0]
    assert storage.list_files(run.uri("checkpoints", EXPERT.name)) == []
    assert storage.list_files(run.uri("nodes")) == []
    assert stages.train(run, EXPERT) == made  # and there is nothing to be done
    assert len(kubernetes.posted) == 1
    # The credentials came as a secret, and stand in no manifest.
    assert "testing" not in json.dumps(kubernetes.posted)

    storage.delete(run.member_root(EXPERT), ["manifest.json"])
    one = make_run(*planned, devices=2)
    stages.train(one, EXPERT)
    assert len(kubernetes.posted) == 1
    one_machine = weights(one, tmp_path / "devices")
    assert two_machines.keys() == one_machine.keys()
    for name, tensor in two_machines.items():
        assert tensor.numpy() == pytest.approx(one_machine[name].numpy(), rel=1e-4, abs=1e-5), name
    assert two_machines_curve == pytest.approx(curve(one), rel=1e-5)


def test_cancelled_launch_saves_on_its_machines_and_the_next_goes_on(planned, kubernetes, caplog):
    caplog.set_level("INFO")
    steps = 4000
    run = make_run(*planned, nodes=2, steps=steps, checkpoint_every=100_000, log_every=1)

    def cancel():
        wait_for(lambda: any("metrics " in line for pod in kubernetes.pods for _, line in pod.lines))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(
        Interrupted, match=rf"^stopped at step \d+ of {steps}; the checkpoint is at {planned[1]}/run/check"
    ):
        stages.train(run, EXPERT)
    thread.join()
    assert kubernetes.jobs == {}
    assert [pod.ended["exitCode"] for pod in kubernetes.pods] == [75, 75]
    (step,) = {file.path.split("/")[0] for file in storage.list_files(run.uri("checkpoints", EXPERT.name))}
    reached = int(step.removeprefix("step-"))
    assert 0 < reached < steps

    # The next launch is cancelled as soon as its machines have gone on from there.
    def cancel_again():
        wait_for(lambda: any("resumed at" in line for pod in kubernetes.pods for _, line in pod.lines))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=cancel_again)
    thread.start()
    with pytest.raises(Interrupted):
        stages.train(run, EXPERT)
    thread.join()
    assert f"resumed at step={reached}/{steps}" in caplog.text


def test_machine_that_is_killed_is_replaced_and_the_model_is_the_same(planned, kubernetes, tmp_path, caplog):
    caplog.set_level("INFO")
    settings = {"steps": 600, "checkpoint_every": 50, "log_every": 200}
    run = make_run(*planned, nodes=2, sharding="fsdp2", **settings)

    def kill():
        manifests = run.uri("checkpoints", EXPERT.name)
        wait_for(lambda: any(file.path.endswith("manifest.json") for file in storage.list_files(manifests)))
        kubernetes.pods[1].kill(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    made = stages.train(run, EXPERT)
    thread.join()
    assert made.metadata["steps"] == 600
    assert len(kubernetes.posted) == 2
    assert "all machines are started again (1)" in caplog.text
    resumed = re.search(r"resumed at step=(\d+)/600", caplog.text)
    assert resumed is not None
    assert int(resumed[1]) % 50 == 0
    replaced = weights(run, tmp_path / "nodes")

    storage.delete(run.member_root(EXPERT), ["manifest.json"])
    one = make_run(*planned, devices=2, sharding="fsdp2", **settings)
    stages.train(one, EXPERT)
    whole = weights(one, tmp_path / "devices")
    for name, tensor in replaced.items():
        assert tensor.numpy() == pytest.approx(whole[name].numpy(), rel=1e-3, abs=1e-4), name


def test_error_on_the_machines_is_the_one_that_the_stage_shows(planned, kubernetes):
    run = make_run(*planned, nodes=2)
    folder = run.uri(token_shard(LEARNED, "train", EXPERT.cluster, run.plan_made.part("train")[0].name)[0])
    (shard, *_) = storage.list_files(folder)
    storage.write_bytes(storage.join(folder, shard.path), b"x" * shard.size)
    with pytest.raises(ManifestError) as error:
        stages.train(run, EXPERT)
    assert "was changed or cut short after its manifest was written" in str(error.value)
    wait_for(lambda: not kubernetes.jobs)
    assert {pod.ended["exitCode"] for pod in kubernetes.pods} <= {2, 143}
    assert not storage.exists(storage.join(run.member_root(EXPERT), "manifest.json"))


def test_machine_that_would_train_something_else_refuses(planned, monkeypatch):
    run = make_run(*planned, nodes=2)
    shared = Exchange(run.uri("nodes", EXPERT.name))
    shared.write_task(NodeTask(config=run.config.model_dump_json(), member=EXPERT.name, key="of another version"))
    pod = {"NNODES": "2", "NPROC_PER_NODE": "1", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in pod.items():
        monkeypatch.setenv(f"PET_{name}", value)
    with pytest.raises(ManifestError, match="node 1 would train something else than it was asked for: another version"):
        run_node(shared.task_uri)
    (told,) = shared.failures()
    assert (told.node, told.errors[0]["kind"]) == (1, "ManifestError")


def test_training_on_one_machine_ends_the_trainjob_of_an_earlier_try_first(planned, kubernetes, caplog):
    caplog.set_level("INFO")
    several = make_run(*planned, nodes=2, steps=100_000, log_every=1)
    shared = Exchange(several.uri("nodes", EXPERT.name))
    shared.write_task(NodeTask(config="{}", member=EXPERT.name, key="k"))
    job = {"numNodes": 1, "numProcPerNode": 1, "image": "i", "command": ["sleep", "100"], "args": []}
    name = trainjob.job_name(several.config.root, EXPERT.name)
    connect(None).create(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": name},
            "spec": {"runtimeRef": {"name": "torch-distributed"}, "trainer": job},
        }
    )
    stages.train(make_run(*planned), EXPERT)
    assert kubernetes.jobs == {}
    assert storage.list_files(several.uri("nodes")) == []
