"""A model out of a checkpoint: a plain Hugging Face folder, from whatever number of ranks has written it.

A training that ends leaves such a folder by itself; this is for looking at one that has not ended, or that failed.
"""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cbtm import manifest, storage
from cbtm.branch.seed import WEIGHTS, load_model, save_model
from cbtm.branch.tokenizer import TOKENIZER_FILES
from cbtm.errors import ConfigError, ManifestError
from cbtm.train.checkpoint import checkpoint_shapes, fetch_checkpoint, load_checkpoint
from cbtm.train.job import EXPERT_FILE
from cbtm.train.loss_module import MODEL

_STEP = re.compile(r"step-\d+")


def consolidate(uri: str, folder: Path) -> dict[str, Any]:
    """Write the model of a checkpoint.

    Args:
        uri: One checkpoint (`…/step-00000200`), or the folder of a training's checkpoints, of which the newest complete
            one is taken; local or s3://.
        folder: Hugging Face folder to write; must be empty or not there.

    Returns:
        The content of its expert.json.

    Raises:
        ConfigError: If `folder` holds something.
        ManifestError: If there is no complete checkpoint, or it holds what a checkpoint does not, such as a pickle.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not an empty folder")
    root = _newest(uri)
    with tempfile.TemporaryDirectory(prefix="cbtm-consolidate-") as scratch:
        found = fetch_checkpoint(root, manifest.load(storage.join(root, "manifest.json")), Path(scratch))
        shapes = checkpoint_shapes(found)
        tensors = {name: torch.empty(shape) for name, shape in shapes.items() if name.startswith(f"{MODEL}/")}
        state = load_checkpoint(found, tensors, of_all=False)
        weights = {name.removeprefix(f"{MODEL}/"): tensor for name, tensor in tensors.items()}
        plain = Path(scratch, "model")
        plain.mkdir()
        save_file(weights, plain / WEIGHTS, metadata={"format": "pt"})
        for path in found.glob("*config.json"):  # of the model, of its generation
            shutil.copyfile(path, plain / path.name)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(load_model(plain), folder)
        for name in TOKENIZER_FILES:
            shutil.copyfile(found / name, folder / name)
        facts = json.loads((found / EXPERT_FILE).read_text(encoding="utf-8"))
    facts |= {"steps": state.step, "tokens_seen": state.tokens, "checkpoint": root}
    (folder / EXPERT_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return dict(facts)


def _newest(uri: str) -> str:
    if storage.exists(storage.join(uri, "manifest.json")):
        return uri
    names = {file.path.split("/")[0] for file in storage.list_files(uri)}
    for name in sorted((name for name in names if _STEP.fullmatch(name)), reverse=True):
        root = storage.join(uri, name)
        if storage.exists(storage.join(root, "manifest.json")):
            return root
    raise ManifestError(f"{uri} holds no complete checkpoint; expected …/checkpoints/<member>, or a step-… below it")
