"""Token shards: the documents of one cluster from one group of corpus shards, as arrays to be memory-mapped.

A shard with stem S is three files: `S.tokens.npy` (uint16 or uint32, every document as separator token followed
by its text's tokens), `S.offsets.npy` (int64, documents + 1) and `S.documents.jsonl` (`{"sp_id", "bytes"}`, in the
same order). The separator in front of each document is what the first token of its text is predicted from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from cbtm.errors import DataError

TOKENS, OFFSETS, DOCUMENTS = ".tokens.npy", ".offsets.npy", ".documents.jsonl"
_UNFINISHED = 1 << 60  # length in the headers of a shard that is being written: no file is that long


class Encoder(Protocol):
    """What turns text into tokens; `cbtm.branch.tokenizer.TextTokenizer` is one."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text, the separator first."""
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
        self._write_headers(_UNFINISHED, _UNFINISHED)
        self._offsets.write(bytes(8))

    def add(self, record: DocumentRecord, tokens: NDArray[np.integer[Any]]) -> None:
        """Append one document, its separator included.

        Raises:
            DataError: If a token id is outside [0, vocab_size), which the smaller type would wrap around.
        """
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise DataError(
                f"{record.sp_id}: token ids {tokens.min()} to {tokens.max()} do not fit vocab_size={self._vocab_size}"
            )
        self._tokens.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._documents.write(orjson.dumps({"sp_id": record.sp_id, "bytes": record.n_bytes}) + b"\n")
        self._n_documents += 1
        self._n_tokens += len(tokens)
        self._n_bytes += record.n_bytes
        self._offsets.write(self._n_tokens.to_bytes(8, "little"))

    @property
    def counts(self) -> dict[str, int]:
        """Documents, tokens (separators included) and bytes of text so far."""
        return {"documents": self._n_documents, "tokens": self._n_tokens, "bytes": self._n_bytes}

    def close(self) -> None:
        """Finish the files."""
        self._tokens.seek(0)
        self._offsets.seek(0)
        self._write_headers(self._n_tokens, self._n_documents + 1)
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._tokens, self._offsets, self._documents):
            file.close()

    def _write_headers(self, n_tokens: int, n_offsets: int) -> None:
        # numpy pads the header for a growing first axis, so the final length fits where the first one stood.
        for file, dtype, length in ((self._tokens, self._dtype.str, n_tokens), (self._offsets, "<i8", n_offsets)):
            header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
            np.lib.format.write_array_header_1_0(file, header)

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
        self._tokens = [_array(folder / f"{stem}{TOKENS}", mmap_mode="r") for folder, stem in shards]
        self._offsets = [_array(folder / f"{stem}{OFFSETS}", mmap_mode="r") for folder, stem in shards]
        for (folder, stem), tokens, offsets in zip(shards, self._tokens, self._offsets, strict=True):
            if offsets[-1] != len(tokens):
                raise DataError(f"{folder / stem}: {len(tokens)} tokens but the last document ends at {offsets[-1]}")
        self._starts = np.cumsum([0] + [len(tokens) for tokens in self._tokens])

    @property
    def n_tokens(self) -> int:
        """Tokens in all, separators included."""
        return int(self._starts[-1])

    @property
    def n_documents(self) -> int:
        """Documents in all."""
        return sum(len(offsets) - 1 for offsets in self._offsets)

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens start … start + length of the stream, across documents and shards; shape (length,).

        Raises:
            IndexError: If the stream does not hold all of them.
        """
        if start < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start} to {start + length} are not all in the stream of {self.n_tokens}")
        out = np.empty(length, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < length:
            begin = start + done - int(self._starts[shard])
            piece = self._tokens[shard][begin : begin + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return out

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


def _array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is cut short or no array: {error}; remove its manifest to build it again") from error
    return array
