import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cbtm.errors import ConfigError, DataError, Interrupted
from cbtm.train import launch
from cbtm.train.config import OptimizationConfig
from cbtm.train.job import TrainJob
from cbtm.train.launch import train_on
from cbtm.train.node import Node
from cbtm.train.outcome import RankError, WorkerFailedError
from cbtm.train.worker import LaunchFolder

FIXTURES = Path(__file__).parents[1] / "fixtures"
pytestmark = pytest.mark.slow  # PyTorch is loaded three times in each start


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    # For the processes that are started; before what there is, where cbtm or its packages may lie.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FIXTURES), *filter(None, [os.environ.get("PYTHONPATH")])]))


def job_in(folder, *, steps=6, device="cpu", threads=1, **bindings):
    """A job for the stand-in below `folder`."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    config = OptimizationConfig(steps=steps, sequences_per_step=2, learning_rate=1e-3, device=device, threads=threads)
    return TrainJob(
        member="dense",
        start=folder,
        tokenizer=folder,
        shards=(),
        config=config,
        sequences_per_step=2,
        bindings=bindings,
        checkpoints=str(folder / "checkpoints"),
        key="key",
        scratch=folder / "scratch",
        output=folder / "out",
    )


def launched(job, *, n_processes=2, metrics=None, steps=None, **settings):
    return train_on(
        job,
        n_processes=n_processes,
        report=lambda values, step: None if metrics is None else metrics.append((step, values)),
        progress=lambda step, loss: None if steps is None else steps.append(step),
        target="stand_in:train",
        **settings,
    )


def processes_of(job):
    return [found.pid for found in psutil.process_iter(["cmdline"]) if str(job.scratch) in str(found.info["cmdline"])]


def wait_for(condition, seconds=15):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def started(job):
    return all((job.output / f"pid-{rank}").is_file() for rank in range(2))


def saved(job):
    return [int(path.read_text()) if (path := job.output / f"saved-{rank}").is_file() else None for rank in range(2)]


def test_killed_launch_takes_its_processes_along_and_the_next_one_waits_for_them(tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("INFO")
    job = job_in(tmp_path, steps=10_000, seconds=0.01, saving={"0": 1.5})
    job.save(tmp_path / "job.json")
    code = (
        "import sys; from pathlib import Path; from cbtm.train.job import TrainJob; from cbtm.train.launch import *\n"
        "train_on(TrainJob.load(Path(sys.argv[1])), n_processes=2, report=lambda *_: None, progress=None,"
        " target='stand_in:train')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.json")], stderr=subprocess.DEVNULL)
    wait_for(lambda: started(job))
    assert len(processes_of(job)) == 3  # torchrun's agent and two workers; the parent is given another path
    parent.kill()
    parent.wait()
    wait_for(lambda: saved(job)[1] is not None)
    assert processes_of(job)  # rank 0 still saves

    (tmp_path / "torch.py").write_text("raise SystemExit('what lies in the current folder is not imported')")
    monkeypatch.chdir(tmp_path)
    metrics, steps = [], []
    facts = launched(job_in(tmp_path), metrics=metrics, steps=steps)

    assert saved(job)[0] == saved(job)[1]  # both had stopped at one step, and saved to the end
    assert processes_of(job) == []
    assert metrics == [(step, {"train/loss": 1 / step, "ranks": 2.0}) for step in range(1, 7)]
    assert steps[0] == 1
    assert steps[-1] == 6
    assert facts["member"] == "dense"
    assert facts["ranks"] == 2.0
    assert (facts["OMP_NUM_THREADS"], facts["TOKENIZERS_PARALLELISM"]) == ("1", "false")
    # Rank 0's log lines, the other's warnings, and nothing of torchrun's.
    pid = (job.output / "pid-0").read_text()
    assert caplog.record_tuples == [
        ("cbtm.train.launch", logging.INFO, "member=dense waiting for processes of an earlier try, which still save"),
        ("stand_in", logging.INFO, f"training on pid={pid}"),
        ("stand_in", logging.WARNING, "one to look at"),
        ("stand_in", logging.WARNING, "rank 1: one to look at"),
    ]
    assert capfd.readouterr() == ("", "")
    assert "printed by rank 1" in LaunchFolder(job.scratch / "launch").log(1).read_text()


def test_stop_request_lets_all_save_and_a_second_one_changes_nothing(tmp_path):
    job = job_in(tmp_path, steps=10_000, seconds=0.01, saving={"0": 1.0})

    def stop():
        wait_for(lambda: started(job))
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: saved(job)[1] is not None)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        launched(job)
    thread.join()
    step = saved(job)[0]
    assert saved(job) == [step, step]
    assert str(stopped.value) == f"stopped at step {step} of 10000"
    assert stopped.value.exit_code == 75
    assert processes_of(job) == []


def test_stop_request_reaches_a_machine_that_waits_for_another(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        node = Node(1, 2, "127.0.0.1", nobody.getsockname()[1])
        job = job_in(tmp_path)
        threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(Interrupted, match="stopped without a new checkpoint; training goes on from the last one"):
            launched(job, n_processes=1, node=node)
    assert time.monotonic() - began < 30
    assert processes_of(job) == []


def test_failures_of_ranks_are_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.5)
    killed = job_in(tmp_path / "killed", fault={"1": "kill"})
    torn = job_in(tmp_path / "torn", fault={"1": "data", "0": "hang"})
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(launched, job) for job in (killed, torn)]
        began = time.monotonic()
        with pytest.raises(WorkerFailedError) as error:
            runs[0].result()
        with pytest.raises(DataError) as data_error:
            runs[1].result()
    log = killed.scratch / "launch/logs/rank-1.log"
    assert str(error.value) == (
        f"rank 1 of 2 was ended by signal 9 (SIGKILL), most often for want of memory; its log: {log}"
    )
    # What the other said is gloo's, and known for a consequence.
    other = RankError.load(killed.scratch / "launch/errors/rank-0.json")
    assert (other.kind, other.consequence) == ("RuntimeError", True)
    # A rank that waits for ever is ended, well before the 30 seconds that torchrun gives it.
    assert str(data_error.value) == "rank 1 of 2: shard text-00000 has a token of 300, and the vocabulary 300 in all"
    assert time.monotonic() - began < 25
    assert processes_of(killed) + processes_of(torn) == []


def test_one_process_is_this_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FIXTURES)
    metrics, steps = [], []
    facts = launched(job_in(tmp_path), n_processes=1, metrics=metrics, steps=steps)
    assert (tmp_path / "out/pid-0").read_text() == str(os.getpid())
    assert facts["ranks"] == 1.0
    assert steps == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ZeroDivisionError, match="no tokens in a step"):
        launched(job_in(tmp_path, fault={"0": "defect"}), n_processes=1)


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # an earlier test may have had it count
    with pytest.raises(ConfigError, match="devices=3, but 0 GPUs are visible here; lower it, or train with device=cpu"):
        launched(job_in(tmp_path, device="cuda"), n_processes=3)
    assert not (tmp_path / "scratch").exists()


def test_torchrun_that_does_not_start_is_said_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # no Python can start here
    with pytest.raises(WorkerFailedError, match=r"torchrun ended with code 1 and no result: .*; its log: .*agent\.log"):
        launched(job_in(tmp_path))


def test_job_is_what_the_processes_read(tmp_path):
    job = job_in(tmp_path, fault={"1": "kill"})
    job.save(tmp_path / "job.json")
    assert TrainJob.load(tmp_path / "job.json") == job
    assert json.loads((tmp_path / "job.json").read_text())["bindings"] == {"fault": {"1": "kill"}}
