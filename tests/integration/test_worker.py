"""The worker: how it gets its jobs, how many it takes, and how it stops."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from structlog.testing import capture_logs
from uuid_utils.compat import uuid7

from headway import JobContext, kind, metrics
from headway.embedded import Embedded
from headway.queue import NAME
from headway.settings import Settings
from headway.states import JobState
from services.worker import runner
from services.worker import worker as worker_module
from services.worker.app import App
from tests.conftest import files_below, until
from tests.engine import Engine, behind_proxy, counted, parts, worker
from tests.engine import engine as make_engine
from tests.faults.proxy import Proxy

CLOSED_PORT = SecretStr("redis://127.0.0.1:1/0")


@kind("test.unknown_elsewhere")
async def unknown_elsewhere(job: JobContext, input: int) -> int:
    """Only some workers know it."""
    return input


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, slots=3) as engine:
        yield engine


@pytest.fixture
async def redis(engine: Engine) -> AsyncIterator[Redis]:
    async with Redis.from_url(engine.settings.redis_url.get_secret_value()) as redis:
        yield redis


async def quick(job: JobContext) -> str:
    return "done"


class Gate:
    """A handler that runs until it is let go, and counts how often it runs at a time."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.runs = self.now = self.most = 0

    async def __call__(self, job: JobContext) -> int:
        self.runs += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.open.wait()
        finally:
            self.now -= 1
        return job.attempt


def without_redis(settings: Settings) -> Settings:
    return settings.model_copy(update={"redis_url": CLOSED_PORT})


# -- getting jobs --------------------------------------------------------------------------------------------------


async def test_an_idle_worker_is_woken_and_does_not_wait_for_a_scan(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "SCAN_EVERY", 3600)
    async with worker(engine.settings):
        for _ in range(20):
            job = await engine.ended(await engine.submit(quick))
            assert job.result == "done"


async def test_without_redis_jobs_start_within_two_seconds_and_finish(servers: Embedded, tmp_path: Path) -> None:
    async with make_engine(servers, tmp_path, slots=3, redis_url=CLOSED_PORT) as engine, worker(engine.settings):
        jobs = [await engine.ended(await engine.submit(quick)) for _ in range(3)]

    for job in jobs:
        assert job.started_at is not None
        assert (job.started_at - job.created_at).total_seconds() < 2


