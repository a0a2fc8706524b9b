"""Credentials stay where they are given: a run against the servers of deploy/, and a look at all that it leaves.

All stages run in one process, set up as that of a pod, with the corpus and the results in the store, and MLflow behind
a server that remembers every request.
"""

import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from deployment import SECRET
from recorder import Recorded, recording
from small import settings, write_config, write_corpus

from cbtm import s3, storage

pytestmark = pytest.mark.slow  # a run takes 25 s, MLflow 10 to 25 s to start

ROOT = "s3://cbtm/team/runs/first"
PASSWORD = "password-of-the-tracking-server"
# In a pod of a run; each may be seen by the one that it is for.
HELD = {
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "HF_TOKEN": "hf_token-of-the-hub",
    "CBTM_KFP_TOKEN": "token-of-kubeflow-pipelines",
    "KF_PIPELINES_SA_TOKEN": "token-of-the-service-account",
    "DATABASE_PASSWORD": "password-of-something-else",
}


@dataclass
class Done:
    """A run that has ended: what it said, where it left files of this machine, and its requests to MLflow."""

    code: int
    output: str
    folder: Path
    tracking: Recorded


ALL_STAGES = """
import atexit, os, sys

written = set()

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.add(os.path.abspath(arguments[0]))

sys.addaudithook(note)
atexit.register(lambda: open("written", "w").write("\\n".join(written)))

from cbtm import stages
from cbtm.process import stage_process
from cbtm.run import Run
from cbtm.run_config import load_config

with stage_process():
    run = Run(load_config(sys.argv[1]))
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()
"""


def run_all(folder: Path, config: Path, changes: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run every stage; what is not published goes below `folder`, and logs are as long as they can be."""
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", ALL_STAGES, str(config)],
        cwd=folder,
        env={
            **os.environ,
            **HELD,
            "TMPDIR": str(scratch),
            "CBTM_LOG_LEVEL": "DEBUG",
            "PYTHONDONTWRITEBYTECODE": "1",
            **changes,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def pod(store: str) -> Iterator[pytest.MonkeyPatch]:
    """Variables with which this process and its children reach the store."""
    with pytest.MonkeyPatch.context() as variables:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_TOKEN"):
            variables.delenv(name, raising=False)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "cbtm",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": store,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "MLFLOW_TRACKING_USERNAME": "team",
        }.items():
            variables.setenv(name, value)
        s3.client.cache_clear()
        yield variables
        s3.client.cache_clear()


@pytest.fixture(scope="module")
def done(pod: pytest.MonkeyPatch, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A whole run with everything in the store."""
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder / "corpus")
    storage.upload(corpus, "s3://cbtm/corpora/small", [file.path for file in storage.list_files(str(corpus))])
    with recording(mlflow_server) as tracking:
        values = settings("s3://cbtm/corpora/small", ROOT, tracking.address)
        values["train"]["random_clusters"] = False
        ended = run_all(folder, write_config(folder / "run.yaml", values), {})
        yield Done(ended.returncode, ended.stdout, folder, tracking)


def forms(secret: str) -> list[bytes]:
    """A secret as it is, and as a header of HTTP would carry it."""
    return [secret.encode(), base64.b64encode(secret.encode())]


def found_in(data: bytes, names: Mapping[str, str] = HELD) -> list[str]:
    return [name for name, secret in names.items() if any(form in data for form in forms(secret))]


def test_the_search_finds_a_secret_in_plain_text_and_in_a_header():
    assert found_in(f"x{SECRET}y".encode()) == ["AWS_SECRET_ACCESS_KEY"]
    assert found_in(base64.b64encode(PASSWORD.encode())) == ["MLFLOW_TRACKING_PASSWORD"]


def test_the_run_has_succeeded_and_said_nothing_secret(done):
    assert done.code == 0, done.output
    assert f"stage=evaluate root={ROOT} files=" in done.output
    assert found_in(done.output.encode()) == []


