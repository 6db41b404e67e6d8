"""API keys: who is let in, and how soon who is not any more."""

import time
from datetime import UTC, datetime, timedelta

import asyncpg
import httpx
import pytest

from headway import keys
from headway.settings import Settings
from services.web.api import auth
from tests.conftest import PEPPER, Tenant, until
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_jobs import idle, submit

ENDPOINTS = (
    ("GET", "/api/v1/jobs"),
    ("POST", "/api/v1/jobs"),
    ("GET", "/api/v1/jobs/00000000-0000-0000-0000-000000000000"),
    ("POST", "/api/v1/jobs/00000000-0000-0000-0000-000000000000/cancel"),
    ("GET", "/api/v1/jobs/00000000-0000-0000-0000-000000000000/artifacts"),
    ("GET", "/api/v1/jobs/00000000-0000-0000-0000-000000000000/artifacts/x"),
    ("POST", "/api/v1/files"),
    ("GET", "/api/v1/files/00000000-0000-0000-0000-000000000000"),
    ("GET", "/api/v1/files"),
    ("GET", "/api/v1/files/00000000-0000-0000-0000-000000000000/content"),
    ("DELETE", "/api/v1/files/00000000-0000-0000-0000-000000000000"),
    ("OPTIONS", "/api/v1/uploads"),
    ("POST", "/api/v1/uploads"),
    ("PATCH", "/api/v1/uploads/00000000-0000-0000-0000-000000000000"),
    ("GET", "/api/v1/kinds"),
    ("GET", "/api/v1/kinds/demo.countdown"),
    ("POST", "/api/v1/ws-tickets"),
    ("GET", "/api/v1/rooms"),
    ("POST", "/api/v1/rooms/lobby/messages"),
    ("GET", "/api/v1/rooms/lobby/messages"),
    ("GET", "/api/v1/rooms/lobby/presence"),
    ("GET", "/api/v1/jobs/00000000-0000-0000-0000-000000000000/events?ticket=x"),
    ("DELETE", "/api/v1/jobs"),
)


async def add_key(database: asyncpg.Connection, tenant: Tenant, expires_at: datetime | None = None) -> keys.ApiKey:
    key = keys.new()
    await database.execute(
        "INSERT INTO api_keys (id, tenant_id, name, digest, expires_at) VALUES ($1, $2, 'more', $3, $4)",
        key.id,
        tenant.id,
        key.digest(PEPPER),
        expires_at,
    )
    return key


async def status(http: httpx.AsyncClient, key: str) -> int:
    return (await http.get("/api/v1/jobs", headers={"Authorization": f"Bearer {key}"})).status_code


async def test_every_endpoint_wants_a_key_and_every_refusal_is_alike(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    live = keys.parse(tenant.api_key)
    assert live is not None
    stranger, expired = keys.new(), await add_key(database, tenant, datetime.now(UTC) - timedelta(seconds=1))
    revoked = await add_key(database, tenant)
    await database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", revoked.id)
    async with idle(settings, tenant) as http:
        bad = (
            "Bearer",
            "Bearer x",
            "Basic eDp5",
            tenant.api_key,
            f"Token {tenant.api_key}",
            f"Bearer {tenant.api_key}x",
            f"Bearer {tenant.api_key[:-8]}00000000",
            f"Bearer {keys.ApiKey(live.id, stranger.secret).text}",
            f"Bearer {stranger.text}",
            f"Bearer {expired.text}",
            f"Bearer {revoked.text}",
            "Bearer " + "x" * 10_000,
        )
        first = refused(await http.get("/api/v1/jobs", headers={"Authorization": bad[0]}), 401, "unauthenticated")
        for header in bad:
            answer = await http.get("/api/v1/jobs", headers={"Authorization": header})
            assert refused(answer, 401, "unauthenticated") == first, header
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        del http.headers["Authorization"]
        for method, path in ENDPOINTS:
            answer = await http.request(method, path, content=b"{}" if method == "POST" else None)
            assert refused(answer, 401, "unauthenticated") == first, path
        # Also to a client that sends much before it listens.
        assert refused(await http.post("/api/v1/files", content=bytes(20_000_000)), 401, "unauthenticated") == first
        for form in (f"bearer {tenant.api_key}", f"BEARER  {tenant.api_key}"):
            assert (await http.get("/api/v1/jobs", headers={"Authorization": form})).status_code == 200


async def test_a_revoked_key_is_refused_within_five_seconds(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert auth.REMEMBERED <= 5
    monkeypatch.setattr(auth, "REMEMBERED", 0.5)
    async with idle(settings, tenant) as http:
        other, brief = await add_key(database, tenant), await add_key(database, tenant)
        assert await status(http, other.text) == await status(http, brief.text) == 200
        began = time.monotonic()
        await database.execute("UPDATE api_keys SET revoked_at = now() WHERE id = $1", other.id)
        await database.execute("UPDATE api_keys SET expires_at = now() WHERE id = $1", brief.id)

        async def both_refused() -> bool:
            return await status(http, other.text) == await status(http, brief.text) == 401

        await until(both_refused)
        assert time.monotonic() - began < 4
        assert await status(http, tenant.api_key) == 200


async def test_keys_of_one_tenant_see_the_same_jobs(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    second = await add_key(database, tenant, datetime.now(UTC) + timedelta(hours=1))
    async with idle(settings, tenant) as http:
        job = await submit(http)
        answer = await http.get(f"/api/v1/jobs/{job['id']}", headers={"Authorization": f"Bearer {second.text}"})
        assert answer.json() == job
