"""S3 for `cbtm.storage` and for nobody else: client, transfers, listing, errors, and waiting out an outage.

Big data goes through s3transfer: multipart above 64 MiB, several parts and files at once. A store that is away for
a minute must not end hours of work, and botocore's own attempts are over in seconds; so what failed for a passing
reason (no connection, a time-out, a broken stream, 5xx, throttling) is tried again for as long as the process is
patient (see `cbtm.outage`). The unit that is tried again is a request: of a large file the part, of a stream what is
left of it, of a listing the page. Whatever else fails (credentials, bucket, key) is raised at once.
"""

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from cbtm.errors import StorageError
from cbtm.outage import GivenUp, Patience, ended_by, persist

if TYPE_CHECKING:
    from boto3.s3.transfer import S3Transfer
    from mypy_boto3_s3 import S3Client

_MIB = 1 << 20
_PART_BYTES = 64 * _MIB
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
        return persist(_store(uri), lambda: action(_client_of(patience)), patience, is_passing or _is_transient)
    except StorageError:
        raise
    except GivenUp as given_up:
        error = given_up.reason
        raise StorageError(f"{_explain(error, uri)}; given up after {given_up.seconds:.0f} s") from error
    except Exception as error:
        if _is_local(error):
            raise
        raise _explain(error, uri) from error


# --- small objects and listings ---


def size(uri: str) -> int | None:
    """Bytes of an object, None if it is not there."""
    bucket, key = _split(uri)

    def ask(s3: "S3Client") -> int | None:
        try:
            return s3.head_object(Bucket=bucket, Key=key)["ContentLength"]
        except Exception as error:
            if _code(error) not in {"404", "NoSuchKey", "NotFound"}:
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
        if error.__cause__ is None or _code(error.__cause__) != "NoSuchKey":
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
        if refused["Code"] in _TRANSIENT_CODES:
            raise ClientError({"Error": refused}, "DeleteObjects")
        remedy = _REMEDIES.get(refused["Code"], refused["Code"])
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

    def is_passing(error: Exception) -> bool:
        # The store has forgotten the unfinished upload, or has finished it and the answer was lost: once more.
        return _code(error) == "NoSuchUpload" or _is_transient(error)

    _transfer(uri, lambda transfer, check: transfer.upload_file(str(path), bucket, key, check), is_passing)


def download_file(uri: str, path: Path) -> None:
    """Copy an object to a local file."""
    bucket, key = _split(uri)
    _transfer(uri, lambda transfer, check: transfer.download_file(bucket, key, str(path), callback=check))


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


def _transfer(
    uri: str,
    move: Callable[["S3Transfer", Callable[[int], None]], None],
    is_passing: Callable[[Exception], bool] | None = None,
) -> None:
    """Run a transfer, and run it again if more broke than the repetition of single requests mends."""
    from boto3.s3.transfer import S3Transfer, TransferConfig

    config: Any = TransferConfig(
        multipart_threshold=_PART_BYTES,
        multipart_chunksize=_PART_BYTES,
        max_concurrency=_PARALLEL_PARTS,
        preferred_transfer_client="classic",  # the other has attempts and errors of its own
    )
    patience = Patience.of_this_call()

    def check(_transferred: int) -> None:  # called with every piece that is sent or received
        if patience.is_ended():
            raise StorageError(f"{uri}: the transfer was given up")

    def attempt(s3: "S3Client") -> None:
        requests: Any = _PatientRequests(s3, uri, patience)
        try:
            with S3Transfer(requests, config) as transfer:
                move(transfer, check)
        except Exception as error:
            raise _unwrapped(error) from None

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

        return persist(_store(self._uri), attempt, self._patience, _is_transient)


# --- client ---


@cache
def client(attempts: int) -> "S3Client":
    """The client whose requests botocore makes up to `attempts` times, over some seconds."""
    import boto3
    from botocore.config import Config as BotoConfig

    return boto3.session.Session().client(
        "s3",
        config=BotoConfig(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=_PARALLEL_FILES * 2,
            # Stores other than AWS refuse or mishandle the trailing checksums of newer boto3 versions.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


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


# --- errors ---

_TRANSIENT_STATUS = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    *("InternalError", "ServiceUnavailable", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"),
    *("TooManyRequests", "RequestLimitExceeded", "BandwidthLimitExceeded", "OperationAborted"),
}
_REMEDIES = {
    "NoSuchBucket": "the bucket is not there; create it or correct the URI",
    "NoSuchKey": "the object is not there",
    "404": "the object is not there",
    "PreconditionFailed": "the object was changed while it was read; run again when nothing writes to it",
    "AccessDenied": "access denied; the credentials need read, write, list and delete on this bucket",
    "403": "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown to the store; check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret is wrong; check AWS_SECRET_ACCESS_KEY",
}


def _unwrapped(error: Exception) -> Exception:
    """What s3transfer wrapped into an error of its own."""
    wrapped = getattr(error, "last_exception", None)
    if type(error).__name__ == "S3UploadFailedError":
        wrapped = error.__context__
    return wrapped if isinstance(wrapped, Exception) else error


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_local(error: Exception) -> bool:
    """Tell whether a file of this machine failed; botocore's errors carry no number of the operating system."""
    of_a_socket = isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, OSError) and error.errno is not None and not of_a_socket


def _is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed later, with nothing done about it."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUS or _code(error) in _TRANSIENT_CODES
    if isinstance(error, exceptions.SSLError):
        return not any(lasting in str(error) for lasting in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"))
    passing = (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.IncompleteReadError)
    return isinstance(error, (*passing, ConnectionError, TimeoutError))


def _explain(error: Exception, uri: str) -> StorageError:
    """Translate an error of botocore into what happened and what to do."""
    name, code = type(error).__name__, _code(error)
    if code in _REMEDIES:
        return StorageError(f"{uri}: {_REMEDIES[code]} ({code})")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(
            f"{uri}: the certificate of the object store cannot be verified; set AWS_CA_BUNDLE to the file of the "
            f"authority that signed it ({error})"
        )
    if "Invalid endpoint" in str(error):
        return StorageError(f"{uri}: {error}; AWS_ENDPOINT_URL is to be a URL such as http://host:9000")
    if name in {"NoCredentialsError", "PartialCredentialsError"}:
        return StorageError(f"{uri}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if name in {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}:
        return StorageError(f"{uri}: the object store does not answer; check AWS_ENDPOINT_URL ({error})")
    return StorageError(f"{uri}: {error}")
