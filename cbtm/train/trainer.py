"""The training loop: one causal language model, one stream of tokens, a fixed number of steps.

Seed model, expert, dense baseline and random-cluster control all run through here, so that they differ in nothing
but their data and their share of the batch. After a kill the loop goes on from its newest checkpoint and follows,
to the bit on one device type and thread count, the losses of a run that was never interrupted.
"""

import logging
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbtm.errors import CbtmError, ConfigError, Interrupted
from cbtm.train.checkpoint import Checkpoints, TrainState
from cbtm.train.config import OptimizationConfig
from cbtm.train.data import BlockOrder
from cbtm.train.loss import CausalLoss
from cbtm.train.schedule import learning_rate

logger = logging.getLogger(__name__)

_LEAST_LOSS_SCALE = 2.0**-14  # below this a loss of 1 is no normal number of float16

Report = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class TrainResult:
    """What training leaves besides the model: tokens seen, passes over the data, time, device, and the curve."""

    tokens: int
    epochs: float
    seconds: float
    device: str
    curve: list[dict[str, float]]


class DivergedError(CbtmError):
    """The loss or its gradient is no longer a finite number."""


def choose_device(name: str) -> torch.device:
    """Resolve `auto` to a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def train(
    model: nn.Module,
    order: BlockOrder,
    config: OptimizationConfig,
    *,
    sequences_per_step: int,
    checkpoints: Checkpoints,
    report: Report,
    progress: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Train `model` in place.

    Args:
        model: A Hugging Face causal language model.
        order: Its data.
        config: Optimisation settings.
        sequences_per_step: This model's share of `config.sequences_per_step`.
        checkpoints: Where to resume from and save to.
        report: Called with metrics and step at every `log_every` steps, and once more for points that an
            interrupted run had reported already.
        progress: Called after every step with the number of steps taken and the loss.

    Raises:
        Interrupted: On SIGTERM or SIGINT, after saving a checkpoint.
        DivergedError: When the loss or the gradient becomes NaN or infinite; the last checkpoint stays.
    """
    loop = _Loop(model, order, config, sequences_per_step)
    with _stop_requested() as stop:
        loop.resume(checkpoints, report)
        while loop.step < config.steps:
            loss = loop.take_step()
            if progress is not None:
                progress(loop.step, loss)
            if loop.step % config.log_every == 0 or loop.step == config.steps:
                report(loop.new_point(), loop.step)
            if stop.is_set():
                checkpoints.save(loop.state(), model, loop.optimizer)
                raise Interrupted(
                    f"stopped at step {loop.step} of {config.steps}; the checkpoint is at {checkpoints.uri}"
                )
            if loop.step % config.checkpoint_every == 0 and loop.step < config.steps:
                checkpoints.save(loop.state(), model, loop.optimizer)
    return TrainResult(
        tokens=config.steps * sequences_per_step * config.context_length,
        epochs=order.epochs(config.steps * sequences_per_step),
        seconds=loop.state().seconds,
        device=device_name(loop.device),
        curve=loop.curve,
    )


class _Loop:
    """State of the loop between steps."""

    def __init__(self, model: nn.Module, order: BlockOrder, config: OptimizationConfig, sequences: int) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.random_state)
        self.device = choose_device(config.device)
        self.model = model.to(self.device).train()
        self.order, self.config, self.sequences = order, config, sequences
        self.loss = CausalLoss(model)  # looks at the model as it is, so before anything is wrapped
        _prepare(model, config)
        self.optimizer = _optimizer(model, config)
        scales = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=config.loss_scale, enabled=scales)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._norm = 0.0
        self._since, self._timed_from = time.perf_counter(), 0
        self._seconds, self._began = 0.0, time.perf_counter()

    def resume(self, checkpoints: Checkpoints, report: Report) -> None:
        state = checkpoints.restore(self.model, self.optimizer)
        if state is None:
            return
        self.step, self.curve, self._losses = state.step, list(state.curve), list(state.losses)
        self._seconds = state.seconds
        self.scaler.load_state_dict(dict(state.loss_scaling))
        self._timed_from = self.step
        logger.info("resumed at step=%d/%d from %s", self.step, self.config.steps, checkpoints.uri)
        for point in self.curve:
            report({name: value for name, value in point.items() if name != "step"}, int(point["step"]))

    def state(self) -> TrainState:
        seconds = self._seconds + time.perf_counter() - self._began
        return TrainState(self.step, self.curve, self._losses, seconds, self.scaler.state_dict())

    def take_step(self) -> float:
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate_gradients()
        self._check_finite("loss", loss)
        self.scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm))
        scale = self.scaler.get_scale()
        # A scaled gradient may overflow: the step is left out and the scale halved, until there is nothing to halve.
        if not self.scaler.is_enabled() or scale <= _LEAST_LOSS_SCALE:
            self._check_finite("gradient norm", norm)
        if math.isfinite(norm):
            self._norm = norm
        else:
            logger.warning("step=%d left out: its gradient overflows at a loss scale of %g", self.step, scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._losses.append(loss)
        return loss

    def _check_finite(self, what: str, value: float) -> None:
        # Before the weights are touched: neither a checkpoint nor an expert is ever made of NaN.
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} at step {self.step}, blocks {self.step * self.sequences} to "
                f"{(self.step + 1) * self.sequences - 1}; lower learning_rate={self.config.learning_rate}"
            )

    def new_point(self) -> Mapping[str, float]:
        now = time.perf_counter()
        tokens = (self.step - self._timed_from) * self.sequences * self.config.context_length
        point = {
            "train/loss": sum(self._losses) / len(self._losses),
            "train/learning_rate": self._learning_rate(self.step - 1),
            "train/gradient_norm": self._norm,
            "train/tokens": float(self.step * self.sequences * self.config.context_length),
            "train/tokens_per_second": tokens / (now - self._since),
        }
        self._losses, self._since, self._timed_from = [], now, self.step
        self.curve.append({"step": float(self.step), **point})
        return point

    def _learning_rate(self, step: int | None = None) -> float:
        config = self.config
        return learning_rate(
            self.step if step is None else step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            final_ratio=config.final_learning_rate_ratio,
            power=config.decay_power,
        )

    def _accumulate_gradients(self) -> float:
        """Mean loss over the tokens of one step; every token weighs the same whatever the micro-batches."""
        blocks = torch.from_numpy(self.order.batch(self.step * self.sequences, self.sequences))  # (B, T + 1)
        n_tokens = self.sequences * self.config.context_length
        total = 0.0
        for part in torch.split(blocks, self.config.micro_batch_size or self.sequences):
            part = part.to(self.device)
            with self._autocast():
                loss: Tensor = self.loss.sum_loss(part[:, :-1], part[:, 1:]) / n_tokens
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.item()
        return total

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        # No cache: it would hold a copy of every weight through all micro-batches.
        return torch.autocast(self.device.type, dtype=getattr(torch, self.config.precision), cache_enabled=False)


def _prepare(model: nn.Module, config: OptimizationConfig) -> None:
    """Switch on what trades time for memory, or compilation for speed."""
    if config.activation_checkpointing:
        if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
            raise ConfigError(f"activation_checkpointing is not supported by {type(model).__name__}; switch it off")
        # transformers 5 calls it by the first name and warns about the second; 4 knows the second alone.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.compile:
        decoder = getattr(model, "base_model", model)  # the head is computed in chunks, outside of it
        decoder.compile()


def _optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_epsilon, fused=True
    )


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Event that is set by SIGTERM and SIGINT, so that the loop ends between two steps."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only; whoever runs the loop elsewhere stops it by other means
        return
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
