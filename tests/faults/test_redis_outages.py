"""What becomes of jobs when Redis is full, is wiped again and again, or hangs; then what it does once it is well."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from headway import metrics
from headway.job import Job
from headway.queue import NAME
from headway.states import JobState
from tests.conftest import until, web
from tests.engine import Engine, counted
from tests.faults.conftest import Spawner

JOBS = 12
# Seconds from the acceptance of a job to its start, at most.
START_WITHIN = 2.0
# Whose jobs started late. $1: seconds
LATE = "SELECT id FROM jobs WHERE started_at > coalesce(run_at, created_at) + $1 * interval '1 second'"


@asynccontextmanager
async def full(redis: Redis) -> AsyncIterator[None]:
    """An empty Redis holds more than this already, so it takes nothing."""
    await redis.config_set("maxmemory-policy", "noeviction")
    await redis.config_set("maxmemory", "100kb")
    try:
        with pytest.raises(ResponseError, match="maxmemory"):
            await redis.set("more", "than fits")
        yield
    finally:
        await redis.config_set("maxmemory", 0)


@asynccontextmanager
async def wiped(redis: Redis) -> AsyncIterator[None]:
    async def wipe() -> None:
        while True:
            await redis.flushall()
            await asyncio.sleep(0.02)

    wiping = asyncio.create_task(wipe())
    try:
        yield
    finally:
        wiping.cancel()
        await asyncio.gather(wiping, return_exceptions=True)


@asynccontextmanager
async def hung(redis: Redis) -> AsyncIterator[None]:
    pid = (await redis.info("server"))["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("fault", [full, wiped, hung])
async def test_jobs_are_accepted_and_run_in_time_whatever_becomes_of_redis(
    fault: Callable[[Redis], AbstractAsyncContextManager[None]], engine: Engine, spawn: Spawner
) -> None:
    await spawn()
    headers = {"Authorization": f"Bearer {engine.tenant.api_key}"}
    async with (
        Redis.from_url(engine.settings.redis_url.get_secret_value()) as redis,
        web(engine.settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):

        async def ended(jobs: int) -> list[Job]:
            ids = []
            for _ in range(jobs):
                answer = await http.post(
                    "/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0.2}}, timeout=3
                )
                assert answer.status_code == 202, answer.text
                ids.append(answer.json()["id"])
            return await asyncio.gather(*map(engine.ended, ids))

        async with fault(redis):
            for job in await ended(JOBS):
                assert job.state == JobState.SUCCEEDED
                assert job.progress is not None
            assert await engine.database.fetch(LATE, START_WITHIN) == []

        async def woken() -> bool:
            """Whether a wake-up that was not refused was also taken."""
            refused = counted(metrics.wakeups_failed)
            await ended(1)
            return counted(metrics.wakeups_failed) == refused and await redis.zcard(NAME) == 0

        await until(woken)
