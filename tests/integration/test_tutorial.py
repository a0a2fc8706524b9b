"""The tutorial's commands, in its order, with models of a few steps; the pipeline's processes are tested elsewhere."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from typer.testing import CliRunner

from cbtm import cli, local, stages

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALLER = {"--max-new-tokens 24": "--max-new-tokens 4", "tutorial_texts.py texts services": "{} --characters 60000"}


@pytest.fixture(scope="module")
def tutorial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tutorial", DOCS / "run_tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tutorial"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def smaller_file(name: str, text: str) -> str:
    """The configuration with few steps of a small model; other files as they are."""
    if name != "eight.yaml":
        return text
    values = yaml.safe_load(text)
    values["seed_model"]["scratch"] = {"hidden_size": 16, "n_layers": 1, "n_heads": 2}
    values["seed_model"]["training"] |= {"steps": 12, "warmup_steps": 2, "context_length": 64, "threads": 1}
    values["train"] |= {"steps": 4, "warmup_steps": 1, "context_length": 64}
    values["score"] |= {"max_documents": 24, "max_tokens": 33}
    values["cluster"] |= {"n_components": 20}
    values["evaluate"] = {"temperatures": [0.1], "bootstrap_resamples": 100}
    return yaml.safe_dump(values)


def in_this_process(line: str) -> str:
    done = CliRunner().invoke(cli.app, shlex.split(line)[1:], catch_exceptions=False)
    assert done.exit_code == 0, f"{line}: {done.output}"
    return done.stdout


def in_a_shell(line: str) -> str:
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def execute(commands: str, folder: Path) -> str:
    """Run commands: those of cbtm alone in this process, others in a shell."""
    for shown, meant in SMALLER.items():
        commands = commands.replace(shown, meant.format(shown))
    printed = ""
    for line in commands.splitlines():
        alone = line.startswith("cbtm ") and "|" not in line
        line = line if alone else line.replace("cbtm ", f'{sys.executable} -c "from cbtm.cli import main; main()" ')
        printed += in_this_process(line) if alone else in_a_shell(line)
    return printed


def pipeline(run):
    """What `cbtm run` has processes do."""
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()


def test_every_command_of_the_tutorial_works_and_prints_what_it_is_shown_for(tutorial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "run_pipeline", pipeline)
    (tmp_path / "docs").symlink_to(DOCS)
    page = (DOCS / "tutorial.md").read_text()
    smaller = page
    for step in tutorial.steps(page):
        if step.name is not None:
            smaller = smaller.replace(step.text, f"# {step.name}\n{smaller_file(step.name, step.text)}")
    ran = tutorial.run(smaller, tmp_path, execute)
    outputs = {
        step.text.splitlines()[0]: ran[slice(*step.output)] for step in tutorial.steps(ran) if step.output is not None
    }
    assert all(outputs.values())
    # Nothing of the eight was touched, and one expert was made.
    before = outputs["find runs/eight -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"]
    assert outputs["ls runs/nine/experts"] == f"cluster-00008\n{before}"
    assert outputs["python domains.py runs/eight"].count("\n") <= 1 + 8
    # The ninth domain is there, and not where it has been taken away from the ensemble.
    assert outputs["cbtm run nine.yaml"].count("ensemble, all 9 experts") == 1
    assert "ensemble, all 8 experts" in outputs["cbtm evaluate nine.yaml --set 'evaluate.experts=[0,1,2,3,4,5,6,7]'"]
    averaged = outputs["cbtm average nine.yaml --set 'train.clusters=[0,8]' --set 'average.averages=[uniform]'"]
    assert averaged.endswith('"experts": [\n  0,\n  8\n ],\n "weights": [\n  0.5,\n  0.5\n ]\n')


def test_page_has_an_output_for_every_command_that_shows_one(tutorial):
    page = (DOCS / "tutorial.md").read_text()
    spans = [step.output for step in tutorial.steps(page) if step.output is not None]
    assert len(spans) > 10
    for span in spans:
        assert page[slice(*span)].strip(), (
            f"an output is empty: python docs/run_tutorial.py; {page[span[0] - 200 : span[0]]}"
        )


def test_block_that_is_neither_a_file_nor_a_command_is_refused(tutorial):
    with pytest.raises(SystemExit, match="a block of yaml does not begin with the name of its file"):
        list(tutorial.steps("```yaml\nroot: x\n```\n"))
