"""Concurrency keys and paused kinds: what may not run now stands aside, and delays nobody."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from headway import JobContext
from headway.embedded import Embedded
from headway.job import Ending, Priority
from headway.states import JobState
from tests.conftest import make_tenant, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine

KIND = "test.call"


@pytest_asyncio.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


async def submit(engine: Engine, key: str | None, *, limit: int = 1, **more: Any) -> UUID:
    return await engine.submit_kind(KIND, {}, concurrency_key=key, concurrency_limit=limit, **more)


async def standing(engine: Engine) -> list[UUID]:
    """The jobs that a worker would find, once nothing is to be unparked any more."""
    await engine.lifecycle.close()
    return await engine.store.ready([KIND], 100, "a worker of the test")


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_jobs_of_a_key_run_than_its_limit_however_many_workers_claim(engine: Engine, limit: int) -> None:
    ids = [await submit(engine, "mail", limit=limit) for _ in range(12)]
    # As if a worker had read them all before any was claimed.
    await engine.database.execute("UPDATE jobs SET parked = false")

    taken = await asyncio.gather(*(engine.lifecycle.claim(ids, [KIND], f"worker {n}") for n in range(8)))
    # Who met another at the key has passed its jobs over, until the next look.
    taken.append(await engine.lifecycle.claim(ids, [KIND], "the last"))

    assert sum(len(claims) for claims in taken) == limit
    places = await engine.database.fetch("SELECT concurrency_place FROM jobs WHERE state = 'running'")
    assert sorted(row[0] for row in places) == list(range(1, limit + 1))


async def test_workers_that_claim_many_keys_at_once_do_not_wait_for_each_other(engine: Engine) -> None:
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    before = await engine.database.fetchval(deadlocks)
    order = random.Random(1)
    for turn in range(4):
        keys = [f"{turn} {number}" for number in range(50)] * 2
        order.shuffle(keys)
        ids = [await submit(engine, key, limit=2) for key in keys]
        await engine.lifecycle.close()

        # Each half has its keys in another order.
        halves = ids[::2], ids[1::2]
        claimed = await asyncio.gather(*(engine.lifecycle.claim(half, [KIND], f"worker {half[0]}") for half in halves))

        assert 50 <= sum(map(len, claimed)) <= 100
        await engine.database.execute("UPDATE jobs SET state = 'succeeded', finished_at = now()")
    await engine.database.execute("SELECT pg_stat_force_next_flush()")
    assert await engine.database.fetchval(deadlocks) == before


async def test_a_backlog_of_a_key_stands_aside_and_comes_in_order(engine: Engine) -> None:
    ids = [await submit(engine, "mail") for _ in range(5)]
    other = await submit(engine, None)
    for job_id in ids:
        assert set(await standing(engine)) == {job_id, other}
        claim = await engine.claim(job_id)
        assert await standing(engine) == [other]
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))


@pytest.mark.parametrize("how", ["cancelled", "released and cancelled", "crashed", "failed", "retried"])
async def test_whatever_ends_a_job_lets_the_next_of_its_key_run(engine: Engine, how: str) -> None:
    first = await submit(engine, "mail", max_attempts=2 if how == "retried" else 1)
    second = await submit(engine, "mail")
    assert await standing(engine) == [first]
    claim = await engine.claim(first)
    assert await standing(engine) == []
    if how == "cancelled":
        await engine.lifecycle.cancel(first, engine.tenant.id)
        await engine.lifecycle.release(claim)
    elif how == "released and cancelled":
        await engine.lifecycle.release(claim)
        await engine.lifecycle.cancel(first, engine.tenant.id)
    elif how == "crashed":
        await engine.database.execute("UPDATE jobs SET crashes = 2 WHERE id = $1", first)
        await engine.expire(first)
        await engine.lifecycle.rescue(10)
    else:
        state = JobState.SCHEDULED if how == "retried" else JobState.FAILED
        await engine.lifecycle.finish(Ending(claim, state, error={"type": "fatal"}, delay=60))
    assert await standing(engine) == [second]


async def test_a_job_that_has_no_place_after_all_is_the_next_of_its_key(engine: Engine) -> None:
    first, second, third = [await submit(engine, "mail") for _ in range(3)]
    await submit(engine, "another")
    await standing(engine)
    claim = await engine.claim(first)
    # As if it had been let in, and the place were taken by the one that came back.
    await engine.database.execute("UPDATE jobs SET parked = false, position = 1000 WHERE id = $1", second)
    assert await engine.lifecycle.claim([second], [KIND], "a worker") == []
    await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    let_in = set(await standing(engine))
    assert second in let_in
    assert third not in let_in


async def test_keys_of_two_tenants_and_two_names_are_apart(engine: Engine) -> None:
    other = await make_tenant(engine.database, "other")
    a, b = await submit(engine, "mail"), await submit(engine, "print")
    c = await submit(engine, "mail", tenant_id=other.id)
    assert set(await standing(engine)) == {a, b, c}
    assert len(await engine.lifecycle.claim([a, b, c], [KIND], "a worker")) == 3


async def test_a_job_with_a_lower_limit_waits_until_as_few_run(engine: Engine) -> None:
    alone = await submit(engine, "mail")
    assert await standing(engine) == [alone]
    pair = [await submit(engine, "mail", limit=2, priority=Priority.HIGH) for _ in range(2)]
    await standing(engine)
    first, second = [await engine.claim(job_id) for job_id in pair]
    await engine.lifecycle.finish(Ending(first, JobState.SUCCEEDED))

    assert await engine.lifecycle.claim([alone], [KIND], "a worker") == []
    await engine.lifecycle.finish(Ending(second, JobState.SUCCEEDED))
    assert await standing(engine) == [alone]
    assert len(await engine.lifecycle.claim([alone], [KIND], "a worker")) == 1


async def test_a_place_freed_in_an_outage_is_found_by_the_scan(engine: Engine) -> None:
    first, second = await submit(engine, "mail"), await submit(engine, "mail")
    await standing(engine)
    await engine.claim(first)
    # As if the process had died between the end of the first and the look at the second.
    await engine.database.execute("UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = $1", first)
    assert await standing(engine) == []
    await engine.lifecycle.unpark()
    assert await standing(engine) == [second]


async def test_the_scan_comes_to_every_key_though_it_looks_at_a_few_at_a_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headway.lifecycle.MOST_KEYS", 2)
    ids = [await submit(engine, f"key {number}") for number in range(5)]
    await standing(engine)
    for _ in range(2):
        await engine.database.execute("UPDATE jobs SET parked = true")
        for _ in range(3):
            await engine.lifecycle.unpark()
        assert set(await standing(engine)) == set(ids)


async def test_workers_run_keyed_jobs_one_at_a_time_to_the_last(engine: Engine) -> None:
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    done = []

    async def handler(job: JobContext) -> None:
        key = (await engine.job(job.id)).concurrency_key or ""
        running[key] += 1
        most[key] = max(most[key], running[key])
        await asyncio.sleep(0)
        running[key] -= 1
        done.append(job.id)

    async with worker(engine.settings), worker(engine.settings):
        ids = [
            await engine.submit(handler, concurrency_key=f"key {n % 3}", concurrency_limit=1 + n % 3) for n in range(30)
        ]
        await until(lambda: len(done) == 30)
    assert sorted(done) == sorted(ids)
    assert all(most[f"key {n}"] <= n + 1 for n in range(3)), most


IDLE = {
    "paused": "UPDATE kinds SET paused_at = now() WHERE name = $1",
    "run by no worker any more": "UPDATE kinds SET announced_at = now() - interval '10 minutes' WHERE name = $1",
}


async def announce(engine: Engine, *names: str) -> None:
    more = {"description": "", "timeout": 1, "max_attempts": 1, "input_schema": {}, "result_schema": {}}
    await engine.store.announce_kinds([{"name": name, **more} for name in names])


@pytest.mark.parametrize("idle", IDLE)
async def test_a_kind_that_is_idle_does_not_hold_up_others_of_its_key(engine: Engine, idle: str) -> None:
    await announce(engine, KIND, "kind.that_is_idle")
    await engine.database.execute(IDLE[idle], "kind.that_is_idle")
    await engine.submit_kind("kind.that_is_idle", {}, concurrency_key="mail")
    other = await submit(engine, "mail")
    assert await standing(engine) == [other]


async def test_kinds_stay_announced_while_workers_run_them(engine: Engine) -> None:
    await announce(engine, KIND, "kind.that_is_idle")
    await engine.database.execute("UPDATE kinds SET announced_at = now() - interval '2 minutes'")

    await engine.store.tend_kinds([KIND])

    late = await engine.database.fetch("SELECT name FROM kinds WHERE announced_at < now() - interval '1 minute'")
    assert [row["name"] for row in late] == ["kind.that_is_idle"]


async def test_a_paused_kind_starts_nothing_and_delays_nobody_until_it_is_resumed(engine: Engine) -> None:
    job_id = await submit(engine, None)
    await announce(engine, KIND)
    await engine.database.execute("UPDATE kinds SET paused_at = now() WHERE name = $1", KIND)
    assert await standing(engine) == []
    assert await engine.lifecycle.claim([job_id], [KIND], "a worker") == []
    # A worker that starts announces its kinds; that does not resume them.
    await announce(engine, KIND)
    assert await standing(engine) == []
    await engine.database.execute("UPDATE kinds SET paused_at = NULL WHERE name = $1", KIND)
    assert await standing(engine) == [job_id]


@pytest.mark.parametrize("idle", [None, *IDLE])
async def test_a_job_of_an_idle_kind_lets_no_tenant_starve(engine: Engine, idle: str | None) -> None:
    await announce(engine, KIND, "kind.that_is_idle")
    if idle is not None:
        await engine.database.execute(IDLE[idle], "kind.that_is_idle")
        await engine.submit_kind("kind.that_is_idle", {})
    waiting, coming = await make_tenant(engine.database, "waits"), await make_tenant(engine.database, "comes again")

    async def run_next() -> UUID:
        claim = await engine.claim((await engine.store.ready([KIND], 1, "a worker of the test"))[0])
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))
        return claim.tenant_id

    for _ in range(60):
        await submit(engine, None, tenant_id=waiting.id)
    for _ in range(20):
        await run_next()
    begun: Counter[UUID] = Counter()
    for _ in range(40):
        # Some more as soon as the last of them has begun.
        if begun[coming.id] % 5 == 0:
            for _ in range(5):
                await submit(engine, None, tenant_id=coming.id)
        begun[await run_next()] += 1

    assert begun[waiting.id] >= 15


async def test_what_stands_aside_for_a_key_puts_off_nothing_else_of_its_tenant(engine: Engine) -> None:
    await announce(engine, KIND)
    other = await make_tenant(engine.database, "comes all the time")
    keyed = [await submit(engine, "mail") for _ in range(50)]
    unkeyed = await submit(engine, None)
    turns = []
    for _ in range(12):
        # There is always something new of the other tenant.
        for _ in range(2):
            await submit(engine, None, tenant_id=other.id)
        turns.append((await standing(engine))[0])
        await engine.lifecycle.finish(Ending(await engine.claim(turns[-1]), JobState.SUCCEEDED))

    mine = [job_id for job_id in turns if job_id == unkeyed or job_id in keyed]
    assert unkeyed in mine[:3]
    # The tenant has its half of the turns, and its key's jobs come in order.
    assert 5 <= len(mine) <= 7
    assert [job_id for job_id in mine if job_id != unkeyed] == keyed[: len(mine) - 1]
