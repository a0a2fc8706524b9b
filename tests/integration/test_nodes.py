"""An expert on two machines, from the stage that launches it to the manifest: real processes, a real S3 server."""

import json
import os
import signal
import threading
import time

import pytest
from safetensors.torch import load_file
from small import settings

from cbtm import manifest, stages, storage
from cbtm.errors import Interrupted
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.train import nodes
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
