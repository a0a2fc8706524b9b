r"""Words of many texts at once, as columns of a vocabulary, without a loop over words.

The words are those of scikit-learn's default analyser: the matches of ``\b\w\w+\b`` in the lower-cased text. A
regular expression and a dictionary make one Python object for each of them, which is most of the time of a tf-idf
transform. Here a block of texts is one buffer of lower-cased UTF-8, and every step is a pass over arrays:

1. *Borders.* A table says of every byte whether it belongs to a word; in front of non-ASCII characters their code
   point is looked up. Where that changes, a word begins or ends.
2. *Keys.* A word of up to eight bytes is one 64-bit number: itself. A longer one is mixed from its pieces of eight
   bytes; its last byte is 0xff, which no UTF-8 text holds, so that it is never taken for a short one.
3. *Look-up.* Keys are found by open addressing with linear probing (Knuth 1998, section 6.4), all at once; long
   words that are found are compared byte by byte, so that the result is exact.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cbtm.errors import DataError

# Texts are taken in blocks of about this many characters, whose arrays stay in a second-level cache.
BLOCK_CHARACTERS = 400_000

_WORD = re.compile(r"\w\w+")
_BLANK = 32
# Letters become lower case, and every ASCII byte that belongs to no word a blank.
_ASCII_LOWER = bytes(
    ord(chr(byte).lower()) if chr(byte).isalnum() or byte == ord("_") else _BLANK for byte in range(128)
) + bytes(range(128, 256))
_PIECE = 8  # bytes of a word that are taken at once
_PIECE_MASKS = np.array([(1 << 8 * size) - 1 for size in range(_PIECE + 1)], dtype=np.uint64)
_LONG = np.uint64(0xFF << 56)
# Odd multipliers with well mixed bits: the golden ratio, and one of splitmix64 (Steele, Lea and Flood 2014).
_MULTIPLIER, _PIECE_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
_LEAST_SLOTS_BITS = 10
# At least. Half of the words of a text are stop words and such, not here; they should meet an empty slot at once.
_SLOTS_PER_WORD = 4


def words(text: str) -> list[str]:
    r"""Lower-cased words of two or more characters, in order: the matches of ``\b\w\w+\b``."""
    return _WORD.findall(text.lower())


def word_spans(text_lower: str) -> list[tuple[int, int]]:
    """Start and end of each word of `words` in a text that is lower-cased already, in characters."""
    return [match.span() for match in _WORD.finditer(text_lower)]


@dataclass(frozen=True)
class WordBlock:
    """Words of several texts, single non-ASCII characters included.

    Attributes:
        buffer: The lower-cased texts as UTF-8, one after the other; blanks at the end.
        starts: Where each word begins in the buffer, int64, shape (words,).
        lengths: Bytes of each word, int64, shape (words,).
        keys: The words as 64-bit numbers (see the module), shape (words,).
        offsets: Text i has the words from offsets[i] to offsets[i + 1]; int64, shape (texts + 1,).
    """

    buffer: bytes
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    keys: NDArray[np.uint64]
    offsets: NDArray[np.int64]

    def word(self, index: int) -> bytes:
        """UTF-8 of one word."""
        start = int(self.starts[index])
        return self.buffer[start : start + int(self.lengths[index])]


def blocks_of(texts: Iterable[str]) -> Iterator[WordBlock]:
    """Words of `texts`, in blocks of bounded size (or of one text, if that is larger).

    Raises:
        DataError: If something in `texts` is not a string, or `texts` is one.
    """
    if isinstance(texts, str):
        raise DataError("texts is one string; pass a sequence of strings")
    block: list[str] = []
    characters = 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a string")
        block.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield find_words(block)
            block, characters = [], 0
    if block:
        yield find_words(block)


def find_words(texts: Sequence[str]) -> WordBlock:
    """All words of `texts`."""
    # Lone surrogates, which JSON may hold, pass: they belong to no word.
    lower = [text.encode() if text.isascii() else text.lower().encode("utf-8", "surrogatepass") for text in texts]
    # Blanks at the end: a word that ends there has an end, and its last piece may be read in full.
    buffer = b" ".join(lower).translate(_ASCII_LOWER) + bytes([_BLANK] * (_PIECE + 1))
    characters = np.frombuffer(buffer, dtype=np.uint8)
    belongs = characters != _BLANK
    _clear_symbols(characters, belongs)
    borders = np.flatnonzero(belongs[1:] != belongs[:-1]) + 1
    if belongs[0]:
        borders = np.concatenate([[0], borders])
    starts, ends = borders[::2], borders[1::2]
    lengths = ends - starts
    longer = lengths > 1
    starts, lengths = starts[longer], lengths[longer]
    text_starts = np.cumsum([0] + [len(text) + 1 for text in lower])
    return WordBlock(buffer, starts, lengths, _keys(buffer, starts, lengths), np.searchsorted(starts, text_starts))


def _clear_symbols(characters: NDArray[np.uint8], belongs: NDArray[np.bool_]) -> None:
    """Mark the bytes of non-ASCII characters that belong to no word, in place."""
    heads = np.flatnonzero(characters >= 0xC0)
    if not len(heads):
        return
    size = np.where(characters[heads] < 0xE0, 2, np.where(characters[heads] < 0xF0, 3, 4))
    code_points = characters[heads] & (0x7F >> size)
    code_points = code_points.astype(np.int32)
    for following in range(1, 4):
        has = size > following
        code_points[has] = code_points[has] << 6 | characters[heads[has] + following] & 0x3F
    symbols = ~_in_words()[code_points]
    for following in range(4):
        belongs[heads[symbols & (size > following)] + following] = False


@cache
def _in_words() -> NDArray[np.bool_]:
    """Tells of every code point whether it may be in a word."""
    inside = np.zeros(0x110000, dtype=np.bool_)
    for match in re.finditer(r"\w+", "".join(map(chr, range(len(inside))))):
        inside[match.start() : match.end()] = True
    return inside


def _pieces(buffer: bytes | bytearray) -> NDArray[np.uint64]:
    """The eight bytes from every position of `buffer` on, as little-endian numbers."""
    return np.ndarray((len(buffer) - _PIECE + 1,), dtype="<u8", buffer=buffer, strides=(1,))


def _keys(buffer: bytes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    pieces = _pieces(buffer)
    keys: NDArray[np.uint64] = pieces[starts] & _PIECE_MASKS[np.minimum(lengths, _PIECE)]
    long = np.flatnonzero(lengths > _PIECE)
    for place, some in _further_pieces(long, lengths):
        piece = pieces[starts[some] + place] & _masks(lengths[some], place)
        mixed = (keys[some] * _MULTIPLIER ^ piece) * _PIECE_MULTIPLIER
        # A product carries upwards only: what the upper bits have learned must reach the lower ones, which remain.
        keys[some] = mixed ^ mixed >> np.uint64(32)
    keys[long] |= _LONG
    return keys


def _further_pieces(long: NDArray[np.int64], lengths: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Place of each piece after the first, with the words that are that long."""
    place = _PIECE
    while len(long):
        yield place, long
        place += _PIECE
        long = long[lengths[long] > place]


