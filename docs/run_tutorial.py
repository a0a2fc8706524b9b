"""Run the commands of docs/tutorial.md and write what they print into the page.

    python docs/run_tutorial.py [FOLDER]

FOLDER receives all that the tutorial makes, and what is there from an earlier try is not made again; by default it is
a temporary one. A block of YAML or Python whose first line is a comment with a file name is written to that file. What
a block of commands prints on standard output goes into the `text` block that follows it.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "tutorial.md"

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# (\S+\.\w+)\n")
_WIDTH = 118


@dataclass(frozen=True)
class Step:
    """A block of the page.

    Attributes:
        name: Name of the file that it is; None for commands.
        text: Content of the file, or the commands.
        output: Where in the page their output stands, as a span of characters; None where none is shown.
    """

    name: str | None
    text: str
    output: tuple[int, int] | None = None


def steps(page: str) -> Iterator[Step]:
    """The blocks of a page in order, each with the place of its output."""
    blocks = list(_FENCE.finditer(page))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        language, text = block[1], block[2]
        if language == "bash":
            has_output = following is not None and following[1] == "text"
            yield Step(None, text, following.span(2) if has_output and following is not None else None)
        elif language != "text":
            named = _FILE_NAME.match(text)
            if named is None:
                raise SystemExit(f"a block of {language} does not begin with the name of its file: {text[:60]!r}")
            yield Step(named[1], text)


def run(page: str, folder: Path, execute: Callable[[str, Path], str]) -> str:
    """Do the steps of a page in a folder; the page with what they printed.

    Args:
        page: The page's text.
        folder: Folder to work in.
        execute: Runs commands in a folder and returns what they printed.
    """
    shown: list[tuple[tuple[int, int], str]] = []
    for step in steps(page):
        if step.name is not None:
            (folder / step.name).write_text(step.text, encoding="utf-8")
            continue
        printed = execute(step.text, folder)
        if step.output is not None:
            shown.append((step.output, "".join(f"{line.rstrip()[:_WIDTH]}\n" for line in printed.splitlines())))
    for (start, end), text in reversed(shown):
        page = page[:start] + text + page[end:]
    return page


def in_a_shell(commands: str, folder: Path) -> str:
    """Run commands with the environment of this interpreter first on the path; an error ends the tutorial."""
    began = time.monotonic()
    path = f"export PATH={Path(sys.executable).parent}:$PATH; set -euo pipefail; "
    done = subprocess.run(["bash", "-c", path + commands], cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(f"{time.monotonic() - began:7.1f} s  {commands.splitlines()[0]}\n")
    if done.returncode:
        raise SystemExit(f"{commands.strip()} failed with code {done.returncode}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Run the tutorial and refresh the page."""
    with tempfile.TemporaryDirectory(prefix="cbtm-tutorial-") as temporary:
        folder = Path(arguments[0]) if arguments else Path(temporary)
        folder.mkdir(exist_ok=True)
        if not (folder / "docs").exists():
            (folder / "docs").symlink_to(PAGE.parent)
        PAGE.write_text(run(PAGE.read_text(encoding="utf-8"), folder, in_a_shell), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
