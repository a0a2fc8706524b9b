"""The published shapes of OPT, by the name of their size.

A size is known by its layers, its widths and where its layer norms stand (Zhang et al., 2022, arXiv:2205.01068, table
1, for layers, heads and hidden size). The feed-forward layer is four times as wide as the others in all of them. 350m
is unlike its siblings: layer norms follow attention and feed-forward instead of preceding them, there is none after
the last layer, and words are embedded in 512 numbers that a matrix brings to the hidden size and back.

Shapes here are those of Hugging Face's OPTForCausalLM, whose head is the word embedding. The tokenizer has 50265
entries; the vocabulary was padded to 50272 before training. The table of positions has two rows more than positions,
because position p is row p + 2 (fairseq counts from after its padding index).
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cbtm.errors import ConfigError, DataError

POSITION_OFFSET = 2
PREFIX = "model.decoder."

_EMBEDDING, _POSITIONS = f"{PREFIX}embed_tokens.weight", f"{PREFIX}embed_positions.weight"
_FIRST_FEED_FORWARD = f"{PREFIX}layers.0.fc1.weight"
_LAYER = re.compile(re.escape(PREFIX) + r"layers\.(\d+)\.")


@dataclass(frozen=True)
class OptShape:
    """Shape of an OPT.

    Attributes:
        size: Published name such as "1.3b"; None if no published model has this shape.
        n_layers: Number of layers.
        hidden_size: Width of a layer.
        n_heads: Attention heads of a layer.
        feed_forward_size: Width of the feed-forward layer.
        embedding_size: Width of the word embedding and of the head.
        norm_first: Whether layer norms precede attention and feed-forward, and one follows the last layer.
        vocab_size: Rows of the word embedding, padding included.
        n_positions: Longest context, in tokens.
    """

    size: str | None
    n_layers: int
    hidden_size: int
    n_heads: int
    feed_forward_size: int
    embedding_size: int
    norm_first: bool = True
    vocab_size: int = 50272
    n_positions: int = 2048

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights of Hugging Face's OPTForCausalLM, without the tied head, in its order."""
        hidden, wide, narrow = self.hidden_size, self.feed_forward_size, self.embedding_size
        shapes: dict[str, tuple[int, ...]] = {
            _EMBEDDING: (self.vocab_size, narrow),
            _POSITIONS: (self.n_positions + POSITION_OFFSET, hidden),
        }
        if narrow != hidden:
            shapes |= {f"{PREFIX}project_out.weight": (narrow, hidden), f"{PREFIX}project_in.weight": (hidden, narrow)}
        if self.norm_first:
            shapes |= {f"{PREFIX}final_layer_norm.{kind}": (hidden,) for kind in ("weight", "bias")}
        for number in range(self.n_layers):
            layer = f"{PREFIX}layers.{number}."
            for name in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"):
                shapes |= {f"{layer}{name}.weight": (hidden, hidden), f"{layer}{name}.bias": (hidden,)}
            shapes |= {f"{layer}self_attn_layer_norm.{kind}": (hidden,) for kind in ("weight", "bias")}
            shapes |= {f"{layer}fc1.weight": (wide, hidden), f"{layer}fc1.bias": (wide,)}
            shapes |= {f"{layer}fc2.weight": (hidden, wide), f"{layer}fc2.bias": (hidden,)}
            shapes |= {f"{layer}final_layer_norm.{kind}": (hidden,) for kind in ("weight", "bias")}
        return shapes

    @property
    def n_parameters(self) -> int:
        """Numbers in the model; the head is the word embedding and counts once."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    def to_config(self) -> dict[str, Any]:
        """Arguments of transformers' OPTConfig that give this shape."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "ffn_dim": self.feed_forward_size,
            "max_position_embeddings": self.n_positions,
            "word_embed_proj_dim": self.embedding_size,
            "do_layer_norm_before": self.norm_first,
        }


def _published(size: str, n_layers: int, hidden_size: int, n_heads: int) -> OptShape:
    return OptShape(size, n_layers, hidden_size, n_heads, 4 * hidden_size, hidden_size)


