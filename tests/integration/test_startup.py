"""What handlers need: opened before the worker takes jobs, shared by them, closed after the last."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import WithJsonSchema

from headway import JobContext, kind, kinds
from headway.embedded import Embedded
from headway.errors import InvalidSettings, StartFailed
from headway.states import JobState
from services.worker.app import App
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner
from tests.integration import startup_handlers
from tests.integration.startup_handlers import faulty, happened


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_happened() -> Iterator[None]:
    happened.clear()
    yield
    faulty.clear()


async def test_what_handlers_need_is_opened_once_shared_and_closed_when_the_worker_stops(engine: Engine) -> None:
    async with worker(engine.settings):
        assert happened == ["warehouse opened", "shelf opened"]
        jobs = [await engine.submit_kind(kind, 1) for kind in ("startup.ask", "startup.thread", "startup.ask")]
        results = [(await engine.ended(job_id, within=30)).result for job_id in jobs]
    assert sorted(results) == [1, 2, 3]
    assert happened == ["warehouse opened", "shelf opened", "shelf closed", "warehouse closed"]


async def test_a_process_opens_what_its_kind_needs_and_nothing_else(engine: Engine) -> None:
    async with worker(engine.settings):
        job = await engine.ended(await engine.submit_kind("startup.process", 1), within=30)
    model, *opened = job.result
    assert model.startswith("model of ")
    assert model != f"model of {os.getpid()}"
    assert opened == ["model opened"]


async def test_a_process_whose_needs_cannot_be_opened_fails_its_attempt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTY", "model")
    async with worker(engine.settings):
        job = await engine.ended(await engine.submit_kind("startup.process", 1), within=30)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert (
        "startup_handlers.model, which handlers need, failed at start: MemoryError: the model" in job.error["message"]
    )


async def test_a_worker_whose_needs_cannot_be_opened_announces_nothing(engine: Engine) -> None:
    faulty.add("warehouse")
    with pytest.raises(StartFailed, match=r"startup_handlers\.warehouse, which handlers need, failed .*nobody answers"):
        async with worker(engine.settings):
            pass
    assert await engine.store.kinds() == []


async def test_a_worker_process_whose_needs_cannot_be_opened_ends_with_a_sentence(
    engine: Engine, tmp_path: Path
) -> None:
    spawner = Spawner(engine, tmp_path)
    try:
        process = await spawner(ready=False, HEADWAY_KINDS=startup_handlers.__name__, FAULTY="warehouse")
        assert await process.ended(within=30) == 1
        assert "startup_handlers.warehouse, which handlers need, failed at start" in process.log.read_text()
    finally:
        await spawner.end()


async def test_what_breaks_later_ends_the_worker(engine: Engine) -> None:
    app = await App.open(engine.settings)
    working = asyncio.create_task(app.worker.async_run())
    await engine.submit_kind("startup.break", None)
    try:
        async with asyncio.timeout(30):
            with pytest.raises(ExceptionGroup) as raised:
                await working
        assert "the warehouse is gone" in repr(raised.value.exceptions)
    finally:
        await app.worker.drain(0)
        await app.close()


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"oneOf": []}, r"\[\] has less than 1 item"),
        ({"$ref": "https://schemas.example/order.json"}, r"order\.json is not part of the schema; define in \$defs"),
    ],
)
async def test_a_worker_with_a_kind_whose_schema_is_none_stops_before_it_announces_any(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], why: str
) -> None:
    """The web service holds inputs against the schemas of all kinds; it fetches none from elsewhere."""
    monkeypatch.setattr(kinds, "_registry", dict(kinds._registry))

    @kind("report.odd")
    async def odd(job: JobContext, input: Annotated[int, WithJsonSchema(extra)]) -> None: ...

    await engine.database.execute("DELETE FROM kinds")

    with pytest.raises(InvalidSettings, match=rf"The input_schema of report\.odd is no JSON Schema: .*{why}"):
        await App.open(engine.settings)
    assert await engine.database.fetchval("SELECT count(*) FROM kinds") == 0
