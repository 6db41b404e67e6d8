"""Retention by every worker, a while after it started: several that sweep at once do no harm."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import structlog

from headway import metrics
from headway.errors import NoStorage
from headway.retention import Retention
from headway.store import OUTAGES
from headway.uploads import Uploads

SWEEP_EVERY = 60.0

log = structlog.get_logger(__name__)


class Sweeper:
    """Deletes jobs, messages and files that are kept no longer, and uploads that were given up."""

    def __init__(self, retention: Retention, uploads: Uploads) -> None:
        self._sweeps: dict[str, Callable[[], Awaitable[int]]] = {
            "ended jobs": retention.sweep,
            "old messages": retention.sweep_rooms,
            "files": uploads.sweep,
        }

    async def run(self) -> None:
        """Sweep about once a minute, for ever."""
        while True:
            # Workers that started together take turns.
            await asyncio.sleep(SWEEP_EVERY * random.uniform(0.5, 1.5))  # noqa: S311
            for what, sweep in self._sweeps.items():
                await self._sweep(what, sweep)

    async def _sweep(self, what: str, sweep: Callable[[], Awaitable[int]]) -> None:
        """One of them; if it fails, the others are not put off."""
        try:
            if deleted := await sweep():
                log.info("what was old is deleted", what=what, deleted=deleted)
        except OUTAGES as error:
            log.warning("not all that is old was deleted; the next sweep follows", what=what, error=repr(error))
        except NoStorage:
            metrics.errors_caught.labels("files").inc()
            log.exception("not all files were deleted; the next sweep tries again", what=what)
