"""Route a text that is still being written, without reading any of it again.

The embedding of a text is a running sum over its words, so all that must be kept is the sum of the words that are
over and the word in which the text ends. Lower case is the one thing that can change behind the end: a capital sigma
(U+03A3) is final until a cased letter follows, with any number of case-ignorable characters between, words of them
included (Unicode, Final_Sigma; the only lower case in `str.lower` that depends on the context). A sigma is a cased
letter itself, so at most one is open at a time, and there are two ways to read the text: as it stands, and as it will
have been if a cased letter comes next. Both are kept until one of them is wrong, which costs twice the work and no
second look, however far away the letter is.

`cbtm.merge.router` has the same for texts that are all there, and takes from here what it knows about sigmas.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIGMA, MEDIAL, FINAL = "\u03a3", "\u03c3", "\u03c2"
_RUN = re.compile(r"\w+")


class StreamingRouter:
    """Distances from a growing text to the cluster centres; made by `PrefixRouter.stream`.

    After any pushes `distances` equals `PrefixRouter.distances` at the end of the text so far: both add the same
    vectors in the same order. Time of `push` is O(len(text) + words * d): what was pushed before is not read again. Of
    a word that is not over, one character more than the longest word of the vocabulary is kept, which bounds what a
    push can copy and `distances` look up, and the memory, O(d + longest word): one endless word costs no more.

    Characters are the unit: where a token is a piece of a character, push the character once it is complete, as
    `PrefixRouter` does not see it before either.

    Args:
        vocabulary: Row of each word in `word_vectors`.
        word_vectors: Vector of each word, shape (V, d).
        longest_word: Characters of the longest word in `vocabulary`.
        distances_of: Distances, float32 of shape (t, k), of sums of word vectors, float64 of shape (t, d).
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        word_vectors: NDArray[np.floating[Any]],
        *,
        longest_word: int,
        distances_of: Callable[[NDArray[np.float64]], NDArray[np.float32]],
    ) -> None:
        self._distances_of = distances_of
        self._reading = _Reading(vocabulary, word_vectors, longest_word)
        # The text with its last sigma read as medial; None where no letter to come can make it so.
        self._if_letter_follows: _Reading | None = None
        self._is_after_cased = False  # case-ignorable characters skipped

    def push(self, text: str) -> None:
        """Append `text`, of any length; the cuts between pushes make no difference."""
        first, *others = text.split(SIGMA)
        self._read(first)
        for piece in others:
            self._read_sigma()
            self._read(piece)

    def distances(self) -> NDArray[np.float32]:
        """Euclidean (not squared) distance of the text so far to every centre, shape (k,)."""
        distances: NDArray[np.float32] = self._distances_of(self._reading.total()[np.newaxis])[0]
        return distances

    def copy(self) -> StreamingRouter:
        """A stream that has read the same text and goes its own way, for beams and samples; O(1)."""
        other = copy.copy(self)
        other._reading = copy.copy(self._reading)
        other._if_letter_follows = copy.copy(self._if_letter_follows)
        return other

    def _read(self, text: str) -> None:
        """Read text without a sigma."""
        if self._if_letter_follows is not None:
            n_ignorable = next((place for place, char in enumerate(text) if not is_case_ignorable(char)), len(text))
            ignorable, text = text[:n_ignorable].lower(), text[n_ignorable:]
            self._reading.add(ignorable)
            self._if_letter_follows.add(ignorable)
            if text:
                self._settle(is_medial=is_cased(text[0]))
        if text:
            self._reading.add(text.lower())
            last = next((char for char in reversed(text) if not is_case_ignorable(char)), None)
            if last is not None:
                self._is_after_cased = is_cased(last)

    def _read_sigma(self) -> None:
        self._settle(is_medial=True)  # a sigma is a letter that follows the one before
        if self._is_after_cased:
            self._if_letter_follows = copy.copy(self._reading)
            self._if_letter_follows.add(MEDIAL)
            self._reading.add(FINAL)
        else:
            self._reading.add(MEDIAL)
        self._is_after_cased = True

    def _settle(self, *, is_medial: bool) -> None:
        if is_medial and self._if_letter_follows is not None:
            self._reading = self._if_letter_follows
        self._if_letter_follows = None


class _Reading:
    """Sum of the words of a lower-cased text, and the word in which it ends."""

    def __init__(self, vocabulary: Mapping[str, int], word_vectors: NDArray[np.floating[Any]], longest: int) -> None:
        self._vocabulary = vocabulary
        self._word_vectors = word_vectors
        self._longest = longest
        self._sum = np.zeros(word_vectors.shape[1])  # never changed in place: copies share it
        self._word = ""  # what is kept of the word that may go on; one character is no word yet

    def add(self, lowered: str) -> None:
        for run in _RUN.finditer(lowered):
            begin, end = run.span()
            if begin:
                self._end_word()
            # A word that is too long stays so: the rest need not be kept.
            room = self._longest + 1 - len(self._word)
            if room > 0:
                self._word += lowered[begin : min(end, begin + room)]
            if end == len(lowered):
                return
        if lowered:
            self._end_word()

    def total(self) -> NDArray[np.float64]:
        """Sum of the vectors of all words, the last one included, float64 of shape (d,); not to be changed."""
        row = self._vocabulary.get(self._word) if 2 <= len(self._word) <= self._longest else None
        if row is None:
            return self._sum
        total: NDArray[np.float64] = self._sum + self._word_vectors[row]
        return total

    def _end_word(self) -> None:
        self._sum = self.total()
        self._word = ""


def is_cased(char: str) -> bool:
    """Whether a sigma after this character is final; `unicodedata` has no such property, `lower` knows it."""
    return (char + SIGMA).lower()[-1] == FINAL


@lru_cache(maxsize=4096)
def is_case_ignorable(char: str) -> bool:
    """Whether what stands before this character decides if a sigma after it is final."""
    return not is_cased(char) and ("a" + char + SIGMA).lower()[-1] == FINAL
