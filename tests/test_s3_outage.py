"""An object store that goes away and comes back: behind a proxy that refuses, resets or answers 503 over real sockets.

The proxy stands between the client and the moto server. An outage here lasts `AWAY` seconds, and attempts begin 0.1 s
apart instead of 0.5 s; botocore's own three are over within that.
"""

import contextlib
import errno
import itertools
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, NoCredentialsError, ReadTimeoutError, SSLError

from cbtm import outage, s3, s3_errors, storage
from cbtm.errors import ConfigError, StorageError
from cbtm.manifest import StageSpec, fetch, run_stage
from cbtm.process import s3_patience, stage_process

MIB = 1 << 20
PART = 5 * MIB  # the least that S3 takes
AWAY = 0.4
PATIENCE = 10.0

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Proxy:
    """A TCP proxy that can be switched off, and drops its connections when it is."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.address: tuple[str, int] = ("127.0.0.1", 0)
        self.listener: socket.socket | None = None
        self.open: set[socket.socket] = set()
        self.timer: threading.Timer | None = None
        self.attempts_asked: list[int] = []  # of the clients that storage took
        self.pass_on()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def pass_on(self, up_to: int | None = None) -> None:
        """Pass everything on; given `up_to`, reset each connection after so many bytes in both directions together."""
        self._serve(lambda client: self._relay(client, up_to))

    def answer(self, status: int, body: bytes = b"") -> None:
        """Answer every request with this status."""
        self._serve(lambda client: self._answer(client, status, body))

    def refuse(self) -> None:
        """Take no connections and reset those there are."""
        if self.listener is not None:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
        for one in [*self.open]:
            reset(one)

    def away(self, seconds: float = AWAY) -> None:
        """Be back in so many seconds, whatever it does until then."""
        self.timer = threading.Timer(seconds, self.pass_on)
        self.timer.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer.join()
        self.refuse()

    def _serve(self, handle: Callable[[socket.socket], None]) -> None:
        self.refuse()
        listener = self.listener = socket.create_server(self.address, backlog=64)
        self.address = listener.getsockname()

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    client, _ = listener.accept()
                    self.open.add(client)
                    threading.Thread(target=handle, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def _relay(self, client: socket.socket, up_to: int | None) -> None:
        server = socket.create_connection(self.target)
        self.open.add(server)
        passed = itertools.count()

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(64 * 1024):
                    sink.sendall(data)
                    if up_to is not None and (next(passed) + 1) * 64 * 1024 >= up_to:
                        break
            reset(client)
            reset(server)

        threading.Thread(target=pump, args=(server, client), daemon=True).start()
        pump(client, server)

    def _answer(self, client: socket.socket, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):
            client.recv(64 * 1024)
            client.sendall(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)))
            client.sendall(body)
            client.shutdown(socket.SHUT_WR)
            while client.recv(64 * 1024):  # to the end of the request, or the client sees a reset and no answer
                pass
        client.close()


def reset(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@pytest.fixture(scope="module")
def proxied(s3_server: tuple[str, Any]) -> Iterator[tuple[Proxy, Any, Any]]:
    """A proxy in front of the store, the client of a patient process through it, and one past it."""
    endpoint, direct = s3_server
    host, port = endpoint.removeprefix("http://").split(":")
    proxy = Proxy((host, int(port)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3.client.cache_clear()
        client = s3.client(attempts=3)
        s3.client.cache_clear()
    yield proxy, client, direct
    proxy.stop()


@pytest.fixture
def proxy(proxied: tuple[Proxy, Any, Any], s3_settings: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy, switched on, in a patient process."""
    proxy, client, _ = proxied
    s3_settings.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.attempts_asked.clear()

    def client_of(attempts: int) -> Any:
        proxy.attempts_asked.append(attempts)
        return client

    client_of.cache_clear = lambda: None  # type: ignore[attr-defined]
    s3_settings.setattr(s3, "client", client_of)
    s3_settings.setattr(s3, "_PART_BYTES", PART)
    s3_settings.setattr(outage, "_log", outage._OutageLog())
    s3_settings.setattr(outage, "_FIRST_PAUSE", 0.1)
    storage.be_patient(PATIENCE)
    proxy.pass_on()
    yield proxy
    if proxy.timer is not None:
        proxy.timer.cancel()
        proxy.timer.join()


