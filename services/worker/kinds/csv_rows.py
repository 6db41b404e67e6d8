"""The rows of a CSV file, checked block by block and given back in the form that COPY takes. Pure.

Most rows go through one regular expression, made from the columns' types, and are passed on as they are: five times
as fast as looking at each value. Only where it stops are rows looked at one by one.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.kinds.csv_layout import RECORD_LIMIT, Layout
from services.worker.kinds.csv_types import PATTERNS, ColumnType, fits, widened

_PARSED_LINES = 100
_SHOWN = 1000
_VALUE_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that is left out: the byte and the line that it begins on, why, and its text."""

    offset: int
    line: int
    reason: str
    row: str


class RowReader:
    """Takes the bytes after the header, in order, and gives back whole rows.

    `match` is quick. While it leaves the reader `stuck`, call `resolve`, and after the last byte `end`; both may take
    long enough to be worth a thread. `types` widen as the values ask for it, `rows` counts what was given back,
    `rejected` collects what was not, and `fault` says, after `end`, why the file as a whole cannot be read.

    What was given back or rejected ends at the byte `offset` of the file, after `lines` lines. Where that is
    `between_rows`, another reader that is made with these numbers and types goes on as this one would.
    """

    def __init__(
        self,
        layout: Layout,
        types: Sequence[ColumnType] = (),
        *,
        offset: int | None = None,
        lines: int | None = None,
        rows: int = 0,
    ) -> None:
        self.types = list(types) or [given or ColumnType.EMPTY for given in layout.types]
        self.rows = rows
        self.offset = layout.start if offset is None else offset
        self.lines = layout.lines if lines is None else lines
        self.rejected: list[Rejected] = []
        self.fault = ""
        self._layout = layout
        self._given = [(place, given) for place, given in enumerate(layout.types) if given is not None]
        self._break = layout.line_break
        self._not_marks = bytes(set(range(256)) - {*b'"', *self._break})
        self._rest = b""
        self._enough = 0
        self._pattern: re.Pattern[bytes] | None = None
        self._skipping = _Skipping(layout)

    @property
    def between_rows(self) -> bool:
        """Whether `offset` is where a row begins, not inside of one that is passed over."""
        return not self._skipping.line

    @property
    def stuck(self) -> bool:
        """Whether there is a line that `match` could not give back."""
        size = len(self._rest)
        return size > RECORD_LIMIT or (size >= self._enough and self._break in self._rest)

    def match(self, data: bytes) -> bytes:
        """Take `data`; give back the rows that fit the types, as they are."""
        if self._skipping.line:
            after = self._skipping.after(data)
            self._pass(data[: len(data) - len(after)])
            data = after
        self._rest += data
        if len(self._rest) < self._enough:
            return b""
        self._enough = 0
        return self._matched()

    def resolve(self) -> bytes:
        """Give back the rows that are whole; those looked at one by one are quoted anew."""
        given = []
        while self.stuck:
            types = self.types
            given.append(self._parsed())
            if self.types != types:
                self._pattern = None
            elif self._layout.dialect.common:
                self._pattern = self._pattern or re.compile(_rows_pattern(self._layout, self.types))
                given.append(self._matched())
        return b"".join(given)

    def end(self) -> bytes:
        """Give back the last row, which no line end follows."""
        given = self._tried(b"")
        before = len(self.rejected)
        if self._rest and not self._rest.endswith(self._break):
            given += self._tried(self._break)
        if len(self.rejected) > before:
            last = self.rejected[-1]
            self.fault = (
                f"The last row has no line end and cannot be read (line {last.line:,}: {last.reason}): the file is cut "
                "off there. Upload the whole file again, or correct the row."
            )
        if self._rest or self._skipping.open:
            self.fault = (
                f"The row on line {self._skipping.line or self.lines + 1:,} has no closing quote: the file is cut "
                "off after it, or the quote is a mistake. Upload the whole file again, or correct the row."
            )
        return given

    def _tried(self, data: bytes) -> bytes:
        self._enough = 0
        return self.match(data) + self.resolve()

    def _matched(self) -> bytes:
        if self._pattern is None:
            return b""
        rows = self._rest[: _end(self._pattern, self._rest, RECORD_LIMIT)]
        try:
            rows.decode()
        except UnicodeDecodeError as error:
            rows = rows[: _end(self._pattern, rows, rows.rfind(self._break, 0, error.start) + 1)]
        self._rest = self._rest[len(rows) :]
        self._pass(rows)
        # Line ends outside quotes: of the quotes and line ends in order, those between an even number of quotes.
        marks = rows.translate(None, self._not_marks).replace(b'""', b"")
        self.rows += sum(map(len, marks.split(b'"')[::2]))
        return rows

    def _parsed(self) -> bytes:
        """The next rows one by one, a hundred lines of them or the one row that has more."""
        count, used = _PARSED_LINES, 0
        while not used:
            # Whether a row is too long must not depend on the pieces that the file comes in.
            lines = self._rest[:RECORD_LIMIT].split(self._break, count)[:-1]
            rows, used = self._split(lines)
            if len(lines) < count:
                break
            count *= 2
        if not used:
            return self._wait()
        size = sum(map(len, lines[:used])) + used
        self._rest = self._rest[size:]
        self.offset += size
        self.lines += used
        self.rows += len(rows)
        if rows:
            self.types = [
                given or widened(kept, values)
                for given, kept, values in zip(self._layout.types, self.types, zip(*rows, strict=True), strict=True)
            ]
        written = io.StringIO()
        csv.writer(
            written,
            delimiter=self._layout.dialect.delimiter,
            lineterminator=self._layout.line_end.decode(),
            quoting=csv.QUOTE_ALL,
        ).writerows(rows)
        return written.getvalue().encode()

    def _split(self, lines: Sequence[bytes]) -> tuple[list[list[str]], int]:
        """The rows in `lines` that can be taken, and how many lines the whole ones fill."""
        text = [(line + self._break).decode("utf-8", "surrogateescape") for line in lines]
        reader = self._layout.dialect.rows(text)
        rows, used = [], 0
        while used < len(text):
            row, reason = [], ""
            try:
                row = next(reader)
            except csv.Error as error:
                if "end of data" in str(error):
                    break
                reason = "carriage return outside quotes" if "new-line" in str(error) else "text after a closing quote"
            raw = "".join(text[used : reader.line_num])
            reason = reason or self._reason(row, raw)
            if reason:
                offset = self.offset + sum(map(len, lines[:used])) + used
                self._reject(offset, self.lines + used + 1, reason, raw.encode("utf-8", "surrogateescape"))
            elif row:
                rows.append(row)
            used = reader.line_num
        return rows, used

    def _reason(self, row: Sequence[str], raw: str) -> str:
        if "\0" in raw:
            return "a NUL character"
        try:
            raw.encode()
        except UnicodeEncodeError:
            return "not UTF-8; save the file as UTF-8"
        if row and len(row) != len(self.types):
            return f"{len(row)} {'field' if len(row) == 1 else 'fields'}, not {len(self.types)} as in the header"
        for place, given in self._given:
            if row and row[place] and not fits(given, row[place]):
                return f"{self._layout.names[place]} is no {given.value}: {row[place][:_VALUE_SHOWN]}"
        return ""

    def _wait(self) -> bytes:
        """No row is whole before there is more; one that is too long is passed over, and what follows given back."""
        if len(self._rest) <= RECORD_LIMIT:
            # Twice as much before the next try, so that long rows are not read over and over.
            self._enough = min(2 * len(self._rest), RECORD_LIMIT + 1)
            return b""
        head, more = self._rest[:RECORD_LIMIT], self._rest[RECORD_LIMIT:]
        self._reject(self.offset, self.lines + 1, "longer than 1 MiB", head[:_SHOWN])
        self._skipping.begin(self.lines + 1, head)
        self._pass(head)
        self._rest = b""
        return self.match(more)

    def _pass(self, data: bytes) -> None:
        self.offset += len(data)
        self.lines += data.count(self._break)

    def _reject(self, offset: int, line: int, reason: str, row: bytes) -> None:
        text = row.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
        self.rejected.append(Rejected(offset, line, reason, text.rstrip("\r\n")))


