import math

import pytest

from cbtm.train.config import OptimizationConfig
from cbtm.train.loss_scale import LossScale

TRAINING = {"steps": 10, "sequences_per_step": 4, "learning_rate": 1e-3}


def scale(precision="float16", loss_scale=128.0):
    return LossScale(OptimizationConfig(**TRAINING, precision=precision, loss_scale=loss_scale))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_types_than_float16_are_not_scaled(precision):
    one = scale(precision)
    assert (one.value, one.can_fall) == (1.0, False)
    one.update(math.inf)
    assert one.value == 1.0


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_overflow_halves_the_scale(norm):
    one = scale()
    one.update(norm)
    one.update(norm)
    assert one.value == 32.0


def test_scale_is_doubled_after_2000_steps_without_an_overflow():
    one = scale()
    for _ in range(1999):
        one.update(1.0)
    assert one.value == 128.0
    one.update(1.0)
    assert one.value == 256.0
    for _ in range(1999):
        one.update(1.0)
    one.update(math.inf)  # the count begins anew
    for _ in range(1999):
        one.update(1.0)
    assert one.value == 128.0
    one.update(1.0)
    assert one.value == 256.0


def test_scale_falls_until_a_loss_of_one_is_no_normal_number():
    # 2^7 down to 2^-14: 21 times.
    one, times = scale(), 0
    while one.can_fall:
        one.update(math.inf)
        times += 1
    assert (times, one.value) == (21, 2.0**-14)


def test_scale_goes_on_from_its_state():
    one = scale()
    one.update(math.inf)
    for _ in range(1500):
        one.update(1.0)
    other = scale()
    other.restore(one.state())
    for _ in range(499):
        other.update(1.0)
    assert other.value == 64.0
    other.update(1.0)
    assert other.value == 128.0