def test_no_log_journal_or_work_file_holds_a_secret(done):
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in files}
    assert {".jsonl", ".yaml"} <= suffixes  # the journals of tracking, the configuration
    assert {str(path): found for path in files if (found := found_in(path.read_bytes()))} == {}


def test_nothing_in_the_store_holds_a_secret(done):
    paths = [file.path for file in storage.list_files("s3://cbtm")]
    for name in ("manifest.json", "config.json", "result.json", "report.html"):
        assert f"team/runs/first/{name}" in paths
    assert any(path.startswith("mlflow/") for path in paths)
    assert {path: found for path in paths if (found := found_in(storage.read_bytes(f"s3://cbtm/{path}")))} == {}


def test_a_run_writes_below_its_root_and_nowhere_else(done):
    own = ("corpora/small/", "mlflow/", "team/runs/first/")  # what the fixtures and MLflow's server have put there
    others = [file.path for file in storage.list_files("s3://cbtm") if not file.path.startswith(own)]
    assert [path for path in others if not path.startswith("runs/")] == []  # other tests of this module's store
    written = (done.folder / "written").read_text().splitlines()
    assert len(written) > 20
    allowed = (f"{done.folder}/tmp/", f"{done.folder}/written", "/dev/null")
    assert [path for path in written if not path.startswith(allowed)] == []


def test_the_tracking_server_gets_its_own_credential_and_no_other(done):
    requests = done.tracking.requests
    assert len(requests) > 20
    kinds = {line.split()[1].partition("?")[0] for line, _, _ in requests}
    assert any(kind.endswith("/runs/log-batch") for kind in kinds)
    assert any("mlflow-artifacts/artifacts" in kind for kind in kinds)
    expected = "Basic " + base64.b64encode(f"team:{PASSWORD}".encode()).decode()
    others = {name: secret for name, secret in HELD.items() if name != "MLFLOW_TRACKING_PASSWORD"}
    for line, headers, body in requests:
        assert headers.pop("Authorization") == expected
        sent = "\n".join([line, *(f"{name}: {value}" for name, value in headers.items())]).encode() + body
        assert found_in(sent, others) == []
        assert PASSWORD.encode() not in sent
        assert re.search(rb"x-amz-|AWS4-HMAC|serviceaccount", sent, re.IGNORECASE) is None


FAILURES = [
    (
        "wrong secret",
        {"AWS_SECRET_ACCESS_KEY": "another-secret-value"},
        "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
    ),
    ("unknown key", {"AWS_ACCESS_KEY_ID": "nobody"}, "the access key is unknown to the store"),
    ("no store", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the object store does not answer"),
]


@pytest.mark.parametrize(("name", "changes", "message"), FAILURES, ids=[one[0] for one in FAILURES])
def test_a_call_that_fails_says_what_is_wrong_and_no_secret(done, tmp_path, name, changes, message):
    ended = run_all(tmp_path, done.folder / "run.yaml", changes)
    assert ended.returncode == 2
    assert message in ended.stdout
    left = ended.stdout.encode() + b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert found_in(left, {**HELD, **changes, "AWS_ACCESS_KEY_ID": "\0", "AWS_ENDPOINT_URL": "\0"}) == []


def test_a_traceback_of_a_defect_shows_no_values(pod, tmp_path):
    """A defect of cbtm in the middle of a call to the store, with the secret in the variables of the frames."""
    script = (
        "import os\n"
        "from cbtm import s3, storage\n"
        "from cbtm.cli import main\n"
        "def broken(attempts):\n"
        "    secret = os.environ['AWS_SECRET_ACCESS_KEY']\n"
        "    return {}[len(secret)]\n"
        "s3.client = broken\n"
        "main()\n"
    )
    config = write_config(tmp_path / "run.yaml", settings("s3://cbtm/corpora/small", ROOT, None))
    ended = subprocess.run(
        [sys.executable, "-c", script, "plan", str(config)],
        env={**os.environ, **HELD},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    assert found_in((ended.stdout + ended.stderr).encode()) == []
