"""The table of an import in SQLite: filled by INSERT; the positions of imports are in a table beside it.

SQLite works in threads, one call at a time; a call that is cancelled is interrupted there and waited for.
"""

import asyncio
import csv
import io
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import structlog

from headway import Fatal, Retry, metrics
from headway.sources.sqlite import path
from services.worker.kinds.csv_position import VERSION, Position
from services.worker.kinds.csv_target import KEPT, Target, keyless, require, staging_name, taken

# A database that is locked is tried again so often, for as long as the job may take.
LOCKED_PAUSE = 0.05
# Held in memory before it goes to the file, for which readers would have to wait until the chunk ends; in KiB.
CACHE = 64 << 10
DROP_TIMEOUT = 8.0
# Rows that are lists at a time: so few that they are gone before Python looks for garbage, which holds up all threads.
AT_A_TIME = 200
# Digits that any number may have and still be the same as a double; SQLite has no decimals.
EXACT = 15

LEDGER = """
CREATE TABLE IF NOT EXISTS headway_imports (
    job TEXT PRIMARY KEY, at TEXT NOT NULL, complete INTEGER NOT NULL, position TEXT NOT NULL
)
"""
REMEMBER = "INSERT OR REPLACE INTO headway_imports (job, at, complete, position) VALUES (?, ?, ?, ?)"
AWAY = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

T = TypeVar("T")

log = structlog.get_logger(__name__)


