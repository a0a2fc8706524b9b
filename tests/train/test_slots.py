import json
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations

import pytest

from cbtm.errors import ConfigError, Interrupted, StorageError
from cbtm.train.slots import cores, device_slot, held_locks, tasks_at_once, visible_gpus

# A task as `cbtm run` starts it: another process, which says what it was given, and when it had it.
TASK = """
import json, os, sys, time
from cbtm.train.slots import device_slot
n, threads, seconds = json.loads(sys.argv[1])
with device_slot(n, threads=threads):
    began = time.monotonic()
    print(json.dumps({"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "cores": sorted(os.sched_getaffinity(0)),
                      "began": began}), flush=True)
    time.sleep(seconds)
    print(time.monotonic(), flush=True)
"""
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux alone")


@pytest.fixture
def slots(tmp_path, monkeypatch):
    folder = tmp_path / "slots"
    monkeypatch.setenv("CBTM_SLOTS", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CBTM_PIN_CORES", raising=False)
    if "torch" in sys.modules:  # where another test has used a real GPU in this process
        monkeypatch.setattr(sys.modules["torch"].cuda, "is_initialized", lambda: False)
    return folder


def machine_with(n_gpus, tmp_path, monkeypatch):
    """Have the driver's tool list GPUs: a program that prints what nvidia-smi -L does."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    lines = "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-0{number})\n" for number in range(n_gpus))
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


def start(n, seconds, threads=None):
    command = [sys.executable, "-c", TASK, json.dumps([n, threads, seconds])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(task):
    """What a task was given, and from when to when."""
    had, ended = task.communicate(timeout=20)[0].splitlines()
    return json.loads(had) | {"ended": float(ended)}


def at_the_same_time(one, other):
    return one["began"] < other["ended"] and other["began"] < one["ended"]


@pytest.fixture
def holder(slots):
    """Starts tasks that have their devices until the test ends."""
    tasks = []

    def hold(n, threads=None):
        tasks.append(start(n, 60, threads))
        return tasks[-1], json.loads(tasks[-1].stdout.readline())

    yield hold
    for task in tasks:
        task.kill()
        task.wait()


# --- GPUs ---


def test_tasks_side_by_side_never_share_a_gpu(slots, tmp_path, monkeypatch):
    machine_with(3, tmp_path, monkeypatch)
    # 7 devices are asked for and 3 are there: those who want two of them neither block each other nor starve.
    done = [finish(task) for task in [start(n, 0.6) for n in (2, 2, 1, 2)]]
    for task in done:
        task["set"] = set(task["gpus"].split(","))
    assert sorted(len(task["set"]) for task in done) == [1, 2, 2, 2]
    assert set().union(*(task["set"] for task in done)) == {"0", "1", "2"}
    for one, other in combinations(done, 2):
        assert not (at_the_same_time(one, other) and one["set"] & other["set"])
    # 1 + 2 devices fit beside each other, and did run so.
    assert any(at_the_same_time(one, other) for one, other in combinations(done, 2))


def test_who_wants_many_is_not_overtaken_by_those_who_want_one(slots, tmp_path, monkeypatch, holder):
    machine_with(2, tmp_path, monkeypatch)
    task, had = holder(1)
    assert had["gpus"] == "0"
    both = start(2, 0.3)
    time.sleep(1.0)  # it waits by now
    one = start(1, 0.1)
    time.sleep(1.0)
    assert both.poll() is None
    assert one.poll() is None  # although GPU 1 is free
    task.kill()
    assert finish(both)["ended"] <= finish(one)["began"]


def test_gpu_of_a_killed_task_is_free(slots, tmp_path, monkeypatch, holder):
    machine_with(1, tmp_path, monkeypatch)
    task, _ = holder(1)
    task.send_signal(signal.SIGKILL)
    task.wait()
    with device_slot(1, threads=None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_child_that_inherits_the_lock_keeps_the_gpu(slots, tmp_path, monkeypatch):
    machine_with(1, tmp_path, monkeypatch)
    code = (
        "import os, subprocess\nfrom cbtm.train.slots import device_slot, held_locks\n"
        "with device_slot(1, threads=None):\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=-3, pass_fds=held_locks())\n"
        "    print(child.pid, flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    child = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout)
    timer = threading.Timer(0.8, os.kill, (child, signal.SIGKILL))
    timer.start()
    began = time.monotonic()
    with device_slot(1, threads=None):
        assert len(held_locks()) == 1
        assert time.monotonic() - began >= 0.7
    assert held_locks() == []


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [
        (None, ["0", "1", "2", "3"]),
        ("2,3", ["2", "3"]),
        ("GPU-01, GPU-03", ["GPU-01", "GPU-03"]),
        ("1,-1,2", ["1"]),  # CUDA reads up to the first that is none
        ("", []),
        ("-1", []),
    ],
)
def test_choice_made_outside_is_kept(slots, tmp_path, monkeypatch, holder, chosen, gpus):
    machine_with(4, tmp_path, monkeypatch)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == gpus
    if len(gpus) == 2:
        assert holder(1)[1]["gpus"] == gpus[0]
        with device_slot(1, threads=None):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == gpus[1]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_more_devices_than_the_machine_has_are_refused(slots, tmp_path, monkeypatch):
    machine_with(2, tmp_path, monkeypatch)
    message = r"devices=3, but of this machine's GPUs 2 may be used \(0,1\)"
    with pytest.raises(ConfigError, match=message), device_slot(3, threads=None):
        pass


# --- cores ---


@needs_affinity
def test_tasks_have_cores_of_their_own(slots, monkeypatch, holder):
    all_cores = cores()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, had = holder(1, threads=1)
    assert had["cores"] == all_cores[:1]
    if len(all_cores) > 1:
        begun = threading.Event()
        thread = threading.Thread(target=begun.wait)
        thread.start()
        with device_slot(1, threads=1):
            assert os.sched_getaffinity(0) == {all_cores[1]}
            assert os.sched_getaffinity(thread.native_id) == {all_cores[1]}  # a thread that was there before
        begun.set()
        thread.join()
    assert cores() == all_cores


@needs_affinity
def test_cores_are_counted_and_left_to_the_system_on_request(slots, monkeypatch):
    monkeypatch.setenv("CBTM_PIN_CORES", "0")
    all_cores = cores()
    with device_slot(1, threads=len(all_cores), device="cpu"):
        assert cores() == all_cores
        assert len(held_locks()) == len(all_cores)


@needs_affinity
def test_more_threads_than_cores_take_the_machine_alone(slots):
    all_cores = cores()
    with device_slot(2, threads=len(all_cores), device="cpu"):
        assert cores() == all_cores
        assert len(held_locks()) == len(all_cores)


def test_without_threads_the_cores_are_shared(slots):
    with device_slot(1, threads=None, device="cpu"):
        assert held_locks() == []


def test_nothing_happens_where_no_folder_is_named(slots, monkeypatch):
    for value in (None, ""):
        monkeypatch.setenv("CBTM_SLOTS", value) if value is not None else monkeypatch.delenv("CBTM_SLOTS")
        with device_slot(8, threads=1):
            assert held_locks() == []


def test_second_slot_of_a_process_is_refused(slots):
    slot = {"threads": 1, "device": "cpu"}
    with device_slot(**slot), pytest.raises(RuntimeError, match="one slot at a time"), device_slot(**slot):
        pass


# --- waiting, counting ---


def test_stop_request_ends_the_wait(slots, monkeypatch, caplog, holder):
    caplog.set_level("INFO", logger="cbtm.train.slots")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # or the holder takes a GPU where there is one
    holder(1, threads=len(cores()))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    message = "stopped while waiting for a free core; nothing was begun"
    with pytest.raises(Interrupted, match=message), device_slot(1, threads=1, device="cpu"):
        pass
    names = ",".join(map(str, cores()))
    assert caplog.messages == [f"slot waiting for 1 of the cores {names}"]


def test_folder_that_cannot_be_written_is_said(slots, monkeypatch):
    monkeypatch.setenv("CBTM_SLOTS", "/proc/slots")
    message = "cannot lock files below CBTM_SLOTS=/proc/slots: No such file"
    with pytest.raises(StorageError, match=message), device_slot(1, threads=1, device="cpu"):
        pass


def test_tasks_at_once(slots, tmp_path, monkeypatch):
    machine_with(8, tmp_path, monkeypatch)
    assert tasks_at_once(1, threads=None) == 8
    assert tasks_at_once(2, threads=4) == 4
    assert tasks_at_once(8, threads=None) == 2  # 1 trains, and another may read or write
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert tasks_at_once(1, threads=None) == 3
    assert tasks_at_once(1, threads=None, device="cpu") == 2
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**31  # 2 GiB each
    assert tasks_at_once(1, threads=1, device="cpu") == max(2, min(len(cores()), memory))
