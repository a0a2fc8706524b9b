import json

import pytest

from cbtm.errors import ConfigError, DataError, StorageError
from cbtm.merge.tasks import TEMPLATES, Example, TaskConfig, TemplateConfig, read_task, task_digest


def write(folder, train, test):
    """The two files of a task, from (text, label) pairs; text lines are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in (("train", train), ("test", test)):
        lines = [one if isinstance(one, str) else json.dumps({"text": one[0], "label": one[1]}) for one in examples]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def pairs(*labels):
    return [(f"text {number}", label) for number, label in enumerate(labels)]


def task(folder, **changes):
    return TaskConfig.parse({"name": "toy", "path": str(folder), "template": "topic", "shots": 2, **changes})


# --- settings ---


def test_a_template_is_named_or_given():
    assert task("x", template="sentiment").template == TEMPLATES["sentiment"]
    own = task("x", template={"text": "Q: {text}", "question": "A:"}).template
    assert own == TemplateConfig(text="Q: {text}", question="A:")


def test_the_default_seeds_and_shots_are_those_of_the_reference():
    config = TaskConfig.parse({"name": "toy", "path": "x", "template": "topic"})
    assert (config.shots, config.seeds) == (8, (100, 13, 21, 42, 87))


def test_settings_survive_being_written_and_read():
    config = task("x", template="sentiment", words={"a": "good"})
    assert TaskConfig.parse(json.loads(config.model_dump_json())) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "sentimental"}, "'sentimental' is none of sentiment, topic; or give text and question"),
        ({"template": {"text": "Q: text", "question": "A:"}}, r"'Q: text' must have \{text\} once"),
        ({"template": {"text": "{text} {text}", "question": "A:"}}, r"must have \{text\} once"),
        ({"template": {"text": "{text}", "question": "{text}?"}}, r"must not have \{text\}"),
        ({"template": {"text": "{text}", "question": "A: "}}, "must neither begin nor end with white space"),
        ({"template": {"text": "{text}"}}, "'template.question' is missing"),
        ({"seeds": [1, 2, 1]}, r"seeds are \[1, 2, 1\], one of them twice"),
        ({"seeds": []}, "seeds"),
        ({"shots": 0, "seeds": [1, 2]}, "with shots=0 nothing is drawn and all 2 seeds are alike; give one seed"),
        ({"shots": -1}, "shots"),
        ({"max_examples": 3}, "max_examples: .*greater than or equal to 4"),
        ({"words": {"a": " "}}, "the word ' ' of 'a' is empty"),
        ({"words": {"a": " x"}}, "begins or ends with white space"),
        ({"name": "a/b"}, "name"),
        ({"name": "tasks.json"}, "name"),
        ({"shot": 3}, "did you mean 'shots'"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        task("x", **changes)


# --- files ---


def test_labels_are_sorted_and_shown_as_they_are(tmp_path):
    write(tmp_path, pairs("b", "A", "b"), pairs("b", "A", "b", "b"))
    found = read_task(task(tmp_path))
    assert found.labels == found.words == ("A", "b")
    assert found.train == (Example("text 0", "b"), Example("text 1", "A"), Example("text 2", "b"))
    assert sorted(example.text for example in found.test) == [f"text {number}" for number in range(4)]


def test_words_stand_for_labels_and_sentiment_is_lower_case(tmp_path):
    write(tmp_path, pairs("Pos", "Neg"), pairs(*["Pos"] * 4))
    assert read_task(task(tmp_path, template="sentiment")).words == ("neg", "pos")
    assert read_task(task(tmp_path, template="sentiment", words={"Pos": "Great"})).words == ("neg", "Great")


def test_labels_may_be_whole_numbers(tmp_path):
    lines = ['{"text": "x", "label": 0}', '{"text": "y", "label": 1}']
    write(tmp_path, lines, lines * 2)
    found = read_task(task(tmp_path, words={"0": "bad", "1": "good"}))
    assert (found.labels, found.words) == (("0", "1"), ("bad", "good"))


def test_max_examples_is_that_many_the_first_of_one_order(tmp_path):
    write(tmp_path, pairs("a", "b"), pairs(*["a"] * 10, *["b"] * 10))
    everything = read_task(task(tmp_path)).test
    assert len(everything) == 20
    assert [int(example.text.split()[1]) for example in everything] != list(range(20))  # the file is sorted by label
    for count in (4, 7, 20, 21):
        assert read_task(task(tmp_path, max_examples=count)).test == everything[:count]


def test_the_digest_follows_settings_and_content_but_not_the_place(tmp_path):
    first = write(tmp_path / "a", pairs("a", "b"), pairs(*"abab"))
    again = write(tmp_path / "b", pairs("a", "b"), pairs(*"abab"))
    other = write(tmp_path / "c", pairs("a", "b"), pairs(*"abba"))
    assert task_digest(task(first)) == task_digest(task(again))
    assert task_digest(task(first)) != task_digest(task(other))
    assert task_digest(task(first)) != task_digest(task(first, shots=1))


@pytest.mark.parametrize("missing", ["train.jsonl", "test.jsonl"])
@pytest.mark.parametrize("what", [read_task, task_digest])
def test_a_missing_file_is_named(tmp_path, missing, what):
    write(tmp_path, pairs("a", "b"), pairs(*"abab"))
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=rf"task toy: .*/{missing} is not there; path is to hold"):
        what(task(tmp_path))


@pytest.mark.parametrize(
    ("train", "test", "changes", "error", "message"),
    [
        ("aa", "aaaa", {}, DataError, r"task toy: train.jsonl has the labels \['a'\]; at least 2"),
        ("", "aaaa", {}, DataError, r"task toy: train.jsonl has the labels \[\]; at least 2"),
        ("ab", "abcb", {}, DataError, "task toy: test.jsonl has the label 'c', which train.jsonl has not; it has a, b"),
        ("ab", "aba", {}, DataError, "task toy: test.jsonl has 3 examples; at least 4 are needed"),
        ("ab", "abab", {"shots": 3}, ConfigError, "task toy: shots=3 but train.jsonl has 2 examples"),
        ("ab", "abab", {"words": {"c": "x"}}, ConfigError, "words has 'c', which is no label .*; those are a, b"),
        ("ab", "abab", {"words": {"a": "b"}}, ConfigError, "labels 'a' and 'b' are both shown as 'b'"),
    ],
)
def test_files_that_make_no_task_are_refused(tmp_path, train, test, changes, error, message):
    write(tmp_path, pairs(*train), pairs(*test))
    with pytest.raises(error, match=message):
        read_task(task(tmp_path, **changes))


@pytest.mark.parametrize(
    "line",
    ["", "no json", "[1]", '{"text": "x"}', '{"text": 1, "label": "a"}', '{"text": " ", "label": "a"}',
     '{"text": "x", "label": ""}', '{"text": "x", "label": true}'],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(tmp_path, line):
    write(tmp_path, pairs("a", "b"), [*pairs(*"abab"), line])
    with pytest.raises(DataError, match=r"test\.jsonl, line 5: not an example; expected"):
        read_task(task(tmp_path))


def test_a_folder_in_place_of_a_file_is_not_there(tmp_path):
    write(tmp_path, pairs("a", "b"), pairs(*"abab"))
    (tmp_path / "test.jsonl").unlink()
    (tmp_path / "test.jsonl").mkdir()
    with pytest.raises((ConfigError, StorageError), match=r"test\.jsonl is not there"):
        read_task(task(tmp_path))
