"""What becomes of jobs when worker processes and Postgres are killed, paused and stopped."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from headway import JobContext
from headway.embedded import Embedded
from headway.job import Job
from headway.lifecycle import MOST_CRASHES
from headway.states import JobState
from headway.store import OUTAGES, prepare
from tests.conftest import until
from tests.engine import Engine, worker
from tests.faults.conftest import Spawner

# Seconds; the worker's own lease is longer, and nothing here depends on how long it is.
LEASE = 3.0
SHORT = 2.0


async def waiting_job(engine: Engine, folder: Path) -> UUID:
    """A job that runs until the flag is there; returns once it runs."""
    job_id = await engine.submit_kind("fault.wait", {"path": str(folder / "flag")})

    async def reported() -> bool:
        return (await engine.job(job_id)).progress is not None

    await until(reported, 20)
    return job_id


async def only_one_end(engine: Engine, job: Job) -> None:
    """The job's one terminal event is its last, and its events have no gap but for progress."""
    events = await engine.events(job.id)
    assert [event.terminal for event in events].index(True) == len(events) - 1
    assert events[-1].seq == (await engine.job(job.id)).seq == job.seq


async def test_the_job_of_a_killed_worker_is_run_to_its_end_within_a_lease_and_five_seconds(
    engine: Engine, spawn: Spawner, tmp_path: Path, flag: Callable[[], None]
) -> None:
    first = await spawn(lease=LEASE)
    job_id = await waiting_job(engine, tmp_path)
    await spawn(lease=LEASE)
    first.signal(signal.SIGKILL)
    killed = time.monotonic()
    assert await first.ended() == -signal.SIGKILL
    flag()

    job = await engine.ended(job_id, LEASE + 5)

    assert time.monotonic() - killed < LEASE + 5
    assert (job.state, job.result) == (JobState.SUCCEEDED, {"attempt": 1, "checkpoint": 1})
    row = await engine.row(job_id)
    assert (row["crashes"], row["interruptions"], row["attempt"]) == (1, 0, 1)
    await only_one_end(engine, job)


async def test_a_worker_that_was_paused_past_its_lease_writes_nothing_more_and_works_on(
    engine: Engine, spawn: Spawner, tmp_path: Path, flag: Callable[[], None]
) -> None:
    paused = await spawn(lease=SHORT)
    job_id = await waiting_job(engine, tmp_path)
    second = await spawn(lease=SHORT)
    paused.signal(signal.SIGSTOP)

    async def rescued() -> bool:
        return (await engine.row(job_id))["crashes"] == 1 and await engine.state(job_id) == "running"

    await until(rescued)
    flag()
    job = await engine.ended(job_id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, {"attempt": 1, "checkpoint": 1})
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0

    paused.signal(signal.SIGCONT)

    async def noticed() -> bool:
        return await paused.counted("headway_lease_lost_total") >= 1

    await until(noticed)
    next_job = await engine.ended(await engine.submit_kind("fault.wait", {"path": str(tmp_path / "flag")}))
    assert next_job.state == JobState.SUCCEEDED
    assert await engine.job(job_id) == job
    await only_one_end(engine, job)


async def test_a_job_that_kills_its_workers_fails_at_last_and_harms_no_other(
    engine: Engine, spawn: Spawner, tmp_path: Path, flag: Callable[[], None]
) -> None:
    flag()
    poison = await engine.submit_kind("fault.crash", None)
    for _ in range(MOST_CRASHES):
        victim = await spawn(lease=SHORT, ready=False)
        assert await victim.ended(30) == -signal.SIGKILL
    await spawn(lease=SHORT)
    good = await engine.submit_kind("fault.wait", {"path": str(tmp_path / "flag")})

    job = await engine.ended(poison)

    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["type"] == "crashed"
    assert (job.attempt, (await engine.row(poison))["crashes"]) == (1, MOST_CRASHES)
    await only_one_end(engine, job)
    assert (await engine.ended(good)).state == JobState.SUCCEEDED


async def test_rolling_restarts_use_up_no_attempt(
    engine: Engine, spawn: Spawner, tmp_path: Path, flag: Callable[[], None]
) -> None:
    running = await spawn()
    job_id = await waiting_job(engine, tmp_path)
    for restarts in range(1, 3):
        following = await spawn()
        running.signal(signal.SIGTERM)
        assert await running.ended() == 0
        running = following

        async def taken_over(restarts: int = restarts) -> bool:
            row = await engine.row(job_id)
            return (row["state"], row["interruptions"], row["checkpoint"]) == ("running", restarts, restarts + 1)

        await until(taken_over)
    flag()
    job = await engine.ended(job_id)

    assert (job.state, job.attempt, job.interruptions) == (JobState.SUCCEEDED, 1, 2)
    assert (await engine.row(job_id))["crashes"] == 0


async def test_a_worker_that_waits_for_its_database_lives_is_not_ready_and_stops_when_told(
    engine: Engine, spawn: Spawner
) -> None:
    nowhere = type(engine.settings.database_url)("postgresql://headway:none@127.0.0.1:1/headway")
    waiting = await spawn(settings=engine.settings.model_copy(update={"database_url": nowhere}), ready=False)
    await until(lambda: waiting.said("waiting for the database"), 30)

    assert (await waiting.ops.get("/livez")).status_code == 200
    ready = await waiting.ops.get("/readyz")
    assert (ready.status_code, ready.text) == (503, "waiting for the database, or for what handlers need\n")
    waiting.signal(signal.SIGTERM)
    assert await waiting.ended() == 0


async def test_a_database_that_is_not_migrated_is_named(engine: Engine, spawn: Spawner, servers: Embedded) -> None:
    url = type(engine.settings.database_url)(servers.postgres_url("postgres"))
    wrong = await spawn(settings=engine.settings.model_copy(update={"database_url": url}), ready=False)

    assert await wrong.ended(30) == 1
    assert wrong.said("python -m services.web.manage migrate")


@asynccontextmanager
async def reconnected(engine: Engine) -> AsyncIterator[Engine]:
    """The engine with a new connection of the test's own."""
    database = await asyncpg.connect(engine.settings.database_url.get_secret_value())
    await prepare(database)
    yield replace(engine, database=database)
    await database.close()


async def test_postgres_may_crash_under_a_job(servers: Embedded, engine: Engine) -> None:
    """Submits fail while it is away and are not accepted by half; what runs goes on and is written afterwards."""
    end = asyncio.Event()

    async def handler(job: JobContext) -> str:
        await job.report(1, 2)
        await end.wait()
        return "done"

    async with worker(engine.settings):
        job_id = await engine.submit(handler)
        await engine.running(job_id)
        # Test servers answer before they write; a crash would take back what they said.
        await engine.database.execute("CHECKPOINT")
        servers._postgres.signal(signal.SIGQUIT)
        await until(lambda: servers.ended() == "PostgreSQL")

        with pytest.raises(OUTAGES):
            await engine.submit(handler)
        end.set()
        # In this thread: the servers end with the thread that started them.
        servers.start()
        async with reconnected(engine) as again:
            job = await again.ended(job_id)
            assert (job.state, job.result, job.attempt) == (JobState.SUCCEEDED, "done", 1)
            assert (await again.row(job_id))["crashes"] == 0
            assert await again.database.fetchval("SELECT count(*) FROM jobs") == 1
            assert (await again.ended(await again.submit(handler))).state == JobState.SUCCEEDED
            await only_one_end(again, job)
