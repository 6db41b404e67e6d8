"""Jobs over HTTP: submit, read, list, cancel, and the files that jobs make."""

import asyncio
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import uuid4

import asyncpg
import httpx
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from headway import kinds
from headway.settings import Settings
from headway.store import Store
from tests.conftest import Service, Tenant, make_tenant, until, web

TERMINAL = ("succeeded", "failed", "cancelled")


@asynccontextmanager
async def idle(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """The web service without a worker: it knows the kinds in the box, and jobs stay queued."""
    store = Store(settings.database_url.get_secret_value(), pool=2)
    await store.open()
    await store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
    await store.close()
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):
        yield http


async def submit(http: httpx.AsyncClient, seconds: float = 1, **more: Any) -> dict[str, Any]:
    answer = await http.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": seconds}, **more})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    async def job() -> dict[str, Any] | None:
        found: dict[str, Any] = (await http.get(f"/api/v1/jobs/{job_id}")).json()
        return found if found["state"] in TERMINAL else None

    ending: dict[str, Any] = await until(job)
    return ending


async def test_a_job_is_accepted_run_and_answered_with_its_result(service: Service) -> None:
    accepted = await service.http.post(
        "/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0.3}, "tags": ["a", "b"], "timeout": 9}
    )
    assert accepted.status_code == 202
    body = accepted.json()
    assert body["state"] == "queued"
    assert accepted.headers["Location"] == f"/api/v1/jobs/{body['id']}"
    # Clients that hold headers in a plain dictionary look for it in these letters.
    assert b"Location" in dict(accepted.headers.raw)

    job = await ended(service.http, body["id"])
    assert job["state"] == "succeeded"
    assert job["result"] == {"seconds": 0.3}
    assert job["tags"] == ["a", "b"]
    assert job["timeout"] == 9
    assert job["attempt"] == 1
    assert job["progress"]["done"] == job["progress"]["total"] == 0.3
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job["seq"] > body["seq"]


async def test_an_accepted_job_is_in_the_database_when_the_answer_comes(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    async with idle(settings, tenant) as http:
        jobs = await asyncio.gather(*(submit(http, tags=[f"n{number}"]) for number in range(30)))
        rows = await database.fetch("SELECT id::text, tags, state, tenant_id FROM jobs")
    assert {(row["id"], *row["tags"]) for row in rows} == {(job["id"], *job["tags"]) for job in jobs}
    assert {row["state"] for row in rows} == {"queued"}
    assert {row["tenant_id"] for row in rows} == {tenant.id}


async def test_the_log_line_of_a_submission_names_the_job(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        with capture_logs(processors=[merge_contextvars]) as lines:
            answer = await http.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 1}})
            job_id = answer.json()["id"]
            await http.post(f"/api/v1/jobs/{job_id}/cancel")
            retried = (await http.post(f"/api/v1/jobs/{job_id}/retry")).json()["id"]
    named = {line["request_id"]: line.get("job_id") for line in lines if line["event"] == "request"}
    assert list(named.values()) == [job_id, None, retried]
    assert named[answer.headers["X-Request-Id"]] == job_id


