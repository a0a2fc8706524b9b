"""How the compiled pipeline is executed on one machine; whole runs are in integration/test_pipeline.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import settings

from cbtm import local
from cbtm.errors import ConfigError
from cbtm.run import Run
from cbtm.run_config import parse_config

# Three tasks that each wait for the other two: they end only if all run at once. kfp itself would run two.
PIPELINE = """
import sys
from kfp import dsl, local as kfp_local
from cbtm.local import _run_at_once

@dsl.component(install_kfp_package=False)
def meet(name: str, folder: str):
    import pathlib, time
    pathlib.Path(folder, name).touch()
    until = time.monotonic() + 20
    while len(list(pathlib.Path(folder).iterdir())) < 3:
        assert time.monotonic() < until, "alone"
        time.sleep(0.05)

@dsl.pipeline(name="meeting")
def meeting(folder: str):
    with dsl.ParallelFor(["a", "b", "c"]) as name:
        meet(name=name, folder=folder).set_caching_options(False)

_run_at_once(3)
kfp_local.init(runner=kfp_local.SubprocessRunner(use_venv=False), pipeline_root=sys.argv[2], raise_on_error=True)
meeting(folder=sys.argv[1])
"""


def test_tasks_of_a_loop_run_at_once(tmp_path):
    (tmp_path / "met").mkdir()
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    command = [sys.executable, "pipeline.py", str(tmp_path / "met"), str(tmp_path / "kfp")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert sorted(path.name for path in (tmp_path / "met").iterdir()) == ["a", "b", "c"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("CBTM_TASKS", "CBTM_SLOTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Run(parse_config(json.dumps(settings(str(tmp_path), str(tmp_path / "run"), None))))


def test_runs_share_gpus_and_each_has_its_own_turns_at_cores(run, tmp_path, monkeypatch):
    def folder(of: Run) -> Path:
        return Path(local._share_of_devices(of)["CBTM_SLOTS"])

    other = Run(run.config.model_copy(update={"root": str(tmp_path / "other")}))
    assert folder(run) != folder(other)
    assert folder(run).parent == folder(other).parent
    assert folder(run).parent.name == f"cbtm-slots-{os.getuid()}"
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1"])
    assert folder(run) == folder(other)
    assert folder(run).name == f"cbtm-slots-{os.getuid()}"


def test_turns_and_tasks_can_be_set(run, monkeypatch):
    share = local._share_of_devices(run)
    assert int(share["CBTM_TASKS"]) >= 2
    monkeypatch.setenv("CBTM_SLOTS", "")  # no turns
    monkeypatch.setenv("CBTM_TASKS", "5")
    share = local._share_of_devices(run)
    assert (share["CBTM_SLOTS"], share["CBTM_TASKS"]) == ("", "5")


@pytest.mark.parametrize("value", ["0", "two", "-1"])
def test_number_of_tasks_that_is_none_is_refused(run, monkeypatch, value):
    monkeypatch.setenv("CBTM_TASKS", value)
    with pytest.raises(ConfigError, match=f"CBTM_TASKS='{value}': expected the number of tasks that run at once"):
        local._share_of_devices(run)
