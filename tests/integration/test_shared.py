"""Runs that take tokenizer, seed model and held-out tokens from another run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import settings

from cbtm import stages
from cbtm.errors import ConfigError, StorageError
from cbtm.run import Run
from cbtm.run_config import parse_config
from cbtm.train.member import Member


def finished(values: dict[str, Any]) -> Run:
    run = Run(parse_config(json.dumps(values)))
    stages.plan(run)
    for task in stages.tasks(run):
        task.run()
    return run


@pytest.fixture(scope="module")
def values(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = settings(str(corpus), str(tmp_path_factory.mktemp("shared") / "first"), None)
    found["train"] |= {"dense": False, "random_clusters": False}
    return found


@pytest.fixture(scope="module")
def first(values: dict[str, Any]) -> Run:
    return finished(values)


@pytest.fixture(scope="module")
def second(first: Run, values: dict[str, Any]) -> Run:
    """A run of four clusters in the place of two."""
    root = f"{first.config.root}-second"
    return finished(
        values | {"root": root, "shared": first.config.root, "cluster": values["cluster"] | {"n_clusters": 4}}
    )


def files(root: str) -> Iterator[tuple[str, int]]:
    for path in sorted(Path(root).rglob("*")):
        if path.is_file() and path.name != "lock":
            yield str(path.relative_to(root)), path.stat().st_mtime_ns


def test_nothing_of_what_is_shared_is_made_again(first, values):
    before = dict(files(first.config.root))
    root = f"{first.config.root}-third"
    third = finished(
        values | {"root": root, "shared": first.config.root, "cluster": {"n_clusters": 1, "n_components": 4}}
    )
    assert dict(files(first.config.root)) == before
    assert not [name for name, _ in files(third.config.root) if name.startswith(("seed", "tokenizer", "scores/seed"))]
    held_out = [name for name, _ in files(third.config.root) if name.startswith("tokens/held-out/")]
    assert held_out
    assert all(name.endswith(".clusters.npy") for name in held_out)
    assert stages.finished(Run(third.config))


def test_shared_run_gives_what_a_run_of_its_own_gives(first, second, values, tmp_path):
    alone = finished(values | {"root": str(tmp_path / "alone"), "cluster": values["cluster"] | {"n_clusters": 2}})
    root = str(tmp_path / "sharing")
    sharing = finished(values | {"root": root, "shared": first.config.root})
    for name in ("ensemble", "experts", "seed", "by_domain", "corpus", "selection"):
        assert sharing.result()[name] == alone.result()[name], name
    assert second.result()["seed"] == alone.result()["seed"]  # the same documents, under other clusters


def test_runs_of_different_clusters_report_on_the_same_tokens(first, second):
    offsets = [np.load(run.uri("scores/cluster-00001/offsets.npy")) for run in (first, second)]
    np.testing.assert_array_equal(*offsets)
    assert [run.result()["n_tokens"] for run in (first, second)] == [first.result()["n_tokens"]] * 2


def test_another_clusterer_has_the_seed_scored_no_second_time(first, values):
    moved = f"{first.config.root}-moved"
    shared = values | {"root": moved, "cluster": values["cluster"] | {"random_state": 7}}
    run = Run(parse_config(json.dumps(shared)))
    stages.plan(run)
    for task in list(stages.tasks(run))[: 2 + len(run.plan_made.groups)]:
        task.run()
    assert run.held_out_digest("validation-00000") == first.held_out_digest("validation-00000")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"vocab_size": 400}}, "has another section tokenizer; use the same, or leave shared out"),
        ({"assign": {"max_groups": 1}}, r"has assign.max_groups=\d+, this run 1"),
        ({"score": {"max_documents": 8}}, "has another section score"),
    ],
)
def test_run_to_share_with_that_differs_is_refused(first, values, tmp_path, changes, message):
    config = values | {"root": str(tmp_path / "out"), "shared": first.config.root}
    for section, fields in changes.items():
        config[section] = config.get(section, {}) | fields
    with pytest.raises(ConfigError, match=message):
        stages.plan(Run(parse_config(json.dumps(config))))


def test_run_to_share_with_is_read_where_it_lies_now(first, values, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first.config.root, moved)
    run = Run(parse_config(json.dumps(values | {"root": str(tmp_path / "out"), "shared": str(moved)})))
    stages.plan(run)
    assert run.tokenizer_spec().root == str(moved / "tokenizer")
    assert run.train_spec(Member("seed")).root == str(moved / "seed")


def test_run_to_share_with_that_itself_shares_is_refused(second, values, tmp_path):
    config = values | {"root": str(tmp_path / "out"), "shared": second.config.root}
    with pytest.raises(ConfigError, match="itself takes from"):
        stages.plan(Run(parse_config(json.dumps(config))))


def test_run_to_share_with_that_is_not_there_is_refused(values, tmp_path):
    config = values | {"root": str(tmp_path / "out"), "shared": str(tmp_path / "nowhere")}
    with pytest.raises(StorageError, match="nowhere"):
        stages.plan(Run(parse_config(json.dumps(config))))
