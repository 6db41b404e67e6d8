"""Parameters by name for Postgres, which has them by number only. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from headway.errors import QueryRefused

# What is not a parameter though it has a colon: literals, quoted names, comments, casts, slices.
_TOKENS = re.compile(
    r"""
    [eE]'(?:[^'\\]|\\.|'')*+'
    | '(?:[^']|'')*+'
    | "(?:[^"]|"")*+"
    | (?P<tag>\$(?:[^\W\d]\w*)?\$).*?(?P=tag)
    | --[^\n]*+
    | /\*.*?\*/
    | ::
    | :(?P<name>[^\W\d]\w*)
    """,
    re.VERBOSE | re.DOTALL,
)


def numbered(sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The statement with `$1, $2` for each `:name`, and the values in that order; a list is passed on as it is.

    Values are bound in any case: what is taken for a parameter by mistake makes a wrong statement, never another one.
    Raises QueryRefused if a name has no value, or a value no name.
    """
    if not isinstance(parameters, Mapping):
        return sql, list(parameters)
    places: dict[str, int] = {}

    def place(match: re.Match[str]) -> str:
        if (name := match["name"]) is None:
            return match[0]
        return f"${places.setdefault(name, len(places) + 1)}"

    text = _TOKENS.sub(place, sql)
    if missing := sorted(places.keys() - parameters.keys()):
        raise QueryRefused(f"The statement has a parameter :{missing[0]}, for which parameters has no value.")
    if unused := sorted(parameters.keys() - places.keys()):
        raise QueryRefused(f"parameters has {unused[0][:100]!r}, but the statement has no :{unused[0][:100]}.")
    return text, [parameters[name] for name in places]
