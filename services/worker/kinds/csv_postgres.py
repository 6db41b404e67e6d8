"""The table of an import in Postgres: filled by COPY, with the position as its comment, renamed when it is complete."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import structlog

from headway import Retry, metrics
from services.worker.kinds.csv_merge import columns_of, merge, remember, remembered
from services.worker.kinds.csv_position import VERSION, Position
from services.worker.kinds.csv_source import connected, copy, refusals
from services.worker.kinds.csv_target import KEPT, PREFIX, Target, require, staging_name, taken

if TYPE_CHECKING:
    from services.worker.kinds.csv_source import Connection

# More than a chunk of an attempt takes that is alive.
LOCK_TIMEOUT = 5.0
COMMIT_TIMEOUT = 5.0
DROP_TIMEOUT = 8.0

TABLE = """
SELECT to_regclass(name) IS NOT NULL AS there, obj_description(to_regclass(name), 'pg_class') AS comment
FROM (SELECT quote_ident(current_schema()) || '.' || quote_ident($1) AS name) AS named
"""
LEFT_BEHIND = """
SELECT obj_description(oid, 'pg_class') AS comment FROM pg_class
WHERE relname LIKE $1 AND relkind = 'r' AND relnamespace = current_schema()::regnamespace
    AND pg_has_role(relowner, 'USAGE')
