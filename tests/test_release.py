"""What a release consists of: one version, and checks that see what is wrong with a wheel, a changelog or a tag."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from setuptools.config import pyprojecttoml

import cbtm
from components import images

PROJECT = Path(__file__).resolve().parents[1]
# Where a version may be spelled: its one place, the history, and what is made of it and checked (make compile-check,
# and the generated page of the components).
PLACES = (
    *("cbtm/__init__.py", "CHANGELOG.md", "cbtm/compiled/", "docs/decisions/", "docs/components.md", "constraints.txt"),
)
# Lines that tell of a version and set none: of files that it wrote, and of other packages.
TELLS = re.compile(r'of cbtm \d|"cbtm_version": "|balanced-kmeans( \(| \d|": ")')


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", PROJECT / ".ci" / "release_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


release = load()


def test_the_version_is_spelled_in_one_place():
    spelled = re.compile(rf"(?<![\w.]){re.escape(cbtm.__version__)}(?![\w.]*\d)")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    second = []
    for name in tracked.split("\0"):
        path = PROJECT / name
        if name.startswith(PLACES) or not path.is_file() or path.suffix in {".png", ".gz"}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if spelled.search(line) and not TELLS.search(line):
                second.append(f"{name}:{number}: {line.strip()}")
    assert second == []


def test_the_package_and_the_images_have_that_version():
    assert "version" not in tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = pyprojecttoml.read_configuration(PROJECT / "pyproject.toml", expand=True)
    assert found["project"]["version"] == cbtm.__version__
    assert images.VERSION == cbtm.__version__ == release.version_of((PROJECT / "cbtm/__init__.py").read_text("utf-8"))


def test_every_compiled_pipeline_names_images_of_that_version():
    pipelines = sorted((PROJECT / "cbtm" / "compiled").glob("*.yaml"))
    assert pipelines
    for file in pipelines:
        text = file.read_text(encoding="utf-8")
        assert release.image_errors(file.name, text, cbtm.__version__) == []
        assert len(list(yaml.safe_load_all(text))) >= 1


def test_an_image_of_another_version_is_named():
    text = "  image: registry/cbtm-cpu:1.2.0\n  image: registry/cbtm-cuda:1.1.0\n"
    assert release.image_errors("cbtm.yaml", text, "1.2.0") == [
        "cbtm.yaml names registry/cbtm-cuda:1.1.0, not :1.2.0: run make compile"
    ]
    assert release.image_errors("cbtm.yaml", "tasks: []", "1.2.0") == ["cbtm.yaml names no image"]


def test_two_versions_or_none_are_no_version():
    with pytest.raises(SystemExit, match=r"cbtm/__init__\.py has 0 lines __version__"):
        release.version_of("__version__ = version('cbtm')\n")
    with pytest.raises(SystemExit, match="has 2 lines"):
        release.version_of('__version__ = "1"\n__version__ = "2"\n')


def test_the_changelog_has_this_version():
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert release.changelog_errors(text, cbtm.__version__, is_release=False) == []


def test_a_release_needs_a_date_and_older_versions_have_one():
    text = "# Changelog\n\n## [1.1.0] - unreleased\n\n## [1.0.0] - 2026-01-31\n"
    assert release.changelog_errors(text, "1.1.0", is_release=False) == []
    assert release.changelog_errors(text, "1.1.0", is_release=True) == [
        "CHANGELOG.md: [1.1.0] has 'unreleased' where YYYY-MM-DD belongs"
    ]
    assert release.changelog_errors(text, "1.2.0", is_release=False) == [
        "CHANGELOG.md has no heading ## [1.2.0] - YYYY-MM-DD; its versions are 1.1.0, 1.0.0"
    ]
    dated = text.replace("unreleased", "2026-02-01")
    assert release.changelog_errors(dated, "1.1.0", is_release=True) == []
    undated = "## [1.1.0] - 2026-02-01\n\n## [1.0.0]\n"
    assert release.changelog_errors(undated, "1.1.0", is_release=False) == [
        "CHANGELOG.md: [1.0.0] has None where YYYY-MM-DD belongs"
    ]
    twice = "## [1.0.0] - 2026-02-01\n\n## [1.0.0] - 2026-02-01\n"
    assert release.changelog_errors(twice, "1.0.0", is_release=True) == ["CHANGELOG.md has 1.0.0 twice"]


def test_a_wheel_holds_what_is_tracked_and_nothing_else():
    tracked = ["cbtm/__init__.py", "cbtm/configs/demo.yaml", "tests/test_a.py"]
    packed = ["cbtm/__init__.py", "cbtm/left_over.py", "tests/test_a.py", "cbtm-1.0.0.dist-info/RECORD"]
    assert release.wheel_errors(packed, tracked) == [
        "the wheel holds cbtm/left_over.py, which is not tracked below cbtm/",
        "the wheel holds tests/test_a.py, which is not tracked below cbtm/",
        "the wheel lacks cbtm/configs/demo.yaml: see package-data in pyproject.toml",
    ]


def test_a_tag_for_a_version_must_be_this_one():
    assert release.tag_errors(["v1.2.0", "nightly", "vision"], "1.2.0") == []
    assert release.tag_errors(["v1.2.1"], "1.2.0") == ["this commit is tagged v1.2.1, but cbtm is 1.2.0"]


def test_ci_checks_the_release():
    assert "\nmake release-check\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
