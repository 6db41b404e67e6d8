"""Other people's clients follow jobs of a running service, straight and through nginx."""

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import jsonschema_rs
import pytest
from httpx_sse import aconnect_sse
from websockets.asyncio.client import connect

from headway.client import Client
from headway.settings import Settings
from tests.browser.conftest import HERE, check, followers, nginx, node
from tests.conftest import Tenant, until, worker

Frame = dict[str, Any]


@pytest.fixture(params=["straight", "nginx"])
async def url(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> AsyncIterator[str]:
    """The service, straight or through nginx."""
    async with AsyncExitStack() as stack:
        yield url if request.param == "straight" else await stack.enter_async_context(nginx(url, tmp_path))


def parsed(lines: list[str]) -> list[Frame]:
    read = [json.loads(line) for line in lines]
    return [frame for item in read for frame in (item if isinstance(item, list) else [item])]


def to_ws(url: str) -> str:
    return url.replace("http", "ws", 1)


async def test_ws_of_npm(tenant: Tenant, url: str, job: str) -> None:
    *lines, code = await node("ws.mjs", f"{to_ws(url)}/ws/jobs/{job}", tenant.api_key)
    check(parsed(lines))
    assert code == "1000"


async def test_ws_of_npm_speaks_the_protocol(tenant: Tenant, url: str, job: str) -> None:
    subscribe = json.dumps({"t": "subscribe", "id": 1, "jobs": [{"job": job}]})
    *lines, code = await node("ws.mjs", f"{to_ws(url)}/ws/v1", tenant.api_key, subscribe)
    check(parsed(lines))
    assert code == "1000"


async def test_wscat_of_npm(tenant: Tenant, url: str, job: str) -> None:
    authorization = f"Authorization:Bearer {tenant.api_key}"
    wscat = ("node_modules/wscat/bin/wscat", "--no-color", "-H", authorization, "-c")
    lines = await node(*wscat, f"{to_ws(url)}/ws/jobs/{job}")
    check(parsed(lines))


async def test_eventsource_of_npm_ends_with_the_job(tenant: Tenant, url: str, job: str) -> None:
    *lines, end = await node("eventsource.mjs", f"{url}/api/v1/jobs/{job}/events", tenant.api_key)
    check(parsed(lines))
    assert end == "closed"


async def test_websockets_of_pypi(tenant: Tenant, url: str, job: str) -> None:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with connect(f"{to_ws(url)}/ws/jobs/{job}", additional_headers=headers, proxy=None) as socket:
        check(parsed([str(frame) async for frame in socket]))


async def test_aiohttp_of_pypi(tenant: Tenant, url: str, job: str) -> None:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    address = f"{url}/ws/jobs/{job}"
    async with aiohttp.ClientSession(headers=headers) as session, session.ws_connect(address) as socket:
        check(parsed([frame.data async for frame in socket]))


async def test_httpx_sse_of_pypi_resumes(tenant: Tenant, url: str, job: str) -> None:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    path = f"{url}/api/v1/jobs/{job}/events"
    events = []
    async with httpx.AsyncClient(headers=headers, trust_env=False, timeout=30) as http:
        async with aconnect_sse(http, "GET", path) as source, aclosing(source.aiter_sse()) as stream:
            async for event in stream:
                events.append(event)
                if event.event == "progress":
                    break
        async with aconnect_sse(http, "GET", path, headers={"Last-Event-ID": events[-1].id}) as source:
            events += [event async for event in source.aiter_sse()]
    # What only says when to connect again comes as an event without data.
    check([event.json() for event in events if event.data])


async def test_the_python_client_follows_watches_and_talks(settings: Settings, tenant: Tenant, url: str) -> None:
    async with Client(url, tenant.api_key) as client, worker(settings):
        room = client.room("ops")
        listening = asyncio.create_task(collect(room, lambda frame: frame["t"] == "message"))
        watching = asyncio.create_task(collect(client.watch(tag="t"), Endings(3)))
        await until(lambda: followers() == 1)
        jobs = [await client.submit("demo.countdown", {"seconds": 0.3}, tags=["t"]) for _ in range(3)]
        ended = await asyncio.gather(*(client.wait(job["id"]) for job in jobs))
        assert [job["state"] for job in ended] == ["succeeded"] * 3
        # One socket for all of it.
        assert followers() == 1
        await room.send("all done")
        assert (await listening)[-1]["d"]["message"] == "all done"
        seen = await watching
    for job in jobs:
        envelopes = [envelope for envelope in seen if envelope["job"] == job["id"]]
        numbers = [envelope["seq"] for envelope in envelopes]
        assert numbers == sorted(set(numbers))
        assert (envelopes[0]["t"], envelopes[-1]["d"]["state"]) == ("snapshot", "succeeded")


class Endings:
    """Whether so many jobs have ended."""

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self, frame: Frame) -> bool:
        self._left -= frame["t"] in ("snapshot", "state") and frame["d"]["state"] == "succeeded"
        return self._left == 0


async def collect(frames: AsyncIterable[Frame], last: Callable[[Frame], bool]) -> list[Frame]:
    """Frames up to the last."""
    found = []
    async with aclosing(aiter(frames)) as reading:
        async for frame in reading:
            found.append(frame)
            if last(frame):
                break
    return found


async def test_the_description_is_asyncapi(url: str) -> None:
    schema = json.loads((HERE / "node_modules/@asyncapi/specs/schemas/3.1.0.json").read_text())
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        document = (await http.get("/api/v1/asyncapi.json")).json()
    jsonschema_rs.validator_for(schema).validate(document)
