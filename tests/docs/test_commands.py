"""Every command in a shell block of README, CONTRIBUTING and docs/ is run, in a folder that has what it names.

Commands of cbtm run in this process, against an S3 server, an API server of Kubeflow Pipelines and MLflow's database.
Two things are other than for a reader: `cbtm run` and `cbtm demo` do the tasks of the pipeline one after the other in
this process (tests/integration/test_pipeline.py has the pipeline itself), and the server behind `cbtm ui` is started
by one command only. The tables below have what is not run, with its reason, and what is run with another value; an
entry that is no longer in the pages is an error.

A page whose commands another test runs says so: "`tests/….py` runs the same commands".
"""

import functools
import http.server
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import documented_workspace as made
import pytest
from kubeflow_server import KubeflowServer, item, kubeflow_server, node, pod_tasks
from servers import free_ports, status
from shell_blocks import NAMES, PROJECT, Line, fenced, shell_blocks
from typer.testing import CliRunner

from cbtm import cli, local, stages
from cbtm.corpora import download, sample
from cbtm.kubeflow import following
from cbtm.run import Run
from cbtm.stages import result
from cbtm.tracking import ui

NOT_RUN = {
    "make test": "runs these tests",
    "make check": "runs these tests; .ci/run takes its parts one by one",
    "make test-containers": "minutes in a container engine; .ci/run ends with it",
    "make images": "needs a container engine; tests/containers builds with the same script",
    "BASE=registry.example.org/python:3.11 make images": "needs a container engine and that registry",
    "make release-check": "builds and installs the wheel; .ci/run has it",
    "make release-check RELEASE=1": "the same, on a commit that is to be tagged",
    "make compare": "many runs; tests/integration/test_comparison.py has a small one",
    "make compare CORPUS=path/to/folder": "many runs, as above",
    "cbtm compare my.yaml": "many runs, as above",
    "images/pin": "needs buildx and Docker Hub",
    "make compile": "would write into the checkout; .ci/run has make compile-check",
    ".venv/bin/python -m pytest tests/cluster/test_kmeans.py -k remainder": "is part of these tests",
    ".venv/bin/pre-commit install": "would write into the checkout's .git",
    "pip install '.[pipelines]'": "would install into this environment; .ci/wheel installs the wheel elsewhere",
    "kubectl create secret generic cbtm-s3 --from-env-file=s3.env": "needs a cluster",
    "kubectl apply -k deploy/overlays/development": "needs a cluster; tests/deploy renders and checks every overlay",
    "kubectl -n kubeflow rollout status deployment/mlflow deployment/seaweedfs": "needs a cluster",
    "kubectl -n kubeflow create secret generic cbtm-s3 --from-literal=AWS_ENDPOINT_URL=https://s3.example.com "
    "--from-literal=AWS_DEFAULT_REGION=eu-central-1": "needs a cluster",
    "kubectl -n kubeflow port-forward service/seaweedfs 8333 &": "needs a cluster",
    "kubectl -n kubeflow port-forward service/mlflow 5000 &": "needs a cluster",
    "aws s3 sync corpora/texts s3://cbtm/corpora/texts": "needs the AWS command line; the test's bucket has it",
    "docker compose -f deploy/compose.yaml up --detach --wait": "needs an engine; tests/deploy starts the same servers",
}
"""Commands that are not run, and why."""

PYTHON_NOT_RUN = {'from_pretrained("facebook/opt-125m")': "needs the model hub"}
"""What Python is not run, by something that is in it, and why."""

PYTHON_AT = {"docs/formats.md": "runs/demo"}
"""Folder of the workspace in which a page's Python is run, where it is another."""

BY_BASH = ("cp ", "chmod ", "set -a")
"""Commands of the shell itself that are run by it."""

REPLACED = {
    "5f0c7d8e-…": "5f0c7d8e-0000",
    "RUN": "run-of-the-page",
    "train.steps=2000": "train.steps=4",
    "https://kubeflow.example.com/pipeline": "{kubeflow}",
    "tracking.uri=http://127.0.0.1:5000": "tracking.uri=sqlite:///runs/mlflow.db",
    "5001": "{port}",
}
"""Words of commands that are given otherwise; {…} is an address of this test."""

SETS = {
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_DEFAULT_REGION",
    "KF_PIPELINES_ENDPOINT",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_EXPERIMENT_NAME",
}
"""Variables that pages export. Stores and servers of this test stand behind them."""

