"""Groups: a parent submits children, waits for them without a slot, and gets their results."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio

from headway import Child, ChildEnding, Fatal, JobContext, kind, kinds
from headway.embedded import Embedded
from headway.errors import LeaseLost
from headway.groups import MOST_CHILDREN, MOST_DEPTH, Groups
from headway.job import Ending, Job
from headway.states import JobState
from tests.conftest import until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine

runs: list[UUID] = []


@kind("groups.square", max_attempts=1)
async def square(job: JobContext, input: int) -> int:
    """Negative numbers fail."""
    runs.append(job.id)
    if input < 0:
        raise ValueError("a negative number")
    return input * input


@kind("groups.hold")
async def hold(job: JobContext, input: int) -> None:
    await asyncio.Event().wait()


@kind("groups.deep", max_attempts=1)
async def deep(job: JobContext, input: None) -> int:
    """Submits itself."""
    [ending] = await job.children([Child("groups.deep", None)])
    return 0 if ending.state == JobState.FAILED else ending.result + 1


@pytest_asyncio.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    runs.clear()
    async with make_engine(servers, tmp_path, slots=2) as engine:
        yield engine


async def children(engine: Engine, parent: UUID) -> list[Job]:
    return await engine.store.list_jobs(
        engine.tenant.id, before=None, state=None, kind=None, tag=None, parent=parent, limit=500
    )


async def test_an_attempt_that_is_over_submits_no_children(engine: Engine) -> None:
    await engine.store.announce_kinds([kinds.discover()["groups.square"].as_json()])
    parent = await engine.submit_kind("groups.square", 1)
    old = await engine.claim(parent, "groups.square")
    await engine.expire(parent)
    await engine.lifecycle.rescue(1)
    await engine.lifecycle.finish(Ending(await engine.claim(parent, "groups.square"), JobState.SUCCEEDED, result=1))

    with pytest.raises(LeaseLost):
        await Groups(engine.store, engine.lifecycle).endings(old, [Child("groups.square", 2)] * 3, 0)
    assert await children(engine, parent) == []


async def waits(engine: Engine, parent: UUID) -> None:
    async def waiting() -> bool:
        row = await engine.row(parent)
        return row["state"] == "scheduled" and row["run_at"] is None

    await until(waiting)


async def test_a_parent_gets_the_results_of_its_children_in_order(engine: Engine) -> None:
    starts = []

    async def parent(job: JobContext) -> Any:
        starts.append(job.attempt)
        first = await job.children(Child("groups.square", n, tags=["part"]) for n in (3, -1, 4))
        second = await job.children([Child("groups.square", sum(child.result or 0 for child in first))])
        return [[child.state, child.result] for child in (*first, *second)]

    # One slot would be taken for ever by a parent that kept it.
    async with worker(engine.settings.model_copy(update={"slots": 1})):
        job_id = await engine.submit(parent)
        job = await engine.ended(job_id)
    assert job.result == [["succeeded", 9], ["failed", None], ["succeeded", 16], ["succeeded", 625]]
    # To wait is no failure, and the attempt that goes on is the same.
    assert (starts, job.attempt, job.interruptions, job.crashes) == ([1, 1, 1], 1, 0, 0)
    assert len(runs) == len(set(runs)) == 4
    assert {child.parent_id for child in await children(engine, job_id)} == {job_id}


async def test_the_progress_of_the_children_is_the_parents(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def parent(job: JobContext) -> int:
        return len(await job.children(Child("groups.hold", n) for n in range(3)))

    # All parents are looked at, also where there are more than are looked at in one go.
    monkeypatch.setattr("headway.groups.TALLIED_AT_ONCE", 1)
    async with worker(engine.settings.model_copy(update={"slots": 8})):
        await waits(engine, await engine.submit(parent))
        job_id = await engine.submit(parent)
        await waits(engine, job_id)
        first, second, _ = await children(engine, job_id)
        await engine.lifecycle.cancel(first.id, engine.tenant.id)
        await engine.lifecycle.cancel(second.id, engine.tenant.id)

        async def shown() -> bool:
            progress = (await engine.job(job_id)).progress
            return progress is not None and (progress["done"], progress["total"], progress["unit"]) == (2, 3, "jobs")

        await until(shown)


async def test_cancelling_the_parent_cancels_the_rest(engine: Engine) -> None:
    async def parent(job: JobContext) -> None:
        await job.children([*(Child("groups.square", n) for n in range(3)), *[Child("groups.hold", 1)] * 4])

    async with worker(engine.settings):
        job_id = await engine.submit(parent)
        await waits(engine, job_id)

        async def two_left() -> bool:
            return len(runs) == 3 and sum(not child.state.terminal for child in await children(engine, job_id)) == 4

        await until(two_left)
        await engine.lifecycle.cancel(job_id, engine.tenant.id)

        async def none_left() -> bool:
            return all(child.state.terminal for child in await children(engine, job_id))

        await until(none_left)
        states = sorted(child.state for child in await children(engine, job_id))
    assert states == ["cancelled"] * 4 + ["succeeded"] * 3
    assert await engine.state(job_id) == "cancelled"


async def test_a_parent_whose_worker_died_finds_the_children_it_submitted(engine: Engine) -> None:
    async def parent(job: JobContext) -> list[ChildEnding]:
        return [child.result for child in await job.children(Child("groups.square", n) for n in range(700))]

    job_id = await engine.submit(parent)
    claim = await engine.claim(job_id)
    await engine.store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
    groups = Groups(engine.store, engine.lifecycle)
    # The first attempt submitted some of them and died.
    assert await groups.endings(claim, [Child("groups.square", n) for n in range(600)], 0) is None
    await engine.expire(job_id)
    await engine.lifecycle.rescue(10)
    async with worker(engine.settings.model_copy(update={"slots": 100})):
        job = await engine.ended(job_id, within=30)
    assert job.result == [n * n for n in range(700)]
    assert len(runs) == len(set(runs)) == 700


async def test_a_kind_that_submits_itself_comes_to_an_end(engine: Engine) -> None:
    async with worker(engine.settings):
        job_id = await engine.submit_kind("groups.deep", None)
        job = await engine.ended(job_id, within=20)
    assert job.result == MOST_DEPTH - 1


async def test_children_that_cannot_be_are_refused(engine: Engine) -> None:
    async def too_many(job: JobContext) -> None:
        await job.children([Child("groups.square", 1)] * (MOST_CHILDREN + 1))

    async def unknown(job: JobContext) -> None:
        await job.children([Child("no.kind", 1)])

    async with worker(engine.settings):
        many, strange = (
            await engine.ended(await engine.submit(too_many)),
            await engine.ended(await engine.submit(unknown)),
        )
    assert many.error and many.error["message"].startswith("A job may have 10,000 children, not 10,001")
    assert strange.error and strange.error["message"].startswith("There is no kind 'no.kind' for a child")
    assert await children(engine, many.id) == await children(engine, strange.id) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"concurrency_key": "a", "concurrency_limit": 0}, "concurrency_limit is a number from 1 to 100"),
        ({"concurrency_key": ""}, "concurrency_key has 1 to 200 characters"),
        ({"timeout": 0}, "timeout is a time above 0"),
        ({"max_attempts": 0}, "max_attempts is a number from 1 to 100"),
        ({"tags": ["x" * 101]}, "tags are at most 20"),
    ],
)
def test_a_child_that_could_never_run_is_refused_where_it_is_made(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(Fatal, match=said):
        Child("groups.square", 1, **asked)
