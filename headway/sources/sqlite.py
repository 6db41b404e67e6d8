"""Reading from SQLite: connections of `databases`, each opened once, for it would open one for every statement.

SQLite works in threads, one for each connection; that is aiosqlite's way, and only sources of SQLite have them.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import structlog
from databases import Database, DatabaseURL

from headway.errors import QueryRefused, SourceUnavailable, TooLarge
from headway.sources.columns import Column

if TYPE_CHECKING:
    import aiosqlite
    from databases.core import Connection

# All that a statement may do which only reads. ATTACH would reach other files, PRAGMA would change the connection.
ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
# Longest text or blob, and about how many bytes of rows are fetched at a time.
LONGEST = 16 << 20
FETCHED = 256 << 10
# A statement looks this often whether it has been told to stop, in instructions of SQLite's machine: about 0.1 ms.
LOOK_EVERY = 10_000

log = structlog.get_logger(__name__)


def path(url: str) -> Path:
    """The file that a URL of SQLite names."""
    return Path(DatabaseURL(url).database)


class SqliteReader:
    """Reads one source of SQLite, which must exist."""

    def __init__(self, name: str, url: str, pool: int) -> None:
        self._name = name
        self._path = path(url)
        # Twice, for `databases` takes one off: a `?` or `%` of the file's name must reach SQLite as that.
        place = quote(quote(str(self._path)))
        self._url = f"{urlsplit(url).scheme}:///file:{place}?mode=ro"
        self._places = asyncio.Semaphore(pool)
        self._idle: list[_Held] = []

    @asynccontextmanager
    async def reading(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any],
        *,
        seconds: float | None,
        most_bytes: int,
        estimate: bool = False,
    ) -> AsyncIterator["SqliteReading"]:
        async with self._held() as held:
            reading = SqliteReading(self._name, held, most_bytes)
            try:
                await reading.begin(sql, parameters)
                yield reading
            finally:
                await reading.end()

    async def close(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    @asynccontextmanager
    async def _held(self) -> AsyncIterator["_Held"]:
        async with self._places:
            with _errors(self._name):
                file = await asyncio.to_thread(self._file)
                # A file that was put in its place since is another database.
                while self._idle and self._idle[-1].file != file:
                    await self._idle.pop().close()
                held = self._idle.pop() if self._idle else await _Held.open(self._url, file)
            try:
                yield held
            finally:
                self._idle.append(held)

    def _file(self) -> tuple[int, int]:
        """What tells the file that has the name now from others."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise SourceUnavailable(f"The source {self._name!r} cannot be opened.") from error
        return found.st_dev, found.st_ino


class _ReadOnly(sqlite3.Connection):
    """Lets a statement read and do nothing else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_factory = lambda text: text.decode(errors="replace")
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        self.execute("PRAGMA query_only = on")
        self.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY)


class _Held:
    """A connection that stays open. `stop` ends what it runs."""

    def __init__(self, connection: "Connection", file: tuple[int, int]) -> None:
        self.raw: aiosqlite.Connection = connection.raw_connection
        self.file = file
        self.stop = False
        self._connection = connection

    @classmethod
    async def open(cls, url: str, file: tuple[int, int]) -> "_Held":
        # A Database for each connection: it lends one only to the task that asked for it.
        database = Database(url, uri=True, factory=_ReadOnly)
        held = cls(await database.connection().__aenter__(), file)
        await held.raw.set_progress_handler(lambda: held.stop, LOOK_EVERY)
        return held

    async def close(self) -> None:
        await self._connection.__aexit__()


class SqliteReading:
    """A statement under way."""

    estimate = None

    def __init__(self, source: str, held: _Held, most_bytes: int) -> None:
        self.columns: list[Column] = []
        self.received = 0
        self._source = source
        self._held = held
        self._most_bytes = most_bytes
        self._cursor: aiosqlite.Cursor | None = None
        self._call: asyncio.Future[Any] | None = None
        self._step = 16

    async def begin(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any]) -> None:
        """Raises QueryRefused if it is not one statement that gives rows."""
        self._held.stop = False
        self._cursor = await self._run(self._held.raw.execute(sql, parameters))
        if self._cursor.description is None:
            raise QueryRefused("The statement gives no rows. Send one SELECT, or another statement that reads.")
        self.columns = [Column(column[0], None) for column in self._cursor.description]

    async def rows(self, most: int) -> Sequence[Any]:
        assert self._cursor is not None
        found: list[Sequence[Any]] = []
        size = 0
        while len(found) < most and size < self._most_bytes:
            rows = list(await self._run(self._cursor.fetchmany(min(self._step, most - len(found)))))
            if not rows:
                break
            found += rows
            more = sum(len(value) if isinstance(value, str | bytes) else 8 for row in rows for value in row)
            self._step = max(1, min(2 * self._step, FETCHED * len(rows) // max(1, more)))
            size += more
        self.received += size
        return found

    async def end(self) -> None:
        """Stop the statement, which takes some milliseconds, and give its cursor up."""
        self._held.stop = True
        if self._call is not None:
            await asyncio.wait({self._call})
        if self._cursor is not None:
            await self._cursor.close()

    async def _run(self, call: Any) -> Any:
        """Await a call in the connection's thread; it goes on there, until `end`, if this is cancelled."""
        self._call = asyncio.ensure_future(call)
        with _errors(self._source):
            return await asyncio.shield(self._call)


@contextmanager
def _errors(source: str) -> Iterator[None]:
    """Errors of SQLite as answers."""
    try:
        yield
    except sqlite3.DataError as error:
        raise TooLarge(f"A row is over the limit of bytes ({error}); select fewer or shorter columns.") from None
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY):
            log.warning("a source is not available", source=source, error=repr(error))
            raise SourceUnavailable(f"The source {source!r} cannot be opened, or is locked.") from error
        raise QueryRefused(f"The source {source!r} refuses the statement: {error}.") from None
    except (sqlite3.Error, sqlite3.Warning, OverflowError) as error:
        raise QueryRefused(f"The source {source!r} refuses the statement: {error}.") from None
