"""The training loop: one causal language model, one stream of tokens, a fixed number of steps.

Seed model, expert, dense baseline and random-cluster control all run through here, so that they differ in nothing
but their data and their share of the batch. After a kill the loop goes on from its newest checkpoint and follows,
to the bit on one device type, thread count and number of devices, the losses of a run that was never interrupted:
data order and dropout depend on nothing but seed, step and rank.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cbtm import storage
from cbtm.errors import CbtmError, ConfigError, DataError, Interrupted, ManifestError, StorageError
from cbtm.process import stop_requested
from cbtm.train.checkpoint import Checkpoints, TrainState
from cbtm.train.config import OptimizationConfig
from cbtm.train.cost import flops_per_token
from cbtm.train.data import Batch, BlockOrder, Prefetcher
from cbtm.train.loss_scale import LossScale
from cbtm.train.meter import Meter, device_name
from cbtm.train.ranks import Ranks, choose_device
from cbtm.train.schedule import learning_rate
from cbtm.train.sharding import Sharding, WrappedScores, shard
from cbtm.train.validation import Validation

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class TrainResult:
    """What training leaves.

    Attributes:
        weights: The model's state by name on rank 0, empty on other ranks.
        steps: Steps that the weights have taken: fewer than asked for where patience ran out.
        tokens: Tokens learned from, those after the best validation included.
        computed_tokens: Tokens that went through the model, padding and prompts included.
        epochs: Passes over the data.
        seconds: Time of all steps, those before an interruption included.
        device: Name of the device.
        flops_per_token: Arithmetic of training on one token.
        curve: Points of the training curve.
        validation: Last (with patience the best) validation losses in nats, by name.
        waited: Parts of the seconds of this process that went into waiting: for data, for checkpoints.
    """

    weights: Mapping[str, Tensor]
    steps: int
    tokens: int
    computed_tokens: int
    epochs: float
    seconds: float
    device: str
    flops_per_token: float
    curve: list[dict[str, float]]
    validation: dict[str, float]
    waited: dict[str, float]


class DivergedError(CbtmError):
    """The loss or its gradient is no longer a finite number."""


def train(
    model: nn.Module,
    order: BlockOrder,
    config: OptimizationConfig,
    *,
    sequences_per_step: int,
    checkpoints: Checkpoints,
    report: Report,
    progress: Callable[[int, float], None] | None = None,
    validation: Validation | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train `model` in place; with several ranks, each calls this with the same arguments.

    Args:
        model: A Hugging Face causal language model.
        order: Its data.
        config: Optimisation settings.
        sequences_per_step: This model's share of `config.sequences_per_step`, over all ranks.
        checkpoints: Where to resume from and save to.
        report: Called on rank 0 with metrics and step at every `log_every` steps, and once more for points that an
            interrupted run had reported already.
        progress: Called on rank 0 after every step with the number of steps taken and the loss.
        validation: What is measured at every `config.validate_every` steps.
        ranks: The processes that train together; None for this one alone.

    Raises:
        ConfigError: If the sequences of a step do not divide among the ranks.
        Interrupted: On SIGTERM or SIGINT of any rank, after saving a checkpoint.
        DivergedError: When the loss or the gradient becomes NaN or infinite; the last checkpoint stays.
    """
    ranks = ranks or Ranks(0, 1, choose_device(config.device))
    if not ranks.is_first:
        report, progress = _silent, None
    with stop_requested() as stop, checkpoints:
        loop = _Loop(model, order, config, sequences_per_step, ranks, validation, stop)
        _resume(loop, checkpoints, report, stop)
        with Prefetcher(loop.batch, loop.step, config.steps) as batches:
            while loop.step < config.steps and not loop.out_of_patience:
                loss = loop.take_step(batches.next())
                if progress is not None:
                    progress(loop.step, loss)
                loop.note(report, checkpoints, waited=batches.waited)
                if loop.stops:
                    loop.save(checkpoints)
                    problem = checkpoints.settle()
                    where = f"the checkpoint is at {checkpoints.uri}"
                    raise Interrupted(
                        f"stopped at step {loop.step} of {config.steps}; "
                        + (where if problem is None else f"its checkpoint was not published: {problem}")
                    )
                if loop.step % config.checkpoint_every == 0 and loop.step < config.steps:
                    loop.save(checkpoints)
        checkpoints.settle()  # one that failed was warned of, and is not needed any more
        return loop.result(checkpoints, data_wait=batches.waited)


def _resume(loop: "_Loop", checkpoints: Checkpoints, report: Report, stop: threading.Event) -> None:
    """Go on from the newest checkpoint; a store that is away is not waited for once there is a request to stop."""
    try:
        with storage.ended_by(stop):
            loop.resume(checkpoints, report)
    except StorageError as error:
        if stop.is_set():
            raise Interrupted(f"stopped before the first step: {error}") from error
        raise


