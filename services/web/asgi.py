"""The ASGI application: the API on the event loop, the pages by stock Django, WebSockets by Channels consumers.

Runs on uvicorn (`python -m services.web`), and on servers without a lifespan, such as daphne: the parts are then
opened by the first request.
"""

import asyncio
import os
from functools import cache
from typing import Any

import django
import structlog
from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIHandler

from headway import logs
from headway.settings import Settings

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "services.web.settings")
django.setup(set_prefix=False)

from services.web.app import App  # noqa: E402  # Django must be set up before its views are imported
from services.web.handler import ApiHandler  # noqa: E402
from services.web.live.consumers import websockets  # noqa: E402

# Documentation is pages: stock, synchronous Django views render them.
PAGES_IN_API = frozenset({"/api/v1/docs", "/api/v1/openapi.json", "/api/v1/live", "/api/v1/asyncapi.json"})


class Application:
    """Sends each connection to its handler, with the App in `scope["headway"]`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.app: App | None = None
        self._opening = asyncio.Lock()
        self._api = ApiHandler()
        self._pages = _pages()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        scope["headway"] = self.app or await self.open()
        if scope["type"] == "websocket":
            await websockets(scope, receive, send)
        elif scope["path"].startswith("/api/") and scope["path"] not in PAGES_IN_API:
            await self._api(scope, receive, send)
        else:
            await self._pages(scope, receive, send)

    async def open(self) -> App:
        """The App; the first call opens it."""
        if self.app is None:
            async with self._opening:
                if self.app is None:
                    self.app = await App.open(self.settings)
        return self.app

    async def close(self) -> None:
        app, self.app = self.app, None
        if app is not None:
            await app.close()

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        await self.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})


@cache
def _pages() -> ASGIHandler:
    """Django's handler, one for a process: to find its static files takes 50 ms."""
    return get_asgi_application()


def __getattr__(name: str) -> Application:
    """`application`, made when a server asks for it. One that is not ours, such as daphne, is given our logs too."""
    if name != "application":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from services.web.settings import HEADWAY  # noqa: PLC0415  # read once, when Django was set up

    if not structlog.is_configured():
        logs.configure(HEADWAY, "web")
    globals()[name] = made = Application(HEADWAY)
    return made
