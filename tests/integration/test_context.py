"""JobContext: what a handler can say and hold, and what it costs."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from headway import Fatal, JobContext
from headway.embedded import Embedded
from headway.errors import LeaseLost, TooLarge
from headway.job import Claim, Ending
from headway.settings import Source
from headway.states import JobState
from services.worker.context import Context, Parts
from tests.conftest import files_below, make_tenant, until
from tests.engine import Engine, behind_proxy, parts, worker
from tests.engine import engine as make_engine

SOURCE = "postgresql+asyncpg://somewhere/else"


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, max_file=100_000) as engine:
        yield engine


@pytest.fixture
async def claim(engine: Engine) -> Claim:
    return await engine.claim(await engine.submit_kind("test.call", {}))


@dataclass
class Interruptions:
    """An attempt that nothing interrupts but what the context itself learns."""

    reason: str | None = None
    came: list[str] = field(default_factory=list)

    def interrupt(self, reason: str) -> bool:
        self.reason = reason
        self.came.append(reason)
        return True


@pytest.fixture
def interruptions() -> list[str]:
    return []


@pytest.fixture
async def job(engine: Engine, claim: Claim, interruptions: list[str]) -> AsyncIterator[Context]:
    """The context of a job that is running, without a worker around it."""
    settings = engine.settings.model_copy(update={"sources": {"default": Source(url=SecretStr(SOURCE))}})
    context = Context(
        claim, Parts(settings, engine.store, engine.lifecycle, engine.files), Interruptions(came=interruptions)
    )
    yield context
    await context.close()


async def progress(engine: Engine, job: JobContext) -> Mapping[str, Any] | None:
    return (await engine.job(job.id)).progress


# -- report --------------------------------------------------------------------------------------------------------


async def test_the_first_report_is_written_at_once(engine: Engine, job: Context) -> None:
    await job.report(1, 4, "reading", unit="rows", counts={"bad": 1})

    async def written() -> Mapping[str, Any] | None:
        return await progress(engine, job)

    assert await until(written) == {
        **{"done": 1, "total": 4, "unit": "rows", "message": "reading", "counts": {"bad": 1}},
        **{"rate": None, "eta": None},
    }


async def test_very_many_reports_cost_a_handful_of_statements(engine: Engine, job: Context, claim: Claim) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    for done in range(300_000):
        await job.report(done)
        if done % 20 == 0:
            await asyncio.sleep(0)
    newest = await job.close()
    seconds = loop.time() - began

    assert newest is not None
    assert newest["done"] == 299_999
    # Ten a second, and the first at once. Of the job's events two are older: queued, running.
    assert 2 <= (await engine.job(claim.job_id)).seq - 2 <= seconds * 10 + 2


async def test_a_loop_that_only_reports_lets_others_run(job: Context) -> None:
    ran = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, ran.set)
    while not ran.is_set():
        await job.report(1)


async def test_reports_of_many_jobs_share_statements(engine: Engine) -> None:
    ids = [await engine.submit_kind("test.call", {}) for _ in range(100)]
    claims = await engine.lifecycle.claim(ids, ["test.call"], "a worker")
    shared = Parts(engine.settings, engine.store, engine.lifecycle, engine.files)
    contexts = [Context(claim, shared, Interruptions()) for claim in claims]
    # Together, so that however slow the machine is no report is written before all are there.
    await asyncio.gather(*(context.report(1) for context in contexts))

    async def written() -> bool:
        return not await engine.database.fetchval("SELECT count(*) FROM jobs WHERE progress IS NULL")

    await until(written)
    assert await engine.database.fetchval("SELECT count(DISTINCT xmin::text) FROM jobs") <= 5
    await asyncio.gather(*(context.close() for context in contexts))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 10**400, "3", None, 1j])
async def test_a_report_that_is_not_a_number_is_the_handlers_error(job: Context, number: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        await job.report(number)
    if number is not None:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            await job.report(1, number)


@pytest.mark.parametrize("number", [Decimal("1.5"), Fraction(3, 2), 1.5])
async def test_numbers_of_every_kind_are_kept(job: Context, number: Any) -> None:
    await job.report(number, number * 2, counts=MappingProxyType({"rows": 7}))

    shown = await job.close()

    assert shown is not None
    assert json.dumps((shown["done"], shown["total"], shown["counts"])) == '[1.5, 3.0, {"rows": 7}]'


async def test_text_that_postgres_cannot_keep_is_made_fit(engine: Engine, job: Context) -> None:
    await job.report(1, message="NUL \0, half a pair \ud800" + "." * 5000, unit="\0rows", counts={"\0": 1})

    async def written() -> Mapping[str, Any] | None:
        return await progress(engine, job)

    shown = await until(written)
    assert shown["unit"] == "rows"
    assert 1900 < len(shown["message"]) <= 2000


async def test_a_report_brings_the_news_that_the_job_is_to_be_cancelled(
    engine: Engine, job: Context, interruptions: list[str]
) -> None:
    await engine.lifecycle.cancel(job.id, engine.tenant.id)
    await job.report(1)

    await until(lambda: interruptions)
    assert interruptions == ["cancelled"]


async def test_a_report_brings_the_news_that_the_lease_is_lost(
    engine: Engine, job: Context, interruptions: list[str]
) -> None:
    await engine.expire(job.id)
    await engine.lifecycle.rescue(1)
    await job.report(1)

    await until(lambda: interruptions)
    assert interruptions == ["lost"]
    assert await progress(engine, job) is None


async def test_a_report_under_an_outage_is_written_after_it(engine: Engine, claim: Claim) -> None:
    async with (
        behind_proxy(engine.settings) as (proxy, settings),
        parts(settings, engine.tenant, engine.database) as behind,
    ):
        context = Context(claim, Parts(settings, behind.store, behind.lifecycle, behind.files), Interruptions())
        await context.report(1)

        async def written() -> bool:
            return (await progress(engine, context) or {}).get("done") == 1

        await until(written)
        cut = proxy.cut_reply()
        await context.report(2)
        await cut

        async def written_again() -> bool:
            return (await engine.job(claim.job_id)).seq == 5

        await until(written_again)
        assert (await progress(engine, context) or {})["done"] == 2
        await context.close()


async def test_nothing_is_reported_after_the_end(engine: Engine, job: Context) -> None:
    await job.report(1)
    await job.close()
    seq = (await engine.job(job.id)).seq

    with pytest.raises(LeaseLost):
        await job.report(2)

    assert (await engine.job(job.id)).seq == seq


async def test_a_report_that_is_being_written_is_announced_before_the_end(engine: Engine, job: Context) -> None:
    async with engine.heard(job.id) as heard:
        async with engine.database.transaction():
            await engine.database.execute("SELECT 1 FROM jobs WHERE id = $1 FOR UPDATE", job.id)
            await job.report(1)

            async def waits() -> bool:
                return bool(await engine.database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await until(waits)
            closing = asyncio.create_task(job.close())
            assert not (await asyncio.wait({closing}, timeout=0.1))[0]
        await closing
        await until(lambda: heard)

    assert heard[0]["t"] == "progress"


# -- log and checkpoint ----------------------------------------------------------------------------------------------


async def test_a_log_line_is_an_event(engine: Engine, job: Context) -> None:
    await job.log("half way", level="warning")

    event = (await engine.events(job.id))[-1]
    assert event.type == "log"
    assert (event.data["message"], event.data["level"]) == ("half way", "warning")


@pytest.mark.parametrize("value", [None, 0, "", {"rows": [1, 2]}, [None]])
async def test_a_checkpoint_is_handed_to_the_next_attempt(engine: Engine, job: Context, value: Any) -> None:
    await job.save_checkpoint({"older": True})
    await job.save_checkpoint(value)
    assert job.checkpoint == value
    await engine.expire(job.id)
    await engine.lifecycle.rescue(1)

    assert (await engine.claim(job.id)).checkpoint == value


def deep() -> Any:
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]
    return nest


@pytest.mark.parametrize("value", [object(), float("nan"), "\0", deep()], ids=["object", "nan", "nul", "deep"])
async def test_a_checkpoint_that_cannot_be_kept_is_fatal(job: Context, value: Any) -> None:
    with pytest.raises(Fatal, match=r"(not JSON|cannot keep the checkpoint).*put large data into a part"):
        await job.save_checkpoint(value)

    assert job.checkpoint is None


async def test_a_checkpoint_has_a_limit(engine: Engine, job: Context) -> None:
    limit = engine.settings.max_checkpoint
    await job.save_checkpoint(fits := "x" * (limit - 2))
    with pytest.raises(Fatal, match=r"65,537 bytes, over the limit of 65,536\. Keep a checkpoint small"):
        await job.save_checkpoint(fits + "x")

    assert job.checkpoint == fits
    assert (await engine.row(job.id))["checkpoint"] == fits


@pytest.mark.parametrize("why", ["drained", "cancelled", "timed-out"])
async def test_a_handler_knows_why_it_is_interrupted(engine: Engine, why: str) -> None:
    started, seen = asyncio.Event(), list[str | None]()

    async def handler(job: JobContext) -> None:
        seen.append(job.interruption)
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append(job.interruption)
            raise

    async with worker(engine.settings.model_copy(update={"drain": 0.0})):
        job_id = await engine.submit(handler, timeout=0.2 if why == "timed-out" else 30)
        await started.wait()
        if why == "cancelled":
            await engine.lifecycle.cancel(job_id, engine.tenant.id)
        if why != "drained":
            await engine.ended(job_id)

    assert seen == [None, why]


# -- parts -------------------------------------------------------------------------------------------------------------


async def part(job: Context, key: str) -> bytes:
    return b"".join([chunk async for chunk in job.read_part(key)])


def left(engine: Engine) -> list[str]:
    folder = engine.settings.home / "files"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


async def next_attempt(engine: Engine, job: Context) -> Context:
    """The job's next attempt, after this one's worker was killed."""
    await engine.expire(job.id)
    await engine.lifecycle.rescue(1)
    parts = Parts(engine.settings, engine.store, engine.lifecycle, engine.files)
    return Context(await engine.claim(job.id), parts, Interruptions())


@pytest.mark.parametrize("data", [b"", b"lines", bytes(90_000)], ids=len)
async def test_a_part_is_read_by_the_next_attempt(engine: Engine, job: Context, data: bytes) -> None:
    await job.save_checkpoint([await job.save_part(b"first"), await job.save_part(data)])

    following = await next_attempt(engine, job)

    assert [await part(following, key) for key in following.checkpoint] == [b"first", data]


async def test_an_attempt_that_is_over_writes_over_no_part_and_takes_no_checkpoint_back(
    engine: Engine, job: Context
) -> None:
    following = await next_attempt(engine, job)
    await following.save_checkpoint(await following.save_part(b"new"))

    late = await job.save_part(b"old")
    with pytest.raises(LeaseLost):
        await job.save_checkpoint(late)

    assert await part(following, (await next_attempt(engine, following)).checkpoint) == b"new"


async def test_a_part_of_another_job_is_refused(engine: Engine, job: Context) -> None:
    other = await engine.claim(await engine.submit_kind("test.call", {}))
    parts = Parts(engine.settings, engine.store, engine.lifecycle, engine.files)
    key = await Context(other, parts, Interruptions()).save_part(b"secret")

    for wrong in (key, f"parts/{job.id}/1/../../{other.job_id}/1/1", f"artifacts/{job.id}/1/1", "1/1"):
        with pytest.raises(ValueError, match="not a part of this job"):
            await part(job, wrong)


async def test_a_part_past_the_limit_and_one_after_the_end_are_refused(engine: Engine, job: Context) -> None:
    with pytest.raises(TooLarge, match="100,001 bytes are over the limit of 100,000"):
        await job.save_part(bytes(100_001))
    await job.close()
    with pytest.raises(LeaseLost):
        await job.save_part(b"late")

    assert left(engine) == []


async def test_what_killed_attempts_have_left_is_forgotten_but_for_the_artifacts_of_the_job(
    engine: Engine, job: Context
) -> None:
    await job.save_part(b"part")
    async with job.artifact("out.csv") as out:
        await out.write(b"of an attempt that was killed before it could end")
    half = engine.settings.home / "files" / "artifacts" / str(job.id) / "1" / "2#1"
    half.write_bytes(b"the store was writing this")
    following = await next_attempt(engine, job)
    await following.save_part(b"part")
    async with following.artifact("out.csv") as out:
        await out.write(b"good")
    after = f"parts/{job.id}/{following._claim.token + 1}/1"
    await engine.files.save(after, b"of a retry that has begun already")
    await engine.lifecycle.finish(Ending(following._claim, JobState.SUCCEEDED, artifacts=following.artifacts))

    await following.forget_parts()

    [artifact] = await engine.store.artifacts(job.id, engine.tenant.id)
    files = [path for path in left(engine) if (engine.settings.home / "files" / path).is_file()]
    assert sorted(files) == sorted([artifact.key, after])
    await engine.files.delete_job(job.id)
    assert left(engine) == ["artifacts", "parts"]
    await engine.files.delete_job(job.id)


async def test_work_goes_on_from_the_checkpoint_after_an_interruption(engine: Engine) -> None:
    started = asyncio.Event()
    seen: list[tuple[int, Any]] = []

    async def handler(job: JobContext) -> Any:
        seen.append((job.attempt, job.checkpoint))
        if job.checkpoint is None:
            await job.save_checkpoint({"done": 5})
            started.set()
            await asyncio.sleep(60)
        return job.checkpoint

    settings = engine.settings.model_copy(update={"drain": 0.0})
    async with worker(settings):
        job_id = await engine.submit(handler)
        await started.wait()
    assert (await engine.job(job_id)).state == JobState.QUEUED
    async with worker(settings):
        job = await engine.ended(job_id)

    assert (job.state, job.result, job.attempt, job.interruptions) == (JobState.SUCCEEDED, {"done": 5}, 1, 1)
    assert seen == [(1, None), (1, {"done": 5})]


# -- files, artifacts, sources ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 49_999, 50_000, 60_000])
async def test_a_file_is_read_from_where_one_likes(engine: Engine, job: Context, start: int) -> None:
    content = bytes(range(250)) * 200
    opened = await job.open_file((await engine.upload(content)).id)

    assert opened.file.size == 50_000
    assert b"".join([chunk async for chunk in opened.chunks(7000, start=start)]) == content[start:]


async def test_an_empty_file_has_no_bytes(engine: Engine, job: Context) -> None:
    opened = await job.open_file((await engine.upload(b"")).id)

    assert [chunk async for chunk in opened.chunks()] == []


async def test_another_tenants_file_is_as_unknown_as_none(engine: Engine, job: Context) -> None:
    stranger = await make_tenant(engine.database, "stranger")
    file = await engine.upload(b"secret", stranger.id)

    with pytest.raises(Fatal) as theirs:
        await job.open_file(file.id)
    with pytest.raises(Fatal) as none:
        await job.open_file(unknown := uuid7())

    assert str(theirs.value).replace(str(file.id), "") == str(none.value).replace(str(unknown), "")
    assert "POST /api/v1/files" in str(none.value)


async def test_a_source_is_given_by_name_and_an_unknown_one_names_those_there_are(job: Context) -> None:
    assert job.source("default") == SOURCE
    with pytest.raises(Fatal, match=r"'other'; there are: default\."):
        job.source("other")


async def test_a_source_that_is_not_granted_to_the_jobs_tenant_is_as_unknown_as_none(
    engine: Engine, claim: Claim
) -> None:
    stranger = await make_tenant(engine.database, "stranger")
    tenants = {"ours": {engine.tenant.id, stranger.id}, "theirs": {stranger.id}, "nobodys": set[UUID]()}
    sources = {name: Source(url=SecretStr(SOURCE), tenants=frozenset(ids)) for name, ids in tenants.items()}
    settings = engine.settings.model_copy(update={"sources": sources})
    job = Context(claim, Parts(settings, engine.store, engine.lifecycle, engine.files), Interruptions())

    assert job.source("ours") == job.source("ours", reading=True) == SOURCE
    for name in ("theirs", "nobodys", "none"):
        with pytest.raises(Fatal) as refused:
            job.source(name, reading=name == "theirs")
        assert str(refused.value) == f"There is no source {name!r}; there are: ours."


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "\0", "x" * 201, "\ud800"])
async def test_a_name_that_cannot_be_fetched_is_no_artifacts_name(job: Context, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an artifact"):
        async with job.artifact(name):
            pass


async def test_a_content_type_cannot_hold_another_header(job: Context) -> None:
    with pytest.raises(ValueError, match="content type"):
        async with job.artifact("a", "text/plain\r\nSet-Cookie: a=b"):
            pass


async def test_two_artifacts_cannot_have_one_name_even_at_the_same_time(job: Context) -> None:
    async with job.artifact("out.csv") as first:
        await first.write(b"1")
        with pytest.raises(ValueError, match=r"'out\.csv' already"):
            async with job.artifact("out.csv"):
                pass
    with pytest.raises(ValueError, match=r"'out\.csv' already"):
        async with job.artifact("out.csv"):
            pass

    assert [artifact.name for artifact in job.artifacts] == ["out.csv"]


async def test_an_artifact_is_on_disk_before_its_job_can_end(
    engine: Engine, job: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    async with job.artifact("out.csv") as out:
        await out.write(b"kept")

    [artifact] = job.artifacts
    path = engine.settings.home / "files" / artifact.key
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= synced


async def test_an_artifact_that_went_wrong_leaves_nothing_and_its_name_is_free(engine: Engine, job: Context) -> None:
    with pytest.raises(ZeroDivisionError):
        async with job.artifact("out.csv") as out:
            await out.write(b"x" * 50_000)
            raise ZeroDivisionError
    with pytest.raises(TooLarge, match="100,000"):
        async with job.artifact("out.csv") as out:
            for _ in range(30):
                await out.write(b"x" * 50_000)
    async with job.artifact("out.csv") as out:
        await out.write(b"good")

    [artifact] = job.artifacts
    kept = files_below(engine.settings.home / "files")
    assert [path.read_bytes() for path in kept] == [b"good"]
    assert artifact.size == 4
