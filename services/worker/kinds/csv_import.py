"""`csv.import`: an uploaded CSV file into a table of a source."""

import asyncio
import codecs
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headway import Fatal, JobContext, kind
from services.worker.kinds.csv_layout import MAX_COLUMNS, Dialect, Layout, read_layout
from services.worker.kinds.csv_position import Position
from services.worker.kinds.csv_rejects import Rejects
from services.worker.kinds.csv_rows import RowReader
from services.worker.kinds.csv_table import Table, tables
from services.worker.kinds.csv_target import Mode, Target
from services.worker.kinds.csv_text import Text
from services.worker.kinds.csv_types import ColumnType

HEAD = 256 << 10
# COPY begins with the types of the first rows; the rest is checked against them while it is sent.
SAMPLE = 256 << 10
# How often what was copied is kept, in seconds: what an interruption costs at most. Each time costs some milliseconds.
KEEP_EVERY = 2.0

Given = Literal["boolean", "bigint", "numeric", "date", "timestamp", "timestamptz", "text"]


class ImportInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: UUID = Field(description="The id of an uploaded CSV file, as it is or compressed with gzip, zstd or as ZIP.")
    table: str = Field(
        pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,62}$",
        description="The table that the rows are to be in, named exactly so: in SQL a name with capitals needs quotes.",
    )
    source: str = Field("default", description="The source that it is in: Postgres or SQLite.")
    mode: Mode = Field(
        "create",
        description="create: a new table. append: to the rows of a table. replace: in their place. upsert: rows whose "
        "key the table has are changed, others are added.",
    )
    key: list[str] = Field(
        default_factory=list, max_length=32, description="For upsert: columns of a unique index of the table."
    )

    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="Found by itself if left out, among comma, semicolon, tab and |."
    )
    quote: str | None = Field(
        None,
        max_length=1,
        description="What fields are quoted with; empty if nothing is. Found if left out, like escape.",
    )
    escape: str | None = Field(
        None,
        min_length=1,
        max_length=1,
        description="What takes its meaning from the next character, such as \\. Doubled quotes are read in any case.",
    )
    header: bool = Field(True, description="Whether the first row has titles; without them columns are column_1, ….")
    encoding: str | None = Field(
        None, max_length=40, description="Such as windows-1252; UTF-8, or UTF-16 with its mark, if left out."
    )
    types: dict[str, Given] = Field(
        default_factory=dict,
        max_length=MAX_COLUMNS,
        description="The types of columns by their names in the table; of others all values decide.",
    )
    max_rejected: int = Field(1000, ge=0, le=1000, description="More rows that cannot be read fail the import.")

    @field_validator("delimiter", "quote", "escape")
    @classmethod
    def _mark(cls, mark: str | None) -> str | None:
        if mark and (mark.isalnum() or not mark.isascii() or mark in "\r\n\0"):
            raise ValueError("write one character of ASCII that is no letter, no digit and no line break")
        return mark

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        try:
            known = name is None or codecs.lookup(name)._is_text_encoding
        except (LookupError, ValueError):
            known = False
        if not known:
            raise ValueError(
                "this is no encoding that Python knows; write utf-8, windows-1252, iso-8859-15 or the like"
            )
        return name

    @model_validator(mode="after")
    def _keyed(self) -> "ImportInput":
        if (self.mode == "upsert") != bool(self.key):
            raise ValueError("upsert needs a key, and only upsert has one")
        return self

    @model_validator(mode="after")
    def _told_apart(self) -> "ImportInput":
        marks = [mark for mark in (self.delimiter, '"' if self.quote is None else self.quote, self.escape) if mark]
        if len(set(marks)) < len(marks) or self.delimiter == '"':
            raise ValueError('delimiter, quote and escape must differ, and the delimiter be no "')
        return self


class Column(BaseModel):
    name: str
    type: str = Field(description="boolean, bigint, numeric, date, timestamp, timestamptz or text.")
    title: str | None = Field(None, description="The title in the file, where the name differs from it.")


