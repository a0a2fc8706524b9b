"""The public C4 sample of the c-BTM reference code, downloaded with the standard library.

The archive is one tar.gz with a corpus in it. What can go wrong on the way is met here: a cut connection goes on from
the last byte (HTTP Range with If-Range, so a file that changed meanwhile starts anew), the size is checked against
the server's, and nothing of the archive is trusted before it is unpacked.

The publisher gives no digest and the address is plain http. So the first download is taken on trust: its sha256 goes
into a receipt beside the corpus, and every later download has to match it. Who knows the digest gives it as
`expected_sha256`, and then the first download is checked too. Proxies are those of the environment (http_proxy ...).
"""

import hashlib
import http.client
import json
import logging
import os
import shutil
import ssl
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cbtm.corpora.build import Progress
from cbtm.corpora.folder import find_validation_split, is_corpus
from cbtm.errors import CbtmError, ConfigError, DataError, StorageError

log = logging.getLogger(__name__)

BASE_URL = "http://s3.wasabisys.com/c4-example"
ARCHIVE_NAME = "c4_example.tar.gz"
MAX_MEMBERS = 10_000
MAX_UNPACKED_BYTES = 64 * 2**30
CHUNK_BYTES = 2**20
PROGRESS_BYTES = 32 * 2**20
CHECKED_LINES = 100  # of every file; the whole is checked where it is read
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class DownloadSummary:
    """What was downloaded.

    Attributes:
        root: The corpus folder.
        url: Where the archive came from.
        sha256: Digest of the archive.
        n_bytes: Size of the archive.
        validation_split: Path of the validation split below `root`; None if the archive has none.
        reused: Whether the corpus was there already and nothing was downloaded.
    """

    root: Path
    url: str
    sha256: str
    n_bytes: int
    validation_split: str | None
    reused: bool = False


@dataclass(frozen=True)
class _Retry:
    attempts: int
    backoff: float
    timeout: float


def receipt_path(root: Path) -> Path:
    """Return the path of the receipt of a downloaded corpus; it lies beside the corpus and outlives it."""
    return root.parent / f"{root.name}.receipt.json"


def download_c4_example(
    root: Path,
    *,
    base_url: str = BASE_URL,
    expected_sha256: str | None = None,
    attempts: int = 6,
    backoff: float = 1.0,
    timeout: float = 60.0,
    progress: Progress | None = None,
) -> DownloadSummary:
    """Download and unpack the C4 sample, or return it if it is there.

    Args:
        root: The corpus folder to make.
        base_url: http(s) address of the folder that holds c4_example.tar.gz, for a mirror.
        expected_sha256: Digest that the archive has to have; None means the one of the receipt, if there is one.
        attempts: Most connections made; each goes on where the last one ended.
        backoff: Seconds before the second attempt; doubles each time, up to 30.
        timeout: Seconds without a byte after which a connection counts as lost.
        progress: Receives a line now and then.

    Returns:
        What was downloaded.

    Raises:
        StorageError: If the server cannot be reached or answers with an error, or the disk refuses.
        DataError: If the archive has another digest than expected, is damaged or hostile, or holds no corpus.
        ConfigError: If `base_url` is not http(s) or `attempts` is below 1.
    """
    if urllib.parse.urlsplit(base_url).scheme not in ("http", "https"):
        raise ConfigError(f"base_url={base_url!r} does not begin with http:// or https://")
    if attempts < 1:
        raise ConfigError(f"attempts={attempts} is below 1; at least one connection is needed")
    url = f"{base_url.rstrip('/')}/{ARCHIVE_NAME}"
    receipt = _read_receipt(root)
    expected = (expected_sha256 or receipt.get("sha256") or "").lower()
    if root.exists() and any(root.iterdir()):
        return _reuse(root, receipt, expected)
    report = progress or (lambda _: None)
    try:
        folder = root.parent / f".{root.name}.download"
        folder.mkdir(parents=True, exist_ok=True)
        archive = _fetch(url, folder, _Retry(attempts, backoff, timeout), report)
        size, digest = archive.stat().st_size, _sha256(archive)
        if expected and digest != expected:
            archive.unlink()
            whose = "asked for" if expected_sha256 else f"of the first download ({receipt_path(root)})"
            raise DataError(
                f"{url} has sha256 {digest}, not {expected} {whose}; it was damaged on the way or replaced. "
                "The file is removed: try again, and if the change is known to be right, remove the receipt"
            )
        report(f"sha256 {digest} {'matches' if expected else 'recorded, there is none to compare with'}")
        _unpack(archive, root, {"url": url, "sha256": digest, "bytes": size})
        shutil.rmtree(folder)
    except CbtmError:
        raise
    except OSError as error:
        raise StorageError(f"could not store {url} as {root}: {error}; check space and permissions") from error
    return DownloadSummary(root, url, digest, size, find_validation_split(root))


def _read_receipt(root: Path) -> dict[str, Any]:
    path = receipt_path(root)
    if not path.is_file():
        return {}
    try:
        receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: receipt[key] for key in ("url", "sha256", "bytes")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no receipt of a download ({error!r}); remove it") from error


def _reuse(root: Path, receipt: dict[str, Any], expected: str) -> DownloadSummary:
    if not receipt:
        raise DataError(f"{root} is not empty and no download put it there; choose another folder")
    if receipt["sha256"] != expected:
        raise DataError(
            f"{root} comes from an archive of sha256 {receipt['sha256']}, asked for is {expected}; "
            f"remove {root} and {receipt_path(root)} to download again"
        )
    split = find_validation_split(root)
    return DownloadSummary(root, receipt["url"], receipt["sha256"], receipt["bytes"], split, reused=True)


