"""Plain functions and generators as handlers: what reaches the job, how they end, and how a cancel is felt."""

import asyncio
import inspect
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import SecretStr

from headway import JobContext, SyncJobContext, kinds
from headway.embedded import Embedded
from headway.job import Job
from headway.settings import Source
from headway.states import JobState
from services.worker import process, runner
from services.worker.app import App
from services.worker.context import Context, Parts
from services.worker.performing import perform
from tests.conftest import until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.integration import plain_handlers

SOURCE = "postgresql+asyncpg://user:password@somewhere/else"


@pytest.fixture
async def idle(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    changed = {"sources": {"default": Source(url=SecretStr(SOURCE))}, "slots": 2, "drain": 0.0}
    async with make_engine(servers, tmp_path, **changed) as engine:
        yield engine


@pytest.fixture
async def app(idle: Engine) -> AsyncIterator[App]:
    async with worker(idle.settings) as app:
        yield app


@pytest.fixture
def engine(idle: Engine, app: App) -> Engine:
    """An engine with a worker of two slots."""
    return idle


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    plain_handlers.started.clear()
    plain_handlers.release.clear()
    yield
    plain_handlers.release.set()


async def ended(engine: Engine, kind: str, input: Any, **more: Any) -> Job:
    return await engine.ended(await engine.submit_kind(kind, input, **more), within=30)


async def checkpoint(engine: Engine, job_id: UUID) -> Any:
    return (await engine.row(job_id))["checkpoint"]


# -- plain functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain.thread", "plain.process"])
async def test_a_plain_function_does_all_that_an_async_one_does(engine: Engine, kind: str) -> None:
    content = os.urandom(1_000_000)
    file = await engine.upload(content)

    job = await ended(engine, kind, str(file.id), max_attempts=2)

    assert job.state == JobState.SUCCEEDED, job.error
    assert job.progress is not None
    assert (job.progress["done"], job.progress["total"], job.progress["unit"]) == (1_000_000, 1_000_000, "bytes")
    assert (job.progress["message"], job.progress["counts"]) == ("copying", {"chunks": 1000})
    place = job.result.pop("place")
    assert place.startswith("thread of")
    assert (place == f"thread of {os.getpid()}") == (kind == "plain.thread")
    [key] = job.result.pop("checkpoint")
    assert key.startswith(f"parts/{job.id}/")
    assert job.result == {"size": 1_000_000, "part": "first ", "source": SOURCE}
    [artifact] = await engine.store.artifacts(job.id, engine.tenant.id)
    assert b"".join([chunk async for chunk in engine.files.read(artifact.key)]) == content
    logged = [event.data["message"] for event in await engine.events(job.id) if event.type == "log"]
    assert logged == ["copied 1000000 bytes"]


def test_a_plain_function_has_every_method_of_the_async_context_with_the_same_parameters() -> None:
    def methods(context: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(context, inspect.isfunction)
            if not name.startswith("_") and name not in ("interrupt", "flush")
        }

    assert methods(SyncJobContext) == methods(JobContext)


@pytest.mark.parametrize("way", ["report", "ask"])
async def test_a_cancel_of_a_thread_is_felt_at_a_report_or_when_it_asks(engine: Engine, way: str) -> None:
    job_id = await engine.submit_kind("plain.until", way)
    await until(plain_handlers.started.is_set)
    await engine.lifecycle.cancel(job_id, engine.tenant.id)

    job = await engine.ended(job_id, within=30)

    # One that returns a result has finished: the cancel came too late.
    expected = (JobState.CANCELLED, None) if way == "report" else (JobState.SUCCEEDED, "stopped by itself")
    assert (job.state, job.result) == expected
    assert await checkpoint(engine, job_id) == "cancelled"


async def test_a_thread_that_waits_for_children_is_cancelled_with_them(engine: Engine) -> None:
    job_id = await engine.submit_kind("plain.until", "wait")

    async def waits() -> bool:
        row = await engine.row(job_id)
        return bool(row["state"] == "scheduled" and row["run_at"] is None)

    await until(waits)
    await engine.lifecycle.cancel(job_id, engine.tenant.id)
    assert (await engine.ended(job_id, within=30)).state == JobState.CANCELLED


async def test_a_thread_has_a_timeout(engine: Engine) -> None:
    job = await ended(engine, "plain.until", "report", timeout=0.2)

    assert job.error == {"type": "timed-out", "message": "The attempt ran longer than its timeout, 0.2 s."}
    assert await checkpoint(engine, job.id) == "timed-out"


async def test_a_thread_that_does_not_end_keeps_its_slot_until_it_does(
    engine: Engine, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.1)
    deaf = [await ended(engine, "plain.deaf", None, timeout=0.1) for _ in range(2)]
    assert {job.error["type"] for job in deaf if job.error} == {"timed-out"}

    assert app.worker.free == 0
    waiting = await engine.submit_kind("yields.worker", 2)
    plain_handlers.release.set()
    assert (await engine.ended(waiting, within=30)).result == 4


async def test_a_plain_function_that_hangs_in_a_process_is_killed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    job_id = await engine.submit_kind("plain.hangs", None)

    async def pid() -> int | None:
        progress = (await engine.job(job_id)).progress
        return progress and int(progress["done"])

    child = await until(pid)
    await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert (await engine.ended(job_id, within=30)).state == JobState.CANCELLED
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


async def test_a_thread_that_does_not_end_does_not_keep_the_process(idle: Engine) -> None:
    """The loop cancels what is left when it ends."""
    claim = await idle.claim(await idle.submit_kind("plain.deaf", None), "plain.deaf")
    context = Context(claim, Parts(idle.settings, idle.store, idle.lifecycle, idle.files), runner.Attempt())
    performing = asyncio.create_task(perform(kinds.discover()["plain.deaf"], context, None, {}))
    await until(plain_handlers.started.is_set)
    for _ in range(2):
        performing.cancel()
        await asyncio.wait({performing}, timeout=0.1)

    assert performing.cancelled()
    assert [thread for thread in threading.enumerate() if str(claim.job_id) in thread.name and thread.daemon]


async def test_errors_of_a_thread_are_kept(engine: Engine) -> None:
    messages = {}
    for way in ("exit", "stop", "value"):
        error = (await ended(engine, "plain.raise", way)).error
        assert error is not None
        assert error["type"] == "handler-failed"
        messages[way] = error["message"]
    assert messages["exit"] == "SystemExit: as it is"
    assert "StopIteration" in messages["stop"]
    assert messages["value"] == "ValueError: as it is"


async def test_a_thread_may_have_children(engine: Engine) -> None:
    job = await ended(engine, "plain.parent", [2, 3, 4])
    assert (job.result, job.attempt) == ([4, 9, 16], 1)


# -- generators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["yields.worker", "yields.thread", "yields.process"])
async def test_a_generator_yields_progress_and_last_its_result(engine: Engine, kind: str) -> None:
    job = await ended(engine, kind, 1000)

    assert (job.state, job.result) == (JobState.SUCCEEDED, 1_000_000)
    assert job.progress is not None
    shown = {key: value for key, value in job.progress.items() if key not in ("rate", "eta")}
    assert shown == {"done": 1000, "total": 1000, "unit": "items", "message": "counting", "counts": {"even": 499}}


async def test_a_generator_need_not_have_a_result(engine: Engine) -> None:
    job = await ended(engine, "yields.nothing", None)
    assert (job.state, job.result) == (JobState.SUCCEEDED, None)


@pytest.mark.parametrize(
    ("kind", "input", "said"),
    [
        ("yields.wrong", "number", "finite numbers"),
        ("yields.wrong", "progress", "the result must come last"),
        ("yields.wrong", "twice", "the result must come last"),
        ("yields.return", None, "a generator yields it"),
    ],
)
async def test_a_generator_that_yields_something_else_fails_with_what_to_do(
    engine: Engine, kind: str, input: Any, said: str
) -> None:
    job = await ended(engine, kind, input)
    assert job.error is not None
    assert job.error["type"] == "handler-failed"
    assert said in job.error["message"]


@pytest.mark.parametrize("kind", ["yields.until", "yields.until_thread"])
async def test_a_generator_feels_a_cancel_where_it_yields(engine: Engine, kind: str) -> None:
    job_id = await engine.submit_kind(kind, None)
    await until(plain_handlers.started.is_set)
    await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert (await engine.ended(job_id, within=30)).state == JobState.CANCELLED
    assert await checkpoint(engine, job_id) == "cancelled"


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("yields.worker", {"type": "integer"}),
        ("yields.process", {"type": "integer"}),
        ("yields.nothing", {"type": "null"}),
        ("yields.wrong", {"type": "integer"}),
    ],
)
async def test_the_schema_of_a_generators_result_is_that_of_what_it_yields_last(
    engine: Engine, name: str, schema: dict[str, Any]
) -> None:
    announced = {kind["name"]: kind for kind in await engine.store.kinds()}
    assert announced[name]["result_schema"] == schema