class SqliteTable:
    """As `csv_table.Table` has it."""

    def __init__(self, connection: sqlite3.Connection, source: str, target: Target, job_id: UUID) -> None:
        self.writer = uuid4()
        self.complete = False
        self._connection = connection
        self._source = source
        self._target = target
        self._job_id = job_id
        self._staging = staging_name(job_id)
        self._kept: str | None = None

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str, source: str, target: Target, job_id: UUID) -> AsyncIterator["SqliteTable"]:
        with _refusals(source, target.table):
            connection = await asyncio.to_thread(_connect, url)
            while connection is None:
                await asyncio.sleep(LOCKED_PAUSE)
                connection = await asyncio.to_thread(_connect, url)
        table = cls(connection, source, target, job_id)
        try:
            await table._drop_left_behind()
            yield table
        finally:
            await asyncio.to_thread(connection.close)

    @classmethod
    async def drop(cls, url: str, source: str, job_id: UUID) -> None:
        try:
            async with (
                asyncio.timeout(DROP_TIMEOUT),
                cls.opened(url, source, Target(staging_name(job_id)), job_id) as table,
            ):
                await table._forget(job_id)
        except Exception as error:
            metrics.errors_caught.labels("import").inc()
            log.warning("a table of an import may be left in the source", table=staging_name(job_id), error=repr(error))

    async def find(self, columns: Sequence[str] = ()) -> Position | None:
        await self._begin()
        done, position = await self._run(self._remembered)
        found = Position.of(position)
        if done:
            self.complete = True
            await self.undo()
            return found
        there = await self._run(self._columns, self._target.table)
        if self._target.mode != "create":
            if not require(there, columns, self._target):
                self._target = Target(self._target.table)
        elif there:
            raise taken(self._source, self._target.table)
        if found is None or found.version != VERSION:
            await self._run(self._drop, self._job_id)
            await self._commit()
            return None
        await self.keep(found.model_copy(update={"writer": self.writer, "at": datetime.now(UTC)}))
        return found

    async def begin(self, columns: Mapping[str, str], *, anew: bool) -> None:
        await self._begin()
        if (await self._run(self._remembered))[1] != self._kept:
            await self.undo()
            raise Retry("Another attempt of this job has gone on with the import.", after=1)
        if anew:
            # Values that are to be cast by the columns of another table come there as they are in the file.
            types = columns if self._target.mode == "create" else dict.fromkeys(columns, "text")
            definition = ", ".join(f'"{name}" {column_type}' for name, column_type in types.items())
            await self._run(self._execute, f"DROP TABLE IF EXISTS {self._staging}")
            await self._run(self._execute, f"CREATE TABLE {self._staging} ({definition})")

    async def fill(self, columns: Mapping[str, str], rows: AsyncIterator[bytes], delimiter: str) -> int:
        count = 0
        async for piece in rows:
            count += await self._run(self._insert, columns, piece, delimiter)
        return count

    async def keep(self, position: Position) -> None:
        self._kept = position.model_dump_json()
        await self._run(self._remember, position, False)
        await self._commit()

    async def undo(self) -> None:
        await self._run(self._connection.rollback)

    async def finish(self, position: Position, columns: Mapping[str, str]) -> None:
        if self._target.mode == "create":
            if await self._run(self._columns, self._target.table):
                raise taken(self._source, self._target.table)
            await self._run(self._execute, f'ALTER TABLE {self._staging} RENAME TO "{self._target.table}"')
        else:
            await self._run(self._merge, columns)
            await self._run(self._execute, f"DROP TABLE {self._staging}")
        await self._run(self._remember, position, True)
        try:
            await self._commit()
        except asyncio.CancelledError:
            if self._connection.in_transaction:
                raise
            log.info("a cancel came too late: the import was being committed")

    async def _run(self, call: Callable[..., T], *args: Any, whole: bool = False) -> T:
        """A call in a thread. One that is cancelled has ended when this raises, by itself if it is to be `whole`."""
        calling = asyncio.ensure_future(asyncio.to_thread(call, *args))
        with _refusals(self._source, self._target.table):
            try:
                return await asyncio.shield(calling)
            except asyncio.CancelledError:
                while not calling.done():
                    # More than once: what has not begun yet is not interrupted.
                    if not whole:
                        self._connection.interrupt()
                    await asyncio.wait({calling}, timeout=LOCKED_PAUSE)
                calling.exception()
                raise

    async def _begin(self) -> None:
        await self._unlocked("BEGIN IMMEDIATE")

    async def _commit(self) -> None:
        await self._unlocked("COMMIT")

    async def _unlocked(self, statement: str) -> None:
        """Run a statement that others can be in the way of, and that takes no time but for the disk's."""
        while True:
            if await self._run(self._tried, statement, whole=True):
                return
            await asyncio.sleep(LOCKED_PAUSE)

    async def _forget(self, job_id: UUID) -> None:
        await self._begin()
        await self._run(self._drop, job_id)
        await self._commit()

    async def _drop_left_behind(self) -> None:
        """Drop tables that have waited too long for a next attempt of their job."""
        await self._begin()
        left_behind = await self._run(self._left_behind)
        await self.undo()
        for job_id in left_behind:
            await self._forget(job_id)
            log.info("a table was dropped that an import had left behind", job_id=str(job_id))

    # What follows runs in threads.

    def _tried(self, statement: str) -> bool:
        """Whether nobody was in the way."""
        try:
            self._execute(statement)
        except sqlite3.OperationalError as error:
            if not _busy(error):
                raise
            return False
        return True

    def _execute(self, statement: str) -> None:
        self._connection.execute(statement)

    def _columns(self, table: str) -> dict[str, str]:
        """The declared types of a table's columns; SQLite's names of both are in capitals or not."""
        found = self._connection.execute("SELECT name, type FROM pragma_table_info(?)", (table,))
        return {name.lower(): declared.upper() for name, declared in found}

    def _remembered(self) -> tuple[bool, str | None]:
        """Whether the job's rows are in place, and the position they have come to."""
        self._execute(LEDGER)
        row = self._connection.execute(
            "SELECT complete, position FROM headway_imports WHERE job = ?", (str(self._job_id),)
        ).fetchone()
        return (bool(row[0]), row[1]) if row else (False, None)

    def _remember(self, position: Position, complete: bool) -> None:
        if complete:
            self._connection.execute("DELETE FROM headway_imports WHERE complete AND at < ?", (_long_ago(),))
        self._connection.execute(
            REMEMBER, (str(position.job), position.at.isoformat(), complete, position.model_dump_json())
        )

    def _left_behind(self) -> list[UUID]:
        if not self._columns("headway_imports"):
            return []
        found = self._connection.execute(
            "SELECT job FROM headway_imports WHERE NOT complete AND at < ?", (_long_ago(),)
        )
        return [UUID(job) for (job,) in found]

    def _drop(self, job_id: UUID) -> None:
        self._execute(LEDGER)
        self._execute(f"DROP TABLE IF EXISTS {staging_name(job_id)}")
        self._connection.execute("DELETE FROM headway_imports WHERE job = ? AND NOT complete", (str(job_id),))

    def _insert(self, columns: Mapping[str, str], data: bytes, delimiter: str) -> int:
        """The rows of a piece; how many they were."""
        types = [
            (name, column_type if self._target.mode == "create" else "text") for name, column_type in columns.items()
        ]
        statement = f"INSERT INTO {self._staging} VALUES ({', '.join('?' * len(types))})"  # noqa: S608  the job's id
        reader, count = csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter), 0
        while rows := list(islice(reader, AT_A_TIME)):
            values = [_values(*given, texts) for given, texts in zip(types, zip(*rows, strict=True), strict=True)]
            self._connection.executemany(statement, zip(*values, strict=True))
            count += len(rows)
        return count

    def _merge(self, columns: Mapping[str, str]) -> None:
        """Move the rows, within the transaction, in the order of the file."""
        table, key = self._target.table, self._target.key
        declared = self._columns(table)
        names = ", ".join(f'"{name}"' for name in columns)
        values = ", ".join(
            f"CASE lower(\"{name}\") WHEN 'true' THEN 1 WHEN 'false' THEN 0 END"
            if column_type == "boolean" and not _keeps_text(declared[name])
            else f'"{name}"'
            for name, column_type in columns.items()
        )
        if self._target.mode == "replace":
            self._execute(f'DELETE FROM "{table}"')  # noqa: S608  a name that the input's schema has checked
        conflict = ""
        if self._target.mode == "upsert":
            null = " OR ".join(f'"{name}" IS NULL' for name in key)
            if self._connection.execute(f"SELECT EXISTS (SELECT 1 FROM {self._staging} WHERE {null})").fetchone()[0]:  # noqa: S608
                raise keyless(key)
            keys = ", ".join(f'"{name}"' for name in key)
            changes = ", ".join(f'"{name}" = excluded."{name}"' for name in columns if name not in key)
            conflict = f"ON CONFLICT ({keys}) DO {f'UPDATE SET {changes}' if changes else 'NOTHING'}"
        self._execute(
            f'INSERT INTO "{table}" ({names}) SELECT {values} FROM {self._staging} WHERE true ORDER BY rowid {conflict}'  # noqa: S608
        )


