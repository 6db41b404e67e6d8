"""Text with places for a row's values: `https://api.example/items/{id}`."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from pydantic_core import to_json

# Braces around anything else, as in JSON or CSS, are text.
PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_ .-]{0,99})\}")

Row = Mapping[str, Any]


class Template:
    """Filled with values as they are, or as `written` writes each; a template that is one place alone is its value."""

    def __init__(self, text: str, written: Callable[[str], str] | None = None) -> None:
        # Text and names by turns, text first.
        self._parts = PLACE.split(text)
        self._alone = len(self._parts) == 3 and not self._parts[0] and not self._parts[2]
        self._written = written

    @property
    def names(self) -> list[str]:
        """The columns that it needs."""
        return self._parts[1::2]

    def fill(self, row: Row) -> str:
        """Raises KeyError, with its name, for a column that the row does not have."""
        if self._alone:
            return plain(row[self._parts[1]])
        parts = list(self._parts)
        for place in range(1, len(parts), 2):
            value = plain(row[parts[place]])
            parts[place] = self._written(value) if self._written else value
        return "".join(parts)


class JsonTemplate:
    """A JSON value in which each string is a template; one that is a place alone becomes the row's own value."""

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def names(self) -> list[str]:
        """The columns that it needs."""
        return [name for text in _strings(self._value) for name in PLACE.findall(text)]

    def fill(self, row: Row) -> Any:
        """Raises KeyError, with its name, for a column that the row does not have."""
        return _filled(self._value, row)


def url_template(text: str) -> Template:
    """One whose values are percent-encoded, so that they stay where they are put."""
    return Template(text, lambda value: quote(value, safe=""))


def plain(value: Any) -> str:
    """A value as text: strings as they are, null as nothing, all else as JSON writes it."""
    if isinstance(value, str):
        return value
    return "" if value is None else to_json(value).decode()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _filled(value: Any, row: Row) -> Any:
    if isinstance(value, str):
        place = PLACE.fullmatch(value)
        return row[place[1]] if place else Template(value).fill(row)
    if isinstance(value, dict):
        return {name: _filled(item, row) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, row) for item in value]
    return value
