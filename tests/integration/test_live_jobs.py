"""`/ws/v1` and SSE: jobs that are followed, resumed and refused, whatever happens between two steps."""

from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from headway.settings import Settings
from tests.conftest import Service, Tenant, make_tenant
from tests.integration.live_clients import live, stream
from tests.integration.test_api_jobs import ended, idle, submit

Frame = dict[str, Any]
AT = "2026-11-25T22:00:00.000Z"


async def write(database: asyncpg.Connection, job_id: str, count: int, *, end: bool = False) -> None:
    """A job writes lines to its log, and may succeed; nobody is told."""
    async with database.transaction():
        seq = await database.fetchval("UPDATE jobs SET seq = seq + $2 WHERE id = $1 RETURNING seq", job_id, count)
        await database.execute(
            "INSERT INTO events (job_id, seq, type, data) SELECT $1, $2 + n, 'log', "
            "jsonb_build_object('message', n::text, 'level', 'info', 'at', $4::text) FROM generate_series(1, $3) n",
            UUID(job_id),
            seq - count,
            count,
            AT,
        )
        if end:
            await database.execute(
                "INSERT INTO events (job_id, seq, type, data) VALUES ($1, $2, 'state', $3)",
                UUID(job_id),
                seq + 1,
                {"state": "succeeded", "attempt": 1, "at": AT, "result": {}},
            )
            await database.execute(
                "UPDATE jobs SET state = 'succeeded', seq = $2, finished_at = now() WHERE id = $1", job_id, seq + 1
            )


async def test_many_jobs_are_followed_on_one_socket(service: Service) -> None:
    jobs = [(await submit(service.http, seconds=0.3 + number / 20))["id"] for number in range(10)]
    async with live(service.http) as socket:
        ack = await socket.ask("subscribe", jobs=[{"job": job} for job in jobs])
        assert (ack["t"], sorted(ack["d"]["jobs"])) == ("ack", sorted(jobs))
        over: set[str] = set()
        while len(over) < len(jobs):
            bye = await socket.until(lambda frame: frame["t"] == "bye")
            over.add(bye["job"])
        for job in jobs:
            frames = socket.of(job, "snapshot", "state", "progress", "log")
            assert frames[0]["t"] == "snapshot"
            assert frames[-1]["d"]["state"] == "succeeded"
            assert frames[-1]["seq"] == (await ended(service.http, job))["seq"]
        await socket.ask("subscribe", jobs=[{"job": jobs[0]}])
        assert [(await socket.recv())["t"], (await socket.recv())["t"]] == ["snapshot", "bye"]


async def test_the_ack_comes_before_the_snapshot_and_after_it_events(service: Service) -> None:
    job = (await submit(service.http, seconds=0.5))["id"]
    async with live(service.http) as socket:
        await socket.ask("subscribe", jobs=[{"job": job}])
        await socket.end(job)
        types = [frame["t"] for frame in socket.frames]
    assert types[:3] == ["welcome", "ack", "snapshot"]
    assert types[-1] == "bye"


@pytest.mark.parametrize("since", ["middle", "end"])
async def test_a_socket_resumes_where_another_broke_off(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, since: str
) -> None:
    async with idle(settings, tenant) as http:
        job = (await submit(http))["id"]
        await write(database, job, 5000)
        held = 2001 if since == "middle" else 5001
        async with live(http) as socket:
            await socket.ask("subscribe", jobs=[{"job": job, "since": held, "epoch": 1}])
            await write(database, job, 3, end=True)
            await http.post(f"/api/v1/jobs/{(await submit(http))['id']}/cancel")
            await socket.ask("refresh", jobs=[job])
            await socket.end(job)
            frames = socket.of(job, "state", "log", "snapshot", "resync")
    assert frames[-1]["d"]["state"] == "succeeded"
    told = [frame for frame in frames if frame["t"] != "snapshot"]
    assert all(after["prev"] == before["seq"] for before, after in pairwise(told))
    if since == "middle":
        assert (told[0]["prev"], told[0]["seq"]) == (held, held + 1)
        assert [frame["seq"] for frame in told] == list(range(held + 1, told[-1]["seq"] + 1))


