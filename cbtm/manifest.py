"""Manifests: what a stage made, from what, under which configuration; and the rule that makes stages resumable.

A stage builds its files in a work folder, then publishes them, then writes one manifest, last and atomically.
No manifest means not done; a manifest whose configuration, inputs or files differ means do it again; otherwise
the stage has nothing to do. So a retry, a pre-emption or a second run costs nothing and never mixes versions.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

import cbtm
from cbtm import storage
from cbtm.config import digest_of
from cbtm.errors import ManifestError, StorageError

logger = logging.getLogger(__name__)

_PRIVATE = ".cbtm"  # work folders and locks below a stage's root


class FileEntry(BaseModel):
    """One published file: path relative to the stage's root, bytes, hex sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not PurePosixPath(path).parts or storage.climbs(path):
            raise ValueError(f"path {path!r} leaves the manifest's folder")
        return path


class Manifest(BaseModel):
    """What one stage made.

    Attributes:
        stage: Name of the stage.
        config_digest: sha256 of the configuration that it ran under.
        inputs: Name of each input and the digest of what was read.
        files: The files, sorted by path.
        metadata: Small facts for those who read the result (counts, sizes, final losses).
        created: UTC time of writing, ISO 8601; no part of the digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    stage: str
    config_digest: str
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    metadata: dict[str, Any] = {}
    cbtm_version: str = cbtm.__version__
    created: str = ""

    @property
    def digest(self) -> str:
        """Identity of the content: stage, configuration, inputs and every file's sha256."""
        return digest_of(self.model_dump(include={"stage", "config_digest", "inputs", "files"}))

    @property
    def facts(self) -> dict[str, float | str]:
        """The plain numbers and texts of the metadata, for those who show them."""
        return {name: value for name, value in self.metadata.items() if isinstance(value, int | float | str)}

    def save(self, path: str) -> None:
        """Write a copy of the manifest to a local path."""
        storage.write_bytes(path, self.model_dump_json(indent=1).encode())

    def paths(self, prefix: str = "") -> list[str]:
        """Paths of the files below `prefix`, sorted."""
        return [entry.path for entry in self.files if entry.path.startswith(prefix)]


@dataclass(frozen=True)
class StageSpec:
    """Identity of one stage's output.

    Attributes:
        stage: Name of the stage.
        root: URI of the folder below which its files appear.
        config_digest: sha256 of the configuration that the output depends on.
        inputs: Name of each input and its digest.
        manifest_name: Path of the manifest below `root`; several manifests may share one root.
    """

    stage: str
    root: str
    config_digest: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    manifest_name: str = "manifest.json"

    @property
    def manifest_uri(self) -> str:
        """URI of the manifest."""
        return storage.join(self.root, self.manifest_name)

    @property
    def key(self) -> str:
        """Identity of the work: equal for two runs that must give equal output."""
        return digest_of([self.stage, self.config_digest, dict(self.inputs), cbtm.__version__])


def load(uri: str) -> Manifest:
    """Read the manifest at `uri`.

    Raises:
        ManifestError: If it is not there, or is no manifest of this format.
    """
    manifest = load_if_there(uri)
    if manifest is None:
        raise ManifestError(f"{uri} is not there: the stage that writes it has not finished; run it first")
    return manifest


def load_if_there(uri: str) -> Manifest | None:
    """Read the manifest at `uri`, or None where there is none."""
    folder, _, name = uri.rpartition("/")
    return load_each(folder, [name])[name]


def load_each(root: str, names: Sequence[str]) -> dict[str, Manifest | None]:
    """Read the manifests `names` below `root`, None for one that is not there; several at once from S3."""
    texts = storage.read_each(root, names)
    return {name: None if text is None else _parsed(text, storage.join(root, name)) for name, text in texts.items()}


