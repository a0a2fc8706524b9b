"""The plan: groups of whole shards, known by their content."""

import itertools
import json
import os
from pathlib import Path

import pytest

from cbtm import storage
from cbtm.corpus import CorpusConfig
from cbtm.errors import DataError, ManifestError
from cbtm.plan import Plan, make_plan


def write(root: str, path: str, text: str = "text") -> None:
    storage.write_bytes(storage.join(root, path), json.dumps({"text": text}).encode() + b"\n")


def corpus_of(root: str, n_shards: int, files_per_shard: int = 1) -> CorpusConfig:
    for shard, file in itertools.product(range(n_shards), range(files_per_shard)):
        write(root, f"train/{shard:05d}/{file}.jsonl", f"{shard} {file}")
    write(root, "valid/00000/0.jsonl")
    return CorpusConfig(root=root)


def shards(plan: Plan) -> list[list[str]]:
    """Shards of each training group, as often as they have files."""
    return [[path.split("/")[1] for path in group.paths] for group in plan.part("train")]


# --- groups ---


@pytest.mark.parametrize(
    ("n_shards", "max_groups", "sizes"),
    [(7, 3, [2, 2, 3]), (6, 3, [2, 2, 2]), (2, 16, [1, 1]), (5, 1, [5]), (1, 1, [1]), (16, 16, [1] * 16)],
)
def test_shards_are_dealt_evenly_in_order_to_at_most_so_many_groups(
    tmp_path: Path, n_shards: int, max_groups: int, sizes: list[int]
):
    plan = make_plan(corpus_of(str(tmp_path), n_shards), max_groups=max_groups)
    assert [len(group) for group in shards(plan)] == sizes
    assert list(itertools.chain(*shards(plan))) == [f"{shard:05d}" for shard in range(n_shards)]


def test_a_shard_is_never_divided(tmp_path: Path):
    plan = make_plan(corpus_of(str(tmp_path), 3, files_per_shard=4), max_groups=2)
    assert shards(plan) == [["00000"] * 4, ["00001"] * 4 + ["00002"] * 4]


def test_groups_are_named_by_part_and_number_and_found_by_name(root: str):
    plan = make_plan(corpus_of(root, 2), max_groups=5)
    assert [(group.name, group.part, group.split) for group in plan.groups] == [
        ("train-00000", "train", "train"),
        ("train-00001", "train", "train"),
        ("validation-00000", "validation", "valid"),
    ]
    assert plan.group("train-00001").paths == ["train/00001/0.jsonl"]
    with pytest.raises(ManifestError, match="no shard group 'train-00009'; it has train-00000, train-00001, valid"):
        plan.group("train-00009")


def test_files_that_lie_loose_in_the_split_are_planned_too(tmp_path: Path):
    corpus = corpus_of(str(tmp_path), 2)
    for name in ("00000-loose", "zz"):
        write(corpus.root, f"train/{name}.jsonl")
    plan = make_plan(corpus, max_groups=16)
    paths = [path for group in plan.part("train") for path in group.paths]
    assert paths == ["train/00000-loose.jsonl", "train/00000/0.jsonl", "train/00001/0.jsonl", "train/zz.jsonl"]


def test_a_plan_comes_back_from_json_as_it_was(root: str):
    plan = make_plan(corpus_of(root, 3), max_groups=2)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


# --- identity ---


def test_the_same_corpus_gives_the_same_plan(root: str):
    corpus = corpus_of(root, 3)
    assert make_plan(corpus, max_groups=2) == make_plan(corpus, max_groups=2)


def test_a_local_corpus_that_was_copied_elsewhere_keeps_its_digests(tmp_path: Path):
    plans = [make_plan(corpus_of(str(tmp_path / name), 3), max_groups=2) for name in "ab"]
    assert plans[0].digest("train") == plans[1].digest("train")
    assert plans[0].groups[0].files[0].digest == storage.sha256(f"{tmp_path}/a/train/00000/0.jsonl")


