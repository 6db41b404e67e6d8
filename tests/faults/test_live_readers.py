"""Readers that stall, have tiny buffers or read byte by byte: they are let go, and nobody else notices."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from websockets.asyncio.client import connect

from headway.job import Claim, Ending
from headway.states import JobState
from tests.conftest import until
from tests.engine import Engine
from tests.faults.bare_sockets import BareSocket
from tests.faults.conftest import Spawner, WorkerProcess
from tests.faults.live_checker import Checker, Received, Truth, contents

# More bytes than the kernel keeps for a reader, and more lines than may wait for one.
LINES, LINE = 700, "é" * 1900
FEW = 100
# Lines that the listener may be behind: less than the MiB that may wait for a client.
IN_TIME = 30
# Of each sort. With the others these are as many connections as a key may have.
EACH = 3
# Seconds that a client may not read, and what it takes to notice.
PATIENCE = 10 + 2
MOST_MEMORY = 32 << 20

pytestmark = pytest.mark.timeout(120)


async def test_readers_that_do_not_keep_up_are_let_go_and_others_get_all(engine: Engine, spawn: Spawner) -> None:
    web, http = await spawn.web()
    port, key = urlsplit(str(http.base_url)).port or 0, engine.tenant.api_key
    loud, quiet = [await _claimed(engine) for _ in range(2)]
    trickling = [BareSocket(port, path, key, websocket=ws, receive_buffer=1024) for path, ws in _paths(loud.job_id)]
    stalled = [
        BareSocket(port, path, key, websocket=ws, receive_buffer=size)
        for path, ws in _paths(loud.job_id)
        for size in (1024, 1 << 16)
    ]
    checker = Checker()
    heard: list[str] = []
    listeners = [
        asyncio.create_task(_listen(port, key, loud.job_id, checker.client("listener", "default"), heard)),
        asyncio.create_task(
            asyncio.to_thread(_read_byte_by_byte, port, key, quiet.job_id, checker.client("byte by byte", "default"))
        ),
    ]
    bad = len(trickling) + len(stalled)
    await until(lambda: _open(web, bad + len(listeners)))
    # A line that is written before a listener's snapshot is in it, and does not come apart.
    await until(lambda: checker.counts["snapshot"] == len(listeners))
    trickle = asyncio.create_task(_trickle(trickling))
    before = _memory(web)
    try:
        most = before
        for number in range(LINES):
            await engine.lifecycle.log(loud, LINE, "info")
            if number % (LINES // FEW) == 0:
                await engine.lifecycle.log(quiet, "a line", "info")
            most = max(most, _memory(web))
            # The listener is to keep up, however busy the machine is.
            await until(lambda number=number: number - len(heard) < IN_TIME)
        flooded = time.monotonic()
        for claim in (loud, quiet):
            await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))
        async with asyncio.timeout(30):
            await asyncio.gather(*listeners)
        await until(lambda: _open(web, 0), PATIENCE + 3)
        assert time.monotonic() - flooded < PATIENCE + 3
    finally:
        trickle.cancel()
        for each in (*trickling, *stalled):
            each.close()
    assert (most - before) < MOST_MEMORY, f"{(most - before) >> 20} MiB for {bad} readers that do not read"
    assert await web.counted("headway_live_slow_total") == bad
    jobs = {str(claim.job_id): await _record(engine, claim.job_id) for claim in (loud, quiet)}
    assert checker.check(Truth(dict.fromkeys(jobs, "default"), jobs)) == []
    assert checker.counts["log"] == LINES + FEW


def _paths(job_id: UUID) -> list[tuple[str, bool]]:
    return [(f"/ws/jobs/{job_id}", True), (f"/api/v1/jobs/{job_id}/events", False)] * EACH


async def _claimed(engine: Engine) -> Claim:
    return await engine.claim(await engine.submit_kind("test.call", {}))


async def _open(web: WorkerProcess, count: int) -> bool:
    return await web.counted("headway_ws_connections") + await web.counted("headway_sse_streams") == count


def _memory(web: WorkerProcess) -> int:
    """Bytes that are resident."""
    return int(Path(f"/proc/{web.process.pid}/statm").read_text().split()[1]) * 4096


async def _listen(port: int, key: str, job_id: UUID, client: Received, heard: list[str]) -> None:
    """Follow the job to its end; `heard` is what came."""
    headers = {"Authorization": f"Bearer {key}"}
    async with connect(f"ws://127.0.0.1:{port}/ws/jobs/{job_id}", additional_headers=headers, proxy=None) as ws:
        client.connected()
        async for text in ws:
            heard.append(str(text))
            for frame, content in contents(str(text)):
                client.take(frame, content)


def _read_byte_by_byte(port: int, key: str, job_id: UUID, client: Received) -> None:
    """Follow the job to its end, one byte at a time."""
    reader = BareSocket(port, f"/ws/jobs/{job_id}", key)
    reader.head()
    client.connected()
    for text in reader.texts(at_once=1):
        for frame, content in contents(text):
            client.take(frame, content)
    reader.close()


async def _trickle(readers: list[BareSocket]) -> None:
    """Read a byte of each now and then."""
    for reader in readers:
        reader.socket.setblocking(False)
    while True:
        for reader in readers:
            with suppress(OSError):
                reader.socket.recv(1)
        await asyncio.sleep(0.01)


async def _record(engine: Engine, job_id: UUID) -> dict[int, tuple[str, object]]:
    found = {}
    while events := await engine.store.events(job_id, engine.tenant.id, after=max(found, default=0), limit=1000):
        found |= {event.seq: (event.type, event.data) for event in events}
    return found
