"""Fixed assignments: both layouts are read, every wrong line is named, a gap is a missing key."""

import gzip
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from cbtm import storage
from cbtm.cluster.fixed import FixedAssignments
from cbtm.errors import DataError

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
PATH = "train/00000/x.jsonl"


def line(sp_id: object, cluster: object, **more: object) -> bytes:
    return json.dumps({"sp_id": sp_id, "cluster": cluster, **more}).encode() + b"\n"


def write(root: str, lines: Iterable[bytes], name: str = PATH, suffix: str = "") -> None:
    storage.write_bytes(f"{root}/{name}{suffix}", PACK[suffix](b"".join(lines)))


def error_of(root: str, *lines: bytes, path: str = PATH) -> str:
    write(root, lines)
    with pytest.raises(DataError) as caught:
        FixedAssignments(root, n_clusters=4).of_file(path)
    return str(caught.value)


# --- what is read ---


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_clusters_are_found_by_line_and_a_gap_is_no_key(root: str, suffix: str):
    write(root, [line(f"{PATH}|{number}", cluster) for number, cluster in ((0, 3), (1, 0), (4, 2))], suffix=suffix)
    clusters = FixedAssignments(root, n_clusters=4).of_file(PATH)
    assert dict(clusters) == {0: 3, 1: 0, 4: 2}
    assert [clusters.get(number) for number in range(-1, 6)] == [None, 3, 0, None, None, 2, None]
    assert len(clusters) == 3


def test_lines_may_come_in_any_order_and_say_more(tmp_path: Path):
    numbers = np.random.default_rng(0).permutation(1000)
    write(str(tmp_path), [line(f"{PATH}|{n}", int(n) % 7, distance=0.5) for n in numbers])
    clusters = FixedAssignments(str(tmp_path), n_clusters=7).of_file(PATH)
    assert dict(clusters) == {n: n % 7 for n in range(1000)}
    assert (clusters.lines.dtype, clusters.clusters.dtype) == (np.int64, np.int32)
    np.testing.assert_array_equal(clusters.lines, np.arange(1000))


@pytest.mark.parametrize("prefix", ["/data/c4/", "file:///data/c4/", "s3://bucket/c4/", "/", "./"])
def test_the_absolute_paths_of_another_machine_are_understood(root: str, prefix: str):
    write(root, [line(f"{prefix}{PATH}|17", 1), line(f"{PATH}|18", 2)])
    assert dict(FixedAssignments(root, n_clusters=4).of_file(PATH)) == {17: 1, 18: 2}


@pytest.mark.parametrize("corpus_suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("given_suffix", ["", ".gz", ".zst"])
def test_a_corpus_may_be_compressed_after_it_was_assigned(tmp_path: Path, corpus_suffix: str, given_suffix: str):
    write(str(tmp_path), [line(f"/old/{PATH}{given_suffix}|1", 1)])
    assert dict(FixedAssignments(str(tmp_path), n_clusters=4).of_file(PATH + corpus_suffix)) == {1: 1}


def test_rows_of_a_parquet_file_have_assignments_of_its_own(root: str):
    parquet = "train/00000/x.parquet"
    write(root, [line(f"{parquet}|5", 1)])
    assert dict(FixedAssignments(root, n_clusters=4).of_file(parquet)) == {5: 1}
    # JSON lines that were bad may be no rows, so that the numbers of the two need not agree.
    assert error_of(root, line(f"{PATH}|5", 1), path=parquet).endswith(f"{PATH}|5' is no document of {parquet}")


def test_a_huge_line_number_takes_no_room(tmp_path: Path):
    write(str(tmp_path), [line(f"{PATH}|{10**17}", 1)])
    assert dict(FixedAssignments(str(tmp_path), n_clusters=4).of_file(PATH)) == {10**17: 1}


def test_an_empty_file_assigns_nothing(tmp_path: Path):
    write(str(tmp_path), [])
    assert dict(FixedAssignments(str(tmp_path), n_clusters=4).of_file(PATH)) == {}


# --- what is refused, with file and line ---


def test_a_document_that_is_assigned_twice_is_named_with_both_lines(root: str):
    lines = [line(f"{PATH}|{n}", n % 4) for n in (7, 3, 5, 9)]
    assert error_of(root, *lines, line(f"/data/{PATH}|5", 3), line(f"{PATH}|3", 0)) == (
        f"{root}/{PATH}, line 5: document {PATH}|5 is assigned a second time, to cluster 3; line 3 gives it cluster 1"
    )
    assert error_of(root, *lines, line(f"{PATH}|9", 1)) == (
        f"{root}/{PATH}, line 5: document {PATH}|9 is assigned a second time, to cluster 1; line 4 gives it cluster 1"
    )


@pytest.mark.parametrize("cluster", [-1, 4, 2**40])
def test_a_cluster_that_there_is_not_is_refused(root: str, cluster: int):
    assert error_of(root, line(f"{PATH}|0", 3), line(f"{PATH}|1", cluster)) == (
        f"{root}/{PATH}, line 2: cluster {cluster} of '{PATH}|1' is not one of 0 to 3"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        b"[]\n",
        b"3\n",
        b"{}\n",
        b'{"cluster": 1}\n',
        line(f"{PATH}|1", None),
        line(f"{PATH}|1", "1"),
        line(f"{PATH}|1", 1.0),
        line(f"{PATH}|1", True),
        line(1, 1),
    ],
)
def test_a_line_that_is_no_assignment_is_refused(root: str, wrong: bytes):
    expected = f'{root}/{PATH}, line 2: expected {{"sp_id": "<path>|<line>", "cluster": <int>}}'
    assert error_of(root, line(f"{PATH}|0", 3), wrong) == expected


