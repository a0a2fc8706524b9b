import functools
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from small import settings, write_corpus

from cbtm import stages, storage
from cbtm.branch import source
from cbtm.branch.seed import ScratchModelConfig, create_model, load_model, save_model
from cbtm.branch.source import fetch_files, fetch_model, folder_digest, is_hub_name, list_names, pinned, source_digest
from cbtm.branch.tokenizer import TextTokenizer, fetch_tokenizer
from cbtm.errors import ConfigError, StorageError
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.train.member import Member

NAME = "some-org/tiny.model"


class Hub:
    """What a Hugging Face hub answers over HTTP, for repositories whose files are kept here.

    Attributes:
        files: Content of each file, by commit.
        branches: Commit of each branch of each repository.
        refused: Status and X-Error-Code of repositories that are not given out, and of single files of them.
        requests: Method and path of every request, in order.
        tokens: Every Authorization header.
        broken: Bytes after which the connection breaks, once for each file.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.broken: dict[str, int] = {}

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        return self.put(repository, content, branch)

    def put(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        shown = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())})
        commit = hashlib.sha1(f"{repository} {shown}".encode()).hexdigest()
        self.files[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        info = re.fullmatch(r"/api/models/(.+?)/revision/([^/]+)", path)
        tree = re.fullmatch(r"/api/models/(.+?)/tree/([^/?]+)(?:\?.*)?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        match = info or tree or file
        assert match is not None, path
        repository, revision = match[1], unquote(match[2])
        wanted = f"{repository}/{unquote(file[3])}" if file else repository
        for name in (repository, wanted):
            if name in self.refused:
                status, code = self.refused[name]
                return status, {"X-Error-Code": code}, b""
        if repository not in self.branches:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.branches[repository].get(revision, revision)
        if commit not in self.files:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.files[commit]
        if info:
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": siblings}).encode()
        if tree:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        assert file is not None
        data = files.get(unquote(file[3]))
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def _reply(self, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.hub.tokens.append(self.headers.get("Authorization"))
        status, headers, data = self.hub.answer(self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            n_bytes = self.hub.broken.pop(self.path.rpartition("/")[2], None)
            self.wfile.write(data[:n_bytes])
            self.close_connection = n_bytes is not None

    def do_GET(self) -> None:
        self._reply(body=True)

    def do_HEAD(self) -> None:
        self._reply(body=False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, over real sockets; HF_ENDPOINT points to it."""
    served = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, served))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    forget()
    yield served
    forget()
    server.shutdown()
    server.server_close()
    thread.join()


def forget() -> None:
    """What another process would not know."""
    source._snapshot.cache_clear()
    folder_digest.cache_clear()


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with its tokenizer, and files beside them that nobody needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("seed")
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    config = tmp_path_factory.mktemp("shape") / "config.json"
    config.write_text(json.dumps(shape))
    tokenizer = TextTokenizer.train(["the cat sat on the mat"], 300)
    model = create_model(
        ScratchModelConfig(config=str(config)), vocab_size=300, separator_id=tokenizer.separator_id, context_length=48
    )
    save_model(model, folder)
    tokenizer.save(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "consolidated.safetensors").write_bytes(b"the same again for other software")
    (folder / "onnx").mkdir()
    (folder / "onnx/model.safetensors").write_bytes(b"elsewhere")
    (folder / "README.md").write_text("# A model")
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize(
    "path",
    ["org/name", "org/name@main", "org/name@refs/pr/3", "facebook/opt-1.3b", "hf://gpt2", "hf://gpt2@v1", "hf://a/b@c"],
)
def test_names_of_the_hub(path):
    assert is_hub_name(path)


FOLDERS = ["gpt2", "models/", "models/seed/", "./models/seed", "../models/seed", "/models/seed", "~/seed", "a/b/c"]
FOLDERS += ["s3://bucket/name", "file:///models/seed", "org/name@", "org /name", ".cache/model"]


@pytest.mark.parametrize("path", FOLDERS)
def test_names_of_folders(path):
    assert not is_hub_name(path)


def test_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("models/seed")
    (tmp_path / "models/seed").mkdir(parents=True)
    assert not is_hub_name("models/seed")
    assert is_hub_name("hf://models/seed")  # the scheme decides in any case


@pytest.mark.parametrize("path", ["hf://", "hf://a/b/c", "hf://org/name@", "hf:///name"])
def test_scheme_before_what_can_be_no_repository_is_refused(path):
    with pytest.raises(ConfigError, match=rf"'{path}' names no repository; write hf://org/name or hf://org/name@rev"):
        is_hub_name(path)


