"""Weights of a metaseq checkpoint, put together from whatever files it was split into.

metaseq writes a checkpoint as one file; or one for each rank of fairscale's FullyShardedDataParallel, which holds a
stretch of long flat vectors and, as shard_metadata, the names and shapes within them; or one for each model-parallel
rank, which holds some rows or columns of each matrix, as Megatron cuts them; or both: shards of parts. The facts were
read in metaseq's stitch_fsdp_ckpt.py and fairscale's local_metadata_dict.

Files are mapped into memory and a tensor is put together when it is read, so a model of 66b needs the memory of the
tensors that are in use. They are read by torch's weights_only unpickler, which makes tensors and plain values.
argparse.Namespace is the one class allowed beside them, because metaseq keeps its settings in one; anything else
refuses the file.
"""

import argparse
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbtm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
_FLAT = re.compile(r"(.*\.)?flat_param_\d+")
# Buffers without weights: a number for the version of the format, and the dtype of sinusoidal positions.
_NO_WEIGHT = re.compile(r"(.*\.)?(version|_float_tensor)")
_FUSED = re.compile(r"(.*\.self_attn\.)(qkv_proj\.|in_proj_)(weight|bias)")
# metaseq's qkv_proj stacks key, value and query, despite its name; fairseq's in_proj query, key and value.
_ORDER = {"qkv_proj.": ("k_proj.", "v_proj.", "q_proj."), "in_proj_": ("q_proj.", "k_proj.", "v_proj.")}
# How Megatron cuts: column-parallel layers by output, row-parallel ones by input, embeddings by word. All else is
# replicated, biases of row-parallel layers included.
_CUT_BY_ROW = re.compile(
    r".*(\.[kvq]_proj\.(weight|bias)|\.fc1\.(weight|bias)|embed_tokens\.weight|projection\.weight)"
)
_CUT_BY_COLUMN = re.compile(r".*(\.out_proj\.weight|\.fc2\.weight)")
# Replicas are updated apart and drift by rounding; metaseq takes the first and logs the difference. Replicas of two
# checkpoints differ by about their own size.
_LARGEST_DRIFT = 0.1
# Settings that decide what a model computes; others, such as a rank, differ between the files of one checkpoint.
_SETTINGS = (
    *("decoder_layers", "decoder_attention_heads", "decoder_normalize_before", "decoder_learned_pos"),
    *("activation_fn", "no_scale_embedding", "share_decoder_input_output_embed", "dropout", "attention_dropout"),
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is put together when it is read.

    Attributes:
        shape: Its shape.
        dtype: Its element type.
        read: Gives the tensor, which may be a view of a mapped file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is there already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class Checkpoint:
    """A whole metaseq checkpoint.

    Attributes:
        tensors: Tensors under metaseq's names, with separate query, key and value projections.
        settings: What the checkpoint says of its model, of the settings that decide what it computes.
        files: Files it was read from.
        n_parts: Model-parallel parts.
        n_shards: FSDP shards of each part.
        n_updates: Optimiser steps that made it, if it says so.
        replica_drift: Largest difference between copies of a replicated tensor, relative to the tensor's largest
            element.
    """

    tensors: dict[str, LazyTensor]
    settings: dict[str, Any]
    files: tuple[Path, ...]
    n_parts: int
    n_shards: int
    n_updates: int | None
    replica_drift: float


@dataclass(frozen=True)
class _File:
    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any]
    settings: dict[str, Any]
    n_updates: int | None


