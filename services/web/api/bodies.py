"""Request bodies: strict JSON, size limits, streams."""

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

from django.http import HttpRequest
from ninja.parser import Parser

from headway.errors import BadRequest, TooLarge

DEEPEST = 64

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Disconnected(Exception):
    """The client went away before its body was whole."""


class Body:
    """The bytes that a request sends, as they arrive."""

    def __init__(self, receive: Receive, length: int | None) -> None:
        self._receive = receive
        self.length = length
        self.read = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Every chunk once. Raises Disconnected if the client goes away first."""
        more = not self.read
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            more = message.get("more_body", False)
            self.read = not more
            if chunk := message.get("body", b""):
                yield chunk

    async def whole(self, limit: int) -> bytes:
        """All of it in memory. Raises TooLarge past `limit` bytes."""
        refusal = f"The body is over the limit of {limit:,} bytes; send large data through POST /api/v1/files."
        if self.length is not None and self.length > limit:
            raise TooLarge(refusal)
        held = bytearray()
        async for chunk in self.chunks():
            held += chunk
            if len(held) > limit:
                raise TooLarge(refusal)
        return bytes(held)


class StrictParser(Parser):
    """JSON as RFC 8259 has it, and such that Postgres can keep it."""

    def parse_body(self, request: HttpRequest) -> Any:
        return parse(request.body)


def parse(body: bytes) -> Any:
    """Raises BadRequest for broken JSON, NaN, repeated names, NUL, lone surrogates and nesting past 64 levels."""
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadRequest(f"The body is not JSON: {reason}.") from None
    _check(value, DEEPEST)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _check(value: Any, depth: int) -> None:
    if depth == 0:
        raise BadRequest(f"The body is nested past {DEEPEST} levels.")
    if isinstance(value, str):
        if "\0" in value:
            raise BadRequest("A string holds the character NUL, which cannot be kept; leave it out.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRequest("A string holds half of a surrogate pair; send whole characters.") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadRequest("A number is too large for a double.")
    elif isinstance(value, dict):
        for name, item in value.items():
            _check(name, depth - 1)
            _check(item, depth - 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
