"""Jobs that are submitted together: all of them, or none."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
import pytest

from headway.client import ApiError
from headway.job import Priority
from headway.settings import Settings
from headway.store import Store
from headway.submission import NewJob
from tests.conftest import Service, Tenant, make_tenant, until
from tests.faults.proxy import Proxy
from tests.integration.test_api_jobs import idle, submit

INTERRUPTED = """
SELECT count(*) = 1 FROM pg_stat_activity
WHERE datname = current_database() AND state = 'idle in transaction' AND query LIKE '%asked%'
"""


def jobs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": "demo.countdown", "input": {"seconds": 0}, "tags": [f"{n}"], **more} for n in range(count)]


async def post(http: httpx.AsyncClient, batch: list[dict[str, Any]], key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await http.post("/api/v1/jobs/batch", json={"jobs": batch}, headers=headers, timeout=30)


async def test_a_thousand_jobs_are_accepted_together_and_run(service: Service) -> None:
    accepted = await service.client.submit_batch(jobs(1000))

    assert [job["tags"] for job in accepted] == [[f"{n}"] for n in range(1000)]
    ended = await asyncio.gather(*(service.client.wait(accepted[n]["id"], timeout=30) for n in (0, 500, 999)))
    assert [job["state"] for job in ended] == ["succeeded"] * 3


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"input": {"seconds": -1}}, "input.seconds"),
        ({"kind": "no.such"}, "kind"),
        ({"priority": "urgent"}, "priority"),
        ({"run_at": "2020-01-01T00:00:00Z"}, "run_at"),
    ],
)
async def test_one_that_is_refused_refuses_all(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, wrong: dict[str, Any], field: str
) -> None:
    job = jobs(1)[0] | wrong
    async with idle(settings, tenant) as http:
        answer = await post(http, [*jobs(2), job, *jobs(2)], "a")
        alone = await http.post("/api/v1/jobs", json=job)

    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (422, alone.json()["type"])
    assert [error["field"] for error in problem["errors"]] == [f"jobs.2.{field}"]
    assert problem["detail"].startswith("jobs.2")
    assert await database.fetchval("SELECT count(*) FROM jobs") == 0


@pytest.mark.parametrize("count", [0, 1001])
async def test_no_jobs_and_too_many_are_refused(settings: Settings, tenant: Tenant, count: int) -> None:
    async with idle(settings, tenant) as http:
        answer = await post(http, jobs(count))
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "jobs")


async def test_the_same_request_gets_the_same_jobs(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = jobs(3, run_at=(datetime.now(UTC) + timedelta(minutes=10)).isoformat())
    async with idle(settings, tenant) as http:
        answers = await asyncio.gather(*(post(http, batch, "a") for _ in range(10)))
        # As if the time had lain behind for more than a minute.
        monkeypatch.setattr("services.web.api.submissions.CLOCKS", -1200.0)
        answers.append(await post(http, batch, "a"))
        late = await post(http, batch, "b")

    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [202]
    assert len({str([job["id"] for job in answer.json()["jobs"]]) for answer in answers}) == 1
    assert answers[-1].headers["Idempotent-Replayed"] == "true"
    assert late.status_code == 422
    assert await database.fetchval("SELECT count(*) FROM jobs") == 3


@pytest.mark.parametrize("other", [jobs(2), jobs(4), [*jobs(2), {"kind": "demo.countdown", "input": {"seconds": 1}}]])
async def test_another_request_with_the_key_is_refused_and_writes_nothing(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, other: list[dict[str, Any]]
) -> None:
    async with idle(settings, tenant) as http:
        assert (await post(http, jobs(3), "a")).status_code == 202
        answer = await post(http, other, "a")

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:headway:problem:idempotency-key-reused")
    assert await database.fetchval("SELECT count(*) FROM jobs") == 3


async def test_what_was_deleted_meanwhile_is_not_run_again(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    async with idle(settings, tenant) as http:
        first = (await post(http, jobs(3), "a")).json()["jobs"]
        await database.execute("DELETE FROM jobs WHERE id = $1", UUID(first[1]["id"]))
        answer = await post(http, jobs(3), "a")

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:headway:problem:conflict")
    assert await database.fetchval("SELECT count(*) FROM jobs") == 2


async def test_a_service_that_vanishes_in_the_middle_does_not_hold_the_key(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = settings.database_url.get_secret_value()
    port = urlsplit(url).port or 0
    async with Proxy(port) as proxy, idle(settings, tenant) as http:
        far = Store(url.replace(f":{port}/", f":{proxy.port}/"), pool=1)
        await far.open()
        # After the insert, and before the commit.
        monkeypatch.setattr("headway.store._check_whole", lambda *_: proxy.blackhole())
        record = NewJob(
            tenant.id, "demo.countdown", {"seconds": 0}, ["0"], Priority.NORMAL, 60, 1, idempotency_key="a 0", batch=1
        ).as_record()
        vanishing = asyncio.create_task(far.submit([record], together=True))
        await until(lambda: database.fetchval(INTERRUPTED))
        monkeypatch.undo()

        async def accepted() -> bool:
            return (await post(http, jobs(1), "a")).status_code in (200, 202)

        await until(accepted, 20)
        proxy.restore()
        await asyncio.gather(vanishing, return_exceptions=True)
        await far.close()


async def test_keys_of_batches_single_jobs_and_tenants_are_apart(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    async with idle(settings, tenant) as http:
        await post(http, jobs(2), "a")
        alone = await http.post("/api/v1/jobs", json=jobs(1)[0], headers={"Idempotency-Key": "a"})
        http.headers["Authorization"] = f"Bearer {(await make_tenant(database, 'other')).api_key}"
        other = await post(http, jobs(2), "a")
        await submit(http)

    assert (alone.status_code, other.status_code) == (202, 202)


async def test_the_client_says_what_is_wrong(service: Service) -> None:
    with pytest.raises(ApiError, match=r"jobs\.1: input\.seconds"):
        await service.client.submit_batch([*jobs(1), {"kind": "demo.countdown", "input": {"seconds": -1}}])