async def test_a_cursor_that_does_not_fit_is_void(settings: Settings, redis: Redis, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        job = await submit(http)
        async with live(http) as socket:
            for since, epoch, reason in ((9999, 1, "cursor"), (1, 7, "epoch"), (1, None, "epoch")):
                await socket.ask("subscribe", jobs=[{"job": job["id"], "since": since, "epoch": epoch}])
                resync = await socket.recv()
                assert resync == {"t": "resync", "job": job["id"], "d": {"reason": reason}}
                snapshot = await socket.recv()
                assert (snapshot["t"], snapshot["prev"], snapshot["d"]) == ("snapshot", None, job)


async def test_what_cannot_be_followed_is_refused_alike(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection
) -> None:
    other = await make_tenant(database, "other")
    async with idle(settings, tenant) as http, idle(settings, other) as strange:
        mine, theirs, nobodys = (await submit(http))["id"], (await submit(strange))["id"], str(uuid4())
        async with live(http) as socket:
            ack = await socket.ask("subscribe", jobs=[{"job": job} for job in (theirs, mine, nobodys)])
            assert ack["d"]["jobs"] == [mine]
            errors = [await socket.recv(), await socket.recv()]
            for error, job in zip(errors, (theirs, nobodys), strict=True):
                d = {"type": "urn:headway:problem:not-found", "detail": f"There is no job {job}.", "job": job}
                assert error == {"t": "error", "id": ack["id"], "d": d}
            assert (await socket.recv())["job"] == mine
        for job in (theirs, nobodys):
            answer = await http.get(f"/api/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})
            assert (answer.status_code, answer.json()["detail"]) == (404, f"There is no job {job}.")
            assert (await http.get(f"/api/v1/jobs/{job}/events")).status_code == 404


async def test_a_stream_of_one_job(service: Service) -> None:
    job = (await submit(service.http, seconds=0.5))["id"]
    async with stream(service.http, f"/jobs/{job}/events") as events:
        assert events.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert events.response.headers["X-Accel-Buffering"] == "no"
        assert events.response.headers["Cache-Control"] == "no-store"
        frames = await events.rest()
    assert frames[0]["t"] == "snapshot"
    assert frames[-2]["d"]["state"] == "succeeded"
    assert frames[-1] == {"t": "bye", "job": job, "d": {"reason": "terminal"}}
    assert events.last == f"1-{frames[-2]['seq']}"
    # EventSource asks again, and is told to stop.
    headers = {"Accept": "text/event-stream", "Last-Event-ID": events.last}
    answer = await service.http.get(f"/api/v1/jobs/{job}/events", headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")
    resumed = {"Accept": "text/event-stream", "Last-Event-ID": "1-1"}
    text = (await service.http.get(f"/api/v1/jobs/{job}/events", headers=resumed)).text
    assert '"prev":1,"seq":2' in text
    assert "snapshot" not in text
    head = await service.http.head(f"/api/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"})
    assert head.headers["Content-Type"] == "text/event-stream; charset=utf-8"


async def test_pages_of_events(settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection) -> None:
    async with idle(settings, tenant) as http:
        job = (await submit(http))["id"]
        await write(database, job, 4)
        path, seen, after = f"/api/v1/jobs/{job}/events", [], 0
        while after is not None:
            page = (await http.get(path, params={"after": after, "limit": 2})).json()
            seen += page["events"]
            after = page["next_after"]
        assert [(event["t"], event["seq"]) for event in seen] == [("state", 1), *(("log", n) for n in range(2, 6))]
        assert seen[1] == {
            "t": "log",
            "job": job,
            "epoch": 1,
            "seq": 2,
            "d": {"at": AT, "level": "info", "message": "1"},
        }
        assert (await http.get(path, params={"limit": 1001})).status_code == 422
        assert (await http.get(path, params={"nothing": 1})).status_code == 422
        wrong = {"Accept": "text/event-stream", "Last-Event-ID": "yesterday"}
        assert (await http.get(path, headers=wrong)).status_code == 400