BLOCKS = shell_blocks()


def elsewhere(page: str) -> str | None:
    """The test that runs the commands of a page, where it is not this one."""
    found = re.search(r"`(tests/\S+\.py)`\s+runs\s+the\s+same\s+commands", (PROJECT / page).read_text(encoding="utf-8"))
    return found[1] if found else None


HERE = [block for block in BLOCKS if elsewhere(block.page) is None]
PYTHON = [
    (page, number, content)
    for page in NAMES
    if elsewhere(page) is None
    for number, language, content in fenced(page)
    if language == "python"
]


# --- the servers, and what is other than for a reader ---


def run_in_process(run: Run) -> None:
    """What the compiled pipeline does, without kfp."""
    if stages.finished(run):
        return
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()


@pytest.fixture(scope="module")
def kubeflow() -> Iterator[KubeflowServer]:
    with kubeflow_server() as running:
        yield running


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_ins(monkeypatch, folder)
        return made.make_workspace(folder, cbtm)


def stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in (*SETS, "CBTM_KFP_TOKEN", "CBTM_KFP_COOKIES", "KF_PIPELINES_UI_ENDPOINT", "DISPLAY"):
        if not name.startswith("AWS_"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))  # kfp reads a context from there
    monkeypatch.setattr(local, "run_pipeline", run_in_process)
    small = functools.partial(
        sample.gather_sample, search_paths=[str(folder / "site-packages")], max_per_kind=150, min_kinds=2
    )
    monkeypatch.setattr(sample, "gather_sample", small)
    monkeypatch.setattr(following, "_POLL_SECONDS", 0.01)