async def test_without_redis_a_backlog_does_not_wait_for_scans(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job a slot and scan would take 100 / 3 scans."""
    ids = [await engine.submit(quick) for _ in range(100)]
    scans = 0
    ready = engine.store.__class__.ready

    async def counting(*arguments: Any) -> Any:
        nonlocal scans
        scans += 1
        return await ready(*arguments)

    monkeypatch.setattr(engine.store.__class__, "ready", counting)
    began = time.monotonic()
    async with worker(without_redis(engine.settings)):
        for job_id in ids:
            await engine.ended(job_id)
    assert time.monotonic() - began < 100 / 3 * worker_module.SCAN_EVERY / 2
    assert scans >= 34


async def test_jobs_whose_wake_ups_redis_lost_are_found(engine: Engine, redis: Redis) -> None:
    ids = [await engine.submit(quick) for _ in range(5)]

    async def sent() -> bool:
        return bool(await redis.zcard(NAME) == 5)

    await until(sent)
    await redis.flushall()
    async with worker(engine.settings):
        for job_id in ids:
            assert (await engine.ended(job_id)).state == JobState.SUCCEEDED


async def test_a_worker_outlives_an_outage_of_redis(engine: Engine) -> None:
    url = engine.settings.redis_url.get_secret_value()
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    async with Proxy(port) as proxy:
        through = SecretStr(url.replace(str(port), str(proxy.port)))
        async with worker(engine.settings.model_copy(update={"redis_url": through})):
            for disturb in (proxy.reset, proxy.blackhole, proxy.restore):
                disturb()
                assert (await engine.ended(await engine.submit(quick))).state == JobState.SUCCEEDED


async def test_a_hundred_wake_ups_run_a_job_once(engine: Engine, redis: Redis) -> None:
    gate = Gate()
    async with worker(engine.settings) as app, worker(engine.settings) as other:
        job_id = await engine.submit(gate)
        for n in range(100):
            (app, other)[n % 2].queue.wake(job_id, 1)
            await redis.zadd(NAME, {str(job_id): n})
        await until(lambda: gate.now)
        gate.open.set()
        job = await engine.ended(job_id)

        async def taken() -> bool:
            return not await redis.zcard(NAME)

        await until(taken)

    assert (gate.runs, job.attempt, (await engine.row(job_id))["token"]) == (1, 1, 1)


async def test_garbage_in_the_queue_does_not_stop_a_worker(engine: Engine, redis: Redis) -> None:
    with capture_logs() as logs:
        async with worker(engine.settings):
            await redis.zadd(NAME, {b"garbage": 1, b"\xff\xfe": 2, str(uuid7()): 3})
            assert (await engine.ended(await engine.submit(quick))).state == JobState.SUCCEEDED
            await redis.delete(NAME)
            await redis.set(NAME, "not a sorted set")
            assert (await engine.ended(await engine.submit(quick))).state == JobState.SUCCEEDED

    assert [line["event"] for line in logs].count("not a job id in the queue") == 2


async def test_a_claim_whose_answer_was_lost_costs_neither_a_lease_nor_a_crash(engine: Engine) -> None:
    gate = Gate()
    async with worker(engine.settings) as app:
        held = await engine.submit(gate)
        await until(lambda: gate.now == 1)
        lost = await engine.submit_kind("test.unknown_elsewhere", 3, delay=3600)
        # In the worker's name, as by a statement that was committed though the connection broke before the answer came.
        await engine.database.execute(
            "UPDATE jobs SET state = 'running', worker = $2, token = 7, attempt = 1, finished_at = NULL, "
            "lease_expires_at = now() + interval '1 hour' WHERE id = $1",
            lost,
            app.worker.name,
        )
        job = await engine.ended(lost)
        gate.open.set()
        other = await engine.ended(held)
    assert (job.state, job.attempt, job.crashes) == (JobState.SUCCEEDED, 1, 0)
    # What the worker knows of went on all the while.
    assert (gate.runs, other.interruptions) == (1, 0)


async def test_slots_are_never_exceeded_and_all_are_used(engine: Engine) -> None:
    gate = Gate()
    async with worker(engine.settings) as app, worker(engine.settings):
        ids = [await engine.submit(gate) for _ in range(50)]
        await until(lambda: gate.now == 6)
        assert (app.worker.free, len(app.worker.tasks)) == (0, 3)
        gate.open.set()
        jobs = [await engine.ended(job_id) for job_id in ids]

    assert (gate.most, gate.runs) == (6, 50)
    assert {job.attempt for job in jobs} == {1}
    workers = await engine.database.fetch("SELECT DISTINCT token FROM jobs")
    assert [row["token"] for row in workers] == [1]


async def test_a_slot_is_free_while_the_ending_of_its_job_is_written(engine: Engine) -> None:
    """But no more than as many endings as there are slots wait for the database."""
    ran: list[Any] = []

    async def handler(job: JobContext) -> None:
        ran.append(job.id)

    async with worker(engine.settings.model_copy(update={"slots": 1})) as app:
        async with engine.database.transaction():
            await engine.database.execute("LOCK TABLE artifacts IN SHARE ROW EXCLUSIVE MODE")
            ids = [await engine.submit(handler) for _ in range(3)]
            await until(lambda: len(ran) == 2 and len(app.worker.tasks) == 2)
            assert app.worker.free == 0
            assert sorted([await engine.state(job_id) for job_id in ids]) == ["queued", "running", "running"]
        for job_id in ids:
            await engine.ended(job_id)

    assert sorted(ran) == sorted(ids)


async def test_a_kind_that_a_worker_does_not_know_is_left_to_one_that_does(engine: Engine) -> None:
    job_id = await engine.submit_kind("test.nobody", 1)
    async with worker(engine.settings):
        other = await engine.submit(quick)
        await engine.ended(other)
        # The scan of the worker has seen both by then.
        assert await engine.state(job_id) == "queued"
        known = await engine.submit_kind("test.unknown_elsewhere", 7)
        assert (await engine.ended(known)).result == 7


async def test_kinds_are_announced_at_start(engine: Engine) -> None:
    async with worker(engine.settings):
        kinds = {kind["name"]: kind for kind in await engine.store.kinds()}

    assert {"csv.import", "http.fetch", "demo.countdown", "test.call"} <= kinds.keys()
    assert kinds["test.call"]["timeout"] == 30
    assert json.dumps(kinds["demo.countdown"]["input_schema"])


async def test_arqs_own_way_in_runs_a_job_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` is the function that a wake-up names: calling it with an id starts the job."""
    monkeypatch.setattr(worker_module, "SCAN_EVERY", 3600)
    async with worker(without_redis(engine.settings)) as app:
        job_id = await engine.submit(quick)
        await app.worker.functions["run"].coroutine({}, str(job_id))
        assert (await engine.ended(job_id)).state == JobState.SUCCEEDED


async def test_what_is_more_than_there_are_slots_goes_back_to_the_queue(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "SCAN_EVERY", 3600)
    gate = Gate()
    async with (
        parts(without_redis(engine.settings), engine.tenant, engine.database) as silent,
        worker(engine.settings) as app,
    ):
        ids = [await silent.submit(gate) for _ in range(10)]
        await app.worker.start_jobs([str(job_id).encode() for job_id in ids])
        await until(lambda: gate.now == 3)
        gate.open.set()
        for job_id in ids:
            await engine.ended(job_id)

    assert gate.most == 3


async def test_a_worker_waits_for_a_database_that_is_away_and_then_works(engine: Engine) -> None:
    async with behind_proxy(engine.settings) as (proxy, settings):
        there, proxy._targets = proxy._targets, deque([("127.0.0.1", 1)])
        opening = asyncio.create_task(App.open(settings))
        with capture_logs() as logs:
            await until(lambda: [line for line in logs if line["event"] == "waiting for the database"])
        proxy._targets = there
        app = await opening
        await app.close()


# -- stopping ------------------------------------------------------------------------------------------------------


async def test_a_drain_lets_jobs_under_way_finish_and_starts_no_other(engine: Engine) -> None:
    gate = Gate()
    async with worker(engine.settings) as app:
        first = [await engine.submit(gate) for _ in range(3)]
        await until(lambda: gate.now == 3)
        rest = [await engine.submit(gate) for _ in range(3)]
        draining = asyncio.create_task(app.worker.drain(10))
        await until(lambda: not app.worker.allow_pick_jobs)
        gate.open.set()
        await draining

    assert [(await engine.job(job_id)).state for job_id in first] == [JobState.SUCCEEDED] * 3
    assert [await engine.state(job_id) for job_id in rest] == ["queued"] * 3
    assert gate.runs == 3


async def test_a_drain_gives_back_what_does_not_finish_in_time_and_it_runs_elsewhere(engine: Engine) -> None:
    gate = Gate()
    before = counted(metrics.interrupted, kind="test.call")
    ids = [await engine.submit(gate) for _ in range(3)]
    for rounds in range(1, 4):
        async with worker(engine.settings.model_copy(update={"drain": 0.05})):
            await until(lambda: gate.now == 3)
        for job_id in ids:
            job = await engine.job(job_id)
            assert (job.state, job.attempt, job.interruptions) == (JobState.QUEUED, 0, rounds)
    assert counted(metrics.interrupted, kind="test.call") == before + 9

    gate.open.set()
    async with worker(engine.settings):
        jobs = [await engine.ended(job_id) for job_id in ids]
    assert [(job.state, job.result, job.attempt, job.interruptions) for job in jobs] == [
        (JobState.SUCCEEDED, 1, 1, 3)
    ] * 3


async def test_artifacts_of_a_drained_attempt_are_gone(engine: Engine) -> None:
    started = asyncio.Event()

    async def handler(job: JobContext) -> None:
        async with job.artifact("out.txt") as out:
            await out.write(b"first attempt")
        started.set()
        await asyncio.sleep(60)

    async with worker(engine.settings.model_copy(update={"drain": 0.0})):
        await engine.submit(handler)
        await started.wait()

    assert files_below(engine.settings.home / "files") == []


async def test_a_job_that_is_to_be_cancelled_is_cancelled_by_a_drain(engine: Engine) -> None:
    gate = Gate()
    async with worker(engine.settings.model_copy(update={"drain": 0.0})):
        job_id = await engine.submit(gate)
        await until(lambda: gate.now)
        await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert (await engine.job(job_id)).state == JobState.CANCELLED


async def test_a_claim_that_is_under_way_when_the_drain_begins_is_not_lost(engine: Engine) -> None:
    gate = Gate()
    gate.open.set()
    async with behind_proxy(engine.settings) as (proxy, settings), worker(settings) as app:
        await engine.ended(await engine.submit(gate))
        proxy.latency = 0.5
        job_id = await engine.submit(gate)
        # Claimed in Postgres; the worker does not know it yet.
        await engine.running(job_id)
        assert not app.worker.tasks
        await app.worker.drain(5)
        proxy.latency = 0.0

    assert (await engine.job(job_id)).state == JobState.SUCCEEDED


async def test_a_drain_ends_though_a_handler_ignores_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.1)
    end, stubborn = asyncio.Event(), asyncio.Event()

    async def handler(job: JobContext) -> None:
        while not end.is_set():
            stubborn.set()
            try:
                await end.wait()
            except asyncio.CancelledError:
                continue

    async with worker(engine.settings.model_copy(update={"drain": 0.0})):
        job_id = await engine.submit(handler)
        await stubborn.wait()
    end.set()

    assert (await engine.job(job_id)).state == JobState.QUEUED


