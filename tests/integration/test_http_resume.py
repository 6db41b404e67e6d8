"""http.fetch over deploys and crashes: each URL has one line, and what was saved is not asked for again."""

import asyncio
import json
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from aiohttp import web

from headway.embedded import Embedded
from headway.files import part_key
from headway.job import Job
from headway.settings import Settings
from headway.states import JobState
from services.worker.context import Context, Parts
from services.worker.kinds.http_fetch import FetchInput, fetch
from services.worker.kinds.saved import MOST_PARTS, Saved
from services.worker.runner import Attempt
from tests.conftest import files_below, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.site import GatedSite, gated


def answer(number: int) -> web.Response:
    return web.Response(text=f"page {number}", status=404 if number % 10 == 0 else 200)


@pytest.fixture
async def site() -> AsyncIterator[GatedSite]:
    async with gated(answer) as site:
        yield site


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, drain=0.0) as engine:
        yield engine


async def content(engine: Engine, key: str) -> bytes:
    return b"".join([chunk async for chunk in engine.files.read(key)])


async def reported(engine: Engine, job_id: UUID, done: int) -> None:
    async def so_many() -> bool:
        progress = (await engine.job(job_id)).progress
        return bool(progress) and progress["done"] >= done

    await until(so_many)


async def saved(engine: Engine, job_id: UUID) -> set[str]:
    """The paths whose lines are saved."""
    checkpoint = (await engine.row(job_id))["checkpoint"] or {"parts": []}
    lines = b"".join([await content(engine, key) for key in checkpoint["parts"]]).splitlines()
    return {f"/{json.loads(line)['index']}" for line in lines}


async def whole(engine: Engine, job_id: UUID, urls: list[str]) -> Job:
    """The job, which must have succeeded with one line for each URL and a summary of them all."""
    job = await engine.ended(job_id)
    assert job.state == JobState.SUCCEEDED, job.error
    [artifact] = await engine.store.artifacts(job_id, engine.tenant.id)
    lines = [json.loads(line) for line in (await content(engine, artifact.key)).splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(len(urls)))
    assert all(line["url"] == urls[line["index"]] for line in lines)
    count = Counter(f"{line['status'] // 100}xx" for line in lines)
    ms = sorted(line["ms"] for line in lines)
    assert job.result["statuses"] == count
    assert (job.result["total"], job.result["ok"]) == (len(urls), count["2xx"])
    assert job.result["bytes"] == sum(line["bytes"] for line in lines)
    assert (ms[0], ms[-1]) <= (job.result["latency_ms"]["p50"], job.result["latency_ms"]["p99"])
    assert job.progress is not None
    assert job.progress["done"] == len(urls)
    folder = engine.settings.home / "files"

    def left() -> list[str]:
        return [str(path.relative_to(folder)) for path in files_below(folder)]

    # The job is seen to have ended a moment before its parts are deleted.
    await until(lambda: left() == [artifact.key])
    return job


async def killed(engine: Engine, job_id: UUID, input: dict[str, Any], *, at: int) -> None:
    """An attempt that vanishes once it has reported so many URLs, as of a worker that is killed."""
    claim = await engine.claim(job_id, "http.fetch")
    context = Context(claim, Parts(engine.settings, engine.store, engine.lifecycle, engine.files), Attempt())
    running = asyncio.create_task(fetch(context, FetchInput(**input)))
    await reported(engine, job_id, at)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await context.close()
    await engine.expire(job_id)
    await engine.lifecycle.rescue(1)


async def test_a_deploy_costs_only_the_urls_under_way(
    engine: Engine, site: GatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.saved.SAVE_EVERY", 60.0)
    monkeypatch.setattr("services.worker.kinds.http_fetch.LAST_SAVE", 8.0)
    urls = site.urls(300)
    job_id = await engine.submit_kind("http.fetch", {"urls": urls, "concurrency": 10, "per_host": 10})
    site.allow(250)
    async with worker(engine.settings):
        await reported(engine, job_id, 250)
        assert await saved(engine, job_id) == set()
    assert await engine.state(job_id) == "queued"

    assert len(done := await saved(engine, job_id)) == 250
    site.allow(300)
    async with worker(engine.settings):
        job = await whole(engine, job_id, urls)

    assert (job.attempt, job.interruptions) == (1, 1)
    assert {site.asked[path] for path in done} == {1}
    assert sum(site.asked.values()) <= 310


async def test_crashes_cost_only_what_was_not_saved(
    engine: Engine, site: GatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.saved.SAVE_EVERY", 0.0)
    monkeypatch.setattr("services.worker.kinds.saved.SAVE_SHARE", 0.0)
    urls = site.urls(200)
    input = {"urls": urls, "concurrency": 7, "per_host": 7, "body": "none"}
    job_id = await engine.submit_kind("http.fetch", input)
    was = set[str]()
    for cut in (40, 90):
        site.allow(cut - len(was))
        await killed(engine, job_id, input, at=cut)
        done = await saved(engine, job_id)
        assert was < done
        was = done

    asked = {path: site.asked[path] for path in was}
    site.allow(200)
    async with worker(engine.settings):
        await whole(engine, job_id, urls)

    assert {path: site.asked[path] for path in was} == asked


async def test_lines_that_are_gone_are_made_again(
    engine: Engine, site: GatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.http_fetch.LAST_SAVE", 8.0)
    urls = site.urls(30)
    job_id = await engine.submit_kind("http.fetch", {"urls": urls, "per_host": 20})
    site.allow(20)
    async with worker(engine.settings):
        await reported(engine, job_id, 20)
    assert len(await saved(engine, job_id)) == 20
    shutil.rmtree(engine.settings.home / "files" / "parts")

    site.allow(60)
    async with worker(engine.settings):
        await whole(engine, job_id, urls)


async def test_a_job_that_ends_before_the_first_save_is_due_saves_nothing(
    engine: Engine, site: GatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.saved.SAVE_EVERY", 60.0)
    site.allow(500)
    urls = site.urls(500)
    job_id = await engine.submit_kind("http.fetch", {"urls": urls})
    async with worker(engine.settings):
        await whole(engine, job_id, urls)

    assert (await engine.row(job_id))["checkpoint"] is None
    assert not (engine.settings.home / "files" / "parts").exists()


async def test_lines_are_those_of_the_saves_that_came_through(
    engine: Engine, site: GatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    claim = await engine.claim(await engine.submit_kind("http.fetch", {"urls": site.urls(1)}), "http.fetch")
    job = Context(claim, Parts(engine.settings, engine.store, engine.lifecycle, engine.files), Attempt())
    kept, number = list[bytes](), 0
    for _ in range(30):
        lines = Saved(job)
        read = b"".join([some async for some in lines.earlier()])
        assert read.splitlines() == kept
        fresh = list[bytes]()
        for _ in range(chance.randrange(4)):
            for _ in range(chance.randrange(5)):
                number += 1
                lines.add(f"{number}\n".encode())
                fresh.append(str(number).encode())
            saving = asyncio.create_task(lines.save())
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() / 100)
                saving.cancel()
            if (await asyncio.gather(saving, return_exceptions=True))[0] is None:
                kept, fresh = kept + fresh, []
        if chance.random() < 0.3:
            # The last save of a drain, over one that was interrupted.
            await lines.save()
            kept += fresh


def test_the_largest_checkpoint_fits_the_smallest_limit() -> None:
    parts = [part_key(uuid4(), 10**6, 10**4) for _ in range(MOST_PARTS)]

    assert len(json.dumps({"parts": parts, "seconds": 1e9})) <= Settings.model_fields["max_checkpoint"].default
