"""What a worker and the child process of a handler say to each other: JSON, with raw bytes beside it, on a socket.

From the worker: `start`, once; `reply` to a call; `stop`. From the child: `report`; `call`; `result` or `error`, once,
as its last word.
"""

import asyncio
import builtins
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from headway import errors
from headway.errors import HeadwayError, Retry
from services.worker.handling import Failed, message, text

# How many bytes of an artifact a frame carries, and how many a reader holds before the sender has to wait.
PIECE = 1 << 20

_SIZES = struct.Struct("!II")
_MADE_OF_A_MESSAGE = (HeadwayError, ArithmeticError, LookupError, OSError, TypeError, ValueError, RuntimeError)


async def receive(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame. Raises EOFError or ConnectionError when the other side is gone."""
    head, body = _SIZES.unpack(await reader.readexactly(_SIZES.size))
    return json.loads(await reader.readexactly(head)), await reader.readexactly(body)


class Sink(Protocol):
    """What takes frames: the socket's writer, or a buffer."""

    def write(self, data: bytes, /) -> object: ...


def send(writer: Sink, head: Mapping[str, Any], body: bytes = b"") -> None:
    """Send a frame. Raises TypeError or ValueError for what is not JSON."""
    encoded = json.dumps(head).encode()
    writer.write(_SIZES.pack(len(encoded), len(body)) + encoded)
    if body:
        writer.write(body)


def split(data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The frames that were sent to a buffer."""
    place = 0
    while place < len(data):
        head, body = _SIZES.unpack_from(data, place)
        middle, place = place + _SIZES.size + head, place + _SIZES.size + head + body
        yield json.loads(data[middle - head : middle]), data[middle:place]


def pack(error: BaseException) -> dict[str, Any]:
    """An exception as JSON."""
    known = next((base.__name__ for base in type(error).__mro__ if _known(base.__name__) is base), None)
    if known is None:
        return {"class": "RuntimeError", "message": message(error)}
    return {
        "class": known,
        "message": text(error),
        "after": error.after if isinstance(error, Retry) else None,
        "trace": error.trace if isinstance(error, Failed) else None,
    }


def unpack(packed: Mapping[str, Any]) -> Exception:
    """The exception: one of Headway's errors, a built-in one, or a RuntimeError that names its class."""
    if packed.get("trace"):
        return Failed(packed["message"], packed["trace"])
    if packed.get("after") is not None:
        return Retry(packed["message"], after=packed["after"])
    made = _known(packed["class"])
    assert made is not None
    return made(packed["message"])


def _known(name: str) -> type[Exception] | None:
    """The class of this name that both sides have."""
    found = vars(errors).get(name) or getattr(builtins, name, None)
    if not isinstance(found, type) or not issubclass(found, _MADE_OF_A_MESSAGE):
        return None
    return None if issubclass(found, UnicodeError) and found is not UnicodeError else found
