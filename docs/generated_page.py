"""What the scripts that write pages have in common: entries of docstrings, and writing or comparing a page."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


def docstring_entries(docstring: str, part: str) -> Iterator[tuple[str, str]]:
    """Names and meanings of a part of a clean docstring, such as `Attributes`, `Args` or `Returns`."""
    _, _, rest = docstring.partition(f"{part}:\n")
    name, words = "", ""
    for line in rest.split("\n\n")[0].splitlines():
        start = _ENTRY.match(line)
        if start is None:
            words += " " + line.strip()
            continue
        if name:
            yield name, words
        name, words = start[1], start[2]
    if name:
        yield name, words


def summary(docstring: str) -> str:
    """The first paragraph of a docstring, as one line."""
    return docstring.split("\n\n")[0].replace("\n", " ")


def cell(text: str) -> str:
    """Text as it stands in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def write_or_compare(
    script: str, description: str | None, render: Callable[[], str], target: Path, arguments: Sequence[str] | None
) -> int:
    """Write a page, or with --check say whether it is what is to be written; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = render()
    if not check:
        target.write_text(text, encoding="utf-8")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        sys.stderr.write(f"{target} is stale: run python docs/{script} and commit it\n")
        return 1
    return 0
