"""Files and artifacts: streamed into and out of the place where they are kept, in constant memory."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Container, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import obstore
import structlog
from obstore.exceptions import BaseError

from headway.errors import NoStorage, NotFound, TooLarge
from headway.job import Part
from headway.places import open_place

if TYPE_CHECKING:
    from hashlib import _Hash

CHUNK = 1 << 20
# Short enough that others get their turn between two of them, when they are sent to a client.
READ = 256 << 10

log = structlog.get_logger(__name__)


class CutOff(Exception):
    """What was being sent broke off, and there is nobody left to answer."""


def file_folder(tenant_id: UUID, file_id: UUID) -> str:
    """Below this the parts of an uploaded file are kept."""
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
    """The object store behind a `file:///` or `s3://` URL; `options` are S3's, beside its variables AWS_*."""

    def __init__(self, location: str, *, max_size: int, options: Mapping[str, str] | None = None) -> None:
        self._place = open_place(location, options=options or {}, largest=max_size)
        self._store = self._place.store
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
    async def writer(self, key: str, digest: "_Hash | None" = None) -> AsyncIterator["Writer"]:
        """Write piece by piece; `stored` is set once the block ends. An exception in it leaves nothing behind.

        `digest` is a SHA-256 to go on with. Raises NoStorage if the place of files takes no more.
        """
        out = Writer(self._max_size, digest)
        writing = asyncio.ensure_future(obstore.put_async(self._store, key, out.chunks(), **self._place.writing))
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
            if failure is error and isinstance(error, BaseError | OSError):
                raise _no_storage(error) from error
            raise
        out.stored = out.so_far()

    async def read(
        self, key: str, start: int = 0, end: int | None = None, *, chunk: int = READ
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end`, at least `chunk` at a time but for the last.

        Raises NotFound if nothing is kept there, NoStorage if it cannot be read.
        """
        try:
            with _reachable():
                async for piece in self._place.read(key, start, end, chunk):
                    yield piece
        except FileNotFoundError:
            raise NotFound("The bytes of this file are gone.") from None

    async def read_parts(
        self, parts: Sequence[Part], start: int, end: int, *, chunk: int = READ
    ) -> AsyncIterator[bytes]:
        """The same of a file that is kept in parts, each a key and its size in bytes."""
        first = 0
        for key, size in parts:
            begin, stop = max(start - first, 0), min(end - first, size)
            if begin < stop:
                async for piece in self.read(key, begin, stop, chunk=chunk):
                    yield piece
            first += size

    async def save(self, key: str, data: bytes) -> None:
        """Write `data` under `key`; it outlasts a loss of power once this returns.

        Raises TooLarge past the limit, and NoStorage.
        """
        if len(data) > self._max_size:
            raise TooLarge(f"{len(data):,} bytes are over the limit of {self._max_size:,}; keep them in smaller parts.")
        try:
            await obstore.put_async(self._store, key, data, use_multipart=False)
            await self._place.settle(key)
        except (BaseError, OSError) as error:
            raise _no_storage(error) from error

    async def settle(self, key: str) -> None:
        """Returns once what is kept under `key` outlasts a loss of power. Raises NoStorage."""
        with _reachable():
            await self._place.settle(key)

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget what is kept under `keys`; those that do not exist are passed over."""
        for key in keys:
            with suppress(FileNotFoundError), _reachable():
                await obstore.delete_async(self._store, key)

    async def delete_attempts(self, job_id: UUID, last: int, *, keep: Container[str]) -> None:
        """Forget all that attempts of a job have left, up to the one with the token `last`, but for the keys to keep.

        Also what was still being written when a worker was killed.
        """
        for folder in _of(job_id):
            with _reachable():
                await self._place.clear(folder, lambda key: int(key.split("/")[2]) <= last and key not in keep)

    async def delete_job(self, job_id: UUID) -> None:
        """Forget all bytes of a job: artifacts, parts, and what attempts that were killed have left."""
        for folder in _of(job_id):
            with _reachable():
                await self._place.clear(folder, lambda _: True)

    async def delete_file(self, tenant_id: UUID, file_id: UUID, *, keep: Container[str] = ()) -> None:
        """Forget all bytes of an uploaded file but for the keys to keep, also what requests that died have left."""
        with _reachable():
            await self._place.clear(file_folder(tenant_id, file_id), lambda key: key not in keep)


def _of(job_id: UUID) -> Sequence[str]:
    """Where the bytes of a job are, below it those of each attempt."""
    return [f"artifacts/{job_id}", f"parts/{job_id}"]


@contextmanager
def _reachable() -> Iterator[None]:
    """Raises NoStorage in place of what a bucket that is away, or a folder that cannot be read, says."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise _no_storage(error) from error


def _no_storage(error: Exception) -> NoStorage:
    # What the store says has paths in it, which are the operator's alone.
    log.error("the place of files refuses", error=repr(error))
    return NoStorage(
        "The file could not be kept or read; ask the operator to look whether the place of files is there and has room."
    )


class Writer:
    """An object being written. Writing waits while the store is busy, so memory stays flat."""

    stored: Stored | None = None
    writing: "asyncio.Future[Any]"

    def __init__(self, max_size: int, digest: "_Hash | None" = None) -> None:
        self._max_size = max_size
        self._size = 0
        self._digest = digest or hashlib.sha256()
        self._buffer = bytearray()
        self._queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(maxsize=2)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    async def write(self, data: bytes) -> None:
        """Raises TooLarge past the limit."""
        self._size += len(data)
        if self._size > self._max_size:
            raise TooLarge(f"The file is over the limit of {self._max_size:,} bytes; send a smaller one.")
        self._digest.update(data)
        if len(data) >= CHUNK and not self._buffer:
            await self._put(bytes(data))
            return
        self._buffer += data
        if len(self._buffer) >= CHUNK:
            data, self._buffer = bytes(self._buffer), bytearray()
            await self._put(data)

    async def end(self) -> None:
        """Hand over what is left and the end."""
        if self._buffer:
            await self._put(bytes(self._buffer))
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
