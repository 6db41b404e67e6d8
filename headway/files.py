"""Where files and artifacts are kept: a local folder, streamed in and out in constant memory."""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Container, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from headway.errors import InvalidSettings, NoStorage, NotFound, TooLarge

if TYPE_CHECKING:
    from obstore import GetOptions

CHUNK = 1 << 20

log = structlog.get_logger(__name__)


def file_key(tenant_id: UUID, file_id: UUID) -> str:
    """Where an uploaded file is kept."""
    return f"files/{tenant_id}/{file_id}"


def artifact_key(job_id: UUID, token: int, number: int) -> str:
    """Where an artifact is kept: apart for each attempt, so that a late one overwrites nothing."""
    return f"artifacts/{job_id}/{token}/{number}"


def part_key(job_id: UUID, token: int, number: int) -> str:
    """Where a part of what a job is making is kept, apart for each attempt as well."""
    return f"parts/{job_id}/{token}/{number}"


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
        folder = Path(unquote(parts.path))
        try:
            self._store = LocalStore(folder, mkdir=True, automatic_cleanup=True)
        except OSError as error:
            raise InvalidSettings(
                f"Files cannot be kept in {folder}: {error}. Check HEADWAY_FILES_URL or HEADWAY_HOME."
            ) from None
        self._folder = folder
        self._max_size = max_size

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> Stored:
        """Write `chunks` under `key`; it exists only once all are written.

        Raises TooLarge past the limit and NoStorage if the place of files takes no more; whatever `chunks` raises
        passes through. In each case nothing is left behind.
        """
        async with self.writer(key) as out:
            async for chunk in chunks:
                await out.write(chunk)
        assert out.stored is not None
        return out.stored

    @asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator["Writer"]:
        """Write piece by piece; `stored` is set once the block ends. An exception in it leaves nothing behind.

        Raises NoStorage if the place of files takes no more.
        """
        out = Writer(self._max_size)
        writing = asyncio.ensure_future(obstore.put_async(self._store, key, out.chunks(), chunk_size=CHUNK))
        out.writing = writing
        try:
            yield out
            await out.end()
            await asyncio.shield(writing)
        except BaseException as error:
            # The store is told to stop by an exception: to cancel it would leave its half of the work running.
            out.abort()
            await asyncio.wait({writing})
            failure = None if writing.cancelled() else writing.exception()
            if not writing.cancelled() and failure is None:
                await self.delete([key])
            if failure is error and isinstance(error, BaseError):
                raise _no_storage(error) from error
            raise
        out.stored = out.so_far()

    async def read(
        self, key: str, start: int = 0, end: int | None = None, *, chunk: int = CHUNK
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end`, at least `chunk` at a time but for the last.

        Raises NotFound if nothing is kept there.
        """
        # The store refuses a range of a file without bytes.
        span: GetOptions = {"range": (start, end)} if end is not None else {"range": {"offset": start}} if start else {}
        try:
            found = await obstore.get_async(self._store, key, options=span)
        except FileNotFoundError:
            raise NotFound("The bytes of this file are gone.") from None
        async for piece in found.stream(chunk):
            yield bytes(piece)

    async def save(self, key: str, data: bytes) -> None:
        """Write `data` under `key`; it outlasts a loss of power once this returns.

        Raises TooLarge past the limit, and NoStorage.
        """
        if len(data) > self._max_size:
            raise TooLarge(f"{len(data):,} bytes are over the limit of {self._max_size:,}; keep them in smaller parts.")
        try:
            await obstore.put_async(self._store, key, data, use_multipart=False)
            await asyncio.to_thread(self._sync, key)
        except (BaseError, OSError) as error:
            raise _no_storage(error) from error

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget what is kept under `keys`; those that do not exist are passed over."""
        for key in keys:
            with suppress(FileNotFoundError):
                await obstore.delete_async(self._store, key)

    async def delete_attempts(self, job_id: UUID, last: int, *, keep: Container[str]) -> None:
        """Forget all that attempts of a job have left, up to the one with the token `last`, but for the keys to keep.

        Also what was still being written when a worker was killed.
        """
        await asyncio.to_thread(self._sweep, job_id, last, keep)

    async def delete_job(self, job_id: UUID) -> None:
        """Forget all bytes of a job: artifacts, parts, and what attempts that were killed have left."""
        for folder in self._of(job_id):
            with suppress(FileNotFoundError):
                await asyncio.to_thread(shutil.rmtree, folder)

    def _of(self, job_id: UUID) -> Sequence[Path]:
        """The folders of a job, in which each attempt has its own."""
        return [self._folder / top / str(job_id) for top in ("artifacts", "parts")]

    def _sync(self, key: str) -> None:
        """Have the disk hold a file, and the folders that lead to it."""
        path = self._folder / key
        for each in (path, *path.parents[: len(Path(key).parts)]):
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _sweep(self, job_id: UUID, last: int, keep: Container[str]) -> None:
        for folder in self._of(job_id):
            with suppress(FileNotFoundError):
                for attempt in list(folder.iterdir()):
                    if int(attempt.name) <= last:
                        _empty(attempt, [path for path in attempt.iterdir() if self._key(path) not in keep])
                _empty(folder, [])

    def _key(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _no_storage(error: Exception) -> NoStorage:
    # What the store says has paths in it, which are the operator's alone.
    log.error("a file was not kept", error=repr(error))
    return NoStorage("The file could not be kept; ask the operator to look whether the place of files has room.")


def _empty(folder: Path, files: Sequence[Path]) -> None:
    """Delete files of a folder, and the folder itself if nothing is left in it."""
    for path in files:
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


class Writer:
    """An object being written. Writing waits while the store is busy, so memory stays flat."""

    stored: Stored | None = None
    writing: "asyncio.Future[Any]"

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._size = 0
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(maxsize=2)

    async def write(self, data: bytes) -> None:
        """Raises TooLarge past the limit."""
        self._size += len(data)
        if self._size > self._max_size:
            raise TooLarge(f"The file is over the limit of {self._max_size:,} bytes; send a smaller one.")
        if len(data) >= CHUNK and not self._buffer:
            await self._hand_over(bytes(data))
            return
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            data, self._buffer = bytes(self._buffer), bytearray()
            await self._hand_over(data)

    async def end(self) -> None:
        """Hand over what is left and the end."""
        if self._buffer:
            await self._hand_over(bytes(self._buffer))
        await self._put(None)

    def abort(self) -> None:
        """Let the store fail at its next piece."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(_Aborted())

    def so_far(self) -> Stored:
        return Stored(self._size, self._digest.hexdigest())

    async def chunks(self) -> AsyncIterator[bytes]:
        """What the store takes."""
        while (chunk := await self._queue.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    async def _hand_over(self, data: bytes) -> None:
        self._digest.update(data)
        await self._put(data)

    async def _put(self, item: bytes | None) -> None:
        room = asyncio.ensure_future(self._queue.put(item))
        try:
            await asyncio.wait({room, self.writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
        if self.writing.done():
            # It takes no more: it has failed, and says how.
            await self.writing


class _Aborted(Exception):
    """The writer gave up."""
