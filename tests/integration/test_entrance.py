"""Getting in: what opens a socket or a stream and what does not, and that no log has a key or a ticket."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from headway import keys
from headway.settings import Settings
from tests.conftest import Tenant, until
from tests.integration.room_clients import Client, client, ticket
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_jobs import idle, submit
from tests.integration.test_auth import add_key
from tests.integration.test_live import process
from tests.ports import free_ports

APP = "https://app.example"
PATHS = ("/ws/v1", "/ws/rooms/lobby")


@pytest.fixture
async def http(settings: Settings, redis: Redis, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings.model_copy(update={"origins": (APP,)}), tenant) as http:
        yield http


def own(http: httpx.AsyncClient) -> str:
    return str(http.base_url).rstrip("/")


async def opened(one: Client) -> bool:
    """Whether the socket is told anything but its end."""
    await until(lambda: one.frames or one.closed)
    return bool(one.frames)


@pytest.mark.parametrize("path", PATHS)
async def test_a_key_opens_a_socket_from_anywhere_but_a_foreign_page(http: httpx.AsyncClient, path: str) -> None:
    for origin in (None, own(http), APP):
        async with client(http, path, origin=origin) as one:
            assert await opened(one), origin
    for origin in ("https://evil.example", "null", f"{APP}.evil", own(http).replace("http", "https"), ""):
        async with client(http, path, origin=origin) as one:
            assert (await one.ended())[0] == 4503, origin
    async with client(http, path, origin="http://evil.example", headers={"Host": "evil.example"}) as one:
        assert (await one.ended())[0] == 4503
    for key in ("", "x"):
        async with client(http, path, key=key) as one:
            assert (await one.ended())[0] == 4501


@pytest.mark.parametrize("path", PATHS)
async def test_a_ticket_opens_one_socket_from_its_own_origin(http: httpx.AsyncClient, path: str) -> None:
    for origin in (own(http), APP):
        one = await ticket(http, origin=origin)
        async with client(http, path, ticket=one, origin=origin) as first:
            assert await opened(first)
            assert first.ws.subprotocol == "jobs.v1"
        async with client(http, path, ticket=one, origin=origin) as replay:
            assert (await replay.ended())[0] == 4001
    for origin in (own(http), None, "https://evil.example"):
        one = await ticket(http, origin=APP)
        async with client(http, path, ticket=one, origin=origin) as wrong:
            assert (await wrong.ended())[0] == 4503, origin
        async with client(http, path, ticket=one, origin=APP) as used:
            assert (await used.ended())[0] == 4001


async def test_no_cookie_counts_and_no_ticket_in_the_address(http: httpx.AsyncClient, tenant: Tenant) -> None:
    cookies = {"Cookie": f"sessionid=x; key={tenant.api_key}; Authorization=Bearer {tenant.api_key}"}
    for path in PATHS:
        async with client(http, path, key="", headers=cookies, origin=own(http)) as one:
            assert (await one.ended())[0] == 4501
        async with client(http, f"{path}?ticket={await ticket(http)}", key="", origin=own(http)) as one:
            assert (await one.ended())[0] in (4501, 4500)


async def test_without_redis_a_ticket_is_refused_for_now(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    async with idle(away, tenant) as http:
        async with client(http, "/ws/v1", ticket="x" * 43, origin=own(http)) as one:
            assert (await one.ended())[0] == 1013
        async with client(http, "/ws/v1") as one:
            assert await opened(one)


async def test_sockets_and_streams_end_within_five_seconds_of_their_key(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    revoked, brief = (
        await add_key(database, tenant),
        await add_key(database, tenant, datetime.now(UTC) + timedelta(hours=1)),
    )
    job_id = (await submit(http))["id"]
    bearer = {"Authorization": f"Bearer {revoked.text}"}
    issued = (await http.post("/api/v1/ws-tickets", json={"origin": APP}, headers=bearer)).json()["ticket"]
    unused = (await http.post("/api/v1/ws-tickets", json={"origin": APP}, headers=bearer)).json()["ticket"]

    told = asyncio.Event()

    async def stream() -> None:
        headers = {**bearer, "Accept": "text/event-stream"}
        async with http.stream("GET", f"/api/v1/jobs/{job_id}/events", headers=headers, timeout=10) as answer:
            async for line in answer.aiter_lines():
                if "snapshot" in line:
                    told.set()

    async with (
        client(http, "/ws/v1", key=revoked.text) as by_key,
        client(http, "/ws/v1", ticket=issued, origin=APP) as by_ticket,
        client(http, "/ws/rooms/lobby", key=brief.text) as in_a_room,
        client(http, "/ws/v1") as other,
    ):
        streaming = asyncio.create_task(stream())
        for one in (by_key, by_ticket, in_a_room, other):
            assert await opened(one)
        await told.wait()
        began = time.monotonic()
        await database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", revoked.id)
        await database.execute("UPDATE api_keys SET expires_at = now() WHERE id = $1", brief.id)
        for one in (by_key, by_ticket, in_a_room):
            code, reason = await one.ended()
            assert (code, "revoked" in reason) == (4001, True)
        await streaming
        assert time.monotonic() - began < 5
        assert other.closed is None
        async with client(http, "/ws/v1", ticket=unused, origin=APP) as late:
            assert (await late.ended())[0] == 4001


async def test_a_ticket_opens_a_stream_and_nothing_else(http: httpx.AsyncClient, tenant: Tenant) -> None:
    job_id, other = (await submit(http))["id"], (await submit(http))["id"]
    path, accept = f"/api/v1/jobs/{job_id}/events", {"Accept": "text/event-stream"}
    bare = httpx.AsyncClient(base_url=http.base_url, trust_env=False, verify=False)
    async with bare:

        async def first(query: str, path: str = path, **headers: str) -> tuple[int, str, httpx.Headers]:
            async with bare.stream("GET", f"{path}?{query}", headers={**accept, **headers}) as answer:
                if answer.status_code != 200:
                    return answer.status_code, (await answer.aread()).decode(), answer.headers
                return 200, await anext(answer.aiter_lines()), answer.headers

        one = await ticket(http)
        status, line, headers = await first(f"ticket={one}")
        assert (status, "Access-Control-Allow-Origin" in headers) == (200, False), line
        assert (await first(f"ticket={one}"))[0] == 401
        status, _, headers = await first(f"ticket={await ticket(http, origin=APP)}", Origin=APP)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, APP)
        # A page of another origin always says so.
        assert (await first(f"ticket={await ticket(http, origin=APP)}"))[0] == 403
        assert (await first(f"ticket={await ticket(http)}", Origin="https://evil.example"))[0] == 403
        assert (await first(f"ticket={await ticket(http, jobs=[other])}"))[0] == 404
        assert (await first(f"ticket={await ticket(http, jobs=[job_id])}"))[0] == 200
        for method, url in (
            ("GET", "/api/v1/jobs"),
            ("GET", f"/api/v1/jobs/{job_id}"),
            ("POST", f"/api/v1/jobs/{job_id}/cancel"),
        ):
            answer = await bare.request(method, f"{url}?ticket={await ticket(http)}", headers=accept)
            refused(answer, 401, "unauthenticated")
        answer = await bare.get(f"{path}?ticket={await ticket(http)}", headers={"Accept": "application/json"})
        refused(answer, 401, "unauthenticated")


async def shown(http: httpx.AsyncClient, tenant: Tenant) -> list[str]:
    """Show keys and tickets wherever they can be shown, rightly and wrongly; what was shown."""
    job_id = (await submit(http))["id"]
    key = keys.parse(tenant.api_key)
    assert key is not None
    tickets = [await ticket(http) for _ in range(6)]
    for path in PATHS:
        async with client(http, path, ticket=tickets.pop(), origin=own(http)) as one:
            assert await opened(one)
        async with client(http, path) as one:
            assert await opened(one)
    wrong = [tickets[0], tickets[0] + "x"]
    for one_ticket in wrong:
        async with client(http, "/ws/v1", ticket=one_ticket, origin="https://evil.example") as one:
            await one.ended()
        async with client(http, f"/ws/rooms/lobby?ticket={one_ticket}", key="") as one:
            await one.ended()
        async with client(http, f"/ws/v1?ticket={one_ticket}&key={tenant.api_key}", key="") as one:
            await one.ended()
    async with httpx.AsyncClient(base_url=http.base_url, trust_env=False, verify=False) as bare:
        url = f"/api/v1/jobs/{job_id}/events?ticket={tickets[1]}"
        async with bare.stream("GET", url, headers={"Accept": "text/event-stream"}) as answer:
            assert answer.status_code == 200
        for _ in range(2):
            assert (await bare.get(url, headers={"Accept": "text/event-stream"})).status_code == 401
        assert (await bare.get(f"/api/v1/jobs?ticket={tickets[1]}&key={tenant.api_key}")).status_code == 401
        assert (
            await bare.get("/api/v1/nowhere", headers={"Authorization": f"Bearer {tenant.api_key}x"})
        ).status_code == 404
    return [*wrong, *tickets, key.secret]


@pytest.mark.parametrize(
    "command",
    [("services.web",), ("daphne", "-v", "0", "-b", "127.0.0.1", "-p", "PORT", "services.web.asgi:application")],
    ids=["uvicorn", "daphne"],
)
async def test_no_log_line_has_a_key_or_a_ticket(
    settings: Settings, redis: Redis, tenant: Tenant, command: tuple[str, ...]
) -> None:
    port = free_ports()
    async with idle(settings, tenant) as ours:
        headers = dict(ours.headers)
    running = [str(port) if part == "PORT" else part for part in command]
    async with (
        process(
            settings,
            *running,
            port=port,
            HEADWAY_PORT=str(port),
            HEADWAY_OPS_PORT="0",
            HEADWAY_LOG_LEVEL="DEBUG",
        ),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, verify=False) as http,
    ):
        secrets = await shown(http, tenant)
    log = (settings.home / "log").read_text()
    assert "request" in log
    for secret in secrets:
        assert secret not in log, [line for line in log.splitlines() if secret in line]