def read_checkpoint(source: Path) -> Checkpoint:
    """Open a metaseq checkpoint and put its shards and parts together.

    Args:
        source: A file that is a checkpoint; a folder that holds one; or, where a folder holds several, the folder and
            the beginning of the names, such as `run/checkpoint_last`.

    Raises:
        ConfigError: If there is no checkpoint or more than one.
        DataError: If a file is missing, damaged or holds more than weights and settings, or the files do not belong
            together.
    """
    grid = _find(source)
    parts = [[_load(path) for path in shards] for shards in grid]
    files = [file for shards in parts for file in shards]
    for file in files[1:]:
        for what in ("n_updates", "settings"):
            first, other = getattr(files[0], what), getattr(file, what)
            if first != other:
                raise DataError(
                    f"{files[0].path.name} has {what}={first} and {file.path.name} has {other}: "
                    "they are of different checkpoints; keep the files of one"
                )
    tensors, drift = _stitch([_split_fused(_unflatten(shards), shards[0].path) for shards in parts], source)
    if drift:
        logger.warning(
            "replicated tensors of %s differ by %.2g of their size; the first part's are taken", source, drift
        )
    return Checkpoint(
        tensors=tensors,
        settings=files[0].settings,
        files=tuple(file.path for file in files),
        n_parts=len(parts),
        n_shards=len(parts[0]),
        n_updates=files[0].n_updates,
        replica_drift=drift,
    )


def _find(source: Path) -> list[list[Path]]:
    """Files of a checkpoint, by model-parallel part and then by shard."""
    match = _FILE.fullmatch(source.name)
    if source.is_file() and not (match and (match["part"] or match["shard"])):
        return [[source]]
    folder, stem = (source, None) if source.is_dir() else (source.parent, match["stem"] if match else source.name)
    groups: dict[str, dict[tuple[int | None, int | None], Path]] = {}
    for path in sorted(folder.glob("*.pt")):
        found = _FILE.fullmatch(path.name)
        if found and stem in (None, found["stem"]):
            part, shard = (None if found[name] is None else int(found[name]) for name in ("part", "shard"))
            groups.setdefault(found["stem"], {})[part, shard] = path
    if not groups:
        raise ConfigError(f"{source}: there is no metaseq checkpoint (*.pt) here; check the path")
    if len(groups) > 1:
        names = ", ".join(groups)
        raise ConfigError(f"{source} holds several checkpoints ({names}); name one, such as {source / min(groups)}")
    ((stem, group),) = groups.items()
    parts = _numbered((part for part, _ in group), f"the model parts of {stem}")
    shards = [_numbered((shard for one, shard in group if one == part), f"the shards of {stem}") for part in parts]
    if any(numbers != shards[0] for numbers in shards):
        counts = ", ".join(str(len(numbers)) for numbers in shards)
        raise DataError(f"the model parts of {stem} have {counts} shards; a file is missing, copy it again")
    return [[group[part, shard] for shard in shards[0]] for part in parts]


def _numbered(numbers: Iterable[int | None], what: str) -> list[int | None]:
    """[None] for what is not split, or 0, 1, ... without a gap."""
    found = set(numbers)
    if found == {None}:
        return [None]
    if None in found:
        raise ConfigError(f"{what} are there in one file and split over several; keep one of the two")
    there = sorted(number for number in found if number is not None)
    missing = sorted(set(range(there[-1] + 1)) - set(there))
    if missing:
        raise DataError(f"{what} are numbered to {there[-1]}, but {missing} are missing; copy them too")
    return list(there)


