"""An object store in this process's memory, behind boto3's real client, and a count of what is asked of it.

The client, s3transfer and everything of cbtm above them are the real ones; what would go over the network is answered
here, after a latency of one's choice. So a run's requests can be counted, and timed for any store, at a size for
which no store is at hand: an object may have a size and no content.
"""

import hashlib
import io
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KINDS = ("head", "get", "list", "put", "delete")
_PAGE = 1000  # keys in one listing, as S3 has it
_XMLNS = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@dataclass
class Requests:
    """Requests by kind, and what they moved.

    Attributes:
        kinds: How many of each of `KINDS`; parts of a multipart upload count as put.
        bytes_read: Bytes of all answers to get.
        read: Bytes of those answers, by "/bucket/key".
        gets: How often each of those was asked for.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    read: Counter[str] = field(default_factory=Counter)
    gets: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def kind_of(method: str, url: str) -> str:
    """What a request to S3 is, of `KINDS`."""
    query = urlsplit(url).query
    if method == "POST" and "delete" in query.split("&"):
        return "delete"
    if method == "GET" and "list-type=2" in query:
        return "list"
    return {"HEAD": "head", "GET": "get", "DELETE": "delete"}.get(method, "put")


@contextmanager
def counted(client: Any) -> Iterator[Requests]:
    """Count the requests that a boto3 client sends to whatever store it speaks to; repeated ones count each time."""
    found, lock = Requests(), threading.Lock()

    def note(request: Any, **_: Any) -> None:
        with lock:
            found.kinds[kind_of(request.method, request.url)] += 1

    def note_answer(http_response: Any, parsed: Any, model: Any, **_: Any) -> None:
        if model.name == "GetObject" and "ContentLength" in parsed:
            with lock:
                key = unquote(urlsplit(http_response.url).path)
                found.bytes_read += parsed["ContentLength"]
                found.read[key] += parsed["ContentLength"]
                found.gets[key] += 1

    client.meta.events.register("before-send.s3", note)
    client.meta.events.register("after-call.s3", note_answer)
    try:
        yield found
    finally:
        client.meta.events.unregister("before-send.s3", note)
        client.meta.events.unregister("after-call.s3", note_answer)


class MemoryStore:
    """Objects by "bucket/key": content, or a size alone.

    Args:
        latency: Seconds that every request takes beside the client's own work; requests at the same time wait at the
            same time.
    """

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self._objects: dict[str, bytes | int] = {}
        self._sorted: list[str] | None = None
        self._lock = threading.Lock()

    def put(self, uri: str, content: bytes | int) -> None:
        with self._lock:
            if uri not in self._objects:
                self._sorted = None
            self._objects[uri] = content

    def __len__(self) -> int:
        return len(self._objects)

    def attach(self, client: Any) -> None:
        """Answer everything that a boto3 client asks from now on."""
        client.meta.events.register("before-send.s3", self._answer)

    def _answer(self, request: Any, **_: Any) -> Any:
        if self.latency:
            time.sleep(self.latency)
        key = unquote(urlsplit(request.url).path).removeprefix("/")
        answers: dict[str, Callable[[Any, str], Any]] = {
            "head": self._head,
            "get": self._get,
            "list": self._list,
            "put": self._put,
            "delete": self._delete,
        }
        return answers[kind_of(request.method, request.url)](request, key)

    def _head(self, request: Any, key: str) -> Any:
        found = self._objects.get(key)
        return _response(request, 404, b"") if found is None else _response(request, 200, b"", size=_size(found))

    def _get(self, request: Any, key: str) -> Any:
        found = self._objects.get(key)
        if found is None:
            return _response(request, 404, b"<Error><Code>NoSuchKey</Code></Error>")
        if isinstance(found, int):
            raise AssertionError(f"{key} has a size and no content, and was read")
        return _response(request, 200, found)

    def _put(self, request: Any, key: str) -> Any:
        body = request.body
        self.put(key, body if isinstance(body, bytes) else bytes(body.read()) if body is not None else b"")
        return _response(request, 200, b"")

    def _delete(self, request: Any, key: str) -> Any:
        text = bytes(request.body).decode()
        bucket = key.rstrip("/")
        with self._lock:
            for part in text.split("<Key>")[1:]:
                self._objects.pop(f"{bucket}/{part.partition('</Key>')[0]}", None)
            self._sorted = None
        return _response(request, 200, f"<DeleteResult {_XMLNS}></DeleteResult>".encode())

    def _list(self, request: Any, key: str) -> Any:
        bucket, query = key.rstrip("/"), parse_qs(urlsplit(request.url).query)
        prefix = f"{bucket}/{query.get('prefix', [''])[0]}"
        with self._lock:
            keys = self._sorted = self._sorted if self._sorted is not None else sorted(self._objects)
        after = query.get("continuation-token", [None])[0]
        begin = bisect_left(keys, prefix) if after is None else bisect_right(keys, after)
        limit = min(int(query.get("max-keys", [_PAGE])[0]), _PAGE)
        page = [one for one in keys[begin : begin + limit] if one.startswith(prefix)]
        more = begin + limit < len(keys) and keys[begin + limit].startswith(prefix)
        items = "".join(
            f"<Contents><Key>{escape(one.partition('/')[2])}</Key><Size>{_size(self._objects[one])}</Size>"
            f"<ETag>{_etag(one)}</ETag></Contents>"
            for one in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = f"<ListBucketResult {_XMLNS}><IsTruncated>{str(more).lower()}</IsTruncated>{items}{token}"
        return _response(request, 200, f"{text}</ListBucketResult>".encode())


class _Raw(io.BytesIO):
    """The body of an answer as urllib3 gives it."""

    def stream(self, amount: int = 1 << 16, **_: Any) -> Iterator[bytes]:
        while block := self.read(amount):
            yield block


def _response(request: Any, status: int, body: bytes, *, size: int | None = None) -> Any:
    from botocore.awsrequest import AWSResponse

    headers = {"Content-Length": str(len(body) if size is None else size), "ETag": '"0"'}
    return AWSResponse(request.url, status, headers, _Raw(body))


def _size(content: bytes | int) -> int:
    return content if isinstance(content, int) else len(content)


def _etag(key: str) -> str:
    return hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()