def _parsed(text: bytes, uri: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ManifestError(f"{uri} is no manifest of format 1: {first['msg']}; remove it to build again") from None


def answers(manifest: Manifest, spec: StageSpec) -> bool:
    """Tell whether `manifest` is of the configuration and the inputs of `spec`."""
    return manifest.config_digest == spec.config_digest and manifest.inputs == dict(spec.inputs)


def is_current(
    spec: StageSpec, manifest: Manifest | None, *, size_of: Callable[[str], int | None] | None = None
) -> bool:
    """Tell whether `manifest` answers to `spec` and all its files are there in their full size.

    Args:
        spec: What is wanted.
        manifest: What is there.
        size_of: Bytes of a file below the spec's root, None if it is not there, where that is known without asking.
    """
    if manifest is None or manifest.stage != spec.stage or not answers(manifest, spec):
        return False
    missing = _damaged(spec.root, manifest, size_of)
    if missing:
        logger.warning("stage=%s file=%s is missing or cut short: building again", spec.stage, missing[0])
    return not missing


def fetch(root: str, manifest: Manifest, paths: Sequence[str], target: Path) -> Path:
    """Bring files of one manifest to this machine, as `fetch_all` does."""
    return fetch_all(root, [(manifest, paths)], target)


def fetch_all(root: str, wanted: Sequence[tuple[Manifest, Sequence[str]]], target: Path) -> Path:
    """Bring files of several manifests with one root to this machine, all in one go, and check every sha256.

    Local files are not copied: the folder they lie in is returned.

    Args:
        root: Where the files of all of them lie.
        wanted: Each manifest with the paths of the files that are wanted of it.
        target: Folder that receives what is not on this machine.

    Raises:
        ManifestError: If a file differs from what its manifest says.
    """
    entries: dict[str, FileEntry] = {}
    for manifest, paths in wanted:
        known = {entry.path: entry for entry in manifest.files}
        for path in paths:
            if path not in known:
                raise ManifestError(f"{root}: {path} is not in the manifest of stage {manifest.stage}")
            entries[path] = known[path]
    if not storage.is_s3(root):
        folder = storage.local_path(root)
    else:
        folder = target
        storage.download(root, folder, list(entries))
    for path, entry in entries.items():
        _check_file(folder / path, entry, root)
    return folder


def made_before(spec: StageSpec) -> Manifest | None:
    """Manifest of an output that is there and current, None of one that is still to be made."""
    existing = load_if_there(spec.manifest_uri)
    if not is_current(spec, existing):
        return None
    logger.info("stage=%s root=%s up to date", spec.stage, spec.root)
    return existing


@dataclass(frozen=True)
class Placed:
    """What was built on another machine, and placed below the stage's root by it.

    Attributes:
        files: The files.
        metadata: The manifest's metadata.
    """

    files: tuple[FileEntry, ...]
    metadata: Mapping[str, Any]


def run_stage(spec: StageSpec, build: Callable[[Path], Mapping[str, Any] | Placed]) -> Manifest:
    """Return the stage's manifest, building its output only if it is not there already.

    Args:
        spec: Identity of the output.
        build: Writes the output files into the given work folder and returns the manifest's metadata; or has them
            placed from elsewhere. After a kill it is called again with the same folder as it was left, if the spec is
            the same.

    Returns:
        The manifest, also written to `spec.manifest_uri`.
    """
    with _exclusive(spec):
        existing = load_if_there(spec.manifest_uri)
        if is_current(spec, existing):
            assert existing is not None
            logger.info("stage=%s root=%s up to date", spec.stage, spec.root)
            return existing
        work = work_folder(spec)
        began = time.monotonic()
        with _disk_full_as_storage_error(spec):
            built = build(work)
            seconds = {"seconds": round(time.monotonic() - began, 2)}
            if isinstance(built, Placed):
                manifest = conclude(spec, built.files, {**built.metadata, **seconds})
            else:
                manifest = publish(spec, work, {**built, **seconds}, replaces=existing)
        shutil.rmtree(work.parent, ignore_errors=True)
    logger.info("stage=%s root=%s files=%d done", spec.stage, spec.root, len(manifest.files))
    return manifest


def publish(spec: StageSpec, work: Path, metadata: Mapping[str, Any], replaces: Manifest | None = None) -> Manifest:
    """Move every file of the folder `work` to below `spec.root`, then write the manifest."""
    files = describe(work)
    manifest = _manifest(spec, files, metadata)
    text = _text(manifest)  # before anything is touched: metadata may hold what JSON cannot
    place(spec, work, files, replaces)
    storage.write_bytes(spec.manifest_uri, text)
    return manifest


def describe(work: Path) -> tuple[FileEntry, ...]:
    """Size and sha256 of every file of a folder, sorted by path."""
    return tuple(
        FileEntry(path=file.path, size=file.size, sha256=storage.sha256_file(work / file.path))
        for file in storage.list_files(str(work))
    )


def place(spec: StageSpec, work: Path, files: Sequence[FileEntry], replaces: Manifest | None = None) -> None:
    """Move files of the folder `work` to below `spec.root`, which has no manifest from then on.

    The manifest that is replaced goes first, so that at no moment a manifest speaks of files of another run.
    """
    paths = [file.path for file in files]
    storage.delete(spec.root, [spec.manifest_name])
    if replaces is not None:
        storage.delete(spec.root, sorted(set(replaces.paths()) - set(paths)))
    if storage.is_s3(spec.root):
        storage.upload(work, spec.root, paths)
    else:
        _move(work, storage.local_path(spec.root), paths)


def conclude(spec: StageSpec, files: Sequence[FileEntry], metadata: Mapping[str, Any]) -> Manifest:
    """Write the manifest of files that have been placed.

    Raises:
        ManifestError: If one of them is not there in its full size.
    """
    manifest = _manifest(spec, files, metadata)
    if missing := _damaged(spec.root, manifest):
        raise ManifestError(f"{spec.root}: {missing[0]} was placed there and is missing or cut short; run it again")
    storage.write_bytes(spec.manifest_uri, _text(manifest))
    return manifest


def _manifest(spec: StageSpec, files: Sequence[FileEntry], metadata: Mapping[str, Any]) -> Manifest:
    return Manifest(
        stage=spec.stage,
        config_digest=spec.config_digest,
        inputs=dict(spec.inputs),
        files=tuple(files),
        metadata=dict(metadata),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _text(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()


def _damaged(root: str, manifest: Manifest, size_of: Callable[[str], int | None] | None = None) -> list[str]:
    look_up = storage.sizes(root, manifest.paths()).get if size_of is None else size_of
    return [entry.path for entry in manifest.files if look_up(entry.path) != entry.size]


def _check_file(path: Path, entry: FileEntry, root: str) -> None:
    if (
        storage.sizes(str(path.parent), [path.name])[path.name] != entry.size
        or storage.sha256_file(path) != entry.sha256
    ):
        raise ManifestError(
            f"{root}: {entry.path} was changed or cut short after its manifest was written; "
            "remove the manifest to build it again"
        )


def _private_folder(spec: StageSpec) -> Path:
    name = spec.manifest_name.removesuffix(".json").replace("/", "-")
    if not storage.is_s3(spec.root):
        return storage.local_path(spec.root) / _PRIVATE / name
    scratch = Path(os.environ.get("CBTM_SCRATCH") or Path(tempfile.gettempdir()) / f"cbtm-{os.getuid()}")
    return scratch / hashlib.sha256(spec.manifest_uri.encode()).hexdigest()[:24]


def work_folder(spec: StageSpec) -> Path:
    """Folder on this machine that survives a kill, emptied when it was left by other work than this."""
    folder = _private_folder(spec) / "work"
    key = folder / "key.json"
    if not key.is_file() or json.loads(key.read_text() or "null") != spec.key:
        shutil.rmtree(folder, ignore_errors=True)
        storage.write_bytes(str(key), json.dumps(spec.key).encode())
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    return files


def _move(work: Path, root: Path, paths: Sequence[str]) -> None:
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / path, target)


@contextlib.contextmanager
def _exclusive(spec: StageSpec) -> Iterator[None]:
    """Let one process at a time build an output; the lock goes with the process, however it ends."""
    folder = _private_folder(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise StorageError(f"cannot write below {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("stage=%s root=%s waiting for another process that builds it", spec.stage, spec.root)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_full_as_storage_error(spec: StageSpec) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # safetensors reports the operating system's message without its number.
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left on device" in str(error):
            where = _private_folder(spec)
            raise StorageError(f"no space left on the disk that holds {where}; free some and run again") from error
        raise
