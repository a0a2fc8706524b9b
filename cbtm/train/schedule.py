"""Learning-rate schedule: linear warm-up, then linear decay (the reference's polynomial decay of power 1)."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, final_ratio: float) -> float:
    """Learning rate of one step, counted from 0.

    Rises linearly to `peak` over `warmup_steps`, then falls linearly to `final_ratio * peak` at the last step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (1.0 - (1.0 - final_ratio) * min(1.0, progress))