@pytest.mark.parametrize("wrong", [b"\n", b'{"sp_id"\n', b"\xff\n", b"NaN\n"])
def test_a_line_that_is_no_json_is_refused(tmp_path: Path, wrong: bytes):
    assert error_of(str(tmp_path), line(f"{PATH}|0", 3), wrong).startswith(f"{tmp_path}/{PATH}, line 2: not JSON (")


@pytest.mark.parametrize(
    "other",
    ["train/00001/x.jsonl|1", "/data/train/00001/x.jsonl|1", f"valid-{PATH}|1", "x.jsonl|1", f"{PATH}.bak|1", PATH, ""],
)
def test_a_document_of_another_file_is_refused(tmp_path: Path, other: str):
    assert error_of(str(tmp_path), line(f"{PATH}|0", 3), line(other, 1)) == (
        f"{tmp_path}/{PATH}, line 2: {other!r} is no document of {PATH}"
    )


@pytest.mark.parametrize("number", ["", "-1", "1.0", "x", " 1", "²", "1" * 19])
def test_a_document_without_a_line_number_is_refused(tmp_path: Path, number: str):
    assert error_of(str(tmp_path), line(f"{PATH}|{number}", 1)) == (
        f"{tmp_path}/{PATH}, line 1: '{PATH}|{number}' does not end in |<line number>"
    )


def test_a_damaged_file_is_named(root: str):
    whole = gzip.compress(b"".join(line(f"{PATH}|{n}", n % 4) for n in range(1000)))
    storage.write_bytes(f"{root}/{PATH}.gz", whole[:-20])
    with pytest.raises(DataError, match=re.escape(f"{root}/{PATH}.gz is cut short or damaged: ")):
        FixedAssignments(root, n_clusters=4).of_file(PATH)


# --- which file ---


@pytest.mark.parametrize("read", ["of_file", "digest"])
def test_a_corpus_file_without_assignments_is_an_error_with_the_place_looked_at(root: str, read: str):
    write(root, [], name="assignments/" + PATH)  # one folder too high
    fixed = FixedAssignments(root, n_clusters=4)
    expected = f"{PATH}.gz has no fixed assignments: {root}/{PATH}[.gz|.zst] is not there; give the folder that holds"
    with pytest.raises(DataError, match=re.escape(expected)):
        fixed.of_file(f"{PATH}.gz") if read == "of_file" else fixed.digest([f"{PATH}.gz"])


@pytest.mark.parametrize("read", ["of_file", "digest"])
def test_assignments_in_two_forms_are_refused(root: str, read: str):
    for suffix in ("", ".zst"):
        write(root, [line(f"{PATH}|0", 1)], suffix=suffix)
    fixed = FixedAssignments(root, n_clusters=4)
    with pytest.raises(DataError, match=rf"^{root}: {PATH} and {PATH}\.zst are one file in two forms; remove one"):
        fixed.of_file(PATH) if read == "of_file" else fixed.digest([PATH])


# --- identity ---


def test_the_digest_is_of_the_content_and_not_of_the_place(root: str):
    other = "train/00001/y.jsonl"
    digests = []
    for place in ("here", "there", "changed"):
        write(f"{root}/{place}", [line(f"{PATH}|0", 2 if place == "changed" else 1)])
        write(f"{root}/{place}", [line(f"{other}|0", 1)], name=other)
        write(f"{root}/{place}", [place.encode()], name="train/00009/of-no-corpus-file.jsonl")
        fixed = FixedAssignments(f"{root}/{place}/", n_clusters=4)
        digests.append(fixed.digest([PATH, other]))
        assert fixed.digest(iter([other, PATH, PATH])) == digests[-1]
    assert digests[0] == digests[1] != digests[2]
    assert fixed.digest([PATH]) != fixed.digest([other])
    assert re.fullmatch("[0-9a-f]{64}", digests[0])
