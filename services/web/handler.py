"""Django's request handling for the API, all of it on the event loop.

Stock `ASGIHandler` leaves the loop five times a request: for signals with synchronous receivers, for logging, for
`response.close` and for middleware. None of that serves the API, which uses no ORM; this handler does without. It reads
JSON bodies into memory up to a limit, and leaves uploads to their view as a stream.
"""

import asyncio
from typing import Any

import structlog
from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.core.exceptions import SuspiciousOperation
from django.core.handlers.asgi import ASGIHandler
from django.http import Http404
from django.http.response import HttpResponseBase
from django.urls import set_urlconf
from django.utils.module_loading import import_string

from headway.errors import BadRequest, MethodNotAllowed, NotFound
from services.web.api.answers import problem, refuse
from services.web.api.bodies import Disconnected
from services.web.api.request import ApiRequest

STREAMED = ("POST", "/api/v1/files")

log = structlog.get_logger(__name__)


class ApiHandler(ASGIHandler):
    """Serves what is below `/api/` without a thread."""

    def load_middleware(self, is_async: bool = True) -> None:
        """Wrap the view in `API_MIDDLEWARE`, as Django does with MIDDLEWARE; `checks` has seen that all is async."""
        self._view_middleware: list[Any] = []
        self._template_response_middleware: list[Any] = []
        self._exception_middleware: list[Any] = []
        chain: Any = self._answer
        for path in reversed(settings.API_MIDDLEWARE):
            chain = import_string(path)(chain)
            assert iscoroutinefunction(chain), f"{path} is not asynchronous"
        self._middleware_chain = chain

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            request = ApiRequest(scope, receive)
        except UnicodeDecodeError:
            await self.send_response(refuse(BadRequest("The query string is not UTF-8.")), send)
            return
        set_urlconf(settings.ROOT_URLCONF)
        try:
            response = await self._middleware_chain(request)
        except Disconnected:
            return
        if not request.incoming.read:
            # The rest of the body is not wanted: the connection must not be used again.
            response["Connection"] = "close"
        if not response.streaming:
            response["Content-Length"] = str(len(response.content))
        if response.streaming:
            await self._stream(response, receive, send)
        else:
            await self.send_response(response, send)

    async def _answer(self, request: ApiRequest) -> HttpResponseBase:
        try:
            if (request.method, request.path) != STREAMED:
                await request.load()
            response: HttpResponseBase = await self._get_response_async(request)  # type: ignore[attr-defined]
        except Disconnected:
            raise
        except Http404:
            return refuse(NotFound(f"There is nothing at {request.path}; see /api/v1/docs."))
        except SuspiciousOperation as error:
            return refuse(BadRequest(f"The request is refused: {error}."))
        except Exception as error:
            return refuse(problem(error))
        if response.status_code == 405:
            allowed = response["Allow"]
            return refuse(MethodNotAllowed(f"{request.path} takes {allowed}.", headers={"Allow": allowed}))
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


async def _disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
