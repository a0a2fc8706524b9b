"""fairscale's FullyShardedDataParallel: the sharding that the reference implementation trains with, on GPUs.

The weights of each decoder layer, and those outside of the layers, are one flat vector, of which every rank keeps an
equal part (ZeRO stage 3: Rajbhandari et al. 2020, arXiv 1910.02054). The parts do not end where weights do; so which
elements are a matrix's, and which weight they belong to, is found here from the shapes that fairscale recorded. It
is no longer developed: fsdp2 does the same within PyTorch, and this module alone knows fairscale.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from cbtm.errors import ConfigError
from cbtm.train.config import OptimizationConfig
from cbtm.train.loss_module import MODEL, MOMENTS, decoder_layers, make_loss, make_optimizer, prepare
from cbtm.train.ranks import Ranks


@dataclass(frozen=True)
class _Weight:
    """One of the model's weights, at elements `start` to `stop` of its group's flat vector."""

    name: str
    shape: torch.Size
    start: int
    stop: int

    def overlap(self, start: int, stop: int) -> tuple[slice, slice]:
        """What lies in elements `start` to `stop` of the vector: its place there, and in this weight laid out flat."""
        first = max(self.start, start)
        last = max(first, min(self.stop, stop))
        return slice(first - start, last - start), slice(first - self.start, last - self.start)


@dataclass(frozen=True)
class _Group:
    """Weights that are gathered together; `part` is this rank's part of their vector, on the last ranks padded."""

    part: nn.Parameter
    weights: tuple[_Weight, ...]
    rank: int

    def overlaps(self) -> Iterator[tuple[_Weight, slice, slice]]:
        """Each weight with what of it this rank has, which may be nothing: its place in the part, and in the weight."""
        start = self.rank * self.part.numel()
        for weight in self.weights:
            yield weight, *weight.overlap(start, start + self.part.numel())


