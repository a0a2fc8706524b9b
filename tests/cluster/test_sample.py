"""Which documents a clusterer is fitted on, and what is kept of them."""

import json
from collections import Counter

import numpy as np
import pytest

from cbtm.cluster.fixed import FixedAssignments
from cbtm.cluster.sample import FixedClusters, RowBatches, Sample, dealt, reservoir
from cbtm.cluster.sample import drawn as drawn_of
from cbtm.corpus import Document
from cbtm.errors import DataError


def numbered(n):
    return [Document(str(number), "x") for number in range(n)]


def by_reservoir(n, size, seed):
    found, total = reservoir(iter(numbered(n)), size, seed)
    assert total == n
    return [int(document.sp_id) for document in found]


def by_stream(n, size, seed):
    return [int(document.sp_id) for document in drawn_of(iter(numbered(n)), min(n, size), n, seed)]


either = pytest.mark.parametrize("drawn", [by_reservoir, by_stream])


@either
def test_sample_has_the_size_asked_for_in_reading_order(drawn):
    for n, size in ((20, 5), (20, 19), (1000, 100)):
        found = drawn(n, size, seed=1)
        assert len(set(found)) == size
        assert found == sorted(found)
    assert drawn(20, 20, seed=1) == drawn(20, 50, seed=1) == list(range(20))
    assert drawn(0, 5, seed=1) == []


@either
def test_every_document_is_as_likely_to_be_in_the_sample(drawn):
    # 4000 samples of 5 from 20: each document 1000 times, standard deviation sqrt(4000 * 1/4 * 3/4) = 27.
    counts = Counter(number for seed in range(4000) for number in drawn(20, 5, seed))
    assert len(counts) == 20
    assert max(abs(count - 1000) for count in counts.values()) < 4 * 27


@either
def test_every_pair_is_as_likely_to_be_in_the_sample(drawn):
    # 10 pairs of 5 documents, 3000 samples of 2: 300 each, standard deviation sqrt(3000 * .1 * .9) = 16.
    counts = Counter(tuple(drawn(5, 2, seed)) for seed in range(3000))
    assert len(counts) == 10
    assert max(abs(count - 300) for count in counts.values()) < 4 * 17


@pytest.mark.parametrize("found", [7, 9, 0])
def test_stream_of_another_length_than_was_counted_is_refused_with_both_numbers(found):
    with pytest.raises(DataError, match=f"the corpus changed while it was read: 8 documents at first, then {found}"):
        list(drawn_of(numbered(found), 3, 8, random_state=0))


# --- batches ---


@pytest.mark.parametrize(("n", "n_batches"), [(10, 1), (10, 3), (9, 3), (7, 7), (11, 4)])
def test_every_row_is_dealt_once_to_batches_of_equal_size(n, n_batches):
    batches = dealt(n, n_batches, random_state=0)
    sizes = [n // n_batches] * (n_batches - n % n_batches) + [n // n_batches + 1] * (n % n_batches)
    assert sorted(map(len, batches)) == sizes
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert all((np.diff(batch) > 0).all() for batch in batches)


def test_each_batch_gets_one_row_of_every_few():
    # A corpus that holds one source after the other: of every 4 rows each of the 4 batches has one.
    for batch in dealt(400, 4, random_state=1):
        np.testing.assert_array_equal(batch // 4, np.arange(100))


def test_no_batch_follows_the_turns_of_a_corpus():
    # Three sources in turn, three batches. Each batch has 100 of each source, standard deviation sqrt(300 * 2/9) = 8.2.
    for batch in dealt(900, 3, random_state=0):
        assert np.abs(np.bincount(batch % 3, minlength=3) - 100).max() < 4 * 8.2


def test_rows_are_dealt_by_the_random_state_alone():
    first, second, other = (np.concatenate(dealt(60, 3, random_state=state)) for state in (4, 4, 5))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_batches_of_rows_on_disk_are_read_when_asked_for(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((11, 3)).astype(np.float32)
    vectors.tofile(tmp_path / "vectors")
    rows = dealt(11, 4, random_state=0)
    batches = RowBatches(np.memmap(tmp_path / "vectors", dtype=np.float32, mode="r", shape=(11, 3)), rows)
    assert len(batches) == len(list(batches)) == 4
    for own, batch in zip(rows, batches, strict=True):
        np.testing.assert_array_equal(batch, vectors[own])


# --- what is kept ---


def test_sample_keeps_the_start_the_label_and_the_tokens_of_each_document(tmp_path):
    documents = [Document(f"t|{number}", f"{number} " + "ä\n" * number) for number in range(0, 2500, 5)]
    labels = {"t|0": "first", "t|1000": "later", "t|3": "of no document"}
    with Sample(tmp_path, labels=labels, count_tokens=lambda texts: np.array([len(text) for text in texts])) as sample:
        passed = list(sample.texts(iter(documents)))
        assert passed == [document.text for document in documents]
        assert len(sample) == 500
        for row in (499, 0, 200):  # in any order
            assert sample.snippet(row).sp_id == documents[row].sp_id
            assert sample.snippet(row).text == documents[row].text[:600]
        assert sample.true_labels == ["first", *[None] * 199, "later", *[None] * 299]
        assert sample.tokens.tolist() == [len(document.text) for document in documents]


def test_nothing_is_counted_that_was_not_asked_for(tmp_path):
    with Sample(tmp_path) as sample:
        list(sample.texts(numbered(3)))
        assert (sample.tokens, sample.true_labels, len(sample.clusters)) == (None, None, 0)


def test_fixed_clusters_are_kept_of_documents_that_have_one(tmp_path):
    given = {"train/00000/a.jsonl": {0: 2, 2: 1}, "train/00001/a.jsonl": {1: 0}}
    for path, clusters in given.items():
        (tmp_path / path).parent.mkdir(parents=True)
        lines = [{"sp_id": f"{path}|{line}", "cluster": cluster} for line, cluster in clusters.items()]
        (tmp_path / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    fixed = FixedClusters(FixedAssignments(str(tmp_path), n_clusters=3))
    documents = [Document(f"{path}|{line}", "x") for path in given for line in range(3)]
    kept = fixed.only_with(documents)
    for _ in range(2):  # it may be read again
        assert [document.sp_id for document in kept] == [
            f"{path}|{line}" for path, clusters in given.items() for line in clusters
        ]
    with Sample(tmp_path / "scratch", fixed=fixed) as sample:
        list(sample.texts(kept))
        assert sample.clusters.tolist() == [2, 1, 0]
