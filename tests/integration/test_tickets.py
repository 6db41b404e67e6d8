"""Tickets: what a browser connects with. One use, within seconds, from one origin, for what they say."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis

from headway import settings as headway_settings
from headway.errors import InvalidSettings, OriginRefused, Unauthenticated
from headway.settings import Settings
from headway.store import Store
from services.web.api.auth import Keyring, Principal
from tests.conftest import Tenant
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_jobs import idle

TICKETS = "/api/v1/ws-tickets"
APP = "https://app.example"


@pytest.fixture
async def http(settings: Settings, redis: Redis, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings.model_copy(update={"origins": (APP,)}), tenant) as http:
        yield http


@pytest.fixture
async def tickets(settings: Settings, redis: Redis) -> AsyncIterator[Any]:
    """The tickets as another process has them, and its keyring."""
    from services.web.api.tickets import Tickets  # Django must be set up

    store = Store(settings.database_url.get_secret_value(), pool=2)
    await store.open()
    yield Tickets(redis, Keyring(store, settings.key_pepper.get_secret_value()))
    await store.close()


async def ticket(http: httpx.AsyncClient, origin: str = APP, **wanted: Any) -> str:
    answer = await http.post(TICKETS, json={"origin": origin, **wanted})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


async def test_a_ticket_is_good_once_for_whom_it_was_issued(
    http: httpx.AsyncClient, tickets: Any, tenant: Tenant
) -> None:
    job_id = uuid4()
    answer = await http.post(
        TICKETS,
        json={"origin": APP, "user": "ada", "jobs": [str(job_id)], "rooms": ["lobby"], "publish": False},
    )
    assert answer.headers["Cache-Control"] == "no-store"
    left = (datetime.fromisoformat(answer.json()["expires_at"]) - datetime.now(UTC)).total_seconds()
    assert 25 < left < 32
    one = answer.json()["ticket"]
    redeemed = await asyncio.gather(*(tickets.redeem(one, APP, own=None) for _ in range(20)), return_exceptions=True)
    [principal] = [each for each in redeemed if not isinstance(each, Unauthenticated)]
    rights = frozenset({job_id}), frozenset({"lobby"})
    assert principal == Principal(tenant.id, tenant.key_id, "ada", *rights, publish=False)
    plain = await tickets.redeem(await ticket(http), APP, own=None)
    assert plain == Principal(tenant.id, tenant.key_id, "test")


async def test_redis_has_nothing_that_could_be_shown_in_its_place(http: httpx.AsyncClient, redis: Redis) -> None:
    one = await ticket(http)
    [name] = await redis.keys("headway:ticket:*")
    assert name.decode() == f"headway:ticket:{sha256(one.encode()).hexdigest()}"
    assert 25 < await redis.ttl(name) <= 30
    assert one not in (await redis.get(name)).decode()
    assert len(one) == 43


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example", f"{APP}:8443", "null", None])
async def test_a_ticket_shown_from_elsewhere_is_refused_and_used_up(
    http: httpx.AsyncClient, tickets: Any, origin: str | None
) -> None:
    one = await ticket(http)
    with pytest.raises(OriginRefused):
        await tickets.redeem(one, origin, own="http://localhost")
    with pytest.raises(Unauthenticated):
        await tickets.redeem(one, APP, own=None)


async def test_expired_forged_and_foreign_tickets_are_refused(
    http: httpx.AsyncClient, tickets: Any, redis: Redis, tenant: Tenant, database: asyncpg.Connection
) -> None:
    one = await ticket(http)
    [name] = await redis.keys("headway:ticket:*")
    await redis.pexpire(name, 1)
    await asyncio.sleep(0.01)
    for bad in (one, "", "x" * 43, "\ud800"):
        with pytest.raises(Unauthenticated):
            await tickets.redeem(bad, APP, own=None)
    one = await ticket(http)
    await database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", tenant.key_id)
    with pytest.raises(Unauthenticated, match="revoked"):
        await tickets.redeem(one, APP, own=None)


async def test_only_known_origins_get_a_ticket(http: httpx.AsyncClient) -> None:
    own = str(http.base_url).rstrip("/")
    assert await ticket(http, own)
    port = own.rpartition(":")[2]
    bad = [
        f"{own}/",
        own.replace("http", "https"),
        "http://127.0.0.1",
        f"http://evil.example:{port}",
        "https://evil.app.example",
    ]
    for origin in (*bad, "https://app.example.evil", "HTTPS://APP.EXAMPLE", f"{APP}/", "null", "*", ""):
        body = refused(await http.post(TICKETS, json={"origin": origin}), 422, "invalid-request")
        assert "HEADWAY_ORIGINS" in body["detail"]
    # A host that is not answered is nobody's own.
    headers = {"Host": "evil.example"}
    refused(await http.post(TICKETS, json={"origin": "http://evil.example"}, headers=headers), 422, "invalid-request")


@pytest.mark.parametrize(
    "wrong",
    [
        {"user": ""},
        {"user": "x" * 65},
        {"user": "a\u202eb"},
        {"user": " a"},
        {"user": "a\nb"},
        {"user": 1},
        {"jobs": ["x"]},
        {"jobs": [str(UUID(int=1))] * 257},
        {"rooms": ["-"]},
        {"rooms": ["a"] * 257},
        {"publish": "yes"},
        {"tenant": "x"},
    ],
)
async def test_what_a_ticket_cannot_say_is_refused(http: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    refused(await http.post(TICKETS, json={"origin": APP, **wrong}), 422, "invalid-request")
    refused(await http.post(TICKETS, json=wrong), 422, "invalid-request")


async def test_without_redis_there_are_no_tickets(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0"), "origins": (APP,)})
    async with idle(away, tenant) as http:
        answer = await http.post(TICKETS, json={"origin": APP})
        assert refused(answer, 503, "unavailable")["detail"].startswith("Redis")
        assert answer.headers["Retry-After"]
        refused(await http.get("/api/v1/rooms/lobby/presence"), 503, "unavailable")


def test_origins_are_checked_at_start() -> None:
    least = {
        "HEADWAY_DATABASE_URL": "postgresql://db/headway",
        "HEADWAY_REDIS_URL": "redis://redis/0",
        "HEADWAY_SECRET_KEY": "x" * 40,
        "HEADWAY_KEY_PEPPER": "x" * 40,
    }
    fine = "https://app.example, http://localhost:3000,http://[::1]:3000,https://xn--mnchen-3ya.example"
    assert len(headway_settings.load({**least, "HEADWAY_ORIGINS": fine}).origins) == 4
    for bad in (
        "*",
        "app.example",
        "https://app.example/",
        "https://App.example",
        "https://*.example",
        "null",
        "ws://a",
        "https://a:443",
        "http://a:80",
        "https://u@a",
        "https://a?b",
        "https://a:x",
    ):
        with pytest.raises(InvalidSettings, match="HEADWAY_ORIGINS"):
            headway_settings.load({**least, "HEADWAY_ORIGINS": bad})
