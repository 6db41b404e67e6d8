"""What a follower sees when events come between any two steps, out of turn, twice, late or not at all."""

import asyncio
import json
import re
import socket as net
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
import pytest
from prometheus_client import REGISTRY
from pydantic import SecretStr
from redis.asyncio import Redis

from headway.events import Layer, group, message
from headway.job import Event, Progress
from headway.settings import Settings
from tests.conftest import Tenant, until, worker
from tests.faults.proxy import Proxy
from tests.integration.live_clients import Frame, Socket, live, stream
from tests.integration.test_api_jobs import idle, submit
from tests.integration.test_live import process
from tests.ports import free_ports

# What `/ws/v1` says last: a text frame, and a close frame with code 1012.
BYE = b'{"t":"bye","d":{"reason":"restart"}}'
RESTART = b"\x88\x02\x03\xf4"


class Job:
    """A job that has events when the test says so: committed first, then published, or not."""

    def __init__(self, database: asyncpg.Connection, tenant: Tenant, job_id: str, layer: Layer) -> None:
        self.id = job_id
        self.durable = [1]
        self._database = database
        self._tenant = tenant
        self._layer = layer

    async def commit(self, type: str, data: dict[str, Any] | None = None) -> Event:
        data = {"at": "2026-01-01T00:00:00.000Z"} | (data or {"message": "m", "level": "info"})
        if type == "progress":
            data = Progress(data.get("done", 0)).as_json()
        async with self._database.transaction():
            seq = await self._database.fetchval(
                "UPDATE jobs SET seq = seq + 1, progress = coalesce($2, progress) WHERE id = $1 RETURNING seq",
                UUID(self.id),
                data if type == "progress" else None,
            )
            if type != "progress":
                await self._database.execute(
                    "INSERT INTO events (job_id, seq, type, data) VALUES ($1, $2, $3, $4)",
                    UUID(self.id),
                    seq,
                    type,
                    data,
                )
                self.durable.append(seq)
        return Event(UUID(self.id), self._tenant.id, 1, seq, type, data)  # type: ignore[arg-type]

    async def end(self) -> Event:
        await self._database.execute(
            "UPDATE jobs SET state = 'succeeded', finished_at = now() WHERE id = $1", UUID(self.id)
        )
        return await self.commit("state", {"state": "succeeded", "attempt": 1, "result": 1})

    async def publish(self, events: Sequence[Event]) -> None:
        await self._layer.group_send_all([(group(event.job_id), message(event)) for event in events])

    def check(self, frames: list[Frame]) -> None:
        """Every durable event after the first frame is there, once and in order; only progress may be missing."""
        assert all(after["prev"] == before["seq"] for before, after in pairwise(frames))
        seen = [frame["seq"] for frame in frames]
        assert seen == sorted(set(seen))
        assert [seq for seq in self.durable if seq >= seen[0]] == [seq for seq in seen if seq in self.durable]
        assert frames[-1]["d"]["state"] == "succeeded"


@dataclass(frozen=True)
class Stopped:
    """The web service without a worker, and jobs that have events when a test says so."""

    http: httpx.AsyncClient
    database: asyncpg.Connection
    tenant: Tenant
    layer: Layer

    async def job(self) -> Job:
        return Job(self.database, self.tenant, (await submit(self.http))["id"], self.layer)


@pytest.fixture
async def stopped(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, layer: Layer
) -> AsyncIterator[Stopped]:
    async with idle(settings, tenant) as http:
        yield Stopped(http, database, tenant, layer)


@pytest.fixture
async def layer(settings: Settings) -> AsyncIterator[Layer]:
    layer = Layer(settings.redis_url.get_secret_value())
    yield layer
    await layer.flush()
    await layer.redis.aclose()


