"""One model on two machines: each a process with folders of its own, which share nothing but S3 and a socket."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import Trained, assert_close, assert_equal, make_job, train_on_ranks, write_run

from cbtm import manifest, storage
from cbtm.train.node import Node

FIXTURES = Path(__file__).parents[1] / "fixtures"
STEEP = {"learning_rate": 0.1, "adam_epsilon": 0.05, "dropout": 0.2}
pytestmark = pytest.mark.slow  # PyTorch is loaded in each of six processes


class Machines:
    """Two machines, and a job on them."""

    def __init__(self, root, source, checkpoints, n_processes, **changes):
        self.n_processes, self.processes = n_processes, []
        self.jobs = []
        for number in range(2):
            own = root / f"machine-{number}"
            shutil.copytree(source, own / "run")  # each machine has a copy
            self.jobs.append(make_job(own / "run", own / "job", checkpoints=checkpoints, **STEEP | changes))
            self.jobs[-1].save(own / "job/job.json")

    def start(self, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, str(FIXTURES / "one_node.py"), str(job.output.with_name("job.json"))),
                    *(str(self.n_processes), *Node(number, 2, "127.0.0.1", port).arguments()),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (FIXTURES, *sys.path))), **environment},
                stderr=(job.output.parent / "log.txt").open("a"),
            )
            for number, job in enumerate(self.jobs)
        ]

    def wait(self, seconds=120):
        try:
            return [process.wait(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def error(self, number):
        return (self.jobs[number].output.parent / "error.txt").read_text()

    def log(self, number):
        return (self.jobs[number].output.parent / "log.txt").read_text()

    def trained(self):
        return Trained(self.jobs[0])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("source"), dropout=0.2)


def one_machine(source, folder, n, **changes):
    return train_on_ranks(make_job(source, folder, devices=n, **STEEP | changes), n)


def stored(uri):
    return [file.path for file in storage.list_files(uri)]


@pytest.mark.parametrize(("sharding", "n_processes"), [("ddp", 1), ("fsdp2", 2)])
def test_two_machines_leave_what_one_with_as_many_ranks_leaves(source, bucket, tmp_path, sharding, n_processes):
    checkpoints = f"{bucket}/checkpoints/cluster-00001"
    machines = Machines(tmp_path, source, checkpoints, n_processes, sharding=sharding)
    machines.start()
    codes = machines.wait()
    assert codes == [0, 0], machines.log(0) + machines.log(1)
    expected = one_machine(source, tmp_path / "alone", 2 * n_processes, sharding=sharding)
    assert_close(machines.trained(), expected)
    assert machines.trained().facts["cost"]["devices"] == 2 * n_processes
    # The model lies on the first machine alone, and the checkpoint of step 4, of both, in the bucket.
    assert not list(machines.jobs[1].output.iterdir())
    made = manifest.load(f"{checkpoints}/step-00000004/manifest.json")
    shards = [path for path in made.paths() if path.endswith(".safetensors")]
    assert [path[:11] for path in shards] == [f"shard-{rank + 1:05d}" for rank in range(2 * n_processes)]
    assert stored(checkpoints) == sorted(f"step-00000004/{path}" for path in [*made.paths(), "manifest.json"])


def test_sigterm_to_the_second_machine_saves_on_both_and_a_second_start_goes_on(source, bucket, tmp_path):
    checkpoints = f"{bucket}/checkpoints/cluster-00001"
    machines = Machines(tmp_path, source, checkpoints, 1, sharding="fsdp2")
    machines.start(CBTM_TEST_HOLD="5")
    first = machines.jobs[0].output.parent
    until = time.monotonic() + 60
    while not (first / "held").exists():
        assert time.monotonic() < until, machines.log(0) + machines.log(1)
        time.sleep(0.05)
    machines.processes[1].send_signal(signal.SIGTERM)
    time.sleep(1.0)  # the launch hands it to its ranks ten times a second
    (first / "go-on").touch()
    assert machines.wait() == [75, 75]
    for number in range(2):
        assert machines.error(number) == f"stopped at step 6 of 8; the checkpoint is at {checkpoints}"
    spec = manifest.StageSpec("checkpoint", f"{checkpoints}/step-00000006", "key")
    assert manifest.is_current(spec, manifest.load(spec.manifest_uri))
    for job in machines.jobs:  # nothing is left of the machines
        shutil.rmtree(job.scratch)
    (first / "output/losses.jsonl").unlink()

    machines.start()
    assert machines.wait() == [0, 0]
    resumed = machines.trained()
    assert list(resumed.losses) == [7, 8]
    assert_equal(resumed, one_machine(source, tmp_path / "alone", 2, sharding="fsdp2"))
