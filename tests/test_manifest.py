"""Manifests: when a stage works again, what a kill leaves, and what is never taken for whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cbtm import manifest as manifests
from cbtm import storage
from cbtm.errors import ManifestError, StorageError
from cbtm.manifest import FileEntry, Manifest, StageSpec, run_stage


def spec_of(root: str, **changes: Any) -> StageSpec:
    return replace(StageSpec("stage", root, "config-1", {"corpus": "c1"}), **changes)


class Build:
    """A build that writes `files` and counts how often it is called."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = {"a.bin": b"aaa", "deep/b.bin": b"bb"} if files is None else files
        self.calls = 0

    def __call__(self, work: Path) -> dict[str, Any]:
        self.calls += 1
        for path, data in self.files.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_bytes(data)
        return {"documents": 7, "call": self.calls}


def published(root: str) -> dict[str, bytes]:
    """Files below a root, without locks and work folders."""
    paths = [file.path for file in storage.list_files(root) if not file.path.startswith(".cbtm/")]
    return {path: storage.read_bytes(storage.join(root, path)) for path in paths}


def data_files(root: str) -> dict[str, bytes]:
    return {path: data for path, data in published(root).items() if path != "manifest.json"}


# --- what a stage leaves ---


def test_a_stage_leaves_its_files_and_a_manifest_that_says_what_they_are(root: str):
    made = run_stage(spec_of(root), Build())
    assert data_files(root) == {"a.bin": b"aaa", "deep/b.bin": b"bb"}
    assert (made.stage, made.config_digest, made.inputs) == ("stage", "config-1", {"corpus": "c1"})
    assert [(entry.path, entry.size) for entry in made.files] == [("a.bin", 3), ("deep/b.bin", 2)]
    # sha256 of "aaa"
    assert made.files[0].sha256 == "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"
    assert made.metadata | {"seconds": 0} == {"documents": 7, "call": 1, "seconds": 0}
    assert 0 <= made.metadata["seconds"] < 10
    assert manifests.load(spec_of(root).manifest_uri) == made


def test_no_work_folder_is_left_behind(root: str, tmp_path: Path):
    run_stage(spec_of(root), Build())
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name in {"key.json", "a.bin"}]
    assert [path for path in left if "work" in path.parts] == []


def test_the_manifest_is_written_when_all_files_are_there(root: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    write = storage.write_bytes

    def watch(uri: str, data: bytes) -> None:
        if uri.endswith("manifest.json"):
            seen.append(data_files(root))
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", watch)
    run_stage(spec_of(root), Build())
    assert seen == [{"a.bin": b"aaa", "deep/b.bin": b"bb"}]


def test_the_old_manifest_is_gone_before_a_file_is_replaced(root: str, monkeypatch: pytest.MonkeyPatch):
    run_stage(spec_of(root), Build())
    seen = []
    module, name = (storage, "upload") if storage.is_s3(root) else (manifests, "_move")
    move: Callable[..., None] = getattr(module, name)

    def watch(*arguments: Any) -> None:
        seen.append(storage.exists(spec_of(root).manifest_uri))
        move(*arguments)

    monkeypatch.setattr(module, name, watch)
    run_stage(spec_of(root, config_digest="config-2"), Build())
    assert seen == [False]


# --- when it works again ---


def test_a_finished_stage_does_not_build_again(root: str):
    build = Build()
    first = run_stage(spec_of(root), build)
    assert run_stage(spec_of(root), build) == first
    assert build.calls == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"config_digest": "config-2"},
        {"inputs": {"corpus": "c2"}},
        {"inputs": {"corpus": "c1", "seed": "s"}},
        {"inputs": {}},
        {"stage": "other"},
    ],
)
def test_another_configuration_or_input_builds_again(tmp_path: Path, changes: dict[str, Any]):
    build = Build()
    run_stage(spec_of(str(tmp_path)), build)
    again = run_stage(spec_of(str(tmp_path), **changes), build)
    assert build.calls == 2
    assert manifests.load(spec_of(str(tmp_path)).manifest_uri) == again


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_damaged_file_builds_again(root: str, damage: str):
    build = Build()
    run_stage(spec_of(root), build)
    if damage == "missing":
        storage.delete(root, ["deep/b.bin"])
    else:
        storage.write_bytes(storage.join(root, "deep/b.bin"), b"b" if damage == "truncated" else b"bbb")
    run_stage(spec_of(root), build)
    assert build.calls == 2
    assert data_files(root) == {"a.bin": b"aaa", "deep/b.bin": b"bb"}


