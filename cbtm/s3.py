"""S3 for `cbtm.storage` and for nobody else: client, transfers, listing, and waiting out an outage.

A file of at most 64 MiB is one request with nothing before it: of many small files the time is that of Python between
the requests. Larger ones go through s3transfer, in parts; several files and parts go at once. A store that is away for
a minute must not end hours of work, and botocore's own attempts are over in seconds; so what failed for a passing
reason (no connection, a time-out, a broken stream, 5xx, throttling) is tried again for as long as the process is
patient (see `cbtm.outage`). The unit that is tried again is a request: of a large file the part, of a stream what is
left of it, of a listing the page. Whatever else fails (credentials, bucket, key) is raised at once.
"""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import cbtm
from cbtm.errors import StorageError
from cbtm.outage import GivenUp, Patience, ended_by, persist
from cbtm.s3_errors import REMEDIES, TRANSIENT_CODES, code_of, explain, is_local, is_transient, unwrapped

if TYPE_CHECKING:
    from boto3.s3.transfer import S3Transfer
    from mypy_boto3_s3 import S3Client

_MIB = 1 << 20
_PART_BYTES = 64 * _MIB
_WHOLE_BYTES = 8 * _MIB  # a file up to which is sent from memory
_PARALLEL_FILES = 16
_PARALLEL_PARTS = 8
_READ_BYTES = 4 * _MIB
_ATTEMPTS = 8  # botocore's, of a process without patience
_PATIENT_ATTEMPTS = 3  # botocore's, below ours

S = TypeVar("S")
T = TypeVar("T")


def _ride_out(
    uri: str,
    action: Callable[["S3Client"], T],
    patience: Patience | None = None,
    is_passing: Callable[[Exception], bool] | None = None,
) -> T:
    """Act on the store; a failure is a StorageError, but for those of this machine's files, which stay as they are."""
    patience = patience or Patience.of_this_call()
    try:
        return persist(_store(uri), lambda: action(_client_of(patience)), patience, is_passing or is_transient)
    except StorageError:
        raise
    except GivenUp as given_up:
        error = given_up.reason
        raise StorageError(f"{explain(error, uri)}; given up after {given_up.seconds:.0f} s") from error
    except Exception as error:
        if is_local(error):
            raise
        raise explain(error, uri) from error


# --- small objects and listings ---


def size(uri: str) -> int | None:
    """Bytes of an object, None if it is not there."""
    bucket, key = _split(uri)

    def ask(s3: "S3Client") -> int | None:
        try:
            return s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
        except Exception as error:
            if code_of(error) not in {"404", "NoSuchKey", "NotFound"}:
                raise
        # HEAD answers 404 for a missing bucket as well; the listing tells the two apart.
        s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
        return None

    return _ride_out(uri, ask)


def read(uri: str) -> bytes:
    """Bytes of a small object."""
    bucket, key = _split(uri)
    return _ride_out(uri, lambda s3: bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read()))


def read_if_there(uri: str) -> bytes | None:
    """Bytes of a small object, None if it is not there; a bucket that is not there is an error."""
    try:
        return read(uri)
    except StorageError as error:
        if error.__cause__ is None or code_of(error.__cause__) != "NoSuchKey":
            raise
        return None


def write(uri: str, data: bytes) -> None:
    """Put a small object."""
    bucket, key = _split(uri)
    _ride_out(uri, lambda s3: s3.put_object(Bucket=bucket, Key=key, Body=data))


def listing(uri: str) -> Iterator[tuple[str, int, str]]:
    """Path relative to `uri`, bytes and ETag of every object below it."""
    bucket, key = _split(uri)
    prefix = f"{key}/" if key else ""  # with the slash, or "run-1" would list "run-10" as well
    goes_on: dict[str, Any] = {}
    while True:
        page: Any = _ride_out(uri, lambda s3, at=goes_on: s3.list_objects_v2(Bucket=bucket, Prefix=prefix, **at))  # type: ignore[misc]
        for item in page.get("Contents", []):
            if not item["Key"].endswith("/"):
                yield item["Key"].removeprefix(prefix), item["Size"], item["ETag"].strip('"')
        if not page.get("IsTruncated"):
            return
        goes_on = {"ContinuationToken": page["NextContinuationToken"]}


