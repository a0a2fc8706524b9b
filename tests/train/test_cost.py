"""The cost line: arithmetic by hand."""

import pytest
import torch
from torch import nn

from cbtm.branch.seed import ScratchModelConfig, create_model
from cbtm.train.config import OptimizationConfig
from cbtm.train.cost import cost_of, flops_per_token, peak_flops

CONFIG = {"steps": 10, "sequences_per_step": 4, "learning_rate": 1e-3, "context_length": 8}


def model() -> nn.Module:
    return create_model(
        ScratchModelConfig(hidden_size=16, n_layers=2, n_heads=2), vocab_size=100, separator_id=0, context_length=8
    )


def test_flops_are_six_for_each_weight_that_is_multiplied_and_those_of_attention():
    # A layer: four matrices of 16 x 16 and two of 16 x 64; the tied head: 100 x 16. Attention: 12 * 2 layers * 16 * 8.
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 64) + 100 * 16
    assert flops_per_token(model(), 8) == 6 * weights + 12 * 2 * 16 * 8


def test_flops_are_close_to_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    one = model().train()
    tokens = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counter:
        one(input_ids=tokens, labels=tokens).loss.backward()
    # torch counts what runs: attention of this size is a small part, and the masked half is or is not skipped.
    assert flops_per_token(one, 8) * 8 == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(("n_devices", "price"), [(1, 0.01), (4, 0.04)])
def test_cost_is_time_share_of_the_peak_and_money_for_all_devices(n_devices: int, price: float):
    config = OptimizationConfig(**CONFIG, precision="bfloat16", price_per_hour=3.6)
    cost = cost_of(1000.0, config, device="NVIDIA H100 80GB HBM3", n_devices=n_devices, tokens=320, seconds=10.0)
    assert cost == {
        "device": "NVIDIA H100 80GB HBM3",
        "devices": n_devices,
        "seconds": 10.0,
        "tokens": 320,
        "tokens_per_second": 32.0,
        "flops": 320_000.0,
        "utilisation": pytest.approx(32_000 / (n_devices * 989e12)),
        "price": pytest.approx(price),  # 3.6 an hour is 0.001 a second
    }


@pytest.mark.parametrize(("device", "precision"), [("cpu (x86_64)", "bfloat16"), ("NVIDIA H100", "float32")])
def test_utilisation_is_not_said_where_the_peak_is_not_known(device: str, precision: str):
    config = OptimizationConfig(**CONFIG, precision=precision)
    cost = cost_of(1000.0, config, device=device, n_devices=2, tokens=320, seconds=10.0)
    assert cost["utilisation"] is None
    assert cost["price"] is None


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),  # and not an L4
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 125e12),
        ("Tesla T4", 65e12),
        ("Quadro RTX 6000", None),
    ],
)
def test_peak_is_that_of_the_device_by_its_name(device: str, peak: float | None):
    assert peak_flops(device, "bfloat16") == peak


def test_a_price_changes_no_result():
    assert (
        OptimizationConfig(**CONFIG).result_digest() == OptimizationConfig(**CONFIG, price_per_hour=2).result_digest()
    )
