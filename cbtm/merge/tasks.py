"""Few-shot classification: a task is two files of labelled texts, and a prompt is some of them and a question.

A model answers by giving a probability to the word of each label behind a prompt of solved examples (shots), as in
the downstream tasks of c-BTM (Gururangan et al. 2023, arXiv 2303.14177). Here are the settings of a task and its files,
read and checked without a model; prompts are made of them by `task_prompts`, scored by `task_scorer`, and compared by
`task_evaluator`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import Field, field_validator, model_validator

from cbtm import storage
from cbtm.config import Config, digest_of
from cbtm.corpus import read_lines
from cbtm.errors import ConfigError, DataError

TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"
PLACEHOLDER = "{text}"
_MIN_EXAMPLES = 4  # two to choose the settings of an ensemble on, two to report on
_ORDER = 0  # seed of the order of the test examples; not a setting, so that all runs take the same ones


class TemplateConfig(Config):
    """How an example is shown: its text, a line end, the question, a space, and the word of its label.

    Attributes:
        text: What stands around the text, whose place is {text}.
        question: What the word of the label follows.
        lower_case: Whether a label that is given no word of its own is shown in lower case.
    """

    text: str
    question: str = Field(min_length=1)
    lower_case: bool = False

    @field_validator("text")
    @classmethod
    def _has_a_place(cls, text: str) -> str:
        if text.count(PLACEHOLDER) != 1:
            raise ValueError(f"{text!r} must have {PLACEHOLDER} once, where the text of an example goes")
        return text

    @field_validator("question")
    @classmethod
    def _ends_in_no_space(cls, question: str) -> str:
        if PLACEHOLDER in question:
            raise ValueError(f"{question!r} must not have {PLACEHOLDER}: it is also asked without a text")
        if question != question.strip():
            raise ValueError(f"{question!r} must neither begin nor end with white space: words bring their own")
        return question


TEMPLATES = {
    "sentiment": TemplateConfig(text="Review: {text}", question="Sentiment:", lower_case=True),
    "topic": TemplateConfig(text="Article: {text}", question="Topic:"),
}


class TaskConfig(Config):
    """One classification task.

    Attributes:
        name: What the task is called in results and file names.
        path: Folder or s3:// prefix with train.jsonl, which shots are drawn from, and test.jsonl; one
            {"text": str, "label": str} a line.
        template: sentiment, topic, or `text` and `question` of one's own.
        words: Word that stands for a label in prompts; for a label that is not there it is the label itself.
        shots: Solved examples in a prompt.
        seeds: Seeds of drawing the shots, each a prompt of its own for every test example; the accuracy is the mean
            over them. The default is the reference's.
        max_examples: Test examples that are asked, the first so many in a fixed random order; None is all.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    path: str = Field(min_length=1)
    template: TemplateConfig
    words: dict[str, str] | None = None
    shots: int = Field(default=8, ge=0)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (100, 13, 21, 42, 87)
    max_examples: int | None = Field(default=None, ge=_MIN_EXAMPLES)

    @field_validator("template", mode="before")
    @classmethod
    def _named_template(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in TEMPLATES:
                raise ValueError(f"{value!r} is none of {', '.join(TEMPLATES)}; or give text and question of your own")
            return TEMPLATES[value]
        return value

    @field_validator("words")
    @classmethod
    def _words_are_words(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        for label, word in (words or {}).items():
            if not word.strip() or word != word.strip():
                raise ValueError(f"the word {word!r} of {label!r} is empty, or begins or ends with white space")
        return words

    @model_validator(mode="after")
    def _seeds_differ(self) -> "TaskConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}, one of them twice")
        if not self.shots and len(self.seeds) > 1:
            raise ValueError(f"with shots=0 nothing is drawn and all {len(self.seeds)} seeds are alike; give one seed")
        return self


@dataclass(frozen=True)
class Example:
    """A text and its label."""

    text: str
    label: str


@dataclass(frozen=True)
class TaskExamples:
    """What a task's files hold.

    Attributes:
        labels: Labels of the training examples, sorted.
        words: The word of each label.
        train: Training examples, in the order of the file.
        test: Test examples that are asked, in a fixed random order: files are often sorted by label.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def task_digest(config: TaskConfig) -> str:
    """Identity of a task: its settings, and the content of its files wherever they lie.

    Raises:
        ConfigError: If a file is not there.
        StorageError: If a file cannot be read.
    """
    files = [storage.sha256(_file(config, name)) for name in (TRAIN_FILE, TEST_FILE)]
    return digest_of([config.model_dump(mode="json", exclude={"path"}), files])


def read_task(config: TaskConfig) -> TaskExamples:
    """Read and check the files of a task.

    Raises:
        ConfigError: If a file is not there, there are fewer training examples than shots, `words` names a label that
            is not there, or two labels have one word.
        DataError: If a line is no example, there is only one label, a test example has a label that no training
            example has, or there are fewer than four test examples.
        StorageError: If a file cannot be read.
    """
    train, test = (_read(_file(config, name)) for name in (TRAIN_FILE, TEST_FILE))
    labels = tuple(sorted({example.label for example in train}))
    if len(labels) < 2:
        raise DataError(f"task {config.name}: {TRAIN_FILE} has the labels {list(labels)}; at least 2 are needed")
    for example in test:
        if example.label not in labels:
            raise DataError(
                f"task {config.name}: {TEST_FILE} has the label {example.label!r}, which {TRAIN_FILE} has not; it has "
                f"{', '.join(labels)}"
            )
    if len(train) < config.shots:
        raise ConfigError(
            f"task {config.name}: shots={config.shots} but {TRAIN_FILE} has {len(train)} examples; use at most so many"
        )
    if len(test) < _MIN_EXAMPLES:
        raise DataError(
            f"task {config.name}: {TEST_FILE} has {len(test)} examples; at least {_MIN_EXAMPLES} are needed, half of "
            "them to choose the settings of ensembles and half to report on"
        )
    order = np.random.default_rng(_ORDER).permutation(len(test))[: config.max_examples].tolist()
    return TaskExamples(labels, _words(config, labels), tuple(train), tuple(test[place] for place in order))


def _words(config: TaskConfig, labels: Sequence[str]) -> tuple[str, ...]:
    given = config.words or {}
    if unknown := sorted(set(given) - set(labels)):
        raise ConfigError(
            f"task {config.name}: words has {unknown[0]!r}, which is no label of {TRAIN_FILE}; those are "
            f"{', '.join(labels)}"
        )
    lower = config.template.lower_case
    words = [given.get(label, label.lower() if lower else label).strip() for label in labels]
    for place, word in enumerate(words):
        if word in words[:place]:
            raise ConfigError(
                f"task {config.name}: the labels {labels[words.index(word)]!r} and {labels[place]!r} are both shown as "
                f"{word!r}; give them different words"
            )
    return tuple(words)


def _file(config: TaskConfig, name: str) -> str:
    uri = storage.join(config.path, name)
    if not storage.exists(uri):
        raise ConfigError(f"task {config.name}: {uri} is not there; path is to hold {TRAIN_FILE} and {TEST_FILE}")
    return uri


def _read(uri: str) -> list[Example]:
    return [_example(line, f"{uri}, line {number}") for number, line in enumerate(read_lines(uri), start=1)]


def _example(line: bytes, where: str) -> Example:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = None
    text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    if not (isinstance(text, str) and isinstance(label, str) and text.strip() and label.strip()):
        raise DataError(f'{where}: not an example; expected {{"text": "…", "label": "…"}} with neither of them empty')
    return Example(text, label)
