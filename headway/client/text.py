"""Text for people: numbers, tables, and what a server says made harmless for a terminal."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

# Joiners that scripts and emoji need; every other invisible character is shown as an escape.
JOINERS = "\u200c\u200d"
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
MOST_ROWS = 50


def inert(value: object) -> str:
    """Text on one line that no terminal obeys: control and bidirectional characters become `\\x1b` and the like."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in INVISIBLE and character not in JOINERS
        else character
        for character in text
    )


def as_json(value: Any) -> str:
    """One line of JSON in ASCII, so nothing in it acts on a terminal."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def number(value: float) -> str:
    """`1234567` as `1,234,567`; at most three decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")


def size(value: float) -> str:
    """Bytes with a decimal prefix: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """`1.5 s`, `42 s`, `3 m 20 s`, `2 h 5 m`, `3 d`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def moment(timestamp: str) -> str:
    """An RFC 3339 time as local time."""
    return f"{datetime.fromisoformat(timestamp).astimezone():%Y-%m-%d %H:%M:%S}"


def took(job: Mapping[str, Any]) -> str | None:
    """How long a job ran until it ended; None if it did not."""
    if not job["started_at"] or not job["finished_at"]:
        return None
    ran = datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["started_at"])
    return duration(ran.total_seconds())


def facts(progress: Mapping[str, Any], *, ended: bool = False) -> list[str]:
    """A progress as short phrases: share, amount, rate and time left until it has ended, counts."""
    done, total, unit = progress["done"], progress.get("total"), progress.get("unit") or "items"
    found = [f"{percent(done, total):3d} %"] if total else []
    if unit == "bytes":
        found.append(f"{size(done)} of {size(total)}" if total else size(done))
    else:
        found.append(f"{number(done)} of {number(total)} {inert(unit)}" if total else f"{number(done)} {inert(unit)}")
    if (rate := progress.get("rate")) and not ended and unit != "seconds":
        found.append(f"{size(rate)}/s" if unit == "bytes" else f"{number(round(rate, int(rate < 10)))} {inert(unit)}/s")
    if (eta := progress.get("eta")) and not ended:
        found.append(f"{duration(eta)} left")
    counts = progress.get("counts") or {}
    return found + [f"{number(count)} {inert(name)}" for name, count in counts.items() if name != unit]


def percent(done: float, total: float) -> int:
    """0 to 100, and 100 only when all is done."""
    return max(0, min(100, int(100 * done / total)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as what they hold."""
    from rich.cells import cell_len  # noqa: PLC0415 - rich is slow to import

    lines = [header, *rows]
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def readable(value: Any) -> list[str]:
    """A result as lines of `name: value`; lists of objects become tables."""
    if not isinstance(value, Mapping):
        return [] if value is None else [f"result: {_scalar(value)}"]
    lines = []
    for name, item in value.items():
        if isinstance(item, list) and item and all(isinstance(row, Mapping) for row in item):
            lines += [f"{inert(name)}:", *(f"  {line}" for line in _rows(item))]
        else:
            lines.append(f"{inert(name)}: {_scalar(item)}")
    return lines


def _rows(items: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for item in items for name in item)
    header = [name for name in names if any(item.get(name) is not None for item in items)]
    shown = [["" if item.get(name) is None else _scalar(item[name]) for name in header] for item in items[:MOST_ROWS]]
    more = [f"… and {len(items) - MOST_ROWS:,} more; --json shows all"] if len(items) > MOST_ROWS else []
    return [*table([inert(name) for name in header], shown), *more]


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if value is None:
        return "none"
    return inert(value) if isinstance(value, str) else as_json(value)