def test_a_missing_manifest_builds_again(root: str):
    build = Build()
    run_stage(spec_of(root), build)
    storage.delete(root, ["manifest.json"])
    run_stage(spec_of(root), build)
    assert build.calls == 2


def test_files_that_the_new_output_lacks_are_removed(root: str):
    run_stage(spec_of(root), Build({"a": b"1", "old/b": b"2"}))
    storage.write_bytes(storage.join(root, "not-of-this-stage"), b"3")
    run_stage(spec_of(root, config_digest="config-2"), Build({"a": b"4", "new/c": b"5"}))
    assert data_files(root) == {"a": b"4", "new/c": b"5", "not-of-this-stage": b"3"}


def test_two_manifests_share_a_root_and_leave_each_other_alone(root: str):
    one, two = spec_of(root, manifest_name="m/one.json"), spec_of(root, manifest_name="m/two.json")
    build_one, build_two = Build({"tokens/one": b"1"}), Build({"tokens/two": b"2"})
    run_stage(one, build_one)
    run_stage(two, build_two)
    run_stage(replace(one, config_digest="config-2"), Build({"tokens/uno": b"3"}))
    run_stage(two, build_two)
    assert build_two.calls == 1
    assert sorted(published(root)) == ["m/one.json", "m/two.json", "tokens/two", "tokens/uno"]


# --- what a failure leaves ---


def test_a_build_that_fails_leaves_no_manifest_and_goes_on_from_its_files(root: str):
    def fail(work: Path) -> dict[str, Any]:
        (work / "step-1").write_bytes(b"1")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_stage(spec_of(root), fail)
    assert published(root) == {}

    def go_on(work: Path) -> dict[str, Any]:
        assert (work / "step-1").read_bytes() == b"1"
        (work / "step-2").write_bytes(b"2")
        return {}

    run_stage(spec_of(root), go_on)
    assert data_files(root) == {"step-1": b"1", "step-2": b"2"}


@pytest.mark.parametrize("changes", [{"config_digest": "config-2"}, {"inputs": {"corpus": "c2"}}])
def test_other_work_does_not_see_the_files_of_a_build_that_failed(root: str, changes: dict[str, Any]):
    def fail(work: Path) -> dict[str, Any]:
        (work / "step-1").write_bytes(b"1")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_stage(spec_of(root), fail)
    run_stage(spec_of(root, **changes), Build({"a": b"1"}))
    assert data_files(root) == {"a": b"1"}


def test_a_build_that_fails_leaves_the_old_output_as_it_was(root: str):
    first = run_stage(spec_of(root), Build())

    def fail(work: Path) -> dict[str, Any]:
        (work / "a.bin").write_bytes(b"new")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_stage(spec_of(root, config_digest="config-2"), fail)
    assert manifests.load(spec_of(root).manifest_uri) == first
    assert data_files(root) == {"a.bin": b"aaa", "deep/b.bin": b"bb"}


def test_metadata_that_json_cannot_hold_fails_before_the_old_output_is_touched(root: str):
    first = run_stage(spec_of(root), Build())
    with pytest.raises(ValueError, match="serialize"):
        run_stage(spec_of(root, config_digest="config-2"), lambda _: {"lock": threading.Lock()})
    assert manifests.load(spec_of(root).manifest_uri) == first


