from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError
from cbtm.merge.task_prompts import build_prompts, draw_shots
from cbtm.merge.tasks import Example, TaskConfig, TaskExamples

WORDS = ["bad", "good"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(["Review: a good film, a bad film. Sentiment: good", "naïve café 東京"] * 5, 300)


def config(**changes):
    return TaskConfig.parse({"name": "toy", "path": "x", "template": "sentiment", "shots": 2, "seeds": [1], **changes})


def examples(train, test):
    """Training texts, which are bad and good by turns, and test texts."""
    labelled = [tuple(Example(text, WORDS[n % 2]) for n, text in enumerate(texts)) for texts in (train, test)]
    return TaskExamples(tuple(WORDS), tuple(WORDS), *labelled)


def build(tokenizer, train, test, *, max_tokens=10_000, **changes):
    return build_prompts(config(**changes), examples(train, test), tokenizer, max_tokens=max_tokens)


def decoded(tokenizer, tokens):
    return tokenizer._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


# --- drawing ---


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), seed=st.integers(0, 1000), data=st.data())
def test_shots_are_balanced_as_far_as_there_are_enough(sizes, seed, data):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    shots = data.draw(st.integers(0, len(labels)))
    drawn = draw_shots([str(label) for label in labels], shots, seed)
    assert len(drawn) == len(set(drawn)) == shots
    counts = Counter(labels[place] for place in drawn)
    for label, size in enumerate(sizes):
        # Who is two behind another has nothing left.
        assert counts[label] == size or counts[label] >= max(counts.values(), default=0) - 1


def test_eight_shots_of_four_labels_are_two_each():
    labels = ["a"] * 30 + ["b"] * 9 + ["c"] * 2 + ["d"] * 12
    assert Counter(labels[place] for place in draw_shots(labels, 8, seed=13)) == dict.fromkeys("abcd", 2)


def test_shots_depend_on_the_seed_alone_and_come_in_random_order():
    labels = ["a", "b"] * 16
    draws = {seed: draw_shots(labels, 8, seed) for seed in (100, 13, 21, 42, 87)}
    assert draws == {seed: draw_shots(labels, 8, seed) for seed in draws}
    assert len({tuple(drawn) for drawn in draws.values()}) == 5
    assert len({tuple(labels[place] for place in drawn) for drawn in draws.values()}) > 1


# --- text and tokens ---


def test_a_prompt_by_hand(tokenizer):
    prompts = build(tokenizer, ["a film", "one more"], ["  what a film\n", "a", "b", "c"])
    (one,) = prompts.seeds
    shots = {"bad": "Review: a film\nSentiment: bad", "good": "Review: one more\nSentiment: good"}
    assert one.prefix_text in ("\n\n".join(shots.values()), "\n\n".join(reversed(shots.values())))
    assert one.suffix_texts[0] == "\n\nReview: what a film\nSentiment:"
    assert prompts.routing_texts[0] == one.prefix_text + one.suffix_texts[0]
    assert decoded(tokenizer, one.prefix) == tokenizer.separator + one.prefix_text
    assert decoded(tokenizer, one.suffixes[0]) == one.suffix_texts[0]
    assert [decoded(tokenizer, answer) for answer in prompts.answers] == [" bad", " good"]
    assert decoded(tokenizer, prompts.neutral) == tokenizer.separator + "Sentiment:"
    assert prompts.gold.tolist() == [0, 1, 0, 1]
    assert prompts.cut == 0


def test_pieces_have_the_tokens_of_the_whole(tokenizer):
    prompts = build(tokenizer, ["a film.", "naïve 東京!"], ["what? a film", "a", "b", "café..."], seeds=[1, 2])
    for one in prompts.seeds:
        for text, suffix in zip(one.suffix_texts, one.suffixes, strict=True):
            for word, answer in zip(WORDS, prompts.answers, strict=True):
                whole = tokenizer.encode_with_starts(f"{one.prefix_text}{text} {word}")[0]
                np.testing.assert_array_equal(np.concatenate([one.prefix, suffix, answer]), whole)