def test_changed_text_of_equal_length_changes_the_digest_of_its_group_and_part_only(root: str):
    corpus = corpus_of(root, 4)
    before = make_plan(corpus, max_groups=2)
    write(root, "train/00003/0.jsonl", "3 X")
    after = make_plan(corpus, max_groups=2, previous=before)
    changed = [a.name for a, b in zip(after.groups, before.groups, strict=True) if a.digest != b.digest]
    assert changed == ["train-00001"]
    assert after.digest("train") != before.digest("train")
    assert after.digest("validation") == before.digest("validation")


def test_a_new_a_removed_or_a_renamed_file_changes_the_digest(root: str):
    corpus = corpus_of(root, 2)
    digests = {make_plan(corpus, max_groups=2).digest("train")}
    write(root, "train/00001/1.jsonl", "new")
    digests.add(make_plan(corpus, max_groups=2).digest("train"))
    storage.delete(root, ["train/00001/1.jsonl"])
    write(root, "train/00001/2.jsonl", "new")
    digests.add(make_plan(corpus, max_groups=2).digest("train"))
    storage.delete(root, ["train/00000/0.jsonl"])
    digests.add(make_plan(corpus, max_groups=2).digest("train"))
    assert len(digests) == 4


def overwrite_keeping_time(path: Path, text: str) -> None:
    """Change a file so that size and time do not tell: only a reading of the content does."""
    status = path.stat()
    write(str(path.parent), path.name, text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size


def test_a_file_of_equal_size_and_time_is_not_read_again(tmp_path: Path):
    corpus = corpus_of(str(tmp_path), 2)
    before = make_plan(corpus, max_groups=2)
    overwrite_keeping_time(tmp_path / "train/00000/0.jsonl", "0 X")
    assert make_plan(corpus, max_groups=2, previous=before) == before
    assert make_plan(corpus, max_groups=2) != before


def test_the_plan_of_another_corpus_vouches_for_no_file(tmp_path: Path):
    # An archive is often unpacked with one time for all files, so size and time may agree by accident.
    one, two = corpus_of(str(tmp_path / "one"), 2), corpus_of(str(tmp_path / "two"), 2)
    for path in tmp_path.rglob("*.jsonl"):
        os.utime(path, ns=(0, 0))
    overwrite_keeping_time(tmp_path / "two/train/00000/0.jsonl", "0 X")
    before = make_plan(one, max_groups=2)
    assert make_plan(two, max_groups=2, previous=before).digest("train") != before.digest("train")


# --- what is refused ---


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "train"), ("train", "train/"), ("valid", "valid/C8_small"), ("all/train", "all"), ("./a", "a/b")],
)
def test_splits_that_share_text_are_refused(tmp_path: Path, train: str, validation: str):
    corpus = CorpusConfig(root=str(tmp_path), train_split=train, validation_split=validation)
    with pytest.raises(DataError, match=r"train_split=.* and .*validation_split=.* share text: .*cbtm corpus import"):
        make_plan(corpus, max_groups=1)


def test_splits_whose_names_only_begin_alike_are_planned(tmp_path: Path):
    write(str(tmp_path), "c4/0/a.jsonl")
    write(str(tmp_path), "c4_small/0/a.jsonl")
    corpus = CorpusConfig(root=str(tmp_path), train_split="c4", validation_split="c4_small")
    plan = make_plan(corpus, max_groups=1)
    assert [group.paths for group in plan.groups] == [["c4/0/a.jsonl"], ["c4_small/0/a.jsonl"]]


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_an_empty_split_is_refused(root: str, missing: str):
    write(root, f"{'valid' if missing == 'train' else 'train'}/0/a.jsonl")
    with pytest.raises(DataError, match=f"no corpus files below {root}/{missing}"):
        make_plan(CorpusConfig(root=root), max_groups=1)