def _connect(url: str) -> sqlite3.Connection | None:
    """A connection; None while somebody commits and waits for those who read: nobody else may read the schema then."""
    connection = sqlite3.connect(
        f"file:{quote(str(path(url)))}?mode=rw", uri=True, isolation_level=None, check_same_thread=False, timeout=0
    )
    try:
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
        # A view of others that is broken must not keep a table from getting its name.
        connection.execute("PRAGMA legacy_alter_table = on")
    except sqlite3.Error as error:
        connection.close()
        if not _busy(error):
            raise
        return None
    return connection


def _busy(error: sqlite3.Error) -> bool:
    """Whether others are in the way."""
    return bool(error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY)


def _long_ago() -> str:
    return (datetime.now(UTC) - KEPT).isoformat()


def _keeps_text(declared: str) -> bool:
    """Whether a column of this declared type leaves text as it is, by SQLite's rules."""
    return "INT" not in declared and any(word in declared for word in ("CHAR", "CLOB", "TEXT"))


def _values(name: str, column_type: str, texts: Sequence[str]) -> Sequence[Any]:
    """The values of a column; an empty field is NULL."""
    match column_type:
        case "boolean":
            return [text.lower() == "true" if text else None for text in texts]
        case "numeric":
            return [_number(name, text) if text else None for text in texts]
        case _:
            return [text or None for text in texts]


def _number(name: str, text: str) -> float:
    number = float(text)
    if (len(text) > EXACT or "e" in text.lower()) and Decimal(repr(number)) != Decimal(text):
        raise Fatal(
            f"The column {name!r} has {text[:100]}, which SQLite cannot keep as a number without changing it. "
            f'Import it as text: "types": {{"{name}": "text"}}.'
        )
    return number


@contextmanager
def _refusals(source: str, table: str) -> Iterator[None]:
    """Errors of SQLite as those of a job: Fatal, ConnectionError where another time may help."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in AWAY:
            raise ConnectionError(f"The source {source!r} cannot be opened or written: {error}.") from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            raise Fatal(
                f"The source {source!r} cannot be written to: {error}. Ask its operator, or name another source."
            ) from error
        raise Fatal(f"The table {table!r} of the source {source!r} refuses the rows: {error}.") from error