"""
END_HOLDER = """
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted AND classid::bigint << 32 | objid::bigint = $1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid()
"""

log = structlog.get_logger(__name__)


class PostgresTable:
    """As `csv_table.Table` has it."""

    def __init__(self, connection: "Connection", source: str, target: Target, job_id: UUID) -> None:
        self.writer = uuid4()
        self.complete = False
        self._connection = connection
        self._source = source
        self._name = target.table
        self._job_id = job_id
        self._staging = staging_name(job_id)
        self._comment: str | None = None
        self._target = target

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str, source: str, target: Target, job_id: UUID) -> AsyncIterator["PostgresTable"]:
        async with connected(url, source) as connection:
            await _drop_left_behind(connection)
            yield cls(connection, source, target, job_id)

    @staticmethod
    async def drop(url: str, source: str, job_id: UUID) -> None:
        try:
            async with asyncio.timeout(DROP_TIMEOUT), connected(url, source) as connection:
                await _alone(connection, job_id)
                await connection.execute(f"DROP TABLE IF EXISTS {staging_name(job_id)}; COMMIT")
        except Exception as error:
            metrics.errors_caught.labels("import").inc()
            log.warning("a table of an import may be left in the source", table=staging_name(job_id), error=repr(error))

    async def find(self, columns: Sequence[str] = ()) -> Position | None:
        with refusals(self._source, self._name):
            if self._target.mode != "create":
                done = await remembered(self._connection, self._job_id)
                if done is not None:
                    self.complete = True
                    return done
                if not require(await columns_of(self._connection, self._name), columns, self._target):
                    self._target = Target(self._name)
            await _alone(self._connection, self._job_id)
            target = await self._connection.fetchrow(TABLE, self._name)
            assert target is not None
            found = Position.of(target["comment"])
            if target["there"] and self._target.mode == "create":
                if found is None or found.job != self._job_id:
                    raise taken(self._source, self._name)
                self.complete = True
                await self.undo()
                return found
            self._comment = await self._comment_now()
            found = Position.of(self._comment)
            if found is None or found.version != VERSION:
                await self.undo()
                return None
            await self.keep(found.model_copy(update={"writer": self.writer, "at": datetime.now(UTC)}))
            return found

    async def begin(self, columns: Mapping[str, str], *, anew: bool) -> None:
        with refusals(self._source, self._name):
            await _alone(self._connection, self._job_id)
            if await self._comment_now() != self._comment:
                await self.undo()
                raise Retry("Another attempt of this job has gone on with the import.", after=1)
            if anew:
                definition = ", ".join(f'"{column}" {column_type}' for column, column_type in columns.items())
                await self._connection.execute(f"DROP TABLE IF EXISTS {self._staging}")
                await self._connection.execute(f"CREATE TABLE {self._staging} ({definition})")
                if self._target.mode != "create":
                    # So that rows keep lying in the order of the file.
                    await self._connection.execute(f"ALTER TABLE {self._staging} SET (autovacuum_enabled = off)")

    async def fill(self, columns: Mapping[str, str], rows: AsyncIterator[bytes], delimiter: str) -> int:
        with refusals(self._source, self._name):
            return await copy(self._connection, self._staging, columns, rows, delimiter)

    async def keep(self, position: Position) -> None:
        comment = position.model_dump_json()
        with refusals(self._source, self._name):
            # If Postgres crashes it may take the last of these back, whole, for which the import need not wait.
            await self._connection.execute(
                f"COMMENT ON TABLE {self._staging} IS '{comment}'; SET LOCAL synchronous_commit = off; COMMIT"
            )
        self._comment = comment

    async def undo(self) -> None:
        await self._connection.execute("ROLLBACK")

    async def finish(self, position: Position, columns: Mapping[str, str]) -> None:
        with refusals(self._source, self._name):
            # Whoever uses the table, such as a backup, is waited for as long as the job may take.
            await self._connection.execute("SET LOCAL lock_timeout = 0")
            if self._target.mode == "create":
                await self._connection.execute(
                    f"COMMENT ON TABLE {self._staging} IS '{position.model_dump_json()}'; "
                    f'ALTER TABLE {self._staging} RENAME TO "{self._name}"'
                )
            else:
                await merge(self._connection, self._staging, columns, self._target)
                await remember(self._connection, self._staging, position)
            commit = asyncio.ensure_future(self._connection.execute("COMMIT"))
            try:
                await asyncio.shield(commit)
            except asyncio.CancelledError:
                if not (await asyncio.wait({commit}, timeout=COMMIT_TIMEOUT))[0]:
                    commit.cancel()
                    raise
                commit.result()
                log.info("a cancel came too late: the import was being committed")

    async def _comment_now(self) -> str | None:
        row = await self._connection.fetchrow(TABLE, self._staging)
        assert row is not None
        comment: str | None = row["comment"]
        return comment


async def _drop_left_behind(connection: "Connection") -> None:
    """Drop tables that have waited too long for a next attempt of their job, as far as the source lets us."""
    try:
        for row in await connection.fetch(LEFT_BEHIND, PREFIX.replace("_", r"\_") + "%"):
            found = Position.of(row["comment"])
            if found is None or datetime.now(UTC) - found.at < KEPT:
                continue
            await _alone(connection, found.job)
            again = await connection.fetchrow(TABLE, staging_name(found.job))
            if again is not None and again["comment"] == row["comment"]:
                await connection.execute(f"DROP TABLE {staging_name(found.job)}")
            await connection.execute("COMMIT")
            log.info("a table was dropped that an import had left behind", job_id=str(found.job))
    except (asyncpg.PostgresError, Retry) as error:
        log.warning("tables that imports have left behind were not dropped", error=repr(error))
        await connection.execute("ROLLBACK")


async def _alone(connection: "Connection", job_id: UUID) -> None:
    """Begin a transaction that no other attempt of the job is in.

    One that does not end, because its process hangs or its machine is gone, is ended: its job was given to us.
    """
    key = int.from_bytes(job_id.bytes[8:], signed=True)
    begin = f"BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'; SELECT pg_advisory_xact_lock({key})"
    try:
        await connection.execute(begin)
    except asyncpg.LockNotAvailableError:
        await connection.execute("ROLLBACK")
        ended = await connection.fetch(END_HOLDER, key)
        log.warning("another attempt's hold on the import was ended", job_id=str(job_id), connections=len(ended))
        try:
            await connection.execute(begin)
        except asyncpg.LockNotAvailableError:
            await connection.execute("ROLLBACK")
            raise Retry("Another attempt of this job holds on to the import.", after=10) from None
