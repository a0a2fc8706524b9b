import math
import platform
import time

import pytest
import torch

from cbtm.train.cost import peak_flops
from cbtm.train.meter import Meter, device_name, peak_memory

CPU = torch.device("cpu")


def meter(losses=(), tokens=0, **changes):
    settings = {"flops_per_token": 100.0, "step_size": 1000, "device": CPU, "n_devices": 1, "precision": "bfloat16"}
    return Meter(**(settings | changes), losses=list(losses), tokens=tokens)


def point(one, waited=0.0):
    return one.point(waited=waited, learning_rate=0.1, gradient_norm=2.0)


def test_point_is_the_mean_of_the_steps_since_the_last():
    one = meter()
    one.step(1.0, 10)
    one.step(2.0, 6)
    first = point(one)
    assert first["train/loss"] == 1.5
    assert first["train/perplexity"] == pytest.approx(math.exp(1.5))
    assert (first["train/learning_rate"], first["train/gradient_norm"]) == (0.1, 2.0)
    assert first["train/tokens"] == 16
    one.step(4.0, 8)
    second = point(one)
    assert (second["train/loss"], second["train/tokens"]) == (4.0, 24)


def test_steps_and_tokens_of_before_an_interruption_count_but_not_for_the_speed():
    one = meter(losses=[1.0, 2.0], tokens=10**12)
    one.step(6.0, 5)
    time.sleep(0.01)
    found = point(one)
    assert found["train/loss"] == 3.0
    assert found["train/tokens"] == 10**12 + 5
    assert 0 < found["train/tokens_per_second"] <= 1000 / 0.01


def test_speed_and_waiting_are_of_the_time_since_the_last_point():
    # Of 1000 tokens that go through the model in a step 10 are learned from.
    one = meter()
    one.step(1.0, 10)
    began = time.perf_counter()
    time.sleep(0.2)
    first = point(one, waited=0.05)
    seconds = time.perf_counter() - began
    assert 1000 / (seconds + 0.05) < first["train/tokens_per_second"] <= 1000 / 0.2
    assert 0.05 / (seconds + 0.05) < first["train/data_wait"] <= 0.05 / 0.2
    one.step(1.0, 10)
    one.step(1.0, 10)
    time.sleep(0.4)
    second = point(one, waited=0.05)  # no more than before
    assert second["train/tokens_per_second"] <= 2000 / 0.4
    assert second["train/data_wait"] == 0


def test_perplexity_that_no_float_holds_is_not_an_error():
    one = meter()
    one.step(1e6, 1)
    assert point(one)["train/perplexity"] == math.exp(700)


def test_memory_is_the_peak_of_the_process():
    before = peak_memory(CPU)
    held = torch.ones(60_000_000)  # 240 MB
    assert 0.05e9 < peak_memory(CPU) < 1e12
    assert peak_memory(CPU) >= before
    assert peak_memory(CPU) > held.nbytes
    one = meter()
    one.step(1.0, 1)
    assert point(one)["train/memory_gb"] == pytest.approx(peak_memory(CPU) / 1e9, rel=0.05)


def test_utilisation_is_left_out_where_the_peak_is_not_known():
    one = meter()
    one.step(1.0, 1)
    assert "train/utilisation" not in point(one)
    assert device_name(CPU) == f"cpu ({platform.machine()})"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_utilisation_is_of_the_peak_of_all_devices():
    found = []
    for n_devices in (1, 4):
        one = meter(device=torch.device("cuda", 0), n_devices=n_devices)
        one.step(1.0, 1000)
        time.sleep(0.05)
        found.append(point(one))
    for one, n_devices in zip(found, (1, 4), strict=True):
        peak = peak_flops(torch.cuda.get_device_name(0), "bfloat16")
        if peak is None:
            pytest.skip("a GPU whose peak is not known")
        assert one["train/utilisation"] == pytest.approx(one["train/tokens_per_second"] * 100 / (n_devices * peak))
