"""Token shards: the documents of one cluster from one group of corpus shards, as arrays to be memory-mapped.

A shard with stem S is three files: `S.tokens.npy` (uint16 or uint32, every document as separator token followed
by its text's tokens), `S.offsets.npy` (int64, documents + 1) and `S.documents.jsonl` (`{"sp_id", "bytes"}`, in the
same order). The separator in front of each document is what the first token of its text is predicted from.

Where a document begins with a prompt, which is given and not learned, there is a fourth, `S.prompts.npy` (int64,
documents): how many tokens after the separator each prompt has. The separator is always learned, as the end of the
document before it. Old shards and those of plain text have three files.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise, repeat
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self, overload

import numpy as np
import orjson
from numpy.typing import NDArray

from cbtm.errors import DataError

TOKENS, OFFSETS, DOCUMENTS, PROMPTS = ".tokens.npy", ".offsets.npy", ".documents.jsonl", ".prompts.npy"
SHARD_SUFFIXES = (TOKENS, OFFSETS, DOCUMENTS, PROMPTS)
_INT64 = "<i8"
_MAPPED = 200  # files of one kind that are mapped at once
_UNFINISHED = 1 << 56  # length in the headers of a shard that is being written: no file is that long


class Encoder(Protocol):
    """What turns text into tokens; `cbtm.branch.tokenizer.TextTokenizer` is one."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text, the separator first."""
        ...

    def prompt_tokens(self, texts: Sequence[str], prompts: Sequence[int]) -> list[int]:
        """Tokens after the separator that lie in the first `prompts` characters of each text.

        Called only where a text has a prompt.
        """
        ...


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest unsigned type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class DocumentRecord:
    """One document of a shard: its identity and the UTF-8 length of its text in bytes."""

    sp_id: str
    n_bytes: int


