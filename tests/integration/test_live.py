"""`/ws/jobs/{id}`: a snapshot, then everything that happens, then the end; whatever happens to Redis or the reader."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr
from redis.asyncio import Redis
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from headway.settings import Settings
from tests.conftest import Service, Tenant, make_tenant, until, worker
from tests.integration.test_api_jobs import ended, idle, submit
from tests.ports import free_ports

Frame = dict[str, Any]


def socket(http: httpx.AsyncClient, job_id: str, key: str | None = None, **options: Any) -> connect:
    """A WebSocket that follows a job, with the client's own key or another; the empty key is none."""
    authorization = http.headers["Authorization"] if key is None else f"Bearer {key}"
    return connect(
        f"{str(http.base_url).rstrip('/').replace('http', 'ws', 1)}/ws/jobs/{job_id}",
        additional_headers={"Authorization": authorization} if authorization != "Bearer " else {},
        proxy=None,
        **options,
    )


async def read(ws: ClientConnection) -> list[Frame]:
    """Every frame until the server closes."""
    return [json.loads(frame) async for frame in ws]


async def closing(http: httpx.AsyncClient, job_id: str, key: str | None = None) -> tuple[list[Frame], int, str]:
    """The frames, the close code and the reason."""
    async with socket(http, job_id, key) as ws, asyncio.timeout(10):
        frames = []
        try:
            while True:
                frames.append(json.loads(await ws.recv()))
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return frames, closed.rcvd.code, closed.rcvd.reason


def check(frames: list[Frame], job_id: str) -> list[Frame]:
    """What every reader may rely on; the frames between the snapshot and the bye."""
    snapshot, *events, bye = frames
    assert (snapshot["t"], snapshot["prev"]) == ("snapshot", None)
    assert snapshot["d"]["id"] == job_id
    assert snapshot["seq"] == snapshot["d"]["seq"]
    assert bye == {"t": "bye", "job": job_id, "d": {"reason": "terminal"}}
    held = snapshot["seq"]
    for frame in events:
        assert (frame["job"], frame["epoch"]) == (job_id, 1)
        assert frame["prev"] == held
        assert frame["seq"] > held
        held = frame["seq"]
    return events


async def test_a_job_is_followed_from_its_snapshot_to_its_end(service: Service) -> None:
    job = await submit(service.http, seconds=2)
    frames, code, _ = await closing(service.http, job["id"])
    events = check(frames, job["id"])
    assert code == 1000
    progress = [frame["d"] for frame in events if frame["t"] == "progress"]
    assert len(progress) >= 3
    assert [step["done"] for step in progress] == sorted(step["done"] for step in progress)
    assert progress[-1]["unit"] == "seconds"
    last = events[-1]
    assert (last["t"], last["d"]["state"], last["d"]["result"]) == ("state", "succeeded", {"seconds": 2})
    assert last["seq"] == (await ended(service.http, job["id"]))["seq"]


async def test_a_finished_job_is_a_snapshot_and_a_bye(service: Service) -> None:
    job = await ended(service.http, (await submit(service.http, seconds=0))["id"])
    frames, code, _ = await closing(service.http, job["id"])
    assert check(frames, job["id"]) == []
    assert frames[0]["d"] == job
    assert code == 1000


async def test_a_cancel_is_seen_by_whoever_follows(service: Service) -> None:
    job = await submit(service.http, seconds=600)
    async with socket(service.http, job["id"]) as ws, asyncio.timeout(10):
        frames = [json.loads(await ws.recv())]
        await service.http.post(f"/api/v1/jobs/{job['id']}/cancel")
        frames += await read(ws)
    events = check(frames, job["id"])
    assert events[-1]["d"]["state"] == "cancelled"
    assert any(frame["d"].get("cancel_requested_at") for frame in events)


async def test_a_stranger_is_told_nothing(settings: Settings, tenant: Tenant, database: asyncpg.Connection) -> None:
    other = await make_tenant(database, "other")
    async with idle(settings, tenant) as http:
        job_id, unknown = (await submit(http))["id"], str(uuid4())
        foreign = await closing(http, job_id, other.api_key)
        missing = await closing(http, unknown, other.api_key)
        assert missing == ([], 4506, f"There is no job {unknown}.")
        assert foreign == ([], 4506, f"There is no job {job_id}.")
        for key in ("", "x", f"{tenant.api_key}x"):
            frames, code, reason = await closing(http, job_id, key)
            assert (frames, code) == ([], 4501)
            assert "Authorization: Bearer" in reason