def _is_same_word(block: WordBlock, some: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Compare words of more than one piece with others of the same block, byte by byte; shape (len(some),)."""
    pieces, lengths = _pieces(block.buffer), block.lengths[some]
    starts, other_starts = block.starts[some], block.starts[others]
    same: NDArray[np.bool_] = (lengths == block.lengths[others]) & (pieces[starts] == pieces[other_starts])
    for place, longer in _further_pieces(np.flatnonzero(same), lengths):
        difference = pieces[starts[longer] + place] ^ pieces[other_starts[longer] + place]
        same[longer] &= difference & _masks(lengths[longer], place) == 0
    return same


def _masks(lengths: NDArray[np.int64], place: int) -> NDArray[np.uint64]:
    return _PIECE_MASKS[np.minimum(lengths - place, _PIECE)]


class WordTable:
    """Columns of words, looked up for whole blocks.

    Args:
        words: Different words, which get the columns 0, 1, 2, …

    Attributes:
        words: UTF-8 of the word of each column.
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.words: list[bytes] = []
        self._set_slots(_LEAST_SLOTS_BITS)
        self._keys = array("Q")  # of each column
        # Bytes of each column's word, filled up to whole pieces, and where they begin.
        self._spelling = bytearray()
        self._spelling_starts = array("q")
        self._lengths = array("q")
        # Long words whose key another word had first.
        self._same_key: dict[bytes, int] = {}
        for block in blocks_of(words):
            self.add(block)

    def __len__(self) -> int:
        return len(self.words)

    def find(self, block: WordBlock) -> NDArray[np.int32]:
        """Column of every word of `block`, -1 for a word that is not here; shape (words,)."""
        return self._find(block, np.arange(len(block.keys)))

    def add(self, block: WordBlock) -> NDArray[np.int32]:
        """Column of every word of `block`; a new word gets the next one. Shape (words,)."""
        columns = self.find(block)
        new = np.flatnonzero(columns < 0)
        if not len(new):
            return columns
        keys, first, of_key = np.unique(block.keys[new], return_index=True, return_inverse=True)
        long = np.flatnonzero(block.lengths[new] > _PIECE)
        is_one_word = _is_same_word(block, new[long], new[first[of_key[long]]]).all()
        if is_one_word and (self._columns_of_keys(keys) < 0).all():
            order = np.argsort(first)  # in which they are first seen
            self._append(block, new[first[order]], keys[order])
            columns[new] = self._find(block, new)
        else:
            for index in new.tolist():  # different words of one key: slow, and next to never
                columns[index] = self._add_one(block, index)
        return columns

    def _add_one(self, block: WordBlock, index: int) -> int:
        word, here = block.word(index), np.array([index])
        if (column := int(self._find(block, here)[0])) >= 0:
            return column
        if self._columns_of_keys(block.keys[here])[0] < 0:
            self._append(block, here, block.keys[here])
        else:
            self._same_key[word] = len(self.words)
            # No word has the key 0, so that the column has no slot of its own.
            self._append_spelling([word], np.zeros(1, dtype=np.uint64))
        return len(self.words) - 1

    def _find(self, block: WordBlock, some: NDArray[np.int64]) -> NDArray[np.int32]:
        columns = self._columns_of_keys(block.keys[some])
        lengths = block.lengths[some]
        long = np.flatnonzero((lengths > _PIECE) & (columns >= 0))
        if len(long):
            wrong = long[~self._is_spelled(block, some[long], columns[long])]
            for index in wrong.tolist():
                columns[index] = self._same_key.get(block.word(int(some[index])), -1)
        return columns

    def _columns_of_keys(self, keys: NDArray[np.uint64]) -> NDArray[np.int32]:
        # take(mode="clip") does not check indices one by one, and none is out of range.
        slots = self._first_slots(keys)
        columns: NDArray[np.int32] = self._slot_columns.take(slots, mode="clip")
        pending = np.flatnonzero(self._slot_keys.take(slots, mode="clip") != keys)
        is_taken = columns[pending] >= 0
        columns[pending] = -1
        pending = pending[is_taken]
        slots, keys = slots[pending], keys[pending]
        while len(pending):
            slots = slots + 1 & self._last_slot
            found = self._slot_columns.take(slots, mode="clip")
            is_it = self._slot_keys.take(slots, mode="clip") == keys
            columns[pending[is_it]] = found[is_it]
            further = ~is_it & (found >= 0)
            pending, slots, keys = pending[further], slots[further], keys[further]
        return columns

    def _is_spelled(self, block: WordBlock, some: NDArray[np.int64], columns: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Tell of long words whether they are those of `columns`, byte by byte."""
        starts, lengths = block.starts[some], block.lengths[some]
        own_starts = np.frombuffer(self._spelling_starts, dtype=np.int64)[columns] // _PIECE
        own = np.frombuffer(self._spelling, dtype="<u8")
        pieces = _pieces(block.buffer)
        same: NDArray[np.bool_] = lengths == np.frombuffer(self._lengths, dtype=np.int64)[columns]
        same &= pieces[starts] == own[own_starts]
        for place, longer in _further_pieces(np.flatnonzero(same), lengths):
            read = pieces[starts[longer] + place] & _masks(lengths[longer], place)
            same[longer] &= read == own[own_starts[longer] + place // _PIECE]
        return same

    def _append(self, block: WordBlock, some: NDArray[np.int64], keys: NDArray[np.uint64]) -> None:
        self._append_spelling([block.word(index) for index in some.tolist()], keys)
        if _SLOTS_PER_WORD * len(self.words) > self._last_slot:
            self._set_slots((_SLOTS_PER_WORD * len(self.words)).bit_length() + 1)
            keys = np.frombuffer(self._keys, dtype=np.uint64)
        self._fill_slots(keys, np.arange(len(self.words) - len(keys), len(self.words), dtype=np.int32))

    def _append_spelling(self, words: list[bytes], keys: NDArray[np.uint64]) -> None:
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        filled = -(-lengths // _PIECE) * _PIECE
        starts = len(self._spelling) + np.cumsum(filled) - filled
        self.words += words
        self._keys.frombytes(keys.tobytes())
        self._lengths.frombytes(lengths.tobytes())
        self._spelling_starts.frombytes(starts.tobytes())
        self._spelling += b"".join(map(bytes.ljust, words, filled.tolist(), itertools.repeat(b"\0")))

    def _set_slots(self, bits: int) -> None:
        self._shift, self._last_slot = np.uint64(64 - bits), (1 << bits) - 1
        self._slot_keys = np.zeros(1 << bits, dtype=np.uint64)
        self._slot_columns = np.full(1 << bits, -1, dtype=np.int32)

    def _first_slots(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (keys * _MULTIPLIER >> self._shift).astype(np.int64)

    def _fill_slots(self, keys: NDArray[np.uint64], columns: NDArray[np.int32]) -> None:
        slots = self._first_slots(keys)
        while len(keys):
            empty = self._slot_columns[slots] < 0
            # Of several that want one slot the last is written; the others go on to the next.
            self._slot_columns[slots[empty]] = columns[empty]
            placed = self._slot_columns[slots] == columns
            self._slot_keys[slots[placed]] = keys[placed]
            slots, keys, columns = slots[~placed] + 1 & self._last_slot, keys[~placed], columns[~placed]
