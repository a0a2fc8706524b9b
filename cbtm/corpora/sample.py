"""A corpus of clearly different kinds of text from packages that are installed already: nothing to download.

Experts need domains that differ; these differ in words, in layout and in language:

| kind | what |
|---|---|
| aws_documentation | documentation of operations and shapes in botocore's service models, newest version only |
| api_schemas | structures of the same models as JSON, without prose |
| python_docstrings | docstrings of scientific packages |
| python_source | code of application packages, without docstrings, comments and tests |
| algebra_tests | the tests of sympy: identities, integrals, polynomials |
| type_stubs | signatures of torch, numpy and others |
| cpp_headers | C and C++ headers of torch and others, without licence comments |
| package_notices | licences, readmes and changelogs of the installed distributions |

Packages are found and read as files, never imported. Within a kind, packages take turns and each gives its files in
hash order, until somewhat more is gathered than the cap per kind can use; so the choice is even, the same on every
machine with the same packages, and takes some ten seconds.
"""

import gzip
import hashlib
import importlib.machinery
import importlib.metadata
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cbtm.corpora.build import CorpusSummary, Progress, write_corpus
from cbtm.corpora.documents import CutLimits, RawDocument
from cbtm.corpora.extract import (
    docstrings,
    header_code,
    notice_text,
    python_code,
    service_documentation,
    service_schema,
)
from cbtm.errors import DataError

NAME = "sample"
MAX_PER_KIND = 2500
MIN_KINDS = 5
LIMITS = CutLimits(min_words=50, max_words=350, max_chars=2400)
CHARS_PER_DOCUMENT = 1500  # mean of the kinds, measured; sizes the gathering only
SURPLUS = 1.4  # gathered beyond the cap: repeats and short pieces fall away
MAX_FILE_CHARS = 300_000  # larger ones are generated tables
MAX_SERVICE_CHARS = 100_000  # of one AWS service: the largest has 40 times the median

KINDS = {
    "aws_documentation": ("botocore",),
    "api_schemas": ("botocore",),
    "python_docstrings": ("numpy", "scipy", "sklearn", "torch", "pandas", "networkx"),
    "python_source": ("transformers", "mlflow", "kfp", "botocore", "pydantic", "sqlalchemy", "networkx", "aiohttp"),
    "algebra_tests": ("sympy",),
    "type_stubs": ("torch", "numpy", "pandas", "scipy", "matplotlib", "pyarrow"),
    "cpp_headers": ("torch", "numpy", "scipy", "pyarrow"),
    "package_notices": (),
}
"""Kinds and the packages they are read from; () means every installed distribution."""

_TEST_FILE = re.compile(r"/(?:tests?|testing|_?vendor(?:ed)?)/|/(?:test_|conftest)[^/]*$|_test\.py$")
_NOTICE_FILE = re.compile(r"(?i)(?:^|/)[^/]*(?:licen[sc]e|notice|copying)[^/]*$")
_WANTED_FILES: dict[str, Callable[[str], bool]] = {
    "python_docstrings": lambda name: name.endswith(".py") and not _TEST_FILE.search(name),
    "python_source": lambda name: name.endswith(".py") and not _TEST_FILE.search(name),
    "algebra_tests": lambda name: "/tests/test_" in name and name.endswith(".py"),
    "type_stubs": lambda name: name.endswith(".pyi") and not _TEST_FILE.search(name),
    # ATen/ops is nine thousand generated files that differ by the name of an operator.
    "cpp_headers": lambda name: name.endswith((".h", ".hpp", ".cuh")) and "/ATen/ops/" not in name,
}
_TEXTS_OF_FILE: dict[str, Callable[[str], list[str]]] = {
    "python_docstrings": docstrings,
    "python_source": lambda code: [python_code(code)],
    "algebra_tests": lambda code: [python_code(code)],
    "type_stubs": lambda code: [python_code(code)],
    "cpp_headers": lambda code: [header_code(code)],
}


