"""Local paths and `s3://` URIs behind the same few functions; the only module that talks to boto3.

Big data goes through s3transfer: multipart above 64 MiB, several parts and files at once, bounded retries.
Endpoint, region and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID …) or
whatever else boto3 finds. A single file appears whole or not at all: locally by rename, in S3 by the nature
of a put. A folder becomes whole by its manifest (see `cbtm.manifest`), which is written last. What a killed write
leaves beside its target is never listed.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from cbtm.errors import StorageError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_MIB = 1 << 20
_PART_BYTES = 64 * _MIB
_PARALLEL_FILES = 16
_PARALLEL_PARTS = 8
_READ_BYTES = 4 * _MIB
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


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI or a local path."""
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
    return (_s3_size(uri) if is_s3(uri) else _local_size(uri)) is not None


def sizes(uri: str, paths: Sequence[str]) -> dict[str, int | None]:
    """Bytes of each of the files `paths` below `uri`, None for one that is not there; several requests at once."""
    if not is_s3(uri):
        return {path: _local_size(join(uri, path)) for path in paths}
    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        return dict(zip(paths, pool.map(lambda path: _s3_size(join(uri, path)), paths), strict=True))


def read_bytes(uri: str) -> bytes:
    """Read a small file whole.

    Raises:
        StorageError: If it is not there or cannot be read.
    """
    if not is_s3(uri):
        return _guard(uri, local_path(uri).read_bytes)
    bucket, key = _split(uri)
    return bytes(_guard(uri, lambda: _s3().get_object(Bucket=bucket, Key=key)["Body"].read()))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small file so that readers see the old one or the new one, never a part."""
    if is_s3(uri):
        bucket, key = _split(uri)
        _guard(uri, lambda: _s3().put_object(Bucket=bucket, Key=key, Body=data))
        return
    _guard(uri, lambda: _write(local_path(uri), data))


def list_files(uri: str) -> list[StoredFile]:
    """List every file below a folder, sorted by path; an absent folder is empty.

    Raises:
        StorageError: If the bucket is not there, or it or a folder may not be read.
    """
    return sorted(_list_s3(uri) if is_s3(uri) else _guard(uri, lambda: list(_list_local(local_path(uri)))))


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[BinaryIO]:
    """Open a file for streaming reads; an S3 object is never held in memory whole."""
    if not is_s3(uri):
        with _guard(uri, lambda: local_path(uri).open("rb")) as file:
            yield file
        return
    bucket, key = _split(uri)
    body: Any = _guard(uri, lambda: _s3().get_object(Bucket=bucket, Key=key)["Body"])
    with contextlib.closing(body):
        yield io.BufferedReader(_Body(body, uri), _READ_BYTES)


class _Body(io.RawIOBase):
    """A streaming S3 body as the raw stream that gzip, zstandard and line iteration build on."""

    def __init__(self, body: Any, uri: str) -> None:
        self._body, self._uri = body, uri

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _guard(self._uri, lambda: bytes(self._body.read(len(buffer))))
        buffer[: len(data)] = data
        return len(data)


def upload(local: Path, uri: str, paths: Sequence[str]) -> None:
    """Copy the files `paths` below the folder `local` to below `uri`, several at once."""
    if not is_s3(uri):
        for path in paths:
            _guard(join(uri, path), lambda path=path: _copy(local / path, local_path(join(uri, path))))  # type: ignore[misc]
        return
    bucket, _ = _split(uri)

    def one(path: str) -> None:
        key = _split(join(uri, path))[1]
        client = _s3()
        _guard(join(uri, path), lambda: client.upload_file(str(local / path), bucket, key, Config=_transfer()))

    _in_parallel(one, paths)


def download(uri: str, local: Path, paths: Sequence[str]) -> None:
    """Copy the files `paths` below `uri` to below the folder `local`, several at once."""
    if not is_s3(uri):
        for path in paths:
            _guard(join(uri, path), lambda path=path: _copy(local_path(join(uri, path)), local / path))  # type: ignore[misc]
        return
    bucket, _ = _split(uri)

    def one(path: str) -> None:
        key = _split(join(uri, path))[1]
        client = _s3()

        def fetch() -> None:
            with _written_whole(local / path) as unfinished:
                client.download_file(bucket, key, str(unfinished), Config=_transfer())

        _guard(join(uri, path), fetch)

    _in_parallel(one, paths)


def delete(uri: str, paths: Sequence[str]) -> None:
    """Remove the files `paths` below `uri`; those that are not there are no error."""
    if not is_s3(uri):
        for path in paths:
            _guard(uri, lambda path=path: local_path(join(uri, path)).unlink(missing_ok=True))  # type: ignore[misc]
        return
    bucket, _ = _split(uri)
    keys = [_split(join(uri, path))[1] for path in paths]
    for start in range(0, len(keys), 1000):  # the most that one request takes
        batch = [{"Key": key} for key in keys[start : start + 1000]]
        answer: Any = _guard(uri, lambda batch=batch: _s3().delete_objects(Bucket=bucket, Delete={"Objects": batch}))  # type: ignore[misc]
        for refused in answer.get("Errors", []):  # the request as a whole succeeds nevertheless
            remedy = _REMEDIES.get(refused["Code"], refused["Code"])
            raise StorageError(f"s3://{bucket}/{refused['Key']} cannot be removed: {remedy}")


def check_writable(uri: str) -> None:
    """Write, read and remove a probe below `uri`, so that a wrong secret shows before the expensive work.

    Raises:
        StorageError: Saying what failed and what to do.
    """
    name = f".cbtm-probe-{uuid.uuid4().hex}"  # no process id: every pod's is 1
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


# --- S3 ---


def _list_s3(uri: str) -> Iterator[StoredFile]:
    bucket, key = _split(uri)
    prefix = f"{key}/" if key else ""  # with the slash, or "run-1" would list "run-10" as well

    def objects() -> list[dict[str, Any]]:
        paginator = _s3().get_paginator("list_objects_v2")
        pages = paginator.paginate(Bucket=bucket, Prefix=prefix)
        return [dict(item) for page in pages for item in page.get("Contents", [])]

    for item in _guard(uri, objects):
        if not item["Key"].endswith("/"):
            yield StoredFile(item["Key"].removeprefix(prefix), item["Size"], item["ETag"].strip('"'))


def _s3_size(uri: str) -> int | None:
    bucket, key = _split(uri)
    try:
        return _s3().head_object(Bucket=bucket, Key=key)["ContentLength"]
    except Exception as error:
        if _code(error) in {"404", "NoSuchKey", "NotFound"}:
            # HEAD answers 404 for a missing bucket as well; the listing tells the two apart.
            _guard(uri, lambda: _s3().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1))
            return None
        raise _explain(error, uri) from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri!r} names no bucket; expected s3://bucket/key")
    return bucket, key.strip("/")


@cache
def _s3() -> "S3Client":
    import boto3
    from botocore.config import Config as BotoConfig

    return boto3.session.Session().client(
        "s3",
        config=BotoConfig(
            retries={"mode": "standard", "total_max_attempts": 8},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=_PARALLEL_FILES * 2,
            # Stores other than AWS refuse or mishandle the trailing checksums of newer boto3 versions.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARALLEL_PARTS
    )


def _in_parallel(action: Callable[[str], None], paths: Sequence[str]) -> None:
    if not paths:
        return
    with ThreadPoolExecutor(min(_PARALLEL_FILES, len(paths))) as pool:
        list(pool.map(action, paths))


def _guard(uri: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except StorageError:
        raise
    except Exception as error:
        raise _explain(error, uri) from error


def _code(error: Exception) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


_REMEDIES = {
    "NoSuchBucket": "the bucket is not there; create it or correct the URI",
    "NoSuchKey": "the object is not there",
    "404": "the object is not there",
    "AccessDenied": "access denied; the credentials need read, write, list and delete on this bucket",
    "403": "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown to the store; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
}


def _explain(error: Exception, uri: str) -> StorageError:
    """Translate an operating-system or botocore error into what happened and what to do."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{error.filename or uri} is not there")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"no space left on the disk that holds {uri}; free some and run again")
    if isinstance(error, PermissionError):
        return StorageError(f"{uri}: permission denied for user id {os.getuid()}")
    name, code = type(error).__name__, _code(error)
    if code in _REMEDIES:
        return StorageError(f"{uri}: {_REMEDIES[code]} ({code})")
    for code, remedy in _REMEDIES.items():
        if f"({code})" in str(error):  # s3transfer wraps the reason into text
            return StorageError(f"{uri}: {remedy} ({code})")
    if "Invalid endpoint" in str(error):
        return StorageError(f"{uri}: {error}; AWS_ENDPOINT_URL is to be a URL such as http://host:9000")
    if name in {"NoCredentialsError", "PartialCredentialsError"}:
        return StorageError(f"{uri}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if name in {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}:
        return StorageError(f"{uri}: the object store does not answer; check AWS_ENDPOINT_URL ({error})")
    return StorageError(f"{uri}: {error}")