def test_digest_is_the_commit_and_moves_with_the_revision(hub, seed):
    first = hub.push(NAME, seed)
    assert source_digest(NAME) == source_digest(f"{NAME}@main") == first
    assert hub.requests == [f"GET /api/models/{NAME}/revision/main"]  # asked once
    second = hub.put(NAME, {"config.json": b"{}"})
    assert source_digest(NAME) == first  # one answer for one process
    forget()
    assert source_digest(NAME) == second != first
    assert source_digest(f"{NAME}@{first}") == first


def test_a_commit_is_its_own_digest_without_a_request(hub):
    assert source_digest(f"hf://{NAME}@{'0' * 40}") == "0" * 40
    assert hub.requests == []


def test_pinned_name_says_the_commit_and_other_paths_stay(hub, seed):
    commit = hub.push(NAME, seed, branch="refs/pr/1")
    name = pinned(f"{NAME}@refs/pr/1")
    assert name == f"hf://{NAME}@{commit}"
    assert pinned(name) == name
    assert pinned("s3://bucket/model") == "s3://bucket/model"
    assert pinned(str(seed)) == str(seed)


def test_model_of_the_hub_is_fetched_without_what_is_no_part_of_it(hub, seed, tmp_path):
    hub.push(NAME, seed)
    fetch_model(NAME, tmp_path / "model")
    found = sorted(path.relative_to(tmp_path / "model").as_posix() for path in (tmp_path / "model").rglob("*"))
    assert found == ["config.json", "generation_config.json", "model.safetensors"]
    assert not [request for request in hub.requests if ".bin" in request or "consolidated" in request]
    opened, original = load_model(tmp_path / "model").state_dict(), load_model(seed).state_dict()
    assert all(torch.equal(opened[name], original[name]) for name in original)


def test_files_come_from_the_commit_though_the_branch_moves_on(hub, seed, tmp_path):
    commit = hub.push(NAME, seed)
    digest = source_digest(NAME)
    hub.put(NAME, {"config.json": b"{}", "model.safetensors": b"other"})
    fetch_model(NAME, tmp_path / "model")
    assert digest == commit
    assert (tmp_path / "model/model.safetensors").read_bytes() == (seed / "model.safetensors").read_bytes()


