"""The command line: single stages, corpora, and what a user reads when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient
from small import settings, write_config
from typer.testing import CliRunner

from cbtm import __version__, cli, local
from cbtm.corpora.folder import demo_corpus
from cbtm.errors import DataError
from cbtm.run import Run
from cbtm.run_config import load_config
from cbtm.stages.tracked import child, open_parent
from cbtm.tracking.ui import comparison_path

runner = CliRunner()


def cbtm(*arguments: str) -> str:
    result = runner.invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def command(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    start = [sys.executable, "-c", "from cbtm.cli import main; main()", *arguments]
    return subprocess.run(start, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_stages_one_by_one(corpus, tmp_path):
    config = str(write_config(tmp_path / "run.yaml", settings(str(corpus), str(tmp_path / "run"), None)))
    assert cbtm("plan", config).splitlines()[0].startswith("train-00000 files=1 bytes=")
    cbtm("tokenizer", config)
    cbtm("cluster", config, "--set", "cluster.n_clusters=2")
    cbtm("assign", config)
    cbtm("train", config, "--member", "seed")
    assert not (tmp_path / "run/experts").exists()
    cbtm("train", config)
    cbtm("score", config)
    table = cbtm("evaluate", config)
    for name in ("seed model", "dense model", "random clusters", "ensemble, all 2 experts", "ensemble, top-1"):
        assert name in table
    assert (tmp_path / "run/result.json").is_file()


def test_domains_are_compared_watched_and_taken_over(corpus, tmp_path):
    config = str(write_config(tmp_path / "run.yaml", settings(str(corpus), str(tmp_path / "run"), None)))
    table = cbtm("suggest-k", config, "--k", "2,3", "--repeats", "2", "--output", str(tmp_path / "k.json"))
    assert table.splitlines()[0].split() == ["k", "inertia", "greedy", "balance", "stability", "spread", "seconds"]
    assert [row["n_clusters"] for row in json.loads((tmp_path / "k.json").read_text())["candidates"]] == [2, 3]
    cbtm("cluster", config)
    clusterer = str(tmp_path / "run/clusterer")
    said = cbtm("drift", clusterer, str(corpus), "--split", "valid/small", "--output", str(tmp_path / "drift.json"))
    assert "40 new documents against 160 of the fit" in said
    assert json.loads((tmp_path / "drift.json").read_text())["documents"] == 40
    # A clusterer that is there already is taken over, and assigns alike.
    overrides = ("--set", f"root={tmp_path / 'second'}", "--set", f"cluster.path={clusterer}")
    for stage in ("plan", "tokenizer", "cluster", "assign"):
        cbtm(stage, config, *overrides)
        cbtm(stage, config)
    lines = [(tmp_path / root / "assignments/train/00000/text.jsonl").read_bytes() for root in ("run", "second")]
    assert lines[0] == lines[1]


def test_settings_are_printed_with_their_defaults(corpus, tmp_path):
    config = str(write_config(tmp_path / "run.yaml", settings(str(corpus), str(tmp_path / "run"), None)))
    printed = cbtm("config", config, "--set", "train.learning_rate=1e-4")
    assert "learning_rate: 0.0001" in printed
    assert "adam_epsilon: 1.0e-06" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cluster", "missing.yaml"), "cannot read the configuration missing.yaml"),
        (("cluster", "run.yaml", "--set", "cluster.n_cluster=3"), "did you mean 'n_clusters'"),
        (("train", "run.yaml", "--member", "expert-3"), "'expert-3' is no member of a run"),
        (("assign", "run.yaml"), "plan.json is not there"),
        (("run", "run.yaml", "--set", "root=/proc/cbtm"), "/proc/cbtm"),
        (("cluster", "run.yaml", "--set", "cluster.path=elsewhere"), "elsewhere is no clusterer folder"),
        (("cluster", "run.yaml", "--set", "cluster.device=cuda:7"), "device='cuda:7' cannot be used here"),
        (("cluster", "run.yaml", "--set", "cluster.assignments=given"), "text.jsonl has no fixed assignments"),
        (("suggest-k", "run.yaml", "--k", "two"), "--k two is no list of numbers"),
        (("drift", "run", "."), "run is no clusterer folder"),
        (("import-clusterer", "run.yaml", "kmeans.pkl", "out"), "kmeans.pkl cannot be read"),
        (("corpus", "download", "wikipedia", "out"), "unknown corpus 'wikipedia'; known is c4-example"),
    ],
)
def test_error_is_one_line_and_exit_code_2(corpus, tmp_path, arguments, message):
    write_config(tmp_path / "run.yaml", settings(str(corpus), "run", None))
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_help_and_version_load_no_heavy_package(tmp_path):
    code = (
        "import sys\nfrom cbtm.cli import main\nsys.argv = ['cbtm', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'mlflow', 'kfp', 'transformers', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert command("--version", cwd=tmp_path).stdout.strip() == __version__


def test_own_folder_of_text_becomes_a_corpus_with_a_validation_split(tmp_path):
    source = tmp_path / "notes"
    source.mkdir()
    for number in range(60):
        words = " ".join(f"word{number}x{place}" for place in range(80))
        (source / f"{number}.txt").write_text(f"Note number {number}. {words}\n")
    found = demo_corpus(source, tmp_path / "cache")
    assert (found.train_split, found.validation_split) == ("train", "valid")
    assert list((found.root / "train").rglob("*.jsonl"))
    assert list((found.root / "valid").rglob("*.jsonl"))
    again = demo_corpus(source, tmp_path / "cache")
    assert again == found


def test_folder_in_corpus_layout_is_used_where_it_lies(corpus, tmp_path):
    found = demo_corpus(corpus, tmp_path / "cache")
    assert (found.root, found.validation_split) == (corpus, "valid/small")
    assert not (tmp_path / "cache").exists()


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder; CORPUS takes a folder"):
        demo_corpus(tmp_path / "nowhere", tmp_path / "cache")


def test_ui_compares_the_children_of_the_run(corpus, tmp_path):
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    run = Run(load_config(write_config(tmp_path / "run.yaml", settings(str(corpus), str(tmp_path / "run"), tracking))))
    run.make_plan()
    open_parent(run)
    with pytest.raises(DataError, match="has no runs of this pipeline run"):
        comparison_path(run.config.tracking, run.key)
    with child(run, "dense", "dense") as tracker:
        tracker.log_metrics({"eval/perplexity": 10.0}, 1)
    with child(run, "cluster-00000", "expert") as tracker:
        tracker.log_metrics({"eval/perplexity": 12.0}, 1)
    path = comparison_path(run.config.tracking, run.key)
    assert path.startswith("/#/compare-runs?runs=%5B%22")
    assert "&experiments=%5B%22" in path
    assert len(json.loads(parse_qs(urlsplit(path[2:]).query)["runs"][0])) == 2
    with child(run, "ensemble", "ensemble") as tracker:
        tracker.log_metrics({"eval/perplexity": 8.0, "eval/bits_per_byte": 1.5}, 1)
    # From then on those that were measured whole are compared.
    compared = json.loads(parse_qs(urlsplit(comparison_path(run.config.tracking, run.key)[2:]).query)["runs"][0])
    client = MlflowClient(tracking)
    assert [client.get_run(one).info.run_name for one in compared] == ["small/ensemble"]


def test_progress_view_is_quiet_off_a_terminal_and_shows_warnings(caplog):
    caplog.set_level("INFO", logger="cbtm.local")
    view = local._View()
    view.show("progress task=train:seed steps=10/40 loss=3.1")
    view.show("some line of kfp")
    view.show("stage=seed root=/runs/x/seed files=7 done")
    view.show("warning: tracking server is away")
    assert [record.message for record in caplog.records] == [
        "stage=seed root=/runs/x/seed files=7 done",
        "warning: tracking server is away",
    ]


def test_reason_of_a_failure_is_the_tasks_own_message(tmp_path):
    log = tmp_path / "pipeline.log"
    log.write_text("stage=plan\n    error: the bucket is not there\nRuntimeError: Pipeline failed\n")
    assert local._reason(log) == "the bucket is not there"
