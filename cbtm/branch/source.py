"""Where a given model or tokenizer lies: in a folder, below an s3:// prefix, or on the Hugging Face hub.

`org/name` and `org/name@revision` name a repository of the hub, unless there is such a folder; with `hf://` in front
they always do, and a name without an organisation needs that. A revision is a branch, tag or commit, by default main.
Its commit is looked up once, and all files come from that commit, so a branch that moves on meanwhile changes nothing.

huggingface_hub speaks to the hub, and HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to it. Where its
errors end, ours begin: each says whether the name, the permission or the network is to be mended.
"""

import errno
import glob
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from cbtm import storage
from cbtm.branch.seed import model_files
from cbtm.config import digest_of
from cbtm.errors import CbtmError, ConfigError, StorageError

logger = logging.getLogger(__name__)

SCHEME = "hf://"
_MAIN = "main"
_NAME = r"[A-Za-z0-9][\w.-]*"
_WITH_ORGANISATION = re.compile(rf"({_NAME}/{_NAME})(?:@(\S+))?", re.ASCII)
_WITH_SCHEME = re.compile(rf"((?:{_NAME}/)?{_NAME})(?:@(\S+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

T = TypeVar("T")


@dataclass(frozen=True)
class _HubName:
    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}@{self.revision}"


def is_hub_name(path: str) -> bool:
    """Tell whether `path` names a repository of the hub; what is there as a local folder does not.

    Raises:
        ConfigError: If `hf://` stands before something that can be no repository.
    """
    return _parse(path) is not None


def pinned(path: str) -> str:
    """A hub name with the commit that its revision stands for now, as `hf://org/name@commit`; other paths as they are.

    Raises:
        ConfigError: If there is no such repository or revision, or it may not be read.
        StorageError: If the hub does not answer.
    """
    name = _parse(path)
    return path if name is None else str(_HubName(name.repository, _commit(name)))


def source_digest(path: str) -> str:
    """Identity of a given model's or tokenizer's content: of the folder, or the commit on the hub; kept once known.

    Raises:
        ConfigError: If nothing is there, or it may not be read.
        StorageError: If the hub or the object store does not answer.
    """
    name = _parse(path)
    return folder_digest(path) if name is None else _commit(name)


@cache
def folder_digest(uri: str, expected: str = "a Hugging Face folder") -> str:
    """Identity of a given folder's content: sha256 of local files, ETags in S3.

    Raises:
        ConfigError: If the folder is empty or not there; `expected` says what should be.
    """
    files = storage.list_files(uri)
    if not files:
        raise ConfigError(f"{uri} is empty or not there; expected {expected}")
    local = not storage.is_s3(uri)
    return digest_of(
        [[file.path, storage.sha256(storage.join(uri, file.path)) if local else file.version] for file in files]
    )


def list_names(path: str) -> list[str]:
    """Files of a given model or tokenizer, sorted, relative to its folder."""
    name = _parse(path)
    if name is None:
        return [file.path for file in storage.list_files(path)]
    return list(_snapshot(name)[1])


def fetch_files(path: str, folder: Path, names: Sequence[str]) -> None:
    """Copy the files `names` of a given model or tokenizer to below `folder`.

    Raises:
        ConfigError: If the repository may not be read.
        StorageError: If a file is not there, or does not come over.
    """
    name = _parse(path)
    if name is None:
        storage.download(path, folder, names)
        return
    commit = _commit(name)
    logger.info("fetching %d files of %s at commit %s", len(names), name.repository, commit)
    _from_hub(_HubName(name.repository, commit), names, folder)
    # What huggingface_hub notes down to resume a download; after it, it would count as a part of the model.
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    missing = [file for file in names if not (folder / file).is_file()]
    if missing:
        raise StorageError(f"{name.repository} at commit {commit} has no {missing[0]} on {_endpoint()}")


def fetch_model(path: str, folder: Path) -> None:
    """Copy configuration and safetensors weights of a given model to below `folder`; never pickled weights.

    Raises:
        ConfigError: If there is no configuration, there are no safetensors weights, or they may not be read.
        StorageError: If a file does not come over.
    """
    fetch_files(path, folder, model_files(list_names(path), path))


def _parse(path: str) -> _HubName | None:
    if path.startswith(SCHEME):
        match = _WITH_SCHEME.fullmatch(path.removeprefix(SCHEME))
        if match is None:
            raise ConfigError(f"{path!r} names no repository; write hf://org/name or hf://org/name@revision")
    else:
        match = _WITH_ORGANISATION.fullmatch(path)
        if match is None or Path(path).exists():
            return None
    return _HubName(match[1], match[2] or _MAIN)


def _commit(name: _HubName) -> str:
    return name.revision if _COMMIT.fullmatch(name.revision) else _snapshot(name)[0]


@cache
def _snapshot(name: _HubName) -> tuple[str, tuple[str, ...]]:
    """Commit of a revision, and the files there, sorted."""
    from huggingface_hub import HfApi

    info = _ask(name, lambda: HfApi(endpoint=_endpoint()).model_info(name.repository, revision=name.revision))
    if not info.sha or info.siblings is None:
        raise StorageError(f"{_endpoint()} does not say which commit {name} is; is HF_ENDPOINT a Hugging Face hub?")
    return info.sha, tuple(sorted(file.rfilename for file in info.siblings))


def _from_hub(name: _HubName, names: Sequence[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    _ask(
        name,
        lambda: snapshot_download(
            name.repository,
            revision=name.revision,
            local_dir=folder,
            allow_patterns=[glob.escape(file) for file in names],
            endpoint=_endpoint(),
        ),
    )


def _endpoint() -> str:
    # Read at every call: huggingface_hub keeps what it found when it was imported.
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _ask(name: _HubName, action: Callable[[], T]) -> T:
    try:
        return action()
    except Exception as error:  # the client's HTTP library, and so its errors, differ between versions
        raise _explain(error, name) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _explain(error: BaseException, name: _HubName) -> CbtmError:
    from huggingface_hub import errors

    # Where a download fails, the client says that nothing is in its cache, and hides the answer behind that.
    error = next((one for one in _chain(error) if isinstance(one, errors.HfHubHTTPError)), error)
    hub, repository, reason = _endpoint(), name.repository, " ".join(str(error).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"{repository} is gated: accept its licence on {hub}/{repository} and set HF_TOKEN to a token of that "
            "account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{repository} on {hub} has no revision {name.revision!r}; name a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ConfigError(
            f"{repository} is neither a folder here nor a repository on {hub} that is open to everybody or to "
            "HF_TOKEN; correct the name or the token"
        )
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{repository!r} is no folder here and can be no repository of the hub: {reason}")
    if status == 403:
        return ConfigError(f"{hub} refuses {repository} (403): check HF_TOKEN and what it may read")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"no space left on the disk that receives {name}; free some and run again")
    if isinstance(error, errors.HfHubHTTPError):
        return StorageError(f"{hub} answers {status} for {name}; run again later ({reason})")
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in _chain(error)):
        return StorageError(
            f"{repository} is no folder here, and HF_HUB_OFFLINE keeps it from being fetched from {hub}; give the "
            "folder that holds it, or unset HF_HUB_OFFLINE"
        )
    return StorageError(
        f"{repository} is no folder here and cannot be fetched from {hub}: {reason}; check the network and "
        "HF_ENDPOINT, or give a folder that holds it"
    )
