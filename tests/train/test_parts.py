"""Folders that several machines have written parts of: whole with a manifest, or without one."""

import threading
from pathlib import Path

import pytest

from cbtm import manifest, storage
from cbtm.errors import StorageError
from cbtm.manifest import StageSpec
from cbtm.train.parts import place_part, publish_parts


def part(folder: Path, node: int, text: str = "") -> Path:
    """What one machine has on its disk."""
    (folder / f"machine-{node}").mkdir(parents=True)
    (folder / f"machine-{node}/shard-{node}.safetensors").write_text(text or f"of {node}")
    return folder / f"machine-{node}"


def published(spec: StageSpec, folder: Path) -> dict[str, bytes]:
    made = manifest.load(spec.manifest_uri)
    local = manifest.fetch(spec.root, made, made.paths(), folder)
    return {path: (local / path).read_bytes() for path in made.paths()}


@pytest.fixture
def spec(root):
    return StageSpec("checkpoint", f"{root}/step-00000004", "key")


def test_manifest_names_the_files_of_all_machines_and_no_list_is_left(spec, tmp_path):
    for node in (2, 1):  # in any order
        place_part(spec, part(tmp_path, node), node=node, token="t")
    publish_parts(spec, part(tmp_path, 0), {"step": 4}, n_nodes=3, token="t", seconds=0)
    files = {f"shard-{node}.safetensors": f"of {node}".encode() for node in range(3)}
    assert published(spec, tmp_path / "fetched") == files
    assert manifest.load(spec.manifest_uri).metadata == {"step": 4}
    assert {file.path for file in storage.list_files(spec.root)} == {*files, "manifest.json"}


def test_first_machine_waits_for_the_others(spec, tmp_path):
    folders = [part(tmp_path, node) for node in range(2)]
    late = threading.Timer(1.0, place_part, args=(spec, folders[1]), kwargs={"node": 1, "token": "t"})
    late.start()
    publish_parts(spec, folders[0], {"step": 4}, n_nodes=2, token="t", seconds=30)
    late.join()
    assert len(published(spec, tmp_path / "fetched")) == 2


def test_list_of_an_earlier_try_is_no_part_of_this_one(spec, tmp_path):
    place_part(spec, part(tmp_path / "earlier", 1, "of an earlier try"), node=1, token="earlier")
    with pytest.raises(StorageError, match=r"node 1 has not uploaded its part of .*step-00000004 within \d s"):
        publish_parts(spec, part(tmp_path, 0), {"step": 4}, n_nodes=2, token="t", seconds=1)
    assert not storage.exists(spec.manifest_uri)


def test_machine_that_cannot_upload_says_so(spec, tmp_path, monkeypatch):
    def refuse(*_):
        raise StorageError("the bucket is full")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "upload", refuse)
        with pytest.raises(StorageError, match="the bucket is full"):
            place_part(spec, part(tmp_path, 1), node=1, token="t")
    with pytest.raises(StorageError, match="node 1 could not upload its part: the bucket is full"):
        publish_parts(spec, part(tmp_path, 0), {"step": 4}, n_nodes=2, token="t", seconds=30)
    assert not storage.exists(spec.manifest_uri)


def test_wait_is_ended_where_the_store_is_given_up(spec, tmp_path):
    given_up = threading.Event()
    threading.Timer(0.5, given_up.set).start()
    with storage.ended_by(given_up), pytest.raises(StorageError):
        publish_parts(spec, part(tmp_path, 0), {"step": 4}, n_nodes=2, token="t", seconds=60)
