"""The request as the API's views see it."""

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from django.core.handlers.asgi import ASGIRequest
from pydantic import BaseModel

from headway.errors import BadRequest, InvalidRequest
from services.web.api.auth import Principal
from services.web.api.bodies import Body, Disconnected, Receive

if TYPE_CHECKING:
    from services.web.app import App

T = TypeVar("T")


class ApiRequest(ASGIRequest):
    """Django's request, with the App, the body as a stream, and once authenticated the Principal."""

    auth: Principal

    def __init__(self, scope: Any, receive: Receive) -> None:
        try:
            super().__init__(scope, None)  # type: ignore[arg-type]  # the body is read elsewhere
            self.readable = True
        except UnicodeDecodeError:
            super().__init__({**scope, "query_string": b""}, None)  # type: ignore[arg-type]
            self.readable = False
        self.app: App = scope["headway"]
        given = self.META.get("CONTENT_LENGTH", "")
        self.incoming = Body(receive, int(given) if given.isdecimal() and len(given) < 20 else None)

    def only(self, model: type[BaseModel] | None = None) -> None:
        """Refuse a query that `model` does not describe; without a model, any. django-ninja passes unknown names over.

        Raises InvalidRequest for an unknown name, BadRequest for text that cannot be looked for.
        """
        if not self.META["QUERY_STRING"]:
            return
        known = model.model_fields if model else {}
        if unknown := sorted(self.GET.keys() - known):
            errors = [{"field": name[:100], "message": "There is no such parameter."} for name in unknown[:20]]
            there = f"there are: {', '.join(known)}" if known else "there are none here"
            raise InvalidRequest(f"Unknown parameter; {there}.", errors=errors)
        if any("\0" in value for values in self.GET.lists() for value in values[1]):
            raise BadRequest("A parameter holds the character NUL, which nothing has; leave it out.")

    def check(self) -> None:
        """Raises BadRequest for a request that no view could read."""
        if not self.readable:
            raise BadRequest("The query string is not UTF-8; percent-encode it.")

    async def load(self) -> None:
        """Read the body into memory, where django-ninja looks for it. Raises TooLarge, TooSlow or Disconnected."""
        self._body = await self.incoming.whole(self.app.settings.max_body)

    async def unless_left(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns. If the client goes away before, it is cancelled, and Disconnected raised."""
        working = asyncio.create_task(work)
        leaving = asyncio.create_task(self.incoming.left())
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Disconnected
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)