@pytest.fixture
def root(proxied: tuple[Proxy, Any, Any]) -> str:
    name = f"test-{uuid.uuid4().hex}"
    proxied[2].create_bucket(Bucket=name)
    return f"s3://{name}/some"


def refuse(proxy: Proxy) -> None:
    proxy.refuse()


def busy(proxy: Proxy) -> None:
    proxy.answer(503, BUSY)


def seconds_of(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


# --- what is repeated ---


@pytest.mark.parametrize("outage", [refuse, busy])
def test_small_requests_of_every_kind_wait_for_the_store(proxy: Proxy, root: str, outage: Callable[[Proxy], None]):
    storage.write_bytes(f"{root}/a", b"abc")
    storage.write_bytes(f"{root}/b", b"b")
    outage(proxy)
    proxy.away()
    results: dict[str, object] = {}
    actions: dict[str, Callable[[], object]] = {
        "write": lambda: storage.write_bytes(f"{root}/new/c", b"c"),
        "read": lambda: storage.read_bytes(f"{root}/a"),
        "list": lambda: [file.path for file in storage.list_files(root)][:1],
        "exists": lambda: storage.exists(f"{root}/absent"),
        "sizes": lambda: storage.sizes(root, ["a", "absent"]),
        "delete": lambda: storage.delete(root, ["b"]),
        "sha256": lambda: storage.sha256(f"{root}/a")[:4],
    }
    threads = [
        threading.Thread(target=lambda name=name, act=act: results.update({name: act()}))  # type: ignore[misc]
        for name, act in actions.items()
    ]

    def all_at_once() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert seconds_of(all_at_once) > AWAY - 0.1
    expected = {"write": None, "read": b"abc", "list": ["a"], "exists": False, "delete": None}
    assert results == expected | {"sizes": {"a": 3, "absent": None}, "sha256": "ba78"}
    assert [file.path for file in storage.list_files(root)] == ["a", "new/c"]


def test_a_stage_is_published_and_fetched_through_outages(proxy: Proxy, root: str, tmp_path: Path):
    spec = StageSpec("stage", root, "config-1")

    def build(work: Path) -> dict[str, Any]:
        for number in range(5):
            (work / f"{number}.bin").write_bytes(bytes([number]) * 1000)
        proxy.refuse()
        proxy.away()
        return {"count": 5}

    made = run_stage(spec, build)
    proxy.answer(503, BUSY)
    proxy.away()
    folder = fetch(root, made, made.paths(), tmp_path / "back")
    assert [(folder / f"{number}.bin").read_bytes()[:1] for number in range(5)] == [bytes([n]) for n in range(5)]
    assert run_stage(spec, build) == made  # up to date: nothing is torn


# --- transfers ---


def upload_requests(client: Any) -> tuple[list[str], Callable[[], None]]:
    """Every request of an upload that the store has answered, by name and number of the part."""
    answered: list[str] = []

    def note(model: Any, http_response: Any, context: Any, **_: Any) -> None:
        if http_response.status_code < 300:
            number = (context.get("input_params") or {}).get("PartNumber", "")
            answered.append(f"{model.name}{number}")

    client.meta.events.register("after-call.s3", note)
    return answered, lambda: client.meta.events.unregister("after-call.s3", note)


def test_an_upload_that_is_reset_in_the_middle_repeats_the_parts_that_failed_and_no_others(
    proxy: Proxy, proxied: tuple[Proxy, Any, Any], root: str, tmp_path: Path
):
    data = os.urandom(PART) + os.urandom(PART) + os.urandom(MIB)
    (tmp_path / "big").write_bytes(data)
    answered, forget = upload_requests(proxied[1])
    parts_seen = threading.Event()

    def cut(model: Any, http_response: Any, **_: Any) -> None:
        if model.name == "UploadPart" and http_response.status_code == 200 and not parts_seen.is_set():
            parts_seen.set()  # the first part is there: reset the others
            proxy.refuse()
            proxy.away()

    proxied[1].meta.events.register("after-call.s3", cut)
    try:
        took = seconds_of(lambda: storage.upload(tmp_path, root, ["big"]))
    finally:
        proxied[1].meta.events.unregister("after-call.s3", cut)
        forget()
    assert took > AWAY - 0.1
    assert answered.count("CreateMultipartUpload") == 1
    assert sum(name.startswith("UploadPart") for name in answered) == 3  # 5 + 5 + 1 MiB, none of them twice
    assert storage.read_bytes(f"{root}/big") == data


def test_of_several_files_those_that_failed_are_uploaded_again(
    proxy: Proxy, proxied: tuple[Proxy, Any, Any], root: str, tmp_path: Path
):
    paths = [f"{number:02d}" for number in range(20)]
    for path in paths:
        (tmp_path / path).write_bytes(path.encode())
    answered, forget = upload_requests(proxied[1])

    def cut(**_: Any) -> None:
        if len(answered) == 5:
            proxy.refuse()
            proxy.away()

    proxied[1].meta.events.register_last("after-call.s3", cut)
    try:
        storage.upload(tmp_path, root, paths)
    finally:
        proxied[1].meta.events.unregister("after-call.s3", cut)
        forget()
    assert len(answered) == 20
    storage.download(root, tmp_path / "back", paths)
    assert [(tmp_path / "back" / path).read_bytes() for path in paths] == [path.encode() for path in paths]


def test_an_upload_that_the_store_has_forgotten_begins_again(
    proxy: Proxy, proxied: tuple[Proxy, Any, Any], root: str, tmp_path: Path
):
    data = os.urandom(PART + MIB)
    (tmp_path / "big").write_bytes(data)
    client = proxied[1]
    created: list[str] = []

    def forget(model: Any, http_response: Any, parsed: Any, **_: Any) -> None:
        if model.name == "CreateMultipartUpload" and http_response.status_code == 200:
            created.append(parsed["UploadId"])
            if len(created) == 1:
                # moto answers 500 where S3 says this.
                proxy.answer(404, b"<Error><Code>NoSuchUpload</Code><Message>no</Message></Error>")
                proxy.away(0.3)

    client.meta.events.register("after-call.s3", forget)
    try:
        storage.upload(tmp_path, root, ["big"])
    finally:
        client.meta.events.unregister("after-call.s3", forget)
    assert len(created) == 2
    assert storage.read_bytes(f"{root}/big") == data


def test_a_download_whose_connections_are_reset_in_the_middle_comes_back_whole(proxy: Proxy, root: str, tmp_path: Path):
    data = os.urandom(2 * PART + MIB)
    storage.write_bytes(f"{root}/big", data)
    proxy.pass_on(up_to=MIB)  # each of the three ranges breaks off, again and again
    proxy.away()
    assert seconds_of(lambda: storage.download(root, tmp_path, ["big"])) > AWAY - 0.1
    assert (tmp_path / "big").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["big"]


# --- streams ---


@contextlib.contextmanager
def half_read(proxy: Proxy, root: str, data: bytes) -> Iterator[tuple[BinaryIO, bytes]]:
    """A stream of which the first MiB has been read when its connection is reset."""
    storage.write_bytes(f"{root}/corpus", data)
    proxy.pass_on(up_to=8 * MIB)
    with storage.open_read(f"{root}/corpus") as file:
        yield file, file.read(MIB)


def test_a_stream_goes_on_where_it_broke_off(proxy: Proxy, root: str):
    data = os.urandom(MIB) * 24
    with half_read(proxy, root, data) as (file, first):
        proxy.refuse()
        proxy.away()
        assert first + file.read() == data


def test_a_stream_is_of_one_version_of_the_object(proxy: Proxy, root: str, proxied: tuple[Proxy, Any, Any]):
    data = os.urandom(MIB) * 24
    bucket = root.removeprefix("s3://").split("/")[0]
    with half_read(proxy, root, data) as (file, _):
        proxied[2].put_object(Bucket=bucket, Key="some/corpus", Body=bytes(24 * MIB))
        proxy.refuse()
        proxy.away()
        with pytest.raises(
            StorageError, match=f"^{root}/corpus: the object was changed while it was read; run again when nothing"
        ):
            file.read()


# --- what is not repeated, and for how long ---


def test_without_patience_the_error_comes_at_once(proxy: Proxy, root: str, caplog: pytest.LogCaptureFixture):
    storage.be_patient(0)
    proxy.refuse()
    with pytest.raises(StorageError, match=rf"^{root}/a: the object store does not answer; check AWS_ENDPOINT_URL \("):
        storage.read_bytes(f"{root}/a")
    with pytest.raises(StorageError, match=r"the object store does not answer; check AWS_ENDPOINT_URL \(.*\)$"):
        storage.read_bytes(f"{root}/a")
    assert caplog.messages == []


def test_the_probe_before_the_work_does_not_wait(proxy: Proxy, root: str):
    proxy.refuse()
    with pytest.raises(StorageError, match=r"the object store does not answer; check AWS_ENDPOINT_URL \(.*\)$"):
        storage.check_writable(root)
    assert set(proxy.attempts_asked) == {8}  # botocore's own, as without patience


def test_patience_is_over_after_its_seconds_and_says_so(proxy: Proxy, root: str):
    proxy.refuse()
    with storage.patience(0.6):
        began = time.monotonic()
        with pytest.raises(
            StorageError, match=rf"^{root}/a: the object store does not answer; check AWS_.*; given up after [12] s$"
        ):
            storage.read_bytes(f"{root}/a")
        assert 0.6 <= time.monotonic() - began < 3
    assert outage.Patience.of_this_call().seconds == PATIENCE


def test_patience_of_a_block_reaches_the_threads_of_its_calls(proxy: Proxy, root: str, tmp_path: Path):
    (tmp_path / "a").write_bytes(b"a")
    proxy.refuse()
    with storage.patience(0.5), pytest.raises(StorageError, match=r"given up after [01] s$"):
        storage.upload(tmp_path, root, ["a"])


def test_what_will_not_pass_is_raised_at_once(proxy: Proxy, root: str, tmp_path: Path):
    for action, message in [
        (lambda: storage.read_bytes(f"{root}/absent"), "the object is not there"),
        (lambda: storage.list_files(f"{root.replace('test-', 'no-')}"), "the bucket is not there"),
        (lambda: storage.upload(tmp_path, root, ["absent"]), "absent is not there"),
    ]:
        began = time.monotonic()
        with pytest.raises(StorageError, match=message):
            action()
        assert time.monotonic() - began < 0.5
    denied = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    proxy.answer(403, denied)
    with pytest.raises(StorageError, match=r"access denied; the credentials need .*\(AccessDenied\)$"):
        storage.write_bytes(f"{root}/a", b"x")
    refused = b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
    proxy.answer(403, refused)
    (tmp_path / "a").write_bytes(bytes(PART + MIB))
    with pytest.raises(StorageError, match="the secret is wrong; check AWS_SECRET_ACCESS_KEY"):
        storage.upload(tmp_path, root, ["a"])


def refusal(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((refusal(status, str(status)), True) for status in (429, 500, 502, 503, 504)),
        *((refusal(status, str(status)), False) for status in (301, 400, 403, 404, 412, 501)),
        (refusal(400, "RequestTimeout"), True),
        (refusal(200, "SlowDown"), True),  # of one object of many that are removed
        (refusal(403, "RequestTimeTooSkewed"), False),
        (ReadTimeoutError(endpoint_url="http://host"), True),
        (ConnectTimeoutError(endpoint_url="http://host"), True),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), True),
        (SSLError(endpoint_url="https://host", error="[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), False),
        (SSLError(endpoint_url="https://host", error="[SSL: WRONG_VERSION_NUMBER] it speaks http"), False),
        (SSLError(endpoint_url="https://host", error="EOF occurred in violation of protocol"), True),
        (NoCredentialsError(), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
    ],
    ids=str,
)
def test_what_may_pass_by_itself_is_told_from_what_does_not(error: Exception, passes: bool):
    assert s3_errors.is_transient(error) is passes


def test_a_missing_endpoint_scheme_or_missing_credentials_are_named_at_once(s3_settings: pytest.MonkeyPatch):
    storage.be_patient(60)
    s3_settings.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL is to be a URL such as"):
        storage.read_bytes("s3://bucket/key")
    s3_settings.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3.client.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3_settings.delenv(name)
    boto3.DEFAULT_SESSION = None
    with pytest.raises(StorageError, match="no credentials found"):
        storage.read_bytes("s3://bucket/key")


# --- what the log says ---


def test_an_outage_is_one_warning_and_one_line_when_it_is_over_however_many_threads_meet_it(
    proxy: Proxy, root: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "cbtm")
    bucket = root.rpartition("/")[0]
    proxy.refuse()
    proxy.away()
    assert storage.sizes(root, [str(number) for number in range(12)]) == {str(number): None for number in range(12)}
    first, last = caplog.messages
    assert first.startswith(f"object store of {bucket} does not answer (Could not connect to the endpoint URL: ")
    assert first.endswith("); trying again for up to 10 s")
    assert last.startswith(f"object store of {bucket} answers again after ")
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


# --- what ends it ---


def test_an_event_ends_the_wait_of_every_thread_of_a_call(proxy: Proxy, root: str, tmp_path: Path):
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"x")
    proxy.refuse()
    end = threading.Event()
    threading.Timer(0.3, end.set).start()
    began = time.monotonic()
    with storage.ended_by(end), pytest.raises(StorageError, match=r"does not answer; .*; given up after \d s$"):
        storage.upload(tmp_path, root, [str(number) for number in range(4)])
    assert time.monotonic() - began < 2.5


