"""Which times a cron expression has, and what is done with those that are due."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import InvalidRequest
from headway.schedules import Turn, next_slot, slots
from headway.store.schedules import Schedule

SPRING = datetime(2027, 3, 28, tzinfo=UTC)
AUTUMN = datetime(2027, 10, 31, tzinfo=UTC)
DAY = timedelta(days=1)

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Africa/Cairo", "America/Havana", "Asia/Kathmandu", "Asia/Gaza")
CRONS = (
    *("* * * * *", "*/7 * * * *", "30 2 * * *", "15,45 1-3 * * *", "0 */2 * * *", "0 0 * * *", "*/20 0 * * *"),
    *("30 * * * *", "* 2 * * *", "0 0 L * *", "5 0 * * MON#1", "59 23 * * 5L", "0 12 1,15 * MON", "0 9 LW * *"),
)
MOMENTS = st.builds(lambda seconds: SPRING + timedelta(seconds=seconds), st.floats(-400 * 86400, 400 * 86400))
# Half of the moments lie around a change of the clocks in one of the zones.
CHANGES = st.sampled_from([SPRING, AUTUMN, datetime(2027, 3, 14, tzinfo=UTC), datetime(2027, 11, 7, tzinfo=UTC)])
NEAR = st.builds(lambda at, seconds: at + timedelta(seconds=seconds), CHANGES, st.floats(-43200, 43200))


def at(cron: str, timezone: str, after: datetime, count: int) -> list[str]:
    return [f"{slot:%m-%d %H:%M}" for slot in islice(slots(cron, timezone, after), count)]


@pytest.mark.parametrize(
    ("cron", "timezone", "expected"),
    [
        ("*/15 * * * *", "UTC", ["01-01 00:15", "01-01 00:30", "01-01 00:45"]),
        ("30 2 * * MON-FRI", "UTC", ["01-01 02:30", "01-04 02:30", "01-05 02:30"]),
        ("0 9 * * *", "Asia/Kathmandu", ["01-01 03:15", "01-02 03:15", "01-03 03:15"]),
        ("0 0 L * *", "UTC", ["01-31 00:00", "02-28 00:00", "03-31 00:00"]),
        ("0 0 LW * *", "UTC", ["01-29 00:00", "02-26 00:00", "03-31 00:00"]),
        ("0 0 * * 5L", "UTC", ["01-29 00:00", "02-26 00:00", "03-26 00:00"]),
        ("0 0 * * MON#1", "UTC", ["01-04 00:00", "02-01 00:00", "03-01 00:00"]),
        ("0 0 1 jan,JUL *", "UTC", ["07-01 00:00", "01-01 00:00", "07-01 00:00"]),
    ],
)
def test_the_times_of_an_expression(cron: str, timezone: str, expected: list[str]) -> None:
    assert at(cron, timezone, datetime(2027, 1, 1, tzinfo=UTC), 3) == expected


@pytest.mark.parametrize(
    ("day", "expected"), [(SPRING, ["03-27 01:30", "03-28 01:00"]), (AUTUMN, ["10-30 00:30", "10-31 00:30"])]
)
def test_a_time_that_a_change_of_the_clocks_skips_or_repeats_comes_once(day: datetime, expected: list[str]) -> None:
    found = [slot for slot in islice(slots("30 2 * * *", "Europe/Berlin", day - DAY), 5) if slot < day + DAY]
    assert [f"{slot:%m-%d %H:%M}" for slot in found] == expected


def test_in_the_second_of_two_hours_the_times_of_the_first_are_over() -> None:
    assert at("30 2 * * *", "Europe/Berlin", AUTUMN + timedelta(hours=1, minutes=15), 1) == ["11-01 01:30"]


def test_every_half_hour_goes_on_through_a_change_of_the_clocks() -> None:
    for day in (SPRING, AUTUMN):
        found = list(islice(slots("*/30 * * * *", "Europe/Berlin", day), 12))
        assert found == [day + timedelta(minutes=30 * number) for number in range(1, 13)]


@given(cron=st.sampled_from(CRONS), timezone=st.sampled_from(ZONES), after=MOMENTS | NEAR, part=st.floats(0, 1))
def test_the_next_slot_lies_ahead_and_is_the_same_from_every_moment_before_it(
    cron: str, timezone: str, after: datetime, part: float
) -> None:
    slot = next_slot(cron, timezone, after)

    assert slot > after
    assert slot.second == slot.microsecond == 0
    between = after + (slot - after) * part
    assert next_slot(cron, timezone, min(between, slot - timedelta.resolution)) == slot


@given(cron=st.sampled_from(CRONS), timezone=st.sampled_from(ZONES), after=MOMENTS | NEAR)
def test_one_by_one_and_in_a_row_the_slots_are_the_same(cron: str, timezone: str, after: datetime) -> None:
    single, moment = [], after
    for _ in range(20):
        single.append(moment := next_slot(cron, timezone, moment))
    assert single == list(islice(slots(cron, timezone, after), 20))


@pytest.mark.parametrize(
    ("cron", "timezone", "field"),
    [
        ("0 0 31 2 *", "UTC", "cron"),
        ("0 0 */20 * 1L", "UTC", "cron"),
        ("* * * * * *", "UTC", "cron"),
        ("@daily", "UTC", "cron"),
        ("", "UTC", "cron"),
        ("60 * * * *", "UTC", "cron"),
        ("* * * * MON#6", "UTC", "cron"),
        ("* * * * *", "Europe/Atlantis", "timezone"),
        ("* * * * *", "Europe", "timezone"),
        ("* * * * *", "../../etc/passwd", "timezone"),
        ("* * * * *", "europe/berlin", "timezone"),
        ("* * * * *", "localtime", "timezone"),
        ("* * * * *", "", "timezone"),
    ],
)
def test_what_has_no_times_is_refused_by_field(cron: str, timezone: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        next_slot(cron, timezone, SPRING)
    assert [error["field"] for error in refused.value.errors] == [field]


@given(cron=st.lists(st.text("0123456789*/-,#LWlwMONJA", max_size=6), min_size=5, max_size=5).map(" ".join) | st.text())
def test_any_text_has_times_or_is_refused(cron: str) -> None:
    with suppress(InvalidRequest):
        assert next_slot(cron, "Europe/Berlin", SPRING) > SPRING


def hourly(catch_up: Any, *, slots_due: int, age: timedelta) -> Schedule:
    """A schedule of which the latest slot that is due came `age` ago, and each other one an hour before the next."""
    now = SPRING + age
    return Schedule(
        id=UUID(int=1),
        tenant_id=UUID(int=2),
        name="hourly",
        cron="0 * * * *",
        timezone="UTC",
        catch_up=catch_up,
        job={"kind": "some.kind", "input": None},
        next_at=SPRING - timedelta(hours=slots_due - 1),
        paused_at=None,
        created_at=now,
        timeout=1,
        max_attempts=1,
        read_at=now,
    )


@pytest.mark.parametrize("seconds", [0, 59, 60, 3599])
@pytest.mark.parametrize("catch_up", ["skip", "one", "all"])
@pytest.mark.parametrize("slots_due", [1, 4])
def test_what_is_submitted_of_the_slots_that_are_due(catch_up: str, slots_due: int, seconds: int) -> None:
    turn = Turn.of(hourly(catch_up, slots_due=slots_due, age=timedelta(seconds=seconds)))

    due = [SPRING - timedelta(hours=hours) for hours in reversed(range(slots_due))]
    expected = {"all": due, "one": due[-1:], "skip": due[-1:] if seconds < 60 else []}[catch_up]
    assert turn.submitted == expected
    assert turn.passed == slots_due - len(expected)
    assert turn.following == SPRING + timedelta(hours=1)


@pytest.mark.parametrize(("catch_up", "expected"), [("skip", 0), ("one", 1), ("all", 3333)])
def test_however_many_slots_are_due_rounds_get_to_the_end_of_them(catch_up: str, expected: int) -> None:
    schedule = hourly(catch_up, slots_due=3333, age=timedelta(minutes=5))
    first, submitted, rounds = schedule.next_at, [], 0
    while schedule.next_at <= schedule.read_at:
        turn = Turn.of(schedule)
        submitted += turn.submitted
        rounds += 1
        values = {name: getattr(schedule, name) for name in Schedule.__slots__}
        schedule = Schedule(**values | {"next_at": turn.following})

    due = [first + timedelta(hours=number) for number in range(3333)]
    assert submitted == due[len(due) - expected :]
    assert rounds == (67 if catch_up == "all" else 4)
