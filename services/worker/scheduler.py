"""Firing schedules: every worker looks for due slots, and it does no harm that several do."""

import asyncio

import structlog

from headway.schedules import Schedules
from headway.store import OUTAGES

LOOK_EVERY = 1.0
# After an outage a look submits at most so many times 50 slots of one schedule, then pauses.
ROUNDS = 20

log = structlog.get_logger(__name__)


class Scheduler:
    """Submits the jobs of schedules as their slots come."""

    def __init__(self, schedules: Schedules) -> None:
        self._schedules = schedules

    async def run(self) -> None:
        """Look for due slots every second, for ever."""
        while True:
            try:
                for _ in range(ROUNDS):
                    if not await self._schedules.fire():
                        break
            except OUTAGES as error:
                log.warning("slots of schedules were not submitted; the next look follows", error=repr(error))
            await asyncio.sleep(LOOK_EVERY)
