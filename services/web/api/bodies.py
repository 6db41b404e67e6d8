"""Request bodies: strict JSON, size limits, streams."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NoReturn

from headway.errors import BadRequest, TooLarge, TooSlow
from headway.files import CutOff

DEEPEST = 64
# Seconds without a byte of a body, after which nobody waits for more.
STALLED = 60.0
# Seconds that a body which is held in memory may take: one that drips is not waited for without end.
LONGEST = 300.0
TOO_DEEP = f"The body is nested past {DEEPEST} levels."

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Disconnected(CutOff):
    """The client went away before its body was whole, or while it waited for an answer."""


class Body:
    """The bytes that a request sends, as they arrive."""

    __slots__ = ("_receive", "length", "read")

    def __init__(self, receive: Receive, length: int | None) -> None:
        self._receive = receive
        self.length = length
        self.read = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """Every chunk once. Raises Disconnected if the client goes away first, TooSlow if it sends nothing for long."""
        while not self.read:
            if chunk := await self._next():
                yield chunk

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(STALLED):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow(f"No more of the body came for {STALLED:.0f} seconds; send it again.") from None
        if message["type"] == "http.disconnect":
            raise Disconnected
        self.read = not message.get("more_body", False)
        return message.get("body", b"")  # type: ignore[no-any-return]

    async def discard(self, wait: float) -> None:
        """Read what is still to come and drop it, for `wait` seconds at most."""
        with suppress(TimeoutError, Disconnected, TooSlow):
            async with asyncio.timeout(wait):
                async for _ in self.chunks():
                    pass

    async def left(self) -> None:
        """Wait until the client, whose body has been read, goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def whole(self, limit: int) -> bytes:
        """All of it in memory. Raises TooLarge past `limit` bytes, TooSlow past five minutes, else as `chunks`."""
        held = bytearray()
        try:
            async with asyncio.timeout(LONGEST):
                while not self.read and (self.length or 0) <= limit and len(held) <= limit:
                    held += await self._next()
        except TimeoutError:
            raise TooSlow(f"The body took longer than {LONGEST:.0f} seconds; send it again, faster.") from None
        if (self.length or 0) > limit or len(held) > limit:
            raise TooLarge(
                f"The body is over the limit of {limit:,} bytes; send large data through POST /api/v1/files."
            )
        return bytes(held)


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 has it, and such that Postgres can keep it.

    Raises BadRequest for broken JSON, NaN, repeated names, NUL, lone surrogates and nesting past 64 levels.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise BadRequest(TOO_DEEP) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f"What was sent is not JSON: {error}.") from None
    except ValueError:
        # What is left is Python's limit on the digits of an integer.
        raise BadRequest("A number has too many digits.") from None
    _check(value, DEEPEST)
    return value


def _no_constant(name: str) -> NoReturn:
    raise BadRequest(f"What was sent is not JSON: {name} is not a number of JSON.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadRequest("A name stands twice in an object; what was meant cannot be told.")
    return found


def _check(value: Any, depth: int) -> None:
    if depth == 0:
        raise BadRequest(TOO_DEEP)
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
