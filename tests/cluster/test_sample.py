"""Which documents a clusterer is fitted on, and what is kept of them."""

from collections import Counter

import numpy as np
import pytest

from cbtm.cluster.sample import drawn as drawn_of
from cbtm.cluster.sample import in_reading_order, reservoir, rows_of
from cbtm.corpus import Document


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


@pytest.mark.parametrize(("n", "n_batches"), [(10, 1), (10, 3), (9, 3), (7, 7)])
def test_batches_run_through_the_whole_and_their_values_come_back_in_order(n, n_batches):
    vectors = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
    batches = rows_of(vectors, n_batches)
    assert [len(batch) for batch in batches] == [len(range(number, n, n_batches)) for number in range(n_batches)]
    assert all(np.shares_memory(batch, vectors) for batch in batches)
    np.testing.assert_array_equal(in_reading_order(np.concatenate(batches), n_batches), vectors)
