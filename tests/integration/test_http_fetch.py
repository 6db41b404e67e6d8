"""The kind http.fetch against a real server on loopback, through the real service."""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client import REGISTRY

from tests.conftest import Service, until
from tests.site import MIB, Site, serving

Lines = dict[int, dict[str, Any]]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as site:
        yield site


@contextmanager
def doorbell() -> Iterator[socket.socket]:
    """A listening socket on all addresses of this machine that nobody answers: a SYN that comes leaves a connection."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        listener.setblocking(False)
        yield listener


def rang(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def refusals() -> float:
    return REGISTRY.get_sample_value("headway_ssrf_blocked_total") or 0.0


async def submit(service: Service, **input: Any) -> str:
    accepted = await service.http.post("/api/v1/jobs", json={"kind": "http.fetch", "input": {"tries": 1} | input})
    assert accepted.status_code == 202, accepted.text
    return accepted.headers["Location"]


async def ended(service: Service, path: str) -> dict[str, Any]:
    async def look() -> dict[str, Any] | None:
        job = (await service.http.get(path)).json()
        return job if job["state"] in ("succeeded", "failed", "cancelled") else None

    return await until(look, deadline=30)


async def fetched(service: Service, **input: Any) -> tuple[dict[str, Any], Lines]:
    """The result of a job that must succeed, and its lines by index."""
    path = await submit(service, **input)
    job = await ended(service, path)
    assert job["state"] == "succeeded", job["error"]
    artifact = await service.http.get(f"{path}/artifacts/results.jsonl")
    lines = [json.loads(line) for line in artifact.text.splitlines()]
    assert len(lines) == len(input["urls"])
    return job["result"], {line["index"]: line for line in lines}


def error_of(line: dict[str, Any]) -> str:
    return line["error"]["type"]


async def test_a_thousand_urls_are_a_thousand_lines_and_a_summary(service: Service, site: Site) -> None:
    urls = [site.url(f"/page/{number}") for number in range(990)]
    urls += [site.url("/status/404")] * 6 + [site.url("/status/500")] * 3 + [site.url("/short")]

    result, lines = await fetched(service, urls=urls, concurrency=50, per_host=50)

    assert result | {"seconds": 0, "latency_ms": 0, "bytes": 0} == {
        "total": 1000,
        "ok": 990,
        "http_error": 9,
        "failed": 1,
        "retries": 0,
        "statuses": {"2xx": 990, "4xx": 6, "5xx": 3},
        "errors": {"disconnected": 1},
        "latency_ms": 0,
        "bytes": 0,
        "seconds": 0,
    }
    assert result["bytes"] == sum(line["bytes"] for line in lines.values())
    assert 0 < result["latency_ms"]["p50"] <= result["latency_ms"]["p90"] <= result["latency_ms"]["p99"]
    assert sorted(lines) == list(range(1000))
    line = lines[7]
    assert line | {"headers": {}, "ms": 0} == {
        "index": 7,
        "url": urls[7],
        "final_url": urls[7],
        "status": 200,
        "headers": {},
        "ms": 0,
        "bytes": 6,
        "sha256": hashlib.sha256(b"page 7").hexdigest(),
        "error": None,
        "tries": 1,
    }
    assert line["headers"]["content-type"] == "text/plain; charset=utf-8"
    assert site.agents == {"Headway/0.1.0"}
    assert site.most["127.0.0.1"] <= 50


async def test_progress_counts_urls(service: Service, site: Site) -> None:
    path = await submit(service, urls=[site.url("/page/1"), site.url("/status/503"), "http://nobody.invalid/"])
    progress = (await ended(service, path))["progress"]

    assert (progress["done"], progress["total"], progress["unit"]) == (3, 3, "urls")
    assert progress["counts"] == {"ok": 1, "http_error": 1, "failed": 1, "bytes": 6}


async def test_a_url_listed_twice_is_fetched_twice(service: Service, site: Site) -> None:
    _, lines = await fetched(service, urls=[site.url("/page/1")] * 3, body="none")

    assert site.order == ["/page/1"] * 3
    assert [sorted(line) for line in lines.values()] == [
        ["bytes", "error", "final_url", "headers", "index", "ms", "status", "tries", "url"]
    ] * 3


async def test_no_cookie_is_carried_from_one_url_to_the_next(service: Service, site: Site) -> None:
    await fetched(service, urls=[site.url("/page/1", "localhost")] * 2, concurrency=1)

    assert site.cookies == ["", ""]


async def test_text_is_read_in_its_charset(service: Service, site: Site) -> None:
    types = ["text/plain; charset=ISO-8859-1", "text/plain", "text/plain; charset=punycode", "text/plain; charset=nope"]
    urls = [site.url("/page/é%20%E2%80%A8"), *(site.url(f"/latin?type={kind}").replace(" ", "%20") for kind in types)]

    _, lines = await fetched(service, urls=urls, body="text")

    assert lines[0]["body"] == "page é \u2028"
    assert lines[1]["body"] == "café"
    assert [error_of(lines[number]) for number in (2, 3, 4)] == ["decode"] * 3
    assert [lines[number]["body"] for number in (2, 3, 4)] == [None] * 3


async def test_redirects_are_followed_five_times_and_only_to_http(service: Service, site: Site) -> None:
    def through(hops: int, target: str) -> str:
        for _ in range(hops):
            target = site.url("/to?url=") + quote(target, safe="")
        return target

    urls = [
        through(1, "/page/here#part"),
        through(5, site.url("/page/there")),
        through(6, site.url("/page/there")),
        *(through(1, bad) for bad in ("file:///etc/passwd", "gopher://x/", "http://user:secret@x/", "http://[::1")),
        site.url("/status/304"),
        site.url("/status/302"),
    ]
    result, lines = await fetched(service, urls=urls)

    assert lines[0]["final_url"] == site.url("/page/here")
    assert (lines[1]["final_url"], lines[1]["status"]) == (site.url("/page/there"), 200)
    assert error_of(lines[2]) == "too-many-redirects"
    assert [error_of(lines[number]) for number in range(3, 7)] == ["bad-redirect"] * 4
    assert [lines[7]["status"], lines[8]["status"]] == [304, 302]
    assert result["statuses"] == {"2xx": 2, "3xx": 2}


async def test_a_slow_host_holds_up_no_other(service: Service, site: Site) -> None:
    slow = [site.url(f"/hold/{number}", "127.0.0.2") for number in range(100)]
    fast = [site.url(f"/page/{number}") for number in range(100)]
    path = await submit(service, urls=[*slow, *fast], concurrency=6, per_host=3)

    async def only_the_slow_are_left() -> bool:
        progress = (await service.http.get(path)).json()["progress"]
        return bool(progress) and progress["done"] == 100

    await until(only_the_slow_are_left)
    assert site.most["127.0.0.1"] <= 3
    assert site.now["127.0.0.2"] == site.most["127.0.0.2"] == 3
    site.held.set()
    assert (await ended(service, path))["result"]["ok"] == 200


async def test_bodies_stop_at_the_limit_once_decompressed(service: Service, site: Site) -> None:
    result, lines = await fetched(
        service, urls=[site.url("/bomb"), site.url("/endless"), site.url("/page/12345678")], max_bytes=10
    )

    assert [error_of(lines[0]), error_of(lines[1]), error_of(lines[2])] == ["too-large"] * 3
    assert [line["sha256"] for line in lines.values()] == [None] * 3
    assert lines[0]["bytes"] < 2 * MIB
    assert result["errors"] == {"too-large": 3}
    await asyncio.wait_for(site.gone.wait(), 5)


async def test_a_body_of_exactly_the_limit_is_taken(service: Service, site: Site) -> None:
    _, lines = await fetched(service, urls=[site.url("/page/12345")], max_bytes=10, body="text")

    assert lines[0]["body"] == "page 12345"


async def test_each_url_has_its_own_deadline(service: Service, site: Site) -> None:
    _, lines = await fetched(
        service, urls=[site.url("/hold/1"), site.url("/to?url=/hold/2"), site.url("/page/1")], timeout=2
    )

    assert [error_of(lines[0]), error_of(lines[1]), lines[2]["error"]] == ["timeout", "timeout", None]
    assert 2000 <= lines[0]["ms"] < 10_000


async def test_each_failure_has_a_word(service: Service, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    cases = {
        "http://user:secret@127.0.0.1/": "invalid-url",
        "http://[::1": "invalid-url",
        "http:///path": "invalid-url",
        "http://127.0.0.1:99999/": "invalid-url",
        "http://nobody.invalid/": "dns",
        "http://a..b/": "dns",
        f"http://127.0.0.1:{nobody}/": "connect",
        site.url("/page/1").replace("http:", "https:"): "tls",
        site.url("/not-gzip"): "decode",
        site.url("/short"): "disconnected",
    }
    result, lines = await fetched(service, urls=list(cases))

    assert {line["url"]: error_of(line) for line in lines.values()} == cases
    assert result["ok"] == 0
    assert result["latency_ms"] is None


async def test_headers_are_cut_at_16_kib(service: Service, site: Site) -> None:
    _, lines = await fetched(service, urls=[site.url("/many-headers")])

    assert lines[0]["error"] is None
    assert 12_000 < len(json.dumps(lines[0]["headers"])) < 17_000


async def test_cancel_waits_for_no_request_under_way(service: Service, site: Site) -> None:
    path = await submit(service, urls=[site.url(f"/hold/{number}") for number in range(50)], timeout=60)
    await until(lambda: site.now["127.0.0.1"] == 5)

    asked = asyncio.get_running_loop().time()
    await service.http.post(f"{path}/cancel")
    job = await ended(service, path)

    assert job["state"] == "cancelled"
    await until(lambda: site.now["127.0.0.1"] == 0)
    assert asyncio.get_running_loop().time() - asked < 5


LOOPBACK = [
    "127.0.0.1",
    "127.1.2.3",
    "localhost",
    "0.0.0.0",
    "0",
    "0x7f.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "127.1",
    "①②⑦.0.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
]


async def test_no_connection_is_tried_to_an_address_that_is_not_public(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWAY_FETCH_ALLOW", "")
    before = refusals()
    with doorbell() as listener:
        port = listener.getsockname()[1]
        _, lines = await fetched(service, urls=[f"http://{host}:{port}/" for host in LOOPBACK])

        assert not rang(listener)
        socket.create_connection(("127.0.0.1", port)).close()
        assert rang(listener), "the listener would have seen a connection"
    # Numbers that are written oddly are not URLs of a host to the HTTP client; none is dialled either.
    assert {error_of(line) for line in lines.values()} == {"refused-address", "invalid-url"}
    refused = [line for line in lines.values() if error_of(line) == "refused-address"]
    assert len(refused) >= 12
    assert {line["error"]["message"] for line in refused} == {"The address is not public, so it is not fetched."}
    assert refusals() - before == len(refused)


async def test_a_redirect_reaches_no_address_that_is_not_public(service: Service, site: Site) -> None:
    targets = ["http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[fd00:ec2::254]/"]
    with doorbell() as listener:
        targets.append(f"http://[::1]:{listener.getsockname()[1]}/")
        _, lines = await fetched(service, urls=[site.url(f"/to?url={target}") for target in targets])

        assert not rang(listener)
    assert [error_of(lines[number]) for number in range(4)] == ["refused-address"] * 4
    assert lines[0]["final_url"] == targets[0]
    assert lines[0]["status"] is None


async def test_a_name_with_one_address_that_is_not_public_is_refused_whole(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"mixed.test": ["8.8.8.8", "10.0.0.1"], "private.test": ["10.0.0.1"]}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        if host not in answers:
            return real(host, port, *rest, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    _, lines = await fetched(service, urls=[f"http://{host}/" for host in answers])

    assert [line["error"] for line in lines.values()] == [lines[0]["error"]] * 2
    assert error_of(lines[0]) == "refused-address"


async def test_an_input_that_does_not_fit_is_refused(service: Service) -> None:
    urls = ["http://a/"]
    inputs: list[dict[str, Any]] = [
        {},
        {"urls": []},
        {"urls": urls * 10_001},
        {"urls": "http://a/"},
        {"urls": ["ftp://a/"]},
        {"urls": ["file:///etc/passwd"]},
        {"urls": ["//a/"]},
        {"urls": ["http://a b/"]},
        {"urls": ["http://" + "a" * 2048]},
        {"urls": [7]},
        {"urls": urls, "concurrency": 0},
        {"urls": urls, "concurrency": 101},
        {"urls": urls, "per_host": 51},
        {"urls": urls, "timeout": 121},
        {"urls": urls, "timeout": 0},
        {"urls": urls, "body": "file"},
        {"urls": urls, "file": "0190b2f4-0000-7000-8000-000000000000"},
        {"file": "urls.txt"},
        {"urls": urls, "method": "TRACE"},
        {"urls": urls, "headers": {"X": 1}},
        {"urls": urls, "tries": 11},
        {"urls": urls, "rate": 0},
        {"urls": urls, "robots": "yes"},
        {"urls": urls, "max_bytes": 0},
        {"urls": urls, "max_bytes": 17 * MIB},
        {"urls": urls, "proxy": "http://a/"},
    ]
    for input in inputs:
        answer = await service.http.post("/api/v1/jobs", json={"kind": "http.fetch", "input": input})

        assert answer.status_code == 422, input
        assert answer.json()["type"] == "urn:headway:problem:invalid-input"
        assert answer.json()["errors"]


async def test_text_over_its_limit_is_refused_by_the_worker(service: Service, site: Site) -> None:
    job = await ended(service, await submit(service, urls=[site.url("/page/1")], body="text", max_bytes=2 * MIB))

    assert job["state"] == "failed"
    assert job["error"]["type"] == "input-refused"
    assert "max_bytes" in job["error"]["message"]
