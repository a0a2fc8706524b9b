"""Loss scaling of float16: gradients that would vanish are made larger before the backward pass.

As Micikevicius et al. 2018 (arXiv 1710.03740, section 3.2): a step whose scaled gradient overflows is left out and
the scale halved; after many steps without it is doubled. The decision comes from the norm of the whole gradient,
which every rank knows, so that all of them leave out the same steps.
"""

import math

from cbtm.train.config import OptimizationConfig

_LEAST = 2.0**-14  # below this a loss of 1 is no normal number of float16
_GROWTH_STEPS = 2000  # as PyTorch's own scaler


class LossScale:
    """The factor that a loss is multiplied by; always 1 for other types than float16."""

    def __init__(self, config: OptimizationConfig) -> None:
        self.enabled = config.precision == "float16"
        self.value = config.loss_scale if self.enabled else 1.0
        self._clean_steps = 0

    @property
    def can_fall(self) -> bool:
        """Whether an overflow may be answered by a smaller scale."""
        return self.enabled and self.value > _LEAST

    def update(self, norm: float) -> None:
        """Take note of the norm of one step's gradient."""
        if not self.enabled:
            return
        if not math.isfinite(norm):
            self.value, self._clean_steps = self.value / 2, 0
            return
        self._clean_steps += 1
        if self._clean_steps == _GROWTH_STEPS:
            self.value, self._clean_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """What `restore` goes on from."""
        return {"value": self.value, "clean_steps": float(self._clean_steps)}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.value, self._clean_steps = state["value"], int(state["clean_steps"])
