"""Retention: what ended long ago goes, with its bytes; nothing else does."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
import pytest_asyncio

from headway import JobContext, metrics
from headway.embedded import Embedded
from headway.errors import NotFound
from headway.job import Ending
from headway.retention import DELETED_AT_ONCE, Retention
from headway.states import JobState
from services.worker import sweeper
from tests.conftest import files_below, make_tenant, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine

DAY = timedelta(days=1)


@pytest_asyncio.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


async def ended(engine: Engine, days: float, **more: object) -> UUID:
    """A job that succeeded so many days ago."""
    job_id = await engine.submit_kind("test.call", {}, **more)
    await engine.lifecycle.finish(Ending(await engine.claim(job_id), JobState.SUCCEEDED))
    await engine.database.execute(
        "UPDATE jobs SET finished_at = now() - make_interval(secs => $2) WHERE id = $1", job_id, days * 86400
    )
    return job_id


async def left(engine: Engine) -> set[UUID]:
    return {row["id"] for row in await engine.database.fetch("SELECT id FROM jobs")}


def retention(engine: Engine, *, days: float = 10, most: int = 1000) -> Retention:
    return Retention(engine.store, engine.files, age=days * DAY, most=most)


async def test_jobs_that_ended_long_ago_go_and_open_ones_never_do(engine: Engine) -> None:
    new, _ = await ended(engine, 9, tags=("a", "b")), await ended(engine, 11, tags=("a", "c"))
    queued, running = await engine.submit_kind("test.call", {}), await engine.submit_kind("test.call", {})
    await engine.claim(running)
    await engine.database.execute("UPDATE jobs SET created_at = now() - interval '1 year'")
    assert await retention(engine).sweep() == 1
    assert await left(engine) == {new, queued, running}
    for table in ("events", "failures", "artifacts"):
        rows = await engine.database.fetch(f"SELECT DISTINCT job_id FROM {table}")
        assert {row["job_id"] for row in rows} <= {new, queued, running}
    rows = await engine.database.fetch("SELECT job_id, tag FROM job_tags ORDER BY tag")
    assert [tuple(row) for row in rows] == [(new, "a"), (new, "b")]


async def test_what_cannot_be_deleted_puts_nothing_else_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_EVERY", 0.0)
    job_id, file = await ended(engine, 12), await engine.upload(b"over")
    await ended(engine, 11)
    await engine.database.execute("UPDATE files SET expires_at = now()")
    folder = engine.settings.home / "files" / "artifacts" / str(job_id)
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to(folder)
    caught = metrics.errors_caught.labels("files")._value
    before = caught.get()

    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(sweeper.Sweeper(retention(engine), engine.uploads).run())
        await until(lambda: engine.database.fetchval("SELECT NOT EXISTS (SELECT FROM files)"))
        assert await left(engine) == {job_id}
        assert caught.get() > before
        folder.unlink()

        async def empty() -> bool:
            return not await left(engine)

        await until(empty)
        sweeping.cancel()

    with pytest.raises(NotFound):
        await anext(engine.files.read(file.parts[0][0]))


async def test_of_each_tenant_as_many_are_kept_as_are_allowed(engine: Engine) -> None:
    mine = [await ended(engine, 9 - n) for n in range(5)]
    other = await make_tenant(engine.database, "other")
    theirs = [await ended(engine, 9, tenant_id=other.id) for _ in range(3)]
    assert await retention(engine, most=3).sweep() == 2
    assert await left(engine) == {*mine[2:], *theirs}


async def test_the_bytes_go_with_the_job_those_of_a_killed_attempt_too(engine: Engine) -> None:
    async def handler(job: JobContext) -> None:
        async with job.artifact("a.txt") as out:
            await out.write(b"what stays")

    async with worker(engine.settings):
        gone, kept = await engine.submit(handler), await engine.submit(handler)
        await engine.ended(gone)
        await engine.ended(kept)
    folder = Path(engine.settings.files_location.removeprefix("file://"))
    stray = folder / "artifacts" / str(gone) / "99" / "1"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"of an attempt whose worker died")
    await engine.database.execute("UPDATE jobs SET finished_at = now() - interval '20 days' WHERE id = $1", gone)
    assert await retention(engine).sweep() == 1
    files = files_below(folder)
    assert len(files) == 1
    assert str(kept) in str(files[0])


async def test_a_child_stays_until_its_parent_has_read_its_result(engine: Engine) -> None:
    parent = await engine.submit_kind("test.call", {})
    claim = await engine.claim(parent)
    child = await ended(engine, 20, parent_id=parent, parent_token=claim.token)
    await engine.lifecycle.release(claim)
    assert await retention(engine).sweep() == 0
    await engine.lifecycle.cancel(parent, engine.tenant.id)
    assert await retention(engine).sweep() == 1
    assert child not in await left(engine)


async def test_many_go_in_small_batches(engine: Engine) -> None:
    await engine.database.execute(
        "INSERT INTO jobs (id, tenant_id, kind, state, input, timeout, finished_at) SELECT uuidv7(), $1, 'test.call', "
        "'failed', '{}', 1, now() - interval '20 days' FROM generate_series(1, $2::int)",
        engine.tenant.id,
        3 * DELETED_AT_ONCE + 1,
    )
    assert await retention(engine).sweep() == 3 * DELETED_AT_ONCE + 1
