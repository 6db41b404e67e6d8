"""uvicorn's protocols, with the bounds that they lack."""

import asyncio
import json
import struct
from functools import lru_cache
from typing import Any

from uuid_utils import uuid7
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from headway.errors import BadRequest

# Seconds that a peer has to read the end of what it was sent when the server stops.
GOODBYE = 3.0
MOST_HEAD = 64 * 1024
MOST_HEADERS = 100
# Bytes that may wait for a peer which sends pings and does not read.
MOST_UNREAD = 1 << 20

UNREADABLE = (
    "This is not a request of HTTP/1.1, or its path is not percent-encoded, or its head is over the limits of "
    f"{MOST_HEAD:,} bytes and {MOST_HEADERS} headers."
)
STOPPING = "The service is about to stop. Connect again.\n"


class _Event(asyncio.Event):
    """The same with a list of those who wait: asyncio's deque holds 700 bytes for one at most."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters: Any = []


class _Pipeline(list[Any]):
    """What uvicorn keeps in a deque of 700 bytes: requests that were sent before the answer to another."""

    def appendleft(self, item: Any) -> None:
        self.insert(0, item)


class Http(HttpToolsProtocol):
    """Holds no more than 64 KiB of a request's head, and refuses what it cannot read as the API refuses.

    An idle event stream is a request that goes on, so what a request holds counts.
    """

    # Attributes beside uvicorn's own would make each connection's dictionary three times as large.
    __slots__ = ("_held", "_in_head")

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._in_head, self._held = False, 0
        self.pipeline: Any = _Pipeline()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.flow._is_writable_event = _Event()
        self.flow._is_writable_event.set()

    def on_message_begin(self) -> None:
        self._in_head, self._held = True, 0
        super().on_message_begin()
        self.scope["headway.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

    def data_received(self, data: bytes) -> None:
        # The parser says nothing before a header is whole, so its bytes are counted here.
        self._held += len(data)
        if self._in_head and self._held > MOST_HEAD:
            self.send_400_response("")
            return
        super().data_received(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) == MOST_HEADERS:
            raise BadRequest(UNREADABLE)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            # Its task has not begun.
            self.cycle.message_event = _Event()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own is plain text."""
        body = json.dumps(BadRequest(UNREADABLE).as_json()).encode()
        head = (
            f"content-type: application/problem+json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {uuid7().hex}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[400] + head.encode() + body)
        self.transport.close()


class WebSocket(WebSocketsSansIOProtocol):
    """Drops peers that do not read. uvicorn waits until they have read what was sent, which they may never do."""

    async def run_asgi(self) -> None:
        self.scope["headway.socket"] = self  # type: ignore[typeddict-unknown-key]
        await super().run_asgi()

    @property
    def ready(self) -> bool:
        """Whether the peer takes what is written without a wait."""
        return (
            self.handshake_complete
            and self.writable.is_set()
            and not (self.close_sent or self.disconnected or self.transport.is_closing())
        )

    def write(self, text: str) -> None:
        """Send text while `ready`: what `send` does, without an event for it and without framing it again."""
        self.transport.write(frame(text))

    def abort(self) -> None:
        """Drop the connection, whatever still waits to be read."""
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # A path or a header of more than 8 KiB: uvicorn leaves the refusal unsent, and the connection open.
            self.close_sent = True
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    async def send(self, message: Any) -> None:
        try:
            await super().send(message)
        except RuntimeError:
            if self.close_sent:
                # uvicorn has closed by itself: the peer sent what is no frame, or answers no pings.
                raise ClientDisconnected from None
            raise
        if self.close_sent:
            self._abort_after(self.close_timeout)

    def shutdown(self) -> None:
        if not (self.handshake_complete or self.close_sent or self.initial_response):
            # uvicorn says 500, as if the service had failed.
            self.conn.send_response(self.conn.reject(503, STOPPING))
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        super().shutdown()
        self._abort_after(GOODBYE)

    def send_receive_event_to_app(self) -> None:
        """uvicorn takes text that is no UTF-8 for an error of the service."""
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                if self.conn.state is State.OPEN:  # the peer's close may have come along with it
                    self.conn.send_close(1007)
                    self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        """Each is answered, without end, though nobody may read the answers."""
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MOST_UNREAD:
            self.transport.abort()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    def _abort_after(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.transport.abort)


@lru_cache(maxsize=1)
def frame(text: str) -> bytes:
    """A text frame of RFC 6455, which is the same for all peers: a server masks nothing."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x81, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload
