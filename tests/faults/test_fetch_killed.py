"""http.fetch from a file, whose worker is killed in the middle: one line for each row, and what was saved is kept."""

import io
import json
import signal
import zipfile
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from headway.states import JobState
from tests.conftest import until
from tests.engine import Engine
from tests.faults.conftest import Spawner
from tests.site import GatedSite, gated

ROWS = 800


@pytest.fixture
async def site() -> AsyncIterator[GatedSite]:
    async with gated(lambda number: web.Response(text=f"page /{number}")) as site:
        yield site


async def test_a_killed_worker_costs_only_what_was_not_saved(engine: Engine, spawn: Spawner, site: GatedSite) -> None:
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
    earlier = (await engine.row(job_id))["checkpoint"]

    async def saved() -> bool:
        # One more answer is what lets a save that is due begin.
        site.allow(1)
        return (await engine.row(job_id))["checkpoint"] != earlier

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
