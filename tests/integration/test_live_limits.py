"""What a client may do on a socket, what it is told when it does more, and that nobody else is disturbed."""

import asyncio
import json
import socket as net
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from headway.events import Layer, group, message
from headway.job import Event
from headway.settings import Settings
from tests.conftest import Tenant, until
from tests.integration.live_clients import live, stream
from tests.integration.test_api_jobs import idle, submit

PATIENCE = 40.0


@pytest.fixture
async def http(settings: Settings, redis: Redis, tenant: Tenant) -> Any:
    async with idle(settings, tenant) as http:
        yield http


async def test_a_socket_has_256_subscriptions(http: httpx.AsyncClient) -> None:
    jobs = [(await submit(http))["id"] for _ in range(200)]
    async with live(http) as socket:
        await socket.ask("subscribe", jobs=[{"job": job} for job in jobs])
        await socket.ask("subscribe", sets=[{"set": str(number), "tag": "none"} for number in range(56)])
        # What is subscribed to already may be so anew.
        error = await socket.ask("subscribe", jobs=[{"job": str(uuid4())}])
        assert (error["t"], error["d"]["type"]) == ("error", "urn:headway:problem:too-many")
        await socket.ask("unsubscribe", jobs=jobs[:1])
        assert (await socket.ask("subscribe", jobs=[{"job": jobs[0]}]))["d"] == {"jobs": [jobs[0]]}
        await socket.ws.send(json.dumps({"t": "subscribe", "id": 1, "jobs": [{"job": str(uuid4())}]}))
        assert (await socket.closed())[0] == 4505


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", 4500),
        ("[]", 4500),
        ('[{"t":"pong","id":1}]', 4500),
        ('{"t":"pong"}', 4500),
        ('{"t":"pong","id":1.5}', 4500),
        ('{"t":"pong","id":true}', 4500),
        ('{"t":"pong","id":"' + "x" * 65 + '"}', 4500),
        ('{"t":"pong","id":1,"id":2}', 4500),
        ('{"t":"pong","id":"\\ud800"}', 4500),
        (b"\x00\xff", 4500),
        ('{"t":"pong","id":1,"x":"' + "x" * (16 << 10) + '"}', 1009),
        ("[" * 16_000, 4500),
    ],
)
async def test_frames_that_cannot_be_answered(http: httpx.AsyncClient, frame: str | bytes, code: int) -> None:
    async with live(http) as other, live(http) as socket:
        await socket.ws.send(frame)
        assert (await socket.closed())[0] == code
        assert (await other.ask("pong"))["t"] == "ack"


async def test_wrong_commands_are_answered(http: httpx.AsyncClient) -> None:
    async with live(http) as socket:
        for wrong, field in (
            ({"t": "dance"}, "t"),
            ({"t": "subscribe", "job": str(uuid4())}, "subscribe.job"),
            ({"t": "subscribe", "jobs": [{"job": "x"}]}, "jobs.0.job"),
            ({"t": "subscribe", "jobs": [{"job": str(uuid4()), "since": -1}]}, "jobs.0.since"),
            ({"t": "subscribe", "sets": [{"set": "x" * 65}]}, "sets.0.set"),
            ({"t": "subscribe", "sets": [{"set": "x", "tag": ""}]}, "sets.0.tag"),
            ({"t": "refresh"}, "jobs"),
        ):
            error = await socket.ask(**wrong)
            assert (error["t"], error["d"]["type"]) == ("error", "urn:headway:problem:invalid-request"), error
            assert field.split(".")[-1] in error["d"]["detail"]
        assert (await socket.ask("subscribe"))["t"] == "error"
        assert (await socket.ask("pong"))["t"] == "ack"


async def test_a_flood_of_commands(http: httpx.AsyncClient) -> None:
    job = (await submit(http))["id"]
    async with live(http) as other, live(http) as socket:
        await other.ask("subscribe", jobs=[{"job": job}])
        with pytest.raises(ConnectionClosed):
            for number in range(10_000):
                await socket.ws.send(json.dumps({"t": "pong", "id": number}))
            await socket.closed()
            raise ConnectionClosed(None, None)
        assert (await socket.closed())[0] == 4013
        await http.post(f"/api/v1/jobs/{job}/cancel")
        assert (await other.end(job))[-1]["d"]["state"] == "cancelled"


