"""What becomes of an export whose worker, or whose own process, is killed in the middle of it."""

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import psycopg
import pytest

from headway.embedded import Embedded
from headway.settings import Source
from headway.states import JobState
from tests.conftest import files_below, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner

SOURCE = "headway_export_source"
SQL = "SELECT n AS id, repeat('x', 100) AS text FROM generate_series(1, {}) AS n"
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'headway' AND datname = current_database()"


@pytest.fixture
async def source(servers: Embedded) -> AsyncIterator[asyncpg.Connection]:
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE IF EXISTS {SOURCE} WITH (FORCE)")
        admin.execute(f"CREATE DATABASE {SOURCE} TEMPLATE template0 STRATEGY file_copy")
    connection = await asyncpg.connect(servers.postgres_url(SOURCE))
    yield connection
    await connection.close()


@pytest.fixture
async def engine(servers: Embedded, source: asyncpg.Connection, tmp_path: Path) -> AsyncIterator[Engine]:
    sources = {"default": Source.model_validate({"url": servers.postgres_url(SOURCE)})}
    async with make_engine(servers, tmp_path, sources=sources) as engine:
        yield engine


@pytest.mark.parametrize("whom", ["worker", "child"])
async def test_an_export_that_is_killed_starts_over_and_is_whole(
    engine: Engine, spawn: Spawner, source: asyncpg.Connection, whom: str
) -> None:
    # The row at which it stands still until the lock is gone.
    await source.execute(
        "CREATE FUNCTION pass() RETURNS int LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_advisory_lock_shared(1); RETURN 1; END'"
    )
    await source.execute("SELECT pg_advisory_lock(1)")
    sql = f"{SQL.format(200_000)} WHERE n <> 100000 OR pass() = 1"
    url = engine.settings.sources["default"].url.get_secret_value()
    first = await spawn(HEADWAY_SOURCES=json.dumps({"default": url}))
    job_id = await engine.submit_kind("sql.export", {"sql": sql}, max_attempts=2)
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    await until(lambda: source.fetchval(waits), 20)
    before = {row["pid"] for row in await source.fetch(SESSIONS)}
    if whom == "worker":
        first.signal(signal.SIGKILL)
        await first.ended()
        await engine.expire(job_id)
    else:
        [child] = children_of(first.process.pid)
        os.kill(child, signal.SIGKILL)

    # Postgres ends the statement, which waits and sends nothing.
    async def gone() -> bool:
        return not before & {row["pid"] for row in await source.fetch(SESSIONS)}

    await until(gone, 20)
    await source.execute("SELECT pg_advisory_unlock(1)")
    async with worker(engine.settings):
        job = await engine.ended(job_id, 40)

    assert job.state == JobState.SUCCEEDED, job.error
    assert job.result["rows"] == 200_000
    [artifact] = await engine.store.artifacts(job.id, engine.tenant.id)
    lines = b"".join([chunk async for chunk in engine.files.read(artifact.key)]).split(b"\r\n")
    assert [int(line.partition(b",")[0]) for line in lines[1:-1]] == list(range(1, 200_001))
    kept = files_below(engine.settings.home / "files")
    assert len(kept) == 1


def children_of(process_id: int) -> list[int]:
    path = Path(f"/proc/{process_id}/task/{process_id}/children")
    return [int(child) for child in path.read_text().split()]
