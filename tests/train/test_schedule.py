import pytest

from cbtm.train.schedule import learning_rate


def rates(**settings):
    defaults = {"peak": 0.8, "warmup_steps": 0, "steps": 5, "final_ratio": 0.0}
    settings = defaults | settings
    return [learning_rate(step, **settings) for step in range(settings["steps"])]


def test_without_warm_up_the_first_step_is_the_peak_and_the_fall_is_linear():
    # 0.8 * (1 - step / 4)
    assert rates() == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-15)


def test_warm_up_reaches_the_peak_at_its_last_step():
    # 4 steps of warm-up: 0.2 more each; then 3 steps from peak to 0.
    assert rates(warmup_steps=4, steps=7) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.4, 0.0], abs=1e-15)


def test_last_step_has_the_final_ratio_of_the_peak():
    # From 0.8 to 0.25 * 0.8 = 0.2 in 4 steps of 0.15.
    assert rates(final_ratio=0.25) == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2])
    for warmup in range(4):
        assert rates(warmup_steps=warmup, final_ratio=0.25)[-1] == pytest.approx(0.2)


def test_final_ratio_of_one_is_constant():
    assert rates(final_ratio=1.0) == [0.8] * 5


def test_only_step_is_the_peak():
    assert rates(steps=1) == [0.8]


def test_warm_up_up_to_the_last_step_but_one_ends_at_the_peak():
    # No step is left to fall in: warm-up 1/2 and 1, then the peak once more.
    assert rates(warmup_steps=2, steps=3) == pytest.approx([0.4, 0.8, 0.8])


def test_beyond_the_last_step_it_stays_at_the_final_ratio():
    assert learning_rate(9, peak=0.8, warmup_steps=0, steps=5, final_ratio=0.25) == pytest.approx(0.2)


def test_power_bends_the_decay():
    # 0.8 * (1 - step / 4)^2, and above a floor of 0.5 * 0.8: 0.4 + 0.4 * (1 - step / 4)^2.
    assert rates(power=2.0) == pytest.approx([0.8, 0.45, 0.2, 0.05, 0.0], abs=1e-15)
    assert rates(power=2.0, final_ratio=0.5) == pytest.approx([0.8, 0.625, 0.5, 0.425, 0.4])
