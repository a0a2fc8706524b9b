"""Check what a release consists of: `make release-check`, and RELEASE=1 on the commit that is to be tagged.

    python .ci/release_check.py [--release]

The version stands in cbtm/__init__.py. Checked is that the wheel, built from the tracked files alone, holds these and
nothing else; that it installs with the pinned packages into an empty environment, where `cbtm` tells that version and
compiles the bytes that are committed; that the compiled pipelines name images of that version; that the changelog has
it; and that a tag of this commit is it. With --release the changelog has its date and nothing is uncommitted.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
COMPILED = "cbtm/compiled/"
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
_HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>.+))?$", re.MULTILINE)
_IMAGE = re.compile(r"^ *image: (\S+)$", re.MULTILINE)


def version_of(source: str) -> str:
    """The version in the text of cbtm/__init__.py."""
    found = _VERSION.findall(source)
    if len(found) != 1:
        raise SystemExit(f'cbtm/__init__.py has {len(found)} lines __version__ = "…"; it needs one')
    return str(found[0])


def changelog_errors(text: str, version: str, *, is_release: bool) -> list[str]:
    """What is wrong with the headings of a changelog."""
    headings = [(match["version"], match["date"]) for match in _HEADING.finditer(text)]
    names = [name for name, _ in headings]
    errors = [f"CHANGELOG.md has {name} twice" for name in sorted({name for name in names if names.count(name) > 1})]
    dates = dict(headings)
    if version not in dates:
        known = ", ".join(names) or "none"
        return [*errors, f"CHANGELOG.md has no heading ## [{version}] - YYYY-MM-DD; its versions are {known}"]
    for name, date in headings:
        is_dated = bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", date or ""))
        if not is_dated and (name != version or is_release or date != "unreleased"):
            wanted = "YYYY-MM-DD" if is_release or name != version else "unreleased, or YYYY-MM-DD"
            errors.append(f"CHANGELOG.md: [{name}] has {date!r} where {wanted} belongs")
    return errors


def wheel_errors(names: Iterable[str], tracked: Iterable[str]) -> list[str]:
    """What a wheel holds that is not tracked below cbtm/, and what is missing."""
    packed = {name for name in names if not re.match(r"cbtm-[^/]+\.dist-info/", name)}
    wanted = {name for name in tracked if name.startswith("cbtm/")}
    return [f"the wheel holds {name}, which is not tracked below cbtm/" for name in sorted(packed - wanted)] + [
        f"the wheel lacks {name}: see package-data in pyproject.toml" for name in sorted(wanted - packed)
    ]


def image_errors(name: str, pipeline: str, version: str) -> list[str]:
    """Images of a compiled pipeline that are not tagged with the version."""
    images = sorted(set(_IMAGE.findall(pipeline)))
    if not images:
        return [f"{name} names no image"]
    return [
        f"{name} names {image}, not :{version}: run make compile"
        for image in images
        if not image.endswith(f":{version}")
    ]


def tag_errors(tags: Iterable[str], version: str) -> list[str]:
    """Tags of this commit that are for a version, and for another one."""
    return [
        f"this commit is tagged {tag}, but cbtm is {version}"
        for tag in tags
        if re.match(r"v\d", tag) and tag != f"v{version}"
    ]


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=PROJECT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def build_wheel(tracked: Iterable[str], folder: Path) -> Path:
    """The wheel of the tracked files: what else lies in the checkout, or in its build folder, is not seen."""
    source = folder / "source"
    for name in tracked:
        if name.startswith("cbtm/") or name in {"pyproject.toml", "README.md", "LICENSE"}:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source))
    return next(folder.glob("*.whl"))


def installed_errors(wheel: Path, folder: Path, version: str) -> list[str]:
    """What is wrong in an empty environment that has the wheel and what it needs, in the pinned versions."""
    home = folder / "environment"
    venv.create(home, with_pip=True)
    programs = home / ("Scripts" if sys.platform == "win32" else "bin")
    constraints = str(PROJECT / "constraints.txt")
    pip = (str(programs / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-compile", "--constraint", constraints, str(wheel))
    run(*pip, "check")
    cbtm = str(programs / "cbtm")
    errors = []
    if "Usage: cbtm" not in (said := run(cbtm, "--help", cwd=folder)):
        errors.append(f"cbtm --help says {said[:100]!r}")
    if (said := run(cbtm, "--version", cwd=folder).strip()) != version:
        errors.append(f"cbtm --version says {said}, not {version}")
    run(cbtm, "compile", "--output", "compiled.yaml", cwd=folder)
    if (folder / "compiled.yaml").read_bytes() != (PROJECT / COMPILED / "cbtm.yaml").read_bytes():
        errors.append(f"cbtm compile of the wheel writes other bytes than {COMPILED}cbtm.yaml")
    return errors


def run(*command: str, cwd: Path = PROJECT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check(*, is_release: bool) -> list[str]:
    """Everything that is wrong; the costly checks come last."""
    version = version_of((PROJECT / "cbtm/__init__.py").read_text(encoding="utf-8"))
    tracked = [name for name in git("ls-files") if (PROJECT / name).is_file()]
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    errors = changelog_errors(changelog, version, is_release=is_release)
    errors += tag_errors(git("tag", "--points-at", "HEAD"), version)
    if is_release:
        errors += [f"not committed: {line}" for line in git("status", "--porcelain")]
    with tempfile.TemporaryDirectory() as name:
        wheel = build_wheel(tracked, Path(name))
        with zipfile.ZipFile(wheel) as archive:
            errors += wheel_errors(archive.namelist(), tracked)
            for packed in archive.namelist():
                if packed.startswith(COMPILED):
                    errors += image_errors(packed, archive.read(packed).decode(), version)
        if wheel.name.split("-")[1] != version:
            errors.append(f"the wheel is {wheel.name}, but cbtm is {version}")
        errors += installed_errors(wheel, Path(name), version)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="the commit is to be tagged: date, nothing uncommitted")
    args = parser.parse_args()
    begin = time.monotonic()
    if errors := check(is_release=args.release):
        sys.exit("\n".join(f"release-check: {error}" for error in errors))
    sys.stdout.write(f"release-check: nothing wrong, {time.monotonic() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
