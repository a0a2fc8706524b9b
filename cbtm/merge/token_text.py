"""The text of tokens as they come, exactly as far as it is complete.

A token of a byte-level vocabulary may end within a character. The evaluation routes such a token by the text before
the character in which it begins (`TextTokenizer.encode_with_starts`), so a stream of tokens gives a character once its
last byte is there, and not before. For byte-level vocabularies, as those of GPT-2, OPT, Llama 3 and Qwen are, that is
an incremental UTF-8 decoder over the tokens' bytes. The `DecodeStream` of the tokenizers library, which knows every
other decoder, holds back a whole token that ends within a character, also what is complete in it; it is used for the
others, where a token is whole characters or one byte.

What a normaliser changed, such as case, stays changed: a context is the text that the tokens spell.
"""

import codecs
from collections.abc import Callable

from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream

from cbtm.branch.tokenizer import TextTokenizer


class TokenText:
    """Text of the tokens of one tokenizer.

    The separator and other special tokens have none: text that spells them is made of other tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer: Tokenizer = tokenizer._tokenizer
        added = self._tokenizer.get_added_tokens_decoder()
        self._silent = {number for number, token in added.items() if token.special} | {tokenizer.separator_id}
        self._is_byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)

    def stream(self) -> Callable[[int], str]:
        """A function that takes the tokens of a text one by one, and returns what text each of them completes.

        Bytes that are no UTF-8 become U+FFFD as soon as no later byte can make a character of them.
        """
        step = self._byte_level() if self._is_byte_level else self._any()
        return lambda token: "" if token in self._silent else step(token)

    def _byte_level(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(_bytes_of(self._tokenizer.id_to_token(token) or ""))

    def _any(self) -> Callable[[int], str]:
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda token: decoder.step(self._tokenizer, token) or ""


def _bytes_of(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary; one with a character outside its alphabet was added as text."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    A byte that is a printable character of Latin-1 stands for itself, the others take U+0100 and following in order
    (GPT-2, Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