class Steps:
    """Everything between a wish to follow and the first live event: each can be forced to have events around it.

    Those are heard at once if the job's topic is joined by then, or `late`, a step after they were committed.
    """

    def __init__(self, layer: Layer, monkeypatch: pytest.MonkeyPatch, *, late: bool) -> None:
        from services.web.live.hub import Hub
        from services.web.live.jobs import Following
        from services.web.live.writer import Writer

        self.count = 0
        self._layer = layer
        self._late = late
        self._at: int | None = None
        self._job: Job | None = None
        self._hub: Any = None
        self._unheard: list[Event] = []
        for owner, name in ((Hub, "join"), (Following, "find"), (Writer, "room")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))

    def begin(self, job: Job, at: int) -> None:
        """Have events at one step from now on, or with 0 at each."""
        self._job, self._at, self.count = job, at, 0

    def end(self) -> None:
        self._at = None
        self._hear()

    def is_live(self) -> bool:
        assert self._job is not None
        listeners = self._hub._listeners.get(group(UUID(self._job.id)), ())
        return bool(listeners) and all(listener.live for listener in listeners)

    def _around(self, original: Any) -> Any:
        async def stepping(owner: Any, *args: Any) -> Any:
            if hasattr(owner, "restored"):
                self._hub = owner
            await self._step()
            result = await original(owner, *args)
            await self._step()
            return result

        return stepping

    async def _step(self) -> None:
        if self._at is None or self._job is None:
            return
        self.count += 1
        self._hear()
        # Each event may cause a step.
        if self._at == self.count or (self._at == 0 and self.count < 30):
            self._unheard += [await self._job.commit("log"), await self._job.commit("progress", {"done": self.count})]
            if not self._late:
                self._hear()

    def _hear(self) -> None:
        for event in self._unheard:
            self._hub._spread(group(event.job_id), self._layer.serialize(message(event)))
        self._unheard.clear()


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a step later"])
async def test_an_event_between_any_two_steps_is_told_once(
    stopped: Stopped, layer: Layer, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    steps = Steps(layer, monkeypatch, late=late)
    most = at = 0
    while at <= most:
        job = await stopped.job()
        async with live(stopped.http) as socket:
            steps.begin(job, at)
            await socket.ask("subscribe", jobs=[{"job": job.id}])
            await socket.until(lambda frame: frame["t"] == "snapshot")
            await until(steps.is_live)
            steps.end()
            await job.publish([await job.commit("log"), await job.end()])
            job.check(await socket.end(job.id))
        most = max(most, min(steps.count, 12))
        at += 1
    assert most >= 6


async def test_events_out_of_turn_twice_and_lost(stopped: Stopped) -> None:
    job = await stopped.job()
    async with live(stopped.http) as socket:
        await socket.ask("subscribe", jobs=[{"job": job.id}])
        await socket.until(lambda frame: frame["t"] == "snapshot")
        for _ in range(20):
            a, b, c, d = [await job.commit(type) for type in ("log", "progress", "log", "progress")]
            await job.publish([c, b, d, c, a])
        lost = [await job.commit("log") for _ in range(1500)]
        await job.publish([lost[700], await job.commit("log"), lost[3]])
        await job.publish([await job.end()])
        frames = await socket.end(job.id)
    job.check(frames)
    assert len([frame for frame in frames if frame["t"] == "log"]) == 40 + 1501


async def test_of_much_progress_the_newest_is_told(stopped: Stopped) -> None:
    job = await stopped.job()
    async with live(stopped.http) as socket, stream(stopped.http, f"/jobs/{job.id}/events") as events:
        await socket.ask("subscribe", jobs=[{"job": job.id}])
        await socket.until(lambda frame: frame["t"] == "snapshot")
        await events.recv()
        first, *reports = [await job.commit("progress", {"done": done}) for done in range(500)]
        await job.publish([first])
        await socket.until(lambda frame: frame["t"] == "progress" and frame["d"]["done"] == 0)
        for place in range(0, len(reports), 10):
            await job.publish(reports[place : place + 10])
        newest = await socket.until(lambda frame: frame.get("seq") == reports[-1].seq)
        assert newest["d"]["done"] == 499
        told = socket.of(job.id, "progress")
        assert len(told) < 250
        assert any(frame["prev"] < frame["seq"] - 1 for frame in told)
        await job.publish([await job.end()])
        job.check(await socket.end(job.id))
        job.check([frame for frame in await events.rest() if "seq" in frame])


async def test_redis_is_lost_wiped_and_back(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    """All that is followed is compared with the record in one query, and nothing is missed or comes twice."""
    url = settings.redis_url.get_secret_value()
    port = urlsplit(url).port
    assert port is not None
    async with Proxy(port) as proxy:
        through = settings.model_copy(update={"redis_url": SecretStr(url.replace(str(port), str(proxy.port)))})
        async with worker(settings), idle(through, tenant) as http, live(http) as one, live(http) as two:
            jobs = [(await submit(http, seconds=4))["id"] for _ in range(8)]
            for socket in (one, two):
                await socket.ask("subscribe", jobs=[{"job": job} for job in jobs], sets=[{"set": "all"}])
            await one.until(lambda frame: frame["t"] == "progress")
            before = rechecks()
            proxy.reset()
            await redis.flushall()
            await until(lambda: rechecks() == before + 1)
            proxy.blackhole()
            proxy.reset()
            await asyncio.sleep(0)
            proxy.restore()
            for socket in (one, two):
                for job in jobs:
                    frames = [frame for frame in await socket.end(job) if "set" not in frame]
                    assert frames[-1]["d"]["state"] == "succeeded"
            async with asyncio.timeout(10):
                for socket in (one, two):
                    while len(ended_in_set(socket)) < len(jobs):
                        await socket.recv()


def ended_in_set(socket: Socket) -> set[str]:
    return {frame["job"] for frame in socket.frames if "set" in frame and frame["d"].get("state") == "succeeded"}


def rechecks() -> float:
    return REGISTRY.get_sample_value("headway_live_rechecks_total") or 0


async def test_a_web_process_that_stops_tells_all_and_waits_for_no_stalled_peer(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection
) -> None:
    """SIGTERM with many sockets, some of which do not read: the others get `bye` and 1012, and it is done in 10 s."""
    healthy, stalled = 100, 10
    async with idle(settings, tenant) as http:
        jobs = [(await submit(http))["id"] for _ in range(12)]
        await database.execute("UPDATE jobs SET input = to_jsonb(repeat('x', 900000))")
    port, ops = free_ports(), free_ports()
    environment = {"HEADWAY_PORT": str(port), "HEADWAY_OPS_PORT": str(ops), "HEADWAY_CONNECTIONS": "2000"}
    environment |= {"HEADWAY_DRAIN": "20"}
    async with (
        process(settings, "services.web", port=port, **environment) as running,
        httpx.AsyncClient(trust_env=False, verify=False) as http,
    ):
        peers = []
        for _ in range(healthy):
            peers.append(await Raw.open(port, tenant.api_key))
            peers[-1].send({"t": "subscribe", "id": 1, "sets": [{"set": "none", "tag": "none"}]})
        asleep = [await Raw.open(port, tenant.api_key, narrow=True) for _ in range(stalled)]
        for peer in asleep:
            for job in jobs:
                peer.send({"t": "subscribe", "id": 1, "jobs": [{"job": job}]})

        async def full() -> bool:
            """More than what fits into the buffers between us has been given to each."""
            metrics = (await http.get(f"http://127.0.0.1:{ops}/metrics")).text
            assert f"headway_ws_connections {healthy + stalled}.0" in metrics
            sent = re.search(r'headway_ws_frames_total{type="snapshot"} ([0-9.e+]+)', metrics)
            return sent is not None and float(sent[1]) >= 3 * stalled

        await until(full, 30)
        began = asyncio.get_running_loop().time()
        running.terminate()
        ends = await asyncio.gather(*(peer.rest() for peer in peers))
        assert await asyncio.wait_for(running.wait(), 10) == 0
        assert asyncio.get_running_loop().time() - began < 10
        for end in ends:
            assert end.endswith(BYE + RESTART)
        for peer in (*peers, *asleep):
            peer.writer.transport.abort()


class Raw:
    """A WebSocket as bytes: many of them cost little."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, key: str, *, narrow: bool = False) -> "Raw":
        sock = net.socket()
        if narrow:
            sock.setsockopt(net.SOL_SOCKET, net.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
        writer.write(
            f"GET /ws/v1 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert b"101" in await reader.readline()
        return cls(reader, writer)

    def send(self, command: dict[str, Any]) -> None:
        """Send a short command, masked by zeros."""
        text = json.dumps(command).encode()
        assert len(text) < 126
        self.writer.write(bytes([0x81, 0x80 | len(text)]) + bytes(4) + text)

    async def rest(self) -> bytes:
        """All that comes, up to the end; a close frame is answered."""
        received = b""
        while piece := await self.reader.read(65536):
            received += piece
            if received.endswith(RESTART):
                self.writer.write(b"\x88\x82" + bytes(4) + RESTART[2:])
        return received