class ImportResult(BaseModel):
    table: str
    source: str
    rows: int = Field(description="Rows of the file that are in the table.")
    rejected: int = Field(description="Rows left out; the artifact rejected.csv holds them.")
    columns: list[Column]
    seconds: float


@kind("csv.import", timeout="1h")
async def import_csv(job: JobContext, input: ImportInput) -> ImportResult:
    """Import a CSV file into a table of a source, a new one with types that hold every value of each column.

    The rows appear all at once, in one transaction, or not at all. After an interruption the import goes on where it
    was.
    """
    url = job.source(input.source)
    there = tables(url, input.source)
    file = await job.open_file(input.file)
    text = await Text.open(file, input.encoding)
    try:
        target = Target(input.table, input.mode, input.key)
        async with (
            Rejects(job, input.max_rejected) as rejects,
            there.opened(url, input.source, target, job.id) as table,
        ):
            layout = await _layout(text, input)
            dialect = layout.dialect
            if input.quote is None and input.escape is None and dialect != Dialect(dialect.delimiter):
                await job.log(f"Read with the quote {dialect.quote} and the escape {dialect.escape or '(none)'}.")
            end = await _Import(job, text, layout, rejects, table).run()
    except BaseException as error:
        if isinstance(error, Fatal) or job.interruption == "cancelled":
            await there.drop(url, input.source, job.id)
        raise
    return ImportResult(
        table=input.table,
        source=input.source,
        rows=end.rows,
        rejected=len(end.rejected),
        columns=[
            Column(name=name, type=column_type.sql, title=None if title == name else title)
            for name, column_type, title in zip(layout.names, end.types, layout.titles, strict=True)
        ],
        seconds=end.seconds,
    )


class _Misfit(Exception):
    """A value does not fit the types that the table was made with."""


