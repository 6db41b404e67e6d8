"""Headway's own client against the real service."""

import asyncio
import hashlib
import itertools
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from headway import JobContext, kind
from headway.client import Client, ClientError, InvalidRequest, NotFound, Unauthenticated, live
from headway.client import http as client_http
from headway.settings import Settings
from tests.conftest import Service, Tenant, web, worker
from tests.faults.proxy import Proxy
from tests.line_kinds import write_lines  # noqa: F401
from tests.ports import free_ports


class Copy(BaseModel):
    file: UUID
    name: str = "copy.bin"


class Copied(BaseModel):
    size: int


@kind("test.copy")
async def copy(job: JobContext, input: Copy) -> Copied:
    """Copies a file into an artifact."""
    source, done = await job.open_file(input.file), 0
    async with job.artifact(input.name) as out:
        async for chunk in source.chunks():
            await out.write(chunk)
            done += len(chunk)
            await job.report(done, source.file.size, unit="bytes")
    return Copied(size=done)


async def test_submit_wait_and_read_back(service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 0.2}, tags=["x"], timeout=9)
    ended = await service.client.wait(job["id"], timeout=10)

    assert (ended["state"], ended["result"], ended["tags"], ended["timeout"]) == (
        "succeeded",
        {"seconds": 0.2},
        ["x"],
        9,
    )
    assert await service.client.get(UUID(job["id"])) == ended
    assert "demo.countdown" in [kind["name"] for kind in await service.client.kinds()]
    assert (await service.client.kind("demo.countdown"))["input_schema"]["required"] == ["seconds"]


async def test_wait_gives_up_and_cancel_ends_the_job(service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 60})

    with pytest.raises(TimeoutError):
        await service.client.wait(job["id"], timeout=0.3)
    assert (await service.client.cancel(job["id"]))["cancel_requested_at"]
    assert (await service.client.wait(job["id"], timeout=10))["state"] == "cancelled"
    assert (await service.client.cancel(job["id"]))["state"] == "cancelled"


async def test_listing_reads_as_many_pages_as_it_needs(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_http, "PAGE", 2)
    ids = [(await service.client.submit("demo.countdown", {"seconds": 0}, tags=["a"]))["id"] for _ in range(5)]
    await service.client.submit("demo.countdown", {"seconds": 0}, tags=["b"])

    assert [job["id"] async for job in service.client.list(tag="a")] == ids[::-1]
    assert [job["id"] async for job in service.client.list(tag="a", limit=3)] == ids[:1:-1]
    assert [job async for job in service.client.list(tag="a", kind="no.such")] == []


