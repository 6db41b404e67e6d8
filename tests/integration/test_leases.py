"""Leases: who holds a job keeps it, and who cannot hold it lets it go in time."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from headway import JobContext, metrics
from headway.embedded import Embedded
from headway.states import JobState
from services.worker.lease import LeaseKeeper
from tests.conftest import until
from tests.engine import Engine, behind_proxy, counted, worker
from tests.engine import engine as make_engine

LEASE = timedelta(seconds=1.5)


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


async def lease_left(engine: Engine, job_id: UUID) -> float:
    """Seconds until the lease ends; negative if it has."""
    return await engine.database.fetchval(
        "SELECT extract(epoch FROM lease_expires_at - clock_timestamp())::float8 FROM jobs WHERE id = $1", job_id
    )


async def test_a_job_keeps_its_lease_for_as_long_as_it_runs(engine: Engine) -> None:
    end = asyncio.Event()

    async def handler(job: JobContext) -> None:
        await end.wait()

    async with worker(engine.settings, lease=LEASE), worker(engine.settings, lease=LEASE):
        job_id = await engine.submit(handler)
        await engine.running(job_id)
        first = (await engine.row(job_id))["lease_expires_at"]

        async def renewed() -> bool:
            assert await lease_left(engine, job_id) > 0
            return bool((await engine.row(job_id))["lease_expires_at"] > first + LEASE)

        await until(renewed)
        end.set()
        job = await engine.ended(job_id)

    assert (job.state, (await engine.row(job_id))["token"]) == (JobState.SUCCEEDED, 1)


async def test_a_handler_that_blocks_the_event_loop_keeps_its_job(engine: Engine) -> None:
    url = engine.settings.database_url.get_secret_value()

    async def handler(job: JobContext) -> list[bool]:
        """Looks at its own lease while the loop is held up, as another worker's scan would."""
        held = []
        with psycopg.connect(url, autocommit=True) as connection:
            blocked_until = time.monotonic() + 2 * LEASE.total_seconds()
            while time.monotonic() < blocked_until:
                time.sleep(0.05)
                found = connection.execute("SELECT lease_expires_at > now() FROM jobs WHERE id = %s", [job.id])
                held += found.fetchone() or [False]
        return [all(held), len(held) > 10]

    lost = counted(metrics.lease_lost)
    async with worker(engine.settings, lease=LEASE):
        job = await engine.ended(await engine.submit(handler))

    assert (job.state, job.result) == (JobState.SUCCEEDED, [True, True])
    assert counted(metrics.lease_lost) == lost


async def test_renewal_goes_on_after_its_connection_was_killed(engine: Engine) -> None:
    end = asyncio.Event()

    async def handler(job: JobContext) -> None:
        await end.wait()

    async with worker(engine.settings, lease=LEASE):
        job_id = await engine.submit(handler)
        await engine.running(job_id)
        first = (await engine.row(job_id))["lease_expires_at"]

        async def renewed() -> bool:
            return bool((await engine.row(job_id))["lease_expires_at"] > first)

        await until(renewed)
        killed = await engine.database.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert len(killed) > 1
        first += LEASE
        await until(renewed)
        end.set()
        assert (await engine.ended(job_id)).state == JobState.SUCCEEDED


async def test_a_renewal_whose_answer_was_lost_is_tried_again_in_time(engine: Engine) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def handler(job: JobContext) -> None:
        begun.set()
        await end.wait()

    lost = counted(metrics.lease_lost)
    async with behind_proxy(engine.settings) as (proxy, settings), worker(settings, lease=LEASE):
        job_id = await engine.submit(handler)
        await begun.wait()
        # Of all that the worker is told only the answer to a renewal names the job.
        await proxy.cut_reply(containing=job_id.bytes)
        first = (await engine.row(job_id))["lease_expires_at"]

        async def renewed() -> bool:
            return bool((await engine.row(job_id))["lease_expires_at"] > first + LEASE)

        await until(renewed)
        end.set()
        assert (await engine.ended(job_id)).state == JobState.SUCCEEDED

    assert counted(metrics.lease_lost) == lost


async def test_an_attempt_that_is_cut_off_from_postgres_stops_before_its_lease_ends(engine: Engine) -> None:
    begun, stopped_at = asyncio.Event(), list[float]()

    async def handler(job: JobContext) -> str:
        if job.attempt == 1 and not stopped_at:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                stopped_at.append(time.monotonic())
        return "done"

    lost = counted(metrics.lease_lost)
    async with (
        behind_proxy(engine.settings) as (proxy, settings),
        # What must be left of a lease is more than the time between two looks at it.
        worker(settings.model_copy(update={"slots": 1}), lease=2 * LEASE),
    ):
        job_id = await engine.submit(handler)
        await begun.wait()
        proxy.blackhole()
        lease_ends = time.monotonic() + await lease_left(engine, job_id)
        await until(lambda: stopped_at)
        assert stopped_at[0] < lease_ends
        assert await engine.state(job_id) == "running"
        async with worker(engine.settings, lease=LEASE):
            job = await engine.ended(job_id)
        proxy.restore()

    assert (job.state, job.result, job.attempt) == (JobState.SUCCEEDED, "done", 1)
    row = await engine.row(job_id)
    assert (row["crashes"], row["token"]) == (1, 3)
    assert counted(metrics.lease_lost) == lost + 1
    assert (await engine.job(job_id)).seq == job.seq


