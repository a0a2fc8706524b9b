"""The tokenizer of a run: taken from the seed model's folder, or a byte-level BPE trained on the corpus.

It is stored as a Hugging Face folder (tokenizer.json, tokenizer_config.json). One token, the separator, stands in
front of every document: the tokenizer's BOS, or its EOS where it has no BOS, as GPT-2 does with <|endoftext|>.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cbtm import storage
from cbtm.branch.source import fetch_files, is_hub_name, list_names
from cbtm.config import Config
from cbtm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SEPARATOR = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""What a tokenizer is stored as."""
_FILES = (*TOKENIZER_FILES, "special_tokens_map.json", "vocab.json", "merges.txt")


class TokenizerConfig(Config):
    """Where the tokenizer comes from.

    Attributes:
        path: Folder, s3:// prefix or hub name (as seed_model.path) with tokenizer.json, or with GPT-2's vocab.json and
            merges.txt. None takes the seed model's own; without a given seed model a BPE is trained.
        vocab_size: Entries of a trained BPE, the separator and the 256 bytes included.
        max_documents: Documents that a BPE is trained on, from the start of the training split.
    """

    path: str | None = None
    vocab_size: int = Field(default=8192, ge=300)
    max_documents: int = Field(default=200_000, ge=1)


class TextTokenizer:
    """A tokenizer with the separator token resolved."""

    def __init__(self, tokenizer: Tokenizer, separator: str) -> None:
        separator_id = tokenizer.token_to_id(separator)
        if separator_id is None:
            raise ConfigError(f"the tokenizer has no token {separator!r}, which its configuration names as BOS or EOS")
        # Padding or truncation that a published tokenizer.json switches on would corrupt the token stream.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # Text that spells a special token is text: it must not end a document in its middle.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.separator = separator
        self.separator_id: int = separator_id
        self.vocab_size: int = max(tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values()) + 1)

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Open a folder with tokenizer.json or with vocab.json and merges.txt.

        Raises:
            ConfigError: If the folder holds neither, or names no BOS and no EOS token.
        """
        whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        try:
            if whole.is_file():
                tokenizer = Tokenizer.from_file(str(whole))
            elif vocabulary.is_file() and merges.is_file():
                tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
                _make_byte_level(tokenizer)
            else:
                raise ConfigError(
                    f"{folder} holds neither tokenizer.json nor vocab.json with merges.txt; for other formats save "
                    "transformers' AutoTokenizer with save_pretrained first"
                )
        except ConfigError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"the files in {folder} cannot be read as a tokenizer: {error}") from error
        return cls(tokenizer, _separator_of(folder, tokenizer))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Train a byte-level BPE; the same texts in the same order give the same tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        _make_byte_level(tokenizer)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, SEPARATOR)

    def save(self, folder: Path) -> None:
        """Write a folder that transformers' AutoTokenizer opens."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.separator,
            "eos_token": self.separator,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text, the separator first; on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self.separator_id, *encoding.ids], dtype=np.int64) for encoding in encodings]

    def prompt_tokens(self, texts: Sequence[str], prompts: Sequence[int]) -> list[int]:
        """How many tokens after the separator belong to the prompt that each text begins with; on all cores.

        A token that reaches beyond the prompt is not of it: where a prompt ends in a space, byte-level BPE makes
        that space the beginning of the answer's first word, and an answer of one word would not be learned at all.

        Args:
            texts: Whole texts, tokenised as by `encode_batch`.
            prompts: Characters of each prompt, 0 for a text without one.
        """
        found = [0] * len(texts)
        places = [place for place, prompt in enumerate(prompts) if prompt]
        encodings = self._tokenizer.encode_batch([texts[place] for place in places], add_special_tokens=False)
        for place, encoding in zip(places, encodings, strict=True):
            beyond = (number for number, (_, end) in enumerate(encoding.offsets) if end > prompts[place])
            found[place] = next(beyond, len(encoding))
        return found

    def encode_with_starts(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of a text, the separator first, and the character at which each begins.

        Returns:
            Token ids and character offsets, both of shape (n,); the separator begins at 0.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        starts = [0, *(start for start, _ in encoding.offsets)]
        return np.array([self.separator_id, *encoding.ids], dtype=np.int64), np.array(starts, dtype=np.int64)


def build_tokenizer(
    config: TokenizerConfig, seed_path: str | None, texts: Iterable[str], folder: Path
) -> TextTokenizer:
    """Write the run's tokenizer into `folder`: a copy of a given one, or a BPE trained on `texts`.

    Raises:
        ConfigError: If a given folder holds no tokenizer that can be read.
        DataError: If there is no text to train on.
    """
    path = config.path or seed_path
    if path is not None:
        tokenizer = fetch_tokenizer(path, folder.parent / "given")
    else:
        tokenizer = TextTokenizer.train(_not_empty(texts), config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            logger.warning("vocab_size=%d but the text gives only %d", config.vocab_size, tokenizer.vocab_size)
    tokenizer.save(folder)
    return tokenizer


def fetch_tokenizer(path: str, scratch: Path) -> TextTokenizer:
    """Open a tokenizer: of a local folder, an s3:// prefix, or a repository of the Hugging Face hub."""
    if not is_hub_name(path) and not storage.is_s3(path):
        return TextTokenizer.load(storage.local_path(path))
    fetch_files(path, scratch, [name for name in list_names(path) if name in _FILES])
    return TextTokenizer.load(scratch)


def _not_empty(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("there is no document to train a tokenizer on; check corpus.root and corpus.train_split")


def _make_byte_level(tokenizer: Tokenizer) -> None:
    # GPT-2's splitting of words; exact offsets are needed to tell which text stands before a token.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _separator_of(folder: Path, tokenizer: Tokenizer) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = _json(folder / name)
        for key in ("bos_token", "eos_token"):
            token = values.get(key)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
    if tokenizer.token_to_id(SEPARATOR) is not None:
        return SEPARATOR
    raise ConfigError(f"{folder} names neither a BOS nor an EOS token; add bos_token to its tokenizer_config.json")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return values if isinstance(values, dict) else {}