async def test_files_go_up_and_come_down_whole(service: Service, tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    (tmp_path / "ünïcode & more.bin").write_bytes(content)
    sent: list[tuple[int, int | None]] = []
    received: list[tuple[int, int | None]] = []

    file = await service.client.upload(
        tmp_path / "ünïcode & more.bin", on_progress=lambda *progress: sent.append(progress)
    )
    name = "a name, with & signs?.bin"
    job = await service.client.submit("test.copy", {"file": file["id"], "name": name})
    assert (await service.client.wait(job["id"], timeout=10))["result"] == {"size": len(content)}
    (tmp_path / "out").mkdir()
    path = await service.client.download(
        job["id"], name, tmp_path / "out", on_progress=lambda *progress: received.append(progress)
    )

    assert file["name"] == "ünïcode & more.bin"
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert await service.client.artifacts(job["id"]) == [
        {"name": name, "content_type": "application/octet-stream", "size": len(content), "sha256": file["sha256"]}
    ]
    assert path.read_bytes() == content
    assert list((tmp_path / "out").iterdir()) == [path]
    assert sent[-1] == received[-1] == (len(content), len(content))
    assert len(sent) == 3


async def test_a_large_upload_goes_on_after_broken_connections(service: Service, tmp_path: Path) -> None:
    content = os.urandom(24 << 20)
    (tmp_path / "large.bin").write_bytes(content)
    sent: list[int] = []
    async with (
        Proxy(int(service.url.rpartition(":")[2])) as proxy,
        Client(f"http://127.0.0.1:{proxy.port}", service.api_key) as client,
    ):
        breaks = [6 << 20, 13 << 20, 20 << 20]

        def progress(done: int, total: int | None) -> None:
            sent.append(done)
            if breaks and done >= breaks[0]:
                breaks.pop(0)
                proxy.reset()

        file = await client.upload(tmp_path / "large.bin", on_progress=progress)

    assert breaks == []
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert (file["name"], file["size"]) == ("large.bin", len(content))
    resumed = [after for before, after in itertools.pairwise(sent) if after <= before]
    # One more where the client asked before the service had noticed the last break: it is told 409, and asks again.
    assert len(resumed) in (3, 4)
    assert resumed[-1] > 8 << 20, "what had arrived was sent again"


async def test_a_large_file_that_changes_while_it_is_read_is_refused(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(10 << 20))

    def truncate(done: int, total: int | None) -> None:
        os.truncate(path, 5 << 20)

    with pytest.raises(ClientError, match="became shorter"):
        await service.client.upload(path, on_progress=truncate)
    assert (await service.http.get("/api/v1/files")).json()["files"] == []


async def test_an_upload_that_is_stopped_leaves_no_room_taken(
    service: Service, tmp_path: Path, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headway.client.uploads.GIVE_UP", 30.0)
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(10 << 20))
    uploading = asyncio.create_task(service.client.upload(path, on_progress=lambda *_: uploading.cancel()))
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert await database.fetchval("SELECT stored FROM tenants") == 0


async def test_a_download_that_fails_leaves_nothing(service: Service, tmp_path: Path) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 0})
    (tmp_path / "kept").write_text("before")

    with pytest.raises(NotFound, match="no artifact"):
        await service.client.download(job["id"], "absent", tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "before"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


async def test_following_starts_with_a_snapshot_and_ends_with_the_result(service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 1})
    envelopes = [envelope async for envelope in service.client.follow(job["id"])]

    assert envelopes[0]["t"] == "snapshot"
    assert [envelope["seq"] for envelope in envelopes] == sorted({envelope["seq"] for envelope in envelopes})
    assert len([envelope for envelope in envelopes if envelope["t"] == "progress"]) >= 2
    assert (envelopes[-1]["t"], envelopes[-1]["d"]["state"]) == ("state", "succeeded")
    assert envelopes[-1]["d"]["result"] == {"seconds": 1}

    again = [envelope async for envelope in service.client.follow(job["id"])]
    assert [(envelope["t"], envelope["d"]["state"]) for envelope in again] == [("snapshot", "succeeded")]


async def test_following_goes_on_when_the_web_service_is_restarted(
    settings: Settings, redis: Redis, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "LONGEST_PAUSE", 0.1)
    caplog.set_level(logging.WARNING, "headway.client")
    port = free_ports()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(worker(settings))
        async with web(settings, port=port) as url:
            client = await stack.enter_async_context(Client(url, tenant.api_key))
            job = await client.submit("test.lines", {"count": 60})
            envelopes = await stack.enter_async_context(aclosing(client.follow(job["id"])))
            seen = [await anext(envelopes) for _ in range(3)]
        following_on = asyncio.create_task(collect(envelopes))
        await stack.enter_async_context(web(settings, port=port))
        seen += await following_on

    seqs = [envelope["seq"] for envelope in seen]
    assert seqs == sorted(set(seqs))
    lines = [envelope["d"]["message"] for envelope in seen if envelope["t"] == "log"]
    # Of those before the snapshot there is no word.
    assert lines == [str(number) for number in range(int(lines[0]), 60)]
    assert [envelope["t"] for envelope in seen].count("snapshot") == 1
    assert seen[-1]["d"]["state"] == "succeeded"
    assert "The live connection broke" in caplog.text


async def collect(envelopes: AsyncIterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return [envelope async for envelope in envelopes]


async def test_refusals_say_what_is_wrong(service: Service) -> None:
    nobody = str(uuid4())
    for call in (service.client.get(nobody), service.client.cancel(nobody), service.client.artifacts(nobody)):
        with pytest.raises(NotFound, match=nobody):
            await call
    with pytest.raises(NotFound, match=nobody):
        await collect(service.client.follow(nobody))
    with pytest.raises(InvalidRequest, match=r"demo\.countdown") as raised:
        await service.client.submit("demo.countdown", {"seconds": "ten", "more": 1})
    assert raised.value.type == "urn:headway:problem:invalid-input"
    assert len(raised.value.errors) == 2
    async with Client(service.url, service.api_key[:-1] + ("a" if service.api_key[-1] != "a" else "b")) as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.kinds()
        with pytest.raises(Unauthenticated):
            await collect(stranger.follow(nobody))