def cbtm(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, f"cbtm {shlex.join(arguments)}: {result.output}"
    return result.output


class Reader:
    """Runs the lines of a block as a reader would: with a working directory and variables that stay."""

    def __init__(self, folder: Path, kubeflow: KubeflowServer, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.kubeflow, self.s3, self.monkeypatch = folder, kubeflow, s3, monkeypatch
        self.at = folder

    def follow(self, line: Line) -> None:
        if line.text in NOT_RUN:
            return
        if line.text.startswith(BY_BASH):
            self._by_bash(line.text)
        elif line.text.startswith("export "):
            self._export(line.text)
        elif line.words[0] == "make":
            self._make(line.words[1:])
        else:
            assert line.words[0] == "cbtm", f"{line}: run it here, or give the reason in NOT_RUN"
            self._cbtm(line.words[1:])

    def _by_bash(self, text: str) -> None:
        script = f"set -e; {text}; pwd"
        done = subprocess.run(["bash", "-c", script], cwd=self.at, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, f"{text}: {done.stderr}"
        self.at = Path(done.stdout.splitlines()[-1])

    def _export(self, text: str) -> None:
        for word in shlex.split(text)[1:]:
            assert word.partition("=")[0] in SETS, f"{text}: {word} is new; give this test a server for it, and SETS"

    def _make(self, arguments: list[str]) -> None:
        """Run the commands of cbtm that make would run."""
        ready = self.folder / "venv/.ready"  # newer than what it depends on: nothing is to be installed
        ready.parent.mkdir(exist_ok=True)
        ready.touch()
        make = ["make", "-C", str(PROJECT), f"VENV={ready.parent}", *arguments]
        if arguments == ["help"]:
            assert "demo\t" in subprocess.run(make, capture_output=True, text=True, check=True, timeout=20).stdout
            return
        dry = subprocess.run([*make, "--dry-run"], capture_output=True, text=True, check=True, timeout=20).stdout
        recipe = [line for line in dry.splitlines() if not line.startswith("make")]
        assert recipe, dry
        for line in recipe:
            words = shlex.split(line)
            assert words[0] == f"{ready.parent}/bin/cbtm", f"{line}: neither run here nor in NOT_RUN"
            self._cbtm(words[1:])

    def _cbtm(self, arguments: list[str]) -> None:
        words = [self._replaced(word) for word in arguments]
        for command, prepare in PREPARED.items():
            if shlex.join(words).startswith(command):
                prepare(self)
        if words[0] == "demo":
            # k of a page goes before ours; a root of its own is a second run, which two clusters are enough for.
            several = [] if "runs/demo" in words else ["--set", "cluster.n_clusters=2"]
            words = [*words[:1], *made.overrides(made.DEMO), *several, *words[1:]]
        if words[0] == "generate" and "--max-new-tokens" not in words:
            words += ["--max-new-tokens", "8"]
        if words[0] == "ui":
            self._ui(words)
        else:
            cbtm(*words)

    def _replaced(self, word: str) -> str:
        (port,) = free_ports(1)
        return REPLACED.get(word, word).format(kubeflow=self.kubeflow.host, port=port) if word in REPLACED else word

    def _ui(self, words: list[str]) -> None:
        """Open the comparison and end it by Ctrl-C once the server answers, or would be started."""
        (port,) = free_ports(1)
        started: list[list[str]] = []

        def serve(command: list[str], **options: Any) -> None:
            started.append(command)
            if words == ["ui", "--root", "runs/demo", "--port", "5000"]:
                del options["check"]
                _start_and_stop(command, port, **options)
            raise KeyboardInterrupt

        self.monkeypatch.setattr(ui, "subprocess", type("Stand", (), {"run": staticmethod(serve)}))
        said = cbtm(*words, "--port", str(port))
        assert re.search(rf"comparison: http://127\.0\.0\.1:{port}/#/compare-runs\?runs=%5B%22", said), said
        assert said.endswith("stopped\n")
        assert started[0][-5:-2] == ["127.0.0.1", "--port", str(port)]


def _start_and_stop(command: list[str], port: int, **options: Any) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        for _ in range(600):
            if status(f"http://127.0.0.1:{port}/health") == 200:
                return
            assert process.poll() is None
            threading.Event().wait(0.2)
        raise AssertionError("the server did not start")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


# --- what has to be there before a command ---


def run_of_my_own(reader: Reader) -> None:
    """The run in runs/mine, of all experts."""
    if not (reader.folder / "runs/mine/result.json").exists():
        made.write_configurations(reader.folder, "docs/usage.md")
        cbtm("run", "mine.yaml")


def buckets(reader: Reader) -> None:
    """The buckets that pages name, with the text and the seed model of their configurations."""
    if "cbtm" in {bucket["Name"] for bucket in reader.s3.list_buckets()["Buckets"]}:
        return
    for bucket in ("bucket", "cbtm", "data", "models"):
        reader.s3.create_bucket(Bucket=bucket)
    made.upload(reader.s3, reader.folder / "data/mine", "data", "mine")
    made.upload(reader.s3, reader.folder / "data/mine", "cbtm", "corpora/texts")
    made.upload(reader.s3, reader.folder / "models/seed", "cbtm", "models/seed")


def run_in_s3(reader: Reader) -> None:
    """The run in s3://models/cbtm/mine, as the page's own command makes it."""
    buckets(reader)
    made.write_configurations(reader.folder, "docs/usage.md")
    cbtm("run", "mine.yaml", "--set", "root=s3://models/cbtm/mine", "--set", "corpus.root=s3://data/mine")


def run_of_operations(reader: Reader) -> None:
    """The run of docs/operations.md, of two clusters."""
    buckets(reader)
    cbtm("run", "run.yaml", "--set", "tracking.uri=sqlite:///runs/mlflow.db")


def once(path: str, make: Callable[[Path], None]) -> Callable[[Reader], None]:
    def prepare(reader: Reader) -> None:
        if not (reader.folder / path).exists():
            make(reader.folder)

    return prepare


def checkpoint_of_a_training(reader: Reader) -> None:
    made.leave_checkpoint(reader.folder)


def serve_the_archive(reader: Reader) -> None:
    """An HTTP server with the archive of c4-example; it ends with the test's process."""
    content = made.c4_archive(reader.folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == f"/{download.ARCHIVE_NAME}"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reader.monkeypatch.setattr(download, "BASE_URL", f"http://127.0.0.1:{server.server_port}")


def runs_on_kubeflow(reader: Reader) -> None:
    """A run of each id of the pages: all experts trained, and one that failed."""
    server = reader.kubeflow
    if not server.runs:
        made.write_configurations(reader.folder, "docs/operations.md")
        cbtm("submit", "run.yaml", "--host", server.host, "--set", "cluster.n_clusters=8")
        [first] = server.runs.values()
        server.runs |= dict.fromkeys((REPLACED["5f0c7d8e-…"], REPLACED["RUN"]), first)
    trained = [one for number in range(9) for one in pod_tasks(f"{item('experts', number)}.train-expert", "SUCCEEDED")]
    server.stages = [("SUCCEEDED", [*pod_tasks("root.plan-run", "SUCCEEDED"), *trained])]
    workflow, number = node(f"{item('experts', 4)}.train-expert.executor(0)").rsplit("-", 1)
    server.logs[f"{workflow}-retry-system-container-impl-{number}"] = "step=4\n"
    reader.monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.host)


def failed_run_on_kubeflow(reader: Reader) -> None:
    runs_on_kubeflow(reader)
    reader.kubeflow.stages.insert(0, ("FAILED", pod_tasks("root.plan-run", "FAILED")))


PREPARED: dict[str, Callable[[Reader], None]] = {
    **dict.fromkeys(
        ("train mine", "extend", "evaluate mine", "average mine", "score mine", "assign mine"), run_of_my_own
    ),
    **dict.fromkeys(("run mine.yaml --set root=s3", "generate 'def read(path):' --root s3"), run_in_s3),
    **dict.fromkeys(("drift", "ui m", "tracking replay mine"), run_of_my_own),
    "ui run": run_of_operations,
    "run run.yaml --set root=s3": buckets,
    "consolidate": checkpoint_of_a_training,
    "import-metaseq": once("checkpoints/opt-1.3b", made.write_metaseq),
    "import-clusterer": once("tfidf.pkl", made.write_pickles),
    "corpus download": serve_the_archive,
    **dict.fromkeys(("submit", "status", "logs"), runs_on_kubeflow),
    "retry": failed_run_on_kubeflow,
}
"""Beginnings of commands, and what each needs to be there."""


# --- the tests ---


@pytest.mark.parametrize("block", HERE, ids=str)
def test_the_commands_of_a_block_run(block, workspace, kubeflow, bucket, s3_server, monkeypatch):
    stand_ins(monkeypatch, workspace)
    # Figures take a second each time; the demo's report, which the workspace begins with, has them.
    monkeypatch.setattr(result, "render_report", lambda made, _: f"<p>{made['run']['name']}</p>")
    reader = Reader(workspace, kubeflow, s3_server[1], monkeypatch)
    made.write_configurations(workspace, block.page)
    for line in block.lines:
        reader.follow(line)


@pytest.mark.parametrize(("page", "number", "content"), PYTHON, ids=[f"{page}:{number}" for page, number, _ in PYTHON])
def test_the_python_of_a_page_runs(page, number, content, workspace, monkeypatch):
    if any(text in content for text in PYTHON_NOT_RUN):
        return
    stand_ins(monkeypatch, workspace)
    made.write_configurations(workspace, "docs/configuration.md" if page == "CONTRIBUTING.md" else page)
    monkeypatch.chdir(workspace / PYTHON_AT.get(page, "."))
    exec(compile(content, f"{page}:{number}", "exec"), {"__name__": "__main__"})


def test_every_entry_of_the_tables_is_in_the_pages():
    for text in PYTHON_NOT_RUN:
        assert any(text in content for *_, content in PYTHON), text
    assert PYTHON_AT.keys() <= {page for page, *_ in PYTHON}
    lines = [line for block in HERE for line in block.lines]
    texts = {line.text for line in lines}
    assert [text for text in NOT_RUN if text not in texts] == []
    words = {word for line in lines for word in shlex.split(line.text.removesuffix("&"))}
    assert [word for word in REPLACED if not any(word in have for have in words)] == []
    exported = {word.partition("=")[0] for line in lines if "export" in line.text for word in shlex.split(line.text)}
    assert [name for name in SETS if name not in exported] == []
    assert [begin for begin in BY_BASH if not any(text.startswith(begin) for text in texts)] == []
    assert [page for page in made.CONFIGURATIONS if page not in {block.page for block in HERE}] == []
    commands = [shlex.join(line.words[1:]) for line in lines if line.words[0] == "cbtm"]
    assert [begin for begin in PREPARED if not any(command.startswith(begin) for command in commands)] == []


def test_a_page_that_names_the_test_of_its_commands_is_named_there():
    for page in {block.page for block in BLOCKS}:
        test = elsewhere(page)
        if test is not None:
            assert (PROJECT / test).is_file(), f"{page} names {test}, which is not there"
            assert Path(page).stem in (PROJECT / test).read_text(encoding="utf-8"), f"{test} does not name {page}"
