"""Figures of a training while it runs: one point of the curve every so many steps."""

import math
import platform
import resource
import sys
import time
from collections.abc import Mapping

import torch

from cbtm.train.cost import peak_flops


class Meter:
    """Collects what happened since the last point of the curve.

    Args:
        flops_per_token: Arithmetic of training on one token.
        step_size: Tokens that go through the model in one step, whether or not they are learned from.
        device: Where this rank computes.
        n_devices: How many devices train the model together.
        precision: Type that is computed in.
        losses: Losses of steps before an interruption that no point has told of yet.
        tokens: Tokens learned from so far.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        step_size: int,
        device: torch.device,
        n_devices: int,
        precision: str,
        losses: list[float],
        tokens: int,
    ) -> None:
        self._flops_per_token, self._step_size, self._device = flops_per_token, step_size, device
        peak = peak_flops(device_name(device), precision)
        self._peak = None if peak is None else peak * n_devices
        self.losses, self.tokens = losses, tokens
        self._since, self._steps, self._waited_then = time.perf_counter(), 0, 0.0

    def step(self, loss: float, tokens: int) -> None:
        """Take note of one step."""
        self.losses.append(loss)
        self.tokens += tokens
        self._steps += 1

    def point(self, *, waited: float, learning_rate: float, gradient_norm: float) -> Mapping[str, float]:
        """Figures since the last point.

        Args:
            waited: Seconds that training has waited for data so far.
            learning_rate: Of the last step.
            gradient_norm: Of the last step that was not left out.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = self._steps * self._step_size / seconds
        loss = sum(self.losses) / len(self.losses)
        values = {
            "train/loss": loss,
            "train/perplexity": math.exp(min(loss, 700.0)),  # the largest that float64 holds
            "train/learning_rate": learning_rate,
            "train/gradient_norm": gradient_norm,
            "train/tokens": float(self.tokens),
            "train/tokens_per_second": speed,
            "train/data_wait": (waited - self._waited_then) / seconds,
            "train/memory_gb": peak_memory(self._device) / 1e9,
        }
        if self._peak is not None:
            values["train/utilisation"] = speed * self._flops_per_token / self._peak
        self.losses, self._since, self._steps = [], time.perf_counter(), 0
        self._waited_then = waited
        return values


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """What a GPU calls itself, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
