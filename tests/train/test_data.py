import numpy as np
import pytest

from cbtm.errors import DataError
from cbtm.tokens import DocumentRecord, TokenDocuments, TokenShardWriter
from cbtm.train.data import BlockOrder


def documents(folder, *shards):
    """Token stream of shards given as lists of document lengths; the tokens count on through all of them."""
    pairs, next_token = [], 0
    for number, lengths in enumerate(shards):
        with TokenShardWriter(folder, f"s{number}", vocab_size=60_000) as writer:
            for length in lengths:
                tokens = np.arange(next_token, next_token + length)
                writer.add(DocumentRecord(f"d{next_token}", 1), tokens)
                next_token += length
        pairs.append((folder, f"s{number}"))
    return TokenDocuments(pairs)


def first_tokens(order, first, count):
    return order.batch(first, count)[:, 0].tolist()


def test_block_is_a_slice_of_the_stream_across_documents_and_shards(tmp_path):
    # Token t is the number t, so that a block is what it starts with and the nine numbers behind it.
    order = BlockOrder(documents(tmp_path, [7, 5], [], [20, 3, 30]), context_length=9, seed=3)
    blocks = order.batch(0, 21)
    assert blocks.shape == (21, 10)
    assert blocks.dtype == np.int64
    for block in blocks:
        np.testing.assert_array_equal(block, np.arange(block[0], block[0] + 10))


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
    order = BlockOrder(documents(tmp_path, [64]), context_length=9, seed=3)
    blocks = order.batch(0, 7)
    assert sorted(blocks[:, :-1].ravel().tolist()) == list(range(63))
    assert sorted(blocks[:, 1:].ravel().tolist()) == list(range(1, 64))


def test_next_epoch_has_another_order_and_every_phase_comes_up(tmp_path):
    # 70 tokens: 69 = 7 * 9 + 6, phases 0 … 6.
    order = BlockOrder(documents(tmp_path, [70]), context_length=9, seed=3)
    epochs = [first_tokens(order, 7 * epoch, 7) for epoch in range(60)]
    assert epochs[0] != epochs[1]
    assert len({tuple(np.argsort(starts)) for starts in epochs}) > 50
    assert {min(starts) for starts in epochs} == set(range(7))


def test_any_block_can_be_had_without_those_before_it(tmp_path):
    source = documents(tmp_path, [100])
    straight = BlockOrder(source, context_length=9, seed=3).batch(0, 50)
    jumping = BlockOrder(source, context_length=9, seed=3)
    for index in np.random.default_rng(0).permutation(50).tolist():
        np.testing.assert_array_equal(jumping.batch(index, 1)[0], straight[index])
    for size in (1, 4, 7):
        again = BlockOrder(source, context_length=9, seed=3)
        batches = [again.batch(first, min(size, 50 - first)) for first in range(0, 50, size)]
        np.testing.assert_array_equal(np.concatenate(batches), straight)


def test_order_depends_on_the_seed_and_not_on_the_global_generator(tmp_path):
    source = documents(tmp_path, [1000])
    np.random.seed(0)
    one = first_tokens(BlockOrder(source, context_length=9, seed=3), 0, 100)
    np.random.seed(1)
    assert first_tokens(BlockOrder(source, context_length=9, seed=3), 0, 100) == one
    assert first_tokens(BlockOrder(source, context_length=9, seed=4), 0, 100) != one


def test_epochs_count_passes_over_the_stream(tmp_path):
    order = BlockOrder(documents(tmp_path, [65]), context_length=9, seed=3)
    assert order.epochs(7) == 1.0
    assert order.epochs(24) == pytest.approx(24 / 7)


def test_one_block_is_enough(tmp_path):
    order = BlockOrder(documents(tmp_path, [10]), context_length=9, seed=3)
    np.testing.assert_array_equal(order.batch(0, 2), [range(10), range(10)])


@pytest.mark.parametrize("lengths", [[], [4, 5]])
def test_less_text_than_a_block_is_refused(tmp_path, lengths):
    message = f"{len(lengths)} documents with {sum(lengths)} tokens are less than one block of context_length=9"
    with pytest.raises(DataError, match=message):
        BlockOrder(documents(tmp_path, lengths), context_length=9, seed=3)
