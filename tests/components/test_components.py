"""Every component through its python_func: the code that runs in a pod, with real artifacts on disk."""

import inspect
import json
import logging
from pathlib import Path

import pytest
from kfp import dsl
from small import settings, write_corpus

from cbtm import __version__
from components.assigner import assign_shards
from components.averager import average_experts
from components.clusterer import build_tokenizer, fit_clusterer
from components.evaluator import evaluate_ensembles
from components.planner import plan_run
from components.preflight import check_cluster, check_gpus
from components.scorer import score_expert
from components.trainer import train_expert

COMPONENTS = (
    check_cluster,
    check_gpus,
    plan_run,
    build_tokenizer,
    fit_clusterer,
    assign_shards,
    train_expert,
    score_expert,
    average_experts,
    evaluate_ensembles,
)


@pytest.fixture(autouse=True)
def _own_log_handlers():
    """A stage sets up logging for its whole process; give this one its handlers back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def artifact(folder: Path, kind: type[dsl.Artifact] = dsl.Artifact) -> dsl.Artifact:
    folder.mkdir(parents=True, exist_ok=True)
    return kind(name="out", uri=str(folder / "out"))


def test_components_run_one_after_the_other_and_hand_on_manifests(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    root = tmp_path / "run"
    given = json.dumps(settings(str(corpus), "runs/elsewhere", None) | {"average": {"averages": ["uniform"]}})

    place = {"root": str(root), "tracking_uri": "", "price_per_hour": "", "overrides": []}
    config = check_cluster.python_func(config=given, **place, compiled_by=__version__)
    check_gpus.python_func(config=config, gpu_count="1", compiled_by=__version__)

    groups, members = plan_run.python_func(config=config)
    assert groups == ["train-00000", "train-00001", "validation-00000"]
    assert members == ["dense", "cluster-00000", "cluster-00001", "random-00000", "random-00001"]

    tokenizer, clusterer = artifact(tmp_path / "tokenizer"), artifact(tmp_path / "clusterer")
    build_tokenizer.python_func(config=config, manifest=tokenizer)
    fit_clusterer.python_func(config=config, manifest=clusterer)
    assert tokenizer.metadata["vocab_size"] == 500
    assert json.loads(Path(clusterer.path).read_text()) == json.loads((root / "clusterer/manifest.json").read_text())
    assert clusterer.metadata["documents"] == 160

    for group in groups:
        made = artifact(tmp_path / group)
        assign_shards.python_func(config=config, group=group, manifest=made)
        assert made.metadata["documents"] == (40 if group.startswith("validation") else 80)

    for member in ("seed", *members):
        made = artifact(tmp_path / member, dsl.Model)
        train_expert.python_func(config=config, member=member, manifest=made)
        assert made.metadata["member"] == member
        scores = artifact(tmp_path / f"scores-{member}")
        score_expert.python_func(config=config, member=member, manifest=scores)
        assert scores.metadata["documents"] == 40

    averages = artifact(tmp_path / "averages")
    average_experts.python_func(config=config, manifests=averages)
    (scored,) = json.loads(Path(averages.path).read_text())
    assert scored["member"] == "average-uniform"

    made = artifact(tmp_path / "result")
    report, summary = artifact(tmp_path / "report", dsl.HTML), artifact(tmp_path / "summary", dsl.Markdown)
    metrics = artifact(tmp_path / "metrics", dsl.Metrics)
    evaluate_ensembles.python_func(config=config, manifest=made, report=report, summary=summary, metrics=metrics)
    result = json.loads((root / "result.json").read_text())
    assert metrics.metadata["dense"] == result["dense"]["perplexity"]
    assert Path(report.path).read_bytes() == (root / "report.html").read_bytes()
    assert Path(summary.path).read_text().startswith("# small\n")
    assert "| dense model |" in Path(summary.path).read_text()


def test_error_that_a_user_can_mend_ends_the_task_with_its_message(tmp_path, capsys):
    config = json.dumps(settings(str(tmp_path / "missing"), str(tmp_path / "run"), None))
    with pytest.raises(SystemExit) as ended:
        plan_run.python_func(config=config)
    assert ended.value.code == 2
    assert "error: no corpus files below" in capsys.readouterr().err


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_component_is_a_doorway(component):
    # A short body that imports cbtm: what a component decides is decided, and tested, in the library.
    source = inspect.getsource(component.python_func)
    body = source.split('"""')[2]
    statements = [
        line for line in body.splitlines() if line.strip() and not line.strip().startswith(("from ", "import "))
    ]
    assert len(statements) <= 15
    assert "from cbtm" in body


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_every_input_and_output_is_documented(component):
    documented = inspect.getdoc(component.python_func) or ""
    names = [*(component.component_spec.inputs or {}), *(component.component_spec.outputs or {})]
    assert names
    for name in names:
        assert f"{name}:" in documented, name
