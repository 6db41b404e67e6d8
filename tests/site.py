"""A web server on loopback that behaves in all the ways that servers do, and what it saw."""

import asyncio
import gzip
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import brotli
from aiohttp import web

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MIB = 1 << 20
PACKERS = {"gzip": gzip.compress, "br": lambda data: brotli.compress(data, quality=5), "zstd": zstd.compress}


@dataclass
class Site:
    """A web server, and what it saw."""

    port: int = 0
    now: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    order: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    cookies: list[str] = field(default_factory=list)
    tries: Counter[str] = field(default_factory=Counter)
    robots: tuple[int, str] = (404, "")
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def serving() -> AsyncIterator[Site]:  # noqa: PLR0915 - a function for each way to behave
    """The site on 127.0.0.1 and 127.0.0.2."""
    site = Site()
    packed = {coding: await asyncio.to_thread(pack, bytes(64 * MIB)) for coding, pack in PACKERS.items()}

    @web.middleware
    async def watch(request: web.Request, handler: Any) -> web.StreamResponse:
        site.order.append(request.path)
        site.agents.add(request.headers["User-Agent"])
        site.cookies.append(request.headers.get("Cookie", ""))
        host = request.host.partition(":")[0]
        site.now[host] += 1
        site.most[host] = max(site.most[host], site.now[host])
        try:
            return await handler(request)
        finally:
            site.now[host] -= 1

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=f"page {request.match_info['name']}", headers={"Set-Cookie": "seen=1"})

    async def status(request: web.Request) -> web.Response:
        return web.Response(status=int(request.match_info["code"]))

    async def to(request: web.Request) -> web.Response:
        code = int(request.query.get("code", "302"))
        return web.Response(status=code, headers={"Location": request.query["url"]}, text="over there")

    async def bomb(request: web.Request) -> web.Response:
        coding = request.query.get("coding", "gzip")
        return web.Response(body=packed[coding], headers={"Content-Encoding": coding})

    async def packed_page(request: web.Request) -> web.Response:
        coding = request.query["coding"]
        assert coding in request.headers["Accept-Encoding"]
        return web.Response(body=PACKERS[coding](b"small " * 10), headers={"Content-Encoding": coding})

    async def echo(request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        return web.json_response({"method": request.method, "headers": headers, "body": await request.text()})

    async def falter(request: web.Request) -> web.Response:
        """Fails as the query says, so many times for each number, before it answers."""
        site.tries[request.path] += 1
        if site.tries[request.path] > int(request.query.get("times", "1")):
            return web.Response(text="at last")
        if (status := int(request.query.get("status", "503"))) == 0:
            assert request.transport is not None
            request.transport.abort()
        after = request.query.get("after")
        return web.Response(status=status, headers={"Retry-After": after} if after else {})

    async def large(request: web.Request) -> web.Response:
        return web.Response(text="x" * int(request.match_info["size"]))

    async def robots(_: web.Request) -> web.Response:
        return web.Response(status=site.robots[0], text=site.robots[1])

    async def not_gzip(_: web.Request) -> web.Response:
        return web.Response(body=b"plain", headers={"Content-Encoding": "gzip"})

    async def latin(request: web.Request) -> web.Response:
        return web.Response(body="café".encode("latin-1"), headers={"Content-Type": request.query["type"]})

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(65536))
        finally:
            site.gone.set()

    async def short(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"not all of it")
        assert request.transport is not None
        request.transport.close()
        return response

    async def many_headers(_: web.Request) -> web.Response:
        return web.Response(headers={f"X-{number}": "v" * 4000 for number in range(20)})

    async def hold(_: web.Request) -> web.Response:
        await site.held.wait()
        return web.Response()

    app = web.Application(middlewares=[watch])
    app.router.add_get("/page/{name}", page)
    app.router.add_get("/status/{code}", status)
    for handler in (bomb, not_gzip, latin, endless, short, many_headers):
        app.router.add_get(f"/{handler.__name__.replace('_', '-')}", handler)
    app.router.add_get("/hold/{number}", hold)
    app.router.add_get("/large/{size}", large)
    app.router.add_get("/robots.txt", robots)
    app.router.add_get("/packed", packed_page)
    app.router.add_route("*", "/to", to)
    app.router.add_route("*", "/echo", echo)
    app.router.add_route("*", "/falter/{number}", falter)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.port = runner.addresses[0][1]
    await web.TCPSite(runner, "127.0.0.2", site.port).start()
    yield site
    site.held.set()
    await runner.cleanup()


@dataclass
class GatedSite:
    """A web server that answers as many requests as it is allowed to, and how often each path was asked for."""

    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    answers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def urls(self, count: int) -> list[str]:
        return [f"http://127.0.0.1:{self.port}/{number}" for number in range(count)]

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.answers.release()


@asynccontextmanager
async def gated(answer: Callable[[int], web.Response]) -> AsyncIterator[GatedSite]:
    """`answer` is asked by the number that is the path."""
    site = GatedSite()

    async def page(request: web.Request) -> web.Response:
        site.asked[request.path] += 1
        await site.answers.acquire()
        return answer(int(request.match_info["number"]))

    app = web.Application()
    app.router.add_get("/{number}", page)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    site.port = runner.addresses[0][1]
    yield site
    site.allow(2000)
    await runner.cleanup()