def gather_sample(
    root: Path,
    *,
    n_shards: int = 4,
    max_per_kind: int = MAX_PER_KIND,
    min_kinds: int = MIN_KINDS,
    search_paths: Sequence[str] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Write the sample corpus.

    Args:
        root: The corpus folder to make; a sample of the same settings there is returned as it is, even if packages
            were upgraded since.
        n_shards: Number of training shards.
        max_per_kind: Most documents of one kind.
        min_kinds: Fewest kinds with a tenth of `max_per_kind` documents or more.
        search_paths: Folders of installed packages; None means those of this interpreter.
        replace: Whether a corpus of other settings at `root` is replaced rather than refused.
        progress: Receives one line per step.

    Returns:
        What the corpus holds.

    Raises:
        DataError: If too few kinds are found; says which and what to install.
        ConfigError: If `root` holds a corpus of other settings.
        StorageError: If the disk refuses.
    """
    paths = [p for p in (sys.path if search_paths is None else search_paths) if p and Path(p).is_dir()]
    gatherer = _Gatherer(paths, int(max_per_kind * CHARS_PER_DOCUMENT * SURPLUS), min_kinds, progress)
    return write_corpus(
        root,
        gatherer.documents(),
        name=NAME,
        settings={"made_by": "gather_sample"},
        n_shards=n_shards,
        limits=LIMITS,
        max_per_kind=max_per_kind,
        packages=_versions(paths),
        replace=replace,
        progress=progress,
    )


def package_folder(package: str, search_paths: Sequence[str]) -> Path | None:
    """Return the folder of an installed package without importing it; None if there is none."""
    spec = importlib.machinery.PathFinder.find_spec(package, list(search_paths))
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


@dataclass
class _Gatherer:
    """Reads each kind until its budget of characters is spent."""

    search_paths: Sequence[str]
    budget: int
    min_kinds: int
    progress: Progress | None
    gathered: Counter[str] = field(default_factory=Counter)
    folders: dict[str, Path] = field(default_factory=dict)
    listings: dict[str, list[str]] = field(default_factory=dict)

    def documents(self) -> Iterator[RawDocument]:
        """Yield all texts, kind after kind; at the end, refuse if too few kinds were found."""
        readers: list[tuple[str, Iterator[RawDocument]]] = [("AWS services", self._services())]
        readers += [(kind, self._files(kind)) for kind in _WANTED_FILES]
        readers += [("package_notices", self._notices())]
        for name, reader in readers:
            yield from reader
            if self.progress:
                self.progress(f"read {name}: {sum(self.gathered.values()) / 1e6:.1f} million characters so far")
        self._check()

    def _take(self, text: str, kind: str, source: str) -> Iterator[RawDocument]:
        if text and not self._is_full(kind):
            self.gathered[kind] += len(text)
            yield RawDocument(text, kind, source)

    def _is_full(self, kind: str) -> bool:
        return self.gathered[kind] >= self.budget

    def _check(self) -> None:
        enough = [kind for kind in KINDS if 10 * SURPLUS * self.gathered[kind] >= self.budget]
        if len(enough) >= self.min_kinds:
            return
        missing = sorted({p for kind in KINDS if kind not in enough for p in KINDS[kind]} - {"sklearn"})
        found = ", ".join(f"{kind}: {self.gathered[kind]}" for kind in KINDS)
        raise DataError(
            f"the installed packages give enough text of {len(enough)} kinds, at least {self.min_kinds} are needed. "
            f"Characters found: {found}. Install some of {', '.join(missing)}, or give a folder of own text"
        )

    def _services(self) -> Iterator[RawDocument]:
        folder = package_folder("botocore", self.search_paths)
        data = folder / "data" if folder else None
        services = [f for f in data.iterdir() if f.is_dir()] if data and data.is_dir() else []
        for service in sorted(services, key=lambda f: _order(f.name)):
            versions = sorted([*service.glob("*/service-2.json"), *service.glob("*/service-2.json.gz")])
            if self._is_full("aws_documentation") and self._is_full("api_schemas"):
                return
            if versions:
                model, source = _load_model(versions[-1]), f"botocore/data/{service.name}"
                for text in _up_to(service_documentation(model), MAX_SERVICE_CHARS):
                    yield from self._take(text, "aws_documentation", source)
                for text in _up_to(iter([service_schema(model)]), MAX_SERVICE_CHARS):
                    yield from self._take(text, "api_schemas", source)

    def _files(self, kind: str) -> Iterator[RawDocument]:
        """Read files of a kind: packages take turns, each gives its files in hash order."""
        names = [filter(_WANTED_FILES[kind], self._listing(package)) for package in KINDS[kind]]
        for source in _in_turns(deque(deque(sorted(of_package, key=_order)) for of_package in names)):
            if self._is_full(kind):
                return
            package, _, rest = source.partition("/")
            content = _read(self.folders[package] / rest)
            if len(content) <= MAX_FILE_CHARS or kind == "python_docstrings":
                for text in _TEXTS_OF_FILE[kind](content):
                    yield from self._take(text, kind, source)

    def _listing(self, package: str) -> list[str]:
        """Return "<package>/<path>" of all files of a package; [] if it is not installed."""
        if package not in self.listings:
            folder = package_folder(package, self.search_paths)
            if folder is not None:
                self.folders[package] = folder
            self.listings[package] = [f"{package}/{n}" for n in _names_below(folder)] if folder else []
        return self.listings[package]

    def _notices(self) -> Iterator[RawDocument]:
        for name, distribution in sorted(_distributions(self.search_paths).items(), key=lambda d: _order(d[0])):
            if self._is_full("package_notices"):
                return
            if name.endswith("-stubs") or name.startswith("types-"):
                continue  # their readmes are lists of links
            readme = distribution.metadata.json.get("description", "")
            yield from self._take(notice_text(str(readme)), "package_notices", f"{name}/METADATA")
            notices = {str(f): f for f in distribution.files or [] if _NOTICE_FILE.search(str(f))}
            for file, found in sorted(notices.items()):
                path = Path(str(found.locate()))
                if path.suffix not in (".py", ".pyc") and path.is_file():
                    yield from self._take(notice_text(_read(path)), "package_notices", f"{name}/{file}")


def _order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _in_turns(queues: deque[deque[str]]) -> Iterator[str]:
    while queues:
        queue = queues.popleft()
        if queue:
            yield queue.popleft()
            queues.append(queue)


def _names_below(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):  # ten times as fast as Path.rglob on the 25,000 files of torch
        below = parent[len(str(folder)) :].strip(os.sep).replace(os.sep, "/")
        yield from (f"{below}/{name}" if below else name for name in names)


def _up_to(texts: Iterator[str], max_chars: int) -> Iterator[str]:
    """Yield texts until `max_chars` characters; the last one is cut at a blank line."""
    left = max_chars
    for text in texts:
        if len(text) > left:
            yield text[: max(text.rfind("\n\n", 0, left), 0)]
            return
        yield text
        left -= len(text)


def _load_model(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    model: dict[str, Any] = orjson.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return model


def _read(path: Path) -> str:
    """Return the text of a file; empty if it is not UTF-8, as some test data and old licences are."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _distributions(search_paths: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by normalised name, sorted; of two with one name the first on the path counts."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions(path=list(search_paths)):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        found.setdefault(name, distribution)
    return dict(sorted(found.items()))


def _versions(search_paths: Sequence[str]) -> dict[str, str]:
    return {name: distribution.version for name, distribution in _distributions(search_paths).items()}
