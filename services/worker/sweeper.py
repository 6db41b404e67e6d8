"""Retention by every worker, a while after it started: several that sweep at once do no harm."""

import asyncio
import random

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
        self._retention = retention
        self._uploads = uploads

    async def run(self) -> None:
        """Sweep about once a minute, for ever."""
        while True:
            # Workers that started together take turns.
            await asyncio.sleep(SWEEP_EVERY * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                if deleted := await self._retention.sweep():
                    log.info("ended jobs were deleted", jobs=deleted)
                if deleted := await self._retention.sweep_rooms():
                    log.info("old messages were deleted", messages=deleted)
                if deleted := await self._uploads.sweep():
                    log.info("files were deleted", files=deleted)
            except OUTAGES as error:
                log.warning("not all that is old was deleted; the next sweep follows", error=repr(error))
            except NoStorage:
                metrics.errors_caught.labels("files").inc()
                log.exception("not all files were deleted; the next sweep tries again")