class TokenShardWriter:
    """Streams documents into one shard; memory grows neither with the tokens nor with the documents."""

    def __init__(self, folder: Path, stem: str, *, vocab_size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._stem = folder, stem
        self._dtype, self._vocab_size = token_dtype(vocab_size), vocab_size
        self._n_documents = self._n_tokens = self._n_bytes = 0
        self._tokens: IO[bytes] = (folder / f"{stem}{TOKENS}").open("wb")
        self._offsets: IO[bytes] = (folder / f"{stem}{OFFSETS}").open("wb")
        self._documents: IO[bytes] = (folder / f"{stem}{DOCUMENTS}").open("wb")
        self._prompts: IO[bytes] | None = None  # until a document has one
        (folder / f"{stem}{PROMPTS}").unlink(missing_ok=True)  # a killed writer's
        _write_header(self._tokens, self._dtype.str, _UNFINISHED)
        _write_header(self._offsets, _INT64, _UNFINISHED)
        self._offsets.write(bytes(8))

    def add(self, record: DocumentRecord, tokens: NDArray[np.integer[Any]], prompt: int = 0) -> None:
        """Append one document, its separator included.

        Args:
            record: Its identity.
            tokens: Its tokens, shape (n,).
            prompt: How many tokens after the separator are given and not learned.

        Raises:
            DataError: If a token id is outside [0, vocab_size), which the smaller type would wrap around; or the
                document has fewer tokens than its prompt.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise DataError(
                f"{record.sp_id}: token ids {tokens.min()} to {tokens.max()} do not fit vocab_size={self._vocab_size}"
            )
        if prompt or self._prompts is not None:
            self._add_prompt(record, len(tokens), prompt)
        self._tokens.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._documents.write(orjson.dumps({"sp_id": record.sp_id, "bytes": record.n_bytes}) + b"\n")
        self._n_documents += 1
        self._n_tokens += len(tokens)
        self._n_bytes += record.n_bytes
        self._offsets.write(self._n_tokens.to_bytes(8, "little"))

    def _add_prompt(self, record: DocumentRecord, n_tokens: int, prompt: int) -> None:
        if not 0 <= prompt < max(n_tokens, 1):
            raise DataError(f"{record.sp_id}: a prompt of {prompt} tokens in a document of {n_tokens - 1}")
        if self._prompts is None:
            self._prompts = (self._folder / f"{self._stem}{PROMPTS}").open("wb")
            _write_header(self._prompts, _INT64, _UNFINISHED)
            # The documents before have none: what is sought over and not written is zeros.
            self._prompts.seek(8 * self._n_documents, os.SEEK_CUR)
        self._prompts.write(prompt.to_bytes(8, "little"))

    @property
    def counts(self) -> dict[str, int]:
        """Documents, tokens (separators included) and bytes of text so far."""
        return {"documents": self._n_documents, "tokens": self._n_tokens, "bytes": self._n_bytes}

    def close(self) -> None:
        """Finish the files."""
        _write_header(self._tokens, self._dtype.str, self._n_tokens)
        _write_header(self._offsets, _INT64, self._n_documents + 1)
        if self._prompts is not None:
            _write_header(self._prompts, _INT64, self._n_documents)
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._tokens, self._offsets, self._documents, self._prompts):
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


class TokenDocuments:
    """Documents of several shards one after the other, as one stream of tokens.

    Args:
        shards: Pairs of folder and stem, in the order in which they are to be read.

    Raises:
        DataError: If the files of a shard are cut short or do not belong together.
    """

    def __init__(self, shards: Sequence[tuple[Path, str]]) -> None:
        self._shards = list(shards)
        self._tokens = _Arrays([folder / f"{stem}{TOKENS}" for folder, stem in shards])
        self._offsets = _Arrays([folder / f"{stem}{OFFSETS}" for folder, stem in shards])
        documents, lengths = [], []
        for (folder, stem), tokens, offsets in zip(shards, self._tokens, self._offsets, strict=True):
            if offsets[-1] != len(tokens):
                raise DataError(f"{folder / stem}: {len(tokens)} tokens but the last document ends at {offsets[-1]}")
            documents.append(len(offsets) - 1)
            lengths.append(len(tokens))
        self._prompts = [
            _prompts(folder / f"{stem}{PROMPTS}", count)
            for (folder, stem), count in zip(shards, documents, strict=True)
        ]
        self._starts = np.cumsum([0, *lengths])
        self._n_documents = sum(documents)

    @property
    def has_prompts(self) -> bool:
        """Whether a document may begin with a prompt; without, everything is learned."""
        return any(prompts is not None for prompts in self._prompts)

    @property
    def n_tokens(self) -> int:
        """Tokens in all, separators included."""
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        """Documents in all."""
        return self._n_documents

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens start … start + length of the stream, across documents and shards; shape (length,).

        Raises:
            IndexError: If the stream does not hold all of them.
        """
        self._check_range(start, length)
        out = np.empty(length, dtype=np.int64)
        done = 0
        for shard, begin, end in self._pieces(start, length):
            out[done : done + end - begin] = self._tokens[shard][begin:end]
            done += end - begin
        return out

    def learned(self, start: int, length: int) -> NDArray[np.bool_]:
        """Which of the tokens start … start + length are learned, that is, in no prompt; shape (length,).

        Raises:
            IndexError: If the stream does not hold all of them.
            DataError: If a prompt is longer than its document.
        """
        self._check_range(start, length)
        out = np.ones(length, dtype=np.bool_)
        done = 0
        for shard, begin, end in self._pieces(start, length):
            if self._prompts[shard] is not None:
                out[done : done + end - begin] = self._learned_in(shard, begin, end)
            done += end - begin
        return out

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} are not all in the stream of {self.n_tokens}")

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Shard, begin and end in it of each piece of a range of the stream."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while length > 0:
            begin = start - int(self._starts[shard])
            end = min(begin + length, len(self._tokens[shard]))
            if end > begin:
                yield shard, begin, end
            start, length, shard = start + end - begin, length - (end - begin), shard + 1

    def _learned_in(self, shard: int, begin: int, end: int) -> NDArray[np.bool_]:
        offsets, prompts = self._offsets[shard], self._prompts[shard]
        assert prompts is not None
        first = int(np.searchsorted(offsets, begin, side="right")) - 1
        last = int(np.searchsorted(offsets, end, side="left"))
        bounds, given = np.asarray(offsets[first : last + 1]), np.asarray(prompts[first:last])
        if np.any((given < 0) | (given > np.maximum(np.diff(bounds) - 1, 0))):
            folder, stem = self._shards[shard]
            raise DataError(
                f"{folder / stem}{PROMPTS} has prompts that are longer than their documents; "
                "remove its manifest to build it again"
            )
        there = given > 0
        starts = bounds[:-1][there] + 1
        ends = starts + given[there]
        # A separator lies between two prompts: no two begin, or end, at one place, which += would count once.
        steps = np.zeros(end - begin + 1, dtype=np.int8)
        steps[np.clip(starts, begin, end) - begin] += 1
        steps[np.clip(ends, begin, end) - begin] -= 1
        learned: NDArray[np.bool_] = np.cumsum(steps[:-1], dtype=np.int8) == 0
        return learned

    def learned_targets(self) -> Iterator[NDArray[np.bool_]]:
        """Which tokens of each document are learned, its separator left out; shape (tokens - 1,)."""
        for length, prompt in zip(self.lengths(), self.prompts(), strict=True):
            yield np.arange(length - 1) >= prompt

    def prompts(self) -> Iterator[int]:
        """Tokens of each document's prompt."""
        for offsets, prompts in zip(self._offsets, self._prompts, strict=True):
            yield from repeat(0, len(offsets) - 1) if prompts is None else map(int, prompts)

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """Tokens of each document, separator first."""
        for tokens, offsets in zip(self._tokens, self._offsets, strict=True):
            for start, end in pairwise(offsets):
                yield tokens[start:end].astype(np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, separator included; shape (n_documents,)."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.empty(0, np.int64)])

    def records(self) -> Iterator[DocumentRecord]:
        """Identity and size of each document, in order."""
        for folder, stem in self._shards:
            with (folder / f"{stem}{DOCUMENTS}").open("rb") as lines:
                for line in lines:
                    values = orjson.loads(line)
                    yield DocumentRecord(values["sp_id"], values["bytes"])


class _Arrays(Sequence[NDArray[Any]]):
    """Arrays in files, mapped when they are used, of which the last used stay mapped.

    A map holds a file descriptor. A model that is trained on all clusters has clusters x shard groups shards, and 128
    of 16 are more than the 1,024 descriptors that a process may have in many places.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._mapped = lru_cache(_MAPPED)(partial(_array, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, place: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, place: slice) -> list[NDArray[Any]]: ...

    def __getitem__(self, place: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        if isinstance(place, slice):
            return [self._mapped(path) for path in self._paths[place]]
        return self._mapped(self._paths[place])


def _write_header(file: IO[bytes], dtype: str, length: int) -> None:
    # numpy pads the header for a growing first axis, so the final length fits where the first one stood.
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (length,)})


def _prompts(path: Path, n_documents: int) -> NDArray[Any] | None:
    if not path.exists():
        return None
    prompts = _array(path)  # in memory, 8 bytes a document: maps of it would be one more file for each shard
    if prompts.shape != (n_documents,) or prompts.dtype.kind != "i":
        raise DataError(
            f"{path} has {prompts.dtype} of shape {prompts.shape} but the shard has {n_documents} documents; "
            "remove its manifest to build it again"
        )
    return prompts


def _array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is cut short or no array: {error}; remove its manifest to build it again") from error
    return array
