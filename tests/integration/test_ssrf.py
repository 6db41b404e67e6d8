"""No SYN leaves for an address that is not public, however it is written, named or redirected to.

What is counted are the connections that this process asks its kernel for, in an audit hook of Python's, and those that
arrive at a socket that listens on all addresses of the machine.
"""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from headway import addresses
from headway.fetching.deadlines import Deadlines
from headway.fetching.fetcher import Fetcher, Record
from headway.fetching.requests import Request
from headway.fetching.session import open_session
from tests.ssrf import DIRECT, HOSTS, NAMES

# The one address that is allowed: the site that redirects is there.
SITE = "127.0.0.2"
REFUSALS = {"refused-address", "invalid-url", "bad-redirect", "dns"}


@dataclass
class Dialled:
    """What this process has asked its kernel to connect to."""

    addresses: list[tuple[str, int]] = field(default_factory=list)


_watching: Dialled | None = None


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "socket.connect" or _watching is None or not isinstance(arguments[1], tuple):
        return
    host, port = arguments[1][:2]
    _watching.addresses.append((host, port))
    if not ip_address(host.partition("%")[0]).is_loopback:
        raise ConnectionAbortedError("A test dials nothing but this machine.")


sys.addaudithook(_on_audit)


@pytest.fixture
def dialled() -> Iterator[Dialled]:
    global _watching  # noqa: PLW0603 - the hook stays for as long as the process
    _watching = Dialled()
    yield _watching
    _watching = None


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names of the corpus resolve to what it says, and no other name that is not of this machine to anything.

    A name's answers that are lists are given one after the other.
    """
    answers: dict[str, Any] = dict(NAMES)
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        found = answers.get(name.lower())
        if found is None:
            if name.rpartition(".")[2].isalpha() and name.lower().rstrip(".") != "localhost":
                raise socket.gaierror(socket.EAI_NONAME, "not a name of the corpus")
            return real(host, port, *rest, **named)
        if isinstance(found[0], list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (each, port, 0, 0))
            if ":" in each
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port))
            for each in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


@contextmanager
def doorbell() -> Iterator[tuple[int, list[bool]]]:
    """A port on all addresses of this machine where nobody answers, and whether a connection came, once it is left."""
    rang: list[bool] = []
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        listener.setblocking(False)
        yield listener.getsockname()[1], rang
        try:
            listener.accept()[0].close()
            rang.append(True)
        except BlockingIOError:
            pass


@asynccontextmanager
async def redirecting() -> AsyncIterator[str]:
    """A site that sends whoever asks to the `to` of the query; its URL."""

    async def to(request: web.Request) -> web.Response:
        code = int(request.query.get("code", "302"))
        return web.Response(status=code, headers={"Location": request.query["to"]})

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/to", to)
    app.router.add_get("/", page)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, SITE, 0).start()
    try:
        yield f"http://{SITE}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def fetch_all(urls: list[str]) -> list[Record]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session([ip_network(f"{SITE}/32")], 20, 20))
        deadlines = Deadlines(2)
        watching = asyncio.create_task(deadlines.watch())
        stack.callback(watching.cancel)
        fetcher = Fetcher(session, deadlines, "text", 1 << 16)
        return [await fetcher.fetch(Request(index, url)) for index, url in enumerate(urls)]


def admitted(urls: list[str], records: list[Record]) -> list[tuple[str, Any]]:
    """The URLs that were not refused."""
    return [
        (url, record["error"] or record["status"])
        for url, record in zip(urls, records, strict=True)
        if not record["error"] or record["error"]["type"] not in REFUSALS
    ]


def strangers(dialled: Dialled, site: str) -> list[tuple[str, int]]:
    """What was dialled that is not the site."""
    own = (SITE, int(site.rpartition(":")[2]))
    return [address for address in dialled.addresses if address != own]


def test_the_corpus_is_large() -> None:
    assert len(set(DIRECT)) == len(DIRECT) >= 150
    assert all(name.lower() in NAMES for name in HOSTS["names"])


async def test_no_url_of_the_corpus_is_dialled(dialled: Dialled) -> None:
    with doorbell() as (port, rang):
        urls = [url.replace("{port}", str(port)) for url in DIRECT]
        records = await fetch_all(urls)

    assert dialled.addresses == []
    assert rang == []
    assert admitted(urls, records) == []
    # One answer for all that are refused for their address: it does not tell a private network from the next.
    said = {record["error"]["message"] for record in records if record["error"]["type"] == "refused-address"}
    assert said == {"The address is not public, so it is not fetched."}
    assert all(record["status"] is None and not record["headers"] for record in records)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_no_redirect_to_the_corpus_is_followed(dialled: Dialled, code: int) -> None:
    # Each code has its share, so that all have all together.
    share = DIRECT[(code - 300) % 5 :: 5]
    with doorbell() as (port, rang):
        async with redirecting() as site:
            targets = [url.replace("{port}", str(port)) for url in share if "\t" not in url]
            # Without a scheme or host of its own a URL is one of the site itself, which is no harm.
            elsewhere = [url for url in targets if url.startswith(("http://", "https://", "HTTP", "hTtP", "//"))]
            urls = [f"{site}/to?code={code}&to={quote(url, safe='')}" for url in elsewhere]
            records = await fetch_all(urls)

    assert strangers(dialled, site) == []
    assert rang == []
    assert [entry for entry in admitted(urls, records) if entry[1] != 404] == []
    assert len(urls) > 20


async def test_a_name_that_turns_to_another_address_is_judged_anew(
    dialled: Dialled, names: dict[str, list[Any]]
) -> None:
    with doorbell() as (port, rang):
        async with redirecting() as site:
            own = site.rpartition(":")[2]
            # What was looked up for one port is not used for another, so the second hop asks anew.
            names["rebinding.test"] = [[SITE], ["127.0.0.1"]]
            first = f"http://rebinding.test:{own}/to?to={quote(f'http://rebinding.test:{port}/', safe='')}"
            [hop] = await fetch_all([first])
            # And one whose second answer comes a request later, in another session.
            names["later.test"] = [[SITE], ["127.0.0.1"]]
            [before] = await fetch_all([f"http://later.test:{own}/"])
            [after] = await fetch_all([f"http://later.test:{own}/"])

    assert hop["error"]["type"] == after["error"]["type"] == "refused-address"
    assert before["status"] == 200
    assert strangers(dialled, site) == []
    assert rang == []


async def test_no_proxy_and_no_netrc_of_the_environment_is_used(
    dialled: Dialled, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "netrc").write_text(f"machine {SITE} login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with doorbell() as (port, rang):
        for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy"):
            for spelling in (name, name.upper()):
                monkeypatch.setenv(spelling, f"http://127.0.0.1:{port}")
        async with redirecting() as site:
            [record] = await fetch_all([f"{site}/"])

    assert record["body"] == "here"
    assert strangers(dialled, site) == []
    assert rang == []


async def test_the_measure_sees_what_is_dialled_once_nothing_is_refused(
    dialled: Dialled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_public", lambda ip: True)
    with doorbell() as (port, rang):
        hosts = ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "loopback.test", "mixed.test"]
        private = ["10.0.0.1", "169.254.169.254", "[fd00:ec2::254]", "metadata.test"]
        async with asyncio.timeout(20), open_session((), 20, 20) as session:
            deadlines = Deadlines(0.5)
            watching = asyncio.create_task(deadlines.watch())
            fetcher = Fetcher(session, deadlines, "none", 1 << 16)
            requests = [Request(0, f"http://{host}:{port}/") for host in [*hosts, *private]]
            await asyncio.gather(*map(fetcher.fetch, requests))
            watching.cancel()

    assert rang == [True]
    seen = {host for host, _ in dialled.addresses}
    assert {"127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "fd00:ec2::254"} <= seen
