"""Where files and artifacts are kept: a local folder, streamed in and out in constant memory."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import UUID

import obstore
from obstore.store import LocalStore

from headway.errors import InvalidSettings, NotFound, TooLarge

CHUNK = 1 << 20


def file_key(tenant_id: UUID, file_id: UUID) -> str:
    """Where an uploaded file is kept."""
    return f"files/{tenant_id}/{file_id}"


def artifact_key(job_id: UUID, token: int, number: int) -> str:
    """Where an artifact is kept: apart for each attempt, so that a late one overwrites nothing."""
    return f"artifacts/{job_id}/{token}/{number}"


@dataclass(frozen=True, slots=True)
class Stored:
    """What was written: its size in bytes and the hex SHA-256 of its bytes."""

    size: int
    sha256: str


class Files:
    """The object store behind `files_location`."""

    def __init__(self, location: str, *, max_size: int) -> None:
        parts = urlsplit(location)
        if parts.scheme != "file":
            raise InvalidSettings(f"HEADWAY_FILES_URL must be a file:/// URL, not {parts.scheme}://.")
        self._store = LocalStore(Path(unquote(parts.path)), mkdir=True, automatic_cleanup=True)
        self._max_size = max_size

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> Stored:
        """Write `chunks` under `key`; it exists only once all are written.

        Raises TooLarge past the limit; whatever `chunks` raises passes through. Either way nothing is left behind.
        """
        size, digest = 0, hashlib.sha256()

        async def measured() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                if size > self._max_size:
                    raise TooLarge(f"The file is over the limit of {self._max_size:,} bytes; send a smaller one.")
                digest.update(chunk)
                yield chunk

        await obstore.put_async(self._store, key, measured(), chunk_size=CHUNK)
        return Stored(size, digest.hexdigest())

    @asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator["Writer"]:
        """Write piece by piece; `stored` is set once the block ends. An exception in it leaves nothing behind."""
        out = Writer()
        task = asyncio.create_task(self.put(key, out.chunks()))
        out.feeds(task)
        try:
            yield out
            await out.end()
            out.stored = await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def read(
        self, key: str, start: int = 0, end: int | None = None, *, chunk: int = CHUNK
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end`, at least `chunk` at a time but for the last.

        Raises NotFound if nothing is kept there.
        """
        try:
            found = await obstore.get_async(
                self._store, key, options={"range": (start, end) if end is not None else {"offset": start}}
            )
        except FileNotFoundError:
            raise NotFound("The bytes of this file are gone.") from None
        async for piece in found.stream(chunk):
            yield bytes(piece)

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget what is kept under `keys`; those that do not exist are passed over."""
        for key in keys:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, key)


class Writer:
    """An object being written. Writing waits while the store is busy, so memory stays flat."""

    stored: Stored | None = None

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=2)
        self._buffer = bytearray()
        self._task: asyncio.Task[Stored] | None = None

    def feeds(self, task: "asyncio.Task[Stored]") -> None:
        """Name the task that takes what is written, so that its failure reaches the writer."""
        self._task = task

    async def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            await self._hand_over()

    async def end(self) -> None:
        """Hand over what is left and the end."""
        await self._hand_over()
        await self._put(None)

    async def chunks(self) -> AsyncIterator[bytes]:
        while (chunk := await self._queue.get()) is not None:
            yield chunk

    async def _hand_over(self) -> None:
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            await self._put(data)

    async def _put(self, item: bytes | None) -> None:
        assert self._task is not None
        room = asyncio.ensure_future(self._queue.put(item))
        await asyncio.wait({room, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not room.done():
            room.cancel()
            await self._task
