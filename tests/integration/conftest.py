"""Fixtures of the integration tests."""

from pathlib import Path

import pytest
from small import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of documents in two training shards and a validation split, as a corpus folder."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))
