"""Middleware of the API. Every class here is asynchronous only."""

import re
import time
from collections.abc import Awaitable, Callable

import structlog
from asgiref.sync import markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from uuid_utils.compat import uuid7

from headway import metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger(__name__)


class RequestRecord:
    """Gives each request an id (the caller's `X-Request-Id`, if it is sane), a log line and its metrics."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        self._get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        given = request.headers.get("X-Request-Id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid7().hex
        began = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id):
            response = await self._get_response(request)
            took = time.perf_counter() - began
            response["X-Request-Id"] = request_id
            route = getattr(request.resolver_match, "route", "none")
            metrics.http_requests.labels(request.method, route, response.status_code).inc()
            metrics.http_time.labels(route).observe(took)
            log.info(
                "request", method=request.method, path=request.path, status=response.status_code, ms=round(took * 1000)
            )
        return response
