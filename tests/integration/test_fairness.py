"""Whose turn it is: nobody who waits is passed over again and again, whatever others submit, park or pause."""

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from headway.embedded import Embedded
from headway.job import Claim, Ending, Priority
from headway.states import JobState
from headway.submission import NewJob
from tests.conftest import make_tenant
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.integration.test_concurrency import IDLE, KIND, announce, standing

OTHER = "kind.that_is_idle"
GONE = "run by no worker any more"


@pytest_asyncio.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        await announce(engine, KIND, OTHER)
        yield engine


async def tenant(engine: Engine) -> UUID:
    return (await make_tenant(engine.database, uuid4().hex)).id


async def submit(engine: Engine, count: int, **more: Any) -> list[UUID]:
    """So many jobs at once, of the engine's tenant and of KIND if nothing else is said."""
    asked = {"tenant_id": engine.tenant.id, "kind": KIND, "input": {}, "tags": (), "priority": Priority.NORMAL, **more}
    jobs, _ = await engine.lifecycle.submit_batch([NewJob(timeout=30, max_attempts=1, **asked) for _ in range(count)])
    await engine.lifecycle.close()
    return [job.id for job in jobs]


async def begin(engine: Engine, kind: str = KIND) -> Claim:
    """The job whose turn it is."""
    await engine.lifecycle.close()
    [job_id] = await engine.store.ready([kind], 1, "a worker of the test")
    return await engine.claim(job_id, kind)


async def run(engine: Engine, count: int, kind: str = KIND) -> Counter[UUID]:
    """Run so many jobs one after the other; of which tenants they were."""
    begun: Counter[UUID] = Counter()
    for _ in range(count):
        claim = await begin(engine, kind)
        begun[claim.tenant_id] += 1
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))
    await engine.lifecycle.close()
    return begun


@pytest.mark.parametrize("idle", IDLE)
async def test_a_backlog_of_an_idle_kind_does_not_put_off_what_else_its_tenant_submits(
    engine: Engine, idle: str
) -> None:
    await engine.database.execute(IDLE[idle], OTHER)
    await submit(engine, 50, tenant_id=await tenant(engine))
    await submit(engine, 50, kind=OTHER)
    await submit(engine, 1)

    assert (await run(engine, 4))[engine.tenant.id] == 1


async def test_a_kind_that_comes_back_has_its_turn_when_all_else_was_done_meanwhile(engine: Engine) -> None:
    other = await tenant(engine)
    await submit(engine, 100, tenant_id=other)
    await run(engine, 99)
    await submit(engine, 3, kind=OTHER)
    await engine.database.execute(IDLE[GONE], OTHER)
    await run(engine, 1)
    await submit(engine, 50, kind=OTHER, tenant_id=other)

    await announce(engine, OTHER)

    assert (await run(engine, 8, OTHER))[engine.tenant.id] == 3


async def test_a_kind_that_comes_back_goes_before_nobody(engine: Engine) -> None:
    waits, comes = await tenant(engine), await tenant(engine)
    await engine.database.execute(IDLE[GONE], OTHER)
    for _ in range(40):
        await submit(engine, 1, kind=OTHER)
    await submit(engine, 200, tenant_id=waits)
    await run(engine, 100)
    await engine.store.tend_kinds([KIND])

    await announce(engine, OTHER)
    await submit(engine, 50, tenant_id=comes)

    begun: Counter[UUID] = Counter()
    for _ in range(40):
        [job_id] = await engine.store.ready([KIND, OTHER], 1, "a worker of the test")
        [claim] = await engine.lifecycle.claim([job_id], [KIND, OTHER], "a worker of the test")
        begun[claim.tenant_id] += 1
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))
    assert min(begun[who] for who in (engine.tenant.id, waits, comes)) >= 10


