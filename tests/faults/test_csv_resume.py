"""What becomes of an import when its worker is killed, paused or drained in the middle of it."""

import csv
import io
import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import psycopg
import pytest

from headway import Fatal, Retry
from headway.embedded import Embedded
from headway.job import Job
from headway.settings import Source
from headway.states import JobState
from services.worker.kinds import csv_import, csv_postgres
from services.worker.kinds.csv_position import Position
from services.worker.kinds.csv_postgres import PostgresTable
from services.worker.kinds.csv_target import Target, staging_name
from services.worker.kinds.csv_types import ColumnType
from tests.conftest import until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner, WorkerProcess

SOURCE = "headway_resume_source"
COLUMNS = {"a": "bigint", "b": "text"}
BAD = {
    b"1,2,3\n": "3 fields, not 2 as in the header",
    b'8,"%b"\n' % (b"x" * (8 << 20)): "longer than 1 MiB",
    b'"4\n4",5,6\n': "3 fields, not 2 as in the header",
    b"7,\xff\n": "not UTF-8; save the file as UTF-8",
}


@pytest.fixture
async def source(servers: Embedded) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own to a source that is empty."""
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE IF EXISTS {SOURCE} WITH (FORCE)")
        admin.execute(f"CREATE DATABASE {SOURCE} TEMPLATE template0 STRATEGY file_copy")
    connection = await asyncpg.connect(servers.postgres_url(SOURCE))
    yield connection
    await connection.close()


@pytest.fixture
async def engine(
    servers: Embedded, source: asyncpg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Engine]:
    monkeypatch.setattr(csv_import, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(csv_postgres, "LOCK_TIMEOUT", 1.0)
    async with make_engine(servers, tmp_path, sources={"default": Source(url=servers.postgres_url(SOURCE))}) as engine:
        yield engine


def url(engine: Engine) -> str:
    return engine.settings.sources["default"].url.get_secret_value()


async def importer(engine: Engine, spawn: Spawner) -> WorkerProcess:
    """A worker that keeps each piece that it has copied."""
    return await spawn(
        HEADWAY_SOURCES=json.dumps({"default": url(engine)}), HEADWAY_KINDS="tests.faults.csv_small_chunks"
    )


async def submit(engine: Engine, data: bytes, *, max_attempts: int = 1, **more: Any) -> UUID:
    file = await engine.upload(data)
    return await engine.submit_kind(
        "csv.import", {"file": str(file.id), "table": "t", **more}, max_attempts=max_attempts
    )


def orders(*, end: bytes = b"") -> bytes:
    """200,000 rows, and among them some that cannot be read."""
    rows = [b"%d,name %d\n" % (number, number) for number in range(200_000)]
    for place, bad in enumerate(BAD):
        rows[place * 50_000] += bad
    return b"a,b\n" + b"".join(rows) + end


async def rejected(engine: Engine, job: Job) -> list[str]:
    """The reasons in `rejected.csv`."""
    [artifact] = await engine.store.artifacts(job.id, engine.tenant.id)
    data = b"".join([chunk async for chunk in engine.files.read(artifact.key)])
    return [row["reason"] for row in csv.DictReader(io.StringIO(data.decode(), newline=""))]


async def tables(source: asyncpg.Connection) -> list[str]:
    rows = await source.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND oid > 16383 ORDER BY 1")
    return [row["relname"] for row in rows]


async def position(source: asyncpg.Connection, table: str) -> Position | None:
    return Position.of(await source.fetchval("SELECT obj_description(to_regclass($1), 'pg_class')", table))


async def copied_by(source: asyncpg.Connection, table: str) -> set[tuple[int, int]]:
    """The transactions that the rows came by, and how many by each."""
    return {(row[0], row[1]) for row in await source.fetch(f"SELECT xmin::text, count(*) FROM {table} GROUP BY 1")}


@asynccontextmanager
async def held_up(source: asyncpg.Connection, job_id: UUID, passes: int) -> AsyncIterator[Position]:
    """The import comes no further than the chunk that it is in: about where the row begins that is too long."""
    staging = staging_name(job_id)

    async def held() -> Position | None:
        found = await position(source, staging)
        if found is None or found.passes != passes or found.rows < 50_001 or len(found.rejected) < 2:
            return None
        await source.execute(f"BEGIN; LOCK TABLE {staging} IN SHARE ROW EXCLUSIVE MODE")
        return await position(source, staging)

    yield await until(held, 20)
    await source.execute("COMMIT")


@pytest.mark.parametrize(("number", "passes"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGTERM, 2)])
async def test_an_import_goes_on_where_its_worker_was_stopped(
    engine: Engine, spawn: Spawner, source: asyncpg.Connection, number: signal.Signals, passes: int
) -> None:
    data = orders(end=b"x,1\n" if passes == 2 else b"200000,1\n")
    first = await importer(engine, spawn)
    job_id = await submit(engine, data)
    async with held_up(source, job_id, passes) as before:
        by = await copied_by(source, staging_name(job_id))
        first.signal(number)
        if number != signal.SIGSTOP:
            await first.ended()
    await engine.expire(job_id)

    async with worker(engine.settings):
        job = await engine.ended(job_id, 20)

    assert job.state == JobState.SUCCEEDED, job.error
    assert 0 < before.rows < 200_001
    assert by <= await copied_by(source, "t")
    assert tuple(await source.fetchrow("SELECT count(*), count(DISTINCT a), max(b) FROM t")) == (
        200_001,
        200_001,
        "name 99999",
    )
    assert job.result["rows"] == 200_001
    assert job.result["columns"][0]["type"] == ("text" if passes == 2 else "bigint")
    assert await rejected(engine, job) == list(BAD.values())
    assert job.progress is not None
    assert (job.progress["done"], job.progress["counts"]) == (passes * len(data), {"rows": 200_001, "rejected": 4})
    if number == signal.SIGSTOP:
        first.signal(signal.SIGCONT)
        await until(lambda: first.said("lease was lost"))
        assert await source.fetchval("SELECT count(*) FROM t") == 200_001
        assert await engine.job(job_id) == job
    assert await tables(source) == ["t"]


async def test_an_import_whose_worker_dies_after_the_commit_succeeds_with_the_same_result(
    engine: Engine, spawn: Spawner, source: asyncpg.Connection
) -> None:
    first = await importer(engine, spawn)
    # The end of the job cannot be written.
    await engine.database.execute("BEGIN; LOCK TABLE artifacts IN ACCESS EXCLUSIVE MODE")
    job_id = await submit(engine, orders())
    imported = await until(lambda: position(source, "t"), 20)
    by = await copied_by(source, "t")
    waiting = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'relation'"
    await until(lambda: source.fetchval(waiting), 20)
    first.signal(signal.SIGKILL)
    await first.ended()
    # What the worker has sent already must not be done after its death.
    await engine.database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'relation'"
    )
    await engine.database.execute("COMMIT")
    assert await engine.state(job_id) == "running"
    await engine.expire(job_id)

    async with worker(engine.settings):
        job = await engine.ended(job_id)

    assert job.state == JobState.SUCCEEDED, job.error
    assert (job.result["rows"], job.result["rejected"]) == (200_000, 4)
    assert job.result["seconds"] == imported.seconds
    assert [column["type"] for column in job.result["columns"]] == ["bigint", "text"]
    assert await rejected(engine, job) == list(BAD.values())
    assert await copied_by(source, "t") == by


@pytest.mark.parametrize("mode", ["append", "upsert"])
async def test_an_import_into_a_table_goes_on_and_adds_each_row_once(
    engine: Engine, spawn: Spawner, source: asyncpg.Connection, mode: str
) -> None:
    await source.execute(
        "CREATE TABLE t (a int PRIMARY KEY, b text); INSERT INTO t VALUES (-1, 'old'), (150000, 'old')"
    )
    if mode == "append":
        await source.execute("DELETE FROM t WHERE a > 0")
    first = await importer(engine, spawn)
    job_id = await submit(engine, orders(), mode=mode, **({"key": ["a"]} if mode == "upsert" else {}))
    async with held_up(source, job_id, 1) as before:
        first.signal(signal.SIGKILL)
        await first.ended()
        assert await source.fetchval("SELECT count(*) FROM t WHERE b <> 'old'") == 0
    await engine.expire(job_id)
    # The next attempt dies as well, in the merge, which never was; then one whose end cannot be written.
    await source.execute("BEGIN; LOCK TABLE t IN SHARE MODE")
    second = await importer(engine, spawn)
    await until(lambda: source.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"), 20)
    second.signal(signal.SIGKILL)
    await second.ended()
    await source.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted; COMMIT")
    await engine.expire(job_id)
    # A third crash would be its end.
    await engine.database.execute("UPDATE jobs SET crashes = 0 WHERE id = $1", job_id)
    await engine.database.execute("BEGIN; LOCK TABLE artifacts IN ACCESS EXCLUSIVE MODE")
    third = await importer(engine, spawn)
    await until(lambda: source.fetchval("SELECT count(*) > 10 FROM t"), 20)
    third.signal(signal.SIGKILL)
    await third.ended()
    await engine.database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'relation'"
    )
    await engine.database.execute("COMMIT")
    await engine.expire(job_id)

    async with worker(engine.settings):
        job = await engine.ended(job_id, 20)

    assert job.state == JobState.SUCCEEDED, job.error
    assert before.rows > 0
    assert (job.result["rows"], job.result["rejected"]) == (200_000, 4)
    assert tuple(await source.fetchrow("SELECT count(*), count(DISTINCT a), min(b), max(b) FROM t WHERE a >= 0")) == (
        200_000,
        200_000,
        "name 0",
        "name 99999",
    )
    assert await source.fetchval("SELECT b FROM t WHERE a = -1") == "old"
    assert await tables(source) == ["headway_imports", "t"]


async def test_an_import_into_sqlite_goes_on_where_its_worker_was_killed(
    engine: Engine, spawn: Spawner, tmp_path: Path
) -> None:
    place = tmp_path / "lite.db"
    sources = {"lite": Source.model_validate({"url": f"sqlite+aiosqlite:///{place}"})}
    with closing(sqlite3.connect(place, isolation_level=None, timeout=0.1)) as lite:
        lite.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT)")
        first = await spawn(
            HEADWAY_SOURCES=json.dumps({"lite": sources["lite"].url.get_secret_value()}),
            HEADWAY_KINDS="tests.faults.csv_small_chunks",
        )
        job_id = await submit(engine, orders(), source="lite", mode="append")
        staging = staging_name(job_id)

        def rows() -> int:
            try:
                return lite.execute(f"SELECT count(*) FROM {staging}").fetchone()[0]
            except sqlite3.OperationalError:  # there is no such table yet, or it is being written to
                return 0

        await until(rows, 20)
        first.signal(signal.SIGKILL)
        await first.ended()
        kept = rows()
        await engine.expire(job_id)

        async with worker(engine.settings.model_copy(update={"sources": sources})):
            job = await engine.ended(job_id, 40)

        assert job.state == JobState.SUCCEEDED, job.error
        assert 0 < kept < 200_000
        assert (job.result["rows"], job.result["rejected"]) == (200_000, 4)
        assert await rejected(engine, job) == list(BAD.values())
        assert lite.execute("SELECT count(*), sum(a), max(b) FROM t").fetchone() == (
            200_000,
            199_999 * 100_000,
            "name 99999",
        )
        assert any(f"Going on after {kept:,} rows" in str(event) for event in await engine.events(job_id))


def at(table: PostgresTable, job_id: UUID, rows: int, *, when: datetime | None = None) -> Position:
    return Position(
        job=job_id,
        writer=table.writer,
        at=when or datetime.now(UTC),
        offset=4 + rows * 4,
        lines=1 + rows,
        rows=rows,
        passes=1,
        types=[ColumnType.BIGINT, ColumnType.TEXT],
        rejected=[],
        seconds=1,
    )


async def fill(table: PostgresTable, rows: int, *, anew: bool = False) -> None:
    """Begin a chunk and copy rows."""

    async def given() -> AsyncIterator[bytes]:
        yield b"1,x\n" * rows

    await table.begin(COLUMNS, anew=anew)
    assert await table.fill(COLUMNS, given(), ",") == rows


@asynccontextmanager
async def opened(engine: Engine, job_id: UUID) -> AsyncIterator[PostgresTable]:
    connection = await asyncpg.connect(url(engine))
    yield PostgresTable(connection, "default", Target("t"), job_id)
    connection.terminate()


@pytest.mark.parametrize("hung", [False, True])
async def test_an_attempt_whose_import_was_taken_over_adds_nothing(
    engine: Engine, source: asyncpg.Connection, hung: bool
) -> None:
    job_id = uuid4()
    async with opened(engine, job_id) as old, opened(engine, job_id) as new:
        assert await old.find() is None
        await fill(old, 2, anew=True)
        await old.keep(at(old, job_id, 2))
        if hung:
            await fill(old, 7)

        found = await new.find()
        assert found is not None
        assert (found.rows, found.writer) == (2, old.writer)
        with pytest.raises(ConnectionError if hung else Retry):
            await (old.keep(at(old, job_id, 9)) if hung else fill(old, 7))
        await fill(new, 3)
        await new.finish(at(new, job_id, 5), COLUMNS)

        assert await source.fetchval("SELECT count(*) FROM t") == 5
        assert await tables(source) == ["t"]


async def test_a_name_that_is_taken_meanwhile_is_refused_at_the_end(engine: Engine, source: asyncpg.Connection) -> None:
    job_id = uuid4()
    async with opened(engine, job_id) as table:
        await table.find()
        await fill(table, 2, anew=True)
        await source.execute("CREATE TABLE t AS SELECT 1 AS mine")

        with pytest.raises(Fatal, match="has a table or type 't' already"):
            await table.finish(at(table, job_id, 2), COLUMNS)

    assert await source.fetchval("SELECT mine FROM t") == 1


async def test_an_import_drops_what_others_left_behind_a_week_ago(engine: Engine, source: asyncpg.Connection) -> None:
    old, young = uuid4(), uuid4()
    await source.execute("CREATE TABLE headway_import_of_mine ()")
    for job_id, days in ((old, 8), (young, 6)):
        async with opened(engine, job_id) as table:
            await table.find()
            await fill(table, 2, anew=True)
            await table.keep(at(table, job_id, 2, when=datetime.now(UTC) - timedelta(days=days)))

    async with worker(engine.settings):
        job = await engine.ended(await submit(engine, b"a\n1\n"))

    assert job.state == JobState.SUCCEEDED, job.error
    assert await tables(source) == sorted(["headway_import_of_mine", staging_name(young), "t"])


async def test_a_position_of_other_rules_is_not_gone_on_from(engine: Engine, source: asyncpg.Connection) -> None:
    job_id = uuid4()
    async with opened(engine, job_id) as table:
        await table.find()
        await fill(table, 2, anew=True)
        await table.keep(at(table, job_id, 2).model_copy(update={"version": 0}))
    async with opened(engine, job_id) as table:
        assert await table.find() is None
        await fill(table, 1, anew=True)
        await table.finish(at(table, job_id, 1), COLUMNS)

    assert await source.fetchval("SELECT count(*) FROM t") == 1