_SHAPES = (
    _published("125m", 12, 768, 12),
    replace(_published("350m", 24, 1024, 16), embedding_size=512, norm_first=False),
    _published("1.3b", 24, 2048, 32),
    _published("2.7b", 32, 2560, 32),
    _published("6.7b", 32, 4096, 32),
    _published("13b", 40, 5120, 40),
    _published("30b", 48, 7168, 56),
    _published("66b", 64, 9216, 72),
)
OPT_SIZES = tuple(str(shape.size) for shape in _SHAPES)


def opt_shape(size: str) -> OptShape:
    """The published shape of a size: 125m, 350m, 1.3b, 2.7b, 6.7b, 13b, 30b or 66b.

    Raises:
        ConfigError: If no OPT of this size was published, with the nearest name.
    """
    for shape in _SHAPES:
        if shape.size == size.lower():
            return shape
    nearest = difflib.get_close_matches(size.lower(), OPT_SIZES, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(OPT_SIZES)}"
    raise ConfigError(f"there is no OPT of size {size!r}; {hint}")


def shape_of(shapes: Mapping[str, Sequence[int]], *, heads: int | None = None) -> OptShape:
    """Recognise an OPT by the shapes of its tensors.

    Attention heads leave no trace in the shapes: they come from `heads`, or from the published model of this shape.
    Vocabulary and positions may differ from the published ones.

    Args:
        shapes: Shape of each tensor, under Hugging Face's names.
        heads: Attention heads of a layer, where they are known.

    Raises:
        DataError: If tensors of an OPT are missing, unknown ones are there, or shapes contradict each other.
        ConfigError: If `heads` is needed and not given, or does not divide the hidden size.
    """
    for name in (_EMBEDDING, _POSITIONS, _FIRST_FEED_FORWARD):
        if len(shapes.get(name, ())) != 2:
            raise DataError(f"there is no matrix {name!r} among {len(shapes)} tensors; is it an OPT?")
    rows, hidden = shapes[_POSITIONS]
    if rows <= POSITION_OFFSET or hidden < 1:
        raise DataError(f"{_POSITIONS!r} has shape {(rows, hidden)}, which leaves no position; is it an OPT?")
    found = OptShape(
        size=None,
        n_layers=1 + max(int(match[1]) for match in map(_LAYER.match, shapes) if match),
        hidden_size=hidden,
        n_heads=1,
        feed_forward_size=shapes[_FIRST_FEED_FORWARD][0],
        embedding_size=shapes[_EMBEDDING][1],
        norm_first=f"{PREFIX}final_layer_norm.weight" in shapes,
        vocab_size=shapes[_EMBEDDING][0],
        n_positions=rows - POSITION_OFFSET,
    )
    _check_tensors(found, shapes)
    return _with_heads(found, heads)


def _check_tensors(found: OptShape, shapes: Mapping[str, Sequence[int]]) -> None:
    wanted = found.tensor_shapes()
    what = f"an OPT of {found.n_layers} layers and hidden size {found.hidden_size}"
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in wanted]
    if missing:
        raise DataError(f"{len(missing)} tensors of {what} are missing, such as {missing[0]!r}")
    if unknown:
        raise DataError(f"{len(unknown)} tensors are none of {what}, such as {unknown[0]!r}")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise DataError(f"{name!r} has shape {tuple(shapes[name])}, but {what} has {shape}")


def _with_heads(found: OptShape, heads: int | None) -> OptShape:
    for shape in _SHAPES:
        like = replace(shape, size=None, n_heads=1, vocab_size=found.vocab_size, n_positions=found.n_positions)
        if like == found and heads in (None, shape.n_heads):
            return replace(found, size=shape.size, n_heads=shape.n_heads)
    if heads is None:
        raise ConfigError(
            f"no published OPT has {found.n_layers} layers of {found.hidden_size}, and tensors do not tell the number "
            "of attention heads; give it as heads"
        )
    if heads < 1 or found.hidden_size % heads:
        raise ConfigError(f"heads={heads} does not divide the hidden size {found.hidden_size}; give the right number")
    return replace(found, n_heads=heads)
