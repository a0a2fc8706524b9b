"""The seed model: a Hugging Face causal language model that every expert starts from.

Either a given folder (weights as safetensors only), or an OPT built from a few sizes and trained from scratch.
transformers is imported where a model is made, because it takes seconds.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from cbtm.branch.shapes import opt_shape
from cbtm.config import Config
from cbtm.errors import ConfigError
from cbtm.tokens import Encoder

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")


class ScratchModelConfig(Config):
    """Shape of an OPT that is trained from scratch.

    Attributes:
        size: A published size (125m, 350m, 1.3b, 2.7b, 6.7b, 13b, 30b, 66b) instead of the four numbers that follow.
        hidden_size: Width of a layer.
        n_layers: Number of layers.
        n_heads: Attention heads of a layer.
        feed_forward_ratio: Width of the feed-forward layer over `hidden_size`.
        dropout: Dropout on embeddings, attention output and feed-forward output.
        random_state: Seed of the initial weights.
    """

    size: str | None = None
    hidden_size: int = Field(default=64, ge=1)
    n_layers: int = Field(default=2, ge=1)
    n_heads: int = Field(default=4, ge=1)
    feed_forward_ratio: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    random_state: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> "ScratchModelConfig":
        if self.hidden_size % self.n_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of n_heads={self.n_heads}")
        if self.size is not None:
            opt_shape(self.size)
            for name in ("hidden_size", "n_layers", "n_heads", "feed_forward_ratio"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"size={self.size} and {name}={getattr(self, name)}: give a size or numbers")
        return self

    def shape(self) -> dict[str, Any]:
        """Arguments of transformers' OPTConfig that say how large the model is."""
        if self.size is not None:
            return opt_shape(self.size).to_config()
        return {
            "hidden_size": self.hidden_size,
            "word_embed_proj_dim": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "ffn_dim": self.feed_forward_ratio * self.hidden_size,
        }


def model_files(names: list[str]) -> list[str]:
    """Files of a model folder that a seed is made of.

    Raises:
        ConfigError: If there is no configuration, or the weights are not safetensors.
    """
    if "config.json" not in names:
        raise ConfigError("the seed model's folder has no config.json; seed_model.path takes a Hugging Face folder")
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        raise ConfigError(
            "the seed model's folder has no *.safetensors weights; pickled weights are not read: save the model "
            "again with save_pretrained(safe_serialization=True)"
        )
    return sorted({name for name in names if name in MODEL_FILES} | set(weights))


def create_model(config: ScratchModelConfig, *, vocab_size: int, separator_id: int, context_length: int) -> "nn.Module":
    """Build an OPT with random weights, the same ones for the same seed."""
    import torch
    from transformers.models.opt.configuration_opt import OPTConfig
    from transformers.models.opt.modeling_opt import OPTForCausalLM

    values = config.shape() | {
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "pad_token_id": None,
    }
    settings = OPTConfig(**values)
    # transformers initialises from the global generator; the fork leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_state)
        model: nn.Module = OPTForCausalLM(settings)
    return model


def load_model(folder: Path) -> "nn.Module":
    """Open a Hugging Face causal language model in float32, from safetensors only.

    Raises:
        ConfigError: If transformers cannot open the folder, or the weights are not all there.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _hide_progress_bars()
    opened: Any
    try:
        opened = AutoModelForCausalLM.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be opened as a causal language model: {error}") from error
    model: nn.Module = opened[0]
    missing = sorted(opened[1]["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise ConfigError(
            f"{folder} has no weights for {len(missing)} tensors of its model, such as {missing[0]}; "
            "save the whole causal language model again"
        )
    return model


def check_vocabulary(folder: Path, tokenizer: Encoder, context_length: int) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for, and a context longer than the model's.

    Raises:
        ConfigError: With both numbers.
    """
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = settings.get("text_config") or settings
    vocab_size = text.get("vocab_size")
    if isinstance(vocab_size, int) and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries but the seed model's vocabulary is {vocab_size}: "
            "they do not belong together; set tokenizer.path to the seed model's own tokenizer"
        )
    longest = text.get("max_position_embeddings") or text.get("n_positions")
    if isinstance(longest, int) and context_length > longest:
        raise ConfigError(
            f"context_length={context_length} is longer than the seed model's {longest} positions; "
            f"use at most {longest}"
        )


def save_model(model: "nn.Module", folder: Path) -> None:
    """Write a plain Hugging Face folder with safetensors, which `from_pretrained` opens."""
    from transformers import PreTrainedModel

    _hide_progress_bars()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    model.save_pretrained(str(folder))


def _hide_progress_bars() -> None:
    """Stop transformers from drawing bars of its own on stderr while it reads and writes weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
