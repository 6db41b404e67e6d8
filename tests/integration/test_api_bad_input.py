"""Whatever a client sends, it gets a 4xx that says what to do, and the service goes on."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr

from headway import metrics
from headway.settings import Settings
from tests.conftest import Tenant, until, web
from tests.integration.test_api_jobs import idle

JOBS = "/api/v1/jobs"
COUNTDOWN = {"kind": "demo.countdown", "input": {"seconds": 1}}


def refused(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The body of a refusal, which looks like every other."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["X-Request-Id"]
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"]) == (f"urn:headway:problem:{slug}", status)
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in answer.text
    return body


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """The web service alone, with bodies of at most 64 KiB."""
    async with idle(settings.model_copy(update={"max_body": 64 * 1024}), tenant) as http:
        yield http


async def raw(http: httpx.AsyncClient, request: bytes) -> httpx.Response:
    """The answer to bytes that an HTTP library would not send. `KEY` stands for the Authorization header."""
    url = urlsplit(str(http.base_url))
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    key = b"Authorization: " + http.headers["Authorization"].encode()
    try:
        writer.write(request.replace(b"\n", b"\r\n").replace(b"KEY", key))
        async with asyncio.timeout(5):
            status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            named = [(name, value) for name, _, value in (header.partition(": ") for header in headers)]
            answer = httpx.Response(int(status.split()[1]), headers=named)
            content = await reader.readexactly(int(answer.headers["Content-Length"]))
    finally:
        writer.close()
    return httpx.Response(answer.status_code, headers=answer.headers, content=content)


async def test_json_that_cannot_be_read_is_refused(http: httpx.AsyncClient) -> None:
    for body in (
        b"[",
        b"{'kind': 1}",
        b'{"kind": "demo.countdown"} x',
        b'{"kind": NaN}',
        b'{"kind": -Infinity}',
        b'{"kind": 1e400}',
        b'{"kind": ' + b"1" * 5000 + b"}",
        b"[" * 20_000,
        b"[" * 65 + b"]" * 65,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"kind": "a", "kind": "b"}',
        b'{"kind": "demo.countdown", "input": {"seconds": 1, "seconds": 2}}',
        b'{"kind": "\\u0000"}',
        b'{"\\u0000": 1}',
        b'{"kind": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"kind": "\xff"}',
        json.dumps(COUNTDOWN).encode("utf-16"),
        b"\xef\xbb\xbf" + json.dumps(COUNTDOWN).encode(),
    ):
        problem = refused(await http.post(JOBS, content=body), 400, "bad-request")
        assert len(problem["detail"]) < 200, body[:50]


async def test_a_job_that_does_not_fit_is_refused_field_by_field(http: httpx.AsyncClient) -> None:
    for body, slug, fields in (
        (b"", "invalid-request", ["body"]),
        ([], "invalid-request", ["body"]),
        ("text", "invalid-request", ["body"]),
        ({}, "invalid-request", ["kind", "input"]),
        (COUNTDOWN | {"kind": 5}, "invalid-request", ["kind"]),
        (COUNTDOWN | {"kind": "no.such"}, "unknown-kind", []),
        (COUNTDOWN | {"kind": "x" * 300}, "invalid-request", ["kind"]),
        (COUNTDOWN | {"tenant_id": 1}, "invalid-request", ["tenant_id"]),
        (COUNTDOWN | {"tags": "red"}, "invalid-request", ["tags"]),
        (COUNTDOWN | {"tags": ["red", 5]}, "invalid-request", ["tags.1"]),
        (COUNTDOWN | {"tags": [""]}, "invalid-request", ["tags.0"]),
        (COUNTDOWN | {"tags": ["x" * 101]}, "invalid-request", ["tags.0"]),
        (COUNTDOWN | {"tags": ["x"] * 21}, "invalid-request", ["tags"]),
        (COUNTDOWN | {"timeout": 0}, "invalid-request", ["timeout"]),
        (COUNTDOWN | {"timeout": "5"}, "invalid-request", ["timeout"]),
        (COUNTDOWN | {"timeout": True}, "invalid-request", ["timeout"]),
        (COUNTDOWN | {"timeout": 10**9}, "invalid-request", ["timeout"]),
        (COUNTDOWN | {"timeout": 10**400}, "invalid-request", ["timeout"]),
        (COUNTDOWN | {"input": 5}, "invalid-input", ["input"]),
        (COUNTDOWN | {"input": {}}, "invalid-input", ["input"]),
        (COUNTDOWN | {"input": {"seconds": "1"}}, "invalid-input", ["input.seconds"]),
        (COUNTDOWN | {"input": {"seconds": 10**400}}, "invalid-input", ["input.seconds"]),
        (COUNTDOWN | {"input": {"seconds": -1, "more": 1}}, "invalid-input", ["input", "input.seconds"]),
    ):
        content = body if isinstance(body, bytes) else json.dumps(body)
        problem = refused(await http.post(JOBS, content=content), 422, slug)
        assert sorted(error["field"] for error in problem.get("errors", [])) == sorted(fields), body
    assert (
        "demo.countdown"
        in refused(await http.post(JOBS, json=COUNTDOWN | {"kind": "no.such"}), 422, "unknown-kind")["detail"]
    )
    for input in ({}, {"urls": ["http://localhost/"], "file": "018f0000-0000-7000-8000-000000000000"}):
        problem = refused(await http.post(JOBS, json={"kind": "http.fetch", "input": input}), 422, "invalid-input")
        assert problem["detail"].startswith("input: give one of these, and only one: urls, file;")
    assert (await http.get(JOBS)).json()["jobs"] == []


async def test_what_is_wrong_with_a_large_value_is_said(settings: Settings, tenant: Tenant) -> None:
    job = {"kind": "http.fetch", "input": {"urls": ["http://example.com/"] * 10_001}}
    async with idle(settings, tenant) as http:
        problem = refused(await http.post(JOBS, json=job), 422, "invalid-input")
        (error,) = problem["errors"]
        assert error["field"] == "input.urls"
        assert error["message"].endswith("has more than 10000 items")
        assert len(error["message"]) == 500
        assert "has more than 10000 items" in problem["detail"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NEAR = st.fixed_dictionaries(
    {"kind": st.sampled_from(["demo.countdown", "csv.import", "http.fetch"]) | JSON, "input": JSON},
    optional={"tags": JSON, "timeout": JSON, "x": JSON},
)


async def test_no_json_is_answered_with_a_server_error(http: httpx.AsyncClient) -> None:
    loop = asyncio.get_running_loop()

    @given(body=JSON | NEAR)
    @hypothesis_settings(max_examples=50, database=None, suppress_health_check=[HealthCheck.too_slow])
    def check(body: Any) -> None:
        sent = http.post(JOBS, content=json.dumps(body).encode(errors="surrogatepass"))
        answer = asyncio.run_coroutine_threadsafe(sent, loop).result(10)
        if answer.status_code == 202:
            assert answer.json()["kind"] == body["kind"]
        else:
            assert answer.status_code in (400, 422), answer.text
            refused(answer, answer.status_code, answer.json()["type"].rpartition(":")[2])

    await asyncio.to_thread(check)


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [True, True]},
        {"$ref": "http://x/one", "$defs": {"one": {"$id": "http://x/one", "oneOf": [{"required": ["a"]}]}}},
        {"properties": {"5": {"oneOf": [{"required": ["a"]}]}}},
    ],
)
async def test_an_input_is_refused_in_words_whatever_the_schema_of_its_kind(
    settings: Settings, tenant: Tenant, database: asyncpg.Connection, schema: dict[str, Any]
) -> None:
    async with idle(settings, tenant) as http:
        await database.execute("UPDATE kinds SET input_schema = $1 WHERE name = 'demo.countdown'", schema)
        refused(await http.post(JOBS, json=COUNTDOWN | {"input": {"5": {}}}), 422, "invalid-input")


async def test_a_query_that_is_not_understood_is_refused(http: httpx.AsyncClient) -> None:
    job = (await http.post(JOBS, json=COUNTDOWN)).json()["id"]
    for path, status, slug in (
        (f"{JOBS}?foo=1", 422, "invalid-request"),
        (f"{JOBS}?limit=0", 422, "invalid-request"),
        (f"{JOBS}?limit=501", 422, "invalid-request"),
        (f"{JOBS}?limit=ten", 422, "invalid-request"),
        (f"{JOBS}?limit={'9' * 5000}", 422, "invalid-request"),
        (f"{JOBS}?state=done", 422, "invalid-request"),
        (f"{JOBS}?kind={'x' * 201}", 422, "invalid-request"),
        (f"{JOBS}?kind=%00", 400, "bad-request"),
        (f"{JOBS}?tag=a%00b", 400, "bad-request"),
        (f"{JOBS}?cursor=zz", 400, "bad-request"),
        (f"{JOBS}?cursor=%00", 400, "bad-request"),
        (f"{JOBS}?cursor=%F0%9F%92%A9", 400, "bad-request"),
        (f"{JOBS}?cursor=" + "A" * 101, 422, "invalid-request"),
        (f"{JOBS}/{job}?waits=5", 422, "invalid-request"),
        (f"{JOBS}/{job}/artifacts?x=", 422, "invalid-request"),
        ("/api/v1/kinds?x=1", 422, "invalid-request"),
        ("/api/v1/kinds/demo.countdown?x=1", 422, "invalid-request"),
        ("/api/v1/files/00000000-0000-0000-0000-000000000000?x=1", 422, "invalid-request"),
    ):
        refused(await http.get(path), status, slug)
    refused(await http.post(f"{JOBS}?kind=demo.countdown", json=COUNTDOWN), 422, "invalid-request")
    refused(await http.post(f"{JOBS}/{job}/cancel?force=1"), 422, "invalid-request")
    # A cursor that is well-formed but was made up only selects.
    assert (await http.get(f"{JOBS}?cursor=AAAAAAAAAAAAAAAAAAAAAA")).json() == {"jobs": [], "next_cursor": None}


async def test_paths_and_methods_that_do_not_exist(http: httpx.AsyncClient) -> None:
    for path in (
        "/api/",
        "/api/v1",
        "/api/v1/",
        "/api/v2/jobs",
        f"{JOBS}/",
        f"{JOBS}/nothing",
        f"{JOBS}/00000000-0000-0000-0000-000000000000",
        f"{JOBS}/%ff",
        "/api/v1/kinds/no.such",
        "/api/v1/kinds/%00",
        "/api/v1/kinds/a%2Fb",
        "/api/v1/kinds/" + "x" * 10_000,
        "/api/v1/docs/",
    ):
        assert len(refused(await http.get(path), 404, "not-found")["detail"]) < 500
    for method, path, allowed in (
        ("DELETE", JOBS, "GET, HEAD, POST"),
        ("PUT", f"{JOBS}/00000000-0000-0000-0000-000000000000", "GET, HEAD"),
        ("OPTIONS", "/api/v1/kinds", "GET, HEAD"),
        ("GET", "/api/v1/query", "POST"),
        ("GET", f"{JOBS}/00000000-0000-0000-0000-000000000000/cancel", "POST"),
    ):
        answer = await http.request(method, path)
        refused(answer, 405, "method-not-allowed")
        assert answer.headers["Allow"] == allowed


async def test_a_body_over_the_limit_is_refused_and_the_client_gets_to_know(http: httpx.AsyncClient) -> None:
    over = b'{"kind": "' + b"x" * 64 * 1024 + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(over), 1000):
            yield over[start : start + 1000]

    assert "65,536" in refused(await http.post(JOBS, content=over), 413, "too-large")["detail"]
    assert "65,536" in refused(await http.post(JOBS, content=chunks()), 413, "too-large")["detail"]
    # Far more than the buffers of the connection hold: without care the answer would be lost in a reset.
    refused(await http.post(JOBS, content=bytes(30_000_000)), 413, "too-large")
    announced = await raw(http, b"POST /api/v1/jobs HTTP/1.1\nHost: x\nContent-Length: 99999999999\nKEY\n\n{}" + over)
    refused(announced, 413, "too-large")
    assert announced.headers["Connection"] == "close"
    fits = b" " * (64 * 1024 - 60) + json.dumps(COUNTDOWN).encode()
    assert (await http.post(JOBS, content=fits)).status_code == 202


async def test_what_is_not_http_is_refused(http: httpx.AsyncClient) -> None:
    for request in (
        b"\x16\x03\x01\x02",
        b"GET\n\n",
        b"GET /api/v1/\xff HTTP/1.1\nHost: x\n\n",
        b"GET /api/v1/jobs?tag=\xff HTTP/1.1\nHost: x\nKEY\n\n",
        b"POST /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nContent-Length: -1\n\n{}",
        b"POST /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nContent-Length: x\n\n{}",
        b"POST /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nContent-Length: " + b"9" * 5000 + b"\n\n{}",
        b"POST /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nContent-Length: 2\nContent-Length: 3\n\n{}",
        b"POST /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nContent-Length: 2\nTransfer-Encoding: chunked\n\n0\n\n",
        b"GET /api/v1/jobs HTTP/1.1\nHost: x\nKEY\n"
        + b"".join(b"x%d: y\n" % number for number in range(10_000))
        + b"\n",
        b"GET /api/v1/jobs HTTP/1.1\nHost: x\nKEY\nX: " + b"y" * 2_000_000 + b"\n\n",
        b"GET /api/v1/jobs?tag=" + b"y" * 2_000_000 + b" HTTP/1.1\nHost: x\nKEY\n\n",
    ):
        try:
            answer = await raw(http, request)
        except (ConnectionError, asyncio.IncompleteReadError):
            # Refused while the client was sending: the system may drop what it has not read.
            assert len(request) > 1_000_000
            continue
        refused(answer, 400, "bad-request")
    many = b"".join(b"x%d: y\n" % number for number in range(90))
    answer = await raw(http, b"GET /api/v1/jobs HTTP/1.1\nHost: x\nConnection: close\nKEY\n" + many + b"\n")
    assert answer.status_code == 200


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    def answered(status: str) -> float:
        samples = (sample for metric in metrics.http_requests.collect() for sample in metric.samples)
        return sum(
            sample.value for sample in samples if sample.name.endswith("_total") and sample.labels["status"] == status
        )

    left, failed = answered("499"), answered("500")
    url = urlsplit(str(http.base_url))
    for path in (JOBS, "/api/v1/files"):
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['Authorization']}\r\n"
        writer.write(f"{head}Content-Length: 60000\r\n\r\n".encode() + b"{" * 1000)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    await until(lambda: answered("499") == left + 2)
    assert answered("500") == failed
    assert (await http.get(JOBS)).json()["jobs"] == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_the_request_id_is_the_clients_if_it_is_sane(http: httpx.AsyncClient) -> None:
    sane = await http.get(JOBS, headers={"X-Request-Id": "abc-123_x.9"})
    assert sane.headers["X-Request-Id"] == "abc-123_x.9"
    for other in ("", "a b", "x" * 65, "a\tb", "<script>"):
        answer = await http.get(JOBS, headers={"X-Request-Id": other})
        assert len(answer.headers["X-Request-Id"]) == 32


async def test_without_a_database_the_answer_is_503(settings: Settings, tenant: Tenant) -> None:
    away = settings.model_copy(update={"database_url": SecretStr("postgresql://headway@127.0.0.1:1/headway")})
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with web(away) as url, httpx.AsyncClient(base_url=url, headers=headers) as http:
        for answer in (
            await http.get(JOBS),
            await http.post(JOBS, json=COUNTDOWN),
            await http.post("/api/v1/files", content=b"x"),
            await http.get("/api/v1/kinds"),
        ):
            refused(answer, 503, "unavailable")
            assert int(answer.headers["Retry-After"]) > 0


async def test_when_the_database_comes_back_so_does_the_service(
    http: httpx.AsyncClient, database: asyncpg.Connection
) -> None:
    assert (await http.get(JOBS)).status_code == 200
    await database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def accepted() -> bool:
        answer = await http.post(JOBS, json=COUNTDOWN)
        assert answer.status_code in (202, 503)
        return answer.status_code == 202

    await until(accepted)
