"""What Headway adds to a request: `GET /api/v1/kinds` against views of Django that answer with the same bytes.

    python benchmarks/api_overhead.py [--requests 3000] [--rounds 5] [--profile]

All run in this process, through their ASGI applications, on uvloop, in turns; CPU time is measured. Headway's request
is the real one: key, routing, request id, metrics, log line, JSON of the kinds in the box; its log goes to /dev/null.
`bare` is the least that Django can do without threads: a handler without middleware that makes the request, lets Django
resolve the path and call an asynchronous view, and sends. `stock` is Django's own ASGI handler without middleware,
threads and all. Every round gives a ratio. Goal: the median of Headway to bare is at most 2.0.
"""

import argparse
import asyncio
import cProfile
import os
import pstats
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from uuid_utils.compat import uuid7

from headway import keys, kinds, logs
from headway import settings as headway_settings
from headway.embedded import Embedded
from headway.settings import Settings
from headway.store import Store

GOAL = 2.0
SLICES = 20  # turns in a round: what else the machine does then falls on all alike
PATH = "/api/v1/kinds"

Asgi = Callable[[Any, Any, Any], Awaitable[None]]
urlpatterns: list[Any] = []  # this module is the ROOT_URLCONF of `bare` and `stock`


def contenders(body: bytes, application: Asgi) -> dict[str, Asgi]:
    """The applications by name; Django is set up."""
    from django.core.asgi import get_asgi_application
    from django.core.handlers.asgi import ASGIHandler, ASGIRequest
    from django.http import HttpRequest, HttpResponse
    from django.urls import path

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(body, content_type="application/json", headers={"Content-Length": str(len(body))})

    urlpatterns.append(path(PATH.lstrip("/"), view))

    class Bare(ASGIHandler):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await receive()
            request = ASGIRequest(scope, None)  # type: ignore[arg-type]
            await self.send_response(await self._get_response_async(request), send)  # type: ignore[attr-defined]

    return {"headway": application, "bare": Bare(), "stock": get_asgi_application()}


async def requests(application: Asgi, count: int, key: str) -> bytes:
    """Send `count` requests one after another; the body of the last answer."""
    body = b""

    async def send(message: Any) -> None:
        nonlocal body
        if message["type"] == "http.response.start":
            assert message["status"] == 200, message
        else:
            body += message.get("body", b"")

    for _ in range(count):
        body, asked = b"", False

        async def receive() -> Any:
            nonlocal asked
            if asked:
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [
            (b"host", b"127.0.0.1:8000"),
            (b"accept", b"*/*"),
            (b"accept-encoding", b"gzip, deflate"),
            (b"connection", b"keep-alive"),
            (b"user-agent", b"benchmark"),
            (b"authorization", f"Bearer {key}".encode()),
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 40000),
            "scheme": "http",
            "root_path": "",
            "method": "GET",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "headers": headers,
        }
        await application(scope, receive, send)
    return body


async def prepare(settings: Settings) -> str:
    """A tenant, the kinds in the box; the key."""
    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    key, tenant_id = keys.new(), uuid7()
    digest = key.digest(settings.key_pepper.get_secret_value())
    await connection.execute("INSERT INTO tenants (id, name) VALUES ($1, 'bench')", tenant_id)
    await connection.execute(
        "INSERT INTO api_keys (id, tenant_id, name, digest) VALUES ($1, $2, 'bench', $3)", key.id, tenant_id, digest
    )
    await connection.close()
    store = Store(settings.database_url.get_secret_value(), pool=2)
    await store.open()
    await store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
    await store.close()
    return key.text


async def measure(settings: Settings, count: int, rounds: int, profile: bool) -> None:
    from django.test import override_settings

    from services.web.asgi import Application

    key = await prepare(settings)
    application = Application(settings)
    body = await requests(application, 1, key)
    if profile:
        await requests(application, 500, key)
        with cProfile.Profile() as profiler:
            await requests(application, count, key)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
        await application.close()
        return
    # Headway has its routes by now; the others get theirs from this module.
    with override_settings(MIDDLEWARE=[], ROOT_URLCONF=__name__):
        applications = contenders(body, application)
        times: dict[str, list[float]] = {name: [] for name in applications}
        for name, one in applications.items():
            assert await requests(one, 300, key) == body, name
        for _ in range(rounds):
            spent = dict.fromkeys(applications, 0.0)
            for _ in range(SLICES):
                for name, one in applications.items():
                    began = time.process_time()
                    await requests(one, count // SLICES, key)
                    spent[name] += time.process_time() - began
            for name, seconds in spent.items():
                times[name].append(seconds / count)
    await application.close()
    for name, measured in times.items():
        micro = [seconds * 1e6 for seconds in measured]
        print(f"{name:8} {statistics.median(micro):8,.0f} µs a request   ({min(micro):,.0f} to {max(micro):,.0f})")
    for name in ("bare", "stock"):
        ratios = [ours / theirs for ours, theirs in zip(times["headway"], times[name], strict=True)]
        ratio = statistics.median(ratios)
        verdict = f"   goal {GOAL}: {'met' if ratio <= GOAL else 'missed'}" if name == "bare" else ""
        print(f"headway / {name:6} {ratio:6.2f}   ({min(ratios):.2f} to {max(ratios):.2f}){verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="show where Headway's time goes instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, Embedded(Path(home), durable=False, redis=False) as servers:
        servers.create_database("headway")
        os.environ |= {
            "HEADWAY_HOME": home,
            "HEADWAY_DATABASE_URL": servers.postgres_url("headway"),
            "HEADWAY_REDIS_URL": "redis://127.0.0.1:1/0",
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": secrets.token_hex(32),
            "DJANGO_SETTINGS_MODULE": "services.web.settings",
        }
        settings = headway_settings.load()
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            stderr, sys.stderr = sys.stderr, nowhere
            logs.configure(settings, "web")
            try:
                uvloop.run(measure(settings, options.requests, options.rounds, options.profile))
            finally:
                sys.stderr = stderr


if __name__ == "__main__":
    main()
