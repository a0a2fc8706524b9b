"""Text for the tutorial: two folders of text files, made of packages that are installed already.

    python docs/tutorial_texts.py texts services

The first folder holds files of seven kinds, a subfolder each; the second the documentation of Amazon's services, text
of a kind that "arrives later". Any folder of text files does as well: these are the ones that everybody has. Packages
are read as files and never imported.
"""

import argparse
import hashlib
import pydoc_data.topics
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson

from cbtm.corpora.extract import docstrings, header_code, notice_text, python_code, service_documentation
from cbtm.corpora.sample import package_folder

# Kind: package, pattern of its files, and what is taken of a file.
FILES = {
    "docstrings": ("scipy", "*.py", lambda code: "\n\n".join(docstrings(code))),
    "code": ("transformers", "*.py", python_code),
    "algebra": ("sympy", "test_*.py", python_code),
    "stubs": ("torch", "*.pyi", python_code),
    "headers": ("torch", "*.h", header_code),
}
LEAST, MOST = 1500, 60_000
"""Characters of a file: shorter ones say little, longer ones are tables and are cut."""


def main(arguments: list[str] | None = None) -> int:
    """Write both folders."""
    parser = argparse.ArgumentParser(description="Write two folders of text files out of installed packages.")
    parser.add_argument("texts", type=Path, help="folder for the text to begin with")
    parser.add_argument("services", type=Path, help="folder for the text that comes later")
    parser.add_argument("--characters", type=int, default=900_000, help="of each kind")
    given = parser.parse_args(arguments)
    for kind in FILES:
        report(given.texts / kind, write(given.texts / kind, files_of(kind), given.characters))
    report(given.texts / "notices", write(given.texts / "notices", notices(), given.characters))
    report(given.texts / "language", write(given.texts / "language", topics(), given.characters))
    report(given.services, write(given.services, services(), given.characters))
    return 0


def write(folder: Path, texts: Iterator[tuple[str, str]], characters: int) -> int:
    """Write named texts as files until there are so many characters; return the number of files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for number, (name, text) in enumerate(texts):
        (folder / f"{number:03d}-{name}.txt").write_text(text[:MOST], encoding="utf-8")
        written += min(len(text), MOST)
        if written >= characters:
            break
    return len(list(folder.iterdir()))


def report(folder: Path, n_files: int) -> None:
    """Say what a folder holds."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    sys.stdout.write(f"{folder}: {n_files} files, {size / 1e6:.1f} MB\n")


def files_of(kind: str) -> Iterator[tuple[str, str]]:
    """Name and text of a package's files, in an order that is the same everywhere."""
    package, pattern, taken = FILES[kind]
    folder = found(package)
    for path in in_hash_order(folder.rglob(pattern), folder):
        try:
            text = taken(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if len(text) >= LEAST:
            yield path.stem, text


def notices() -> Iterator[tuple[str, str]]:
    """Readmes of the installed distributions."""
    folder = found("scipy").parent
    for path in in_hash_order(folder.glob("*.dist-info/METADATA"), folder):
        text = notice_text(path.read_text(encoding="utf-8", errors="replace"))
        if len(text) >= LEAST:
            yield path.parent.stem, text


def topics() -> Iterator[tuple[str, str]]:
    """Chapters of the reference of the Python language, which comes with Python."""
    for name, text in sorted(pydoc_data.topics.topics.items(), key=lambda item: order(item[0])):
        if len(text) >= LEAST:
            yield name.replace("/", "-"), text


def services() -> Iterator[tuple[str, str]]:
    """What botocore says of Amazon's services."""
    import gzip

    data = found("botocore") / "data"
    for service in sorted((path for path in data.iterdir() if path.is_dir()), key=lambda path: order(path.name)):
        models = sorted(service.glob("*/service-2.json.gz"))
        if models:
            text = "\n\n".join(service_documentation(orjson.loads(gzip.decompress(models[-1].read_bytes()))))
            if len(text) >= LEAST:
                yield service.name, text


def in_hash_order(paths: Iterator[Path], folder: Path) -> list[Path]:
    """Paths in an order that is even and the same on every machine."""
    return sorted(paths, key=lambda path: order(str(path.relative_to(folder))))


def order(name: str) -> str:
    """Key of that order."""
    return hashlib.sha256(name.encode()).hexdigest()


def found(package: str) -> Path:
    """Folder of an installed package."""
    folder = package_folder(package, sys.path)
    if folder is None:
        raise SystemExit(f'{package} is not installed: pip install "cbtm[all]", or take a folder of your own')
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
