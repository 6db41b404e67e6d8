"""Answers: JSON, and errors as problem+json."""

import json
from typing import Any

import structlog
from django.http import HttpRequest, HttpResponse
from ninja.errors import AuthenticationError, HttpError, ValidationError

from headway.errors import BadRequest, Internal, InvalidRequest, Problem, Unauthenticated, Unavailable
from headway.store import OUTAGES
from services.web.api.auth import REFUSAL

log = structlog.get_logger(__name__)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> HttpResponse:
    """`value` as JSON; bytes are JSON already."""
    body = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return HttpResponse(body, content_type="application/json", status=status, headers=headers)


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
    if isinstance(error, AuthenticationError):
        return Unauthenticated(REFUSAL)
    if isinstance(error, ValidationError):
        errors = [{"field": _field(item["loc"]), "message": item["msg"]} for item in error.errors]
        return InvalidRequest(f"{errors[0]['field']}: {errors[0]['message']}.", errors=errors)
    if isinstance(error, HttpError):
        # What our parser raised, django-ninja wraps.
        return error.__context__ if isinstance(error.__context__, Problem) else BadRequest(str(error))
    if isinstance(error, OUTAGES):
        log.warning("the database is not available", error=repr(error))
        return Unavailable("The database cannot be reached; nothing was changed. Try again in a moment.")
    log.error("a request failed", exc_info=error)
    return Internal("Something broke here; the X-Request-Id of this answer finds it in the log.")


def on_exception(request: HttpRequest, error: Exception) -> HttpResponse:
    """django-ninja's hook."""
    return refuse(problem(error))


def _field(loc: tuple[Any, ...]) -> str:
    """`("body", "job", "kind")` as `kind`: where the field stands, without the name of our parameter."""
    return ".".join(str(part) for part in loc[2:] or loc[1:] or loc)
