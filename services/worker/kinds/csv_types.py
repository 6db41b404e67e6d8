"""The type of a CSV column: the narrowest that holds every one of its values without losing anything. Pure."""

import re
from collections.abc import Iterable
from enum import Enum

# Groups are atomic, `(?>…)`, where possessive ones, `(?:…)?+`, would do: Python before 3.11.5 loses its place in those.

_DATE = (
    "(?!0000)(?:"
    "[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    "|(?:[0-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
# Postgres keeps microseconds: more digits pass only if they are zeros.
_TIME = r"[ T](?:[01][0-9]|2[0-3]):[0-5][0-9](?>(?::[0-5][0-9](?>(?:\.[0-9]{1,6}+0*+)?))?)"
_OFFSET = "(?:Z|[+-](?:0[0-9]|1[0-4])(?>(?::?[0-5][0-9])?))"


class ColumnType(Enum):
    """`EMPTY` is a column without values so far; it becomes text."""

    EMPTY = "empty"
    BOOLEAN = "boolean"
    BIGINT = "bigint"
    NUMERIC = "numeric"
    DATE = "date"
    TIMESTAMP = "timestamp"
    TIMESTAMPTZ = "timestamptz"
    TEXT = "text"

    @property
    def sql(self) -> str:
        """The type's name in Postgres."""
        return "text" if self is ColumnType.EMPTY else self.value


# Leading zeros and plus signs belong to codes and telephone numbers, so what has them is text. Decimals are numeric
# and not double precision: prices must not lose digits, and what floats print fits numeric too.
PATTERNS = {
    ColumnType.BOOLEAN: "(?:true|false|True|False|TRUE|FALSE)",
    # Up to 9e18: `_misfits` looks at the few numbers between that and the end of the type.
    ColumnType.BIGINT: "-?+(?:0|[1-9][0-9]{0,17}+|[1-8][0-9]{18}+)",
    ColumnType.NUMERIC: (
        r"-?+(?:[1-9][0-9]{0,99}+|0|(?=\.))"
        r"(?:\.[0-9]{1,100}+(?>(?:[eE][-+]?[0-9]{1,3}+)?)|[eE][-+]?[0-9]{1,3}+|)"
    ),
    ColumnType.DATE: _DATE,
    ColumnType.TIMESTAMP: f"{_DATE}(?>(?:{_TIME})?)",
    ColumnType.TIMESTAMPTZ: f"{_DATE}{_TIME}{_OFFSET}",
}
_COMPILED = {column_type: re.compile(pattern) for column_type, pattern in PATTERNS.items()}
_WHOLE_NUMBER = re.compile("-?[1-9][0-9]{18}")

# What a column may become when a value does not fit, narrowest first. All that fitted before fits there too.
_WIDER = {
    ColumnType.EMPTY: (*PATTERNS, ColumnType.TEXT),
    ColumnType.BIGINT: (ColumnType.NUMERIC, ColumnType.TEXT),
    ColumnType.DATE: (ColumnType.TIMESTAMP, ColumnType.TEXT),
}


def fits(column_type: ColumnType, value: str) -> bool:
    """Whether a column of the type holds the value, which is not empty, without losing anything."""
    return not _misfits(column_type, [value])


def widened(column_type: ColumnType, values: Iterable[str]) -> ColumnType:
    """The narrowest type that holds what a column of the type holds and these values too; empty ones say nothing."""
    misfits = _misfits(column_type, filter(None, values))
    while misfits:
        wider = _WIDER.get(column_type, (ColumnType.TEXT,))
        column_type = next(candidate for candidate in wider if fits(candidate, misfits[0]))
        misfits = _misfits(column_type, misfits)
    return column_type


def _misfits(column_type: ColumnType, values: Iterable[str]) -> list[str]:
    if column_type is ColumnType.TEXT:
        return []
    if column_type is ColumnType.EMPTY:
        return list(values)
    matches = _COMPILED[column_type].fullmatch
    misfits = [value for value in values if not matches(value)]
    if column_type is ColumnType.BIGINT:
        return [value for value in misfits if not (_WHOLE_NUMBER.fullmatch(value) and -(2**63) <= int(value) < 2**63)]
    return misfits