async def test_a_job_may_come_back_while_its_lost_attempt_still_cleans_up(engine: Engine) -> None:
    """The worker holds two attempts of one job for a while; what is said to one must not reach the other."""
    cleaned_up, first_ended, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    runs: list[int] = []

    async def handler(job: JobContext) -> str:
        runs.append(len(runs) + 1)
        if runs[-1] == 1:
            await engine.expire(job.id)
            try:
                await asyncio.sleep(60)
            finally:
                await cleaned_up.wait()
                first_ended.set()
        await go_on.wait()
        return f"run {runs[-1]}"

    async with worker(engine.settings, lease=LEASE) as app:
        job_id = await engine.submit(handler)
        await until(lambda: runs == [1, 2])
        assert len(app.worker.tasks) == 2
        cleaned_up.set()
        await first_ended.wait()
        await until(lambda: len(app.worker.tasks) == 1)
        held_until = (await engine.row(job_id))["lease_expires_at"]

        async def renewed() -> bool:
            return bool((await engine.row(job_id))["lease_expires_at"] > held_until)

        await until(renewed)
        go_on.set()
        job = await engine.ended(job_id)
        await until(lambda: not app.worker.tasks)

    assert (job.state, job.result, runs) == (JobState.SUCCEEDED, "run 2", [1, 2])


async def test_a_cancel_reaches_the_attempt_that_holds_the_job(engine: Engine) -> None:
    stop = asyncio.Event()
    interrupted: list[int] = []
    runs = 0

    async def handler(job: JobContext) -> None:
        nonlocal runs
        runs += 1
        this = runs
        if this == 1:
            await engine.expire(job.id)
        while not stop.is_set():
            try:
                await stop.wait()
            except asyncio.CancelledError:
                interrupted.append(this)
                if this == 2:
                    raise

    async with worker(engine.settings, lease=LEASE):
        job_id = await engine.submit(handler)
        await until(lambda: runs == 2 and interrupted == [1])
        await engine.lifecycle.cancel(job_id, engine.tenant.id)
        job = await engine.ended(job_id)
        stop.set()

    assert (job.state, interrupted) == (JobState.CANCELLED, [1, 2])


async def test_a_job_that_was_let_go_is_not_renewed(engine: Engine) -> None:
    lost: list[UUID] = []
    kept = await engine.claim(await engine.submit_kind("test.call", {}))
    dropped = await engine.claim(await engine.submit_kind("test.call", {}))
    keeper = LeaseKeeper(
        engine.settings.database_url.get_secret_value(), lambda job_id, _: lost.append(job_id), lease=LEASE
    )
    now = time.monotonic()
    for claim in (kept, dropped):
        keeper.hold(claim, now)
    keeper.drop(dropped)
    before = (await engine.row(dropped.job_id))["lease_expires_at"]
    keeper.start()
    try:

        async def renewed() -> bool:
            return bool((await engine.row(kept.job_id))["lease_expires_at"] < before)

        await until(renewed)
        await engine.lifecycle.release(kept)
        await until(lambda: lost)
    finally:
        keeper.stop()
        await asyncio.to_thread(keeper.join, 5)

    assert lost == [kept.job_id]
    assert (await engine.row(dropped.job_id))["lease_expires_at"] == before
    assert not keeper.is_alive()


async def test_many_jobs_of_a_dead_worker_are_rescued_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.worker.RESCUED_AT_ONCE", 5)

    async def handler(job: JobContext) -> None:
        await asyncio.Event().wait()

    ids = [await engine.submit(handler) for _ in range(60)]
    await engine.lifecycle.claim(ids, ["test.call"], "a worker that died")
    await engine.database.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 s'")

    async def rescued() -> bool:
        return await engine.database.fetchval("SELECT bool_and(crashes = 1) FROM jobs")

    async with worker(engine.settings):
        await until(rescued, 5)


async def test_a_job_of_a_claim_whose_answer_is_not_read_yet_keeps_its_lease(engine: Engine) -> None:
    keeper = LeaseKeeper(engine.settings.database_url.get_secret_value(), lambda *_: None, lease=LEASE)
    keeper.start()
    sent_at = time.monotonic()
    try:
        with keeper.claiming("a worker of the test", sent_at):
            claim = await engine.claim(await engine.submit_kind("test.call", {}))
            await engine.database.execute("UPDATE jobs SET lease_expires_at = now() + $1", LEASE)
            # As a handler does that blocks the loop.
            time.sleep(2 * LEASE.total_seconds())
            assert await lease_left(engine, claim.job_id) > 0
            assert keeper.hold(claim, sent_at)
    finally:
        keeper.stop()
        await asyncio.to_thread(keeper.join, 5)


async def test_a_job_whose_lease_is_as_good_as_over_is_not_held(engine: Engine) -> None:
    claim = await engine.claim(await engine.submit_kind("test.call", {}))
    keeper = LeaseKeeper(engine.settings.database_url.get_secret_value(), lambda *_: None, lease=LEASE)

    assert not keeper.hold(claim, time.monotonic() - LEASE.total_seconds() * 0.9)
    assert keeper.hold(claim, time.monotonic())


async def test_two_workers_rescue_what_a_third_left_and_run_it_once(engine: Engine) -> None:
    ran: list[UUID] = []

    async def handler(job: JobContext) -> None:
        ran.append(job.id)

    ids = [await engine.submit(handler) for _ in range(20)]
    await engine.lifecycle.claim(ids, ["test.call"], "a worker that died")
    for job_id in ids:
        await engine.expire(job_id)
    async with worker(engine.settings), worker(engine.settings):
        jobs = [await engine.ended(job_id) for job_id in ids]

    assert sorted(ran) == sorted(ids)
    assert {(job.state, job.attempt) for job in jobs} == {(JobState.SUCCEEDED, 1)}
    assert await engine.database.fetchval("SELECT array_agg(DISTINCT crashes) FROM jobs") == [1]
