"""The table of an import: filled in chunks under a name of its job's own, renamed when it is complete.

Each chunk is a transaction that copies rows and writes the position into the table's comment, so that another attempt
goes on exactly there. One attempt at a time is in such a transaction, and only the last that took the import over.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import structlog

from headway import Retry, metrics
from services.worker.kinds.csv_merge import Target, merge, remember, remembered, require
from services.worker.kinds.csv_position import VERSION, Position
from services.worker.kinds.csv_source import connected, copy, refusals, taken

if TYPE_CHECKING:
    from services.worker.kinds.csv_source import Connection

PREFIX = "headway_import_"
# More than a chunk of an attempt takes that is alive.
LOCK_TIMEOUT = 5.0
COMMIT_TIMEOUT = 5.0
DROP_TIMEOUT = 8.0
# How long a table may wait for the next attempt of its job.
KEPT = timedelta(days=7)

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


class Table:
    """Call `find` first, then for each chunk `begin`, `fill` and `keep`, for the last one `finish`.

    Raises Fatal if the name is taken, or the source refuses the table or its rows; Retry if another attempt of the
    job is at work on it.
    """

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

    async def find(self, columns: Sequence[str] = ()) -> Position | None:
        """Take the import over; how far an attempt before has brought it. `complete` if its rows are in place already.

        `columns` are those of the file.
        """
        with refusals(self._source, self._name):
            if self._target.mode != "create":
                done = await remembered(self._connection, self._job_id)
                if done is not None:
                    self.complete = True
                    return done
                if not await require(self._connection, columns, self._target):
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
        """Begin a chunk; `anew`: the first one, of a table with the types of its columns by their names."""
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
        """Copy rows of CSV in; how many they were. An exception of `rows` passes through."""
        with refusals(self._source, self._name):
            return await copy(self._connection, self._staging, columns, rows, delimiter)

    async def keep(self, position: Position) -> None:
        """End the chunk: what was filled in stays, with the position after it."""
        comment = position.model_dump_json()
        with refusals(self._source, self._name):
            # If Postgres crashes it may take the last of these back, whole, for which the import need not wait.
            await self._connection.execute(
                f"COMMENT ON TABLE {self._staging} IS '{comment}'; SET LOCAL synchronous_commit = off; COMMIT"
            )
        self._comment = comment

    async def undo(self) -> None:
        """The chunk never was."""
        await self._connection.execute("ROLLBACK")

    async def finish(self, position: Position, columns: Mapping[str, str]) -> None:
        """End the last chunk: the table gets its name, or the one that has it the rows.

        A cancel that comes with the commit is too late.
        """
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


def staging_name(job_id: UUID) -> str:
    """What the table is called until it is complete."""
    return f"{PREFIX}{job_id.hex}"


async def drop(url: str, source: str, job_id: UUID) -> None:
    """Drop what a job has brought into the source that will not go on. Raises nothing."""
    try:
        async with asyncio.timeout(DROP_TIMEOUT), connected(url, source) as connection:
            await _alone(connection, job_id)
            await connection.execute(f"DROP TABLE IF EXISTS {staging_name(job_id)}; COMMIT")
    except Exception as error:
        metrics.errors_caught.labels("import").inc()
        log.warning("a table of an import may be left in the source", table=staging_name(job_id), error=repr(error))


async def drop_left_behind(connection: "Connection") -> None:
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