class _Skipping:
    """Finds where a row ends that is too long to keep. `line` is where it began, or 0."""

    def __init__(self, layout: Layout) -> None:
        # What is quoted or escaped may have line ends in it that end no row.
        quote, escape = (re.escape(mark or "").encode() for mark in (layout.dialect.quote, layout.dialect.escape))
        plain = b"[^%b]*+" % (quote + escape + layout.line_break)
        inside = b"[^%b]*+" % (quote + escape)
        if escape:
            inside += b"(?>(?:%b(?s:.)%b)*)" % (escape, inside)
        pairs = [*([quote + inside + quote] if quote else []), *([escape + b"(?s:.)"] if escape else [])]
        end = plain + (b"(?>(?:(?:%b)%b)*)" % (b"|".join(pairs), plain) if pairs else b"") + layout.line_break
        self._end = re.compile(end)
        self._end_in_quotes = re.compile(inside + quote + end)
        self._escaped = re.compile(escape + b"(?s:.)") if escape else None
        self._quote, self._escape = (mark.encode() for mark in (layout.dialect.quote, layout.dialect.escape or ""))
        self.line = 0
        self.in_quotes = False
        self.escaping = False

    @property
    def open(self) -> bool:
        """Whether more must follow, for a quote to close or to be escaped."""
        return self.in_quotes or self.escaping

    def begin(self, line: int, row: bytes) -> None:
        self.line = line
        self.in_quotes = self.escaping = False
        self._follow(row)

    def after(self, data: bytes) -> bytes:
        """What follows the row in `data`, which it may fill."""
        if self.escaping:
            data, self.escaping = data[1:], False
        found = (self._end_in_quotes if self.in_quotes else self._end).match(data)
        if found is None:
            self._follow(data)
            return b""
        self.line, self.in_quotes = 0, False
        return data[found.end() :]

    def _follow(self, data: bytes) -> None:
        if self._escaped:
            data = self._escaped.sub(b"", data)
            self.escaping = data.endswith(self._escape)
        if self._quote:
            self.in_quotes ^= data.count(self._quote) % 2 == 1


def _rows_pattern(layout: Layout, types: Sequence[ColumnType]) -> bytes:
    """Matches as many rows as fit the types, from the first on. What it matches means the same to COPY."""
    delimiter = re.escape(layout.dialect.delimiter)
    fields = {
        ColumnType.EMPTY: '(?>(?:"")?)',
        ColumnType.TEXT: rf'(?:"[^"\x00]*+(?>(?:""[^"\x00]*+)*)"|[^"{delimiter}\r\n\x00]*+)',
        **{column_type: f'(?:{value}|"{value}"|)' for column_type, value in PATTERNS.items()},
    }
    # In a table of one column a blank line is no row, and `\.` would end the data before Postgres 18.
    first = r"(?![\r\n]|\\\.)" if len(types) == 1 else ""
    row = first + delimiter.join(fields[column_type] for column_type in types) + layout.line_end.decode()
    return f"(?:(?>{row}))*".encode()


def _end(pattern: re.Pattern[bytes], data: bytes, limit: int) -> int:
    match = pattern.match(data, 0, limit)
    return match.end() if match else 0