def test_a_write_that_was_cut_short_in_the_work_folder_is_not_published(tmp_path: Path):
    def build(work: Path) -> dict[str, Any]:
        storage.write_bytes(str(work / "a"), b"1")
        (work / f"{storage._UNFINISHED}0123").write_bytes(b"half")
        return {}

    made = run_stage(spec_of(str(tmp_path)), build)
    assert made.paths() == ["a"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("No space left on device")])
def test_a_full_disk_in_a_build_is_named_with_the_remedy(tmp_path: Path, error: Exception):
    def build(work: Path) -> dict[str, Any]:
        raise error

    with pytest.raises(StorageError, match=f"no space left on the disk that holds {tmp_path}.*; free some"):
        run_stage(spec_of(str(tmp_path)), build)


def test_a_disk_that_refuses_a_write_is_told_from_other_errors(tmp_path: Path):
    def write_full(work: Path) -> dict[str, Any]:
        with open("/dev/full", "wb") as file:
            file.write(b"x")
        return {}

    with pytest.raises(StorageError, match="no space left"):
        run_stage(spec_of(str(tmp_path)), write_full)
    with pytest.raises(ZeroDivisionError):
        run_stage(spec_of(str(tmp_path)), lambda _: {"x": 1 / 0})


def test_a_root_below_a_file_is_an_error_that_names_the_place(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot write below {tmp_path}/file/.*Not a directory"):
        run_stage(spec_of(f"{tmp_path}/file/run"), Build())


# --- processes ---

SCRIPT = """
import logging, os, signal, sys, time
from pathlib import Path
from cbtm import manifest as manifests, storage
from cbtm.manifest import StageSpec, run_stage

logging.basicConfig(level="INFO", format="%(message)s")
root, folder, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

def build(work):
    with open(folder / "builds", "a") as file:
        file.write(f"{sorted(path.name for path in work.iterdir())}\\n")
    (work / "a.bin").write_bytes(b"aaa")
    if mode == "die while building":
        die()
    (work / "b.bin").write_bytes(b"bb")
    if mode == "wait":
        (folder / "building").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
    return {}

if mode == "die while publishing":
    if storage.is_s3(root):
        upload = storage.upload
        storage.upload = lambda local, uri, paths: (upload(local, uri, paths[:1]), die())
    else:
        manifests._move = lambda work, root, paths: (os.replace(work / paths[0], root / paths[0]), die())
if mode == "die before the manifest":
    write = storage.write_bytes
    storage.write_bytes = lambda uri, data: die() if uri.endswith("manifest.json") else write(uri, data)
made = run_stage(StageSpec("stage", root, "config-2", {"corpus": "c1"}), build)
print(made.digest)
"""


def start(root: str, folder: Path, mode: str) -> "subprocess.Popen[str]":
    (folder / "stage.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "stage.py"), root, str(folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["die while building", "die while publishing", "die before the manifest"])
def test_a_killed_stage_is_not_taken_for_whole_and_the_next_run_completes_it(root: str, tmp_path: Path, moment: str):
    old = run_stage(spec_of(root), Build())
    killed = start(root, tmp_path, moment)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = manifests.load_if_there(spec_of(root).manifest_uri)
    if moment == "die while building":
        assert left == old  # and whole, as the old output is
        assert manifests.is_current(spec_of(root), left)
    else:
        assert left is None

    second = start(root, tmp_path, "run")
    printed, _ = second.communicate()
    assert data_files(root) == {"a.bin": b"aaa", "b.bin": b"bb"}
    assert printed.strip() == manifests.load(spec_of(root).manifest_uri).digest
    assert len((tmp_path / "builds").read_text().splitlines()) == 2
    if moment == "die while building":
        assert (tmp_path / "builds").read_text().splitlines() == ["[]", "['a.bin']"]  # it went on from its file


def test_of_two_processes_that_build_one_output_the_second_waits_and_builds_nothing(root: str, tmp_path: Path):
    first = start(root, tmp_path, "wait")
    while not (tmp_path / "building").exists():
        assert first.poll() is None, first.communicate()
    second = start(root, tmp_path, "wait")
    assert second.stderr is not None
    waiting = second.stderr.readline()
    assert waiting == f"stage=stage root={root} waiting for another process that builds it\n"
    (tmp_path / "go").touch()
    digests = [process.communicate()[0] for process in (first, second)]
    assert digests[0].strip() == manifests.load(spec_of(root).manifest_uri).digest
    assert digests[0] == digests[1]
    assert (tmp_path / "builds").read_text().splitlines() == ["[]"]


def test_a_process_that_dies_while_another_waits_hands_the_work_over(tmp_path: Path):
    first = start(str(tmp_path / "out"), tmp_path, "wait")
    while not (tmp_path / "building").exists():
        assert first.poll() is None, first.communicate()
    second = start(str(tmp_path / "out"), tmp_path, "run")
    assert second.stderr is not None
    assert "waiting for another process" in second.stderr.readline()
    os.kill(first.pid, signal.SIGKILL)
    second.communicate()
    assert second.returncode == 0
    assert (tmp_path / "builds").read_text().splitlines() == ["[]", "['a.bin', 'b.bin']"]
    assert data_files(str(tmp_path / "out")) == {"a.bin": b"aaa", "b.bin": b"bb"}
    first.communicate()


# --- reading ---


def test_a_manifest_that_is_not_there_says_which_stage_to_run(root: str):
    uri = spec_of(root).manifest_uri
    with pytest.raises(ManifestError, match=f"{uri} is not there: the stage that writes it has not finished; run it"):
        manifests.load(uri)
    assert manifests.load_if_there(uri) is None


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "..", "", "."])
def test_a_manifest_whose_path_climbs_out_is_refused(root: str, path: str):
    made = run_stage(spec_of(root), Build()).model_dump(mode="json")
    made["files"][0]["path"] = path
    storage.write_bytes(spec_of(root).manifest_uri, json.dumps(made).encode())
    with pytest.raises(ManifestError, match=r"is no manifest of format 1: .*leaves the manifest's folder"):
        manifests.load(spec_of(root).manifest_uri)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', "\xff"])