async def test_a_drain_ends_though_the_database_is_away(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "END_WITHIN", 0.3)
    gate = Gate()
    async with behind_proxy(engine.settings) as (proxy, settings), worker(settings) as app:
        job_id = await engine.submit(gate)
        await until(lambda: gate.now)
        proxy.blackhole()
        with capture_logs() as logs:
            # A statement that is under way as Postgres goes silent is given up after ten.
            async with asyncio.timeout(20):
                await app.worker.drain(0)
        proxy.restore()
        await until(lambda: not app.worker.tasks)

    assert "jobs could not be given back in time; they will be rescued" in [line["event"] for line in logs]
    # What the dead line kept back may have arrived after all; if not, whoever comes next takes the job back.
    assert await engine.state(job_id) in ("running", "queued")


async def test_a_worker_that_is_told_to_stop_before_it_began_stops(engine: Engine) -> None:
    app = await App.open(engine.settings)
    await app.worker.drain(1)
    async with asyncio.timeout(5):
        await app.worker.async_run()
    await app.close()


# -- outages of the database ---------------------------------------------------------------------------------------


async def test_an_ending_whose_answer_is_lost_is_written_once(engine: Engine) -> None:
    gate = Gate()
    async with behind_proxy(engine.settings) as (proxy, settings), worker(settings) as app:
        job_id = await engine.submit(gate)
        await until(lambda: gate.now)
        lost = counted(metrics.lease_lost)
        cut = proxy.cut_reply(containing=b"succeeded")
        with capture_logs() as logs:
            gate.open.set()
            await cut
            await until(lambda: not app.worker.tasks)

    said = [line["event"] for line in logs]
    assert "the ending was not written; trying again" in said
    assert "an attempt ended" in said
    job = await engine.job(job_id)
    assert (job.state, job.result, job.seq) == (JobState.SUCCEEDED, 1, 3)
    assert counted(metrics.lease_lost) == lost


async def test_a_loop_that_fails_ends_the_worker_though_another_loses_its_cancel(engine: Engine) -> None:
    """As libraries do that are told to stop in the moment in which they have what they waited for."""
    cancels = 0

    async def fails() -> None:
        raise ConnectionError("what it needs has gone")

    async def loses_one() -> None:
        nonlocal cancels
        while cancels < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancels += 1

    app = await App.open(engine.settings)
    app.worker._beside = [loses_one, fails]
    try:
        async with asyncio.timeout(20):
            with pytest.raises(ExceptionGroup) as raised:
                await app.worker.async_run()
        assert "what it needs has gone" in repr(raised.value.exceptions)
        assert cancels == 2
    finally:
        await app.close()
