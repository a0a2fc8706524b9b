"""Fixtures of the tests of deploy/."""

from pathlib import Path

import pytest
from deployment import filled_copy


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ with secrets filled in."""
    return filled_copy(tmp_path_factory.mktemp("deployment") / "deploy")
