"""Storage: one behaviour for folders and S3, and what a person reads when it fails."""

import errno
import gzip
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cbtm import s3, storage
from cbtm.errors import StorageError

MIB = 1 << 20


def files_of(root: str) -> list[tuple[str, int]]:
    return [(file.path, file.size) for file in storage.list_files(root)]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


# --- one behaviour for both ---


def test_a_file_is_read_as_it_was_written_and_replaced_whole(root: str):
    uri = storage.join(root, "deep/er/file.bin")
    storage.write_bytes(uri, b"old, and longer")
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert files_of(root) == [("deep/er/file.bin", 3)]


def test_an_empty_file_is_a_file(root: str):
    uri = storage.join(root, "empty")
    storage.write_bytes(uri, b"")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b""
    with storage.open_read(uri) as file:
        assert file.read() == b""


def test_the_listing_is_sorted_deep_and_relative(root: str):
    for path in ("b/2", "a", "b/1/x", "b-c/1"):
        storage.write_bytes(storage.join(root, path), path.encode())
    assert files_of(root) == [("a", 1), ("b-c/1", 5), ("b/1/x", 5), ("b/2", 3)]
    assert files_of(f"{root}/b/") == [("1/x", 5), ("2", 3)]


def test_the_listing_of_a_folder_that_is_not_there_is_empty(root: str):
    assert storage.list_files(root) == []


def test_a_folder_does_not_list_another_whose_name_goes_on(root: str):
    storage.write_bytes(f"{root}/run-1/a", b"1")
    storage.write_bytes(f"{root}/run-10/b", b"10")
    assert files_of(f"{root}/run-1") == [("a", 1)]


def test_a_version_changes_with_the_content(root: str):
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"one")
    first = storage.list_files(root)[0].version
    assert storage.list_files(root)[0].version == first
    time.sleep(0.02)  # more than the clock of a file system steps
    storage.write_bytes(uri, b"two")
    assert storage.list_files(root)[0].version != first


def test_a_file_exists_and_a_folder_or_part_of_a_name_does_not(root: str):
    storage.write_bytes(storage.join(root, "folder/file"), b"x")
    assert storage.exists(f"{root}/folder/file")
    assert not storage.exists(f"{root}/folder")
    assert not storage.exists(f"{root}/folder/fil")
    assert not storage.exists(f"{root}/folder/file/below")


def test_sizes_are_bytes_or_none(root: str):
    storage.write_bytes(storage.join(root, "a"), b"12345")
    storage.write_bytes(storage.join(root, "b/c"), b"")
    assert storage.sizes(root, ["a", "absent", "b/c"]) == {"a": 5, "absent": None, "b/c": 0}
    assert storage.sizes(root, []) == {}


def test_several_small_files_are_read_at_once_and_none_stands_for_one_that_is_not_there(root: str):
    storage.write_bytes(storage.join(root, "a/1"), b"one")
    storage.write_bytes(storage.join(root, "2"), b"")
    assert storage.read_each(root, ["2", "missing", "a/1", "a"]) == {
        "2": b"",
        "missing": None,
        "a/1": b"one",
        "a": None,
    }
    assert storage.read_if_there(storage.join(root, "a/1")) == b"one"
    assert storage.read_if_there(storage.join(root, "a/2")) is None


def test_a_bucket_that_is_not_there_is_no_file_that_is_not_there(s3_server, bucket: str):
    with pytest.raises(StorageError, match="the bucket is not there"):
        storage.read_if_there(f"{bucket}-of-nobody/file")


def test_delete_removes_what_is_named_and_nothing_else(root: str):
    for path in ("a", "b/c", "b/d"):
        storage.write_bytes(storage.join(root, path), b"x")
    storage.delete(root, ["a", "b/c", "never/there"])
    assert files_of(root) == [("b/d", 1)]
    storage.delete(root, [])
    assert files_of(root) == [("b/d", 1)]


def test_files_come_back_from_an_upload_as_they_went(root: str, tmp_path: Path):
    files = {f"part-{number}/{number}.bin": bytes([number]) * number for number in range(40)}  # more than go at once
    here = write_files(tmp_path / "here", files)
    storage.upload(here, root, [*files])
    assert files_of(root) == [(path, len(data)) for path, data in sorted(files.items())]
    storage.download(root, tmp_path / "back", [*files])
    assert {path: (tmp_path / "back" / path).read_bytes() for path in files} == files
    assert files_of(str(tmp_path / "back")) == files_of(root)


