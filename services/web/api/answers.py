"""Answers: JSON, and errors as problem+json."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog
from django.core.exceptions import SuspiciousOperation
from django.http import HttpRequest, HttpResponse
from ninja.errors import HttpError, ValidationError

from headway.errors import BadRequest, Internal, InvalidRequest, Problem, Unauthenticated, Unavailable
from headway.store import OUTAGES
from services.web.api.bodies import Disconnected

# Shown in the log and the metrics only: there is nobody to answer.
CLIENT_LEFT = 499
# Of which a problem tells at once.
MOST_ERRORS = 20

log = structlog.get_logger(__name__)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> HttpResponse:
    """`value` as JSON; bytes are JSON already."""
    body = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return HttpResponse(body, content_type="application/json", status=status, headers=headers)


def not_modified(headers: Mapping[str, str]) -> HttpResponse:
    """304: what the client has is still right."""
    response = HttpResponse(status=304, headers=dict(headers))
    del response.headers["Content-Type"]
    return response


async def nothing() -> AsyncIterator[bytes]:
    """The content of a streamed answer that has none."""
    return
    yield b""


def refuse(problem: Problem) -> HttpResponse:
    """A problem as RFC 9457 has it."""
    response = HttpResponse(
        json.dumps(problem.as_json(), separators=(",", ":")).encode(),
        content_type="application/problem+json",
        status=problem.status,
        headers=dict(problem.headers),
    )
    if isinstance(problem, Unauthenticated):
        response["WWW-Authenticate"] = "Bearer"
    return response


def problem(error: Exception) -> Problem:
    """What an exception is to the client. What is not the client's doing is logged here."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ValidationError):
        errors = [
            {"field": _field(item["loc"]), "message": item["msg"].removeprefix("Value error, ")}
            for item in error.errors[:MOST_ERRORS]
        ]
        return InvalidRequest(f"{errors[0]['field']}: {errors[0]['message']}.", errors=errors)
    if isinstance(error, HttpError):
        # What our parser raised, django-ninja wraps.
        return error.__context__ if isinstance(error.__context__, Problem) else BadRequest(str(error))
    if isinstance(error, SuspiciousOperation):
        return BadRequest(f"The request is refused: {error}.")
    if isinstance(error, OUTAGES):
        log.warning("the database is not available", error=repr(error))
        return Unavailable("The database cannot be reached; it is not known whether the request was done. Try again.")
    log.error("a request failed", exc_info=error)
    return Internal("Something broke here; the X-Request-Id of this answer finds it in the log.")


def on_exception(request: HttpRequest, error: Exception) -> HttpResponse:
    """The answer to a request that raised; django-ninja's hook too."""
    return HttpResponse(status=CLIENT_LEFT) if isinstance(error, Disconnected) else refuse(problem(error))


def _field(loc: tuple[Any, ...]) -> str:
    """`("body", "job", "kind")` as `kind`: where the field stands, without the name of our parameter."""
    return ".".join(str(part) for part in (loc[2:] if loc[0] == "body" else loc[1:])) or str(loc[0])
