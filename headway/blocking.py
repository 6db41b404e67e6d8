"""SyncJobContext: the job's context for plain functions, which run in a thread beside the event loop."""

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

from headway.context import ArtifactWriter, InputFile, JobContext, as_progress
from headway.errors import LeaseLost
from headway.job import Child, ChildEnding, File, Progress

# Reports go to the event loop this often; those in between are never seen.
REPORT_EVERY = 0.05
# What is written to an artifact goes to the event loop in pieces of this size.
PIECE = 1 << 18

T = TypeVar("T")


class SyncJobContext:
    """What a plain function is given: the methods of JobContext, which return when they are done.

    A thread cannot be stopped from outside. When the job is cancelled, times out or the worker shuts down,
    `asyncio.CancelledError` is raised where the function waits in one of these methods, and by every `report` from
    then on: let it pass. A function that does not report must ask `cancelled`.
    """

    def __init__(self, job: JobContext, loop: asyncio.AbstractEventLoop) -> None:
        self.id = job.id
        self.kind = job.kind
        self.attempt = job.attempt
        self._job = job
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._calls: set[asyncio.Task[Any]] = set()
        self._latest: deque[Progress] = deque(maxlen=1)
        self._carrying = False

    @property
    def checkpoint(self) -> Any:
        """What an earlier attempt saved; None if none did."""
        return self._job.checkpoint

    @property
    def interruption(self) -> str | None:
        """Why the function is to stop: `cancelled`, `timed-out`, `drained`, `waiting`, `lost`; None if it is not."""
        return self._job.interruption

    @property
    def cancelled(self) -> bool:
        """Whether the function is to stop, for whatever reason; `interruption` says which."""
        return self._job.cancelled

    def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Say how far the job is. Cheap: call it as often as you like. Here a cancel is felt."""
        progress = as_progress(done, total, message, unit, counts)
        if self.cancelled:
            raise asyncio.CancelledError(self.interruption)
        self._latest.append(progress)
        if not self._carrying:
            self._carrying = True
            asyncio.run_coroutine_threadsafe(self._carry(), self._loop)

    def log(self, message: str, *, level: str = "info") -> None:
        """Add a line to the job's own log."""
        self._wait(self._job.log(message, level=level))

    def save_checkpoint(self, value: Any) -> None:
        """Keep a small JSON value for the next attempt. It is in Postgres when this returns."""
        self._wait(self._job.save_checkpoint(value))

    def save_part(self, data: bytes) -> str:
        """Keep bytes with the job until it ends; the answer is their key, to be put into the checkpoint."""
        return self._wait(self._job.save_part(data))

    def read_part(self, key: str) -> Iterator[bytes]:
        """The bytes of a part that this or an earlier attempt saved."""
        return self._each(self._job.read_part(key))

    def open_file(self, file_id: UUID) -> "SyncInputFile":
        """A file of the job's tenant. Raises Fatal if there is none."""
        return SyncInputFile(self._wait(self._job.open_file(file_id)), self)

    @contextmanager
    def artifact(self, name: str, content_type: str = "application/octet-stream") -> Iterator["SyncArtifactWriter"]:
        """Write a file that belongs to the job: `with job.artifact("bad.csv", "text/csv") as out`."""
        opened = self._job.artifact(name, content_type)
        out = SyncArtifactWriter(self._wait(opened.__aenter__()), self)
        try:
            yield out
            out.flush()
        except BaseException as error:
            self._wait(opened.__aexit__(type(error), error, error.__traceback__))
            raise
        self._wait(opened.__aexit__(None, None, None))

    def children(self, children: Iterable[Child]) -> list[ChildEnding]:
        """Submit jobs as parts of this one, and answer how they ended, in their order.

        The function is interrupted here by CancelledError, and called anew once all children have ended.
        """
        return self._wait(self._children(list(children)))

    def source(self, name: str, *, reading: bool = False) -> str:
        """The URL of a source from the settings, with `reading` the one for what only reads.

        Raises Fatal if there is none that the job's tenant may use, naming those that it may.
        """
        return self._job.source(name, reading=reading)

    # -- for the worker, on its event loop --

    def interrupt(self) -> None:
        """Let what the function waits for end by CancelledError."""
        for call in self._calls:
            call.cancel()

    async def flush(self) -> None:
        """Pass the newest report on, if it was not."""
        if self._latest:
            latest = self._latest.pop()
            await self._job.report(latest.done, latest.total, latest.message, unit=latest.unit, counts=latest.counts)

    async def _carry(self) -> None:
        try:
            await self.flush()
            await asyncio.sleep(REPORT_EVERY)
            self._carrying = False
            # What came before the line above has nobody else to carry it.
            await self.flush()
        except LeaseLost:
            # The function is told at its next report.
            self._carrying = False

    async def _children(self, children: list[Child]) -> list[ChildEnding]:
        if self.cancelled:
            # Nothing would interrupt the waiting.
            raise asyncio.CancelledError(self.interruption)
        return await self._job.children(children)

    # -- from the thread to the loop --

    def _wait(self, call: Awaitable[T]) -> T:
        if threading.get_ident() == self._loop_thread:
            # The collector may end a generator there, with what it holds open.
            raise RuntimeError("The event loop cannot wait for itself.")
        try:
            return asyncio.run_coroutine_threadsafe(self._called(call), self._loop).result()
        except concurrent.futures.CancelledError:
            raise asyncio.CancelledError(self.interruption) from None

    async def _called(self, call: Awaitable[T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            return await call
        finally:
            self._calls.discard(task)

    def _each(self, stream: AsyncIterator[bytes]) -> Iterator[bytes]:
        try:
            while piece := self._wait(anext(stream, b"")):
                yield piece
        finally:
            if isinstance(stream, AsyncGenerator):
                # Without waiting: the collector may end this iterator on the loop itself.
                asyncio.run_coroutine_threadsafe(_close(stream), self._loop)


@dataclass(frozen=True, slots=True)
class SyncInputFile:
    """A file of the job's tenant, opened for reading."""

    _opened: InputFile
    _job: SyncJobContext

    @property
    def file(self) -> File:
        return self._opened.file

    def chunks(self, size: int = 1 << 20, *, start: int = 0) -> Iterator[bytes]:
        """The bytes from `start` on, about `size` at a time."""
        return self._job._each(self._opened.chunks(size, start=start))


class SyncArtifactWriter:
    """An artifact being written, in pieces."""

    def __init__(self, out: ArtifactWriter, job: SyncJobContext) -> None:
        self._out = out
        self._job = job
        self._buffer = bytearray()

    def write(self, data: bytes) -> None:
        """Raises TooLarge some time after the limit is passed."""
        self._buffer += data
        if len(self._buffer) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Pass on what was written. The end of the `with` block does so by itself."""
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            self._job._wait(self._out.write(data))


async def _close(stream: AsyncGenerator[bytes, None]) -> None:
    await stream.aclose()
