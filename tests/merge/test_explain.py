import pytest

from cbtm.merge.explain import Explanation, format_explanation


def token(text, responsibilities, number=5):
    return Explanation(number, text, -1.0, dict.fromkeys(responsibilities, 0.5), responsibilities)


TOKENS = [
    token("The", {3: 0.75, 14: 0.25}),
    token(" cat\n", {3: 0.5, 14: 0.5}),
    token("", {3: 1.0}),
    token("sat", {14: 0.875, 3: 0.125}),
]


def test_the_expert_of_the_largest_share_carries_a_token_and_of_equal_ones_the_lowest():
    assert [one.cluster for one in TOKENS] == [3, 3, 3, 14]
    assert token("x", {9: 0.5, 2: 0.5}).cluster == 2


def test_plain_text_names_the_expert_in_front_of_what_it_carried():
    # Shares of expert 3: (0.75 + 0.5 + 1 + 0.125) / 4 = 59 %.
    assert format_explanation(TOKENS, colour=False, top_terms={3: ["dog", "cat"]}) == (
        "[3]The cat\n[14]sat\n\nexpert 3 carried 59%: dog, cat\nexpert 14 carried 41%"
    )


def test_colours_end_with_each_line_and_differ_between_experts():
    lines = format_explanation(TOKENS, colour=True).split("\n")
    # Colours 3 and 14 % 12 = 2 of the list.
    assert lines[0] == "\x1b[38;5;133mThe cat\x1b[0m"
    assert lines[1] == "\x1b[38;5;34msat\x1b[0m"
    assert lines[2:] == ["", "\x1b[38;5;133mexpert 3\x1b[0m carried 59%", "\x1b[38;5;34mexpert 14\x1b[0m carried 41%"]


@pytest.mark.parametrize("colour", [False, True])
def test_control_characters_of_a_text_do_not_reach_the_terminal(colour):
    shown = format_explanation([token("a\x1b[2J\tb\r\x07\x9b", {0: 1.0})], colour=colour)
    assert "a\\x1b[2J\tb\\x0d\\x07\\x9b" in shown


def test_nothing_generated_has_neither_text_nor_legend():
    assert format_explanation([], colour=False).strip() == ""