class _Import:
    """Fills the table, in one pass over the file where the first rows tell the types, in two if not."""

    def __init__(self, job: JobContext, text: Text, layout: Layout, rejects: Rejects, table: Table) -> None:
        self._job = job
        self._text = text
        self._layout = layout
        self._rejects = rejects
        self._table = table
        self._began = time.monotonic()
        self._passes = 1
        self._more = True

    async def run(self) -> Position:
        """Where the import ended, after the table has appeared."""
        found = await self._table.find(self._layout.names)
        reader = RowReader(self._layout)
        if found is not None:
            self._began -= found.seconds
            await self._rejects.restore(found.rejected, self._text, self._layout)
            if self._table.complete:
                return found
            self._passes = found.passes
            reader = RowReader(self._layout, found.types, offset=found.offset, lines=found.lines, rows=found.rows)
            await self._job.log(f"Going on after {found.rows:,} rows, which are in the source already.")
        types = self._types(reader)
        async with aclosing(self._checked(reader, number=self._passes)) as checked:
            try:
                if found is None:
                    sample = await _first(checked, SAMPLE)
                    types = self._types(reader)
                    await self._fill(reader, _chained(sample, checked), kept=None)
                else:
                    await self._fill(reader, checked, kept=found.rows)
            except _Misfit:
                await self._table.undo()
                self._passes = 2
                # The rest of the file may widen more types: the second pass begins with those that hold all of it.
                async for _ in checked:
                    pass
                await self._job.log(f"Importing anew: further down, {self._changes(types, reader)}.")
                reader = RowReader(self._layout, reader.types)
                async with aclosing(self._checked(reader, number=2)) as again:
                    await self._fill(reader, again, kept=None)
        # Nothing comes after the commit that could still fail or be cancelled.
        await self._rejects.close()
        end = self._position(reader)
        await self._table.finish(end, self._types(reader))
        return end

    async def _fill(self, reader: RowReader, rows: AsyncIterator[bytes], *, kept: int | None) -> None:
        """Fill the table with the rows after those that are kept in it, None to make it, up to the last chunk's end."""
        types = self._types(reader)
        self._more = True
        while self._more:
            await self._table.begin(types, anew=kept is None)
            async with aclosing(self._chunk(reader, types, rows)) as chunk:
                copied = await self._table.fill(types, chunk, self._layout.dialect.delimiter)
            if copied != reader.rows - (kept or 0):
                raise RuntimeError(f"The source took {copied} rows where {reader.rows - (kept or 0)} were sent.")
            if self._more:
                await self._table.keep(self._position(reader))
                kept = reader.rows

    async def _chunk(
        self, reader: RowReader, types: dict[str, str], rows: AsyncIterator[bytes]
    ) -> AsyncGenerator[bytes]:
        """As many of the rows as are copied at a time."""
        # What cannot be read from any byte on is not gone on with.
        ends = time.monotonic() + KEEP_EVERY if self._text.plain else math.inf
        async for given in rows:
            if self._types(reader) != types:
                raise _Misfit
            yield given
            if reader.between_rows and time.monotonic() >= ends:
                return
        self._more = False

    async def _checked(self, reader: RowReader, *, number: int) -> AsyncGenerator[bytes]:
        """The rows of the file, for the first time or the second. Raises Fatal when too much of it cannot be read."""
        size = self._text.size
        async with aclosing(self._text.pieces(reader.offset)) as pieces:
            async for piece in pieces:
                rows = reader.match(piece)
                if reader.stuck:
                    rows += await asyncio.to_thread(reader.resolve)
                await self._note(reader, number, self._text.taken + (number - 1) * size)
                yield rows
        rows = await asyncio.to_thread(reader.end)
        await self._note(reader, number, number * size)
        if reader.fault:
            raise Fatal(reader.fault)
        if self._rejects.count > reader.rows:
            raise Fatal(f"More than half of the rows cannot be read: {self._rejects.examples}")
        yield rows

    async def _note(self, reader: RowReader, number: int, done: int) -> None:
        if number == 1:
            await self._rejects.add(reader.rejected)
        reader.rejected.clear()
        await self._job.report(
            done,
            self._passes * self._text.size,
            "importing" if number == self._passes else "reading the types",
            unit="bytes",
            counts={"rows": reader.rows, "rejected": self._rejects.count},
        )

    def _position(self, reader: RowReader) -> Position:
        return Position(
            job=self._job.id,
            writer=self._table.writer,
            offset=reader.offset,
            lines=reader.lines,
            rows=reader.rows,
            passes=self._passes,
            types=reader.types,
            rejected=self._rejects.places,
            seconds=round(time.monotonic() - self._began, 3),
        )

    def _types(self, reader: RowReader) -> dict[str, str]:
        return {name: column_type.sql for name, column_type in zip(self._layout.names, reader.types, strict=True)}

    def _changes(self, types: dict[str, str], reader: RowReader) -> str:
        return ", ".join(
            f"{name} is {column_type}, not {types[name]}"
            for name, column_type in self._types(reader).items()
            if column_type != types[name]
        )


async def _layout(text: Text, input: ImportInput) -> Layout:
    head = b""
    async with aclosing(text.pieces()) as pieces:
        async for piece in pieces:
            head += piece
            if len(head) > HEAD:
                break
    return await asyncio.to_thread(
        read_layout,
        head[:HEAD],
        whole=len(head) <= HEAD,
        delimiter=input.delimiter,
        quote=input.quote,
        escape=input.escape,
        header=input.header,
        types={name: ColumnType(given) for name, given in input.types.items()},
    )


async def _first(rows: AsyncIterator[bytes], size: int) -> bytes:
    """At least `size` bytes of them, or all."""
    found = b""
    async for more in rows:
        found += more
        if len(found) >= size:
            break
    return found


async def _chained(first: bytes, rows: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for more in rows:
        yield more
