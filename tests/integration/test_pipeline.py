"""The compiled pipeline on this machine, from an installed wheel, outside the repository; killed and run again."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from small import settings, write_config

PROJECT = Path(__file__).resolve().parents[2]
AVERAGES = {"average": {"averages": ["uniform", "greedy"]}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that holds cbtm as a wheel installs it, and nothing else of the repository."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "cbtm", source / "cbtm", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=120)
    return target


def environment(installed: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(installed), "GOMP_SPINCOUNT": "1000"}


def start(config: Path, installed: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", "from cbtm.cli import main; main()", "run", str(config)]
    return subprocess.Popen(
        command,
        cwd=config.parent,
        env=environment(installed),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Where the tests run in the background they ignore Ctrl-C, which their children would take over.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    return output


def result_of(root: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((root / "result.json").read_text())
    del result["run"]
    return result


@pytest.fixture(scope="module")
def finished(corpus: Path, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    values = settings(str(corpus), "runs/small", "sqlite:///runs/mlflow.db") | AVERAGES
    output = finish(start(write_config(folder / "run.yaml", values), installed))
    assert "dense model" in output
    assert "top-1" in output
    return folder


def test_pipeline_runs_from_the_wheel_and_writes_everything(finished, installed):
    root = finished / "runs/small"
    assert "cbtm" in os.listdir(installed)
    for name in ("manifest.json", "result.json", "report.html", "plan.json", "clusterer/domains.json"):
        assert (root / name).is_file(), name
    for member in ("dense", "cluster-00000", "cluster-00001", "random-00000", "random-00001"):
        assert (root / "experts" / member / "model.safetensors").is_file()
        assert (root / "scores" / member / "log_probs.npy").is_file()
    assert not [path for path in root.rglob("work") if path.parent.parent.name == ".cbtm"]
    perplexities = [result_of(root)[arm]["perplexity"] for arm in ("seed", "dense", "random")]
    assert all(1 < value < 500 for value in perplexities)


def test_tracker_has_a_parent_with_a_child_for_each_model(finished):
    client = MlflowClient(f"sqlite:///{finished}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cbtm").experiment_id])
    by_kind: dict[str, list[Any]] = {}
    for run in runs:
        by_kind.setdefault(run.data.tags["cbtm.kind"], []).append(run)
    assert {kind: len(some) for kind, some in by_kind.items()} == {
        "parent": 1, "seed": 1, "dense": 1, "expert": 2, "random": 3, "average": 2,
        "ensemble": 8,  # the chosen one, its top-1, and product, bayes, posterior, uniform, prior and oracle
    }  # fmt: skip
    parent = by_kind.pop("parent")[0]
    assert parent.info.status == "FINISHED"
    for run in (run for some in by_kind.values() for run in some):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params["cbtm.n_clusters"] == "2"
    result = result_of(finished / "runs/small")
    dense = by_kind["dense"][0]
    (ensemble,) = [run for run in by_kind["ensemble"] if run.info.run_name == "small/ensemble"]
    figures = {"eval/perplexity", "eval/bits_per_byte", "eval/nats", "eval/perplexity_low", "eval/dense_ratio"}
    for kind in ("seed", "dense", "average", "ensemble"):
        assert all(figures <= set(run.data.metrics) for run in by_kind[kind]), kind
    by_top_k = client.get_metric_history(ensemble.info.run_id, "eval/top_k/perplexity")
    assert sorted(point.step for point in by_top_k) == [1, 2]
    by_temperature = client.get_metric_history(ensemble.info.run_id, "eval/temperature/perplexity")
    assert [point.step for point in by_temperature] == [50, 500]  # thousandths
    assert dense.data.metrics["eval/perplexity"] == pytest.approx(result["dense"]["perplexity"])
    assert dense.inputs.dataset_inputs[0].dataset.name
    steps = [point.step for point in client.get_metric_history(dense.info.run_id, "train/loss")]
    assert steps == [5, 10, 15, 20]
    assert {"train/learning_rate", "train/tokens_per_second"} <= set(dense.data.metrics)
    artifacts = {item.path for item in client.list_artifacts(ensemble.info.run_id)}
    assert artifacts == {"result.json", "settings.csv", "report.html", "domains.json", "domain_table.json"}


def test_second_run_takes_seconds_and_changes_nothing(finished, installed):
    manifest = finished / "runs/small/manifest.json"
    before = manifest.stat().st_mtime_ns
    began = time.monotonic()
    output = finish(start(finished / "run.yaml", installed))
    assert time.monotonic() - began < 20
    assert "up to date" in output
    assert manifest.stat().st_mtime_ns == before


def test_task_with_nothing_left_to_do_imports_no_torch(finished, installed):
    tasks = """