class FairscaleSharding:
    """fairscale: every rank holds a part of each layer; a layer is gathered when it is needed, and let go.

    Gradients are reduced in each micro-batch, so that no rank ever holds all of them.

    Args:
        model: A Hugging Face causal language model in float32, on this rank's GPU.
        config: How it is trained.
        ranks: The ranks, at least two.

    Raises:
        ConfigError: If fairscale is not installed or cannot shard this model here.
    """

    def __init__(self, model: nn.Module, config: OptimizationConfig, ranks: Ranks) -> None:
        _check(model, config, ranks)
        wrap = _wrapper(config, ranks)
        loss = make_loss(model, config)
        prepare(model, config)
        names = _first_names(model)
        self._sources = _state_sources(model, names)
        layers = set(decoder_layers(model))
        for modules in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
            for number, layer in enumerate(modules):
                if layer in layers:
                    modules[number] = wrap(layer)
        self.module: nn.Module = wrap(loss)
        self._wrapped: list[Any] = [one for one in self.module.modules() if isinstance(one, type(self.module))]
        self._groups = [
            _Group(part, _weights_of(part, names), ranks.rank) for module in self._wrapped for part in module.params
        ]
        # A flat part is a vector, and AdamW decays none of those: the matrices in it are decayed by the hook.
        self.optimizer = make_optimizer(self.module.parameters(), config)
        self._weight_decay, self._ranks = config.weight_decay, ranks
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        if config.weight_decay:
            self.optimizer.register_step_pre_hook(self._decay)

    def accumulate(self, *, last: bool) -> AbstractContextManager[object]:
        """Each pass averages, and adds to this rank's part."""
        return nullcontext()

    def gradient_norm(self) -> Tensor:
        """Norm over all ranks' parts; their padding is 0."""
        # Squared in float64: a norm above 2e19 is none that overflows.
        squared = torch.nn.utils.get_total_norm(self._gradients()).double().square()
        dist.all_reduce(squared)
        return squared.sqrt().float()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply in place."""
        torch._foreach_mul_(self._gradients(), factor)

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights and moments as DTensors, each rank with its rows of every one, on its device."""
        from torch.distributed.tensor import Shard, distribute_tensor

        found: dict[str, Tensor] = {}
        for group in self._groups:
            for kind, part in self._parts(group):
                whole = self._gather(part)
                for weight in group.weights:
                    tensor = whole[weight.start : weight.stop].view(weight.shape)
                    # All ranks have the same: each takes its own rows, and nothing is sent.
                    found[f"{kind}/{weight.name}"] = distribute_tensor(
                        tensor, self._mesh, [Shard(0)], src_data_rank=None
                    )
        return found

    @torch.no_grad()
    def adopt(self, tensors: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take this rank's part of each tensor, gathered one after the other."""
        for group in self._groups:
            for kind, part in self._parts(group):
                for weight, here, of_weight in group.overlaps():
                    tensor: Any = tensors[f"{kind}/{weight.name}"]
                    part[here] = tensor.full_tensor().reshape(-1)[of_weight]
            self.optimizer.state[group.part]["step"].fill_(optimizer_steps)
        for module in self._wrapped:
            if module.has_full_params:  # gathered by a forward pass that no backward pass came after
                module._free_full_params()

    @property
    def optimizer_steps(self) -> int:
        """The same for every group: none is left out of a step."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def weights(self) -> dict[str, Tensor]:
        """Gathered one group after the other, on the CPU of rank 0."""
        found: dict[str, Tensor] = {}
        for group in self._groups:
            whole = self._gather(group.part.detach())
            for weight in group.weights if self._ranks.is_first else ():
                found[weight.name] = whole[weight.start : weight.stop].view(weight.shape).to("cpu", copy=True)
        if not self._ranks.is_first:
            return {}
        return {
            name: found[source] if isinstance(source, str) else getattr(*source).detach().cpu()
            for name, source in self._sources.items()
        }

    def _gradients(self) -> list[Tensor]:
        return [group.part.grad for group in self._groups if group.part.grad is not None]

    def _parts(self, group: _Group) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the weights of a group, and of their moments."""
        state = self.optimizer.state[group.part]
        part = group.part.detach()
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state |= {moment: torch.zeros_like(part) for moment in MOMENTS}
        yield MODEL, part
        yield from ((moment, state[moment]) for moment in MOMENTS)

    def _gather(self, part: Tensor) -> Tensor:
        whole = part.new_empty(part.numel() * self._ranks.world_size)
        # Older versions know it by the second name, newer ones warn of that.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(whole, part)
        return whole

    def _decay(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Decay the matrices before AdamW's step, as it does itself (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
        matrices = [
            group.part.detach()[here]
            for group in self._groups
            for weight, here, _ in group.overlaps()
            if len(weight.shape) >= 2
        ]
        torch._foreach_mul_(matrices, 1.0 - optimizer.param_groups[0]["lr"] * self._weight_decay)


def _check(model: nn.Module, config: OptimizationConfig, ranks: Ranks) -> None:
    _check_device(ranks)
    if ranks.world_size == 1:
        raise ConfigError("sharding=fairscale spreads a model over several GPUs, and devices=1; use sharding=none")
    if config.compile:
        raise ConfigError("sharding=fairscale does not go with compile=true; switch it off, or use sharding=fsdp2")
    layer_of = {inner: i for i, layer in enumerate(decoder_layers(model)) for inner in layer.modules()}
    used_in: dict[nn.Parameter, int | None] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(path, recurse=False):
            if not weight.requires_grad:
                raise ConfigError(f"{name} is not trained, and sharding=fairscale trains all weights; use sharding=ddp")
            layer = layer_of.get(module)
            if used_in.setdefault(weight, layer) != layer:
                raise ConfigError(f"{name} is tied to a weight of another layer; use sharding=ddp, not fairscale")


def _check_device(ranks: Ranks) -> None:
    # Its streams are made under CUDA alone, and it fails without them in the first pass.
    if ranks.device.type != "cuda":
        raise ConfigError(f"sharding=fairscale needs GPUs, and device is {ranks.device.type}; use fsdp2 or ddp")


def _wrapper(config: OptimizationConfig, ranks: Ranks) -> Callable[[nn.Module], Any]:
    """What shards the weights of a module that are not sharded yet."""
    try:
        from fairscale.nn.data_parallel import FullyShardedDataParallel
    except ImportError as error:
        raise ConfigError(
            "sharding=fairscale needs fairscale, which is not installed: pip install 'cbtm[train]'; or use fsdp2"
        ) from error
    low = None if config.precision == "float32" else getattr(torch, config.precision)
    settings: dict[str, Any] = {
        # The ranks' own group has their patience, which a new one has not; another one lets reducing overlap gathering.
        "process_group": dist.group.WORLD,
        "process_group_reduce_scatter": dist.new_group(),
        "compute_device": ranks.device,
        "bucket_cap_mb": 0,  # a group is large, and has one gradient: there is nothing to be put together
        # As fsdp2: gathered in the type that is computed in, so that nothing of a layer stays when it is let go
        # (autocast of float32 weights would keep a copy of each for the backward pass); summed in float32.
        "mixed_precision": low is not None,
        "fp32_reduce_scatter": low is not None,
        "compute_dtype": low,
        "buffer_dtype": torch.float32,  # positions' frequencies are not exact in less
    }
    return lambda module: FullyShardedDataParallel(module, **settings)


def _first_names(model: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """The name of each weight by the module and attribute where it stands; tied ones go by their first."""
    first = {id(weight): name for name, weight in model.named_parameters()}
    return {
        (module, attribute): first[id(weight)]
        for module in model.modules()
        for attribute, weight in module.named_parameters(recurse=False)
    }


def _state_sources(model: nn.Module, names: dict[tuple[nn.Module, str], str]) -> dict[str, str | tuple[nn.Module, str]]:
    """For each name of the model's state, the weight that it is, or the module and attribute of a buffer."""
    found: dict[str, str | tuple[nn.Module, str]] = {}
    for name in model.state_dict():
        path, _, attribute = name.rpartition(".")
        place = model.get_submodule(path), attribute
        found[name] = names.get(place, place)
    return found


def _weights_of(part: Any, names: dict[tuple[nn.Module, str], str]) -> tuple[_Weight, ...]:
    """The weights that fairscale laid into one vector, in order."""
    found, start = [], 0
    for (_, module, attribute), shape in zip(part._param_infos, part._param_shapes, strict=True):
        found.append(_Weight(names[module, attribute], shape, start, start + shape.numel()))
        start += shape.numel()
    return tuple(found)
