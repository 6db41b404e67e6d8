"""`csv.import`: an uploaded CSV file into a new table of a source."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from headway import Fatal, JobContext, kind
from headway.kinds import InputFile
from services.worker.kinds.csv_layout import Layout, read_layout
from services.worker.kinds.csv_rejects import Rejects
from services.worker.kinds.csv_rows import RowReader
from services.worker.kinds.csv_table import NewTable, connected

HEAD = 256 << 10
# COPY begins with the types of the first rows; the rest is checked against them while it is sent.
SAMPLE = 256 << 10
# Checked on the event loop in about a millisecond, then it is others' turn. A thread would hold them up for longer: it
# gives way only every five.
PIECE = 64 << 10


class ImportInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: UUID = Field(description="The id of an uploaded CSV file: UTF-8, with a header row.")
    table: str = Field(
        pattern=r"^[a-zA-Z_][a-zA-Z0-9_]{0,62}$",
        description="The table to make, named exactly so: in SQL a name with capitals needs quotes.",
    )
    source: str = Field("default", description="The source to make it in: a Postgres database.")


class Column(BaseModel):
    name: str
    type: str = Field(description="boolean, bigint, numeric, date, timestamp, timestamptz or text.")
    title: str | None = Field(None, description="The title in the file, where the name differs from it.")


class ImportResult(BaseModel):
    table: str
    source: str
    rows: int = Field(description="Rows in the table.")
    rejected: int = Field(description="Rows left out; the artifact rejected.csv holds them.")
    columns: list[Column]
    seconds: float


@kind("csv.import", timeout="1h")
async def import_csv(job: JobContext, input: ImportInput) -> ImportResult:
    """Import a CSV file into a new table of a source, with types that hold every value of each column.

    The table appears complete, in one transaction, or not at all.
    """
    began = time.monotonic()
    url = job.source(input.source)
    file = await job.open_file(input.file)
    async with Rejects(job) as rejects, connected(url, input.source) as connection:
        layout = await _layout(file)
        table = NewTable(connection, input.source, input.table)
        reader = await _Import(job, file, layout, rejects, table).run()
    return ImportResult(
        table=input.table,
        source=input.source,
        rows=reader.rows,
        rejected=rejects.count,
        columns=[
            Column(name=name, type=column_type.sql, title=None if title == name else title)
            for name, column_type, title in zip(layout.names, reader.types, layout.titles, strict=True)
        ],
        seconds=round(time.monotonic() - began, 3),
    )


class _Misfit(Exception):
    """A value does not fit the types that the table was made with."""


class _Import:
    """Fills and commits the table, in one pass over the file where the first rows tell the types, in two if not."""

    def __init__(self, job: JobContext, file: InputFile, layout: Layout, rejects: Rejects, table: NewTable) -> None:
        self._job = job
        self._file = file
        self._layout = layout
        self._rejects = rejects
        self._table = table
        self._passes = 1

    async def run(self) -> RowReader:
        """The reader that has read the whole file, after the commit."""
        reader = RowReader(self._layout)
        async with aclosing(self._checked(reader, number=1)) as checked:
            sample = await _first(checked, SAMPLE)
            types = self._types(reader)
            try:
                await self._fill(reader, sample, checked)
            except _Misfit:
                self._passes = 2
                await self._table.undo()
            if self._passes == 2:
                # The rest of the file may widen more types: the second pass begins with those that hold all of it.
                async for _ in checked:
                    pass
                await self._job.log(f"Importing anew: further down, {self._changes(types, reader)}.")
        if self._passes == 2:
            reader = RowReader(self._layout, reader.types)
            async with aclosing(self._checked(reader, number=2)) as checked:
                await self._fill(reader, b"", checked)
        # Nothing comes after the commit that could still fail or be cancelled.
        await self._rejects.close()
        await self._table.commit()
        return reader

    async def _fill(self, reader: RowReader, first: bytes, checked: AsyncIterator[bytes]) -> None:
        types = self._types(reader)

        async def fitting() -> AsyncGenerator[bytes]:
            yield first
            async for rows in checked:
                if self._types(reader) != types:
                    raise _Misfit
                yield rows

        await self._table.create(types)
        async with aclosing(fitting()) as rows:
            copied = await self._table.fill(types, rows, self._layout.delimiter)
        if copied != reader.rows:
            raise RuntimeError(f"Postgres took {copied} rows where {reader.rows} were sent.")

    async def _checked(self, reader: RowReader, *, number: int) -> AsyncGenerator[bytes]:
        """The rows of the file, for the first time or the second. Raises Fatal when too much of it cannot be read."""
        done, size = self._layout.start, self._file.file.size
        async for piece in _pieces(self._file, done):
            rows = reader.match(piece)
            if reader.stuck:
                rows += await asyncio.to_thread(reader.resolve)
            done += len(piece)
            await self._note(reader, number, done + (number - 1) * size)
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
            self._passes * self._file.file.size,
            "importing" if number == self._passes else "reading the types",
            unit="bytes",
            counts={"rows": reader.rows, "rejected": self._rejects.count},
        )

    def _types(self, reader: RowReader) -> dict[str, str]:
        return {name: column_type.sql for name, column_type in zip(self._layout.names, reader.types, strict=True)}

    def _changes(self, types: dict[str, str], reader: RowReader) -> str:
        return ", ".join(
            f"{name} is {column_type}, not {types[name]}"
            for name, column_type in self._types(reader).items()
            if column_type != types[name]
        )


async def _layout(file: InputFile) -> Layout:
    head = b""
    async for chunk in file.chunks():
        head += chunk
        if len(head) >= HEAD:
            break
    head = head[:HEAD]
    return await asyncio.to_thread(read_layout, head, whole=len(head) == file.file.size)


async def _pieces(file: InputFile, start: int) -> AsyncIterator[bytes]:
    async for chunk in file.chunks(start=start):
        for place in range(0, len(chunk), PIECE):
            yield chunk[place : place + PIECE]
            await asyncio.sleep(0)


async def _first(rows: AsyncIterator[bytes], size: int) -> bytes:
    """At least `size` bytes of them, or all."""
    found = b""
    async for more in rows:
        found += more
        if len(found) >= size:
            break
    return found
