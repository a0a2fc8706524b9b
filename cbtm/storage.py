"""Local paths and `s3://` URIs behind the same few functions; all others read and write through here.

Endpoint, region and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID …) or
whatever else boto3 finds. A single file appears whole or not at all: locally by rename, in S3 by the nature
of a put. A folder becomes whole by its manifest (see `cbtm.manifest`), which is written last. What a killed write
leaves beside its target is never listed. An object store that is away is an error within seconds, unless the
process was told to `be_patient`: then a request is repeated for that long, and `patience(0)` exempts a block.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from cbtm import s3
from cbtm.errors import StorageError
from cbtm.outage import Patience
from cbtm.outage import be_patient as be_patient
from cbtm.outage import ended_by as ended_by
from cbtm.outage import patience as patience

_READ_BYTES = 4 << 20
_WAIT_SECONDS = 0.5  # between two looks for a file that another machine is to write
_UNFINISHED = ".cbtm-part-"  # prefix of a file that is being written

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class StoredFile:
    """One file below a listed URI.

    Attributes:
        path: Path relative to the listed URI, with `/`.
        size: Bytes.
        version: Changes when the content does: ETag in S3, modification time in ns locally.
    """

    path: str
    size: int
    version: str


def is_s3(uri: str) -> bool:
    """Tell whether `uri` names an object store rather than this machine's file system."""
    return uri.startswith("s3://")


def climbs(path: str) -> bool:
    """Tell whether a path that is to lie below a folder leaves it."""
    return path.startswith("/") or ".." in path.split("/")


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path.

    All that is written or removed has its place from here, so that a name out of a plan, a manifest, a parameter or a
    bucket cannot lead outside of a run's root.

    Raises:
        StorageError: If a part climbs out of `uri`.
    """
    for part in parts:
        if ".." in part.split("/"):
            raise StorageError(f"{part!r} leads out of {uri}; a path below it has no '..'")
    return "/".join([uri.rstrip("/") if uri != "/" else "", *(part.strip("/") for part in parts if part)])


def local_path(uri: str) -> Path:
    """Path of a local URI (`file://` or plain).

    Raises:
        StorageError: For a scheme that cbtm does not read.
    """
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    if "://" in uri:
        raise StorageError(f"cannot read {uri}: use a local path or s3://bucket/key")
    return Path(uri)


def exists(uri: str) -> bool:
    """Tell whether a file (not a folder) is there."""
    return (s3.size(uri) if is_s3(uri) else _local_size(uri)) is not None


def wait_for(uri: str, seconds: float) -> bool:
    """Wait until a file is there, for at most `seconds` or until `ended_by` ends it; tells whether it is."""
    here, until = Patience.of_this_call(), time.monotonic() + seconds
    while not exists(uri):
        if here.is_ended() or time.monotonic() >= until:
            return False
        here.pause(_WAIT_SECONDS)
    return True


def sizes(uri: str, paths: Sequence[str]) -> dict[str, int | None]:
    """Bytes of each of the files `paths` below `uri`, None for one that is not there; several requests at once."""
    if not is_s3(uri):
        return {path: _local_size(join(uri, path)) for path in paths}
    return dict(zip(paths, s3.in_parallel(s3.size, [join(uri, path) for path in paths]), strict=True))


def listed_sizes(uri: str) -> dict[str, int] | None:
    """Bytes of every file below an s3:// prefix, by a request for each thousand; None for a folder of this machine.

    Raises:
        StorageError: If the bucket is not there or may not be listed.
    """
    return {path: size for path, size, _ in s3.listing(uri)} if is_s3(uri) else None


def read_bytes(uri: str) -> bytes:
    """Read a small file whole.

    Raises:
        StorageError: If it is not there or cannot be read.
    """
    return s3.read(uri) if is_s3(uri) else _guard(uri, local_path(uri).read_bytes)


def read_if_there(uri: str) -> bytes | None:
    """Read a small file whole, None if it is not there; as `read_each` does."""
    if is_s3(uri):
        return s3.read_if_there(uri)
    return read_bytes(uri) if exists(uri) else None


def read_each(uri: str, paths: Sequence[str]) -> dict[str, bytes | None]:
    """Read each of the small files `paths` below `uri` whole, None for one that is not there; several at once from S3.

    Raises:
        StorageError: If one that is there cannot be read, or the bucket is not there.
    """
    uris = [join(uri, path) for path in paths]
    texts = s3.in_parallel(s3.read_if_there, uris) if is_s3(uri) else map(read_if_there, uris)
    return dict(zip(paths, texts, strict=True))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file so that readers see the old one or the new one, never a part."""
    if is_s3(uri):
        s3.write(uri, data)
    else:
        _guard(uri, lambda: _write(local_path(uri), data))


