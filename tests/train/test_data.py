import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.errors import ConfigError, DataError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.data import IGNORED, Batch, BlockOrder, Prefetcher

PREFIX = 59_999


def documents(folder, *shards):
    """Token stream of shards given as lists of document lengths; the tokens count on through all of them.

    A document is its length, or its length and that of its prompt.
    """
    pairs, next_token = [], 0
    for number, lengths in enumerate(shards):
        with TokenShardWriter(folder, f"s{number}", vocab_size=60_000) as writer:
            for document in lengths:
                length, prompt = document if isinstance(document, tuple) else (document, 0)
                tokens = np.arange(next_token, next_token + length)
                writer.add(DocumentRecord(f"d{next_token}", 1), tokens, prompt)
                next_token += length
        pairs.append((folder, f"s{number}"))
    return TokenDocuments(pairs)


def first_tokens(order, first, count):
    return order.batch(first, count).inputs[:, 0].tolist()


def arrays(batch):
    return [array for array in (batch.inputs, batch.targets, batch.positions, batch.segments) if array is not None]


def assert_same(one, other):
    for left, right in zip(arrays(one), arrays(other), strict=True):
        np.testing.assert_array_equal(left, right)


def learned_pairs(batch):
    """(input, target) of every place where something is learned, sorted."""
    there = batch.targets != IGNORED
    return sorted(zip(batch.inputs[there].tolist(), batch.targets[there].tolist(), strict=True))


