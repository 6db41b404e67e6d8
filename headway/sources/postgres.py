"""Reading from Postgres: the pool that `databases` holds, and the asyncpg connections in it."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
import structlog
from databases import Database

from headway import metrics
from headway.errors import QueryRefused, SourceUnavailable, TooLarge
from headway.sources.columns import Column
from headway.sources.names import numbered

if TYPE_CHECKING:
    from asyncpg.cursor import Cursor
    from asyncpg.pool import PoolConnectionProxy
    from asyncpg.prepared_stmt import PreparedStatement

    Connection = PoolConnectionProxy[asyncpg.Record]

CONNECT_TIMEOUT = 5.0
END_TIMEOUT = 5.0
# Milliseconds that Postgres waits until a session that it ends is gone, so that what an answer says of it is true.
# Before version 14 it cannot wait, and the statement may run on for a moment.
GONE_WITHIN = 4000
# How long after the deadline Postgres ends a statement by itself, should this process not live to do it.
BEYOND = 2.0
# The snapshot is taken before the statement runs: from then on the transaction cannot be made one that writes.
BEGIN = "BEGIN READ ONLY; SET LOCAL statement_timeout = {timeout}; {watch}; SELECT 1"
# Should this process be killed, Postgres notices while it works on a statement, from version 14 on.
WATCH = "SET LOCAL client_connection_check_interval = '2s'"
# Values as Postgres writes them: no digit, time zone or infinity is lost on the way through Python's types.
AS_TEXT = (
    *("numeric", "date", "time", "timetz", "timestamp", "timestamptz", "interval", "uuid", "bytea", "bit", "varbit"),
    *("inet", "cidr", "macaddr", "macaddr8", "point", "line", "lseg", "box", "path", "polygon", "circle"),
)
SETTINGS = {
    "application_name": "headway",
    "default_transaction_read_only": "on",
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
}
GONE = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
)

log = structlog.get_logger(__name__)


def dsn(url: str) -> str:
    """The URL as asyncpg takes it: without a driver, and without what only `databases` knows."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    for name in ("min_size", "max_size"):
        query.pop(name, None)
    if (ssl := query.pop("ssl", None)) is not None:
        query["sslmode"] = {"true": "require", "false": "disable"}.get(ssl.lower(), ssl)
    return urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(query), ""))


class PostgresReader:
    """Reads one source of Postgres."""

    def __init__(self, name: str, url: str, pool: int) -> None:
        self._name = name
        self._dsn = dsn(url)
        # `databases` takes a URL apart and drops most of its options; the whole of it goes to asyncpg.
        away: dict[str, Any] = dict.fromkeys(("host", "port", "user", "password", "database", "ssl"))
        self._database = Database(
            url,
            **away,
            dsn=self._dsn,
            min_size=0,
            max_size=pool,
            timeout=CONNECT_TIMEOUT,
            statement_cache_size=0,
            server_settings=SETTINGS,
            init=_prepare,
        )
        self._opening = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def reading(
        self,
        sql: str,
        parameters: Sequence[Any] | Mapping[str, Any],
        *,
        seconds: float | None,
        most_bytes: int,
        estimate: bool = False,
    ) -> AsyncIterator["PostgresReading"]:
        sql, values = numbered(sql, parameters)
        async with self._connection() as connection:
            reading = PostgresReading(self._name, connection, most_bytes)
            try:
                await reading.begin(sql, values, seconds, estimate=estimate)
                yield reading
            finally:
                await self._leave(reading, connection)

    async def close(self) -> None:
        if self._ending:
            await asyncio.wait(self._ending)
        if self._database.is_connected:
            with suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT):
                    await self._database.disconnect()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator["Connection"]:
        async with self._opening:
            if not self._database.is_connected:
                await self._database.connect()
        held = self._database.connection()
        with _errors(self._name):
            await held.__aenter__()
        try:
            yield held.raw_connection
        finally:
            with _errors(self._name):
                await held.__aexit__()

    async def _leave(self, reading: "PostgresReading", connection: "Connection") -> None:
        """End the transaction, in which nothing was written; a statement that still runs is ended with its session."""
        if reading.closed:
            return
        if not reading.running:
            try:
                async with asyncio.timeout(END_TIMEOUT):
                    await connection.execute("ROLLBACK")
            except GONE as error:
                log.warning("a transaction of a source was not ended; its session is", error=repr(error))
            else:
                return
        ending = asyncio.create_task(self._end(reading, connection))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        await asyncio.shield(ending)

    async def _end(self, reading: "PostgresReading", connection: "Connection") -> None:
        """End a session in Postgres, by another one: what it runs may have switched off every limit of its own."""
        if reading.closed:
            return
        process_id = connection.get_server_pid()
        wait = f", {GONE_WITHIN}" if connection.get_server_version().major >= 14 else ""
        try:
            async with asyncio.timeout(END_TIMEOUT):
                other = await asyncpg.connect(self._dsn, server_settings={"application_name": "headway"})
                try:
                    ended = await other.fetchval(f"SELECT pg_terminate_backend($1{wait})", process_id)
                finally:
                    other.terminate()
            if not ended:
                metrics.errors_caught.labels("source").inc()
                log.warning("a session of a source had ended before, or did not within seconds", source=self._name)
        except (*GONE, asyncpg.PostgresError) as error:
            metrics.errors_caught.labels("source").inc()
            log.warning("a session of a source was not ended", source=self._name, error=repr(error))
        finally:
            if not reading.closed:
                connection.terminate()


