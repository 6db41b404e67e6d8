"""Uploads over kills of the web process: what counts is kept, what does not is cleaned up."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from tests.conftest import until
from tests.engine import Engine
from tests.faults.conftest import Spawner, WorkerProcess
from tests.faults.test_full_disk import full

MIB = 1 << 20
BYTES = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}


def kept(engine: Engine) -> list[Path]:
    """Every file below the folder of files and artifacts, half-written ones too."""
    found = os.walk(engine.settings.home / "files")
    return [Path(folder, name) for folder, _, names in found for name in names]


async def endless(data: bytes) -> AsyncIterator[bytes]:
    """A body that never ends."""
    yield data
    await asyncio.Event().wait()


async def killed_while(
    web: WorkerProcess, engine: Engine, sending: "asyncio.Task[httpx.Response]", before: int
) -> None:
    """Kill the web process once it has begun to write."""
    await until(lambda: len(kept(engine)) > before)
    web.signal(signal.SIGKILL)
    await web.ended()
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)


async def test_an_upload_goes_on_after_the_web_process_was_killed(engine: Engine, spawn: Spawner) -> None:
    data = os.urandom(12 * MIB)
    web, http = await spawn.web()
    created = await http.post("/uploads", headers={**BYTES, "Upload-Length": str(len(data))}, content=data[: 4 * MIB])
    path = f"/uploads/{created.headers['Location'].rpartition('/')[2]}"
    headers = {**BYTES, "Upload-Offset": str(4 * MIB), "Content-Length": str(8 * MIB)}
    body = endless(data[4 * MIB : 8 * MIB])
    await killed_while(web, engine, asyncio.create_task(http.patch(path, content=body, headers=headers)), 1)

    _, http = await spawn.web()
    head = await http.head(path, headers=BYTES)
    assert int(head.headers["Upload-Offset"]) == 4 * MIB, "what was acknowledged, and what did not count"
    last = await http.patch(path, content=data[4 * MIB :], headers={**BYTES, "Upload-Offset": str(4 * MIB)})
    assert (await http.get(f"/files/{last.headers['Headway-File']}/content")).content == data
    assert len(kept(engine)) == 3
    await engine.uploads.sweep()
    assert len(kept(engine)) == 2


async def test_a_file_in_one_request_whose_process_was_killed_leaves_nothing(engine: Engine, spawn: Spawner) -> None:
    web, http = await spawn.web()
    body = endless(os.urandom(4 * MIB))
    await killed_while(web, engine, asyncio.create_task(http.post("/files", content=body)), 0)

    _, http = await spawn.web()
    assert (await http.get("/files")).json()["files"] == []
    assert await engine.uploads.sweep() == 0, "another process may be receiving it"
    await engine.database.execute("UPDATE files SET expires_at = now()")
    assert await engine.uploads.sweep() == 1
    assert kept(engine) == []
    assert await engine.database.fetchval("SELECT count(*) FROM files") == 0


async def test_an_upload_that_the_disk_does_not_take_can_go_on_once_there_is_room(
    engine: Engine, spawn: Spawner
) -> None:
    data = os.urandom(12 * MIB)
    web, http = await spawn.web()
    created = await http.post("/uploads", headers={**BYTES, "Upload-Length": str(len(data))}, content=b"")
    path = f"/uploads/{created.headers['Location'].rpartition('/')[2]}"
    with full(web):
        refused = await http.patch(path, content=data, headers={**BYTES, "Upload-Offset": "0"})
        assert (refused.status_code, refused.json()["type"]) == (507, "urn:headway:problem:no-storage")
        await until(lambda: kept(engine) == [])
    last = await http.patch(path, content=data, headers={**BYTES, "Upload-Offset": "0"})
    assert (await http.get(f"/files/{last.headers['Headway-File']}/content")).content == data
