"""A release before concurrency keys and groups, and this one, side by side on one migrated database."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from uuid_utils.compat import uuid7

from headway import JobContext
from headway.errors import LeaseLost
from headway.job import Ending
from headway.lifecycle import LEASE, MOST_CRASHES
from headway.states import JobState
from headway.store import prepare
from tests.engine import Engine, worker
from tests.faults import statements_before_groups as sql

JOBS = 40
KINDS = ["test.call"]
QUEUED = "SELECT id FROM jobs WHERE state = 'queued' ORDER BY position, id LIMIT 2"
CRASHED = {"type": "crashed", "message": "The worker died too often."}

Row = dict[str, Any]


class Old:
    """What web and workers of the old release do: their statements, as they sent them."""

    def __init__(self, engine: Engine, connection: asyncpg.Connection) -> None:
        self._tenant = str(engine.tenant.id)
        self._connection = connection

    async def submit(self, input: Any, *tags: str) -> UUID:
        job = {"id": str(uuid7()), "tenant_id": self._tenant, "kind": KINDS[0], "input": input, "tags": tags}
        [row] = await self._connection.fetch(
            sql.SUBMIT, [{**job, "priority": 1, "timeout": 30, "max_attempts": 2, "run_at": None, "delay": None}]
        )
        return UUID(str(row["id"]))

    async def claim(self, *ids: UUID, lease: timedelta = LEASE) -> list[Row]:
        return [dict(row) for row in await self._connection.fetch(sql.CLAIM, ids, KINDS, "old", lease)]

    async def renew(self, claim: Row) -> bool:
        return bool(await self._connection.fetch(sql.RENEW, [claim["id"]], [claim["token"]], LEASE))

    async def finish(self, claim: Row, state: str = "succeeded", **more: Any) -> bool:
        ending = {"id": str(claim["id"]), "token": claim["token"], "state": state, "result": "old", "artifacts": []}
        return bool(await self._connection.fetch(sql.FINISH, [ending | more]))

    async def rescue(self) -> int:
        return len(await self._connection.fetch(sql.RESCUE, MOST_CRASHES, CRASHED, 100))

    async def work(self) -> None:
        """Every first attempt fails, so that jobs go back and forth."""
        while True:
            await self._connection.fetch(sql.PROMOTE, 100)
            ids = [row["id"] for row in await self._connection.fetch(QUEUED)]
            for claim in await self.claim(*ids):
                await asyncio.sleep(0.005)
                first = claim["attempt"] == 1
                again: Row = {"state": "scheduled", "delay": 0.01, "failure": {}} if first else {}
                assert await self.finish(claim, **again)


@pytest.fixture
async def old(engine: Engine) -> Any:
    connection = await asyncpg.connect(engine.settings.database_url.get_secret_value())
    await prepare(connection)
    yield Old(engine, connection)
    await connection.close()


async def test_a_job_of_the_old_release_is_found_by_its_tags(engine: Engine, old: Old) -> None:
    job_id = await old.submit({}, "nightly", "eu", "nightly")
    await old.submit({})
    for tag, found in (("nightly", [job_id]), ("eu", [job_id]), ("night", []), ("", [])):
        jobs = await engine.store.list_jobs(engine.tenant.id, before=None, state=None, kind=None, tag=tag, limit=10)
        assert [job.id for job in jobs] == found


async def test_jobs_of_both_releases_are_run_by_both_and_once(engine: Engine, old: Old) -> None:
    runs: list[tuple[UUID, int]] = []

    async def handler(job: JobContext) -> str:
        runs.append((job.id, job.attempt))
        await asyncio.sleep(0.005)
        return "new"

    first = await engine.submit(handler, max_attempts=2)
    call = (await engine.job(first)).input
    jobs = [first]
    for _ in range(JOBS // 2):
        jobs += [await engine.submit_kind(KINDS[0], call, max_attempts=2), await old.submit(call)]
    async with worker(engine.settings.model_copy(update={"slots": 2})):
        working = asyncio.create_task(old.work())
        ended = await asyncio.gather(*map(engine.ended, jobs))
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)

    assert {job.state for job in ended} == {JobState.SUCCEEDED}
    assert {job.result for job in ended} == {"old", "new"}
    assert len(runs) == len(set(runs))
    assert {job.id for job in ended if job.result == "new"} == {job_id for job_id, _ in runs}
    for job in ended:
        events = await engine.events(job.id)
        assert [event.seq for event in events] == list(range(1, job.seq + 1))
        assert sum(event.data["state"] == "running" for event in events) == job.attempt
        assert (await engine.row(job.id))["crashes"] == 0


async def test_neither_writes_what_the_other_has_taken_over(engine: Engine, old: Old) -> None:
    job_id = await old.submit({"handler": "none"})
    [lost] = await old.claim(job_id)
    assert await old.renew(lost)
    await engine.expire(job_id)
    assert not await old.renew(lost)
    assert await engine.lifecycle.rescue(100) == 1
    taken = await engine.claim(job_id)
    assert not await old.finish(lost)
    await engine.expire(job_id)
    assert await old.rescue() == 1
    [again] = await old.claim(job_id)
    with pytest.raises(LeaseLost):
        await engine.lifecycle.finish(Ending(taken, JobState.SUCCEEDED, result="new"))
    assert await old.finish(again)
    job = await engine.job(job_id)
    assert (job.state, job.result, job.attempt) == (JobState.SUCCEEDED, "old", 1)
    assert (await engine.row(job_id))["crashes"] == 2
