"""How a CSV file is laid out, told or read from its first bytes: dialect, line ends, header, columns. Pure."""

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from headway.errors import Fatal
from services.worker.kinds.csv_types import ColumnType

if TYPE_CHECKING:
    from _csv import Reader

DELIMITERS = ",;\t|"
# What else files are quoted and escaped with, if the usual way does not make rows of them.
UNUSUAL = (('"', "\\"), ("'", None), ("'", "\\"))
MAX_COLUMNS = 1600
RECORD_LIMIT = 1 << 20
_NAME_BYTES = 63
_BOM = b"\xef\xbb\xbf"
_SAMPLE_LINES = 100
_SYSTEM_COLUMNS = {"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_NOT_CSV = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x1f\x8b": "compressed twice",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
}

# The module's own limit, 128 KiB a field, holds for the whole process; rows have a limit of their own here.
csv.field_size_limit(2 * RECORD_LIMIT)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What separates fields, what they are quoted with (empty: nothing), and what takes its meaning from a character.

    Each is one character of ASCII.
    """

    delimiter: str = ","
    quote: str = '"'
    escape: str | None = None

    @property
    def common(self) -> bool:
        """Whether COPY reads it as Python does, and no number or date has its delimiter in it."""
        return self.quote == '"' and self.escape is None and self.delimiter not in "+-.: "

    def rows(self, lines: Iterable[str], *, strict: bool = True) -> "Reader":
        """The rows in lines, of which each has its end. If strict, raises csv.Error for quotes that are wrong."""
        quotes: dict[str, Any] = (
            {"quotechar": self.quote} if self.quote else {"quoting": csv.QUOTE_NONE, "quotechar": None}
        )
        return csv.reader(lines, delimiter=self.delimiter, escapechar=self.escape, strict=strict, **quotes)


@dataclass(frozen=True, slots=True)
class Layout:
    """`titles` are the header's fields, `names` the columns'; the rows begin at byte `start`, after `lines` lines.

    `types` has those that are given, and None for the columns whose values decide.
    """

    dialect: Dialect
    line_end: bytes
    titles: tuple[str, ...]
    names: tuple[str, ...]
    types: tuple[ColumnType | None, ...]
    start: int
    lines: int

    @property
    def line_break(self) -> bytes:
        """The byte that lines are counted by."""
        return self.line_end[-1:]


def read_layout(
    head: bytes,
    *,
    whole: bool,
    delimiter: str | None = None,
    quote: str | None = None,
    escape: str | None = None,
    header: bool = True,
    types: Mapping[str, ColumnType] | None = None,
) -> Layout:
    """The layout of a file that begins with `head`, or is no longer than that if `whole`.

    The first line that is not blank is the header; without a `header` it is the first row, and columns have numbers.
    A delimiter that is not given is found, and so are quote and escape if neither is.
    `types` are those of columns by their names. Raises Fatal, saying what to do, if there is no header that can be
    read, or no column of such a name.
    """
    for magic, what in _NOT_CSV.items():
        if head.startswith(magic):
            raise Fatal(f"The file is {what}, not CSV. Save it as CSV in UTF-8 and upload that.")
    text_start = len(_BOM) if head.startswith(_BOM) else 0
    blank = len(head[text_start:]) - len(head[text_start:].lstrip(b"\r\n"))
    text_start += blank
    if not head[text_start:].strip():
        raise Fatal("The file is empty. Upload a CSV file with a header row.")
    lines = list(io.StringIO(head[text_start:].decode("utf-8", "surrogateescape"), newline=""))
    # Marks that are given may be control characters.
    marks = dict.fromkeys(map(ord, f"{delimiter or ''}{quote or ''}{escape or ''}"))
    _require_text(lines[0].translate(marks))
    if not whole:
        lines.pop()
    if not lines:
        raise Fatal(f"The header row is longer than {len(head):,} bytes. Shorten it, or check the file.")
    dialect = _dialect(lines, delimiter, quote, escape)
    titles, count = _header(lines, dialect)
    first = "".join(lines[:count])
    _require_text(first.translate(marks))
    if len(titles) > MAX_COLUMNS:
        raise Fatal(f"The header has {len(titles):,} columns; a table takes at most {MAX_COLUMNS:,}. Split the file.")
    line_end = next((end for end in ("\r\n", "\n", "\r") if first.endswith(end)), "\n").encode()
    if not header:
        titles, first = [f"column_{number}" for number in range(1, len(titles) + 1)], ""
    names = column_names(titles)
    start = text_start + len(first.encode())
    return Layout(
        dialect=dialect,
        line_end=line_end,
        titles=tuple(titles),
        names=tuple(names),
        types=tuple(_given(types or {}, names)),
        start=start,
        lines=head[:start].count(line_end[-1:]),
    )


def column_names(titles: Sequence[str]) -> list[str]:
    """Names for columns: lower case, words joined by `_`, at most 63 bytes; blank and repeated ones get a number."""
    names: list[str] = []
    taken = set(_SYSTEM_COLUMNS)
    for number, title in enumerate(titles, 1):
        words = re.sub(r"\W+", " ", unicodedata.normalize("NFKC", title)).lower().split()
        name = _shortened("_".join(words) or f"column_{number}", _NAME_BYTES)
        if name[0].isdigit():
            name = _shortened(f"_{name}", _NAME_BYTES)
        stem, repeat = name, 1
        while name in taken:
            repeat += 1
            suffix = f"_{repeat}"
            name = _shortened(stem, _NAME_BYTES - len(suffix)) + suffix
        taken.add(name)
        names.append(name)
    return names


def _shortened(name: str, size: int) -> str:
    return name.encode()[:size].decode(errors="ignore")


def _given(types: Mapping[str, ColumnType], names: Sequence[str]) -> Iterator[ColumnType | None]:
    if unknown := [name for name in types if name not in names]:
        raise Fatal(f"types has {unknown[0][:100]!r}, but the file has no such column; it has: {', '.join(names)}.")
    yield from map(types.get, names)


def _require_text(header: str) -> None:
    try:
        header.encode()
    except UnicodeEncodeError:
        raise Fatal(
            "The header row is not UTF-8: the file is in another encoding, or not CSV. "
            "Save it as CSV in UTF-8 and upload that."
        ) from None
    if _CONTROL.search(header):
        raise Fatal("The file is binary, not CSV. Save it as CSV in UTF-8 and upload that.")


def _dialect(lines: Sequence[str], delimiter: str | None, quote: str | None, escape: str | None) -> Dialect:
    """The usual one, unless only another makes all of the first rows as long as the header."""
    usual = Dialect(delimiter or _delimiter(lines, quote or '"', escape), '"' if quote is None else quote, escape)
    if quote is not None or escape is not None or _agrees(lines, usual):
        return usual
    # Quotes that are wrong must not become text of a file with others.
    doubled = any('"' in line for line in lines)
    others = [
        Dialect(delimiter or _delimiter(lines, *marks), *marks)
        for marks in UNUSUAL
        if (delimiter is None or delimiter not in marks) and (marks[0] == '"' or not doubled)
    ]
    return next((dialect for dialect in others if _agrees(lines, dialect)), usual)


def _agrees(lines: Sequence[str], dialect: Dialect) -> bool:
    try:
        rows = [row for row in islice(dialect.rows(lines), _SAMPLE_LINES) if row]
    except csv.Error:
        return False
    return len(rows[0]) > 1 and len(set(map(len, rows))) == 1


def _delimiter(lines: Sequence[str], quote: str, escape: str | None) -> str:
    """The delimiter by which the header has several fields and most rows as many as the header."""

    def merit(delimiter: str) -> tuple[float, int]:
        found = Dialect(delimiter, quote, escape).rows(lines, strict=False)
        header, *rows = [row for row in islice(found, _SAMPLE_LINES) if row] or [[]]
        if len(header) < 2:
            return 0, 0
        agreeing = sum(len(row) == len(header) for row in rows)
        return (agreeing + 1) / (len(rows) + 1), len(header)

    return max(DELIMITERS, key=merit)


def _header(lines: Sequence[str], dialect: Dialect) -> tuple[list[str], int]:
    """The header's fields and how many lines it takes."""
    reader = dialect.rows(lines)
    try:
        titles = next(reader)
    except csv.Error as error:
        raise Fatal(
            f"The header row has a quote that does not close or text after a closing quote ({error}). "
            "Correct it and upload the file again, or say what the file's quote and escape are."
        ) from None
    return [title.strip() for title in titles], reader.line_num