async def test_a_key_has_so_many_connections(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    few = settings.model_copy(update={"connections": 3})
    async with idle(few, tenant) as http:
        job = (await submit(http))["id"]
        async with live(http), live(http) as second, stream(http, f"/jobs/{job}/events"):
            ws = connect(
                str(http.base_url).replace("http", "ws") + "/ws/v1",
                additional_headers={"Authorization": http.headers["Authorization"]},
                proxy=None,
            )
            async with ws as third:
                with pytest.raises(ConnectionClosed) as closed:
                    await third.recv()
                assert closed.value.rcvd is not None
                assert (closed.value.rcvd.code, closed.value.rcvd.reason[:12]) == (4504, "A key or use")
            refused = await http.get(f"/api/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})
            assert (refused.status_code, refused.json()["type"]) == (429, "urn:headway:problem:too-many")
            await second.ws.close()
            await until(lambda: _opens(http))


async def _opens(http: httpx.AsyncClient) -> bool:
    try:
        async with live(http):
            return True
    except ConnectionClosed:
        return False


async def test_who_does_not_subscribe_and_who_stays_too_long_is_let_go(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import session, sessions

    job = (await submit(http))["id"]
    monkeypatch.setattr(sessions, "FIRST_SUBSCRIBE_WITHIN", 0.1)
    async with live(http) as idle, live(http) as following:
        await following.ask("subscribe", jobs=[{"job": job}])
        assert (await idle.closed())[0] == 4500
        assert (await following.ask("pong"))["t"] == "ack"
    monkeypatch.setattr(sessions, "FIRST_SUBSCRIBE_WITHIN", 10.0)
    monkeypatch.setattr(session, "OLDEST", 1.0)
    async with live(http) as old, stream(http, f"/jobs/{job}/events") as events:
        await old.ask("subscribe", jobs=[{"job": job}])
        assert (await old.closed())[0] == 4000
        assert [frame["t"] for frame in await events.rest()] == ["snapshot"]


async def test_heartbeats_tell_how_far_all_is(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.web.live import session

    monkeypatch.setattr(session, "HEARTBEAT", 0.5)
    job = await submit(http)
    async with live(http) as socket, stream(http, f"/jobs/{job['id']}/events") as events:
        await socket.ask("subscribe", jobs=[{"job": job["id"]}], sets=[{"set": "all"}])
        hb = await socket.until(lambda frame: frame["t"] == "hb" and "cursor" in frame["d"])
        assert hb["d"]["jobs"] == {job["id"]: 1}
        await events.recv()
        await socket.until(lambda frame: frame["t"] == "hb")
        await http.post(f"/api/v1/jobs/{job['id']}/cancel")
        await events.rest()
        assert events.comments >= 1


async def test_a_lost_message_is_found_before_the_heartbeat(
    http: httpx.AsyncClient, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import session
    from tests.integration.test_live_jobs import write

    job = (await submit(http))["id"]
    monkeypatch.setattr(session, "HEARTBEAT", 0.5)
    async with live(http) as socket:
        await socket.ask("subscribe", jobs=[{"job": job}])
        await write(database, job, 2, end=True)
        frames = await socket.end(job)
    assert [frame["seq"] for frame in frames] == [1, 2, 3, 4]


def narrow(http: httpx.AsyncClient) -> net.socket:
    """A connection whose client takes in little before it reads."""
    sock = net.socket()
    sock.setsockopt(net.SOL_SOCKET, net.SO_RCVBUF, 4096)
    sock.connect((http.base_url.host, http.base_url.port))
    sock.setblocking(False)
    return sock


async def test_a_slow_reader_is_cut_off_and_others_go_on(
    settings: Settings, redis: Redis, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what waits for it, long before its time is up."""
    from services.web.live import sessions

    monkeypatch.setattr(sessions, "PATIENCE", PATIENCE)
    layer = Layer(settings.redis_url.get_secret_value())
    data = {"message": "x" * 8000, "level": "info", "at": "2026-01-01T00:00:00.000Z"}
    async with idle(settings, tenant) as http:
        job = (await submit(http))["id"]
        async with live(http) as quick, live(http, sock=narrow(http), max_queue=1) as slow:
            for socket in (quick, slow):
                await socket.ask("subscribe", jobs=[{"job": job}])
                await socket.until(lambda frame: frame["t"] == "snapshot")
            began = asyncio.get_running_loop().time()
            for first in range(2, 2002, 20):
                events = [Event(UUID(job), tenant.id, 1, seq, "log", data) for seq in range(first, first + 20)]
                await layer.group_send_all([(group(UUID(job)), message(event)) for event in events])
                for _ in events:
                    await quick.until(lambda frame: frame["t"] == "log")
            assert asyncio.get_running_loop().time() - began < PATIENCE
            assert quick.frames[-1]["seq"] == 2001
            assert (await slow.closed(20))[0] == 4008
    await layer.flush()
    await layer.redis.aclose()