async def test_what_was_parked_for_long_does_not_take_every_turn_once_it_is_let_in(engine: Engine) -> None:
    waits, comes = await tenant(engine), await tenant(engine)
    keyed = await submit(engine, 50, concurrency_key="slow")
    slow = await begin(engine)
    assert slow.job_id == keyed[0]
    await submit(engine, 300, tenant_id=waits)
    await run(engine, 150)
    await engine.lifecycle.finish(Ending(slow, JobState.SUCCEEDED))

    begun = await run(engine, 2)
    await submit(engine, 50, tenant_id=comes)
    begun += await run(engine, 40)

    assert min(begun[who] for who in (engine.tenant.id, waits, comes)) >= 10


async def test_the_next_of_a_key_does_not_wait_for_all_else_of_its_tenant(engine: Engine) -> None:
    keyed = await submit(engine, 3, concurrency_key="mail")
    await submit(engine, 100)
    order = []
    for _ in range(8):
        claim = await begin(engine)
        order.append(claim.job_id)
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    assert [job_id for job_id in order if job_id in keyed] == keyed


async def test_a_tenant_with_keys_and_without_has_two_turns_at_most(engine: Engine) -> None:
    other = await tenant(engine)
    for number in range(30):
        await submit(engine, 2, concurrency_key=f"key {number}")
    await submit(engine, 60)
    await submit(engine, 60, tenant_id=other)

    assert (await run(engine, 60))[other] >= 19


@pytest.mark.parametrize("backlog", [0, 50])
async def test_priorities_hold_within_a_key_whatever_waits_for_another(engine: Engine, backlog: int) -> None:
    if backlog:
        await submit(engine, backlog, concurrency_key="another", priority=Priority.HIGH)
    [first] = await submit(engine, 1, concurrency_key="mail")
    claim = await engine.claim(first)
    normal = await submit(engine, 10, concurrency_key="mail")
    [high] = await submit(engine, 1, concurrency_key="mail", priority=Priority.HIGH)

    await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    let_in = set(await standing(engine))
    assert high in let_in
    assert not let_in & set(normal)


async def test_low_jobs_of_a_key_are_not_left_waiting_for_ever(engine: Engine) -> None:
    low = await submit(engine, 2, concurrency_key="mail", priority=Priority.LOW)
    ended: list[UUID] = []
    while low[1] not in ended:
        # There is always a high one.
        await submit(engine, 1, concurrency_key="mail", priority=Priority.HIGH)
        claim = await begin(engine)
        ended.append(claim.job_id)
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))
        assert len(ended) < 40


async def test_jobs_for_later_put_off_none_of_now(engine: Engine) -> None:
    await submit(engine, 50, tenant_id=await tenant(engine))
    asked = NewJob(engine.tenant.id, KIND, {}, (), Priority.NORMAL, 30, 1)
    later = NewJob(engine.tenant.id, KIND, {}, (), Priority.NORMAL, 30, 1, delay=3600)
    await engine.lifecycle.submit_batch([*[later] * 50, asked])

    assert (await run(engine, 4))[engine.tenant.id] == 1


@pytest.mark.parametrize("comes", [Priority.HIGH, Priority.NORMAL])
async def test_who_always_has_one_job_does_not_keep_lower_ones_waiting(engine: Engine, comes: Priority) -> None:
    other = await tenant(engine)
    await submit(engine, 5, priority=Priority(comes + 1))
    await submit(engine, 1, tenant_id=other, priority=comes)
    begun: Counter[UUID] = Counter()
    for _ in range(60):
        claim = await begin(engine)
        begun[claim.tenant_id] += 1
        if claim.tenant_id == other:
            # The next one comes while this one runs.
            await submit(engine, 1, tenant_id=other, priority=comes)
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    assert begun[engine.tenant.id] >= 3


async def test_what_came_while_its_kind_was_idle_is_in_the_queue_when_it_comes_back(engine: Engine) -> None:
    await engine.database.execute(IDLE[GONE], OTHER)
    for number in range(20):
        await submit(engine, 2, kind=OTHER, concurrency_key=f"key {number}")

    await announce(engine, OTHER)

    assert len(await engine.store.ready([OTHER], 100, "a worker of the test")) == 20
