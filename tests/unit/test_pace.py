"""Rate and ETA, on a clock of the test's own."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker import pace
from services.worker.pace import Pace


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_nothing_is_known_at_first() -> None:
    assert Pace().observe(0, 100) == (None, None)


def test_a_steady_pace_is_its_rate_and_tells_when_it_is_over(clock: Clock) -> None:
    measured = Pace()
    for done in range(0, 60, 5):
        shown = measured.observe(done, 100)
        clock.now += 0.5
    assert shown == (10.0, 4.5)


def test_what_an_earlier_attempt_did_does_not_count_as_speed(clock: Clock) -> None:
    measured = Pace()
    measured.observe(1_000_000, 2_000_000)
    clock.now += 1

    assert measured.observe(1_000_010, 2_000_000)[0] == 10


def test_the_rate_follows_a_change_within_a_while_and_does_not_jump(clock: Clock) -> None:
    measured, done = Pace(), 0.0
    for _ in range(100):
        clock.now += 0.1
        measured.observe(done := done + 1, None)
    clock.now += 0.1
    after_one, _ = measured.observe(done := done + 10, None)
    for _ in range(300):
        clock.now += 0.1
        rate, _ = measured.observe(done := done + 10, None)

    assert after_one == pytest.approx(10, rel=0.1)
    assert rate == pytest.approx(100, rel=0.06)


def test_without_a_total_or_a_rate_there_is_no_eta(clock: Clock) -> None:
    measured = Pace()
    measured.observe(0, 10)
    clock.now += 1
    assert measured.observe(0, 10) == (0.0, None)
    clock.now += 1
    assert measured.observe(5, None)[1] is None


numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**300), 10**300))


@given(st.lists(st.tuples(numbers, st.none() | numbers, st.floats(0, 1e6)), max_size=20))
def test_whatever_is_observed_the_answer_is_json_and_not_negative(
    steps: list[tuple[float, float | None, float]],
) -> None:
    clock, real = Clock(), pace.time
    pace.time = clock  # type: ignore[assignment]
    try:
        measured = Pace()
        for done, total, passed in steps:
            clock.now += passed
            shown = measured.observe(done, total)
            json.dumps(shown, allow_nan=False)
            assert all(number is None or number >= 0 for number in shown)
    finally:
        pace.time = real