def test_what_is_no_manifest_is_refused_and_not_built_over(tmp_path: Path, text: str):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"manifest\.json is no manifest of format 1: .*; remove it to build again"):
        run_stage(spec_of(str(tmp_path)), Build())


def test_fetch_brings_the_files_asked_for(root: str, tmp_path: Path):
    made = run_stage(spec_of(root), Build())
    folder = manifests.fetch(root, made, ["deep/b.bin"], tmp_path / "fetched")
    assert (folder / "deep/b.bin").read_bytes() == b"bb"
    if storage.is_s3(root):
        assert folder == tmp_path / "fetched"
        assert not (folder / "a.bin").exists()
    else:
        assert folder == Path(root)  # not copied


@pytest.mark.parametrize("data", [b"aba", b"aa", b"aaaa"])
def test_fetch_refuses_a_file_that_was_changed(root: str, tmp_path: Path, data: bytes):
    made = run_stage(spec_of(root), Build())
    storage.write_bytes(storage.join(root, "a.bin"), data)
    with pytest.raises(ManifestError, match=f"{root}: a.bin was changed or cut short after its manifest was written"):
        manifests.fetch(root, made, made.paths(), tmp_path / "fetched")
    manifests.fetch(root, made, ["deep/b.bin"], tmp_path / "fetched")


