import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.train.packing import cut, pack


def rooms_left(sizes, blocks, room):
    used = np.zeros(int(blocks.max(initial=-1)) + 1, np.int64)
    np.add.at(used, blocks, sizes)
    return sorted((room - used).tolist())


def best_fit_decreasing(sizes, room):
    """Room left in each block, by the rule itself: one piece after the other, all blocks looked at for each."""
    blocks = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, left in enumerate(blocks) if left >= size]
        if fitting:
            blocks[min(fitting, key=lambda number: blocks[number])] -= size
        else:
            blocks.append(room - size)
    return sorted(blocks)


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_packing_is_best_fit_decreasing(data):
    room = data.draw(st.integers(1, 30))
    sizes = np.array(data.draw(st.lists(st.integers(1, room), max_size=60)), dtype=np.int64)
    blocks = pack(sizes, room)
    assert blocks.shape == sizes.shape
    assert sorted(set(blocks.tolist())) == list(range(len(set(blocks.tolist()))))
    assert rooms_left(sizes, blocks, room) == best_fit_decreasing(sizes.tolist(), room)


@pytest.mark.parametrize("seed", range(3))
def test_packing_of_many_documents_is_best_fit_decreasing(seed):
    sizes = np.minimum(100, np.random.default_rng(seed).geometric(1 / 30, 2000))
    assert rooms_left(sizes, pack(sizes, 100), 100) == best_fit_decreasing(sizes.tolist(), 100)


def test_packing_by_hand():
    # 7, then 5 + 5, then 4 beside nothing (7 + 4 > 10, 5 + 5 is full), then 3 to the 7 and 3 and 2 to the 4.
    sizes = np.array([3, 5, 2, 7, 5, 3, 4])
    blocks = pack(sizes, 10)
    groups = sorted(sorted(sizes[blocks == block].tolist()) for block in range(3))
    assert groups == [[2, 3, 4], [3, 7], [5, 5]]


def test_packing_is_the_same_each_time_and_takes_narrow_integers():
    # int16 minus signs and sums would wrap around.
    sizes = np.random.default_rng(0).integers(1, 2049, 5000)
    np.testing.assert_array_equal(pack(sizes, 2048), pack(sizes, 2048))
    np.testing.assert_array_equal(pack(sizes.astype(np.uint16), 2048), pack(sizes, 2048))


def test_nothing_to_pack_is_no_block():
    assert pack(np.empty(0, np.int64), 5).shape == (0,)


def test_a_long_document_is_cut_and_its_last_piece_ends_with_its_separator():
    # 3, 10 and 4 tokens at 0, 3 and 13 of the stream; 10 = 4 + 4 + 2.
    pieces = cut(np.array([3, 10, 4]), 4)
    assert pieces.starts.tolist() == [0, 3, 7, 11, 13]
    assert pieces.lengths.tolist() == [3, 4, 4, 2, 4]
    assert pieces.separators.tolist() == [0, -1, -1, 3, 13]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 25))
@settings(deadline=None, derandomize=True)
def test_pieces_cover_each_token_once_and_stay_inside_documents(lengths, limit):
    pieces = cut(np.array(lengths, dtype=np.int64), limit)
    covered = [start + i for start, n in zip(pieces.starts, pieces.lengths, strict=True) for i in range(n)]
    assert covered == list(range(sum(lengths)))
    assert all(1 <= n <= limit for n in pieces.lengths)
    bounds = set(np.cumsum(lengths).tolist())
    ends = pieces.starts + pieces.lengths
    assert [end in bounds for end in ends.tolist()] == (pieces.separators >= 0).tolist()
    assert len(pieces) == sum(-(-length // limit) for length in lengths)
