"""Retry and bulk: ended jobs are run again as new jobs, once each; many are cancelled or retried by one request."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
import pytest_asyncio

from headway.settings import Settings
from tests.conftest import Tenant, make_tenant
from tests.integration.test_api_jobs import idle, submit

MANY = """
INSERT INTO jobs (id, tenant_id, kind, state, input, tags, timeout, finished_at, seq)
SELECT uuidv7(make_interval(secs => n - 100000)), $1, 'demo.countdown', $2, '{"seconds": 1}',
    CASE WHEN n % 2 = 0 THEN ARRAY['even'] ELSE '{}' END, 60, CASE WHEN $2 = 'failed' THEN now() END, 1
FROM generate_series(1, $3::int) n
"""


@pytest_asyncio.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings, tenant) as http:
        yield http


async def bulk(http: httpx.AsyncClient, **wanted: Any) -> dict[str, Any]:
    answer = await http.post("/api/v1/jobs/bulk", json=wanted)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_ended_job_is_run_again_as_one_new_job(http: httpx.AsyncClient) -> None:
    job = await submit(http, 7, tags=["a"], priority="high", concurrency_key="k", max_attempts=4)
    path = f"/api/v1/jobs/{job['id']}"
    early = await http.post(f"{path}/retry")
    assert (early.status_code, early.json()["type"]) == (409, "urn:headway:problem:conflict")
    await http.post(f"{path}/cancel")

    answers = await asyncio.gather(*(http.post(f"{path}/retry") for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 202]
    [again] = {answer.json()["id"] for answer in answers}
    new = (await http.get(answers[0].headers["Location"])).json()
    assert (new["id"], new["state"], new["retry_of"]) == (again, "queued", job["id"])
    same = ("kind", "input", "tags", "priority", "timeout", "max_attempts", "concurrency_key", "concurrency_limit")
    assert {name: new[name] for name in same} == {name: job[name] for name in same}
    assert (await http.get(path)).json()["state"] == "cancelled"


async def test_no_client_can_send_the_key_that_a_retry_has(http: httpx.AsyncClient) -> None:
    job = await submit(http)
    answer = await http.post(
        "/api/v1/jobs",
        json={"kind": "demo.countdown", "input": {"seconds": 1}},
        headers={"Idempotency-Key": f"retry {job['id']}"},
    )
    assert answer.status_code == 400


async def test_bulk_retries_every_match_once_page_after_page(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    await database.execute(MANY, tenant.id, "failed", 1300)
    answer = await bulk(http, action="retry", state="failed", tag="even", limit=400)
    assert (answer["matched"], answer["changed"]) == (400, 400)
    rest = await bulk(http, action="retry", state="failed", tag="even", cursor=answer["next_cursor"])
    assert rest == {"matched": 250, "changed": 250, "next_cursor": None}
    again = await bulk(http, action="retry", state="failed", tag="even")
    assert again == {"matched": 650, "changed": 0, "next_cursor": None}
    retried = await database.fetch("SELECT retry_of, state FROM jobs WHERE retry_of IS NOT NULL")
    assert len({row["retry_of"] for row in retried}) == len(retried) == 650
    assert {row["state"] for row in retried} == {"queued"}


async def test_bulk_cancels_every_match_and_no_other_tenants(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    other = await make_tenant(database, "other")
    await database.execute(MANY, tenant.id, "queued", 1100)
    await database.execute(MANY, other.id, "queued", 3)
    answer = await bulk(http, action="cancel", state="queued", kind="demo.countdown")
    assert answer == {"matched": 1100, "changed": 1100, "next_cursor": None}
    states = await database.fetch("SELECT DISTINCT tenant_id, state FROM jobs")
    assert {tuple(row) for row in states} == {(tenant.id, "cancelled"), (other.id, "queued")}
    assert await bulk(http, action="cancel", state="queued") == {"matched": 0, "changed": 0, "next_cursor": None}


@pytest.mark.parametrize(
    "wanted",
    [
        {"action": "retry", "state": "running"},
        {"action": "cancel", "state": "failed"},
        {"action": "cancel"},
        {"action": "delete", "state": "queued"},
        {"action": "cancel", "state": "queued", "limit": 100_001},
        {"action": "cancel", "state": "queued", "older": 1},
    ],
)
async def test_a_bulk_request_that_cannot_be_is_refused(http: httpx.AsyncClient, wanted: dict[str, Any]) -> None:
    answer = await http.post("/api/v1/jobs/bulk", json=wanted)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:headway:problem:invalid-request")


async def test_another_tenants_job_cannot_be_retried(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    other = await make_tenant(database, "other")
    await database.execute(MANY, other.id, "failed", 1)
    job_id = await database.fetchval("SELECT id FROM jobs")
    for unknown in (job_id, uuid4()):
        assert (await http.post(f"/api/v1/jobs/{unknown}/retry")).status_code == 404
    assert (await bulk(http, action="retry", state="failed"))["matched"] == 0


@pytest.mark.parametrize("fields", [{"concurrency_limit": 2}, {"concurrency_key": ""}, {"concurrency_key": "a\0"}])
async def test_a_concurrency_key_that_cannot_be_is_refused(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await http.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 1}, **fields})
    assert answer.status_code in (400, 422), answer.text