def document_pairs(lengths):
    """What documents have to teach: each token after the one before it, and the separator after the last."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    return sorted(
        (t, t + 1 if t + 1 < end else int(begin))
        for begin, end in zip(begins, ends, strict=True)
        for t in range(int(begin), int(end))
    )


# --- continuous blocks ---


def test_block_is_a_slice_of_the_stream_across_documents_and_shards(tmp_path):
    # Token t is the number t, so that a block is what it starts with and the nine numbers behind it.
    order = BlockOrder(documents(tmp_path, [7, 5], [], [20, 3, 30]), context_length=9, seed=3)
    batch = order.batch(0, 21)
    assert batch.inputs.shape == batch.targets.shape == (21, 9)
    assert batch.inputs.dtype == batch.targets.dtype == np.int64
    assert batch.positions is None
    assert batch.segments is None
    assert batch.n_targets == 21 * 9
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        np.testing.assert_array_equal(inputs, np.arange(inputs[0], inputs[0] + 9))
        np.testing.assert_array_equal(targets, inputs + 1)


def test_order_and_phase_of_an_epoch_are_one_draw_each_from_seed_and_epoch(tmp_path):
    # A run made earlier goes on with these draws, in this order. (103 - 1) // 9 = 11 blocks, and 3 tokens to spare.
    order = BlockOrder(documents(tmp_path, [103]), context_length=9, seed=3)
    for epoch in range(4):
        rng = np.random.default_rng([3, epoch])
        permutation, phase = rng.permutation(11), rng.integers(103 - 1 - 99 + 1)
        assert first_tokens(order, 11 * epoch, 11) == (phase + 9 * permutation).tolist()


def test_every_block_comes_once_in_an_epoch(tmp_path):
    # 65 tokens: (65 - 1) // 9 = 7 blocks, 1 token to spare, so a phase of 0 or 1.
    order = BlockOrder(documents(tmp_path, [65]), context_length=9, seed=3)
    assert order.n_blocks == 7
    for epoch in range(5):
        starts = sorted(first_tokens(order, 7 * epoch, 7))
        assert starts[0] in (0, 1)
        assert starts == [starts[0] + 9 * number for number in range(7)]


def test_targets_of_a_block_are_the_inputs_moved_by_one_up_to_the_next_block(tmp_path):
    # Blocks feed 9 tokens and overlap by one: over an epoch every fed token is fed once.
    batch = BlockOrder(documents(tmp_path, [64]), context_length=9, seed=3).batch(0, 7)
    assert sorted(batch.inputs.ravel().tolist()) == list(range(63))
    assert sorted(batch.targets.ravel().tolist()) == list(range(1, 64))


def test_next_epoch_has_another_order_and_every_phase_comes_up(tmp_path):
    # 70 tokens: 69 = 7 * 9 + 6, phases 0 … 6.
    order = BlockOrder(documents(tmp_path, [70]), context_length=9, seed=3)
    epochs = [first_tokens(order, 7 * epoch, 7) for epoch in range(60)]
    assert epochs[0] != epochs[1]
    assert len({tuple(np.argsort(starts)) for starts in epochs}) > 50
    assert {min(starts) for starts in epochs} == set(range(7))


@pytest.mark.parametrize("packing", ["continuous", "documents", "separate"])
def test_any_block_can_be_had_without_those_before_it(tmp_path, packing):
    source = documents(tmp_path, [100, 7, 3, 40])
    straight = BlockOrder(source, context_length=9, seed=3, packing=packing).batch(0, 50)
    jumping = BlockOrder(source, context_length=9, seed=3, packing=packing)
    rows = list(straight.split(1))
    for index in np.random.default_rng(0).permutation(50).tolist():
        assert_same(jumping.batch(index, 1), rows[index])
    for size in (1, 4, 7):
        again = BlockOrder(source, context_length=9, seed=3, packing=packing)
        batches = [again.batch(first, min(size, 50 - first)) for first in range(0, 50, size)]
        np.testing.assert_array_equal(np.concatenate([batch.inputs for batch in batches]), straight.inputs)
        np.testing.assert_array_equal(np.concatenate([batch.targets for batch in batches]), straight.targets)


@pytest.mark.parametrize("packing", ["continuous", "documents", "separate"])
def test_order_depends_on_the_seed_and_not_on_the_global_generator(tmp_path, packing):
    source = documents(tmp_path, [12] * 80)
    np.random.seed(0)
    one = first_tokens(BlockOrder(source, context_length=9, seed=3, packing=packing), 0, 100)
    np.random.seed(1)
    assert first_tokens(BlockOrder(source, context_length=9, seed=3, packing=packing), 0, 100) == one
    assert first_tokens(BlockOrder(source, context_length=9, seed=4, packing=packing), 0, 100) != one


def test_epochs_count_passes_over_the_stream(tmp_path):
    order = BlockOrder(documents(tmp_path, [65]), context_length=9, seed=3)
    assert order.epochs(7) == 1.0
    assert order.epochs(24) == pytest.approx(24 / 7)


def test_one_block_is_enough(tmp_path):
    order = BlockOrder(documents(tmp_path, [10]), context_length=9, seed=3)
    np.testing.assert_array_equal(order.batch(0, 2).inputs, [range(9), range(9)])


@pytest.mark.parametrize("lengths", [[], [4, 5]])
def test_less_text_than_a_block_is_refused(tmp_path, lengths):
    message = f"{len(lengths)} documents with {sum(lengths)} tokens are less than one block of context_length=9"
    with pytest.raises(DataError, match=message):
        BlockOrder(documents(tmp_path, lengths), context_length=9, seed=3)


def test_no_block_is_an_empty_batch(tmp_path):
    # A rank that has no share of a step.
    batch = BlockOrder(documents(tmp_path, [30]), context_length=9, seed=3, packing="separate").batch(5, 0)
    assert [array.shape for array in arrays(batch)] == [(0, 9)] * 4
    assert batch.n_targets == 0


def test_micro_batches_are_the_rows_in_order():
    rows = np.arange(20).reshape(5, 4)
    parts = list(Batch(rows, rows + 1, rows % 4, rows * 0).split(2))
    assert [len(part.inputs) for part in parts] == [2, 2, 1]
    for number, array in enumerate([rows, rows + 1, rows % 4, rows * 0]):
        np.testing.assert_array_equal(np.concatenate([arrays(part)[number] for part in parts]), array)
    assert [len(arrays(part)) for part in Batch(rows, rows).split(5)] == [2]


# --- whole documents ---


def test_documents_packed_by_hand(tmp_path):
    # Documents of 3, 8, 2 and 5 tokens at 0, 3, 11 and 13. 8 is cut into 6 and 2; largest first: 6 | 5 | 3 2 | 2,
    # the last 2 into no block with exactly 2 left (5 leaves 1, 3 + 2 leaves 1), so a block of its own.
    source = documents(tmp_path, [3, 8, 2, 5])
    order = BlockOrder(source, context_length=6, seed=3, packing="documents")
    assert order.n_blocks == 4
    batch = order.batch(0, 4)
    blocks = {int(row[0]): (row.tolist(), targets.tolist()) for row, targets in zip(*arrays(batch), strict=True)}
    assert blocks[3] == ([3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8, 9])
    assert blocks[13] == ([13, 14, 15, 16, 17, 0], [14, 15, 16, 17, 13, IGNORED])
    assert blocks[0] == ([0, 1, 2, 9, 10, 0], [1, 2, 0, 10, 3, IGNORED])  # 10 ends the second document, begun with 3
    assert blocks[11] == ([11, 12, 0, 0, 0, 0], [12, 11, *[IGNORED] * 4])
    assert order.padding == pytest.approx(1 - 18 / 24)
    assert batch.n_targets == 18


def test_separate_pieces_have_positions_and_segments_of_their_own(tmp_path):
    source = documents(tmp_path, [3, 8, 2, 5])
    together = BlockOrder(source, context_length=6, seed=3, packing="documents").batch(0, 4)
    batch = BlockOrder(source, context_length=6, seed=3, packing="separate").batch(0, 4)
    np.testing.assert_array_equal(batch.inputs, together.inputs)
    np.testing.assert_array_equal(batch.targets, together.targets)
    rows = {int(i[0]): (p.tolist(), s.tolist()) for i, p, s in zip(batch.inputs, *arrays(batch)[2:], strict=True)}
    assert rows[3] == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0])
    assert rows[13] == ([0, 1, 2, 3, 4, 0], [0, 0, 0, 0, 0, 1])
    assert rows[0] == ([0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 1, 2])
    assert rows[11] == ([0, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1])


LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=30)


@given(LENGTHS, st.integers(2, 12), st.sampled_from(["documents", "separate"]), st.sampled_from([None, PREFIX]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_token_of_every_document_is_learned_once_in_an_epoch(
    tmp_path_factory, lengths, context_length, packing, prefix
):
    source = documents(tmp_path_factory.mktemp("tokens"), lengths[::2], lengths[1::2])
    order = BlockOrder(source, context_length=context_length, seed=3, packing=packing, prefix_token=prefix)
    batch = order.batch(order.n_blocks, order.n_blocks)  # the second epoch
    assert learned_pairs(batch) == document_pairs(lengths[::2] + lengths[1::2])
    n_prefixes = int((batch.inputs == PREFIX).sum())
    used = sum(lengths) + n_prefixes
    assert order.padding == pytest.approx(1 - used / (order.n_blocks * context_length))


@pytest.mark.parametrize("packing", ["documents", "separate"])
def test_blocks_of_packed_documents_are_shuffled_by_seed_and_epoch(tmp_path, packing):
    order = BlockOrder(documents(tmp_path, [9] * 40), context_length=9, seed=3, packing=packing)
    epochs = [first_tokens(order, 40 * epoch, 40) for epoch in range(3)]
    for number, starts in enumerate(epochs):
        assert starts == (9 * np.random.default_rng([3, number]).permutation(40)).tolist()


def test_one_short_document_is_a_block(tmp_path):
    batch = BlockOrder(documents(tmp_path, [1]), context_length=4, seed=3, packing="documents").batch(0, 1)
    # No text: the separator is followed by the end of the text.
    assert batch.inputs.tolist() == [[0, 0, 0, 0]]
    assert batch.targets.tolist() == [[0, IGNORED, IGNORED, IGNORED]]


@pytest.mark.parametrize("packing", ["documents", "separate"])
def test_no_document_is_nothing_to_pack(tmp_path, packing):
    with pytest.raises(DataError, match="0 documents with 0 tokens are nothing to pack; use fewer clusters"):
        BlockOrder(documents(tmp_path, []), context_length=4, seed=3, packing=packing)


# --- a prefix in front ---


def test_prefix_takes_no_token_from_a_continuous_epoch(tmp_path):
    # 56 tokens: 56 // 9 = 6 blocks of 9 text tokens each, 2 to spare.
    order = BlockOrder(documents(tmp_path, [56]), context_length=9, seed=3, prefix_token=PREFIX)
    assert order.n_blocks == 6
    phases = set()
    for epoch in range(40):
        batch = order.batch(6 * epoch, 6)
        assert batch.inputs[:, 0].tolist() == [PREFIX] * 6
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        learned = sorted(batch.targets.ravel().tolist())
        assert learned == list(range(learned[0], learned[0] + 54))
        phases.add(learned[0])
    assert phases == {0, 1, 2}


def test_prefix_makes_a_block_of_as_many_text_tokens_as_inputs(tmp_path):
    assert BlockOrder(documents(tmp_path, [9]), context_length=9, seed=3, prefix_token=PREFIX).n_blocks == 1
    with pytest.raises(DataError, match="1 documents with 9 tokens are less than one block of context_length=9"):
        BlockOrder(documents(tmp_path, [9]), context_length=9, seed=3)


def test_prefix_of_packed_documents_is_in_front_of_the_block(tmp_path):
    # Room for 5 text tokens: 3 + 2 in one block.
    order = BlockOrder(documents(tmp_path, [3, 2]), context_length=6, seed=3, packing="documents", prefix_token=PREFIX)
    batch = order.batch(0, 1)
    assert order.n_blocks == 1
    assert batch.inputs.tolist() == [[PREFIX, 0, 1, 2, 3, 4]]
    assert batch.targets.tolist() == [[IGNORED, 1, 2, 0, 4, 3]]
    assert order.padding == 0


def test_prefix_of_separate_documents_is_in_front_of_each_piece(tmp_path):
    order = BlockOrder(documents(tmp_path, [3, 9]), context_length=8, seed=3, packing="separate", prefix_token=PREFIX)
    # 9 is cut into 7 and 2, with a prefix 8 and 3; 3 with a prefix is 4, and 4 + 3 leaves one of 8.
    assert order.n_blocks == 2
    batch = order.batch(0, 2)
    row = batch.inputs[:, 1].tolist().index(0)
    assert batch.inputs[row].tolist() == [PREFIX, 0, 1, 2, PREFIX, 10, 11, 0]
    assert batch.targets[row].tolist() == [IGNORED, 1, 2, 0, IGNORED, 11, 3, IGNORED]
    assert batch.positions[row].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.segments[row].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert batch.inputs[1 - row].tolist() == [PREFIX, *range(3, 10)]
    assert batch.targets[1 - row].tolist() == [IGNORED, *range(4, 11)]


@pytest.mark.parametrize("packing", ["continuous", "documents", "separate"])
def test_prefix_that_leaves_no_room_is_refused(tmp_path, packing):
    with pytest.raises(ConfigError, match="context_length=1 leaves no room for text behind the prefix token"):
        BlockOrder(documents(tmp_path, [5]), context_length=1, seed=3, packing=packing, prefix_token=PREFIX)


# --- prompts ---


@pytest.mark.parametrize("prefix", [None, PREFIX])
@pytest.mark.parametrize("packing", ["continuous", "documents", "separate"])
def test_tokens_of_prompts_are_fed_and_not_learned(tmp_path, packing, prefix):
    shards = [[(6, 2), 4], [(13, 10), (5, 0)], [(3, 2), (9, 3)]]
    source = documents(tmp_path, *shards)
    bare = documents(tmp_path / "bare", *[[d[0] if isinstance(d, tuple) else d for d in shard] for shard in shards])
    # Separators at 0, 6, 10, 23, 28, 31: behind them 2, 0, 10, 0, 2 and 3 tokens of prompt.
    prompts = {1, 2, *range(11, 21), 29, 30, 32, 33, 34}
    batches = []
    for documents_ in (source, bare):
        order = BlockOrder(documents_, context_length=5, seed=3, packing=packing, prefix_token=prefix)
        batches.append(order.batch(0, 3 * order.n_blocks))
    found, everything = batches
    np.testing.assert_array_equal(found.inputs, everything.inputs)
    expected = np.where(np.isin(everything.targets, list(prompts)), IGNORED, everything.targets)
    np.testing.assert_array_equal(found.targets, expected)
    assert found.n_targets < everything.n_targets
    # Tokens 11 … 20 are two blocks' worth of prompt: some block has nothing to learn.
    if packing != "continuous":
        assert 0 in [part.n_targets for part in found.split(1)]


# --- the thread that prepares ---


def test_prefetched_steps_come_in_order():
    with Prefetcher(lambda step: step * step, 3, 50) as batches:
        assert [batches.next() for _ in range(3, 50)] == [step * step for step in range(3, 50)]
        with pytest.raises(IndexError, match="steps 3 to 50 are all taken"):
            batches.next()


def test_two_steps_are_prepared_ahead_and_no_more():
    made, third = [], threading.Event()

    def make(step):
        made.append(step)
        if step == 2:
            third.set()
        return step

    with Prefetcher(make, 0, 10) as batches:
        assert batches.next() == 0
        assert third.wait(10)
    # 0 is taken and 1 and 2 are ready; the thread was waiting for room when the block was left.
    assert made == [0, 1, 2]


def test_waiting_is_counted():
    asked = threading.Event()
    with Prefetcher(lambda _: asked.wait(10), 0, 1) as batches:
        threading.Timer(0.2, asked.set).start()
        assert batches.next()
        assert 0.15 < batches.waited < 5


def test_error_of_a_step_comes_where_the_step_is_asked_for():
    def make(step):
        if step == 2:
            raise DataError("shard 7 is cut short")
        return step

    with Prefetcher(make, 0, 10) as batches:
        assert [batches.next(), batches.next()] == [0, 1]
        for _ in range(2):
            with pytest.raises(DataError, match="shard 7 is cut short"):
                batches.next()


def test_leaving_the_block_ends_the_thread():
    before = threading.active_count()
    with Prefetcher(lambda step: step, 0, 10**9) as batches:
        assert batches.next() == 0
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="prepares nothing outside of its `with` block"):
        batches.next()


def test_nothing_is_prepared_before_the_block():
    with pytest.raises(RuntimeError, match="prepares nothing outside of its `with` block"):
        Prefetcher(lambda step: step, 0, 3).next()


def test_thread_makes_the_batches_that_the_caller_would_make(tmp_path):
    source = documents(tmp_path, [12] * 30)
    ahead = BlockOrder(source, context_length=9, seed=3, packing="separate")
    here = BlockOrder(source, context_length=9, seed=3, packing="separate")
    with Prefetcher(lambda step: ahead.batch(4 * step, 4), 0, 30) as batches:
        for step in range(30):
            assert_same(batches.next(), here.batch(4 * step, 4))