def delete(uris: Sequence[str]) -> None:
    """Remove objects of one bucket; those that are not there are no error."""
    for start in range(0, len(uris), 1000):  # the most that one request takes
        batch = [_split(uri) for uri in uris[start : start + 1000]]
        _ride_out(uris[start], partial(_delete_batch, batch[0][0], [key for _, key in batch]))


def _delete_batch(bucket: str, keys: list[str], s3: "S3Client") -> None:
    from botocore.exceptions import ClientError

    answer: Any = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys]})
    for refused in answer.get("Errors", []):  # the request as a whole succeeds nevertheless
        if refused["Code"] in TRANSIENT_CODES:
            raise ClientError({"Error": refused}, "DeleteObjects")
        remedy = REMEDIES.get(refused["Code"], refused["Code"])
        raise StorageError(f"s3://{bucket}/{refused['Key']} cannot be removed: {remedy}")


# --- streams ---


def open_stream(uri: str) -> BinaryIO:
    """Open an object for streaming reads of the version that is there now; it is never held in memory whole."""
    return io.BufferedReader(_Stream(uri), _READ_BYTES)


class _Stream(io.RawIOBase):
    """The raw stream that gzip, zstandard and line iteration build on; broken off, it goes on where it was."""

    def __init__(self, uri: str) -> None:
        self._uri, self._patience = uri, Patience.of_this_call()
        self._at, self._size, self._version = 0, 0, ""
        self._body: Any = _ride_out(uri, self._open, self._patience)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _ride_out(self._uri, lambda s3: self._next(s3, len(buffer)), self._patience)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed and self._body is not None:
            self._body.close()
        super().close()

    def _next(self, s3: "S3Client", count: int) -> bytes:
        try:
            self._body = self._body or self._reopen(s3)
            return bytes(self._body.read(count))
        except Exception:
            if self._body is not None:
                self._body.close()
            self._body = None
            raise

    def _open(self, s3: "S3Client") -> Any:
        bucket, key = _split(self._uri)
        answer = s3.get_object(Bucket=bucket, Key=key)
        self._size, self._version = answer["ContentLength"], answer.get("ETag", "")
        return answer["Body"]

    def _reopen(self, s3: "S3Client") -> Any:
        if not self._version:
            raise StorageError(f"{self._uri}: the read broke off, and the store names no version (ETag) to go on with")
        bucket, key = _split(self._uri)
        answer = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={self._at}-", IfMatch=self._version)
        if answer.get("ContentRange") != f"bytes {self._at}-{self._size - 1}/{self._size}":
            answer["Body"].close()
            raise StorageError(f"{self._uri}: the read broke off, and the store gives no ranges to go on with")
        return answer["Body"]