def _load(path: Path) -> _File:
    content = _read(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    state = content.get("model", content)
    if not isinstance(state, dict) or not state:
        raise DataError(f"{path} holds no state dict, neither as a whole nor under 'model'; is it a checkpoint?")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise DataError(f"{path}: {name!r} of the model is a {type(tensor).__name__}, not a dense tensor")
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    n_updates = last.get("num_updates") if isinstance(last, dict) else None
    settings = _plain(_plain(content.get("cfg")).get("model")) or _plain(content.get("args"))
    return _File(
        path,
        {name: tensor.detach() for name, tensor in state.items()},
        _plain(content.get("shard_metadata")),
        {name: settings[name] for name in _SETTINGS if isinstance(settings.get(name), bool | int | float | str)},
        n_updates if isinstance(n_updates, int) else None,
    )


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # before torch 1.6 a file was no zip archive, and cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged bytes raise anything, from KeyError to UnpicklingError
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise DataError(
                f"{path} holds {foreign[1]}, which is neither a tensor nor a plain value, and cbtm runs no code from a "
                "checkpoint; where it is a setting, save the checkpoint again without it"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} cannot be read as a torch checkpoint: {reason}; copy it again") from error


def _plain(value: object) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def _unflatten(shards: Sequence[_File]) -> dict[str, LazyTensor]:
    """Tensors of one model-parallel part, from its FSDP shards."""
    first = shards[0]
    if not any(file.metadata.get("param_metadata") for file in shards):
        flat = [name for name in first.tensors if _FLAT.fullmatch(name)]
        if flat or len(shards) > 1:
            raise DataError(
                f"{first.path} is a shard without shard_metadata, so its flat parameters cannot be told apart; "
                "consolidate it with the metaseq that wrote it"
            )
        return {name: LazyTensor.of(tensor) for name, tensor in first.tensors.items()}
    try:
        return _from_metadata(shards)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(
            f"{first.path}: its shard_metadata is not what fairscale writes ({type(error).__name__}: {error})"
        ) from error


def _from_metadata(shards: Sequence[_File]) -> dict[str, LazyTensor]:
    first = shards[0]
    tensors: dict[str, LazyTensor] = {}
    seen: set[str] = set()
    aliases: list[tuple[str, str, str]] = []
    for number, module in enumerate(first.metadata["param_metadata"]):
        prefix = f"{module['fsdp_path']}." if module["fsdp_path"] else ""
        for flat_name, layout in module["params"].items():
            others = [file.metadata["param_metadata"][number]["params"].get(flat_name) for file in shards]
            tensors |= _pieces(shards, prefix, flat_name, layout, others)
            seen.add(prefix + flat_name)
        aliases += [(prefix, old, new) for old, new in module.get("shared_param_info", ())]
    for name in first.metadata.get("buffer_names", ()):
        if name in first.tensors:
            tensors[name] = LazyTensor.of(first.tensors[name])
            seen.add(name)
    for prefix, old, new in aliases:
        # fairscale names both sides from the wrapped module on, but looks them up from the root.
        base = prefix if prefix + old in tensors else ""
        if base + old not in tensors:
            raise DataError(f"{first.path}: {new!r} is shared with {old!r}, which is not there; the file is damaged")
        tensors[base + new] = tensors[base + old]
    rest = sorted(set(first.tensors) - seen)
    if rest:
        raise DataError(f"{first.path}: shard_metadata does not tell what {rest[0]!r} is; is it from another file?")
    return tensors


def _pieces(
    shards: Sequence[_File], prefix: str, flat_name: str, layout: Mapping[str, Any], others: Sequence[Any]
) -> dict[str, LazyTensor]:
    """Tensors within one flat vector that is cut over the shards."""
    names, shapes, sizes = layout["names"], [tuple(shape) for shape in layout["shapes"]], layout["numels"]
    vectors = []
    for file, other in zip(shards, others, strict=True):
        if other is None or any(other[key] != layout[key] for key in ("names", "shapes", "numels")):
            raise DataError(
                f"{shards[0].path.name} and {file.path.name} divide {prefix + flat_name!r} differently: "
                "they are of different checkpoints; keep the files of one"
            )
        vector = file.tensors.get(prefix + flat_name)
        if vector is None:
            raise DataError(f"{file.path} has no {prefix + flat_name!r}, which its shard_metadata names")
        padding = other["padding"]
        if vector.dim() != 1 or not 0 <= padding <= len(vector):
            raise DataError(f"{file.path}: {prefix + flat_name!r} of shape {tuple(vector.shape)} has padding {padding}")
        vectors.append(vector[: len(vector) - padding])
    length = sum(map(len, vectors))
    if length != sum(sizes) or [math.prod(shape) for shape in shapes] != list(sizes):
        raise DataError(
            f"{prefix + flat_name!r} has {sum(sizes)} numbers, but {len(shards)} shards from {shards[0].path.name} on "
            f"hold {length}: a shard is missing, or one is of another checkpoint"
        )
    tensors, start = {}, 0
    for name, shape, size in zip(names, shapes, sizes, strict=True):
        read = partial(_gather, vectors, start, size, shape)
        tensors[prefix + name] = LazyTensor(shape, vectors[0].dtype, read)
        start += size
    return tensors


def _gather(vectors: Sequence[Tensor], start: int, size: int, shape: tuple[int, ...]) -> Tensor:
    """Elements [start, start + size) of the vectors laid end to end, in `shape`."""
    found, begin = [], 0
    for vector in vectors:
        low, high = max(start - begin, 0), min(start + size - begin, len(vector))
        if low < high:
            found.append(vector[low:high])
        begin += len(vector)
    return (torch.cat(found) if len(found) != 1 else found[0]).view(shape)


def _split_fused(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
    """Separate query, key and value, part by part: each model-parallel part stacks its own three."""
    split: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if _NO_WEIGHT.fullmatch(name):
            continue
        targets = [match[1] + projection + match[3] for projection in _ORDER[match[2]]] if match else [name]
        if any(target in split for target in targets):
            raise DataError(f"{path}: {targets[0]!r} is there twice, fused and separate; the file is damaged")
        if not match:
            split[name] = tensor
            continue
        if not tensor.shape or tensor.shape[0] % 3:
            raise DataError(
                f"{path}: {name!r} of shape {tensor.shape} is not query, key and value on top of each other"
            )
        for number, target in enumerate(targets):
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            split[target] = LazyTensor(shape, tensor.dtype, partial(_third, tensor, number))
    return split


def _third(tensor: LazyTensor, number: int) -> Tensor:
    return tensor.read().chunk(3)[number]


def _stitch(parts: Sequence[Mapping[str, LazyTensor]], source: Path) -> tuple[dict[str, LazyTensor], float]:
    """One model from model-parallel parts, and the drift of what they replicate."""
    if len(parts) == 1:
        return dict(parts[0]), 0.0
    largest = 0.0
    stitched: dict[str, LazyTensor] = {}
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            name = sorted(part.keys() ^ parts[0].keys())[0]
            raise DataError(f"{source}: model parts 0 and {number} do not both have {name!r}; keep the files of one")
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        dim = 0 if _CUT_BY_ROW.fullmatch(name) else 1 if _CUT_BY_COLUMN.fullmatch(name) else None
        if dim is None:
            drift = _drift(pieces)
            if not drift <= _LARGEST_DRIFT:  # nor NaN
                raise DataError(
                    f"{source}: model parts have different copies of {name!r} (by {drift:.2g} of its size): "
                    "they are of different checkpoints; keep the files of one"
                )
            largest = max(largest, drift)
            stitched[name] = pieces[0]
        else:
            stitched[name] = _joined(pieces, dim, f"{source}: {name!r}")
    return stitched, largest


def _drift(copies: Sequence[LazyTensor]) -> float:
    if len({copy.shape for copy in copies}) > 1:
        return math.inf
    first = copies[0].read().float()
    others = [copy.read().float() for copy in copies[1:]]
    difference = max(float((other - first).abs().max()) for other in others)
    return difference / max(float(copy.abs().max()) for copy in (first, *others)) if difference else 0.0


def _joined(pieces: Sequence[LazyTensor], dim: int, what: str) -> LazyTensor:
    shapes = [piece.shape for piece in pieces]
    if len(shapes[0]) <= dim or len(set(shapes)) > 1:
        raise DataError(f"{what} has shapes {shapes} in the model parts, which should be equal; keep the files of one")
    shape = tuple(size * len(pieces) if axis == dim else size for axis, size in enumerate(shapes[0]))
    return LazyTensor(shape, pieces[0].dtype, lambda: torch.cat([piece.read() for piece in pieces], dim))
