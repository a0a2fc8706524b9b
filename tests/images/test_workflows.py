"""Workflows run with the rights of the repository: what they run is pinned."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / ".github/workflows"
WORKFLOWS = sorted(FOLDER.glob("*.y*ml"))


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_a_commit_and_says_which_release_it_is(path):
    used = re.findall(r"^\s*(?:- )?uses: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert used
    unpinned = [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)]
    assert unpinned == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_rights_are_to_read_unless_a_job_says_otherwise(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in jobs(path).values())


def test_images_are_published_from_tags_alone_and_after_the_checks():
    publish = jobs(FOLDER / "images.yml")["publish"]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["needs"] == "check"
    assert publish["permissions"] == {"contents": "read", "packages": "write"}


def test_no_input_of_others_is_put_into_a_shell():
    for path in WORKFLOWS:
        for job in jobs(path).values():
            assert not [step["run"] for step in job["steps"] if "${{" in step.get("run", "")]
