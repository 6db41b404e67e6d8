"""POST /fetch: a few URLs side by side, answered in one."""

import asyncio
import json
from base64 import b64decode
from collections.abc import AsyncIterator
from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from headway.settings import Settings
from tests.conftest import Tenant, until, web
from tests.integration.test_http_fetch import LOOPBACK, doorbell, rang, refusals
from tests.site import MIB, Site, serving

FETCH = "/api/v1/fetch"


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as site:
        yield site


@pytest.fixture
def settings(settings: Settings, site: Site) -> Settings:
    changed = {
        "fetch_allow": (ip_network("127.0.0.0/8"),),
        "fetch_credentials": {site.url(""): {"Authorization": SecretStr("Bearer hunter2")}},
        "fetch_requests": 2,
        "fetch_bytes": 300_000,
    }
    return settings.model_copy(update=changed)


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False, verify=False) as client,
    ):
        yield client


async def fetch(http: httpx.AsyncClient, urls: list[str], **more: Any) -> dict[str, Any]:
    answer = await http.post(FETCH, json={"urls": urls, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def errors(answer: dict[str, Any]) -> list[str | None]:
    return [result["error"] and result["error"]["type"] for result in answer["results"]]


async def test_urls_are_fetched_side_by_side_and_answered_in_their_order(http: httpx.AsyncClient, site: Site) -> None:
    urls = [site.url(f"/hold/{number}") for number in range(18)]
    asking = asyncio.create_task(fetch(http, [*urls, site.url("/page/x"), site.url("/status/404")]))
    await until(lambda: site.now["127.0.0.1"] == 18)
    assert not asking.done()
    site.held.set()
    answer = await asking

    assert answer["complete"] is True
    assert isinstance(answer["ms"], int)
    results = answer["results"]
    assert [result["url"] for result in results[:18]] == urls
    assert [result["index"] for result in results] == list(range(20))
    assert results[18] | {"ms": 0, "headers": 0} == {
        "index": 18,
        "url": site.url("/page/x"),
        "final_url": site.url("/page/x"),
        "status": 200,
        "headers": 0,
        "ms": 0,
        "bytes": 6,
        "body": "page x",
        "error": None,
    }
    assert (results[19]["status"], results[19]["error"]) == (404, None)


async def test_what_is_done_when_the_time_is_over_is_answered(http: httpx.AsyncClient, site: Site) -> None:
    answer = await fetch(http, [site.url("/page/1"), site.url("/hold/1"), site.url("/page/2")], timeout=3)

    assert errors(answer) == [None, "timeout", None]
    assert answer["complete"] is False
    assert answer["results"][2]["body"] == "page 2"
    await until(lambda: site.now["127.0.0.1"] == 0)


async def test_requests_are_made_as_asked(http: httpx.AsyncClient, site: Site) -> None:
    value = {"a": [1, None, "é"]}
    posted = await fetch(http, [site.url("/echo")], method="POST", headers={"X-Trace": "7"}, json=value)
    put = await fetch(http, [site.url("/echo")], method="PUT", headers={"content-type": "text/csv"}, data="a,b\né")
    head = await fetch(http, [site.url("/page/1")], method="HEAD")

    seen = json.loads(posted["results"][0]["body"])
    assert (seen["method"], json.loads(seen["body"])) == ("POST", value)
    assert (seen["headers"]["x-trace"], seen["headers"]["content-type"]) == ("7", "application/json")
    seen = json.loads(put["results"][0]["body"])
    assert (seen["method"], seen["body"], seen["headers"]["content-type"]) == ("PUT", "a,b\né", "text/csv")
    assert [head["results"][0][name] for name in ("status", "bytes", "body")] == [200, 0, ""]


async def test_bodies_are_answered_as_asked_and_within_bounds(http: httpx.AsyncClient, site: Site) -> None:
    page, bomb = site.url("/page/1"), site.url("/bomb")
    assert b64decode((await fetch(http, [page], body="base64"))["results"][0]["body"]) == b"page 1"
    assert "body" not in (await fetch(http, [page], body="none"))["results"][0]
    assert len((await fetch(http, [page], body="digest"))["results"][0]["sha256"]) == 64
    assert errors(await fetch(http, [page, bomb, site.url("/endless")], max_bytes=6)) == [
        None,
        "too-large",
        "too-large",
    ]
    # Each is within its limit, all together are not.
    large = [site.url(f"/large/{size}") for size in (200_000, 200_000)]
    assert "too-large" in errors(await fetch(http, large))
    assert errors(await fetch(http, large, body="digest")) == [None, None]


async def test_codings_are_undone_and_bombs_of_each_are_stopped(http: httpx.AsyncClient, site: Site) -> None:
    codings = ("gzip", "br", "zstd")
    answer = await fetch(http, [site.url(f"/packed?coding={coding}") for coding in codings])
    assert [result["body"] for result in answer["results"]] == ["small " * 10] * 3

    answer = await fetch(http, [site.url(f"/bomb?coding={coding}") for coding in codings], max_bytes=1000)
    assert errors(answer) == ["too-large"] * 3
    assert max(result["bytes"] for result in answer["results"]) < 2 * MIB


async def test_credentials_are_sent_to_their_origin_alone(http: httpx.AsyncClient, site: Site) -> None:
    echo, elsewhere = site.url("/echo"), site.url("/echo", "127.0.0.2")
    away, back = site.url(f"/to?url={elsewhere}"), site.url(f"/to?url={echo}", "127.0.0.2")
    answer = await fetch(
        http,
        [echo, site.url(f"/to?url={echo}"), elsewhere, away, back],
        headers={"X-Api-Key": "mine", "Accept": "text/x"},
    )

    seen = [json.loads(result["body"])["headers"] for result in answer["results"]]
    assert [headers.get("authorization") for headers in seen] == ["Bearer hunter2"] * 2 + [None] * 3
    # What the client chose goes no further than to the origin that it named either.
    assert [headers.get("x-api-key") for headers in seen] == ["mine"] * 3 + [None] * 2
    assert {headers["accept"] for headers in seen} == {"text/x"}


async def test_redirects_keep_the_method_as_their_status_says(http: httpx.AsyncClient, site: Site) -> None:
    urls = [site.url(f"/to?code={code}&url=/echo") for code in (301, 302, 303, 307, 308)]
    answer = await fetch(http, urls, method="POST", data="text")

    seen = [json.loads(result["body"]) for result in answer["results"]]
    assert [(each["method"], each["body"]) for each in seen] == [("GET", "")] * 3 + [("POST", "text")] * 2


async def test_no_address_that_is_not_public_is_dialled(settings: Settings, tenant: Tenant) -> None:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    before = refusals()
    closed = settings.model_copy(update={"fetch_allow": ()})
    async with (
        web(closed) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):
        with doorbell() as listener:
            port = listener.getsockname()[1]
            answer = await fetch(http, [f"http://{host}:{port}/" for host in LOOPBACK])
            assert not rang(listener)

    assert set(errors(answer)) == {"refused-address", "invalid-url"}
    assert refusals() - before == errors(answer).count("refused-address") >= 12


async def test_what_does_not_fit_is_refused(http: httpx.AsyncClient) -> None:
    urls = ["http://a/"]
    for body, field in (
        ({}, "urls"),
        ({"urls": []}, "urls"),
        ({"urls": urls * 21}, "urls"),
        ({"urls": ["ftp://a/"]}, "urls.0"),
        ({"urls": ["http://a b/"]}, "urls.0"),
        ({"urls": ["http://" + "a" * 2048]}, "urls.0"),
        ({"urls": urls, "method": "TRACE"}, "method"),
        ({"urls": urls, "method": "get"}, "method"),
        ({"urls": urls, "headers": {"X": "a\r\nY: b"}}, "headers"),
        ({"urls": urls, "headers": {"X Y": "a"}}, "headers"),
        ({"urls": urls, "headers": {"X": "a", "x": "b"}}, "headers"),
        ({"urls": urls, "headers": {"Host": "b"}}, "headers"),
        ({"urls": urls, "headers": {"Transfer-Encoding": "chunked"}}, "headers"),
        ({"urls": urls, "headers": {"Authorization": "Bearer hunter2"}}, "headers"),
        ({"urls": urls, "headers": {"cookie": "hunter2"}}, "headers"),
        ({"urls": urls, "headers": {f"X-{number}": "" for number in range(51)}}, "headers"),
        ({"urls": urls, "method": "POST", "data": "a", "json": 1}, "body"),
        ({"urls": urls, "data": "a"}, "body"),
        ({"urls": urls, "timeout": 0}, "timeout"),
        ({"urls": urls, "timeout": "1"}, "timeout"),
        ({"urls": urls, "body": "file"}, "body"),
        ({"urls": urls, "max_bytes": MIB + 1}, "max_bytes"),
        ({"urls": urls, "retries": 3}, "retries"),
    ):
        answer = await http.post(FETCH, json=body)
        assert answer.status_code == 422, body
        assert answer.json()["type"] == "urn:headway:problem:invalid-request"
        assert answer.json()["errors"][0]["field"].startswith(field), (body, answer.text)
        assert "hunter2" not in answer.text


async def test_a_tenant_has_so_many_calls_under_way(http: httpx.AsyncClient, site: Site) -> None:
    held = [asyncio.create_task(fetch(http, [site.url(f"/hold/{number}")])) for number in range(2)]
    await until(lambda: site.now["127.0.0.1"] == 2)
    refused = await http.post(FETCH, json={"urls": [site.url("/page/1")]})

    assert (refused.status_code, refused.json()["type"]) == (429, "urn:headway:problem:too-many")
    assert refused.headers["Retry-After"] == "1"
    site.held.set()
    assert [errors(answer) for answer in await asyncio.gather(*held)] == [[None]] * 2
    await fetch(http, [site.url("/page/1")])


async def test_a_client_that_leaves_ends_its_requests(http: httpx.AsyncClient, site: Site) -> None:
    asking = asyncio.create_task(fetch(http, [site.url("/hold/1")]))
    await until(lambda: site.now["127.0.0.1"] == 1)
    asking.cancel()

    await until(lambda: site.now["127.0.0.1"] == 0)
