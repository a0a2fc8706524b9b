"""What a generation has read: each sequence's text, route, and keys and values of each expert.

It lies outside of the model, so that two generations of one model do not disturb each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cbtm.merge.streaming import StreamingRouter


@dataclass
class Fed:
    """How far one expert has read one sequence, and its keys and values for that."""

    n_tokens: int = 0
    past: Any = None


@dataclass
class MixedSequence:
    """One sequence of a batch.

    Attributes:
        text: Gives the text that a token completes.
        router: Has read that text.
        fed: For each expert what it has read.
        first: Tokens of the prompt; from there on distances are kept for `refresh` tokens. None: what is read next is a
            prompt.
        tokens: All tokens, those that an expert has not read yet included.
        distances: To the centres, at the last context that weights were taken from; float32 (k,).
    """

    text: Callable[[int], str]
    router: StreamingRouter
    fed: list[Fed]
    first: int | None = None
    tokens: list[int] = field(default_factory=list)
    distances: NDArray[np.float32] | None = None

    def read(self, tokens: Sequence[int], n_kept: int, refresh: int | Literal["once"]) -> NDArray[np.float32]:
        """Read the text of tokens.

        Args:
            tokens: At least one.
            n_kept: At how many of them, the last ones, distances are wanted.
            refresh: Tokens behind the prompt that keep their distances.

        Returns:
            Distances that the weights of what follows each of those tokens come from, shape (n_kept, k).
        """
        if self.first is None:
            self.first = len(self.tokens) + len(tokens)
        kept = []
        for left, token in zip(reversed(range(len(tokens))), tokens, strict=True):
            self.tokens.append(token)
            if text := self.text(token):
                self.router.push(text)
            generated = len(self.tokens) - self.first
            is_fresh = generated <= 0 or (refresh != "once" and generated % refresh == 0)
            if self.distances is None or (is_fresh and (generated >= 0 or left < n_kept)):
                self.distances = self.router.distances()
            if left < n_kept:
                kept.append(self.distances)
        return np.stack(kept)


class MixtureCache:
    """All that a generation has read so far, for each sequence of its batch.

    `generate` makes one of its own; one that is passed to it as `past_key_values` goes on with the same sequences.
    """

    # transformers asks for these three of every cache.
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read of each sequence, padding included."""
        return self.n_columns

    def __init__(self) -> None:
        self.sequences: list[MixedSequence] = []
        self.n_columns = 0

    def start_prompt(self) -> None:
        """Take what is read next as a prompt, at the end of which weights are fresh."""
        for sequence in self.sequences:
            sequence.first = None

    @property
    def tokens_fed(self) -> list[list[int]]:
        """For each sequence the tokens that each expert has read."""
        return [[fed.n_tokens for fed in sequence.fed] for sequence in self.sequences]
