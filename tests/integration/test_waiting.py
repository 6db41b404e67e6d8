"""`Prefer: wait` and `?wait=`: an answer is held until the job ends, and nothing is asked again and again meanwhile."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from headway.settings import Settings
from services.web.live import waits as live_waits
from tests.conftest import Service, Tenant, make_tenant, until
from tests.integration.test_api_jobs import idle, submit
from tests.integration.test_live import process
from tests.ports import free_ports

COUNTDOWN: dict[str, Any] = {"kind": "demo.countdown", "input": {"seconds": 0.3}}


async def waits(count: int) -> None:
    """Until so many requests are held in this process."""
    await until(lambda: REGISTRY.get_sample_value("headway_http_waits") == count)


async def test_a_submit_is_answered_with_the_job_once_it_has_ended(service: Service) -> None:
    answer = await service.http.post("/api/v1/jobs", json=COUNTDOWN, headers={"Prefer": "respond-async, wait=20"})

    assert (answer.status_code, answer.headers["Preference-Applied"]) == (200, "wait=20")
    assert answer.json()["state"] == "succeeded"
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json()['id']}"


async def test_a_job_that_does_not_end_in_time_is_answered_as_accepted(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        answer = await http.post("/api/v1/jobs", json=COUNTDOWN, headers={"Prefer": "wait=1"})
        assert (answer.status_code, answer.json()["state"]) == (202, "queued")

        answer = await http.get(answer.headers["Location"], params={"wait": 0.1})
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")


@pytest.mark.parametrize("prefer", ["wait=-1", "wait=1e9", "wait", "await=5", "wait=x", "handling=lenient"])
async def test_a_preference_that_is_no_wait_is_passed_over(settings: Settings, tenant: Tenant, prefer: str) -> None:
    async with idle(settings, tenant) as http, asyncio.timeout(5):
        answer = await http.post("/api/v1/jobs", json=COUNTDOWN, headers={"Prefer": prefer})
    assert answer.status_code == 202
    assert "Preference-Applied" not in answer.headers


async def test_who_waits_hears_of_the_end_also_when_redis_forgot_that_it_listens(
    settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with idle(settings, tenant) as http, asyncio.timeout(30):
        path = f"/api/v1/jobs/{(await submit(http))['id']}"
        waiting = [asyncio.create_task(http.get(path, params={"wait": "1e9"}, timeout=60)) for _ in range(3)]
        await waits(3)
        await redis.client_kill_filter(_type="pubsub")
        await http.post(f"{path}/cancel")
        assert [(await answer).json()["state"] for answer in waiting] == ["cancelled"] * 3
        await waits(0)


async def test_an_end_that_was_never_told_is_read(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever committed it may have died before it was published."""
    monkeypatch.setattr(live_waits, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(live_waits, "READ_EVERY", 0.3)
    async with idle(settings, tenant) as http, asyncio.timeout(30):
        job_id = (await submit(http))["id"]
        waiting = asyncio.create_task(http.get(f"/api/v1/jobs/{job_id}", params={"wait": 60}, timeout=60))
        await waits(1)
        await database.execute("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = $1", UUID(job_id))
        assert (await waiting).json()["state"] == "cancelled"


async def test_a_job_that_is_not_there_is_not_waited_for(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    stranger = await make_tenant(database, "stranger")
    async with idle(settings, tenant) as http, asyncio.timeout(10):
        foreign = {"Authorization": f"Bearer {stranger.api_key}"}
        job_id = (await submit(http))["id"]
        for answer in (
            await http.get(f"/api/v1/jobs/{uuid4()}", params={"wait": 50}),
            await http.get(f"/api/v1/jobs/{job_id}", params={"wait": 50}, headers=foreign),
        ):
            assert (answer.status_code, answer.json()["type"]) == (404, "urn:headway:problem:not-found")


@pytest.mark.parametrize("wait", ["-1", "x", "nan"])
async def test_a_wait_that_is_no_time_is_refused(settings: Settings, tenant: Tenant, wait: str) -> None:
    async with idle(settings, tenant) as http:
        answer = await http.get(f"/api/v1/jobs/{uuid4()}", params={"wait": wait})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "wait")


async def test_nothing_is_held_for_a_client_that_has_left(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        path = f"/api/v1/jobs/{(await submit(http))['id']}"
        async with httpx.AsyncClient(
            base_url=http.base_url, headers=http.headers, trust_env=False, verify=False
        ) as leaving:
            waiting = asyncio.create_task(leaving.get(path, params={"wait": 50}))
            await waits(1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await waits(0)


async def test_a_process_that_is_told_to_stop_answers_those_who_wait(
    settings: Settings, redis: Redis, tenant: Tenant
) -> None:
    async with idle(settings, tenant) as http:
        path = f"/api/v1/jobs/{(await submit(http))['id']}"
    port = free_ports()
    async with (
        process(settings, "services.web", port=port, HEADWAY_PORT=str(port), HEADWAY_OPS_PORT="0") as running,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=http.headers, trust_env=False, verify=False
        ) as http,
    ):
        waiting = asyncio.create_task(http.get(path, params={"wait": 50}, timeout=60))

        async def waits_there() -> bool:
            return bool(await redis.pubsub_channels(f"*{path.rsplit('/', 1)[1]}*"))

        await until(waits_there)
        running.terminate()
        answer = await asyncio.wait_for(waiting, 10)
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")
        assert await asyncio.wait_for(running.wait(), 10) == 0
