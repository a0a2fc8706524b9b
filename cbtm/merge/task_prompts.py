"""The prompts of few-shot tasks: solved examples (shots), then one example and a question.

The shots of a seed are the same for all test examples, so that they are read by a model once. A prompt is put together
from pieces that are tokenised apart, at places where byte-level BPE has a boundary anyway: before a line end and before
the space of a word. So every test example continues exactly the same prefix. Where a prompt is too long, all texts of
its seed are cut from their end to one number of tokens, and the cut ones are counted.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import ConfigError
from cbtm.merge.tasks import PLACEHOLDER, TaskConfig, TaskExamples

if TYPE_CHECKING:
    from cbtm.branch.tokenizer import TextTokenizer

SEPARATION = "\n\n"
"""What stands between two examples of a prompt."""
_SHORTEST = 8  # tokens of a text below which cutting leaves nothing to classify

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class SeedPrompts:
    """The prompts of one seed.

    Attributes:
        seed: The seed of its shots.
        prefix: Separator and shots, int64 of shape (p,).
        suffixes: What follows for each test example, up to its answer, int64 of shape (s,) each.
        prefix_text: The text of the shots.
        suffix_texts: The text of what follows.
    """

    seed: int
    prefix: Tokens
    suffixes: tuple[Tokens, ...]
    prefix_text: str
    suffix_texts: tuple[str, ...]


@dataclass(frozen=True)
class TaskPrompts:
    """All prompts of a task.

    Attributes:
        name: The task.
        shots: Solved examples in a prompt.
        labels: The labels.
        answers: Tokens of each label's answer, int64 of shape (a,) each, at least one.
        gold: Place in `labels` of each test example's label, int64 of shape (n_examples,).
        seeds: The prompts of each seed.
        neutral: The separator and the question alone, int64 of shape (q,): what the probability of an answer without
            any text is taken behind (Holtzman et al. 2021, "Surface form competition", the domain premise).
        cut: Texts, of shots and test examples, that lost their end in some prompt.
    """

    name: str
    shots: int
    labels: tuple[str, ...]
    answers: tuple[Tokens, ...]
    gold: NDArray[np.int64]
    seeds: tuple[SeedPrompts, ...]
    neutral: Tokens
    cut: int

    @property
    def answer_offsets(self) -> NDArray[np.int64]:
        """Where each label's tokens begin among those of all answers, and the end; shape (n_labels + 1,)."""
        return np.cumsum([0, *map(len, self.answers)], dtype=np.int64)

    @property
    def routing_texts(self) -> list[str]:
        """Text of every prompt up to its answer: of the first seed for every test example, then of the next seed."""
        return [one.prefix_text + suffix for one in self.seeds for suffix in one.suffix_texts]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest answer."""
        suffixes = [len(one.prefix) + len(suffix) for one in self.seeds for suffix in one.suffixes]
        return max(*suffixes, len(self.neutral)) + max(map(len, self.answers))

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of all tokens, which scores name so that they are not taken for those of other prompts."""
        rows = [self.neutral, *self.answers]
        for one in self.seeds:
            rows += [one.prefix, *one.suffixes]
        lengths = np.array([len(row) for row in rows], dtype="<i8")
        return hashlib.sha256(lengths.tobytes() + np.concatenate(rows).astype("<i8").tobytes()).hexdigest()


def draw_shots(labels: Sequence[str], shots: int, seed: int) -> list[int]:
    """Draw solved examples, of each label as many as of any other as far as there are enough, in random order.

    Args:
        labels: Label of each training example.
        shots: Examples to draw, at most as many as there are.
        seed: Seed of the draw.

    Returns:
        Places of the drawn examples, each once.
    """
    rng = np.random.default_rng(seed)
    known = np.array(labels)
    piles = [rng.permutation(np.flatnonzero(known == label)).tolist() for label in sorted(set(labels))]
    # Which labels get one more, where they cannot all have the same, is drawn as well.
    piles = [piles[place] for place in rng.permutation(len(piles))]
    dealt = [pile[turn] for turn in range(max(map(len, piles))) for pile in piles if turn < len(pile)]
    return [int(place) for place in rng.permutation(dealt[:shots])]


def build_prompts(
    config: TaskConfig, examples: TaskExamples, tokenizer: "TextTokenizer", *, max_tokens: int
) -> TaskPrompts:
    """Make the prompts of all seeds.

    Args:
        config: The task.
        examples: From `read_task`.
        tokenizer: The tokenizer of the models that are asked.
        max_tokens: Most tokens of a prompt with its answer: the context length, less one where a model is given a
            cluster token in front.

    Raises:
        ConfigError: If prompts do not fit with texts of eight tokens each, or a word has no tokens.
    """
    writer = _Writer(config, examples, tokenizer)
    draws = [draw_shots([one.label for one in examples.train], config.shots, seed) for seed in config.seeds]
    budgets = [writer.budget(drawn, max_tokens) for drawn in draws]
    cut_train = {place for drawn, budget in zip(draws, budgets, strict=True) for place in drawn
                 if len(writer.train[place]) > budget}  # fmt: skip
    cut_test = sum(len(text) > min(budgets) for text in writer.test)
    return TaskPrompts(
        name=config.name,
        shots=config.shots,
        labels=examples.labels,
        answers=writer.answers,
        gold=np.array([examples.labels.index(example.label) for example in examples.test], dtype=np.int64),
        seeds=tuple(writer.prompts(*one) for one in zip(config.seeds, draws, budgets, strict=True)),
        neutral=np.concatenate([writer.separator, writer.tokens(config.template.question)]),
        cut=len(cut_train) + cut_test,
    )


