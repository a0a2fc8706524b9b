"""Documents: clean a text, cut it, and tell whether it was seen before. Pure text, no files.

- A document is 50 to 600 words, closed at a paragraph border where there is one: long enough to tell its domain,
  short enough that no single text dominates a shard.
- Repeats make perplexities meaningless. Besides equal texts, those go of which at least half of the eight-word
  shingles were seen (Broder, 1997, "On the resemblance and containment of documents"); one shingle in eight is
  looked at, chosen by hash, which takes about 0.3 GB of memory per GB of text.
"""

import hashlib
import re
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from cbtm.errors import ConfigError

SHINGLE_WORDS = 8
NEAR_DUPLICATE = 0.5

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\u200b]")
_NEWLINES = re.compile(r"\r\n|[\r\x0c\x85\u2028\u2029]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_TRAILING_SPACE = re.compile(r"[^\S\n]+$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")
_SHINGLE_FACTORS = np.array([pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(SHINGLE_WORDS)], dtype=np.uint64)


@dataclass(frozen=True)
class RawDocument:
    """A text as found.

    Attributes:
        text: The text, of any length; long ones are cut.
        kind: What it is, for the labels; never written beside the text.
        source: What it was taken from. Pieces of one source stay on one side of the held-out split.
    """

    text: str
    kind: str
    source: str


@dataclass(frozen=True)
class CutLimits:
    """Sizes of a document.

    Attributes:
        min_words: Shorter documents are dropped and counted.
        max_words: Whitespace-separated words; a longer text is cut.
        max_chars: Characters; code has long words, so both limits hold.
    """

    min_words: int = 50
    max_words: int = 600
    max_chars: int = 4000

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words <= self.max_chars:
            raise ConfigError(
                f"min_words={self.min_words}, max_words={self.max_words}, max_chars={self.max_chars}: "
                "each must be at least 1 and not above the next"
            )


def clean_text(text: str) -> str:
    """Normalise newlines, strip control characters but newline and tab, trim line ends, keep at most 2 blank lines."""
    text = _NEWLINES.sub("\n", text)
    text = _SURROGATES.sub("\ufffd", _CONTROL.sub("", text))
    text = _TRAILING_SPACE.sub("", text)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n").rstrip()


def cut_text(text: str, limits: CutLimits) -> list[str]:
    """Cut a cleaned text into documents within the limits, at paragraph, else line, else sentence, else word borders.

    A document is closed when the next paragraph does not fit, and, past half of a limit, before a paragraph that is
    not indented: so code is cut between top-level definitions rather than inside one. Pieces lose their common
    indentation. Nothing is dropped here: the last piece may be short.
    """
    pieces: list[str] = []
    current: list[str] = []
    n_words = n_chars = 0
    for separator, unit in _units(text, limits):
        words, chars = len(unit.split()), len(unit) + len(separator)
        full = n_words + words > limits.max_words or n_chars + chars > limits.max_chars
        half_full = 2 * n_words >= limits.max_words or 2 * n_chars >= limits.max_chars
        if current and (full or (half_full and separator.startswith("\n\n") and not unit[0].isspace())):
            pieces.append("".join(current))
            current, n_words, n_chars = [], 0, 0
        current.append(separator + unit if current else unit)
        n_words, n_chars = n_words + words, n_chars + chars
    if current:
        pieces.append("".join(current))
    return [textwrap.dedent(piece).strip("\n") for piece in pieces]


def _units(text: str, limits: CutLimits) -> Iterator[tuple[str, str]]:
    """Yield (separator before it, unit): the largest parts that cannot be closer to a border and fit the limits."""

    def fits(part: str) -> bool:
        return len(part) <= limits.max_chars and len(part.split()) <= limits.max_words

    separator = ""
    for index, paragraph in enumerate(re.split(r"(\n{2,})", text)):
        if index % 2:
            separator = paragraph
        elif fits(paragraph):
            if paragraph:
                yield separator, paragraph
        else:
            for line in paragraph.split("\n"):
                parts = [line] if fits(line) else _cut_line(line, limits)
                for part in parts:
                    if part:
                        yield separator, part
                        separator = " "
                separator = "\n"


def _cut_line(line: str, limits: CutLimits) -> list[str]:
    """Cut a line that is longer than a document at sentence ends, else at words, else anywhere."""
    parts: list[str] = []
    for sentence in _SENTENCE_END.split(line):
        if len(sentence) <= limits.max_chars and len(sentence.split()) <= limits.max_words:
            parts.append(sentence)
            continue
        words = [
            word[start : start + limits.max_chars]
            for word in sentence.split()
            for start in range(0, len(word), limits.max_chars)
        ]
        parts.extend(words)
    return parts


@dataclass
class SeenShingles:
    """Near-duplicate filter: remembers a hashed sample of the eight-word shingles of the documents it let pass."""

    seen: set[int] = field(default_factory=set)

    def is_new(self, text: str) -> bool:
        """Whether less than half of the shingles were seen; if so, remember them."""
        shingles = _sampled_shingles(text)
        n_seen = sum(shingle in self.seen for shingle in shingles)
        if shingles and n_seen >= NEAR_DUPLICATE * len(shingles):
            return False
        self.seen.update(shingles)
        return True


def _sampled_shingles(text: str) -> list[int]:
    """Hash every run of eight words and keep the distinct hashes divisible by 8."""
    codes = np.fromiter((zlib.crc32(w.encode()) for w in text.lower().split()), dtype=np.uint64)
    n = len(codes) - SHINGLE_WORDS + 1
    if n < 1:
        return []
    hashes = np.zeros(n, dtype=np.uint64)  # (N,), arithmetic modulo 2^64
    for i, factor in enumerate(_SHINGLE_FACTORS):
        hashes += codes[i : i + n] * factor
    hashes ^= hashes >> np.uint64(31)
    hashes *= _SHINGLE_FACTORS[0]
    hashes >>= np.uint64(16)
    sampled: list[int] = np.unique(hashes[hashes % np.uint64(8) == 0]).tolist()
    return sampled


def text_digest(text: str) -> str:
    """Return the sha256 (hex) of the lower-case text with every run of white space as one space."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()
