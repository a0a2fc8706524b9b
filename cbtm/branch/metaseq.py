"""metaseq OPT checkpoints: from what metaseq writes to a Hugging Face folder, for every size of OPT.

The reference implementation starts its experts from metaseq checkpoints and ends with them. Its own conversion is
bound to one size and one machine; here layers, widths and the place of the layer norms are read from the tensors, and
the attention heads, which leave no trace in them, from the checkpoint's settings or the published model of that shape.

Hugging Face's OPT computes what metaseq's does, so the conversion renames. Three things are no renaming: query, key
and value may be fused; the head is dropped, because it is the word embedding; and ids of <s>, <pad>, </s> and <unk>
are 0 to 3, of which </s> begins every document. Whatever would compute something else is refused. Element types are
kept. Weights are put together a file at a time, so memory holds about one output file of them.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cbtm import storage
from cbtm.branch.metaseq_shards import Checkpoint, LazyTensor, read_checkpoint
from cbtm.branch.seed import check_vocabulary
from cbtm.branch.shapes import PREFIX, OptShape, shape_of
from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import CbtmError, ConfigError, DataError, StorageError

logger = logging.getLogger(__name__)

FACTS_FILE = "import.json"

_HEAD, _EMBEDDING = "decoder.output_projection.weight", "decoder.embed_tokens.weight"
# Beginnings of names below "decoder." that are not the same in metaseq and in Hugging Face's OPT.
_RENAMED = {"layer_norm.": "final_layer_norm.", "project_in_dim.": "project_in.", "project_out_dim.": "project_out."}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Large files mean much memory, small ones many files; 66b becomes 66 of these.
_LARGEST_FILE = 2 * 1000**3
_BOS, _BOS_ID, _PAD_ID = "</s>", 2, 1
# Names in a given folder, and in the written one; metaseq calls the files of its byte-level BPE gpt2-*.
_TOKENIZER_FILES = {
    "gpt2-vocab.json": "vocab.json",
    "gpt2-merges.txt": "merges.txt",
    "vocab.json": "vocab.json",
    "merges.txt": "merges.txt",
    "tokenizer.json": "tokenizer.json",
    "tokenizer_config.json": "tokenizer_config.json",
    "special_tokens_map.json": "special_tokens_map.json",
}


def import_metaseq(
    source: Path, folder: Path, *, tokenizer: Path | None = None, heads: int | None = None
) -> dict[str, Any]:
    """Write a Hugging Face OPT folder with the weights of a metaseq checkpoint.

    The folder appears whole or not at all. It holds config.json, the weights as safetensors, the tokenizer if one is
    given, and import.json with what this function returns.

    Args:
        source: consolidated.pt or another whole checkpoint; a folder with the shards or model-parallel parts of one;
            or, where a folder holds several, the folder and the beginning of their names.
        folder: Folder to write; new or empty.
        tokenizer: Folder with OPT's tokenizer.json, or with vocab.json and merges.txt.
        heads: Attention heads of a layer, where the checkpoint does not say and no published OPT has its shape.

    Returns:
        Facts: "size" (published name, or None), "n_parameters", "n_layers", "hidden_size", "n_heads", "vocab_size",
        "n_positions", "dtype", "n_updates" (or None), "model_parts", "fsdp_shards", "replica_drift" and "files": name,
        bytes and sha256 of each.

    Raises:
        ConfigError: If there is no checkpoint or more than one, `folder` holds files already, `heads` is needed or
            wrong, or the tokenizer is not the model's.
        DataError: If the checkpoint is damaged, incomplete, holds code, or is no OPT.
        StorageError: If the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; name another, or remove it first")
    checkpoint = read_checkpoint(source)
    tensors = _renamed(checkpoint.tensors, source)
    shape = _shape(tensors, checkpoint.settings, heads, source)
    dtype = _dtype(tensors, source)
    with _appears_whole(folder) as partial:
        separator_id = _copy_tokenizer(tokenizer, partial) if tokenizer else _BOS_ID
        _write_config(shape, checkpoint.settings, dtype, separator_id, partial)
        if tokenizer:
            check_vocabulary(partial, TextTokenizer.load(partial), context_length=shape.n_positions)
        _write_weights({name: tensors[name] for name in shape.tensor_shapes()}, partial, _LARGEST_FILE)
        facts = _facts(checkpoint, shape, dtype)
        (partial / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    logger.info("imported OPT %s with %d parameters from %s", shape.size or "of no size", shape.n_parameters, source)
    return facts


def to_metaseq(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Hugging Face's OPTForCausalLM under the names that metaseq gives them.

    The inverse of the import, for one file without fused projections. The tensors are not copied.

    Args:
        state: `state_dict()` of the model; the tied head may be left out.

    Returns:
        What a metaseq checkpoint holds under "model": with the head, and the version of the format.

    Raises:
        DataError: If there are other tensors than those of an OPT, or the head is not the word embedding.
    """
    back = {new: old for old, new in _RENAMED.items()}
    weights = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    shape_of({name: tuple(tensor.shape) for name, tensor in weights.items()}, heads=1)
    named = {f"decoder.{_with_beginning(name.removeprefix(PREFIX), back)}": weights[name] for name in weights}
    embedding = named[_EMBEDDING]
    if not torch.equal(state.get("lm_head.weight", embedding), embedding):
        raise DataError("lm_head.weight is not the word embedding, and OPT has one matrix for both")
    return {**named, _HEAD: embedding, "decoder.version": torch.tensor([3.0])}


def _with_beginning(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _renamed(tensors: Mapping[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """Tensors under Hugging Face's names, without the head."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if (
        head is not None
        and embedding is not None
        and head is not embedding
        and not (head.shape == embedding.shape and torch.equal(head.read(), embedding.read()))
    ):
        raise DataError(f"{source}: {_HEAD} is not the word embedding, and OPT has one matrix for both")
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == _HEAD:
            continue
        if not name.startswith("decoder."):
            raise DataError(f"{source}: {name!r} is no tensor of a metaseq decoder; is it an OPT?")
        target = PREFIX + _with_beginning(name.removeprefix("decoder."), _RENAMED)
        if target in renamed:
            raise DataError(f"{source}: two tensors are {target!r}; the file is damaged")
        renamed[target] = tensor
    return renamed


def _shape(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], heads: int | None, source: Path) -> OptShape:
    recorded = settings.get("decoder_attention_heads")
    if heads is not None and recorded not in (None, heads):
        raise ConfigError(f"heads={heads}, but {source} was trained with {recorded}; leave heads out")
    try:
        shape = shape_of({name: tensor.shape for name, tensor in tensors.items()}, heads=heads or recorded)
    except CbtmError as error:
        raise type(error)(f"{source}: {error}") from None
    for name, wanted in {
        "decoder_layers": shape.n_layers,
        "decoder_normalize_before": shape.norm_first,
        "decoder_learned_pos": True,
        "share_decoder_input_output_embed": True,
        "activation_fn": "relu",
        "no_scale_embedding": True,
    }.items():
        if settings.get(name, wanted) != wanted:
            raise DataError(
                f"{source} was trained with {name}={settings[name]!r}, and an OPT with its tensors has {wanted!r}; "
                "the converted model would compute something else"
            )
    return shape


