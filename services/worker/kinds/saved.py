"""What a job has made so far, saved now and then, so that another attempt goes on after it."""

import time
from collections.abc import AsyncIterator

import structlog

from headway import JobContext
from headway.errors import NotFound

# What a crash costs at most: what was made in so many seconds, or in a fiftieth of the time that the job has taken.
SAVE_EVERY = 2.0
SAVE_SHARE = 1 / 50
# Bounds memory.
SAVE_BYTES = 8 << 20
# With more keys the checkpoint might not fit. Past it nothing more is saved: it takes 8 GB or a hundred interruptions.
MOST_PARTS = 1000

log = structlog.get_logger(__name__)


class Saved:
    """The checkpoint is the keys of the parts that hold whole records; the records themselves say what is done."""

    def __init__(self, job: JobContext) -> None:
        checkpoint = job.checkpoint or {"parts": [], "seconds": 0.0}
        self._job = job
        self._parts: list[str] = checkpoint["parts"]
        self._before: float = checkpoint["seconds"]
        self._began = time.perf_counter()
        self._saved = self.seconds
        self._fresh = bytearray()

    @property
    def seconds(self) -> float:
        """What this attempt has taken, and those before it up to their last save."""
        return self._before + time.perf_counter() - self._began

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        if len(self._fresh) >= SAVE_BYTES:
            return True
        seconds = self.seconds
        return seconds - self._saved >= max(SAVE_EVERY, seconds * SAVE_SHARE)

    async def earlier(self) -> AsyncIterator[bytes]:
        """What earlier attempts saved: whole records, many at a time. Those that are gone count as not done."""
        found = []
        for key in self._parts:
            try:
                records = b"".join([chunk async for chunk in self._job.read_part(key)])
            except NotFound:
                log.warning("what was saved is gone; it is done again", key=key)
                continue
            found.append(key)
            yield records
        self._parts = found

    def add(self, record: bytes) -> None:
        """Have the next save hold a record."""
        if len(self._parts) < MOST_PARTS:
            self._fresh += record

    async def save(self) -> None:
        """Save the records that were added since. A save that is interrupted leaves things as they were before it."""
        if not self._fresh:
            return
        size, seconds = len(self._fresh), self.seconds
        parts = [*self._parts, await self._job.save_part(bytes(self._fresh))]
        await self._job.save_checkpoint({"parts": parts, "seconds": round(seconds, 3)})
        self._parts, self._saved = parts, seconds
        del self._fresh[:size]