def test_an_event_breaks_off_a_transfer_that_is_under_way(
    proxy: Proxy, proxied: tuple[Proxy, Any, Any], root: str, tmp_path: Path
):
    (tmp_path / "big").write_bytes(bytes(2 * PART))
    end = threading.Event()

    def set_end(model: Any, **_: Any) -> None:
        if model.name == "CreateMultipartUpload":
            end.set()

    proxied[1].meta.events.register("after-call.s3", set_end)
    try:
        with storage.ended_by(end), pytest.raises(StorageError, match=f"{root}/big: "):
            storage.upload(tmp_path, root, ["big"])
    finally:
        proxied[1].meta.events.unregister("after-call.s3", set_end)
    assert storage.list_files(root) == []
    bucket = root.removeprefix("s3://").split("/")[0]
    assert "Uploads" not in proxied[2].list_multipart_uploads(Bucket=bucket)  # nothing of it is left in the store


def test_an_event_breaks_off_the_one_request_of_a_smaller_file(
    proxy: Proxy, proxied: tuple[Proxy, Any, Any], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "_WHOLE_BYTES", MIB)
    (tmp_path / "file").write_bytes(bytes(PART))
    end, events = threading.Event(), proxied[1].meta.events

    def set_end(**_: Any) -> None:
        end.set()

    events.register("before-send.s3", set_end)
    try:
        with storage.ended_by(end), pytest.raises(StorageError, match=f"{root}/file: "):
            storage.upload(tmp_path, root, ["file"])
    finally:
        events.unregister("before-send.s3", set_end)
    assert storage.list_files(root) == []


