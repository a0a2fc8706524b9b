"""Checkpoints of a training run: everything that the next step depends on, safetensors and JSON, no pickle.

Each checkpoint is a folder with its own manifest, published whole; a torn one has no manifest and is passed over.
Below one URI lie the checkpoints of one training run, bound to it by the run's key: another configuration or other
data never resumes from them.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cbtm import manifest, storage
from cbtm.errors import ManifestError

logger = logging.getLogger(__name__)

_STAGE = "checkpoint"
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_RNG, _CUDA_RNG = "rng_state", "cuda_rng_state"


@dataclass(frozen=True)
class TrainState:
    """Progress beside the tensors.

    Attributes:
        step: Steps taken.
        curve: Points of the training curve so far.
        losses: Losses of the steps since its last point, which the next point is the mean of.
        seconds: Time of the steps so far.
        loss_scaling: State of the loss scaler of float16; empty for other precisions.
    """

    step: int
    curve: list[dict[str, float]]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    loss_scaling: dict[str, float] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints below one URI, newest kept.

    Args:
        uri: Folder or s3:// prefix of this training run's checkpoints.
        key: Identity of the training run.
        scratch: Local folder for building and fetching.
        keep: How many complete checkpoints stay.
    """

    def __init__(self, uri: str, *, key: str, scratch: Path, keep: int = 1) -> None:
        self.uri, self._key, self._scratch, self._keep = uri, key, scratch, keep

    def save(self, state: TrainState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Publish a checkpoint, then drop the older ones."""
        work = self._scratch / "saving"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in _unshared(model)}, work / _MODEL)
        save_file({**_optimizer_tensors(model, optimizer), **_rng_tensors(model)}, work / _OPTIMIZER)
        (work / _STATE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        manifest.publish(self._spec(state.step), work, {"step": state.step})
        shutil.rmtree(work, ignore_errors=True)
        # Later steps than this one are torn or of another training run: this one has just come from before them.
        steps = self._steps()
        usable = [step for step in steps if step <= state.step and self._is_complete(step)]
        for step in sorted(set(steps) - set(usable[-self._keep :])):
            self._remove(step)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
        """Load the newest complete checkpoint of this training run, or return None where there is none.

        Raises:
            ManifestError: If it is complete but of another model than `model`.
        """
        for step in reversed(self._steps()):
            spec = self._spec(step)
            try:
                found = manifest.load_if_there(spec.manifest_uri)
                if found is None or not manifest.is_current(spec, found):
                    continue
                folder = manifest.fetch(spec.root, found, found.paths(), self._scratch / "restoring")
            except ManifestError as error:
                logger.warning("checkpoint=%s passed over: %s", spec.root, error)
                continue
            state = _load(folder, model, optimizer)
            shutil.rmtree(self._scratch / "restoring", ignore_errors=True)
            return state
        return None

    def clear(self) -> None:
        """Remove all checkpoints: the finished model has been published."""
        for step in self._steps():
            self._remove(step)

    def _spec(self, step: int) -> manifest.StageSpec:
        return manifest.StageSpec(_STAGE, storage.join(self.uri, f"step-{step:08d}"), self._key)

    def _is_complete(self, step: int) -> bool:
        spec = self._spec(step)
        try:
            return manifest.is_current(spec, manifest.load_if_there(spec.manifest_uri))
        except ManifestError:
            return False

    def _steps(self) -> list[int]:
        names = {file.path.split("/")[0] for file in storage.list_files(self.uri)}
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def _remove(self, step: int) -> None:
        root = self._spec(step).root
        # The manifest goes first: a checkpoint that is half removed must not look whole.
        storage.delete(root, ["manifest.json"])
        storage.delete(root, [file.path for file in storage.list_files(root)])
        if not storage.is_s3(root):
            shutil.rmtree(storage.local_path(root), ignore_errors=True)


def _unshared(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers, each tensor once: tied weights are one tensor under several names."""
    seen: set[int] = set()
    tensors = []
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            tensors.append((name, tensor))
            seen.add(tensor.data_ptr())
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value.detach().cpu().contiguous()
    return tensors


def _rng_tensors(model: nn.Module) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    states = {_RNG: torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        states[_CUDA_RNG] = torch.cuda.get_rng_state(device)
    return states


def _load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    weights = load_file(folder / _MODEL)
    # Every tensor stands there once; a tied one is loaded under its first name and seen under the others.
    wanted, found = {name for name, _ in _unshared(model)}, set(weights)
    if wanted != found:
        raise ManifestError(
            f"the checkpoint {folder} is of another model: {len(wanted - found)} of its tensors are missing and "
            f"{len(found - wanted)} are unknown, such as {min(wanted ^ found)}; remove the checkpoint to start afresh"
        )
    model.load_state_dict(weights, strict=False)
    tensors = load_file(folder / _OPTIMIZER)
    torch.set_rng_state(tensors.pop(_RNG))
    cuda_rng = tensors.pop(_CUDA_RNG, None)
    if cuda_rng is not None and (device := next(model.parameters()).device).type == "cuda":
        torch.cuda.set_rng_state(cuda_rng, device)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition("/")
        by_parameter.setdefault(owner, {})[key] = tensor
    for name, parameter in model.named_parameters():
        if name in by_parameter:
            # The step count too: a fused optimiser keeps it beside the parameter.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in by_parameter[name].items()}
    values: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    return TrainState(**values)
