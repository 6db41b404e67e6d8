"""When jobs run and in which order: delays, priorities, fairness between tenants."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis

from headway.settings import Settings
from tests.conftest import Service, Tenant, make_tenant, until, web, worker
from tests.integration import engine_kinds


@pytest.fixture
def settings(settings: Settings) -> Iterator[Settings]:
    engine_kinds.calls.clear()
    yield settings.model_copy(update={"kinds": (engine_kinds.__name__,), "slots": 1})


def client(url: str, tenant: Tenant) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {tenant.api_key}"}, trust_env=False, verify=False
    )


async def submit(http: httpx.AsyncClient, input: Any, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/api/v1/jobs", json={"kind": "engine.note", "input": input, **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


async def started(database: asyncpg.Connection) -> float:
    """How late the only job of the database was started, in seconds."""
    return await database.fetchval("SELECT extract(epoch FROM started_at - run_at)::float8 FROM jobs")


@pytest.mark.parametrize("later", [{"delay": 0.5}, {"run_at": 2}])
async def test_a_job_is_started_when_it_is_due(
    service: Service, database: asyncpg.Connection, later: dict[str, float]
) -> None:
    if "run_at" in later:
        later = {"run_at": (datetime.now(UTC) + timedelta(seconds=later["run_at"])).isoformat()}
    accepted = await submit(service.http, 1, **later)
    assert accepted["state"] == "scheduled"

    await until(lambda: engine_kinds.calls)

    late = await started(database)
    assert 0 <= late < 1


@pytest.mark.parametrize(
    "fields",
    [
        {"delay": -1},
        {"delay": 401 * 86400},
        {"run_at": "2020-01-01T00:00:00Z"},
        {"run_at": "2999-01-01T00:00:00Z"},
        {"run_at": "2030-01-01T00:00:00"},
        {"run_at": 1798761600},
        {"run_at": "1798761600"},
        {"run_at": "2027-01-01T00:00:00Z", "delay": 1},
        {"priority": "urgent"},
        {"max_attempts": 0},
    ],
)
async def test_a_time_or_priority_that_cannot_be_is_refused(service: Service, fields: dict[str, Any]) -> None:
    answer = await service.http.post("/api/v1/jobs", json={"kind": "engine.note", "input": 1, **fields})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:headway:problem:invalid-request")


async def test_a_scheduled_job_can_be_cancelled(service: Service) -> None:
    accepted = await submit(service.http, 1, delay=60)

    answer = await service.http.post(f"/api/v1/jobs/{accepted['id']}/cancel")

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")


async def test_high_goes_before_normal_and_low_is_not_left_waiting_for_ever(
    settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with worker(settings):
        pass
    async with web(settings) as url, client(url, tenant) as http:
        for priority in ("low", "normal", "high"):
            for number in range(40):
                await submit(http, f"{priority} {number}", priority=priority)
        async with worker(settings):
            await until(lambda: len(engine_kinds.calls) == 120, 30)

    for priority in ("low", "normal", "high"):
        mine = [call for call in engine_kinds.calls if call.startswith(priority)]
        assert mine == [f"{priority} {number}" for number in range(40)]
    first = engine_kinds.calls[:42]
    assert [sum(call.startswith(priority) for call in first) for priority in ("high", "normal", "low")] == [32, 8, 2]


async def test_a_tenant_with_many_jobs_does_not_keep_another_waiting(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection
) -> None:
    async with worker(settings):
        pass
    other = await make_tenant(database, "other")
    async with web(settings) as url, client(url, tenant) as http, client(url, other) as other_http:
        await asyncio.gather(*(submit(http, number) for number in range(100)))
        await submit(other_http, "other")
        async with worker(settings):
            await until(lambda: len(engine_kinds.calls) == 101, 30)

    assert engine_kinds.calls.index("other") <= 2


async def test_order_is_kept_when_redis_brings_nothing(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    async with worker(settings):
        pass
    async with web(settings) as url, client(url, tenant) as http:
        for number in range(5):
            await submit(http, number, priority="low")
        await submit(http, "high", priority="high")
        await redis.flushall()
        async with worker(settings):
            await until(lambda: len(engine_kinds.calls) == 6)

    assert engine_kinds.calls == ["high", 0, 1, 2, 3, 4]
