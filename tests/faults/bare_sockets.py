"""Clients made of bare sockets, for what no library does: to read nothing, or byte by byte, to send what is no frame.

wsproto reads what the server says.
"""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from wsproto.connection import CLIENT, Connection
from wsproto.events import CloseConnection, Event, TextMessage

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class BareSocket:
    """A TCP connection to the web service, on which a request has been sent. `receive_buffer` is in bytes."""

    def __init__(self, port: int, path: str, key: str, *, websocket: bool = True, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(20)
        if receive_buffer:
            # Before it connects: the window is agreed upon then.
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        upgrade = (
            "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            if websocket
            else "Accept: text/event-stream\r\n"
        )
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n{upgrade}\r\n"
        self.socket.sendall(head.encode())

    def head(self) -> bytes:
        """The head of the answer, read byte by byte so that nothing after it is taken."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.socket.recv(1)
        return head

    def send(self, opcode: int, payload: bytes, **odd: Any) -> None:
        """Send a frame."""
        self.socket.sendall(self.frame(opcode, payload, **odd))

    @staticmethod
    def frame(opcode: int, payload: bytes, *, first: int = 0x80, masked: bool = True, length: int = -1) -> bytes:
        """A frame. `first` holds FIN and the reserved bits; `length` is what it says, if not the truth."""
        said = len(payload) if length < 0 else length
        size = bytes([said]) if said < 126 else b"\x7e" + struct.pack("!H", said) if said < 1 << 16 else b""
        size = bytearray(size or b"\x7f" + struct.pack("!Q", said))
        mask = os.urandom(4) if masked else b""
        if masked:
            size[0] |= 0x80
            payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
        return bytes([first | opcode]) + size + mask + payload

    def events(self, at_once: int = 1 << 16) -> Iterator[Event]:
        """What the server says, until it says goodbye or the connection ends. So many bytes are read `at_once`."""
        connection = Connection(CLIENT)
        while True:
            try:
                data = self.socket.recv(at_once)
            except ConnectionError:
                return
            if not data:
                return
            connection.receive_data(data)
            for event in connection.events():
                yield event
                if isinstance(event, CloseConnection):
                    return

    def texts(self, at_once: int = 1 << 16) -> Iterator[str]:
        """The messages that the server sends."""
        text = ""
        for event in self.events(at_once):
            if isinstance(event, TextMessage):
                text += event.data
                if event.message_finished:
                    yield text
                    text = ""

    def code(self) -> int | None:
        """The code that the server closes with; None if the connection ends without one."""
        return next((int(event.code) for event in self.events() if isinstance(event, CloseConnection)), None)

    def end(self) -> None:
        """Say that nothing more is sent."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self, *, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.socket.close()
