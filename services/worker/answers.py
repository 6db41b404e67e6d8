"""What a handler in a child process calls, done by the context that the worker has of its attempt."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from typing import Any
from uuid import UUID

from headway.context import ArtifactWriter, InputFile, JobContext


class Answers:
    """The calls of one child. Each takes JSON and bytes, and answers with either."""

    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._files: dict[str, InputFile] = {}
        self._streams: dict[int, AsyncIterator[bytes]] = {}
        self._artifacts: dict[int, tuple[AsyncExitStack, ArtifactWriter]] = {}
        self._calls: Mapping[str, Callable[..., Awaitable[Any]]] = {
            "log": context.log,
            "save_checkpoint": context.save_checkpoint,
            "save_part": self._save_part,
            "read_part": self._read_part,
            "open_file": self._open_file,
            "read_file": self._read_file,
            "next": self._next,
            "leave": self._leave,
            "artifact": self._artifact,
            "write": self._write,
            "close": self._close,
            "abort": self._abort,
        }

    async def answer(self, call: str, arguments: Mapping[str, Any], body: bytes) -> tuple[Any, bytes]:
        """What to reply. Raises what the context raises."""
        given = {**arguments, "data": body} if body else arguments
        answer = await self._calls[call](**given)
        return (None, answer) if isinstance(answer, bytes) else (answer, b"")

    async def end(self) -> None:
        """Drop what the child has left open."""
        for stream in list(self._streams):
            await self._leave(stream)
        for number in list(self._artifacts):
            await self._abort(number)

    async def _save_part(self, data: bytes = b"") -> str:
        return await self._context.save_part(data)

    async def _open_file(self, file_id: str) -> dict[str, Any]:
        opened = self._files[file_id] = await self._context.open_file(UUID(file_id))
        return asdict(opened.file) | {
            "id": str(opened.file.id),
            "tenant_id": str(opened.file.tenant_id),
            "created_at": opened.file.created_at.isoformat(),
            "expires_at": opened.file.expires_at and opened.file.expires_at.isoformat(),
        }

    async def _read_file(self, stream: int, file_id: str, size: int, start: int) -> None:
        self._streams[stream] = self._files[file_id].chunks(size, start=start)

    async def _read_part(self, stream: int, key: str) -> None:
        self._streams[stream] = self._context.read_part(key)

    async def _next(self, stream: int) -> bytes:
        """The next piece of a stream; nothing at its end."""
        async for piece in self._streams[stream]:
            if piece:
                return piece
        return b""

    async def _leave(self, stream: int) -> None:
        """The child reads no more of a stream."""
        left = self._streams.pop(stream)
        if isinstance(left, AsyncGenerator):
            await left.aclose()

    async def _artifact(self, number: int, name: str, content_type: str) -> None:
        stack = AsyncExitStack()
        out = await stack.enter_async_context(self._context.artifact(name, content_type))
        self._artifacts[number] = stack, out

    async def _write(self, number: int, data: bytes) -> None:
        await self._artifacts[number][1].write(data)

    async def _close(self, number: int) -> None:
        stack, _ = self._artifacts.pop(number)
        await stack.aclose()

    async def _abort(self, number: int) -> None:
        stack, _ = self._artifacts.pop(number)
        with suppress(_Aborted):
            async with stack:
                raise _Aborted


class _Aborted(Exception):
    """The handler's block around an artifact was left by an exception."""
