"""What a column of an answer is, and its values as JSON has them. Pure."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

# Types of Postgres whose values are numbers of JSON; numeric is not, for a double would lose its digits.
_NUMBERS = frozenset({"int2", "int4", "int8", "oid", "float4", "float8"})

# Types whose values are JSON already, as text.
DOCUMENTS = frozenset({"json", "jsonb", "json[]", "jsonb[]"})
_SQLITE = {int: "integer", float: "real", str: "text", bytes: "blob"}


@dataclass(frozen=True, slots=True)
class Column:
    """`type` is the name of the source's type, such as `int8` or `text[]`; None where it has none."""

    name: str
    type: str | None


def typed(columns: Sequence[Column], rows: Sequence[Sequence[Any]]) -> list[Column]:
    """Columns of SQLite with the type of their first value that is not NULL; others as they are."""
    return [
        column
        if column.type is not None
        else Column(column.name, next((_SQLITE[type(row[place])] for row in rows if row[place] is not None), None))
        for place, column in enumerate(columns)
    ]


def converters(columns: Sequence[Column]) -> list[Callable[[Any], Any]]:
    """What makes JSON values of each column's values that are not None."""
    return [_json if column.type in DOCUMENTS else _plain for column in columns]


def as_json(values: Sequence[Any], converters: Iterable[Callable[[Any], Any]]) -> list[Any]:
    """Values as JSON has them."""
    return [None if value is None else convert(value) for value, convert in zip(values, converters, strict=False)]


def encoded(row: Sequence[Any], converters: Sequence[Callable[[Any], Any]]) -> bytes:
    """A row as a JSON array."""
    return json.dumps(as_json(row, converters), separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def numeric(column: Column) -> bool:
    """Whether the column's type says that its values are numbers, however they are written."""
    return column.type in _NUMBERS or column.type == "numeric"


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    if isinstance(value, asyncpg.Range):
        return _range(value)
    if isinstance(value, list | tuple | asyncpg.Record):
        return [None if item is None else _plain(item) for item in value]
    return str(value)


def _range(value: "asyncpg.Range[Any]") -> str:
    """As Postgres writes it."""
    if value.isempty:
        return "empty"
    ends = ["" if end is None else str(end) for end in (value.lower, value.upper)]
    return f"{'[' if value.lower_inc else '('}{','.join(ends)}{']' if value.upper_inc else ')'}"


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [None if item is None else _json(item) for item in value]
    return json.loads(value, parse_float=_float)


def _float(digits: str) -> float | str:
    """A number of JSON that is beyond a double stays as its digits."""
    number = float(digits)
    return number if math.isfinite(number) else digits


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