def _dtype(tensors: Mapping[str, LazyTensor], source: Path) -> torch.dtype:
    """The widest element type, which is what transformers opens the model in."""
    widest = torch.float16 if all(tensor.dtype == torch.float16 for tensor in tensors.values()) else torch.bfloat16
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise DataError(f"{source}: {name!r} holds {tensor.dtype}, not float16, bfloat16 or float32")
        widest = torch.promote_types(widest, tensor.dtype)
    return widest


@contextmanager
def _appears_whole(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place at the end, or goes after an error."""
    partial = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        if isinstance(error, CbtmError):
            raise
        raise StorageError(f"{folder} cannot be written: {error}; check space and permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_tokenizer(given: Path, folder: Path) -> int:
    """Copy the tokenizer's files, name its BOS where they do not, and return the BOS's id."""
    if not given.is_dir():
        raise ConfigError(f"{given} is not a folder; give the folder that holds the tokenizer's files")
    for name, target in _TOKENIZER_FILES.items():
        if (given / name).is_file():
            shutil.copyfile(given / name, folder / target)
    settings = folder / "tokenizer_config.json"
    if settings.exists() or (folder / "special_tokens_map.json").exists():
        return TextTokenizer.load(folder).separator_id
    names = {"bos_token": _BOS, "eos_token": _BOS, "unk_token": _BOS, "pad_token": "<pad>", "add_bos_token": True}
    whole = (folder / "tokenizer.json").is_file()
    names["tokenizer_class"] = "PreTrainedTokenizerFast" if whole else "GPT2Tokenizer"
    settings.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    try:
        separator_id = TextTokenizer.load(folder).separator_id
    except ConfigError as error:
        raise ConfigError(
            f"{given} is not the tokenizer of a metaseq model, whose documents begin with {_BOS}: {error}"
        ) from error
    if separator_id != _BOS_ID:
        raise ConfigError(
            f"{given}: {_BOS} has id {separator_id}, and metaseq's models have {_BOS_ID}; "
            "give the tokenizer that the model was trained with"
        )
    return separator_id


def _write_config(
    shape: OptShape, settings: Mapping[str, Any], dtype: torch.dtype, separator_id: int, folder: Path
) -> None:
    from transformers.models.opt.configuration_opt import OPTConfig

    OPTConfig(
        **shape.to_config(),
        # What Hugging Face's copies of the published models have, where the checkpoint does not say.
        dropout=settings.get("dropout", 0.1),
        attention_dropout=settings.get("attention_dropout", 0.0),
        bos_token_id=separator_id,
        eos_token_id=separator_id,
        pad_token_id=_PAD_ID,
        architectures=["OPTForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    ).save_pretrained(str(folder))


def _write_weights(tensors: Mapping[str, LazyTensor], folder: Path, largest_file: int) -> None:
    """Write safetensors files of at most `largest_file` bytes, unless one tensor is larger, and their index."""
    groups: list[list[str]] = []
    total = size = 0
    for name, tensor in tensors.items():
        n_bytes = tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        if not groups or size + n_bytes > largest_file:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size, total = size + n_bytes, total + n_bytes
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(files) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        save_file(_read({name: tensors[name] for name in names}), folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=1) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _read(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """Tensors each with a memory of its own, as safetensors wants them; one that has it already is not copied."""
    weights: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, lazy in tensors.items():
        tensor = lazy.read()
        memory = tensor.untyped_storage()
        if memory.nbytes() != tensor.nbytes or memory.data_ptr() in taken or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(tensor).all():
            raise DataError(f"{name!r} holds NaN or infinity; the checkpoint is of a run that diverged")
        taken.add(tensor.untyped_storage().data_ptr())
        weights[name] = tensor
    return weights


def _facts(checkpoint: Checkpoint, shape: OptShape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "size": shape.size,
        "n_parameters": shape.n_parameters,
        "n_layers": shape.n_layers,
        "hidden_size": shape.hidden_size,
        "n_heads": shape.n_heads,
        "vocab_size": shape.vocab_size,
        "n_positions": shape.n_positions,
        "dtype": str(dtype).removeprefix("torch."),
        "n_updates": checkpoint.n_updates,
        "model_parts": checkpoint.n_parts,
        "fsdp_shards": checkpoint.n_shards,
        "replica_drift": checkpoint.replica_drift,
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}
            for path in checkpoint.files
        ],
    }