def _fetch(url: str, folder: Path, retry: _Retry, report: Progress) -> Path:
    """Download to `folder`, going on with what an earlier attempt or run left; return the complete file."""
    archive, part = folder / ARCHIVE_NAME, folder / f"{ARCHIVE_NAME}.part"
    if archive.is_file():
        return archive
    reason = ""
    for attempt in range(retry.attempts):
        if attempt:
            seconds = min(retry.backoff * 2 ** (attempt - 1), MAX_WAIT_SECONDS)
            log.warning("attempt=%d/%d url=%s reason=%s wait=%.1fs", attempt, retry.attempts, url, reason, seconds)
            time.sleep(seconds)
        try:
            reason = _receive(url, part, retry.timeout, report)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # what we have is no beginning of what the server has
                part.unlink(missing_ok=True)
            elif error.code not in RETRY_STATUS:
                break
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = f"{type(error).__name__}: {error}"
        if not reason:
            part.rename(archive)
            return archive
    raise StorageError(
        f"could not download {url}: {reason}. Check the network and the proxy variables, name a mirror by "
        "--base-url, or use own text by CORPUS=<folder>; what was received is kept and the next try goes on from it"
    )


def _receive(url: str, part: Path, timeout: float, report: Progress) -> str:
    """Make one connection and append what it gives; return "" if the file is complete, else what is missing."""
    state = part.with_name(part.name + ".json")
    known = json.loads(state.read_text()) if state.is_file() and part.is_file() else {}
    start = part.stat().st_size if known.get("validator") else 0
    if start and start == known["total"]:
        return ""
    # Without a strong validator nobody can tell whether the rest belongs to the beginning: start again.
    headers = {"Range": f"bytes={start}-", "If-Range": known["validator"]} if start else {}
    # Schemes other than http(s) are refused by `download`.
    request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
        if response.status == 206 and response.headers.get("Content-Range") != _rest(start, known["total"]):
            part.unlink()
            return f"asked for {_rest(start, known['total'])}, got {response.headers.get('Content-Range')}"
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
        with part.open("ab" if start else "wb") as file:
            _write_atomically(state, {"validator": validator if total else "", "total": total})
            done = reported = start
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if done - reported >= PROGRESS_BYTES:
                    reported = done
                    report(f"{done / 1e6:.0f} of {total / 1e6 if total else float('nan'):.0f} MB")
    if total is not None and done != total:
        return f"connection ended after {done} of {total} bytes"
    return ""


def _rest(start: int, total: int) -> str:
    return f"bytes {start}-{total - 1}/{total}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _unpack(archive: Path, root: Path, receipt: dict[str, Any]) -> None:
    """Unpack beside `root`, check the layout, write the receipt, rename."""
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix="unpacked-") as temporary:
        extract_archive(archive, Path(temporary))
        corpus = _corpus_in(Path(temporary), archive)
        _check_lines(corpus)
        _write_atomically(receipt_path(root), receipt)
        corpus.rename(root)


def extract_archive(
    archive: Path, target: Path, *, max_members: int = MAX_MEMBERS, max_bytes: int = MAX_UNPACKED_BYTES
) -> None:
    """Unpack a tar.gz of plain files and folders.

    Args:
        archive: The tar.gz.
        target: Existing folder; on an error it holds a part, for the caller to remove.
        max_members: Most entries.
        max_bytes: Most bytes of all files, as the archive declares and as tarfile then reads them.

    Raises:
        DataError: If an entry leaves `target`, is a link or a device, if a limit is passed, or the file is damaged.
    """
    n_members = n_bytes = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                n_members, n_bytes = n_members + 1, n_bytes + member.size
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{archive}: {member.name!r} is a link or a device; refused")
                if n_members > max_members or n_bytes > max_bytes:
                    raise DataError(f"{archive} holds more than {max_members} entries or {max_bytes} bytes; refused")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise DataError(f"{archive}: {member.name!r} points outside of the archive; refused")
                if not Path(member.name).name.startswith("._"):  # what macOS adds for its own use
                    tar.extract(member, target, filter="data")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is damaged or hostile ({error}); remove it and download again") from error
    except OSError as error:
        if type(error).__name__ == "BadGzipFile":
            raise DataError(f"{archive} is not a gzip file ({error}); remove it and download again") from error
        raise


def _corpus_in(folder: Path, archive: Path) -> Path:
    candidates = [folder, *sorted(f for f in folder.iterdir() if f.is_dir())]
    for candidate in candidates:
        if is_corpus(candidate):
            return candidate
    found = ", ".join(sorted(p.relative_to(folder).as_posix() for p in folder.glob("*/*"))[:5])
    raise DataError(f"{archive} holds no train/<shard>/*.jsonl; it holds {found or 'nothing'} ...")


def _check_lines(corpus: Path) -> None:
    """Check that the first lines of every uncompressed shard are JSON with a text."""
    for path in sorted(corpus.rglob("*.jsonl")):
        with path.open("rb") as file:
            for number, line in zip(range(CHECKED_LINES), file, strict=False):
                try:
                    text = orjson.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    name = path.relative_to(corpus)
                    raise DataError(f"{name} line {number + 1} is not JSON with a text: {error!r}") from error
                if not isinstance(text, str):
                    raise DataError(f"{path.relative_to(corpus)} line {number + 1}: text is {type(text).__name__}")