class PostgresReading:
    """A statement under way. `running` while Postgres works on it."""

    def __init__(self, source: str, connection: "Connection", most_bytes: int) -> None:
        self.columns: list[Column] = []
        self.estimate: int | None = None
        self.running = False
        self._source = source
        self._connection = connection
        self._most_bytes = most_bytes
        self._meter = _meter(connection)
        self._cursor: Cursor[asyncpg.Record] | None = None
        self._before = self._meter.received

    @property
    def closed(self) -> bool:
        """Whether the connection is gone. asyncpg's own word cannot be had once the pool has noticed."""
        return self._meter.closed

    @property
    def received(self) -> int:
        return self._meter.received - self._before

    async def begin(self, sql: str, values: Sequence[Any], seconds: float | None, *, estimate: bool) -> None:
        """Raises QueryRefused if it is not one statement that gives rows."""
        timeout = 0 if seconds is None else round((seconds + BEYOND) * 1000)
        with self._run():
            await self._connection.execute(BEGIN.format(timeout=timeout, watch=self._meter.watch))
            statement = await self._connection.prepare(sql)
            found = statement.get_attributes()
            self._require(statement, values)
            self.columns = [Column(attribute.name, attribute.type.name) for attribute in found]
            if estimate:
                self.estimate = await self._expected(sql, values)
            self._cursor = await statement.cursor(*values)

    async def rows(self, most: int) -> Sequence[Any]:
        assert self._cursor is not None
        self._meter.left = self._most_bytes
        with self._run():
            return await self._cursor.fetch(most)

    def _require(self, statement: "PreparedStatement[asyncpg.Record]", values: Sequence[Any]) -> None:
        # What ends a transaction, changes the session or runs a block gives none.
        if not statement.get_attributes():
            raise QueryRefused("The statement gives no rows. Send one SELECT, or another statement that reads.")
        wanted = len(statement.get_parameters())
        if wanted != len(values):
            raise QueryRefused(f"The statement has {wanted} parameters, and parameters has {len(values)}.")

    async def _expected(self, sql: str, values: Sequence[Any]) -> int | None:
        """How many rows the planner expects. What cannot be explained, such as SHOW, has no estimate."""
        await self._connection.execute("SAVEPOINT estimate")
        try:
            plan = await self._connection.fetchval(f"EXPLAIN (FORMAT JSON) {sql}", *values)
        except asyncpg.PostgresSyntaxError:
            await self._connection.execute("ROLLBACK TO SAVEPOINT estimate")
            return None
        return int(json.loads(plan)[0]["Plan"]["Plan Rows"])

    @contextmanager
    def _run(self) -> Iterator[None]:
        """What Postgres is asked for here. If it is interrupted `running` stays."""
        self.running = True
        with _errors(self._source, self._meter):
            try:
                yield
            except Exception:
                # It has answered; only a cancel leaves it at work.
                self.running = False
                raise
        self.running = False


class _Meter(asyncio.Protocol):
    """Counts what a connection receives on its way to asyncpg, and ends it when it is more than `left`.

    asyncpg keeps a row in memory however large it is; a statement must not decide how much that is.
    """

    def __init__(self, connection: "Connection") -> None:
        self.received = 0
        self.left = 1 << 62
        self.over = False
        self.closed = False
        # What has Postgres look whether this process lives, where it can.
        self.watch = WATCH
        # asyncpg has no way to be given a protocol of one's own.
        inner: Any = connection
        self._protocol: asyncio.Protocol = inner._protocol
        self._transport: asyncio.Transport = inner._transport
        self._transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.left -= len(data)
        if self.left < 0:
            self.over = True
            self._transport.abort()
        else:
            self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._protocol.connection_lost(exc)


def _meter(connection: Any) -> _Meter:
    found: _Meter = connection._transport.get_protocol()
    return found


async def _prepare(connection: "Connection") -> None:
    for name in AS_TEXT:
        await connection.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=str, format="text")
    # In binary it has digits that nobody wrote.
    await connection.set_type_codec("float4", schema="pg_catalog", encoder=str, decoder=float, format="text")
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=str, format="text")
    meter = _Meter(connection)
    try:
        await connection.execute(f"BEGIN; {WATCH}; COMMIT")
    except asyncpg.PostgresError:
        await connection.execute("ROLLBACK")
        meter.watch = ""


@contextmanager
def _errors(source: str, meter: _Meter | None = None) -> Iterator[None]:
    """Errors of Postgres and of the way there, as answers."""
    try:
        yield
    except (QueryRefused, TooLarge):
        raise
    except GONE as error:
        if meter is not None and meter.over:
            raise TooLarge("The rows are over the limit of bytes; select fewer or shorter columns.") from None
        if isinstance(error, asyncpg.UnsupportedClientFeatureError):
            raise QueryRefused(f"A column has a type that cannot be read: {error}. Cast it to text.") from None
        # asyncpg's error for a value that it cannot encode is of the class that says that a connection is closed.
        if isinstance(error, ValueError):
            raise QueryRefused(f"A parameter does not fit: {error}.") from None
        log.warning("a source is not available", source=source, error=repr(error))
        raise SourceUnavailable(f"The source {source!r} cannot be reached, or closed the connection.") from error
    except asyncpg.PostgresError as error:
        where = f" (at character {error.position})" if getattr(error, "position", None) else ""
        raise QueryRefused(f"The source {source!r} refuses the statement: {error}{where}.") from None
