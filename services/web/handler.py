"""Django's request handling for the API, all of it on the event loop.

Stock `ASGIHandler` leaves the loop five times a request: for signals with synchronous receivers, for logging, for
`response.close` and for middleware. None of that serves the API, which uses no ORM; this handler does without. It reads
JSON bodies into memory up to a limit, and leaves uploads to their view as a stream.
"""

import asyncio
from contextlib import suppress
from functools import lru_cache
from typing import Any

from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.http import Http404
from django.http.response import HttpResponseBase
from django.urls import ResolverMatch, get_resolver
from django.utils.module_loading import import_string

from headway.errors import MethodNotAllowed, NotFound, Unavailable
from services.web.api.answers import CLIENT_LEFT, nothing, on_exception, refuse
from services.web.api.auth import bearer
from services.web.api.request import ApiRequest
from services.web.live.entrance import enter_stream, has_ticket
from services.web.live.stream import EventStream

# Below these the bodies of uploads are streams.
STREAMED = ("/api/v1/files", "/api/v1/uploads")
# Seconds that a client which still sends is listened to, so that it gets to read why its body is refused.
LINGER = 5.0


class AsWritten(bytes):
    """A header name that keeps its capitals. uvicorn writes all names in small letters, and clients that hold them in a
    plain dictionary look for `Location`."""

    def lower(self) -> "AsWritten":
        return self


LOCATION = AsWritten(b"Location")


class ApiHandler(ASGIHandler):
    """Serves what is below `/api/` without a thread."""

    # A piece of a stream goes out as it was read. Django's 64 KiB slices of it follow each other without a turn of the
    # loop, so that a client's leaving was noticed only after many more writes, each of which asyncio warns about.
    chunk_size = 1 << 30

    def load_middleware(self, is_async: bool = True) -> None:
        """Wrap the view in `API_MIDDLEWARE`, as Django does with MIDDLEWARE; `checks` has seen that all is async."""
        chain: Any = self._answer
        for path in reversed(settings.API_MIDDLEWARE):
            chain = import_string(path)(chain)
            assert iscoroutinefunction(chain), f"{path} is not asynchronous"
        self._middleware_chain = chain
        # The same few paths are asked for again and again; to match one costs as much as the rest of a request.
        self._resolve = lru_cache(maxsize=256)(get_resolver().resolve)
        # Django reads the routes when first asked; neither the first request nor those beside it are to wait for that.
        self._resolve("/api/v1/jobs")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = ApiRequest(scope, receive)
        response = await self._middleware_chain(request)
        if response.status_code == CLIENT_LEFT:
            return
        if isinstance(response, EventStream):
            # An idle stream is to hold nothing that it does not need.
            del request
            scope["headers"].clear()
            await response.serve(receive, send)
            return
        if response.streaming:
            await self._stream(response, receive, send)
            return
        if request.incoming.read:
            await _send(response, send)
            return
        # The client still sends. If the connection closed now, the answer would be lost before it is read.
        response.headers["Connection"] = "close"
        await _send(response, send, more_body=True)
        with suppress(asyncio.CancelledError):  # the process ends; the answer is out
            await request.incoming.discard(LINGER)
        await send({"type": "http.response.body"})

    async def _answer(self, request: ApiRequest) -> HttpResponseBase:
        try:
            request.check()
            if request.method not in ("POST", "PATCH") or not request.path_info.startswith(STREAMED):
                await request.load()
            response = await self._view(request)
        except Http404:
            return refuse(NotFound(f"There is nothing at {request.path[:200]}; see /api/v1/docs."))
        except asyncio.CancelledError:
            # The time to drain is over: the server cancels what still runs, and would say 500 in its place.
            return refuse(Unavailable("This process is being stopped; it is not known whether the request was done."))
        except Exception as error:
            return on_exception(request, error)
        if response.status_code == 405:
            allowed = set(response.headers["Allow"].split(", "))
            takes = ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))
            return refuse(MethodNotAllowed(f"{request.path} takes {takes}.", headers={"Allow": takes}))
        return response

    async def _view(self, request: ApiRequest) -> HttpResponseBase:
        request.resolver_match = found = self._resolve(request.path_info)
        if has_ticket(request):
            return await self._ticketed(request, found)
        token = bearer(request.META.get("HTTP_AUTHORIZATION", ""))
        request.auth = await request.app.keyring.authenticate(token)
        if request.method != "HEAD":
            return await found.func(request, *found.args, **found.kwargs)  # type: ignore[no-any-return]
        # HEAD is GET, of which the server sends no body.
        request.method = "GET"
        try:
            response: HttpResponseBase = await found.func(request, *found.args, **found.kwargs)
        finally:
            request.method = "HEAD"
        if isinstance(response, EventStream):
            return response.head()
        if response.streaming:
            response.streaming_content = nothing()  # type: ignore[attr-defined]
        return response

    async def _ticketed(self, request: ApiRequest, found: ResolverMatch) -> HttpResponseBase:
        """A stream for a browser, which may be on a page of another origin: the ticket says of which."""
        request.auth = await enter_stream(request)
        response: HttpResponseBase = await found.func(request, *found.args, **found.kwargs)
        if (origin := request.META.get("HTTP_ORIGIN")) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
        return response

    async def _stream(self, response: HttpResponseBase, receive: Any, send: Any) -> None:
        """Send until the end, or until the client goes away."""
        sending = asyncio.create_task(self.send_response(response, send))
        leaving = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)


async def _send(response: HttpResponseBase, send: Any, *, more_body: bool = False) -> None:
    """Send an answer that is whole."""
    content: bytes = response.content  # type: ignore[attr-defined]
    headers = [
        (LOCATION if name == "Location" else name.encode("ascii"), value.encode("latin1"))
        for name, value in response.items()
    ]
    if response.status_code not in (204, 304):
        headers.append((b"content-length", b"%d" % len(content)))
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": content, "more_body": more_body})


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
