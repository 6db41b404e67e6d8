"""http.fetch from a file, whose worker is killed in the middle: one line for each row, and what was saved is kept."""

import asyncio
import io
import json
import signal
import zipfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from headway.states import JobState
from tests.conftest import until
from tests.engine import Engine
from tests.faults.conftest import Spawner

ROWS = 800


@dataclass
class Site:
    """How often each path was asked for, and how many may be answered."""

    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    answers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.answers.release()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()

    async def page(request: web.Request) -> web.Response:
        site.asked[request.path] += 1
        await site.answers.acquire()
        return web.Response(text=f"page {request.path}")

    app = web.Application()
    app.router.add_get("/{number}", page)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.port = runner.addresses[0][1]
    yield site
    site.allow(2 * ROWS)
    await runner.cleanup()


async def test_a_killed_worker_costs_only_what_was_not_saved(engine: Engine, spawn: Spawner, site: Site) -> None:
    file = await engine.upload("".join(f"http://127.0.0.1:{site.port}/{row}\n" for row in range(ROWS)).encode())
    input = {
        "file": str(file.id),
        "format": "text",
        "concurrency": 20,
        "per_host": 20,
        "body": "archive",
        "timeout": 60,
    }
    first = await spawn(HEADWAY_FETCH_ALLOW="127.0.0.0/8")
    job_id = await engine.submit_kind("http.fetch", input, timeout=300)
    site.allow(200)

    async def asked() -> bool:
        return len(site.asked) >= 220

    await until(asked, 40)

    async def saved() -> bool:
        # One more answer is what lets a save that is due begin.
        site.allow(1)
        return (await engine.row(job_id))["checkpoint"] is not None

    await until(saved, 40)
    first.signal(signal.SIGKILL)
    await first.ended()
    parts = (await engine.row(job_id))["checkpoint"]["parts"]
    await engine.expire(job_id)
    before = Counter(site.asked)
    site.allow(2 * ROWS)
    await spawn(HEADWAY_FETCH_ALLOW="127.0.0.0/8")
    job = await engine.ended(job_id, 60)

    assert job.state == JobState.SUCCEEDED, job.error
    assert job.result["ok"] == ROWS
    artifacts = {artifact.name: artifact for artifact in await engine.store.artifacts(job_id, engine.tenant.id)}
    content = b"".join([chunk async for chunk in engine.files.read(artifacts["results.jsonl"].key)])
    lines = [json.loads(line) for line in content.splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(ROWS))
    assert all(line["url"].endswith(f"/{line['index']}") for line in lines)
    # What the second worker asked for again is what the first had under way or not yet saved.
    assert parts
    again = [path for path, count in site.asked.items() if count > 1]
    assert set(again) <= set(before)
    assert len(again) < len(before) / 2
    archive = io.BytesIO(b"".join([chunk async for chunk in engine.files.read(artifacts["bodies.zip"].key)]))
    with zipfile.ZipFile(archive) as bodies:
        assert {bodies.read(line["file"]).decode() for line in lines} == {f"page /{row}" for row in range(ROWS)}
