"""Containerfiles and shell scripts pass their linters."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def linter(name: str) -> str:
    """The program beside this Python; it comes for some platforms only."""
    program = Path(sys.executable).parent / name
    if not program.exists():
        pytest.skip(f"{name} is not installed here")
    return str(program)


def test_containerfiles_pass_hadolint():
    files = [str(path) for path in PROJECT.glob("*/**/Containerfile") if ".venv" not in path.parts]
    assert len(files) == 2
    checked = subprocess.run([linter("hadolint"), *files], cwd=PROJECT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_shell_scripts_pass_shellcheck():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, check=True, capture_output=True).stdout
    paths = [PROJECT / name for name in tracked.decode().split("\0") if name]
    scripts = [
        path
        for path in paths
        if path.is_file() and path.read_bytes()[:40].startswith((b"#!/bin/sh", b"#!/usr/bin/env bash"))
    ]
    assert len(scripts) >= 10
    checked = subprocess.run([linter("shellcheck"), *map(str, scripts)], cwd=PROJECT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
