"""Rows of a source as CSV and as lines of JSON. Pure."""

import csv
import io
import json
from collections.abc import Sequence
from itertools import repeat
from typing import Any

from headway.sources.columns import DOCUMENTS, Column, as_json, converters, numeric

# What makes a spreadsheet take a cell for a formula when it stands first in it.
FORMULAS = frozenset("=+-@\t\r\n")
_AS_THEY_ARE = {str, int, type(None)}


class CsvRows:
    """As RFC 4180 has it, in UTF-8, with a header. NULL is an empty field."""

    content_type = "text/csv"

    def __init__(self, columns: Sequence[Column], *, delimiter: str, escape: bool) -> None:
        self._delimiter = delimiter
        self._escape = [escape and not numeric(column) for column in columns]
        names = [column.name for column in columns]
        self.head = self._lines([_escaped(names) if escape else names])

    def encode(self, rows: Sequence[Sequence[Any]]) -> bytes:
        columns = [
            _escaped(texts) if escape else texts
            for escape, texts in zip(self._escape, map(_texts, zip(*rows, strict=True)), strict=True)
        ]
        return self._lines(zip(*columns, strict=True))

    def _lines(self, rows: Any) -> bytes:
        written = io.StringIO()
        csv.writer(written, delimiter=self._delimiter).writerows(rows)
        return written.getvalue().encode(errors="replace")


class JsonRows:
    """An object a line."""

    content_type = "application/x-ndjson"
    head = b""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._names = [column.name for column in columns]
        self._documents = [column.type in DOCUMENTS for column in columns]
        self._convert = converters(columns)

    def encode(self, rows: Sequence[Sequence[Any]]) -> bytes:
        encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
        columns = [
            values if not document and set(map(type, values)) <= _AS_THEY_ARE else as_json(values, repeat(convert))
            for document, convert, values in zip(self._documents, self._convert, zip(*rows, strict=True), strict=True)
        ]
        lines = [encode(dict(zip(self._names, row, strict=True))) for row in zip(*columns, strict=True)]
        return "\n".join([*lines, ""]).encode(errors="replace")


def text(value: Any) -> Any:
    """A value as it stands in a field: words for booleans, JSON for arrays, hex digits for bytes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    plain = as_json([value], converters([Column("", None)]))[0]
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, list) else plain


def _texts(values: Sequence[Any]) -> Sequence[Any]:
    return values if set(map(type, values)) <= _AS_THEY_ARE else [text(value) for value in values]


def _escaped(values: Sequence[Any]) -> list[Any]:
    """A `'` before what a spreadsheet would run; it shows the rest as text."""
    return [f"'{value}" if type(value) is str and value[:1] in FORMULAS else value for value in values]
