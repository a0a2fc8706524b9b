"""The download, against a real HTTP server on this machine that misbehaves on demand."""

import gzip
import hashlib
import http.server
import io
import json
import random
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cbtm.corpora.download import ARCHIVE_NAME, download_c4_example, extract_archive, receipt_path
from cbtm.errors import ConfigError, DataError, StorageError


def record(i: int) -> str:
    return json.dumps({"text": " ".join(random.Random(i).choices("abcdefgh", k=300)), "id": i}) + "\n"


def archive(seed: int = 0, files: dict[str, str] | None = None, **links: str) -> bytes:
    if files is None:
        files = {
            "c4_example/train/00000/C4.jsonl": "".join(record(seed + i) for i in range(300)),
            "c4_example/valid/C4_small/00000/C4.jsonl": "".join(record(seed + 1000 + i) for i in range(30)),
            "c4_example/train/00000/._C4.jsonl": "\x00 of macOS",
        }
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content.encode())
            tar.addfile(info, io.BytesIO(content.encode()))
        for name, target in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return buffer.getvalue()


@dataclass
class Site:
    """What the server serves. `cuts` lists after how many bytes the next answers end, None for all; `errors` the
    statuses of the next answers."""

    content: bytes
    etag: str | None = '"one"'
    cuts: list[int | None] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    requests: list[tuple[str | None, str | None]] = field(default_factory=list)
    sent: int = 0
    url: str = ""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site(archive())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
            site.requests.append((wanted, condition))
            if site.errors:
                self.send_error(site.errors.pop(0))
                return
            if self.path != f"/{ARCHIVE_NAME}":
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and condition == site.etag else 0
            total = len(site.content)
            self.send_response(206 if start else 200)
            if site.etag:
                self.send_header("ETag", site.etag)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            cut = site.cuts.pop(0) if site.cuts else None
            body = site.content[start:] if cut is None else site.content[start : start + cut]
            self.wfile.write(body)
            site.sent += len(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_archive_becomes_a_corpus_and_a_receipt(site: Site, tmp_path: Path):
    lines: list[str] = []
    summary = download_c4_example(tmp_path / "c4", base_url=site.url, progress=lines.append)
    assert summary.validation_split == "valid/C4_small"
    assert summary.n_bytes == len(site.content)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"c4/train/00000/C4.jsonl", "c4/valid/C4_small/00000/C4.jsonl", "c4.receipt.json"}
    receipt = json.loads(receipt_path(tmp_path / "c4").read_text())
    assert receipt == {
        "url": f"{site.url}/{ARCHIVE_NAME}", "sha256": sha256(site.content), "bytes": len(site.content)
    }  # fmt: skip
    assert lines == [f"sha256 {sha256(site.content)} recorded, there is none to compare with"]


def test_what_is_there_is_not_downloaded_again(site: Site, tmp_path: Path):
    download_c4_example(tmp_path / "c4", base_url=site.url)
    again = download_c4_example(tmp_path / "c4", base_url="http://127.0.0.1:1")
    assert again.reused
    assert again.sha256 == sha256(site.content)
    assert len(site.requests) == 1


def test_a_cut_connection_goes_on_from_the_last_byte(site: Site, tmp_path: Path):
    site.cuts = [10_000, 20_000]
    download_c4_example(tmp_path / "c4", base_url=site.url, backoff=0.001)
    assert site.requests == [(None, None), ("bytes=10000-", '"one"'), ("bytes=30000-", '"one"')]
    assert site.sent == len(site.content)  # no byte twice


def test_a_later_run_goes_on_with_what_an_earlier_one_left(site: Site, tmp_path: Path):
    site.cuts = [10_000]
    with pytest.raises(StorageError, match=rf"connection ended after 10000 of {len(site.content)} bytes"):
        download_c4_example(tmp_path / "c4", base_url=site.url, attempts=1)
    download_c4_example(tmp_path / "c4", base_url=site.url, attempts=1)
    assert site.requests[1] == ("bytes=10000-", '"one"')


def test_a_file_that_changed_between_two_attempts_starts_again(site: Site, tmp_path: Path):
    site.cuts = [10_000]
    with pytest.raises(StorageError):
        download_c4_example(tmp_path / "c4", base_url=site.url, attempts=1)
    site.content, site.etag = archive(seed=5000), '"two"'
    summary = download_c4_example(tmp_path / "c4", base_url=site.url, attempts=1)
    assert summary.sha256 == sha256(site.content)
    assert site.requests[1] == ("bytes=10000-", '"one"')


def test_without_a_validator_nothing_is_resumed(site: Site, tmp_path: Path):
    site.cuts, site.etag = [10_000], None
    summary = download_c4_example(tmp_path / "c4", base_url=site.url, backoff=0.001)
    assert site.requests == [(None, None), (None, None)]
    assert summary.sha256 == sha256(site.content)


def test_server_errors_are_retried_and_a_missing_file_is_not(site: Site, tmp_path: Path):
    site.errors = [503, 500]
    download_c4_example(tmp_path / "c4", base_url=site.url, backoff=0.001)
    assert len(site.requests) == 3
    with pytest.raises(StorageError, match=r"/elsewhere/c4_example\.tar\.gz: HTTP 404"):
        download_c4_example(tmp_path / "other", base_url=f"{site.url}/elsewhere", backoff=0.001)
    assert len(site.requests) == 4


