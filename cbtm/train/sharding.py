"""How one model is spread over the ranks that train it: one interface, of which one device is the plainest case.

The trainer sees a loss to call, gradients to clip, an optimiser to step, and tensors under the model's own names for
checkpoints, which are therefore the same for every strategy and number of ranks. ddp and fsdp2 are PyTorch's own
(Li et al. 2020, arXiv 2006.15704; Zhao et al. 2023, arXiv 2304.11277); fairscale has a module of its own.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cbtm.errors import ConfigError
from cbtm.train.compiler import check_compiler
from cbtm.train.config import OptimizationConfig
from cbtm.train.loss import CausalLoss
from cbtm.train.ranks import Ranks

MODEL, MOMENTS = "model", ("exp_avg", "exp_avg_sq")


class LossModule(nn.Module):
    """Model and loss as one module: what a strategy wraps, so that its hooks see every pass through the model.

    Args:
        model: A Hugging Face causal language model.
        loss: Its loss, made before anything was wrapped.
    """

    def __init__(self, model: nn.Module, loss: CausalLoss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        *,
        n_targets: int,
        scores: bool = False,
    ) -> Tensor:
        """Sum of the losses of one micro-batch in nats, or (`scores`) the log-probability of each target."""
        function = self._loss.log_probs if scores else self._loss.sum_loss
        return function(inputs, targets, positions, segments, n_targets=n_targets)


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


def make_loss(model: nn.Module, config: OptimizationConfig) -> LossModule:
    """The loss, which looks at the model as it is: before anything is wrapped or compiled."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    loss = CausalLoss(model, fused=config.compile and on_gpu)
    if config.packing == "separate":
        loss.check_apart(config.context_length)
    return LossModule(model, loss)


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


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder: the entries of its longest list of modules that is in no other list.

    Raises:
        ConfigError: If the model has none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # A layer may hold a longer list than the decoder does, of the experts of a mixture.
    outer = [list(found) for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers to be sharded or compiled; use sharding=ddp, compile=false"
        )
    return max(outer, key=len)


def prepare(model: nn.Module, config: OptimizationConfig) -> None:
    """Switch on what trades time for memory, or compilation for speed.

    Raises:
        ConfigError: If the model cannot do without its activations.
    """
    from transformers import PreTrainedModel

    if config.activation_checkpointing:
        if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
            raise ConfigError(f"activation_checkpointing is not supported by {type(model).__name__}; switch it off")
        # transformers 5 calls it by the first name and warns about the second; 4 knows the second alone.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.compile:
        check_compiler(next(model.parameters()).device.type)
        # Layer by layer: that compiles one layer instead of all, and leaves the mask of the attention outside. While
        # a whole decoder is compiled, transformers makes one (before PyTorch 2.14), and attention takes twice as long.
        # The head is computed in chunks of its own.
        for layer in decoder_layers(model):
            layer.compile()


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay on matrices only."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in trained if one.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_epsilon, fused=True
    )
