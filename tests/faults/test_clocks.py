"""Clocks of web services and workers that are an hour wrong change nothing: all times are the database's."""

import asyncio
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from headway.schedules import Schedules
from headway.states import JobState
from tests.conftest import until
from tests.engine import Engine
from tests.faults.conftest import Spawner

# Seconds.
HOUR = 3600.0
LEASE = 2.0
DELAY = 0.5
SOON = timedelta(minutes=1)


async def submitted(http: httpx.AsyncClient, path: Path, **more: Any) -> UUID:
    answer = await http.post("/jobs", json={"kind": "fault.wait", "input": {"path": str(path)}, **more})
    assert answer.status_code == 202, answer.text
    return UUID(answer.json()["id"])


async def on_time(engine: Engine) -> bool:
    """Whether all times of all jobs are about now."""
    now = await engine.database.fetchval("SELECT now()")
    jobs = await engine.database.fetch("SELECT created_at, started_at, finished_at FROM jobs")
    return all(abs(now - at) < SOON for job in jobs for at in job if at is not None)


async def test_nothing_depends_on_clocks_that_are_an_hour_wrong(
    engine: Engine, spawn: Spawner, tmp_path: Path, flag: Callable[[], None]
) -> None:
    """A fast web service and worker, and a slow worker, which run jobs side by side until the fast one is killed."""
    fast, slow, (_, http) = await asyncio.gather(
        spawn(lease=LEASE, clock=HOUR, HEADWAY_SLOTS="2"),
        spawn(lease=LEASE, clock=-HOUR, HEADWAY_SLOTS="2"),
        spawn.web(clock=HOUR),
    )
    path = tmp_path / "flag"
    jobs = [await submitted(http, path) for _ in range(4)]

    async def held(since: Any) -> bool:
        """Whether two workers have held two jobs each for more than a lease: for the other one they have not died."""
        rows = await engine.database.fetch("SELECT worker, lease_expires_at FROM jobs WHERE state = 'running'")
        return (
            len(rows) == 4
            and len({row["worker"] for row in rows}) == 2
            and all(row["lease_expires_at"] > since for row in rows)
        )

    begun = await engine.database.fetchval("SELECT now()")
    await until(lambda: held(begun + timedelta(seconds=2 * LEASE)))
    assert await engine.database.fetchval("SELECT sum(crashes) FROM jobs") == 0
    # The slow one finds what the fast one held, and nothing is delayed by an hour, or not at all.
    fast.signal(signal.SIGKILL)
    flag()
    delayed = await submitted(http, path, delay=DELAY)
    schedules = Schedules(engine.store, engine.lifecycle)
    schedule = await schedules.create(
        engine.tenant.id,
        name="now",
        cron="* * * * *",
        timezone="UTC",
        catch_up="one",
        job={"kind": "fault.wait", "input": {"path": str(path)}},
    )
    slot = await engine.database.fetchval(
        "UPDATE schedules SET next_at = date_trunc('minute', now()) RETURNING next_at"
    )

    for job in [*jobs, delayed]:
        assert (await engine.ended(job, LEASE + 5)).state == JobState.SUCCEEDED
    assert await engine.database.fetchval("SELECT sum(crashes) FROM jobs") == 2
    row = await engine.row(delayed)
    assert DELAY <= (row["started_at"] - row["created_at"]).total_seconds() < DELAY + 2

    async def fired() -> bool:
        jobs = "SELECT count(*) FROM jobs WHERE idempotency_key LIKE 'schedule %' AND state = 'succeeded'"
        count = await engine.database.fetchval(jobs)
        # A minute that has begun meanwhile has its slot too.
        return 1 <= count <= 1 + (await engine.database.fetchval("SELECT now()") - slot) // SOON

    await until(fired)
    following = (await schedules.get(schedule.id, engine.tenant.id)).next_at
    assert following - await engine.database.fetchval("SELECT now()") <= SOON
    assert await on_time(engine)
    assert slow.process.returncode is None
