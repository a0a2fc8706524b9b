"""What a strategy spreads over ranks: model and loss as one module, prepared for training, and its optimiser."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cbtm.errors import ConfigError
from cbtm.train.compiler import check_compiler
from cbtm.train.config import OptimizationConfig
from cbtm.train.loss import CausalLoss

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


def make_loss(model: nn.Module, config: OptimizationConfig) -> LossModule:
    """The loss, which looks at the model as it is: before anything is wrapped or compiled."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    loss = CausalLoss(model, fused=config.compile and on_gpu)
    if config.packing == "separate":
        loss.check_apart(config.context_length)
    return LossModule(model, loss)


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
