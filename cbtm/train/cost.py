"""What training a model cost: time, arithmetic, how much of the device that used, and money.

FLOPs are counted as is usual for comparing (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): forward and backward
take 6 for each weight of a matrix product and token, and 12 · layers · width · context for attention, whether or not
a kernel leaves out the masked half. Activations that are computed twice count once.
"""

from typing import Any

from torch import nn

from cbtm.train.config import OptimizationConfig

# Dense peak of tensor cores in bfloat16 or float16, FLOP/s, from the vendors' data sheets; the first name that is part
# of the device's counts.
_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s that a device can do at most in a type, None where that is not known."""
    if precision == "float32":
        return None
    return next((peak for name, peak in _PEAKS.items() if name in device), None)


def flops_per_token(model: nn.Module, context_length: int) -> float:
    """FLOPs that training on one token takes, forward and backward.

    Args:
        model: A transformers model.
        context_length: Tokens in a sequence.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2 and id(parameter) not in looked_up
    )
    config: Any = model.config
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and id(head.weight) in looked_up:
        multiplied += head.weight.numel()  # tied: looked up at the bottom, multiplied at the top
    attention: float = 12.0 * config.num_hidden_layers * config.hidden_size * context_length
    return 6.0 * multiplied + attention


def cost_of(
    flops: float, config: OptimizationConfig, *, device: str, n_devices: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """The cost line of one training.

    Args:
        flops: Arithmetic of one token, from `flops_per_token`.
        config: How it was trained.
        device: Name of the device.
        n_devices: How many of them trained together.
        tokens: Tokens that went through the model, padding and prompts included.
        seconds: Time of all steps, those before an interruption included.

    Returns:
        device, devices, seconds, tokens, tokens_per_second, flops, utilisation (of the peak of all, None where that is
        not known), and price (None without `config.price_per_hour`).
    """
    peak = peak_flops(device, config.precision)
    hourly = config.price_per_hour
    return {
        "device": device,
        "devices": n_devices,
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "flops": flops * tokens,
        "utilisation": None if peak is None else flops * tokens / seconds / (peak * n_devices),
        "price": None if hourly is None else hourly * n_devices * seconds / 3600,
    }
