"""How a CSV file is laid out, read from its first bytes: delimiter, line ends, header, names of columns. Pure."""

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from headway.errors import Fatal

DELIMITERS = ",;\t|"
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
class Layout:
    """`titles` are the header's fields, `names` the columns'; the rows begin at byte `start`, after `lines` lines."""

    delimiter: str
    line_end: bytes
    titles: tuple[str, ...]
    names: tuple[str, ...]
    start: int
    lines: int

    @property
    def line_break(self) -> bytes:
        """The byte that lines are counted by."""
        return self.line_end[-1:]


def read_layout(head: bytes, *, whole: bool, delimiter: str | None = None, header: bool = True) -> Layout:
    """The layout of a file that begins with `head`, or is no longer than that if `whole`.

    The first line that is not blank is the header; without a `header` it is the first row, and columns have numbers.
    Raises Fatal, saying what to do, if there is none that can be read.
    """
    for magic, what in _NOT_CSV.items():
        if head.startswith(magic):
            raise Fatal(f"The file is {what}, not CSV. Save it as CSV in UTF-8 and upload that.")
    text_start = len(_BOM) if head.startswith(_BOM) else 0
    blank = len(head[text_start:]) - len(head[text_start:].lstrip(b"\r\n"))
    text_start += blank
    if not head[text_start:].strip():
        raise Fatal("The file is empty. Upload a CSV file with a header row.")
    line_break = b"\n" if b"\n" in head[text_start:] else b"\r"
    lines = head[text_start:].split(line_break)
    _require_text(lines[0])
    sample = head[text_start:].decode("utf-8", "surrogateescape")
    delimiter = delimiter or _delimiter(sample if whole else sample[: sample.rfind(line_break.decode()) + 1])
    titles, count = _header(sample, line_break.decode(), delimiter, whole=whole)
    first = line_break.join(lines[:count])
    _require_text(first)
    if len(titles) > MAX_COLUMNS:
        raise Fatal(f"The header has {len(titles):,} columns; a table takes at most {MAX_COLUMNS:,}. Split the file.")
    line_end = b"\r\n" if line_break == b"\n" and first.endswith(b"\r") else line_break
    if not header:
        titles, count, first = [f"column_{number}" for number in range(1, len(titles) + 1)], 0, b""
    return Layout(
        delimiter=delimiter,
        line_end=line_end,
        titles=tuple(titles),
        names=tuple(column_names(titles)),
        start=min(text_start + len(first) + (count > 0), len(head)),
        lines=head[:text_start].count(line_break) + count,
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


def _require_text(header: bytes) -> None:
    try:
        text = header.decode()
    except UnicodeDecodeError:
        raise Fatal(
            "The header row is not UTF-8: the file is in another encoding, or not CSV. "
            "Save it as CSV in UTF-8 and upload that."
        ) from None
    if _CONTROL.search(text):
        raise Fatal("The file is binary, not CSV. Save it as CSV in UTF-8 and upload that.")


def _delimiter(sample: str) -> str:
    """The delimiter by which the header has several fields and most rows as many as the header."""

    def merit(delimiter: str) -> tuple[float, int]:
        header, *rows = _fields(sample, delimiter) or [[]]
        if len(header) < 2:
            return 0, 0
        agreeing = sum(len(row) == len(header) for row in rows)
        return (agreeing + 1) / (len(rows) + 1), len(header)

    return max(DELIMITERS, key=merit)


def _fields(sample: str, delimiter: str) -> list[list[str]]:
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
    return [row for row in islice(rows, _SAMPLE_LINES) if row]


def _header(sample: str, line_break: str, delimiter: str, *, whole: bool) -> tuple[list[str], int]:
    """The header's fields and how many lines it takes."""
    lines = [f"{line}{line_break}" for line in sample.split(line_break)]
    reader = csv.reader(lines if whole else lines[:-1], delimiter=delimiter, strict=True)
    try:
        titles = next(reader)
    except StopIteration:
        raise Fatal(
            f"The header row is longer than {len(sample):,} characters. Shorten it, or check the file."
        ) from None
    except csv.Error as error:
        raise Fatal(
            f"The header row has a quote that does not close or text after a closing quote ({error}). "
            "Correct it and upload the file again."
        ) from None
    return [title.strip() for title in titles], reader.line_num
