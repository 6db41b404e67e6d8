"""Chromium and Firefox, driven through `drive.mjs`; Node; and nginx before the service."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from headway.client import Client
from headway.settings import Settings
from tests.conftest import Tenant, until, web, worker
from tests.ports import free_ports

HERE = Path(__file__).parent
BROWSERS = {"chromium": ("chrome", "chromium"), "firefox": ("firefox", "firefox-esr")}

Json = dict[str, Any]


class Browser:
    """A browser in a process group of its own."""

    def __init__(self, name: str) -> None:
        kind, program = BROWSERS[name]
        path = shutil.which(program)
        assert path is not None, f"{program} is not installed; run `make browser`"
        self.name = name
        self._driver = subprocess.Popen(
            ["node", "drive.mjs", kind, path], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._turn = asyncio.Lock()
        self._pid = self._ask({"do": "pid"})

    async def open(self, url: str) -> "Page":
        page = Page(self, uuid4().hex)
        await self.ask("open", page=page.name, url=url)
        return page

    async def ask(self, do: str, **fields: Any) -> Any:
        async with self._turn:
            return await asyncio.to_thread(self._ask, {"do": do, **fields})

    def signal(self, number: signal.Signals) -> None:
        """To all processes of the browser."""
        os.killpg(self._pid, number)

    def quit(self) -> None:
        try:
            with self._driver:
                self._ask({"do": "quit"})
        finally:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)

    def _ask(self, command: Json) -> Any:
        assert self._driver.stdin is not None and self._driver.stdout is not None
        self._driver.stdin.write(json.dumps(command) + "\n")
        self._driver.stdin.flush()
        answer = json.loads(self._driver.stdout.readline() or '{"error": "the driver has ended"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]


class Page:
    """A page in a browser."""

    def __init__(self, browser: Browser, name: str) -> None:
        self.browser = browser
        self.name = name

    async def run(self, function: str, *arguments: Any) -> Any:
        """What a function of JavaScript returns for these arguments."""
        given = ", ".join(json.dumps(argument) for argument in arguments)
        return await self.browser.ask("run", page=self.name, script=f"({function})({given})")

    async def until(self, expression: str, deadline: float = 10.0) -> Any:
        """The first true value of an expression."""
        return await until(lambda: self.run(f"() => {expression}"), deadline)

    async def screenshot(self, path: Path) -> None:
        await self.browser.ask("screenshot", page=self.name, path=str(path))

    async def shut(self) -> list[str]:
        """Close the page; what all pages of the browser have complained about since the last one was closed."""
        return await self.browser.ask("shut", page=self.name)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=BROWSERS)
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    running = Browser(request.param)
    yield running
    running.quit()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    running = Browser("chromium")
    yield running
    running.quit()


@pytest.fixture(scope="module")
def firefox() -> Iterator[Browser]:
    running = Browser("firefox")
    yield running
    running.quit()


async def node(*arguments: str) -> list[str]:
    """The lines that a program of Node writes until it ends by itself. Its standard input stays open."""
    pipe = subprocess.PIPE
    running = await asyncio.create_subprocess_exec("node", *arguments, cwd=HERE, stdin=pipe, stdout=pipe)
    try:
        assert running.stdout is not None
        written = (await running.stdout.read()).decode()
        assert await running.wait() == 0, written
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
    return written.splitlines()


NGINX = """
daemon off;
pid {folder}/pid;
error_log stderr;
worker_processes 1;
{user}
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {url};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 60s;
        }}
    }}
}}
"""


@asynccontextmanager
async def nginx(url: str, folder: Path) -> AsyncIterator[str]:
    """nginx before a service; its URL. It is set up as docs/live.md says."""
    port = free_ports()
    config = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(NGINX.format(folder=folder, port=port, url=url, user=user))
    running = await asyncio.create_subprocess_exec(nginx_program(), "-c", str(config), "-e", "stderr")

    async def answers() -> bool:
        assert running.returncode is None, "nginx has ended"
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await until(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        await running.wait()


def nginx_program() -> str:
    path = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert path is not None, "nginx is not installed; run `make browser`"
    return path


@pytest.fixture
async def url(settings: Settings, redis: Redis) -> AsyncIterator[str]:
    """The web service, which knows what workers can do."""
    async with worker(settings):
        pass
    async with web(settings) as url:
        yield url


@pytest.fixture
async def job(url: str, settings: Settings, tenant: Tenant) -> AsyncIterator[str]:
    """A job that runs once somebody follows it, however long a client takes to start."""
    before = snapshots()

    async def work() -> None:
        await until(lambda: snapshots() > before, 30)
        async with worker(settings):
            await asyncio.Event().wait()

    async with Client(url, tenant.api_key) as client:
        job_id = (await client.submit("demo.countdown", {"seconds": 0.6}))["id"]
        working = asyncio.create_task(work())
        yield str(job_id)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def followers() -> float:
    """Open sockets and event streams."""
    names = ("headway_ws_connections", "headway_sse_streams")
    return sum(REGISTRY.get_sample_value(name) or 0 for name in names)


def snapshots() -> float:
    """How many were sent, to sockets and in event streams."""
    names = ("headway_ws_frames_total", "headway_sse_events_total")
    return sum(REGISTRY.get_sample_value(name, {"type": "snapshot"}) or 0 for name in names)


def check(frames: list[Json]) -> None:
    """A job's frames from its snapshot to its end, each of which follows on the one before."""
    first, *events, bye = [frame for frame in frames if frame["t"] not in ("welcome", "ack", "hb")]
    assert (first["t"], bye["t"]) == ("snapshot", "bye")
    held = first["seq"]
    for frame in events:
        assert frame["prev"] == held < frame["seq"]
        held = frame["seq"]
    assert events[-1]["d"]["state"] == "succeeded"
    assert "progress" in [frame["t"] for frame in events]
