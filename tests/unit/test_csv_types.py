import datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.kinds.csv_types import ColumnType, fits, widened


def type_of(*values: str) -> str:
    return widened(ColumnType.EMPTY, values).sql


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", "bigint"),
        ("-12", "bigint"),
        ("9223372036854775807", "bigint"),
        ("-9223372036854775808", "bigint"),
        ("9223372036854775808", "numeric"),
        ("3.50", "numeric"),
        ("-.5", "numeric"),
        ("1e5", "numeric"),
        ("1.5E-300", "numeric"),
        ("true", "boolean"),
        ("FALSE", "boolean"),
        ("2024-02-29", "date"),
        ("2024-02-29 12:30", "timestamp"),
        ("2024-02-29T12:30:59.123456", "timestamp"),
        ("2024-02-29 12:30:59.123456000", "timestamp"),
        ("2024-02-29T12:30:59Z", "timestamptz"),
        ("2024-02-29 12:30:59.5+05:30", "timestamptz"),
        ("2024-02-29 12:30:59-08", "timestamptz"),
        ("", "text"),
    ],
)
def test_a_value_has_the_narrowest_type_that_loses_nothing(value: str, expected: str) -> None:
    assert type_of(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("007", "00", "+5", "+4915112345678", "5.", "1,5", "1_000", "0x1F", " 5", "5 ", "-", ".", "٣"),
        *("NaN", "inf", "NA", "null", "yes", "t", "1e9999", "9" * 101),
        *("2023-02-29", "2024-13-01", "0000-01-01", "24-01-01", "01/02/2024", "2024-1-2", "today"),
        *("2024-01-01 24:00", "2024-01-01 12:00:60", "2024-01-01 12:00:00.1234567", "12:30"),
        *("2024-01-01 12:00 UTC", "2024-01-01 12:00+15:00", "2024-01-01T"),
    ],
)
def test_what_another_type_would_change_or_not_take_is_text(value: str) -> None:
    assert type_of(value) == "text"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("1", "2.5"), "numeric"),
        (("2.5", "1"), "numeric"),
        (("1", "", "2"), "bigint"),
        (("1", "true"), "text"),
        (("0", "1"), "bigint"),
        (("1", "007"), "text"),
        (("2024-01-01", "2024-01-01 10:00"), "timestamp"),
        (("2024-01-01 10:00Z", "2024-01-01 10:00"), "text"),
        (("2024-01-01", "2024-01-01 10:00Z"), "text"),
        (("2024-01-01", "5"), "text"),
    ],
)
def test_a_column_has_a_type_that_holds_all_its_values(values: tuple[str, ...], expected: str) -> None:
    assert type_of(*values) == expected


@given(st.dates(), st.integers(0, 31))
def test_dates_are_those_of_the_calendar(day: datetime.date, number: int) -> None:
    text = f"{day:%Y-%m}-{number:02}".rjust(10, "0")
    try:
        exists = bool(datetime.date.fromisoformat(text))
    except ValueError:
        exists = False

    assert fits(ColumnType.DATE, text) is exists


@given(st.datetimes(), st.sampled_from([" ", "T"]))
def test_what_isoformat_writes_is_a_timestamp(at: datetime.datetime, between: str) -> None:
    assert type_of(at.isoformat(between)) == "timestamp"
    assert type_of(at.replace(tzinfo=datetime.UTC).isoformat(between)) == "timestamptz"


@given(st.integers(-(2**70), 2**70))
def test_whole_numbers_are_bigint_as_long_as_they_fit(number: int) -> None:
    assert type_of(str(number)) == ("bigint" if -(2**63) <= number < 2**63 else "numeric")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_what_a_float_prints_is_a_number(number: float) -> None:
    assert type_of(repr(number)) == "numeric"


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**40), max_value=10**40, places=6))
def test_decimals_are_numeric(number: Decimal) -> None:
    assert type_of(f"{number:f}") == "numeric"