@pytest.mark.parametrize("path", ["../outside", "a/../../outside", ".."])
@pytest.mark.parametrize("act", ["write", "upload", "delete", "download"])
def test_a_path_that_climbs_out_of_its_folder_is_refused(root: str, tmp_path: Path, act: str, path: str):
    outside = storage.join(root.rpartition("/")[0], "outside")
    storage.write_bytes(outside, b"as it was")
    write_files(tmp_path / "here", {"a/file": b"x"})
    actions: dict[str, Callable[[], object]] = {
        "write": lambda: storage.write_bytes(storage.join(root, path), b"x"),
        "upload": lambda: storage.upload(tmp_path / "here", root, [path]),
        "delete": lambda: storage.delete(root, [path]),
        "download": lambda: storage.download(root, tmp_path / "there", [path]),
    }
    with pytest.raises(StorageError, match=re.escape(repr(path))):
        actions[act]()
    assert storage.read_bytes(outside) == b"as it was"


@pytest.mark.parametrize("key", ["../../stolen", "/etc/cbtm-stolen"])
def test_an_object_whose_name_climbs_is_neither_listed_nor_written_to_this_machine(bucket, s3_server, tmp_path, key):
    s3_server[1].put_object(Bucket=bucket.removeprefix("s3://"), Key=f"corpus/{key}", Body=b"x")
    with pytest.raises(StorageError, match="which no folder can hold; rename or remove it"):
        storage.list_files(f"{bucket}/corpus")
    with pytest.raises(StorageError, match=r"leads out of|would be written outside of"):
        storage.download(f"{bucket}/corpus", tmp_path / "a/b", [key])
    assert not (tmp_path / "stolen").exists()
    assert not Path("/etc/cbtm-stolen").exists()


def test_a_credential_in_an_s3_uri_is_refused_and_not_repeated(s3_settings):
    with pytest.raises(StorageError, match="was given with a credential before its bucket") as refused:
        storage.check_writable("s3://key:hush@bucket/run")
    assert "hush" not in str(refused.value)


def test_an_upload_or_download_of_nothing_does_nothing(root: str, tmp_path: Path):
    storage.upload(tmp_path, root, [])
    storage.download(root, tmp_path / "back", [])
    assert storage.list_files(root) == []


def test_a_download_replaces_what_lies_there(root: str, tmp_path: Path):
    storage.write_bytes(storage.join(root, "a"), b"new")
    write_files(tmp_path / "back", {"a": b"old, longer"})
    storage.download(root, tmp_path / "back", ["a"])
    assert (tmp_path / "back/a").read_bytes() == b"new"


def test_a_stream_can_be_read_by_line_and_through_gzip(root: str):
    lines = [f"line {number}\n".encode() for number in range(1000)]
    storage.write_bytes(storage.join(root, "lines"), b"".join(lines))
    storage.write_bytes(storage.join(root, "lines.gz"), gzip.compress(b"".join(lines)))
    with storage.open_read(storage.join(root, "lines")) as file:
        assert list(file) == lines
    with storage.open_read(storage.join(root, "lines.gz")) as file, gzip.open(file) as unpacked:
        assert list(unpacked) == lines


def test_sha256_of_a_stored_file_is_that_of_its_bytes(root: str, tmp_path: Path):
    # sha256 of "abc", FIPS 180-2 appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    storage.write_bytes(storage.join(root, "abc"), b"abc")
    assert storage.sha256(storage.join(root, "abc")) == known
    assert storage.sha256_file(write_files(tmp_path, {"abc": b"abc"}) / "abc") == known


def test_a_writable_root_passes_and_keeps_no_probe(root: str):
    storage.check_writable(root)
    assert storage.list_files(root) == []


@pytest.mark.parametrize("action", [storage.read_bytes, storage.sha256])
def test_reading_what_is_not_there_names_it(root: str, action: Callable[[str], object]):
    uri = storage.join(root, "absent")
    with pytest.raises(StorageError, match=f"^{re.escape(uri)}.* not there"):
        action(uri)


def test_downloading_what_is_not_there_names_it_and_leaves_nothing(root: str, tmp_path: Path):
    storage.write_bytes(storage.join(root, "a"), b"x")
    with pytest.raises(StorageError, match=f"{re.escape(root)}/absent.* not there"):
        storage.download(root, tmp_path / "back", ["absent"])
    assert not any(path.is_file() for path in (tmp_path / "back").rglob("*"))


def test_uploading_what_is_not_there_names_the_local_file(root: str, tmp_path: Path):
    with pytest.raises(StorageError, match=f"^{re.escape(str(tmp_path))}/absent is not there"):
        storage.upload(tmp_path, root, ["absent"])
    assert storage.list_files(root) == []


