"""The table of an import: filled in chunks under a name of its job's own, in place once it is complete.

Each chunk is a transaction that writes rows and the position after them, so that another attempt goes on exactly there.
One attempt at a time is in such a transaction, and only the last that took the import over.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol
from uuid import UUID

from pydantic import SecretStr

from headway import Fatal
from headway.settings import dialect
from services.worker.kinds.csv_position import Position
from services.worker.kinds.csv_postgres import PostgresTable
from services.worker.kinds.csv_sqlite import SqliteTable
from services.worker.kinds.csv_target import Target


class Table(Protocol):
    """Call `find` first, then for each chunk `begin`, `fill` and `keep`, for the last one `finish`.

    Raises Fatal if the name is taken, or the source refuses the table or its rows; Retry if another attempt of the
    job is at work on it, ConnectionError if the source is away.
    """

    writer: UUID
    complete: bool

    async def find(self, columns: Sequence[str] = ()) -> Position | None:
        """Take the import over; how far an attempt before has brought it. `complete` if its rows are in place already.

        `columns` are those of the file.
        """

    async def begin(self, columns: Mapping[str, str], *, anew: bool) -> None:
        """Begin a chunk; `anew`: the first one, of a table with the types of its columns by their names."""

    async def fill(self, columns: Mapping[str, str], rows: AsyncIterator[bytes], delimiter: str) -> int:
        """Write rows of CSV, quoted with `"`; how many they were. An exception of `rows` passes through."""

    async def keep(self, position: Position) -> None:
        """End the chunk: what was filled in stays, with the position after it."""

    async def undo(self) -> None:
        """The chunk never was."""

    async def finish(self, position: Position, columns: Mapping[str, str]) -> None:
        """End the last chunk: the table gets its name, or the one that has it the rows.

        A cancel that comes with the commit is too late.
        """


class Tables(Protocol):
    """The tables of a source of one kind of database."""

    def opened(self, url: str, source: str, target: Target, job_id: UUID) -> AbstractAsyncContextManager[Table]:
        """A transaction that is under way when the block ends never was.

        Drops what other imports have left behind too long ago. Raises ConnectionError if the source cannot be reached.
        """

    async def drop(self, url: str, source: str, job_id: UUID) -> None:
        """Drop what a job has brought into the source that will not go on. Raises nothing."""


def tables(url: str, source: str) -> Tables:
    """Those of the source. Raises Fatal if imports cannot use it."""
    match dialect(SecretStr(url)):
        case "postgresql":
            return PostgresTable
        case "sqlite":
            return SqliteTable
        case other:
            raise Fatal(f"The source {source!r} is a database of {other}; csv.import takes Postgres and SQLite.")
