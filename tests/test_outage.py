"""Waiting for a service that is away, on a clock that only the waiting moves."""

import itertools
import logging
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from cbtm import outage
from cbtm.outage import GivenUp, Patience, persist

AWAY = ConnectionError("away")


class Clock:
    """Time in seconds that passes in `sleep` alone."""

    def __init__(self) -> None:
        self.now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outage, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))
    monkeypatch.setattr(outage, "_log", outage._OutageLog())
    monkeypatch.setattr(outage, "_jitter", random.Random(1))
    return clock


def until(back: float, clock: Clock, asked: list[float]) -> Callable[[], str]:
    """A service that answers from the time `back` on, and notes when it was asked."""

    def ask() -> str:
        asked.append(clock.now - 1000)
        if clock.now < 1000 + back:
            raise AWAY
        return "here"

    return ask


def passing(error: Exception) -> bool:
    return error is AWAY


def test_pauses_double_from_half_a_second_to_ten_and_are_shortened_by_up_to_a_half(clock: Clock):
    asked: list[float] = []
    assert persist("service", until(60, clock, asked), Patience(300, ()), passing) == "here"
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    longest = [0.5, 1, 2, 4, 8] + [10] * (len(pauses) - 5)
    assert all(most / 2 - 1e-9 <= pause <= most + 1e-9 for pause, most in zip(pauses, longest, strict=True))
    assert len(set(pauses)) == len(pauses)  # not in step with other processes
    assert 60 <= asked[-1] < 70


def test_the_last_attempt_is_made_when_the_patience_is_over(clock: Clock):
    asked: list[float] = []
    with pytest.raises(GivenUp, match="away") as caught:
        persist("service", until(1e9, clock, asked), Patience(45, ()), passing)
    assert asked[-1] == pytest.approx(45)
    assert (caught.value.reason, caught.value.seconds) == (AWAY, pytest.approx(45))
    asked.clear()
    clock.now = 1000.0
    assert persist("service", until(45, clock, asked), Patience(45, ()), passing) == "here"


def test_without_patience_or_for_another_reason_the_first_error_is_raised(clock: Clock):
    asked: list[float] = []
    with pytest.raises(ConnectionError, match="away"):
        persist("service", until(60, clock, asked), Patience(0, ()), passing)
    with pytest.raises(ConnectionError, match="away"):
        persist("service", until(60, clock, asked), Patience(300, ()), lambda error: False)
    assert asked == [0, 0]


def test_a_lasting_error_ends_the_waiting_for_a_passing_one(clock: Clock):
    errors = [AWAY, AWAY, ValueError("wrong secret")]

    def ask() -> None:
        raise errors.pop(0)

    with pytest.raises(ValueError, match="wrong secret"):
        persist("service", ask, Patience(300, ()), passing)


def test_a_minute_away_is_two_warnings_and_a_line_when_it_is_over(clock: Clock, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "cbtm")
    persist("service", until(50, clock, []), Patience(300, ()), passing)
    first, second, last = caplog.messages
    assert first == "service does not answer (away); trying again for up to 300 s"
    left = float(second.removeprefix("service does not answer (away); trying again for up to ").removesuffix(" s"))
    assert 300 - 30 - 10 <= left <= 300 - 30  # the first attempt of those 30 s after the line before
    assert last.startswith("service answers again after 5")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


def test_a_service_that_comes_and_goes_does_not_fill_the_log(clock: Clock, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "cbtm")
    for _ in range(20):
        persist("service", until(clock.now - 1000 + 1, clock, []), Patience(300, ()), passing)
    assert len(caplog.messages) <= 4  # 20 to 40 s: a pair of lines each 30 s


def test_an_end_that_is_set_lets_nothing_wait(clock: Clock):
    end = threading.Event()
    end.set()
    asked: list[float] = []
    with pytest.raises(GivenUp):
        persist("service", until(60, clock, asked), Patience(300, (threading.Event(), end)), passing)
    assert asked == [0]


def test_patience_and_ends_hold_within_their_blocks_and_in_their_thread():
    end = threading.Event()
    outage.be_patient(7)
    try:
        with outage.patience(0), outage.ended_by(end):
            assert Patience.of_this_call() == Patience(0, (end,))
            elsewhere: list[Patience] = []
            thread = threading.Thread(target=lambda: elsewhere.append(Patience.of_this_call()))
            thread.start()
            thread.join()
            assert elsewhere == [Patience(7, ())]
        assert Patience.of_this_call() == Patience(7, ())
    finally:
        outage.be_patient(0)