class _Loop:
    """State of the loop between steps."""

    def __init__(
        self,
        model: nn.Module,
        order: BlockOrder,
        config: OptimizationConfig,
        sequences: int,
        ranks: Ranks,
        validation: Validation | None,
        stop: threading.Event,
    ) -> None:
        if sequences % ranks.world_size:
            raise ConfigError(
                f"{sequences} sequences per step do not divide among {ranks.world_size} devices; use a multiple, or "
                f"devices={math.gcd(sequences, ranks.world_size)}"
            )
        if order.n_blocks < ranks.world_size:
            raise ConfigError(
                f"the text gives {order.n_blocks} blocks of context_length={config.context_length}, fewer than "
                f"devices={ranks.world_size}; use devices=1, a shorter context or fewer clusters"
            )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.order, self.config, self.sequences, self.ranks = order, config, sequences, ranks
        self.flops_per_token = flops_per_token(model, config.context_length)
        self.sharding: Sharding = shard(model.to(ranks.device).train(), config, ranks)
        self.scale = LossScale(config)
        self.validation, self.best = validation, dict[str, float]()
        self.step, self.stops = 0, False
        self.curve: list[dict[str, float]] = []
        self._stop, self._norm = stop, 0.0
        self._seconds, self._began = 0.0, time.perf_counter()
        self._saving = 0.0
        self.meter = self._new_meter([], 0)

    def _new_meter(self, losses: list[float], tokens: int) -> Meter:
        return Meter(
            flops_per_token=self.flops_per_token,
            step_size=self.sequences * self.config.context_length,
            device=self.ranks.device,
            n_devices=self.ranks.world_size,
            precision=self.config.precision,
            losses=losses,
            tokens=tokens,
        )

    # --- resumption ---

    def resume(self, checkpoints: Checkpoints, report: Report) -> None:
        tensors = self.sharding.tensors()
        state = checkpoints.restore(tensors)
        if state is None:
            return
        self.sharding.adopt(tensors, state.optimizer_steps)
        self.step, self.curve, self.best = state.step, list(state.curve), dict(state.best)
        self._seconds = state.seconds
        self.scale.restore(state.loss_scale)
        self.meter = self._new_meter(list(state.losses), state.tokens)
        logger.info("resumed at step=%d/%d from %s", self.step, self.config.steps, checkpoints.uri)
        for point in self.curve:
            report({name: value for name, value in point.items() if name != "step"}, int(point["step"]))

    def state(self) -> TrainState:
        return TrainState(
            step=self.step,
            curve=self.curve,
            losses=self.meter.losses,
            tokens=self.meter.tokens,
            seconds=self._seconds + time.perf_counter() - self._began,
            optimizer_steps=self.sharding.optimizer_steps,
            loss_scale=self.scale.state(),
            best=self.best,
        )

    def save(self, checkpoints: Checkpoints) -> None:
        began = time.perf_counter()
        checkpoints.save(self.state(), self.sharding.tensors())
        self._saving += time.perf_counter() - began

    # --- one step ---

    def batch(self, step: int) -> Batch:
        """This rank's part of the data of one step."""
        own = self.sequences // self.ranks.world_size
        return self.order.batch(step * self.sequences + self.ranks.rank * own, own)

    def take_step(self, batch: Batch) -> float:
        rate = self._learning_rate(self.step)
        for group in self.sharding.optimizer.param_groups:
            group["lr"] = rate
        # Dropout draws from these: seeded anew for each step, nothing of them belongs into a checkpoint.
        seed = np.random.SeedSequence([self.config.random_state, self.step, self.ranks.rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        loss, n_targets = self._accumulate_gradients(batch)
        self._check_finite("loss", loss)
        norm = float(self.sharding.gradient_norm()) / self.scale.value
        # A scaled gradient may overflow: the step is left out and the scale halved, until there is nothing to halve.
        if not self.scale.can_fall:
            self._check_finite("gradient norm", norm)
        if math.isfinite(norm):
            self._norm = norm
            factor = min(1.0, self.config.gradient_clip_norm / (norm + 1e-6)) / self.scale.value
            if factor != 1.0:
                self.sharding.scale_gradients(torch.tensor(factor, device=self.ranks.device))
            self.sharding.optimizer.step()
        else:
            logger.warning(
                "step=%d left out: its gradient overflows at a loss scale of %g", self.step, self.scale.value
            )
        self.scale.update(norm)
        self.sharding.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.meter.step(loss, n_targets)
        return loss

    def _accumulate_gradients(self, batch: Batch) -> tuple[float, int]:
        """Mean loss over the tokens of one step, and their number, over all ranks.

        Every token weighs the same, whatever the micro-batches and the ranks.
        """
        world, device = self.ranks.world_size, self.ranks.device
        n_targets = int(self.ranks.sum([batch.n_targets])[0])
        # Strategies average over the ranks: the sum over all of them is wanted.
        weight = self.scale.value * world / max(1, n_targets)
        total = torch.zeros((), device=device)
        parts = list(batch.split(self.config.micro_batch_size or len(batch.inputs)))
        for number, part in enumerate(parts, 1):
            with self.sharding.accumulate(last=number == len(parts)):
                with self._autocast():
                    loss: Tensor = self.sharding.module(*_tensors(part, device), n_targets=part.n_targets)
                torch.autograd.backward(loss * weight)
            total += loss.detach()
        summed, stops = self.ranks.sum([total.item(), float(self._stop.is_set())])
        self.stops = stops > 0  # of any rank: all of them end behind the same step
        return summed / max(1, n_targets), n_targets

    def _check_finite(self, what: str, value: float) -> None:
        # Before the weights are touched: neither a checkpoint nor an expert is ever made of NaN.
        if not math.isfinite(value):
            raise DivergedError(
                f"the {what} is {value} at step {self.step}, blocks {self.step * self.sequences} to "
                f"{(self.step + 1) * self.sequences - 1}; lower learning_rate={self.config.learning_rate}"
            )

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            peak=config.learning_rate,
            warmup_steps=config.warmup_steps,
            steps=config.steps,
            final_ratio=config.final_learning_rate_ratio,
            power=config.decay_power,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        # No cache: it would hold a copy of every weight through all micro-batches.
        return torch.autocast(self.ranks.device.type, dtype=getattr(torch, self.config.precision), cache_enabled=False)

    # --- what is noted down ---

    def note(self, report: Report, checkpoints: Checkpoints, *, waited: float) -> None:
        """Validations and points of the curve that are due."""
        config, last = self.config, self.step == self.config.steps
        if self.validation is not None and config.validate_every and (self.step % config.validate_every == 0 or last):
            losses = self._validate(self.validation)
            self._report({f"validation/{name}_loss": loss for name, loss in losses.items()}, report)
            self._remember_best(losses, checkpoints)
        if self.step % config.log_every == 0 or last or self.out_of_patience:
            point = self.meter.point(
                waited=waited, learning_rate=self._learning_rate(self.step - 1), gradient_norm=self._norm
            )
            self._report(point, report)

    def _report(self, point: Mapping[str, float], report: Report) -> None:
        if self.curve and self.curve[-1]["step"] == self.step:
            self.curve[-1] |= point
        else:
            self.curve.append({"step": float(self.step), **point})
        report(point, self.step)

    def _validate(self, validation: Validation) -> dict[str, float]:
        with self._autocast():
            sums = validation.measure(
                WrappedScores(self.sharding.module),
                self.ranks.device,
                self.config.micro_batch_size or self.sequences,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        flat = self.ranks.sum([value for pair in sums.values() for value in pair])
        return {name: nats / count for name, nats, count in zip(sums, flat[::2], flat[1::2], strict=True) if count}

    @property
    def out_of_patience(self) -> bool:
        """Whether the own domain's loss has not fallen for as many validations as were allowed."""
        patience = self.config.patience
        return patience is not None and self.best.get("validations_since", 0) >= patience

    def _remember_best(self, losses: Mapping[str, float], checkpoints: Checkpoints) -> None:
        loss = losses.get("own", losses.get("all"))
        if loss is None:
            raise DataError("the validation documents are prompts alone; use others, or leave validate_every out")
        self._check_finite("validation loss", loss)
        if not loss < self.best.get("loss", math.inf):
            self.best["validations_since"] = self.best.get("validations_since", 0) + 1
            return
        self.best = {"loss": loss, "step": float(self.step), "validations_since": 0}
        if self.config.patience is not None:
            began = time.perf_counter()
            checkpoints.best.save(self.state(), self.sharding.tensors())
            self._saving += time.perf_counter() - began

    def result(self, checkpoints: Checkpoints, *, data_wait: float) -> TrainResult:
        """What is left at the end; with patience, the weights of the best validation."""
        state, steps = self.state(), self.step
        if self.config.patience is not None and self.best["step"] < self.step:
            if (problem := checkpoints.best.settle()) is not None:
                raise StorageError(f"the model of the best validation was not published: {problem}")
            tensors = self.sharding.tensors()
            best = checkpoints.best.restore(tensors)
            if best is None or best.step != self.best["step"]:
                raise ManifestError(f"{checkpoints.best.uri} has lost the best model; remove {checkpoints.uri}")
            self.sharding.adopt(tensors, best.optimizer_steps)
            steps = best.step
        here = time.perf_counter() - self._began
        return TrainResult(
            weights=self.sharding.weights(),
            steps=steps,
            tokens=state.tokens,
            computed_tokens=self.step * self.sequences * self.config.context_length,
            epochs=self.order.epochs(self.step * self.sequences),
            seconds=state.seconds,
            device=device_name(self.ranks.device),
            flops_per_token=self.flops_per_token,
            curve=self.curve,
            validation=_validation_at(self.curve, steps),
            waited={"data": data_wait / here, "checkpoints": self._saving / here},
        )


def _validation_at(curve: list[dict[str, float]], step: int) -> dict[str, float]:
    point = next((point for point in reversed(curve) if point["step"] == step), {})
    return {name: value for name, value in point.items() if name.startswith("validation/")}


def _tensors(batch: Batch, device: torch.device) -> tuple[Tensor | None, ...]:
    arrays = (batch.inputs, batch.targets, batch.positions, batch.segments)
    return tuple(None if array is None else torch.from_numpy(array).to(device) for array in arrays)


def _silent(metrics: Mapping[str, float], step: int) -> None:
    """What ranks other than the first report to."""