def test_without_shots_the_prompt_is_the_example(tokenizer):
    (one,) = build(tokenizer, ["a", "b"], ["x", "y", "z", "w"], shots=0).seeds
    assert one.prefix.tolist() == [tokenizer.separator_id]
    assert one.suffix_texts[0] == "Review: x\nSentiment:"


def test_texts_with_braces_and_a_template_with_an_end(tokenizer):
    own = {"text": '"{text}"!', "question": "So {it} is"}
    (one,) = build(tokenizer, ["a", "b"], ["{x}", "{text}", "z", "w"], template=own).seeds
    assert one.suffix_texts[:2] == ('\n\n"{x}"!\nSo {it} is', '\n\n"{text}"!\nSo {it} is')


def test_routing_texts_are_those_of_the_first_seed_first(tokenizer):
    prompts = build(tokenizer, [f"t{n}" for n in range(6)], ["x", "y", "z", "w"], seeds=[5, 6])
    assert len(prompts.routing_texts) == 8
    assert prompts.routing_texts[5] == prompts.seeds[1].prefix_text + prompts.seeds[1].suffix_texts[1]


def test_the_digest_is_of_the_tokens(tokenizer):
    train, test = ["a", "b"], ["x", "y", "z", "w"]
    assert build(tokenizer, train, test).digest == build(tokenizer, train, test).digest
    assert build(tokenizer, train, test).digest != build(tokenizer, train, [*test[:3], "v"]).digest


# --- cutting ---


def test_long_texts_are_cut_to_one_number_of_tokens_and_counted(tokenizer):
    long, short = "x y z " * 40, "x y"
    train, test = [long, short], [short, long, long, short]
    whole = build(tokenizer, train, test)
    assert whole.cut == 0
    for room in (whole.longest - 1, whole.longest - 100, whole.longest - 200):
        prompts = build(tokenizer, train, test, max_tokens=room)
        (one,) = prompts.seeds
        # One shot and two test examples. A prompt has two long texts, so that one token may be left over.
        assert prompts.cut == 3
        assert room - 2 < prompts.longest <= room
        kept = [text.count("x") + text.count("y") + text.count("z") for text in one.suffix_texts]
        assert kept[1] == kept[2] < 120
        assert kept[0] == kept[3] == 2
        assert one.prefix_text.count("z") == one.suffix_texts[1].count("z")
        assert decoded(tokenizer, one.suffixes[1]) == one.suffix_texts[1]


def test_a_text_is_cut_once_however_many_seeds_do_it(tokenizer):
    long = "x y z " * 40
    prompts = build(tokenizer, [long] * 6, [long] * 4, seeds=[1, 2, 3], max_tokens=200, shots=6)
    assert prompts.cut == 10


def test_cutting_keeps_characters_whole(tokenizer):
    text = "🎉" * 30  # 4 tokens each, one for each byte
    for room in range(160, 168):
        prompts = build(tokenizer, ["a", "b"], [text] * 4, max_tokens=room)
        assert "\ufffd" not in decoded(tokenizer, prompts.seeds[0].suffixes[0])
        assert prompts.longest <= room


def test_a_context_that_leaves_nothing_of_texts_is_refused(tokenizer):
    long = " ".join("xyz" * 40)
    n_tokens = len(tokenizer.encode_with_starts(f" {long}")[0]) - 1
    whole = build(tokenizer, [long, long], [long] * 4).longest
    smallest = whole - 3 * (n_tokens - 8)  # three texts of 8 tokens
    assert build(tokenizer, [long, long], [long] * 4, max_tokens=smallest).longest == smallest
    with pytest.raises(
        ConfigError,
        match=rf"task toy: 2 shots and a test example take {smallest} tokens even with texts of 8 tokens each, and a "
        rf"context has room for {smallest - 1}; use fewer shots or a longer context",
    ):
        build(tokenizer, [long, long], [long] * 4, max_tokens=smallest - 1)


def test_short_texts_need_no_eight_tokens(tokenizer):
    whole = build(tokenizer, ["a", "b"], ["c"] * 4)
    assert build(tokenizer, ["a", "b"], ["c"] * 4, max_tokens=whole.longest).cut == 0
    with pytest.raises(ConfigError, match="use fewer shots or a longer context"):
        build(tokenizer, ["a", "b"], ["c"] * 4, max_tokens=whole.longest - 1)