async def test_a_submit_succeeds_while_redis_is_away(settings: Settings, tenant: Tenant) -> None:
    lost = settings.model_copy(update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:1/0")})
    async with idle(lost, tenant) as http:
        job = await submit(http)
        assert (await http.get(f"/api/v1/jobs/{job['id']}")).json()["state"] == "queued"


async def test_jobs_are_listed_by_state_kind_and_tag(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        first, second = await submit(http, tags=["red"]), await submit(http, tags=["red", "blue"])
        fetch = {"kind": "http.fetch", "input": {"urls": ["http://127.0.0.1:1/"]}}
        third = (await http.post("/api/v1/jobs", json=fetch)).json()
        await http.post(f"/api/v1/jobs/{first['id']}/cancel")

        async def ids(**query: str) -> list[str]:
            page = (await http.get("/api/v1/jobs", params=query)).json()
            assert page["next_cursor"] is None
            return [job["id"] for job in page["jobs"]]

        assert await ids() == [third["id"], second["id"], first["id"]]
        assert await ids(state="queued") == [third["id"], second["id"]]
        assert await ids(state="cancelled", tag="red") == [first["id"]]
        assert await ids(kind="demo.countdown") == [second["id"], first["id"]]
        assert await ids(tag="blue", kind="demo.countdown", state="queued") == [second["id"]]
        assert await ids(tag="green") == await ids(kind="no.such") == await ids(state="running") == []
        page = (await http.get("/api/v1/jobs", params={"limit": "1"})).json()
        assert page["jobs"] == [third]


async def test_pages_have_neither_holes_nor_duplicates_while_jobs_arrive(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        before = [(await submit(http))["id"] for _ in range(25)]
        seen: list[str] = []
        query = {"limit": "7"}
        while True:
            page, *_ = await asyncio.gather(http.get("/api/v1/jobs", params=query), submit(http), submit(http))
            assert len(page.json()["jobs"]) <= 7
            seen += [job["id"] for job in page.json()["jobs"]]
            if page.json()["next_cursor"] is None:
                break
            query["cursor"] = page.json()["next_cursor"]
    assert len(seen) == len(set(seen))
    assert seen == sorted(seen, reverse=True)
    assert [job_id for job_id in seen if job_id in before] == before[::-1]


async def test_an_unchanged_job_is_answered_304(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        path = f"/api/v1/jobs/{(await submit(http))['id']}"
        etag = (await http.get(path)).headers["ETag"]
        for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
            unchanged = await http.get(path, headers={"If-None-Match": given})
            assert (unchanged.status_code, unchanged.headers["ETag"], unchanged.content) == (304, etag, b"")
            assert "Content-Type" not in unchanged.headers
        await http.post(f"{path}/cancel")
        changed = await http.get(path, headers={"If-None-Match": etag})
        assert changed.status_code == 200
        assert changed.headers["ETag"] != etag


async def test_head_tells_what_get_would(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        for path, status in ((f"/api/v1/jobs/{(await submit(http))['id']}", 200), ("/api/v1/jobs/nothing", 404)):
            head, get = await http.head(path), await http.get(path)
            assert head.status_code == get.status_code == status
            assert head.content == b""
            for name in ("Content-Type", "Content-Length", "ETag"):
                assert head.headers.get(name) == get.headers.get(name)


async def test_a_queued_job_is_cancelled_at_once_and_repeats_agree(settings: Settings, tenant: Tenant) -> None:
    async with idle(settings, tenant) as http:
        job = await submit(http)
        answers = [await http.post(f"/api/v1/jobs/{job['id']}/cancel") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert answers[0].json()["state"] == "cancelled"
        assert answers[0].json() == answers[1].json() == answers[2].json()


async def test_a_running_job_is_stopped_and_a_finished_one_stays_as_it_is(service: Service) -> None:
    job = await submit(service.http, seconds=600)
    path = f"/api/v1/jobs/{job['id']}"

    async def running() -> bool:
        return bool((await service.http.get(path)).json()["state"] == "running")

    await until(running)
    answers = [await service.http.post(f"{path}/cancel") for _ in range(2)]
    for answer in answers:
        if answer.json()["state"] == "running":
            assert answer.status_code == 202
            assert answer.json()["cancel_requested_at"] == answers[0].json()["cancel_requested_at"]
        else:
            assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    cancelled = await ended(service.http, job["id"])
    assert cancelled["state"] == "cancelled"
    again = await service.http.post(f"{path}/cancel")
    assert (again.status_code, again.json()) == (200, cancelled)

    succeeded = await ended(service.http, (await submit(service.http, seconds=0))["id"])
    late = await service.http.post(f"/api/v1/jobs/{succeeded['id']}/cancel")
    assert (late.status_code, late.json()) == (200, succeeded)
    assert succeeded["state"] == "succeeded"


async def keep_artifact(
    settings: Settings, database: asyncpg.Connection, job_id: str, name: str, content: bytes
) -> dict[str, Any]:
    """Make a file that a job has made; how it is listed."""
    key = f"artifacts/{job_id}/1/{name.encode().hex()}"
    path = settings.home / "files" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    listed = {"name": name, "content_type": "text/csv", "size": len(content), "sha256": sha256(content).hexdigest()}
    await database.execute(
        "INSERT INTO artifacts (job_id, name, content_type, size, sha256, key) VALUES ($1, $2, $3, $4, $5, $6)",
        job_id,
        *listed.values(),
        key,
    )
    return listed


async def test_artifacts_are_listed_and_downloaded(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    content, name = os.urandom(3_000_000), "bad rows, größer.csv"
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
        path = f"/api/v1/jobs/{job_id}/artifacts"
        assert (await http.get(path)).json() == {"artifacts": []}
        listed = [
            await keep_artifact(settings, database, job_id, name, content),
            await keep_artifact(settings, database, job_id, "empty", b""),
        ]
        assert (await http.get(path)).json() == {"artifacts": listed}

        whole = await http.get(f"{path}/{quote(name)}")
        assert whole.status_code == 200
        assert whole.content == content
        assert whole.headers["Content-Type"] == "text/csv"
        assert whole.headers["Content-Length"] == str(len(content))
        assert whole.headers["ETag"] == f'"{listed[0]["sha256"]}"'
        assert whole.headers["Content-Disposition"] == (
            f"attachment; filename=\"bad rows, gr__er.csv\"; filename*=UTF-8''{quote(name)}"
        )
        assert whole.headers["X-Content-Type-Options"] == "nosniff"
        empty = await http.get(f"{path}/empty")
        assert (empty.status_code, empty.content) == (200, b"")
        assert (await http.get(f"{path}/other")).status_code == 404
        head = await http.head(f"{path}/{quote(name)}")
        assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(content)))


async def test_a_part_of_an_artifact_is_downloaded(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    content = bytes(range(256)) * 4
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
        etag = f'"{(await keep_artifact(settings, database, job_id, "a.bin", content))["sha256"]}"'
        await keep_artifact(settings, database, job_id, "empty", b"")
        path = f"/api/v1/jobs/{job_id}/artifacts/a.bin"
        for asked, start, end in (
            ("bytes=0-0", 0, 1),
            ("bytes=1000-", 1000, 1024),
            ("bytes=10-20", 10, 21),
            ("bytes=1000-99999", 1000, 1024),
            ("bytes=-24", 1000, 1024),
            ("bytes=-99999", 0, 1024),
        ):
            part = await http.get(path, headers={"Range": asked})
            assert (part.status_code, part.content) == (206, content[start:end]), asked
            assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/1024"
            assert part.headers["Content-Length"] == str(end - start)
            assert part.headers["ETag"] == etag
        for asked in ("bytes=1024-", "bytes=-0"):
            unmet = await http.get(path, headers={"Range": asked})
            assert (unmet.status_code, unmet.headers["Content-Range"]) == (416, "bytes */1024"), asked
        unmet = await http.get(path.replace("a.bin", "empty"), headers={"Range": "bytes=0-"})
        assert (unmet.status_code, unmet.headers["Content-Range"]) == (416, "bytes */0")
        # What is not one range of bytes is passed over.
        for asked in (
            "items=0-1",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=5-2",
            "bytes=0-1,5-6",
            "0-1",
            f"bytes=0-{'9' * 5000}",
        ):
            whole = await http.get(path, headers={"Range": asked})
            assert (whole.status_code, whole.content) == (200, content), asked
        assert (await http.get(path, headers={"Range": "bytes=0-1", "If-Range": etag})).status_code == 206
        assert (await http.get(path, headers={"Range": "bytes=0-1", "If-Range": '"old"'})).content == content
        assert (await http.get(path, headers={"If-None-Match": etag})).status_code == 304


async def test_a_client_that_leaves_in_the_middle_of_a_download_is_no_error(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with idle(settings, tenant) as http:
        job_id = (await submit(http))["id"]
        await keep_artifact(settings, database, job_id, "large", bytes(20_000_000))
        url = urlsplit(str(http.base_url))
        request = (
            f"GET /api/v1/jobs/{job_id}/artifacts/large HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Authorization: Bearer {tenant.api_key}\r\n\r\n"
        ).encode()

        def read_and_leave(pieces: int) -> None:
            # From a thread of its own, so that the server is as likely to be in the middle of its writes as not.
            with socket.create_connection((url.hostname, url.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(request)
                for _ in range(pieces):
                    client.recv(1 << 17)

        for pieces in range(1, 60, 2):
            await asyncio.to_thread(read_and_leave, pieces)
        assert (await http.get("/api/v1/jobs")).status_code == 200
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_another_tenants_job_is_answered_as_an_unknown_one(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    other = await make_tenant(database, "other")
    async with idle(settings, tenant) as http:
        job_id = (await submit(http, tags=["mine"]))["id"]
        await keep_artifact(settings, database, job_id, "a.csv", b"secret")
        file_id = (await http.post("/api/v1/files", content=b"secret")).json()["id"]
        theirs = {"Authorization": f"Bearer {other.api_key}"}
        unknown = str(uuid4())
        for method, path in (
            ("GET", "/api/v1/jobs/{}"),
            ("HEAD", "/api/v1/jobs/{}"),
            ("POST", "/api/v1/jobs/{}/cancel"),
            ("GET", "/api/v1/jobs/{}/artifacts"),
            ("GET", "/api/v1/jobs/{}/artifacts/a.csv"),
            ("GET", "/api/v1/files/{}"),
        ):
            real = file_id if "files" in path else job_id
            foreign = await http.request(method, path.format(real), headers=theirs)
            nothing = await http.request(method, path.format(unknown), headers=theirs)
            assert foreign.status_code == nothing.status_code == 404, path
            assert foreign.text.replace(real, unknown) == nothing.text
            assert foreign.headers.keys() == nothing.headers.keys()
        assert (await http.get("/api/v1/jobs", headers=theirs)).json()["jobs"] == []
        assert (await http.get("/api/v1/jobs", headers=theirs, params={"tag": "mine"})).json()["jobs"] == []
        assert (await http.get(f"/api/v1/jobs/{job_id}")).json()["state"] == "queued"