@dataclass(frozen=True)
class _Text:
    """A text with the space before it, its tokens, and the character at which each begins."""

    text: str
    tokens: Tokens
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, budget: int) -> tuple[str, Tokens]:
        """The text and its tokens up to at most `budget` of them, and to whole characters."""
        if len(self) <= budget:
            return self.text, self.tokens
        end = int(self.starts[budget])
        return self.text[:end], self.tokens[: np.searchsorted(self.starts, end)]


class _Writer:
    """Puts prompts together from pieces that are tokenised once."""

    def __init__(self, config: TaskConfig, examples: TaskExamples, tokenizer: "TextTokenizer") -> None:
        self._config, self._examples, self._tokenizer = config, examples, tokenizer
        self.separator = np.array([tokenizer.separator_id], dtype=np.int64)
        before, _, after = config.template.text.partition(PLACEHOLDER)
        # Byte-level BPE takes a space with the word after it.
        self._opening = before.rstrip(" ")
        self._gap = before[len(self._opening) :]
        self._closing = f"{after}\n{config.template.question}"
        self.answers = tuple(self.tokens(f" {word}") for word in examples.words)
        if empty := [word for word, answer in zip(examples.words, self.answers, strict=True) if not len(answer)]:
            raise ConfigError(f"task {config.name}: the tokenizer makes no token of the word {empty[0]!r}")
        self.train = [self._text(example.text) for example in examples.train]
        self.test = [self._text(example.text) for example in examples.test]
        self._pieces = {text: self.tokens(text) for text in (self._opening, self._closing, self._lead(1))}

    def tokens(self, text: str) -> Tokens:
        """Tokens of a piece, without the separator."""
        return self._tokenizer.encode_with_starts(text)[0][1:]

    def budget(self, drawn: Sequence[int], max_tokens: int) -> int:
        """The most tokens that each text of these shots and of all test examples may have.

        Raises:
            ConfigError: If that is too few to leave anything of a text.
        """
        shots = np.array([len(self.train[place]) for place in drawn], dtype=np.int64)
        example = max(map(len, self.test))
        fixed = 1 + sum(len(self.answers[self._label(place)]) for place in drawn) + max(map(len, self.answers))
        for place in range(len(drawn) + 1):
            fixed += len(self._pieces[self._lead(place)]) + len(self._pieces[self._closing])

        def total(budget: int) -> int:
            return int(fixed + np.minimum(shots, budget).sum() + min(example, budget))

        longest = max(int(shots.max(initial=0)), example)
        found = bisect_right(range(longest + 1), max_tokens, key=total) - 1
        if found < min(_SHORTEST, longest):
            raise ConfigError(
                f"task {self._config.name}: {len(drawn)} shots and a test example take {total(_SHORTEST)} tokens even "
                f"with texts of {_SHORTEST} tokens each, and a context has room for {max_tokens}; use fewer shots or a "
                "longer context"
            )
        return found

    def prompts(self, seed: int, drawn: Sequence[int], budget: int) -> SeedPrompts:
        """The prompts of one seed, of texts of at most `budget` tokens."""
        blocks = [
            self._block(self.train[place], number, budget, self._label(place)) for number, place in enumerate(drawn)
        ]
        asked = [self._block(text, len(drawn), budget) for text in self.test]
        return SeedPrompts(
            seed=seed,
            prefix=np.concatenate([self.separator, *(tokens for _, tokens in blocks)]),
            suffixes=tuple(tokens for _, tokens in asked),
            prefix_text="".join(text for text, _ in blocks),
            suffix_texts=tuple(text for text, _ in asked),
        )

    def _block(self, text: _Text, number: int, budget: int, label: int | None = None) -> tuple[str, Tokens]:
        """An example at place `number` of a prompt, with the word of its label if that is given away."""
        lead, (kept, tokens) = self._lead(number), text.cut(budget)
        answer = "" if label is None else f" {self._examples.words[label]}"
        parts = [self._pieces[lead], tokens, self._pieces[self._closing]]
        parts += [] if label is None else [self.answers[label]]
        return f"{lead}{kept}{self._closing}{answer}", np.concatenate(parts)

    def _lead(self, number: int) -> str:
        return (SEPARATION if number else "") + self._opening

    def _label(self, place: int) -> int:
        return self._examples.labels.index(self._examples.train[place].label)

    def _text(self, text: str) -> _Text:
        spaced = self._gap + text.strip()
        tokens, starts = self._tokenizer.encode_with_starts(spaced)
        return _Text(spaced, tokens[1:], starts[1:])
