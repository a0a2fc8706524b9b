"""Generate text from a prompt, piece by piece as it comes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from cbtm.errors import ConfigError
from cbtm.merge.generation import MixtureForCausalLM


@dataclass(frozen=True)
class GeneratedText:
    """What a mixture made of a prompt.

    Attributes:
        text: The new text, as far as its last character is complete.
        prompt_tokens: Tokens of the prompt, the separator first.
        tokens: New tokens, with the separator where the text came to its end.
        is_finished: Whether it did, rather than being cut at the most tokens.
    """

    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    is_finished: bool


def generate_text(
    mixture: MixtureForCausalLM,
    prompt: str,
    *,
    max_new_tokens: int,
    sample: bool = False,
    sampling_temperature: float = 1.0,
    top_p: float = 1.0,
    random_state: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> GeneratedText:
    """Continue a prompt until the separator, or for so many tokens.

    Args:
        mixture: The experts.
        prompt: Text, which may be empty.
        max_new_tokens: Most tokens to generate.
        sample: Draw each token; False takes the most probable one.
        sampling_temperature: Of the mixture's probabilities when sampling, which are raised to 1 over it; not that of
            the routing.
        top_p: Sample from the most probable tokens that reach this probability together; 1 from all.
        random_state: Seed of the draws; PyTorch's own generators are left as they were.
        on_text: Called with each piece of new text as soon as it is complete.

    Raises:
        ConfigError: If a setting is out of range, or prompt and new tokens exceed the experts' positions.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} generates nothing; use at least 1")
    if not 0 < sampling_temperature < float("inf"):
        raise ConfigError(f"sampling_temperature={sampling_temperature} is not a positive finite number")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is not in (0, 1]; 1 samples from all tokens")
    inputs = mixture.encode(prompt)  # (1, T)
    streamer = _TextStreamer(mixture.text_stream(), on_text)
    # top_k=0: transformers' default of 50 would cut the distribution.
    drawn: dict[str, Any] = {"temperature": sampling_temperature, "top_p": top_p, "top_k": 0} if sample else {}
    devices = sorted({parameter.device.index for parameter in mixture.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random_state)
        model: Any = mixture
        tokens: Tensor = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=streamer,
            **drawn,
        )
    new = tokens[0, inputs.shape[1] :].tolist()
    finished = new[-1] == mixture.generation_config.eos_token_id
    return GeneratedText("".join(streamer.pieces), inputs[0].tolist(), new, finished)


class _TextStreamer(BaseStreamer):
    """Takes the tokens that transformers generates, and hands on the text that they complete."""

    def __init__(self, read: Callable[[int], str], on_text: Callable[[str], None] | None) -> None:
        self._read, self._on_text = read, on_text
        self._is_prompt = True
        self.pieces: list[str] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        pieces = [self._read(token) for token in value.flatten().tolist()]
        if self._is_prompt:
            self._is_prompt = False
            return
        for piece in filter(None, pieces):
            self.pieces.append(piece)
            if self._on_text is not None:
                self._on_text(piece)

    def end(self) -> None:
        """Nothing is held back but an incomplete character."""
