"""Idempotency-Key: a request that is sent again makes no second job."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis

from headway.job import Priority
from headway.submission import NewJob
from tests.conftest import Service, make_tenant, until

JOB = {"kind": "demo.countdown", "input": {"seconds": 0}}


async def submit(service: Service, key: str, job: dict[str, Any] = JOB) -> httpx.Response:
    return await service.http.post("/api/v1/jobs", json=job, headers={"Idempotency-Key": key})


async def test_the_same_request_gets_the_same_job(service: Service, redis: Redis) -> None:
    first = await submit(service, "a")
    await redis.flushall()
    again = await submit(service, "a")

    assert (first.status_code, again.status_code) == (202, 200)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["Location"] == first.headers["Location"]


async def test_another_request_with_the_key_is_refused(service: Service) -> None:
    await submit(service, "a")
    other = await submit(service, "a", {**JOB, "tags": ["x"]})

    assert (other.status_code, other.json()["type"]) == (422, "urn:headway:problem:idempotency-key-reused")


async def test_a_request_that_is_sent_again_after_its_time_gets_its_job(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {**JOB, "run_at": (datetime.now(UTC) + timedelta(minutes=10)).isoformat()}
    first = await submit(service, "a", job)
    # As if it had lain behind for more than a minute.
    monkeypatch.setattr("services.web.api.submissions.CLOCKS", -1200.0)
    again = await submit(service, "a", job)
    other = await submit(service, "a", {**job, "tags": ["x"]})
    new = await submit(service, "b", job)

    assert (first.status_code, again.status_code) == (202, 200)
    assert (again.headers["Idempotent-Replayed"], again.json()["id"]) == ("true", first.json()["id"])
    assert other.json()["type"] == "urn:headway:problem:idempotency-key-reused"
    assert (new.status_code, new.json()["errors"][0]["field"]) == (422, "run_at")


async def test_a_release_with_other_defaults_makes_it_no_other_request(
    service: Service, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await submit(service, "a")
    await database.execute("UPDATE kinds SET timeout = timeout + 1, max_attempts = 7 WHERE name = 'demo.countdown'")
    monkeypatch.setattr("services.web.api.catalog.REMEMBERED", 0.0)

    async def is_known() -> bool:
        new = await submit(service, uuid4().hex)
        return new.json()["max_attempts"] == 7

    await until(is_known)
    again = await submit(service, "a")
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


@pytest.mark.parametrize("change", ["input_schema = 'false'", "name = 'demo.another'"])
async def test_a_kind_that_takes_it_no_longer_makes_it_no_other_request(
    service: Service, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    first = await submit(service, "a")
    await database.execute(f"UPDATE kinds SET {change} WHERE name = 'demo.countdown'")
    monkeypatch.setattr("services.web.api.catalog.REMEMBERED", 0.0)

    async def is_refused() -> bool:
        return (await submit(service, uuid4().hex)).status_code == 422

    await until(is_refused)
    again = await submit(service, "a")
    other = await submit(service, "a", {**JOB, "tags": ["x"]})
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert other.json()["type"] == "urn:headway:problem:idempotency-key-reused"


async def test_a_job_of_before_defaults_were_left_out_is_found(service: Service, database: asyncpg.Connection) -> None:
    first = await submit(service, "a")
    job = await database.fetchrow("SELECT * FROM jobs")
    whole = NewJob(
        job["tenant_id"], job["kind"], job["input"], (), Priority.NORMAL, job["timeout"], job["max_attempts"]
    )
    await database.execute("UPDATE jobs SET request_digest = $1", whole.digest())

    again = await submit(service, "a")
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


async def test_a_hundred_at_once_make_one_job(service: Service, database: asyncpg.Connection) -> None:
    answers = await asyncio.gather(*(submit(service, "a") for _ in range(100)))

    assert sorted({answer.status_code for answer in answers}) == [200, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await database.fetchval("SELECT count(*) FROM jobs") == 1


async def test_keys_of_tenants_are_apart(service: Service, database: asyncpg.Connection) -> None:
    first = await submit(service, "a")
    service.http.headers["Authorization"] = f"Bearer {(await make_tenant(database, 'other')).api_key}"
    other = await submit(service, "a")

    assert other.status_code == 202
    assert other.json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", b"\xc3\xa9"])
async def test_a_key_that_cannot_be_one_is_refused(service: Service, key: Any) -> None:
    answer = await submit(service, key)

    assert (answer.status_code, answer.json()["type"]) == (400, "urn:headway:problem:bad-request")
