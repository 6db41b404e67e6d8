"""JobContext in a child process: what a handler calls goes to the worker and is done there."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Any
from uuid import UUID

from headway.context import JobContext, as_progress
from headway.errors import Fatal
from headway.job import File, Progress
from services.worker import frames
from services.worker.handling import find_source

# Reports of a child are sent twice as often as the worker writes them: those in between are never seen.
REPORT_EVERY = 0.05
# A handler that only reports would hold the event loop, and feel no cancel.
YIELD_EVERY = 0.002


class Line:
    """The socket to the worker: calls and their answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Any, bytes]]] = {}

    def say(self, head: Mapping[str, Any]) -> None:
        """Send what has no answer."""
        frames.send(self._writer, head)

    async def call(self, called: str, body: bytes = b"", /, **arguments: Any) -> tuple[Any, bytes]:
        """What the worker answers. Raises what the call raised there."""
        number = next(self._numbers)
        answered: asyncio.Future[tuple[Any, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answered
        try:
            frames.send(self._writer, {"call": called, "with": arguments, "number": number}, body)
            await self._writer.drain()
            return await answered
        finally:
            del self._waiting[number]

    async def hear(self) -> str:
        """Pass answers on until the worker says why the handler is to stop. Raises EOFError once the worker is gone."""
        while True:
            head, body = await frames.receive(self._reader)
            if "stop" in head:
                return str(head["stop"])
            answered = self._waiting.get(head["reply"])
            if answered is None or answered.done():
                continue
            if "error" in head:
                answered.set_exception(frames.unpack(head["error"]))
            else:
                answered.set_result((head["answer"], body))

    async def close(self) -> None:
        """Returns once all that was said is sent."""
        self._writer.close()
        await self._writer.wait_closed()


class ProxyContext(JobContext):
    """One attempt's context in its child process. `start` is what the worker said first."""

    def __init__(self, start: Mapping[str, Any], line: Line) -> None:
        self.id = UUID(start["id"])
        self.kind = start["kind"]
        self.attempt = start["attempt"]
        self.checkpoint = start["checkpoint"]
        self.reason: str | None = None
        self._sources: Mapping[str, tuple[str, str]] = start["sources"]
        self._line = line
        self._streams = _Streams(line)
        self._artifacts = count(1)
        self._latest: Progress | None = None
        self._sent = 0.0
        self._sending: asyncio.TimerHandle | None = None
        self._yielded = time.monotonic()

    @property
    def interruption(self) -> str | None:
        return self.reason

    async def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._latest = as_progress(done, total, message, unit, counts)
        now = time.monotonic()
        if now - self._sent >= REPORT_EVERY:
            # From here, for a handler that blocks the loop has no timers.
            self.flush()
        elif self._sending is None:
            self._sending = asyncio.get_running_loop().call_later(self._sent + REPORT_EVERY - now, self.flush)
        if now - self._yielded > YIELD_EVERY:
            await asyncio.sleep(0)
            self._yielded = time.monotonic()

    def flush(self) -> None:
        """Send the newest report, if it was not."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        if self._latest is not None:
            said = ("done", "total", "message", "unit", "counts")
            self._line.say({"report": {name: getattr(self._latest, name) for name in said}})
            self._latest, self._sent = None, time.monotonic()

    async def log(self, message: str, *, level: str = "info") -> None:
        await self._line.call("log", message=message, level=level)

    async def save_checkpoint(self, value: Any) -> None:
        try:
            await self._line.call("save_checkpoint", value=value)
        except (TypeError, ValueError, RecursionError) as error:
            raise Fatal(f"The checkpoint is not JSON: {error}.") from error
        self.checkpoint = value

    async def save_part(self, data: bytes) -> str:
        key, _ = await self._line.call("save_part", data)
        return str(key)

    def read_part(self, key: str) -> AsyncIterator[bytes]:
        return self._streams.read("read_part", key=key)

    async def open_file(self, file_id: UUID) -> "ProxyFile":
        answer, _ = await self._line.call("open_file", file_id=str(file_id))
        found = answer | {
            "id": UUID(answer["id"]),
            "tenant_id": UUID(answer["tenant_id"]),
            "created_at": datetime.fromisoformat(answer["created_at"]),
            "expires_at": answer["expires_at"] and datetime.fromisoformat(answer["expires_at"]),
        }
        return ProxyFile(File(**found), self._streams)

    @asynccontextmanager
    async def artifact(self, name: str, content_type: str = "application/octet-stream") -> AsyncIterator["ProxyWriter"]:
        number = next(self._artifacts)
        await self._line.call("artifact", number=number, name=name, content_type=content_type)
        try:
            out = ProxyWriter(self._line, number)
            yield out
            await out.flush()
        except BaseException:
            await self._line.call("abort", number=number)
            raise
        await self._line.call("close", number=number)

    def source(self, name: str, *, reading: bool = False) -> str:
        return find_source(self._sources, name)[reading]


class _Streams:
    """Bytes that the worker reads for the child, a piece at a time."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._numbers = count(1)

    async def read(self, call: str, /, **arguments: Any) -> AsyncIterator[bytes]:
        stream = next(self._numbers)
        await self._line.call(call, stream=stream, **arguments)
        try:
            while piece := (await self._line.call("next", stream=stream))[1]:
                yield piece
        finally:
            await self._line.call("leave", stream=stream)


@dataclass(frozen=True, slots=True)
class ProxyFile:
    """An uploaded file, read by the worker."""

    file: File
    streams: _Streams

    def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        return self.streams.read("read_file", file_id=str(self.file.id), size=size, start=start)


class ProxyWriter:
    """An artifact, written by the worker. Writing waits for the worker, so memory stays flat."""

    def __init__(self, line: Line, number: int) -> None:
        self._line = line
        self._number = number
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Raises TooLarge some time after the limit is passed."""
        self._buffer += data
        if len(self._buffer) >= frames.PIECE:
            await self.flush()

    async def flush(self) -> None:
        while self._buffer:
            piece = bytes(self._buffer[: frames.PIECE])
            del self._buffer[: frames.PIECE]
            await self._line.call("write", piece, number=self._number)