# --- transfers ---


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to an object."""
    bucket, key = _split(uri)
    patience = Patience.of_this_call()
    check = _check_of(uri, patience)
    check(0)

    def put(s3: "S3Client") -> None:
        with _Sent(path, check) as file:
            s3.put_object(Bucket=bucket, Key=key, Body=file.readall() if length <= _WHOLE_BYTES else file)

    def is_passing(error: Exception) -> bool:
        # The store has forgotten the unfinished upload, or has finished it and the answer was lost: once more.
        return code_of(error) == "NoSuchUpload" or is_transient(error)

    length = path.stat().st_size
    if length <= _PART_BYTES:
        _ride_out(uri, put, patience)
    else:
        _transfer(uri, lambda transfer: transfer.upload_file(str(path), bucket, key, check), patience, is_passing)


def download_file(uri: str, path: Path) -> None:
    """Copy an object to a local file."""
    bucket, key = _split(uri)
    patience = Patience.of_this_call()
    check = _check_of(uri, patience)
    check(0)

    def get(s3: "S3Client") -> bool:
        """Copy the object, unless it is larger than a part: the head of the answer tells."""
        answer = s3.get_object(Bucket=bucket, Key=key)
        with contextlib.closing(answer["Body"]) as body, path.open("wb") as file:
            if answer["ContentLength"] > _PART_BYTES:
                return False
            for block in body.iter_chunks(_MIB):  # which sees that it is as long as it should be
                check(len(block))
                file.write(block)
        return True

    if not _ride_out(uri, get, patience):
        _transfer(uri, lambda transfer: transfer.download_file(bucket, key, str(path), callback=check), patience)


class _Sent(io.FileIO):
    """A local file as it is sent: reading it fails once the call is ended."""

    def __init__(self, path: Path, check: Callable[[int], None]) -> None:
        super().__init__(path)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._check(len(data))
        return data


def in_parallel(action: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Results of `action` for each item, several at once; what fails first, or an interrupt, ends the others' waits."""
    if not items:
        return []
    end = threading.Event()
    with ended_by(end), ThreadPoolExecutor(min(_PARALLEL_FILES, len(items))) as pool:
        # In a copy of the context each, so that the patience of this thread is theirs.
        futures = [pool.submit(copy_context().run, action, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            end.set()
            for future in futures:
                future.cancel()
            raise
    return [future.result() for future in futures]


def _check_of(uri: str, patience: Patience) -> Callable[[int], None]:
    """What a transfer calls with the bytes of every piece; fails once the call is ended."""

    def check(_transferred: int) -> None:
        if patience.is_ended():
            raise StorageError(f"{uri}: the transfer was given up")

    return check


def _transfer(
    uri: str,
    move: Callable[["S3Transfer"], None],
    patience: Patience,
    is_passing: Callable[[Exception], bool] | None = None,
) -> None:
    """Run a transfer in parts, and run it again if more broke than the repetition of single requests mends."""
    from boto3.s3.transfer import S3Transfer, TransferConfig

    config: Any = TransferConfig(
        multipart_threshold=_PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_PARALLEL_PARTS,
        preferred_transfer_client="classic",  # the other has attempts and errors of its own
    )

    def attempt(s3: "S3Client") -> None:
        requests: Any = _PatientRequests(s3, uri, patience)
        try:
            with S3Transfer(requests, config) as transfer:
                move(transfer)
        except Exception as error:
            raise unwrapped(error) from None

    _ride_out(uri, attempt, patience, is_passing)


class _PatientRequests:
    """The client as s3transfer sees it: each of its requests waits by itself, so a part that fails is one part.

    Clearing away a failed upload does not wait: nothing depends on it.
    """

    _WAITING = frozenset(
        {"put_object", "create_multipart_upload", "upload_part", "complete_multipart_upload"}
        | {"head_object", "get_object"}
    )

    def __init__(self, s3: "S3Client", uri: str, patience: Patience) -> None:
        self._s3, self._uri, self._patience = s3, uri, patience

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._s3, name)
        return partial(self._request, member) if name in self._WAITING else member

    def _request(self, send: Callable[..., Any], **arguments: Any) -> Any:
        def attempt() -> Any:
            if "Body" in arguments:
                arguments["Body"].seek(0)  # an attempt that failed has read some of it
            return send(**arguments)

        return persist(_store(self._uri), attempt, self._patience, is_transient)


# --- client ---


@cache
def client(attempts: int) -> "S3Client":
    """The client whose requests botocore makes up to `attempts` times, over some seconds."""
    import boto3
    import botocore.session
    from botocore.config import Config as BotoConfig

    session = botocore.session.get_session()
    # Nobody here reads the time of an object, and it is a tenth of what a small answer costs to parse.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
    made = boto3.session.Session(botocore_session=session).client(
        "s3",
        config=BotoConfig(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=_PARALLEL_FILES * 2,
            # The default is put together again for every request, which takes a seventh of a small one's time.
            user_agent=f"cbtm/{cbtm.__version__} Boto3/{boto3.__version__}",
            # Stores other than AWS refuse or mishandle the trailing checksums of newer boto3 versions.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    made.meta.events.register_last("before-call.s3", _send_at_once)
    return made


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Spare what lies in memory the round trip in which botocore asks whether the store will have the body at all."""
    if isinstance(params.get("body"), io.BytesIO):
        params["headers"].pop("Expect", None)


def _client_of(patience: Patience) -> "S3Client":
    return client(_PATIENT_ATTEMPTS if patience.seconds > 0 else _ATTEMPTS)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri!r} names no bucket; expected s3://bucket/key")
    if "@" in bucket:  # the message does not repeat it
        raise StorageError(
            "an s3:// URI was given with a credential before its bucket; leave it out, and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return bucket, key.strip("/")


def _store(uri: str) -> str:
    return f"object store of s3://{_split(uri)[0]}"
