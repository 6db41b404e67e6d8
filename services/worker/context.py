"""What a handler holds: JobContext over the lifecycle, the files and the sources."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from headway.errors import Fatal, LeaseLost
from headway.files import Files, Writer, artifact_key, file_key
from headway.job import Artifact, Claim, File, Progress
from headway.kinds import JobContext
from headway.lifecycle import Lifecycle
from headway.settings import Settings
from headway.store import OUTAGES, Store
from services.worker.pace import Pace

# At most ten reports a second are written for a job.
REPORT_EVERY = 0.1
# A handler that only reports would hold the event loop; it lets others run this often.
YIELD_EVERY = 0.01

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What contexts of one worker share."""

    settings: Settings
    store: Store
    lifecycle: Lifecycle
    files: Files


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An uploaded file, to be read in pieces."""

    file: File
    files: Files

    async def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        if start < self.file.size:
            async for chunk in self.files.read(file_key(self.file.tenant_id, self.file.id), start, chunk=size):
                yield chunk


class Context(JobContext):
    """One attempt's context. `interrupt` is called with `cancelled` or `lost` when a write brings that news."""

    def __init__(self, claim: Claim, parts: Parts, interrupt: Callable[[str], None]) -> None:
        self.id = claim.job_id
        self.kind = claim.kind
        self.attempt = claim.attempt
        self.checkpoint = claim.checkpoint
        self.artifacts: list[Artifact] = []
        self._claim = claim
        self._parts = parts
        self._interrupt = interrupt
        self._pace = Pace()
        self._latest: Progress | None = None
        self._written: Progress | None = None
        self._writer: asyncio.Task[None] | None = None
        self._yielded = time.monotonic()
        self._opened = 0

    async def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        self._latest = Progress(done, total, unit, message, counts or {})
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        if time.monotonic() - self._yielded > YIELD_EVERY:
            await asyncio.sleep(0)
            self._yielded = time.monotonic()

    async def log(self, message: str, *, level: str = "info") -> None:
        await self._parts.lifecycle.log(self._claim, message, level)

    async def save_checkpoint(self, value: Any) -> None:
        await self._parts.lifecycle.save_checkpoint(self._claim, value)
        self.checkpoint = value

    async def open_file(self, file_id: UUID) -> StoredFile:
        file = await self._parts.store.get_file(file_id, self._claim.tenant_id)
        if file is None:
            raise Fatal(f"There is no file {file_id}; upload it with POST /api/v1/files and use the id of the answer.")
        return StoredFile(file, self._parts.files)

    @asynccontextmanager
    async def artifact(self, name: str, content_type: str = "application/octet-stream") -> AsyncIterator[Writer]:
        if any(artifact.name == name for artifact in self.artifacts):
            raise ValueError(f"The job has an artifact {name!r} already.")
        self._opened += 1
        key = artifact_key(self.id, self._claim.token, self._opened)
        async with self._parts.files.writer(key) as writer:
            yield writer
        assert writer.stored is not None
        self.artifacts.append(Artifact(name, content_type, writer.stored.size, writer.stored.sha256, key))

    def source(self, name: str) -> str:
        sources = self._parts.settings.sources
        if name not in sources:
            there = ", ".join(sorted(sources)) or "none; the operator names them in HEADWAY_SOURCES"
            raise Fatal(f"There is no source {name!r}; there are: {there}.")
        return sources[name].get_secret_value()

    async def close(self) -> Mapping[str, Any] | None:
        """Stop writing reports; the newest one, which finishing the job writes."""
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
        return self._shown(self._latest) if self._latest else None

    async def _write(self) -> None:
        """Write the newest report, then wait: what comes meanwhile shares the next write."""
        while self._latest is not self._written:
            report = self._latest
            assert report is not None
            try:
                if await self._parts.lifecycle.report(self._claim, self._shown(report)):
                    self._interrupt("cancelled")
            except LeaseLost:
                self._interrupt("lost")
                return
            except OUTAGES as error:
                log.warning("a report was not written; the next one will be", error=repr(error))
            self._written = report
            await asyncio.sleep(REPORT_EVERY)

    def _shown(self, report: Progress) -> Mapping[str, Any]:
        rate, eta = self._pace.observe(report.done, report.total)
        return {**report.as_json(), "rate": rate, "eta": eta}