@pytest.mark.parametrize("action", ["read_bytes(uri)", "upload(Path(here), uri, ['a', 'b'])"])
def test_ctrl_c_ends_the_wait(s3_settings: pytest.MonkeyPatch, tmp_path: Path, action: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        s3_settings.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    for name in "ab":
        (tmp_path / name).write_bytes(b"x")
    script = f"""
import logging, signal, sys
from pathlib import Path
from cbtm import storage
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it, and so its children
logging.basicConfig(stream=sys.stdout, format="%(message)s")
here, uri = sys.argv[1], "s3://bucket/key"
storage.be_patient(300)
storage.{action}
"""
    options = [sys.executable, "-u", "-c", script, str(tmp_path)]
    with subprocess.Popen(options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "does not answer" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert errors.rstrip().endswith("KeyboardInterrupt")


# --- who is patient ---


@pytest.mark.parametrize(("setting", "seconds"), [(None, 300.0), ("", 300.0), ("12.5", 12.5), ("0", 0.0)])
def test_a_stage_takes_its_patience_from_the_environment(
    s3_settings: pytest.MonkeyPatch, setting: str | None, seconds: float
):
    assert outage.Patience.of_this_call().seconds == 0
    s3_settings.delenv("CBTM_S3_PATIENCE", raising=False)
    if setting is not None:
        s3_settings.setenv("CBTM_S3_PATIENCE", setting)
    s3_settings.setattr("cbtm.process.log_to_stderr", lambda: None)
    with stage_process():
        assert outage.Patience.of_this_call().seconds == seconds


@pytest.mark.parametrize("setting", ["soon", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(s3_settings: pytest.MonkeyPatch, setting: str):
    s3_settings.setenv("CBTM_S3_PATIENCE", setting)
    with pytest.raises(ConfigError, match=f"CBTM_S3_PATIENCE='{setting}' is to be a number of seconds, such as 300"):
        s3_patience()
