"""What a handler holds: JobContext over the lifecycle, the files and the sources."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import UUID

import structlog

from headway.context import JobContext, as_progress
from headway.errors import Fatal, LeaseLost
from headway.files import Files, Writer, artifact_key, part_key
from headway.groups import Groups
from headway.job import Artifact, Child, ChildEnding, Claim, File, Progress
from headway.lifecycle import Lifecycle, kept
from headway.settings import Settings
from headway.store import OUTAGES, REFUSALS, Store
from services.worker.handling import find_source
from services.worker.pace import Pace

# At most ten reports a second are written for a job.
REPORT_EVERY = 0.1
# After an outage of the database.
REPORT_AGAIN = 1.0
# A handler that only reports would hold the event loop; it lets others run this often.
YIELD_EVERY = 0.002
# Names become part of a path, types become a header.
ARTIFACT_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,200}")
CONTENT_TYPE = re.compile(r"[ -~]{1,200}")

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What contexts of one worker share."""

    settings: Settings
    store: Store
    lifecycle: Lifecycle
    files: Files

    @property
    def groups(self) -> Groups:
        return Groups(self.store, self.lifecycle)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An uploaded file, to be read in pieces."""

    file: File
    files: Files

    async def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        async for chunk in self.files.read_parts(self.file.parts, start, self.file.size, chunk=size):
            yield chunk


class UnderWay(Protocol):
    """The attempt that a context belongs to, as far as the context knows it."""

    reason: str | None

    def interrupt(self, reason: str) -> bool:
        """Interrupt the handler, with `cancelled` or `lost` when a write brings that news, or `waiting` for children.

        Answers whether it came in time.
        """


class Context(JobContext):
    """One attempt's context."""

    def __init__(self, claim: Claim, parts: Parts, attempt: UnderWay) -> None:
        self.id = claim.job_id
        self.kind = claim.kind
        self.attempt = claim.attempt
        self.checkpoint = claim.checkpoint
        self.artifacts: list[Artifact] = []
        self._claim = claim
        self._parts = parts
        self._under_way = attempt
        self._pace = Pace()
        self._latest: Progress | None = None
        self._written: Progress | None = None
        self._shown: Mapping[str, Any] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._pausing = False
        self._closed = False
        self._yielded = time.monotonic()
        self._opened = 0
        self._saved = 0
        self.asked = 0
        self._names: set[str] = set()

    @property
    def interruption(self) -> str | None:
        return self._under_way.reason

    async def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        if self._closed:
            raise LeaseLost(f"Attempt {self.attempt} of job {self.id} is over.")
        self._latest = as_progress(done, total, message, unit, counts)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        if time.monotonic() - self._yielded > YIELD_EVERY:
            await asyncio.sleep(0)
            self._yielded = time.monotonic()

    async def log(self, message: str, *, level: str = "info") -> None:
        await _through_outages(lambda: self._parts.lifecycle.log(self._claim, message, level))

    async def save_checkpoint(self, value: Any) -> None:
        advice = "Keep a checkpoint small, and put large data into a part (save_part) or an artifact."
        try:
            size = len(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise Fatal(f"The checkpoint is not JSON: {error}. {advice}") from error
        if size > (limit := self._parts.settings.max_checkpoint):
            raise Fatal(f"The checkpoint has {size:,} bytes, over the limit of {limit:,}. {advice}")
        try:
            await _through_outages(lambda: self._parts.lifecycle.save_checkpoint(self._claim, value))
        except REFUSALS as error:
            raise Fatal(f"Postgres cannot keep the checkpoint: {str(error).splitlines()[0]}. {advice}") from error
        self.checkpoint = value

    async def save_part(self, data: bytes) -> str:
        if self._closed:
            raise LeaseLost(f"Attempt {self.attempt} of job {self.id} is over.")
        self._saved += 1
        key = part_key(self.id, self._claim.token, self._saved)
        await self._parts.files.save(key, data)
        return key

    def read_part(self, key: str) -> AsyncIterator[bytes]:
        if not re.fullmatch(rf"parts/{self.id}/[0-9]+/[0-9]+", key):
            raise ValueError(f"{key!r} is not a part of this job; use a key that save_part has answered with.")
        return self._parts.files.read(key)

    async def forget_parts(self) -> None:
        """Delete what the job's attempts have left that nobody will see. To be called once the job has ended for good.

        Costs nothing for a job of one attempt that has saved no part.
        """
        if self._claim.token == 1 and not self._saved:
            return
        kept = await self._parts.store.artifacts(self.id, self._claim.tenant_id)
        await self._parts.files.delete_attempts(self.id, self._claim.token, keep={artifact.key for artifact in kept})

    async def open_file(self, file_id: UUID) -> StoredFile:
        file = await _through_outages(lambda: self._parts.store.get_file(file_id, self._claim.tenant_id))
        if file is None:
            raise Fatal(f"There is no file {file_id}; upload it with POST /api/v1/files and use the id of the answer.")
        return StoredFile(file, self._parts.files)

    @asynccontextmanager
    async def artifact(self, name: str, content_type: str = "application/octet-stream") -> AsyncIterator[Writer]:
        if not ARTIFACT_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"{name!r} cannot name an artifact: use 1 to 200 characters without slashes and controls.")
        if not CONTENT_TYPE.fullmatch(content_type):
            raise ValueError(f"{content_type!r} is not a content type.")
        if name in self._names:
            raise ValueError(f"The job has an artifact {name!r} already.")
        self._names.add(name)
        self._opened += 1
        key = artifact_key(self.id, self._claim.token, self._opened)
        try:
            async with self._parts.files.writer(key) as writer:
                yield writer
            # The end of the job is to outlast a loss of power with what it names.
            await self._parts.files.settle(key)
        except BaseException:
            self._names.discard(name)
            raise
        assert writer.stored is not None
        self.artifacts.append(Artifact(name, content_type, writer.stored.size, writer.stored.sha256, key))

    async def children(self, children: Iterable[Child]) -> list[ChildEnding]:
        wanted = list(children)
        first, self.asked = self.asked, self.asked + len(wanted)
        endings = await _through_outages(lambda: self._parts.groups.endings(self._claim, wanted, first))
        if endings is None:
            self._under_way.interrupt("waiting")
            # The interruption arrives here.
            await asyncio.get_running_loop().create_future()
        return endings or []

    def source(self, name: str, *, reading: bool = False) -> str:
        source = find_source(self._parts.settings.sources_of(self._claim.tenant_id), name)
        return (source.reading if reading else source.url).get_secret_value()

    async def close(self) -> Mapping[str, Any] | None:
        """Take no more reports, let one that is being written end; the newest one, which finishing the job writes."""
        self._closed = True
        if self._writer is not None:
            if self._pausing:
                self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        if self._latest is not self._written:
            self._show()
        return self._shown

    async def _write(self) -> None:
        """Write the newest report, then pause: what comes meanwhile shares the next write."""
        while self._latest is not self._written and not self._closed:
            report, progress, pause = self._latest, self._show(), REPORT_EVERY
            try:
                if await self._parts.lifecycle.report(self._claim, progress):
                    self._under_way.interrupt("cancelled")
                self._written = report
            except LeaseLost:
                self._under_way.interrupt("lost")
                return
            except OUTAGES as error:
                log.warning("a report was not written; trying again", error=repr(error))
                pause = REPORT_AGAIN
            self._pausing = True
            await asyncio.sleep(pause)
            self._pausing = False

    def _show(self) -> Mapping[str, Any]:
        """The newest report as clients see it."""
        report = self._latest
        assert report is not None
        rate, eta = self._pace.observe(report.done, report.total)
        self._shown = Progress(
            done=report.done,
            total=report.total,
            unit=kept(report.unit),
            message=kept(report.message),
            counts={kept(name): count for name, count in report.counts.items()},
            rate=rate,
            eta=eta,
        ).as_json()
        return self._shown


async def _through_outages(call: Callable[[], Awaitable[T]]) -> T:
    """Call until the database answers. A handler that waits here longer than its lease is interrupted."""
    wait = 0.2
    while True:
        try:
            return await call()
        except OUTAGES as error:
            log.warning("a call of the handler waits for the database", error=repr(error), wait=wait)
        await asyncio.sleep(wait)
        wait = min(wait * 2, 2.0)