def test_connection_that_breaks_within_a_file_leaves_no_part_of_it(hub, seed, tmp_path):
    commit = hub.push(NAME, seed)
    data = (seed / "model.safetensors").read_bytes()
    hub.broken = {"model.safetensors": 1000}
    fetch_model(NAME, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == data
    assert hub.requests.count(f"GET /{NAME}/resolve/{commit}/model.safetensors") == 2


def test_download_goes_on_in_the_folder_of_an_interrupted_one(hub, seed, tmp_path):
    hub.push(NAME, seed)
    hub.refused[f"{NAME}/model.safetensors"] = 400, ""
    with pytest.raises(StorageError, match=f"answers 400 for hf://{NAME}@"):
        fetch_model(NAME, tmp_path / "model")
    hub.refused.clear()
    fetch_model(NAME, tmp_path / "model")
    assert load_model(tmp_path / "model").config.vocab_size == 300


def test_tokenizer_of_the_hub(hub, seed, tmp_path):
    hub.push(NAME, seed)
    tokenizer = fetch_tokenizer(NAME, tmp_path / "tokenizer")
    assert tokenizer.vocab_size == TextTokenizer.load(seed).vocab_size
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


def test_folder_and_bucket_give_the_same_model(root, seed, tmp_path):
    names = [file.path for file in storage.list_files(str(seed))]
    storage.upload(seed, root, names)
    assert list_names(root) == names
    fetch_model(root, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    before = source_digest(root)
    storage.write_bytes(storage.join(root, "config.json"), b"{}")
    forget()
    assert source_digest(root) != before


def test_empty_folder_has_no_digest(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} is empty or not there; expected a Hugging Face folder"):
        source_digest(str(tmp_path))


def test_unknown_repository_is_refused_as_folder_and_as_repository(hub):
    with pytest.raises(ConfigError, match=rf"^models/seed is neither a folder here nor a repository on {endpoint()} "):
        source_digest("models/seed")


def test_private_repository_looks_like_an_unknown_one(hub):
    hub.refused[NAME] = 401, ""
    with pytest.raises(
        ConfigError, match=rf"nor a repository on {endpoint()} that is open to everybody or to HF_TOKEN"
    ):
        source_digest(NAME)


def test_unknown_revision_is_named(hub, seed):
    hub.push(NAME, seed)
    with pytest.raises(ConfigError, match=rf"{NAME} on {endpoint()} has no revision 'v9'; name a branch, tag or comm"):
        source_digest(f"{NAME}@v9")


def test_gated_repository_says_where_to_accept_the_licence(hub, seed, tmp_path):
    # Such a repository is listed for everybody; its files are refused.
    hub.push(NAME, seed)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        hub.refused[f"{NAME}/{name}"] = 403, "GatedRepo"
    with pytest.raises(ConfigError, match=rf"{NAME} is gated: accept its licence on {endpoint()}/{NAME} and set HF_TO"):
        fetch_model(NAME, tmp_path)


def test_token_is_sent_and_one_that_may_not_read_is_refused(hub, seed):
    hub.push(NAME, seed)
    source_digest(NAME)
    assert hub.tokens == ["Bearer hf_secret"]
    forget()
    hub.refused[NAME] = 403, ""
    with pytest.raises(ConfigError, match=rf"{endpoint()} refuses {NAME} \(403\): check HF_TOKEN") as caught:
        source_digest(NAME)
    assert "hf_secret" not in str(caught.value)


def test_hub_out_of_order_is_the_operators_to_mend(hub, seed):
    hub.push(NAME, seed)
    hub.refused[NAME] = 500, ""
    with pytest.raises(StorageError, match=rf"{endpoint()} answers 500 for hf://{NAME}@main; run again later"):
        source_digest(NAME)


def test_repository_without_safetensors_is_refused(hub, tmp_path):
    hub.put(NAME, {"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    with pytest.raises(ConfigError, match=rf"the seed model {NAME} has no \*\.safetensors weights; pickled weights"):
        fetch_model(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_that_the_commit_lacks_is_named(hub, seed, tmp_path):
    commit = hub.push(NAME, seed)
    with pytest.raises(StorageError, match=f"{NAME} at commit {commit} has no merges.txt"):
        fetch_files(NAME, tmp_path, ["config.json", "merges.txt"])


def test_what_can_be_no_repository_is_refused_without_a_request(hub):
    with pytest.raises(ConfigError, match="'my--org/name' is no folder here and can be no repository of the hub"):
        source_digest("my--org/name")
    assert hub.requests == []


def test_hub_that_does_not_answer_is_named_with_the_alternative(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        forget()
        with pytest.raises(
            StorageError, match=rf"{NAME} is no folder here and cannot be fetched from {endpoint()}: .*"
        ):
            source_digest(NAME)
        with pytest.raises(StorageError, match="check the network and HF_ENDPOINT, or give a folder that holds it"):
            source_digest(NAME)


def test_offline_mode_asks_nobody(hub, seed):
    hub.push(NAME, seed)
    code = (
        "from cbtm.branch.source import source_digest\n"
        "from cbtm.errors import StorageError\n"
        f"try: source_digest('{NAME}')\n"
        "except StorageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.match(f"{NAME} is no folder here, and HF_HUB_OFFLINE keeps it from being fetched from", done.stdout)
    assert hub.requests == []


def test_a_run_takes_its_seed_from_the_commit_that_planning_found(hub, seed, tmp_path):
    commit = hub.push(NAME, seed)
    values = settings(str(write_corpus(tmp_path / "corpus")), str(tmp_path / "run"), None)
    values = {**values, "seed_model": {"path": NAME}, "tokenizer": {}}
    run = Run(parse_config(json.dumps(values)))
    stages.plan(run)
    assert json.loads(Path(run.uri("sources.json")).read_text()) == {NAME: f"hf://{NAME}@{commit}"}
    # The branch moves on while the run goes; another process does not know what this one heard.
    moved = hub.put(NAME, {**hub.files[commit], "model.safetensors": b"other"})
    forget()
    later = Run(parse_config(json.dumps(values)))
    assert stages.tokenizer(later).inputs == {"source": commit}
    made = stages.train(later, Member("seed"))
    assert made.inputs == {"source": commit}
    assert made.metadata["source"] == f"hf://{NAME}@{commit}"
    assert [file.path for file in made.files] == ["config.json", "generation_config.json", "model.safetensors"]
    assert (tmp_path / "run/seed/model.safetensors").read_bytes() == (seed / "model.safetensors").read_bytes()
    # Planning again finds the new commit, and with it another seed.
    forget()
    again = Run(parse_config(json.dumps(values)))
    stages.plan(again)
    assert again.train_spec(Member("seed")).inputs == {"source": moved}


def endpoint() -> str:
    return os.environ["HF_ENDPOINT"]