def list_files(uri: str) -> list[StoredFile]:
    """List every file below a folder, sorted by path; an absent folder is empty.

    Raises:
        StorageError: If the bucket is not there, or it or a folder may not be read, or an object's name is no path
            below the folder.
    """
    if is_s3(uri):
        found = sorted(StoredFile(*one) for one in s3.listing(uri))
        for file in found:
            if climbs(file.path):
                raise StorageError(
                    f"{uri} holds an object {file.path!r}, which no folder can hold; rename or remove it"
                )
        return found
    return sorted(_guard(uri, lambda: list(_list_local(local_path(uri)))))


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """Open a file for streaming reads; an S3 object is never held in memory whole.

    A read from S3 is of the version that is there at the start: with patience, one that breaks off goes on from the
    byte that it reached, and is a StorageError if the object has been replaced.
    """
    with s3.open_stream(uri) if is_s3(uri) else _guard(uri, lambda: local_path(uri).open("rb")) as file:
        yield file


def upload(local: Path, uri: str, paths: Sequence[str]) -> None:
    """Copy the files `paths` below the folder `local` to below `uri`, several at once."""

    def one(path: str) -> None:
        if is_s3(uri):
            s3.upload_file(local / path, join(uri, path))
        else:
            _copy(local / path, local_path(join(uri, path)))

    _for_each(one, uri, paths)


def download(uri: str, local: Path, paths: Sequence[str]) -> None:
    """Copy the files `paths` below `uri` to below the folder `local`, several at once."""

    def one(path: str) -> None:
        if climbs(path):  # the names of objects are whatever somebody has put into the bucket
            raise StorageError(f"{uri} holds {path!r}, which would be written outside of {local}")
        if is_s3(uri):
            with _written_whole(local / path) as unfinished:
                s3.download_file(join(uri, path), unfinished)
        else:
            _copy(local_path(join(uri, path)), local / path)

    _for_each(one, uri, paths)


def delete(uri: str, paths: Sequence[str]) -> None:
    """Remove the files `paths` below `uri`; those that are not there are no error."""
    if is_s3(uri):
        s3.delete([join(uri, path) for path in paths])
        return
    for path in paths:
        _guard(uri, partial(local_path(join(uri, path)).unlink, missing_ok=True))


def check_writable(uri: str) -> None:
    """Write, read and remove a probe below `uri`, so that a wrong secret shows before the expensive work.

    It never waits for a store that is away: before the work nothing is lost by an error, and a wrong endpoint is one.

    Raises:
        StorageError: Saying what failed and what to do.
    """
    name = f".cbtm-probe-{uuid.uuid4().hex}"  # no process id: every pod's is 1
    with patience(0):
        write_bytes(join(uri, name), b"cbtm")
        try:
            if read_bytes(join(uri, name)) != b"cbtm":
                raise StorageError(f"{uri} gives back other bytes than were written")
        finally:
            delete(uri, [name])


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(uri: str) -> str:
    """Hex sha256 of a file, streamed."""
    digest = hashlib.sha256()
    with open_read(uri) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


# --- local files ---


def _list_local(root: Path) -> Iterator[StoredFile]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those are an absent folder
            raise error

    # Links are followed: a corpus is often put together from shards that lie elsewhere.
    for folder, _, names in os.walk(root, onerror=refuse, followlinks=True):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # removed between walk and stat: it is not there
                status = path.stat()
                if not name.startswith(_UNFINISHED):
                    yield StoredFile(path.relative_to(root).as_posix(), status.st_size, str(status.st_mtime_ns))


def _local_size(uri: str) -> int | None:
    try:
        status = local_path(uri).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _explain(error, uri) from error
    return status.st_size if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, which becomes `path` if nothing failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(_UNFINISHED + uuid.uuid4().hex)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _write(path: Path, data: bytes) -> None:
    with _written_whole(path) as unfinished, unfinished.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, target: Path) -> None:
    with _written_whole(target) as unfinished:
        shutil.copyfile(source, unfinished)


def _for_each(copy: Callable[[str], None], uri: str, paths: Sequence[str]) -> None:
    """Copy each of `paths`; several at once from or to S3, one after the other on this machine."""

    def guarded(path: str) -> None:
        _guard(join(uri, path), lambda: copy(path))

    if is_s3(uri):
        s3.in_parallel(guarded, paths)
        return
    for path in paths:
        guarded(path)


def _guard(uri: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except StorageError:
        raise
    except Exception as error:
        raise _explain(error, uri) from error


def _explain(error: Exception, uri: str) -> StorageError:
    """Translate an operating-system error into what happened and what to do."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{error.filename or uri} is not there")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"no space left on the disk that holds {uri}; free some and run again")
    if isinstance(error, PermissionError):
        return StorageError(f"{uri}: permission denied for user id {os.getuid()}")
    return StorageError(f"{uri}: {error}")
