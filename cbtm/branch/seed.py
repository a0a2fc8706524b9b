"""The seed model: a Hugging Face causal language model that every expert starts from.

Either a given one (weights as safetensors only), or one that is trained from scratch: an OPT built from a few sizes,
or whatever causal language model a config.json describes. Dropout is set in the configuration, before a model is
made of it, because an architecture may read it there or copy it into its layers.
transformers is imported where a model is made, because it takes seconds.
"""

import difflib
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from cbtm import storage
from cbtm.branch.shapes import opt_shape
from cbtm.config import Config, digest_of
from cbtm.errors import ConfigError
from cbtm.tokens import Encoder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "generation_config.json", WEIGHTS, f"{WEIGHTS}.index.json")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Keys of a config.json that say where a model came from and how it was stored, not what it is.
_NOT_SHAPE = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype"),
    "transformers_version",
)
_DROPOUT = re.compile(r"dropout|pdrop")
# Dropout of heads that no causal language model has, and of adapters.
_OTHER_DROPOUT = re.compile(r"classifier|summary|lora")
# The reference has none on embeddings and within the feed-forward layer.
_WITHOUT_DROPOUT = re.compile(r"emb|activation")
# Rows that a model has beyond its tokenizer are padding to a round number, up to about this part of them.
_PADDING = 0.05, 128


class ScratchModelConfig(Config):
    """Shape of a model that is trained from scratch: an OPT, unless a file says what else.

    Attributes:
        size: A published size (125m, 350m, 1.3b, 2.7b, 6.7b, 13b, 30b, 66b) instead of the four numbers below.
        config: A config.json (local or s3://) of a causal language model that transformers knows, such as llama, qwen2,
            gpt_neox or gpt2, instead of the four numbers. Vocabulary size and separator come from the tokenizer.
        hidden_size: Width of a layer.
        n_layers: Number of layers.
        n_heads: Attention heads of a layer.
        feed_forward_ratio: Width of the feed-forward layer over `hidden_size`.
        dropout: Dropout on attention weights and on the output of attention and feed-forward layers, as far as the
            architecture has them; a config file's own values do not count.
        random_state: Seed of the initial weights.
    """

    size: str | None = None
    config: str | None = None
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
            if self.config is not None:
                raise ValueError(f"size={self.size} and config={self.config}: give one of them")
        for source in ("size", "config"):
            for name in ("hidden_size", "n_layers", "n_heads", "feed_forward_ratio"):
                given, number = getattr(self, source), getattr(self, name)
                if given is not None and number != type(self).model_fields[name].default:
                    raise ValueError(f"{source}={given} and {name}={number}: give a {source} or numbers")
        return self

    def result_digest(self) -> str:
        """Digest of what the initial weights depend on: of a config file the content, and not where it lies.

        Raises:
            StorageError: If the config file cannot be read.
        """
        own = digest_of(self.model_dump(mode="json", exclude={"config"}))
        return own if self.config is None else digest_of([own, hashlib.sha256(_content(self.config)).hexdigest()])

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


def model_files(names: Sequence[str], path: str | None = None) -> list[str]:
    """Files of a model folder that a seed is made of, sorted; `path` names it in errors.

    Raises:
        ConfigError: If there is no configuration, or the weights are not safetensors.
    """
    where = "the seed model's folder" if path is None else f"the seed model {path}"
    if "config.json" not in names:
        raise ConfigError(f"{where} has no config.json; seed_model.path takes a Hugging Face folder")
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if not weights:
        raise ConfigError(
            f"{where} has no *.safetensors weights; pickled weights are not read: save the model again with "
            "save_pretrained(safe_serialization=True), or name a revision that has them"
        )
    # Some folders hold the weights twice, once for other software; transformers opens these.
    shards = [name for name in weights if _SHARD.fullmatch(name)]
    weights = [WEIGHTS] if WEIGHTS in weights else shards or weights
    return sorted({name for name in names if name in MODEL_FILES} | set(weights))


def create_model(config: ScratchModelConfig, *, vocab_size: int, separator_id: int, context_length: int) -> "nn.Module":
    """Build a model with random weights, the same ones for the same seed.

    Raises:
        ConfigError: If a config file is not that of a causal language model, or has fewer positions than
            `context_length`.
        StorageError: If it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from_config: Any = AutoModelForCausalLM.from_config
    settings = _opt(config, context_length) if config.config is None else _described(config, context_length)
    settings.vocab_size = vocab_size
    settings.bos_token_id = settings.eos_token_id = separator_id
    settings.pad_token_id = None
    # transformers initialises from the global generator; the fork leaves the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.random_state)
        try:
            model: nn.Module = from_config(settings, dtype=torch.float32, trust_remote_code=False)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            if config.config is None:
                raise
            raise ConfigError(f"no model can be made of {config.config}: {_one_line(error)}") from error
    return model


def check_scratch(config: ScratchModelConfig, context_length: int) -> None:
    """Refuse a config file that no causal language model can be made of; the architecture where transformers is there.

    Raises:
        ConfigError: If it is not JSON, or as `create_model`.
        StorageError: If it cannot be read.
    """
    if config.config is None:
        return
    _check_positions(_settings(config.config), context_length)
    if importlib.util.find_spec("transformers") is not None:
        _described(config, context_length)


def _opt(config: ScratchModelConfig, context_length: int) -> "PretrainedConfig":
    from transformers.models.opt.configuration_opt import OPTConfig

    values = config.shape() | {
        "max_position_embeddings": context_length,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
    }
    return OPTConfig(**values)


def _described(config: ScratchModelConfig, context_length: int) -> "PretrainedConfig":
    """What the config file says, without vocabulary."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    source = str(config.config)
    values = _settings(source)
    _check_positions(values, context_length)
    kind = str(values.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        nearest = difflib.get_close_matches(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=1, cutoff=0.7)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "use llama, qwen2, gpt_neox, gpt2, opt or another"
        raise ConfigError(f"{source}: model_type {kind!r} is no causal language model of transformers; {hint}")
    try:
        made: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(
            {name: value for name, value in values.items() if name not in _NOT_SHAPE}
        )
        whole = made.get_text_config() is made and not {"vision_config", "audio_config"} & vars(made).keys()
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"{source} cannot be read as the configuration of a {kind}: {_one_line(error)}") from error
    if not whole:
        raise ConfigError(f"{source}: {kind} reads more than text; give the configuration of its text model alone")
    decoder = getattr(made, "is_decoder", False)
    if made.is_encoder_decoder or (kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder):
        raise ConfigError(f"{source}: {kind} has an encoder, which sees later tokens; use a decoder such as llama")
    set_dropout(made, config.dropout)
    return made


def _settings(uri: str) -> dict[str, Any]:
    try:
        values = json.loads(_content(uri))
    except ValueError as error:
        raise ConfigError(f"{uri} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{uri}: expected the JSON object of a config.json, got {type(values).__name__}")
    return values


@cache
def _content(uri: str) -> bytes:
    return storage.read_bytes(uri)


def set_dropout(config: "PretrainedConfig", rate: float) -> list[str]:
    """Set every dropout probability in a configuration, before a model is made of it.

    Attention weights and the output of attention and feed-forward layers get `rate`; embeddings and activations within
    a feed-forward layer get none, as in the reference implementation. What the architecture has no setting for, it
    does not drop: Llama and Qwen2 have dropout on attention weights alone.

    Returns:
        Names of the settings that got `rate`.

    Raises:
        ConfigError: If there is no such setting, and `rate` is not 0.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        found = _set_dropout(config.get_text_config(decoder=True), rate)
    except (StrictDataclassError, ValueError) as error:
        kind = config.model_type
        raise ConfigError(f"dropout={rate} cannot be set for model_type {kind!r}: {_one_line(error)}") from error
    if not found and rate:
        raise ConfigError(f"dropout={rate}, but model_type {config.model_type!r} has no dropout; leave it out")
    return found


def _set_dropout(config: "PretrainedConfig", rate: float) -> list[str]:
    from transformers import PretrainedConfig

    found = []
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            found += [f"{name}.{inner}" for inner in _set_dropout(value, rate)]
        elif (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and _DROPOUT.search(name)
            and not _OTHER_DROPOUT.search(name)
        ):
            without = _WITHOUT_DROPOUT.search(name) is not None
            if value != (wanted := 0.0 if without else rate):
                setattr(config, name, wanted)
            found += [] if without else [name]
    return found


def load_model(folder: Path, dropout: float | None = None) -> "nn.Module":
    """Open a Hugging Face causal language model in float32, from safetensors only.

    Args:
        folder: The model's folder.
        dropout: Dropout as `set_dropout` sets it, effective in training mode; None keeps the folder's own. A model
            that is saved afterwards has it in its config.json, which says so what it was trained with.

    Raises:
        ConfigError: If transformers cannot open the folder, the weights are not all there, or the architecture has no
            dropout.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    _hide_progress_bars()
    opened: Any
    changed: dict[str, Any] = {}
    try:
        if dropout is not None:
            settings = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            logger.info("dropout=%s sets %s", dropout, ", ".join(set_dropout(settings, dropout)) or "nothing")
            changed["config"] = settings
        opened = AutoModelForCausalLM.from_pretrained(
            str(folder),
            **changed,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ConfigError(f"{folder} cannot be opened as a causal language model: {_one_line(error)}") from error
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
    vocab_size = (settings.get("text_config") or settings).get("vocab_size")
    if isinstance(vocab_size, int) and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries but the seed model's vocabulary is {vocab_size}: "
            "they do not belong together; set tokenizer.path to the seed model's own tokenizer"
        )
    part, rows = _PADDING
    if isinstance(vocab_size, int) and vocab_size > (1 + part) * tokenizer.vocab_size + rows:
        logger.warning(
            "the seed model's vocabulary is %d but the tokenizer has %d entries only: more than padding; is it the "
            "seed model's own?",
            vocab_size,
            tokenizer.vocab_size,
        )
    _check_positions(settings, context_length)


def _check_positions(settings: Mapping[str, Any], context_length: int) -> None:
    text = settings.get("text_config") or settings
    longest = text.get("max_position_embeddings") or text.get("n_positions")
    if isinstance(longest, int) and context_length > longest:
        raise ConfigError(
            f"context_length={context_length} is longer than the seed model's {longest} positions; "
            f"use at most {longest}"
        )


def save_model(model: "nn.Module", folder: Path, weights: Mapping[str, Any] | None = None) -> None:
    """Write a plain Hugging Face folder with safetensors, which `from_pretrained` opens.

    Args:
        model: A transformers model.
        folder: Where to.
        weights: Its state, where the model itself holds only a part of it.
    """
    from transformers import PreTrainedModel

    _hide_progress_bars()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    model.save_pretrained(str(folder), state_dict=None if weights is None else dict(weights))


def save_weights(weights: Mapping[str, Any], folder: Path) -> None:
    """Write tensors beside a model's configuration: one safetensors file, or shards with an index where it is large."""
    from huggingface_hub import save_torch_state_dict

    stem, _, suffix = WEIGHTS.rpartition(".")
    save_torch_state_dict(dict(weights), folder, filename_pattern=f"{stem}{{suffix}}.{suffix}", max_shard_size="5GB")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _hide_progress_bars() -> None:
    """Stop transformers from drawing bars of its own on stderr while it reads and writes weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