# --- URIs ---


def test_join_keeps_one_slash_between_parts():
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert storage.join("/", "a") == "/a"
    assert storage.join("runs", "", "a") == "runs/a"
    assert storage.join("s3://bucket") == "s3://bucket"


def test_a_file_uri_is_a_local_path(tmp_path: Path):
    storage.write_bytes(f"file://{tmp_path}/a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("uri", ["gs://bucket/key", "http://host/key", "S3://bucket/key"])
def test_another_scheme_is_refused_with_what_is_read(uri: str):
    with pytest.raises(StorageError, match=f"cannot read {uri}: use a local path or s3://bucket/key"):
        storage.read_bytes(uri)


def test_an_s3_uri_without_bucket_is_refused():
    with pytest.raises(StorageError, match="'s3:///key' names no bucket; expected s3://bucket/key"):
        storage.read_bytes("s3:///key")


def test_the_root_of_a_bucket_can_be_listed(bucket: str):
    storage.write_bytes(f"{bucket}/a/b", b"x")
    assert files_of(bucket) == [("a/b", 1)]


# --- local files ---


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage.write_bytes(str(tmp_path / "file"), b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left on the disk that holds .*/file; free some and run again"):
        storage.write_bytes(str(tmp_path / "file"), b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_by_every_kind_of_write(small_disk: Path, tmp_path: Path):
    storage.write_bytes(str(small_disk / "file"), b"old")
    write_files(tmp_path / "here", {"file": bytes(MIB)})
    remedy = r"no space left on the disk that holds .*; free some and run again"
    with pytest.raises(StorageError, match=remedy):
        storage.write_bytes(str(small_disk / "file"), bytes(MIB))
    with pytest.raises(StorageError, match=remedy):
        storage.upload(tmp_path / "here", str(small_disk), ["file"])
    with pytest.raises(StorageError, match=remedy):
        storage.download(str(tmp_path / "here"), small_disk, ["file"])
    assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("action", ["write", "upload"])
def test_a_killed_write_leaves_the_old_file_and_nothing_that_is_listed(tmp_path: Path, action: str):
    write_files(tmp_path, {"store/file": b"old", "here/file": b"new" * MIB})
    script = f"""
import os, shutil, signal
from pathlib import Path
from cbtm import s3, storage
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
os.fsync = os.replace = die
if {action!r} == "write":
    storage.write_bytes("{tmp_path}/store/file", b"new")
else:
    storage.upload(Path("{tmp_path}/here"), "{tmp_path}/store", ["file"])
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert (tmp_path / "store/file").read_bytes() == b"old"
    assert len(list((tmp_path / "store").iterdir())) == 2  # the kill came before the new file had its name
    assert files_of(str(tmp_path / "store")) == [("file", 3)]


def test_shards_that_lie_elsewhere_are_listed_through_their_links(tmp_path: Path):
    write_files(tmp_path / "elsewhere", {"a.jsonl": b"12"})
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/00000").symlink_to(tmp_path / "elsewhere")
    assert files_of(str(tmp_path / "corpus")) == [("00000/a.jsonl", 2)]


def test_a_folder_without_permission_is_an_error_and_not_empty():
    # Root may read everything, so a child process gives root up; its files lie where it may go.
    script = """
import os, sys
from cbtm import s3, storage
if os.getuid() == 0:
    os.setuid(65534)
for action in (storage.list_files, storage.read_bytes, storage.exists, storage.check_writable):
    try:
        action(sys.argv[1] if action is storage.list_files else sys.argv[1] + "/closed/file")
    except storage.StorageError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as name:
        folder = write_files(Path(name), {"open/a": b"x", "closed/b": b"x"})
        folder.chmod(0o755)
        (folder / "closed").chmod(0)
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True)
        (folder / "closed").chmod(0o755)
    messages = done.stdout.splitlines()
    assert len(messages) == 4, done
    assert all(re.search(r"^/.*: permission denied for user id \d+$", message) for message in messages), messages


# --- S3 ---


def test_a_file_above_64_mib_goes_in_parts_and_comes_back_whole(bucket: str, tmp_path: Path):
    data = os.urandom(MIB) * 65
    write_files(tmp_path / "here", {"big": data})
    storage.upload(tmp_path / "here", bucket, ["big"])
    assert storage.list_files(bucket)[0].version.endswith("-2")  # the ETag of two parts: 64 MiB and 1 MiB
    storage.download(bucket, tmp_path / "back", ["big"])
    assert (tmp_path / "back/big").read_bytes() == data
    with storage.open_read(f"{bucket}/big") as file:
        assert file.read(3) == data[:3]


@pytest.fixture
def requests_made(bucket: str, s3_server: tuple[str, Any]) -> Iterator[list[str]]:
    """Name of every request that is sent, with "?" behind it where the store is asked first."""
    made: list[str] = []

    def note(request: Any, event_name: str, **_: Any) -> None:
        made.append(event_name.rpartition(".")[2] + "?" * ("Expect" in request.headers))

    events = s3_server[1].meta.events
    events.register("before-send.s3", note)
    yield made
    events.unregister("before-send.s3", note)


def test_n_files_that_fit_into_one_request_go_up_and_come_back_in_n_requests_each(
    bucket: str, tmp_path: Path, requests_made: list[str]
):
    files = {f"{number % 3}/{number}": os.urandom(100 * number) for number in range(30)}  # the first is empty
    write_files(tmp_path / "here", files)
    storage.upload(tmp_path / "here", bucket, list(files))
    assert requests_made == ["PutObject"] * 30
    requests_made.clear()
    storage.download(bucket, tmp_path / "back", list(files))
    assert requests_made == ["GetObject"] * 30
    assert {path: (tmp_path / "back" / path).read_bytes() for path in files} == files


def test_a_file_that_is_too_large_for_memory_is_sent_from_disk_in_one_request(
    bucket: str, tmp_path: Path, requests_made: list[str]
):
    data = os.urandom(9 * MIB)  # of 8 MiB at most would go from memory
    write_files(tmp_path / "here", {"file": data})
    storage.upload(tmp_path / "here", bucket, ["file"])
    storage.download(bucket, tmp_path / "back", ["file"])
    assert requests_made == ["PutObject?", "GetObject"]
    assert (tmp_path / "back/file").read_bytes() == data


def test_a_file_larger_than_a_part_takes_a_request_for_each_part_and_two_more(
    bucket: str, tmp_path: Path, requests_made: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * MIB)
    data = os.urandom(11 * MIB)  # 5 + 5 + 1
    write_files(tmp_path / "here", {"file": data})
    storage.upload(tmp_path / "here", bucket, ["file"])
    assert sorted(requests_made) == ["CompleteMultipartUpload", "CreateMultipartUpload", *["UploadPart?"] * 3]
    requests_made.clear()
    storage.download(bucket, tmp_path / "back", ["file"])
    assert requests_made.count("GetObject") == 4  # the first answer tells that there are parts
    assert len(requests_made) <= 5  # some versions of s3transfer ask for the length once more
    assert (tmp_path / "back/file").read_bytes() == data


def test_a_call_that_has_been_ended_begins_no_copy(bucket: str, tmp_path: Path, requests_made: list[str]):
    write_files(tmp_path, {"a": b"a"})
    ended = threading.Event()
    ended.set()
    with storage.ended_by(ended):
        for act in (lambda: storage.upload(tmp_path, bucket, ["a"]), lambda: storage.download(bucket, tmp_path, ["a"])):
            with pytest.raises(StorageError, match=f"^{bucket}/a: the transfer was given up$"):
                act()
    assert requests_made == []


def test_all_pages_of_a_listing_are_read(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for number in range(21):
        storage.write_bytes(f"{bucket}/many/{number:02d}", b"")
    answer = s3.client(attempts=8).list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    assert answer["KeyCount"] == 10  # so the listing takes three requests
    assert [file.path for file in storage.list_files(f"{bucket}/many")] == [f"{number:02d}" for number in range(21)]


def test_the_empty_object_that_stands_for_a_folder_is_no_file(bucket: str):
    s3.client(attempts=8).put_object(Bucket=bucket.removeprefix("s3://"), Key="folder/", Body=b"")
    storage.write_bytes(f"{bucket}/folder/a", b"x")
    assert files_of(bucket) == [("folder/a", 1)]


@pytest.mark.parametrize(
    "action",
    [
        storage.read_bytes,
        storage.exists,
        storage.list_files,
        storage.sha256,
        storage.check_writable,
        lambda uri: storage.write_bytes(uri, b"x"),
        lambda uri: storage.sizes(uri, ["a"]),
        lambda uri: storage.delete(uri, ["a"]),
        lambda uri: storage.upload(Path(__file__).parent, uri, [Path(__file__).name]),
        lambda uri: storage.download(uri, Path(tempfile.gettempdir()) / "never", ["a"]),
    ],
)
def test_a_missing_bucket_is_said_to_be_missing(bucket: str, action: Callable[[str], object]):
    with pytest.raises(
        StorageError, match=f"^{bucket}-not/key.*: the bucket is not there; create it or correct the URI"
    ):
        action(f"{bucket}-not/key")


def test_a_dead_endpoint_is_named_in_bounded_time(s3_settings: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    waits: list[float] = []
    s3_settings.setattr("botocore.endpoint.time.sleep", waits.append)
    s3_settings.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(StorageError) as caught:
        storage.check_writable("s3://bucket/key")
    assert "s3://bucket/key/.cbtm-probe" in str(caught.value)
    assert (
        f"the object store does not answer; check AWS_ENDPOINT_URL (Could not connect to the endpoint URL: "
        f'"http://127.0.0.1:{port}' in str(caught.value)
    )
    assert len(waits) == 7  # eight attempts
    assert sum(waits) < 20


def test_an_endpoint_without_scheme_is_named(s3_settings: pytest.MonkeyPatch):
    s3_settings.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(StorageError, match=r"Invalid endpoint: 127.*AWS_ENDPOINT_URL is to be a URL such as http://"):
        storage.read_bytes("s3://bucket/key")


def test_missing_credentials_are_named(s3_settings: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        s3_settings.delenv(name)
    with pytest.raises(StorageError, match="no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.read_bytes("s3://bucket/key")


Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def answering(s3_settings: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], None]]:
    """Starts a store that gives every request the same answer, for what moto never does."""
    servers = []

    def start(answer: Answer) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[0].serve_forever, args=(0.05,), daemon=True).start()
        s3_settings.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers[0].server_address[1]}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def xml(status: int, body: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body.encode())

    return answer


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("SignatureDoesNotMatch", "the secret is wrong; check AWS_SECRET_ACCESS_KEY"),
        ("InvalidAccessKeyId", "the access key is unknown to the store; check AWS_ACCESS_KEY_ID"),
        ("AccessDenied", "access denied; the credentials need read, write, list and delete on this bucket"),
    ],
)
def test_refused_credentials_are_named_with_the_remedy(
    answering: Callable[[Answer], None], tmp_path: Path, code: str, remedy: str
):
    answering(xml(403, f"<Error><Code>{code}</Code><Message>no</Message></Error>"))
    write_files(tmp_path, {"file": b"x"})
    for action in (
        lambda: storage.check_writable("s3://bucket/key"),
        lambda: storage.list_files("s3://bucket/key"),
        lambda: storage.upload(tmp_path, "s3://bucket/key", ["file"]),
    ):
        with pytest.raises(StorageError, match=rf"^s3://bucket/key.*: {remedy} \({code}\)"):
            action()
    # HEAD has no body, so no code: the message names both halves.
    with pytest.raises(StorageError, match=r"check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"):
        storage.exists("s3://bucket/key")


