"""The operations port of a process: `/livez`, `/readyz` and `/metrics`, served on the loop that does the work."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from headway import metrics

TICK = 0.5

log = structlog.get_logger(__name__)


class Ops:
    """A small ASGI server. `ready` answers whether the process may be given work, as a sentence if it may not."""

    def __init__(self, host: str, port: int, ready: Callable[[], Awaitable[str | None]]) -> None:
        self._ready = ready
        self._tasks: list[asyncio.Task[None]] = []
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._answer,
                host=host,
                port=port,
                lifespan="off",
                access_log=False,
                log_config=None,
                ws="none",
                interface="asgi3",
            )
        )

    async def start(self) -> None:
        """Serve until `stop`. Raises OSError if the port is taken."""
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup()
        self._tasks = [asyncio.create_task(self._server.main_loop()), asyncio.create_task(self._measure_lag())]

    @property
    def port(self) -> int:
        """The port in use, also where the setting was 0."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.should_exit = True
        self._tasks[1].cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.shutdown()

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            metrics.loop_lag.set(max(0.0, loop.time() - due))

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        status, kind, body = 200, b"text/plain; charset=utf-8", b"ok\n"
        if scope["path"] == "/metrics":
            kind, body = CONTENT_TYPE_LATEST.encode(), generate_latest()
        elif scope["path"] == "/readyz":
            if reason := await self._ready():
                status, body = 503, f"{reason}\n".encode()
        elif scope["path"] != "/livez":
            status, body = 404, b"Here are /livez, /readyz and /metrics.\n"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})