import sys
from cbtm import stages
from cbtm.run import Run
from cbtm.train.member import Member

run = Run.parse(open("run.yaml").read())
stages.plan(run)
made = [stages.tokenizer(run), stages.cluster(run), stages.assign(run, "train-00000"), stages.evaluate(run)]
for name in ("seed", "dense", "cluster-00001"):
    made += [stages.train(run, Member.parse(name)), stages.score(run, Member.parse(name))]
assert len({manifest.digest for manifest in made}) == 10
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", tasks]
    subprocess.run(command, cwd=finished, env=environment(installed), check=True, timeout=120)


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def tasks_of(process: "subprocess.Popen[str]", component: str) -> list[psutil.Process]:
    """Processes that execute a component at this moment."""
    found = []
    for child in descendants(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if "kfp.dsl.executor_main" in line and component in line:
                found.append(child)
    return found


def wait_for_task(process: "subprocess.Popen[str]", component: str, seconds: float = 200) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while not (found := tasks_of(process, component)):
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline, f"{component} did not start"
        time.sleep(0.02)
    return found


def wait_for_checkpoint(process: "subprocess.Popen[str]", folder: Path, seconds: float = 200) -> None:
    """Return as soon as there is a complete checkpoint; the small models train on for a tenth of a second."""
    deadline = time.monotonic() + seconds
    while not any(folder.glob("step-*/manifest.json")):
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline, f"no checkpoint appeared in {folder}"
        time.sleep(0.002)


def wait_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, alive


def test_killed_and_interrupted_runs_go_on_to_the_same_result(finished, corpus, installed, tmp_path):
    values = settings(str(corpus), "runs/small", None) | AVERAGES
    config, root = write_config(tmp_path / "run.yaml", values), tmp_path / "runs/small"

    # kill -9 of the command while the seed model trains: its tasks stop too, and nothing counts as done.
    values["seed_model"]["training"]["checkpoint_every"] = 5
    write_config(config, values)
    process = start(config, installed)
    wait_for_checkpoint(process, root / "checkpoints/seed")
    children = descendants(process)
    process.kill()
    process.communicate()
    wait_gone(children)
    assert not (root / "seed/manifest.json").exists()

    # kill -9 of one task: the run fails and says so.
    process = start(config, installed)
    wait_for_checkpoint(process, root / "checkpoints/dense")
    victims = tasks_of(process, "train_expert")
    assert victims
    for victim in victims:
        victim.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "log" in output
    assert not (root / "manifest.json").exists()

    # Ctrl-C: the tasks save and the exit code says that the same command goes on.
    process = start(config, installed)
    wait_for_task(process, "train_expert")
    children = descendants(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    wait_gone(children)

    finish(start(config, installed))
    expected, resumed = result_of(finished / "runs/small"), result_of(root)
    assert resumed == expected


def test_failing_task_is_one_readable_error(corpus, installed, tmp_path):
    values = settings(str(corpus), "runs/small", None)
    values["cluster"]["n_clusters"] = 200
    values["train"]["sequences_per_step"] = 200
    process = start(write_config(tmp_path / "run.yaml", values), installed)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cluster.n_clusters=200 is larger than the number of documents 160; use at most 160" in output
    assert "Traceback" not in output
