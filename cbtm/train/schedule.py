"""Learning-rate schedule: linear warm-up, then polynomial decay (the reference's power is 1)."""


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, final_ratio: float, power: float = 1.0
) -> float:
    """Learning rate of one step, counted from 0.

    Rises linearly to `peak` over `warmup_steps`, then falls to `final_ratio * peak` at the last step, as the part of
    the steps that is left to the power of `power`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    left: float = (1.0 - min(1.0, progress)) ** power
    return peak * (final_ratio + (1.0 - final_ratio) * left)
