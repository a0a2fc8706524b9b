"""How one model is spread over the ranks that train it: one interface, of which one device is the plainest case.

The trainer sees a loss to call, gradients to clip, an optimiser to step, and tensors under the model's own names for
checkpoints, which are therefore the same for every strategy and number of ranks. ddp and fsdp2 are PyTorch's own
(Li et al. 2020, arXiv 2006.15704; Zhao et al. 2023, arXiv 2304.11277); fairscale has a module of its own.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cbtm.train.config import OptimizationConfig
from cbtm.train.loss_module import MODEL, MOMENTS, LossModule, decoder_layers, make_loss, make_optimizer, prepare
from cbtm.train.ranks import Ranks


class WrappedScores:
    """Log-probabilities of a model that is spread over ranks; every rank must ask for as many."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, nothing is dropped out."""
        self._module.eval()
        try:
            yield
        finally:
            self._module.train()

    @torch.no_grad()
    def log_probs(self, inputs: Tensor, targets: Tensor, *, n_targets: int) -> Tensor:
        """As `CausalLoss.log_probs`."""
        scores: Tensor = self._module(inputs, targets, n_targets=n_targets, scores=True)
        return scores


class Sharding(Protocol):
    """One model over some ranks.

    Attributes:
        module: To be called in place of the `LossModule`.
        optimizer: Steps this rank's part of the weights.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def accumulate(self, *, last: bool) -> AbstractContextManager[object]:
        """Context of one forward and backward pass; gradients are averaged over the ranks by the end of the last."""
        ...

    def gradient_norm(self) -> Tensor:
        """Norm of the gradient of the whole model, scalar float32, equal on every rank."""
        ...

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply all gradients by a scalar."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Weights (`model/<name>`) and moments (`exp_avg/<name>`, `exp_avg_sq/<name>`), to be written or filled.

        Those that this rank has: whole, or as a DTensor. Moments that are not there yet are made, as zeros.
        """
        ...

    def adopt(self, tensors: dict[str, Tensor], optimizer_steps: int) -> None:
        """Go on from what `tensors` gave, after it has been filled."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimiser has taken."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state by name, on rank 0; empty elsewhere. Every rank must call it."""
        ...


def shard(model: nn.Module, config: OptimizationConfig, ranks: Ranks) -> Sharding:
    """Spread a model that lies on this rank's device over all ranks, as the configuration says.

    Raises:
        ConfigError: If the strategy cannot run here.
    """
    strategy = config.sharding
    if strategy == "auto":
        strategy = "none" if ranks.world_size == 1 else "ddp"
    if strategy == "fairscale":
        from cbtm.train.fairscale_sharding import FairscaleSharding

        return FairscaleSharding(model, config, ranks)
    loss = make_loss(model, config)
    prepare(model, config)
    if strategy == "fsdp2":
        return FullyShardedWeights(loss, config, ranks)
    return ReplicatedWeights(loss, config, ranks) if strategy == "ddp" else WholeModel(loss, config)


class WholeModel:
    """One rank, or the parts of a strategy that are as on one rank."""

    def __init__(self, loss: LossModule, config: OptimizationConfig) -> None:
        self.module: nn.Module = loss
        self._model = loss.model
        self.optimizer = make_optimizer(self._model.parameters(), config)

    def accumulate(self, *, last: bool) -> AbstractContextManager[object]:
        """Nothing to be done."""
        return nullcontext()

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]

    def gradient_norm(self) -> Tensor:
        """Norm over all weights."""
        return torch.nn.utils.get_total_norm(self._gradients())

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply in place."""
        torch._foreach_mul_(self._gradients(), factor)

    def tensors(self) -> dict[str, Tensor]:
        """The weights and moments themselves."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            found[f"{MODEL}/{name}"] = parameter.detach()
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            found |= {f"{moment}/{name}": state[moment] for moment in MOMENTS}
        return found

    def adopt(self, tensors: dict[str, Tensor], optimizer_steps: int) -> None:
        """The tensors are the weights and moments; the optimiser's count is beside them."""
        for _, parameter in self._trained():
            self.optimizer.state[parameter]["step"].fill_(optimizer_steps)

    @property
    def optimizer_steps(self) -> int:
        """The same for every weight: none is left out of a step."""
        return max((int(state["step"]) for state in self.optimizer.state.values()), default=0)

    def weights(self) -> dict[str, Tensor]:
        """The model's state."""
        return dict(self._model.state_dict())

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every weight once, tied ones under their first name."""
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)


class ReplicatedWeights(WholeModel):
    """ddp: every rank has the whole model and steps it alike; gradients are averaged while they are made."""

    def __init__(self, loss: LossModule, config: OptimizationConfig, ranks: Ranks) -> None:
        super().__init__(loss, config)
        device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
        self._ddp = DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)
        self.module, self._is_first = self._ddp, ranks.is_first

    def accumulate(self, *, last: bool) -> AbstractContextManager[object]:
        """Average over the ranks in the last pass only."""
        return nullcontext() if last else self._ddp.no_sync()

    def weights(self) -> dict[str, Tensor]:
        """Rank 0's copy, which is everyone's."""
        return super().weights() if self._is_first else {}


class FullyShardedWeights(WholeModel):
    """fsdp2: every rank holds a slice of each weight; a layer is gathered when it is needed, and let go."""

    def __init__(self, loss: LossModule, config: OptimizationConfig, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        low = None if config.precision == "float32" else getattr(torch, config.precision)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(ranks.device.type, (ranks.world_size,)),
            # Weights are gathered in the type that is computed in; gradients are summed in float32.
            "mp_policy": MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None),
        }
        for layer in decoder_layers(loss.model):
            fully_shard(layer, **settings)
        fully_shard(loss, **settings)
        super().__init__(loss, config)
        self._is_first = ranks.is_first

    def gradient_norm(self) -> Tensor:
        """Norm over all ranks' slices."""
        norm: Any = super().gradient_norm()
        whole: Tensor = norm.full_tensor()
        return whole

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        # After a pass without a backward one, as in validation, embeddings stand there whole, which the optimiser does
        # not know.
        module: Any = self.module
        module.reshard()
        return super()._trained()

    def weights(self) -> dict[str, Tensor]:
        """Gathered one tensor after the other, on the CPU of rank 0."""
        gathered: dict[int, Tensor] = {}  # a tied tensor stands there under two names
        found = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if id(tensor) not in gathered:
                whole = tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
                gathered[id(tensor)] = whole.cpu() if self._is_first else whole.new_empty(0)
            found[name] = gathered[id(tensor)]
        return found if self._is_first else {}
