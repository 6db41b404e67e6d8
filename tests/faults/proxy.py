"""A TCP proxy on loopback that misbehaves on request, as networks do."""

import asyncio
import socket
import struct
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK = 1 << 16
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards connections to a port of `host` until told otherwise. Use it as `async with`; it listens on `port`.

    Of several ports each connection gets the next one in turn that accepts it. `latency` is what every piece waits, in
    seconds, each way.
    """

    def __init__(self, *ports: int, host: str = "127.0.0.1") -> None:
        self._targets = deque((host, port) for port in ports)
        self._open = asyncio.Event()
        self._open.set()
        self._connections: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._cut: tuple[bytes, asyncio.Future[None]] | None = None
        self.latency = 0.0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    def blackhole(self) -> None:
        """Deliver nothing from now on, both ways. Connections stay, and new ones are accepted and hang."""
        self._open.clear()

    def restore(self) -> None:
        """Deliver again, first what was held back."""
        self._open.set()

    def reset(self) -> int:
        """Break every connection with a TCP reset; how many there were."""
        broken = list(self._connections)
        for connection in broken:
            connection.reset()
        return len(broken)

    def cut_reply(self, containing: bytes = b"") -> "asyncio.Future[None]":
        """Break the connection of the next reply that holds these bytes, instead of delivering it.

        What was asked for has then happened, and the client cannot know. The future is done once that is so.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cut = (containing, done)
        return done

    async def forward(self, piece: bytes, connection: "_Connection", *, reply: bool) -> bool:
        """Wait as the network is to make it wait; False if the piece is not to be delivered."""
        if self.latency:
            await asyncio.sleep(self.latency)
        await self._open.wait()
        if reply and self._cut is not None and self._cut[0] in piece:
            done, self._cut = self._cut[1], None
            connection.reset()
            if not done.done():
                done.set_result(None)
            return False
        return True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        connection = _Connection(self, reader, writer)
        self._connections.add(connection)
        try:
            await self._open.wait()
            await connection.serve(*await self._connect())
        except OSError:
            # The target is away: the client sees its connection closed, as it would see it refused.
            writer.transport.abort()
        except asyncio.CancelledError:
            # The proxy is left. asyncio takes it for an error if this task ends as cancelled.
            writer.transport.abort()
        finally:
            self._connections.discard(connection)
            self._serving.discard(task)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for _ in range(len(self._targets) - 1):
            self._targets.rotate()
            with suppress(OSError):
                return await asyncio.open_connection(*self._targets[0], limit=CHUNK)
        self._targets.rotate()
        return await asyncio.open_connection(*self._targets[0], limit=CHUNK)


class _Connection:
    """One client's connection and the one made for it."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        try:
            pumps = (self._pump(self._reader, writer, reply=False), self._pump(reader, self._writers[0], reply=True))
            await asyncio.gather(*pumps)
        finally:
            for each in self._writers:
                each.transport.abort()

    def reset(self) -> None:
        for writer in self._writers:
            if not writer.transport.is_closing():
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reply: bool) -> None:
        try:
            while piece := await reader.read(CHUNK):
                if not await self._proxy.forward(piece, self, reply=reply) or writer.is_closing():
                    return
                writer.write(piece)
                await writer.drain()
            if writer.can_write_eof() and not writer.is_closing():
                writer.write_eof()
        except OSError:
            # One half is broken, so the other one is to be as well.
            self.reset()