def test_an_object_that_may_not_be_removed_is_an_error_though_the_request_succeeds(
    answering: Callable[[Answer], None],
):
    answering(xml(200, "<DeleteResult><Error><Key>run/a</Key><Code>AccessDenied</Code></Error></DeleteResult>"))
    with pytest.raises(StorageError, match="s3://bucket/run/a cannot be removed: access denied; the credentials need"):
        storage.delete("s3://bucket/run", ["a"])


def test_at_most_1000_files_are_removed_in_one_request(answering: Callable[[Answer], None]):
    batches = []

    def count(handler: Any) -> None:
        batches.append(handler.body.count(b"<Key>"))
        xml(200, "<DeleteResult/>")(handler)

    answering(count)
    storage.delete("s3://bucket/run", [str(number) for number in range(2001)])
    assert batches == [1000, 1000, 1]


def test_a_stream_that_breaks_off_is_an_error_and_no_short_file(answering: Callable[[Answer], None], tmp_path: Path):
    def break_off(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"line\n" * 10)
        handler.close_connection = True

    answering(break_off)
    with (
        pytest.raises(StorageError, match=r"^s3://bucket/key: .*(ended prematurely|incomplete|expected)"),
        storage.open_read("s3://bucket/key") as file,
    ):
        list(file)
    with pytest.raises(StorageError, match=r"^s3://bucket/key: .*(ended prematurely|incomplete|expected)"):
        storage.read_bytes("s3://bucket/key")
    with pytest.raises(StorageError, match=r"^s3://bucket/key: .*(ended prematurely|incomplete|expected)"):
        storage.download("s3://bucket", tmp_path, ["key"])
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_gives_back_other_bytes_is_not_writable(answering: Callable[[Answer], None]):
    answering(xml(200, "<other/>"))
    with pytest.raises(StorageError, match="s3://bucket/key gives back other bytes than were written"):
        storage.check_writable("s3://bucket/key")