def test_fetch_refuses_a_file_that_the_manifest_does_not_name(root: str, tmp_path: Path):
    made = run_stage(spec_of(root), Build())
    storage.write_bytes(storage.join(root, "other"), b"x")
    with pytest.raises(ManifestError, match=f"{root}: other is not in the manifest of stage stage"):
        manifests.fetch(root, made, ["other"], tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_files_of_several_manifests_of_one_root_come_together(root: str, tmp_path: Path):
    specs = [replace(spec_of(root), manifest_name=f"{name}.json") for name in ("one", "two")]
    made = [run_stage(spec, Build({f"{spec.manifest_name}.bin": b"x"})) for spec in specs]
    wanted = [(found, [f"{name}.json.bin"]) for found, name in zip(made, ("one", "two"), strict=True)]
    folder = manifests.fetch_all(root, wanted, tmp_path / "fetched")
    assert [(folder / f"{name}.json.bin").read_bytes() for name in ("one", "two")] == [b"x", b"x"]
    with pytest.raises(ManifestError, match=r"one.json.bin is not in the manifest of stage stage"):
        manifests.fetch_all(root, [(made[1], ["one.json.bin"])], tmp_path / "fetched")


# --- identity ---


def test_the_digest_is_of_content_and_not_of_time_or_metadata():
    made = Manifest(stage="s", config_digest="c", inputs={"i": "1"}, files=(FileEntry(path="a", size=1, sha256="00"),))
    assert made.model_copy(update={"created": "2001-01-01", "metadata": {"x": 1}, "cbtm_version": "9"}).digest == (
        made.digest
    )
    for change in (
        {"stage": "t"},
        {"config_digest": "d"},
        {"inputs": {"i": "2"}},
        {"files": (FileEntry(path="b", size=1, sha256="00"),)},
        {"files": (FileEntry(path="a", size=1, sha256="01"),)},
        {"files": ()},
    ):
        assert made.model_copy(update=change).digest != made.digest


def test_two_builds_of_equal_output_have_one_digest_wherever_they_lie(tmp_path: Path, bucket: str):
    assert run_stage(spec_of(str(tmp_path / "a")), Build()).digest == run_stage(spec_of(bucket), Build()).digest


def test_facts_are_the_plain_values_of_the_metadata():
    metadata = {"documents": 3, "loss": 2.5, "member": "dense", "clusters": [1], "cluster": None}
    made = Manifest(stage="s", config_digest="c", inputs={}, files=(), metadata=metadata)
    assert made.facts == {"documents": 3, "loss": 2.5, "member": "dense"}


def test_paths_are_those_below_a_prefix():
    files = tuple(FileEntry(path=path, size=0, sha256="") for path in ("a/1.npy", "a/10.npy", "b"))
    made = Manifest(stage="s", config_digest="c", inputs={}, files=files)
    assert made.paths("a/1.") == ["a/1.npy"]
    assert made.paths() == ["a/1.npy", "a/10.npy", "b"]


# --- files that another machine has placed ---


def placed_elsewhere(spec: StageSpec, folder: Path) -> manifests.Placed:
    """What another machine does: build, place, and say which files."""
    work = folder / "elsewhere"
    metadata = Build()(work)
    files = manifests.describe(work)
    manifests.place(spec, work, files, manifests.load_if_there(spec.manifest_uri))
    return manifests.Placed(files, metadata)


def test_files_that_were_placed_elsewhere_get_the_manifest_of_a_build_here(root: str, tmp_path: Path):
    here = run_stage(spec_of(f"{root}/here"), Build())
    there = spec_of(f"{root}/there")
    made = run_stage(there, lambda _: placed_elsewhere(there, tmp_path))
    assert made.digest == here.digest
    assert made.metadata | {"seconds": 0} == here.metadata | {"seconds": 0}
    assert data_files(there.root) == data_files(f"{root}/here")
    assert manifests.load(there.manifest_uri) == made


def test_placing_removes_the_old_manifest_and_what_only_that_named(root: str, tmp_path: Path):
    run_stage(spec_of(root), Build({"old.bin": b"o", "a.bin": b"o"}))
    placed_elsewhere(spec_of(root, config_digest="config-2"), tmp_path)
    assert published(root) == {"a.bin": b"aaa", "deep/b.bin": b"bb"}


def test_no_manifest_is_written_over_a_placed_file_that_is_not_there(root: str, tmp_path: Path):
    placed = placed_elsewhere(spec_of(root), tmp_path)
    storage.delete(root, ["deep/b.bin"])
    with pytest.raises(ManifestError, match=r"deep/b\.bin was placed there and is missing or cut short; run it again"):
        run_stage(spec_of(root), lambda _: placed)
    assert not storage.exists(spec_of(root).manifest_uri)