def test_the_number_of_attempts_is_bounded(site: Site, tmp_path: Path):
    site.errors = [503] * 10
    with pytest.raises(StorageError, match="HTTP 503"):
        download_c4_example(tmp_path / "c4", base_url=site.url, attempts=3, backoff=0.001)
    assert len(site.requests) == 3


def test_no_network_names_the_address_the_reason_and_the_way_out(tmp_path: Path):
    with pytest.raises(
        StorageError, match=r"http://127\.0\.0\.1:1/c4_example\.tar\.gz: .*refused.*--base-url.*CORPUS="
    ):
        download_c4_example(tmp_path / "c4", base_url="http://127.0.0.1:1", attempts=2, backoff=0.001)


def test_a_download_that_differs_from_the_receipt_is_refused_and_removed(site: Site, tmp_path: Path):
    download_c4_example(tmp_path / "c4", base_url=site.url)
    (tmp_path / "c4").rename(tmp_path / "moved")
    first, site.content, site.etag = sha256(site.content), archive(seed=5000), '"two"'
    with pytest.raises(DataError, match=rf"has sha256 {sha256(site.content)}, not {first} of the first download"):
        download_c4_example(tmp_path / "c4", base_url=site.url)
    assert not (tmp_path / "c4").exists()
    assert not list(tmp_path.rglob(f"{ARCHIVE_NAME}*[!n]"))


def test_a_corrupted_byte_is_found_by_a_given_digest(site: Site, tmp_path: Path):
    right = sha256(site.content)
    damaged = bytearray(site.content)
    damaged[5000] ^= 1
    site.content = bytes(damaged)
    with pytest.raises(DataError, match=f"not {right} asked for"):
        download_c4_example(tmp_path / "c4", base_url=site.url, expected_sha256=right.upper())
    assert not receipt_path(tmp_path / "c4").exists()


def test_a_corrupted_archive_is_found_without_a_digest_too(site: Site, tmp_path: Path):
    damaged = bytearray(site.content)
    damaged[5000] ^= 0xFF
    site.content = bytes(damaged)
    with pytest.raises(DataError, match="damaged"):
        download_c4_example(tmp_path / "c4", base_url=site.url)
    assert not (tmp_path / "c4").exists()
    assert not receipt_path(tmp_path / "c4").exists()


def test_a_page_instead_of_the_archive_is_named(site: Site, tmp_path: Path):
    site.content = b"<html>log in first</html>"
    with pytest.raises(DataError, match=r"is not a gzip file|damaged"):
        download_c4_example(tmp_path / "c4", base_url=site.url)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"c4_example/readme.txt": "hello"}, r"holds no train/<shard>/\*\.jsonl; it holds c4_example/readme\.txt"),
        ({"c/train/00000/C4.jsonl": '{"text": "a"}\nnot json\n'}, r"train/00000/C4\.jsonl line 2 is not JSON"),
        ({"c/train/00000/C4.jsonl": '{"text": 1}\n'}, r"C4\.jsonl line 1: text is int"),
    ],
)
def test_an_archive_without_a_corpus_is_refused(site: Site, tmp_path: Path, content: dict[str, str], message: str):
    site.content = archive(files=content)
    with pytest.raises(DataError, match=message):
        download_c4_example(tmp_path / "c4", base_url=site.url)
    assert not (tmp_path / "c4").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(files={"../evil.txt": "x"}), r"'\.\./evil\.txt' points outside"),
        (archive(files={"a/../../evil.txt": "x"}), "points outside"),
        (archive(files={"/tmp/cbtm-evil.txt": "x"}), "points outside"),
        (archive(files={}, link="/etc/passwd"), "'link' is a link or a device"),
        (archive(files={str(i): "x" for i in range(6)}), "more than 5 entries"),
        (archive(files={"big": "x" * 2000}), "or 1000 bytes"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.tar.gz").write_bytes(data)
    (tmp_path / "target").mkdir()
    with pytest.raises(DataError, match=message):
        extract_archive(tmp_path / "a.tar.gz", tmp_path / "target", max_members=5, max_bytes=1000)
    assert not (tmp_path / "evil.txt").exists()
    assert not Path("/tmp/cbtm-evil.txt").exists()


def test_a_truncated_archive_is_refused(tmp_path: Path):
    (tmp_path / "a.tar.gz").write_bytes(archive()[:-2000])
    (tmp_path / "target").mkdir()
    with pytest.raises(DataError, match="is damaged"):
        extract_archive(tmp_path / "a.tar.gz", tmp_path / "target")


def test_a_folder_of_another_origin_is_never_overwritten(site: Site, tmp_path: Path):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4/thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="not empty and no download put it there"):
        download_c4_example(tmp_path / "c4", base_url=site.url)
    assert site.requests == []


def test_wrong_settings_are_refused_before_any_connection(tmp_path: Path):
    with pytest.raises(ConfigError, match="base_url='ftp://x'"):
        download_c4_example(tmp_path / "c4", base_url="ftp://x")
    with pytest.raises(ConfigError, match="attempts=0"):
        download_c4_example(tmp_path / "c4", attempts=0)