async def test_all_followers_get_the_same_frames(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        job_id = (await submit(http, seconds=0.5))["id"]
        async with socket(http, job_id) as one, socket(http, job_id) as other, asyncio.timeout(15):
            snapshots = [await one.recv(), await other.recv()]
            # What a client sends means nothing here.
            await one.send("hello")
            await one.send(b"\x00\xff")
            await one.send('{"t":"subscribe"}')
            async with worker(settings):
                frames = await asyncio.gather(read(one), read(other))
    assert snapshots[0] == snapshots[1]
    assert frames[0] == frames[1]
    assert len(check([json.loads(snapshots[0]), *frames[0]], job_id)) >= 4


async def test_followers_survive_the_loss_of_all_subscriptions(service: Service, redis: Redis) -> None:
    job = await submit(service.http, seconds=1.5)
    async with socket(service.http, job["id"]) as ws, asyncio.timeout(15):
        frames = [json.loads(await ws.recv()), json.loads(await ws.recv())]
        await redis.flushall()
        assert await redis.client_kill_filter(_type="pubsub") > 0
        frames += await read(ws)
    assert check(frames, job["id"])[-1]["d"]["state"] == "succeeded"


async def test_without_redis_the_end_is_read_from_postgres(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    async with worker(settings), idle(away, tenant) as http, asyncio.timeout(12):
        job = await submit(http, seconds=2)
        frames, code, _ = await closing(http, job["id"])
    assert check(frames, job["id"])[-1]["d"]["state"] == "succeeded"
    assert code == 1000


async def happen(database: asyncpg.Connection, job_id: str, count: int) -> None:
    """A job writes `count` long lines to its log, and succeeds; nobody is told."""
    async with database.transaction():
        await database.execute(
            "INSERT INTO events (job_id, seq, type, data) SELECT $1, 1 + n, 'log', "
            "jsonb_build_object('message', n || repeat('x', 1900), 'level', 'info', 'at', now()) "
            "FROM generate_series(1, $2) n",
            job_id,
            count,
        )
        await database.execute(
            "INSERT INTO events (job_id, seq, type, data) VALUES ($1, $2, 'state', $3)",
            job_id,
            count + 2,
            {"state": "succeeded", "attempt": 1, "at": "2026-11-25T22:00:00.000Z", "result": {}},
        )
        await database.execute(
            "UPDATE jobs SET state = 'succeeded', seq = $2, finished_at = now(), progress = $3 WHERE id = $1",
            job_id,
            count + 2,
            None,
        )


async def test_a_slow_reader_misses_nothing(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import session  # Django must be set up

    monkeypatch.setattr(session, "HEARTBEAT", 0.5)
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
        async with socket(http, job_id, max_queue=1) as ws, asyncio.timeout(20):
            frames = [json.loads(await ws.recv())]
            await happen(database, job_id, 2500)
            sent = sent_frames()
            # Not one is read before the buffers between us are full, or all have been sent.
            await until(lambda: sent_frames() - sent > 1500)
            frames += await read(ws)
    events = check(frames, job_id)
    assert [int(frame["d"]["message"].rstrip("x")) for frame in events[:-1]] == list(range(1, 2501))
    assert events[-1]["d"]["state"] == "succeeded"


def sent_frames() -> float:
    return REGISTRY.get_sample_value("headway_ws_frames_total", {"type": "log"}) or 0


def connections() -> float:
    return REGISTRY.get_sample_value("headway_ws_connections") or 0


async def test_a_reader_that_stops_reading_is_let_go(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web import __main__ as main  # Django must be set up
    from services.web.live import session, sessions

    def impatient(*args: Any) -> Any:
        config = original(*args)
        config.ws_ping_interval = config.ws_ping_timeout = 0.5
        return config

    original = main.server_config
    monkeypatch.setattr(main, "server_config", impatient)
    monkeypatch.setattr(sessions, "PATIENCE", 0.5)
    monkeypatch.setattr(session, "HEARTBEAT", 0.5)
    before = connections()
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
        async with socket(http, job_id, max_queue=1, ping_interval=None) as ws, asyncio.timeout(20):
            await ws.recv()
            assert connections() == before + 1
            assert await redis.pubsub_channels(f"*{job_id}*") != []
            await happen(database, job_id, 12_000)
            await until(lambda: connections() == before)

            async def nobody_listens() -> bool:
                return not await redis.pubsub_channels(f"*{job_id}*")

            await until(nobody_listens)
            with pytest.raises(ConnectionClosed):
                async for _ in ws:
                    pass
                raise AssertionError("the connection ended in peace")


@asynccontextmanager
async def process(settings: Settings, *command: str, port: int, **environment: str) -> AsyncIterator[Process]:
    """A server in a process of its own, once it answers on `port`; its log is the file `log` in the home folder."""
    with (settings.home / "log").open("wb") as log:
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *command),
            env=os.environ
            | {"HEADWAY_DATABASE_URL": settings.database_url.get_secret_value(), "HEADWAY_HOME": str(settings.home)}
            | environment,
            stdout=log,
            stderr=log,
        )

    async def answers() -> bool:
        assert running.returncode is None, f"{command[0]} has ended"
        try:
            async with httpx.AsyncClient(trust_env=False, verify=False) as http:
                return (await http.get(f"http://127.0.0.1:{port}/api/v1/jobs")).status_code == 401
        except httpx.TransportError:
            return False

    try:
        await until(answers, 20)
        yield running
    finally:
        if running.returncode is None:
            running.terminate()
            await running.wait()


async def test_a_web_process_that_is_told_to_stop_says_so_and_exits_with_0(
    settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
    port = free_ports()
    async with (
        process(settings, "services.web", port=port, HEADWAY_PORT=str(port), HEADWAY_OPS_PORT="0") as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=http.headers) as http,
        socket(http, job_id) as ws,
    ):
        await ws.recv()
        running.terminate()
        with pytest.raises(ConnectionClosed) as closed:
            await ws.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert await asyncio.wait_for(running.wait(), 10) == 0
    assert "the web service has stopped" in (settings.home / "log").read_text()


@pytest.mark.parametrize(("rest", "status"), [(b"1,2\n", b"201"), (b"", b"503")])
async def test_a_request_under_way_is_answered_when_the_process_is_told_to_stop(
    settings: Settings, tenant: Tenant, rest: bytes, status: bytes
) -> None:
    port = free_ports()
    given = {"HEADWAY_PORT": str(port), "HEADWAY_OPS_PORT": "0", "HEADWAY_DRAIN": "2"}

    async def refused() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            # Refused, or reset if it came as the server closed.
            return True
        writer.close()
        return False

    async with process(settings, "services.web", port=port, **given) as running, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /api/v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\nExpect: 100-continue\r\n"
            b"Authorization: Bearer %s\r\n\r\n" % tenant.api_key.encode()
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        running.terminate()
        await until(refused)
        writer.write(b"a,b\n" + rest)
        assert (await reader.readline()).split()[1] == status
        assert await running.wait() == 0
        writer.close()
    assert "Exception" not in (settings.home / "log").read_text()


async def test_daphne_serves_the_same(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    port, headers = free_ports(), {"Authorization": f"Bearer {tenant.api_key}"}
    daphne = ("daphne", "-b", "127.0.0.1", "-p", str(port), "services.web.asgi:application")
    async with (
        worker(settings),
        process(settings, *daphne, port=port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, verify=False) as http,
    ):
        job = await submit(http, seconds=2)
        frames, code, _ = await closing(http, job["id"])
        assert check(frames, job["id"])[-1]["d"]["state"] == "succeeded"
        assert code == 1000
        assert (await closing(http, str(uuid4())))[1] == 4506
        file = await http.post("/api/v1/files", params={"name": "a.csv"}, content=b"a,b\n1,2\n")
        assert (file.status_code, file.json()["size"]) == (201, 8)
        assert (await http.post("/api/v1/jobs", content=b"[")).json()["type"] == "urn:headway:problem:bad-request"
        assert (await http.head(f"/api/v1/jobs/{job['id']}")).headers["ETag"]
    lines = (settings.home / "log").read_text().splitlines()
    assert any(json.loads(line)["event"] == "request" for line in lines if line.startswith("{"))
