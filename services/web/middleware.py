"""Middleware of the API. Every class here is asynchronous only."""

import re
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache

import structlog
from asgiref.sync import markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from prometheus_client import Counter, Histogram
from uuid_utils import uuid7

from headway import metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)


class RequestRecord:
    """Gives each request an id (the caller's `X-Request-Id`, if it is sane), a log line and its metrics."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        self._get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        given = request.META.get("HTTP_X_REQUEST_ID", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid7().hex
        # A request has a task, and so a context, of its own.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began = time.perf_counter()
        response = await self._get_response(request)
        took = time.perf_counter() - began
        method, status = request.method or "", response.status_code
        response.headers["X-Request-Id"] = request_id
        count, duration = _series(method, getattr(request.resolver_match, "route", "none"), status)
        count.inc()
        duration.observe(took)
        log.info("request", method=method, path=request.path, status=status, ms=round(took * 1000))
        return response


@lru_cache(maxsize=4096)
def _series(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """What is counted for such a request. The methods are closed: a client may send any word."""
    known = method if method in METHODS else "other"
    return metrics.http_requests.labels(known, route, status), metrics.http_time.labels(route)
