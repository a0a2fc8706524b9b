"""Cluster tokens: one token for each cluster, which a model can be given in front of a block to say which domain it is.

Their ids follow the tokenizer's last one, because the tokenizers library counts and leaves no gap. A published model
often has rows beyond its tokenizer, padding to a round number that no training has touched; the tokens take those
first, and rows are added only for what is left. Every such row begins as the mean of the rows in use, which makes a
new token as likely as an average one, whatever stood there.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from cbtm.branch.tokenizer import TextTokenizer
from cbtm.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def cluster_token(cluster: int) -> str:
    """Spelling of a cluster's token; text that spells it is text like any other."""
    return f"<|cluster-{cluster}|>"


def add_cluster_tokens(source: Path, target: Path, n_clusters: int) -> int:
    """Write the tokenizer of the folder `source` to the folder `target`, with a token for each cluster.

    Returns:
        Id of the token of cluster 0, which is the size of the vocabulary without them; the others follow it.

    Raises:
        ConfigError: If the tokenizer has gaps between its ids or knows such tokens already.
    """
    tokenizer = TextTokenizer.load(source)
    tokenizer.save(target)
    path = target / "tokenizer.json"
    grown = Tokenizer.from_file(str(path))
    names = [cluster_token(cluster) for cluster in range(n_clusters)]
    first = tokenizer.vocab_size
    if known := [name for name in names if grown.token_to_id(name) is not None]:
        raise ConfigError(f"the tokenizer in {source} has a token {known[0]} already; take one without cluster tokens")
    grown.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if [grown.token_to_id(name) for name in names] != list(range(first, first + n_clusters)):
        raise ConfigError(
            f"the tokenizer in {source} has {grown.get_vocab_size() - n_clusters} entries with ids up to {first - 1}: "
            "there are gaps, and cluster tokens cannot be added behind them; train without cluster tokens"
        )
    grown.save(str(path))
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["additional_special_tokens"] = names
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return first


def extend_vocabulary(model: "nn.Module", n_tokens: int, *, first_id: int) -> int:
    """Give a model the tokens `first_id` to `first_id + n_tokens - 1`, in input embedding and head, tied or not.

    Their rows become the mean of the rows before `first_id`, taken in float64; no random number is drawn. Rows that are
    lacking are added, and the configuration's vocab_size follows.

    Args:
        model: A transformers model.
        n_tokens: New tokens.
        first_id: Id of the first one, the size of the tokenizer's vocabulary.

    Returns:
        Rows that were added; 0 if the model had enough.

    Raises:
        ConfigError: If the model has fewer rows than `first_id`.
    """
    import torch
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    weight: Any = model.get_input_embeddings().weight
    n_rows = int(weight.shape[0])
    if first_id > n_rows:
        raise ConfigError(f"the tokenizer has {first_id} entries but the model's vocabulary is {n_rows}")
    added = max(0, first_id + n_tokens - n_rows)
    if added:
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        # transformers fills the new rows with random numbers, which are overwritten below.
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            model.resize_token_embeddings(n_rows + added, mean_resizing=False)
    grown: Any = model
    layers = (grown.get_input_embeddings(), grown.get_output_embeddings())
    with torch.no_grad():
        for tensor in (getattr(layer, name, None) for layer in layers for name in ("weight", "bias")):
            if tensor is not None:  # a tied head is filled twice with the same
                mean = tensor[:first_id].mean(dim=0, dtype=torch.float64)
                tensor[first_id : first_id + n_tokens] = mean.to(tensor.dtype)
    return added
