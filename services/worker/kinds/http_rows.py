"""The rows of an uploaded file of URLs: one a line, CSV with a header, or a JSON object a line."""

import csv
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Literal

from pydantic_core import from_json

from headway import Fatal
from headway.context import InputFile
from services.worker.kinds.csv_text import Text

MOST_ROWS = 1_000_000
# Of one row: bounds memory.
LONGEST_ROW = 1 << 20
DELIMITERS = ",;\t"

Format = Literal["text", "csv", "jsonl"]
Row = Mapping[str, Any]
# The text of each, and the line on which it ends.
Records = list[tuple[int, str]]


class Rows:
    """A file's rows, to be read any number of times. A row that cannot be read is a sentence that says why.

    `columns` are the names that rows have; None if each row has its own.
    """

    def __init__(self, file: InputFile, format: Format, columns: list[str] | None, delimiter: str = ",") -> None:
        self._file = file
        self._format = format
        self.columns = columns
        self._delimiter = delimiter

    @classmethod
    async def open(cls, file: InputFile, format: Format | None) -> "Rows":
        """`format` is told by the file's name if it is not given. Raises Fatal if the file has no text."""
        format = format or _format(file.file.name)
        if format == "text":
            return cls(file, format, ["url"])
        if format == "jsonl":
            return cls(file, format, None)
        async with aclosing(_records(file, quoted=True)) as pieces:
            async for [(number, header), *_] in pieces:
                delimiter = max(DELIMITERS, key=header.count)
                try:
                    [columns] = csv.reader([header], delimiter=delimiter)
                except (csv.Error, ValueError):
                    raise Fatal(f"Line {number}, the header, is not a row of CSV.") from None
                if len(set(columns)) != len(columns):
                    raise Fatal(f"Line {number}, the header, has a name twice; names of columns must differ.")
                return cls(file, format, columns, delimiter)
        raise Fatal("The file is empty; the first line of a CSV file names its columns.")

    async def count(self) -> int:
        """How many rows there are. Raises Fatal if they are too many, or if the file is not text."""
        total = 0
        async with aclosing(self._records()) as pieces:
            async for records in pieces:
                total += len(records)
                if total > MOST_ROWS:
                    raise Fatal(f"The file has more than {MOST_ROWS:,} rows; split it into several.")
        if not total:
            raise Fatal("The file has no rows.")
        return total

    async def read(self) -> AsyncGenerator[Row | str]:
        """Each row, in order; lines that are empty are passed over."""
        async with aclosing(self._records()) as pieces:
            async for records in pieces:
                for number, record in records:
                    if self._format == "text":
                        yield {"url": record.strip()}
                    else:
                        yield self._cells(number, record) if self._format == "csv" else _object(number, record)

    async def _records(self) -> AsyncGenerator[Records]:
        """The records without the header."""
        before = self._format == "csv"
        async with aclosing(_records(self._file, quoted=before)) as pieces:
            async for records in pieces:
                yield records[1:] if before else records
                before = False

    def _cells(self, number: int, record: str) -> Row | str:
        assert self.columns is not None
        try:
            [cells] = csv.reader([record], delimiter=self._delimiter)
        except (csv.Error, ValueError):
            return f"Line {number} is not a row of CSV."
        if len(cells) != len(self.columns):
            return f"Line {number} has {len(cells)} values for {len(self.columns)} columns."
        return dict(zip(self.columns, cells, strict=True))


def _format(name: str) -> Format:
    ending = name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".zip").rpartition(".")[2]
    formats: dict[str, Format] = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "ndjson": "jsonl"}
    return formats.get(ending, "text")


def _object(number: int, record: str) -> Row | str:
    try:
        found = from_json(record, allow_inf_nan=False)
    except ValueError:
        return f"Line {number} is not JSON."
    return found if isinstance(found, dict) else f"Line {number} is not an object of JSON."


async def _records(file: InputFile, *, quoted: bool) -> AsyncGenerator[Records]:
    """Rows that have any text, a few thousand at a time; with `quoted` rows go on while a quote is open.

    Raises Fatal for a row that is too long, and for what is not UTF-8.
    """
    text = await Text.open(file, None)
    number, size, quotes, held = 0, 0, 0, list[bytes]()
    async with aclosing(text.pieces()) as pieces:
        async for lines in _lines(pieces):
            found: Records = []
            for line in lines:
                number += 1
                size += len(line) + 1
                if size > LONGEST_ROW:
                    raise Fatal(f"The row at line {number} is over {LONGEST_ROW:,} bytes; is a quote never closed?")
                held.append(line)
                if quoted and (quotes := quotes + line.count(b'"')) % 2:
                    continue
                if row := _decoded(b"\n".join(held), number):
                    found.append((number, row))
                size = quotes = 0
                held.clear()
            if found:
                yield found
    if held:
        yield [(number, _decoded(b"\n".join(held), number))]


async def _lines(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[Iterable[bytes]]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > LONGEST_ROW:
            raise Fatal(f"A line is over {LONGEST_ROW:,} bytes; write one URL a line.")
        yield lines
    yield [rest]


def _decoded(line: bytes, number: int) -> str:
    try:
        row = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r")
    except UnicodeDecodeError:
        raise Fatal(f"Line {number} is not UTF-8; save the file in UTF-8 and upload that.") from None
    return "" if row.isspace() else row
