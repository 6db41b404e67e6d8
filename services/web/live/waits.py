"""Requests that wait for a job's end: woken by the hub, as sessions are. The database is asked seldom."""

import asyncio
from typing import Any
from uuid import UUID

from headway import metrics
from headway.events import group
from headway.job import Job
from headway.store.batch import Batch
from headway.store.live import Found, Wish
from services.web.live.hub import Hub

LONGEST = 60.0
# While there are no live events, Postgres is read this often.
LOOK_EVERY = 2.0
# It is read as often as heartbeats are sent all the same: whoever committed the end may have died before it was told.
READ_EVERY = 15.0


class Waiting:
    """One request that waits."""

    def __init__(self) -> None:
        self.stirred = asyncio.Event()

    def hear(self, news: Any) -> None:
        if news.terminal:
            self.stirred.set()


class Waits:
    """Answers when a job has ended. Those who begin at once share their reads: `find` is a Batch."""

    def __init__(self, find: Batch[Wish, Found | None], hub: Hub) -> None:
        self._find = find
        self._hub = hub
        self._waiting: set[Waiting] = set()
        self._stopping = False
        hub.restored.append(self._stir)

    async def ended(self, job_id: UUID, tenant_id: UUID, seconds: float) -> Job | None:
        """The job once it has ended, or as it is after so many `seconds`, 60 at most; None if the tenant has none."""
        waiting = Waiting()
        self._waiting.add(waiting)
        metrics.http_waits.set(len(self._waiting))
        try:
            async with asyncio.timeout(min(seconds, LONGEST)):
                await self._hub.join((waiting, group(job_id)))
                while (job := await self._read(job_id, tenant_id)) and not (job.state.terminal or self._stopping):
                    await self._heard(waiting)
                return job
        except TimeoutError:
            return await self._read(job_id, tenant_id)
        finally:
            self._waiting.discard(waiting)
            metrics.http_waits.set(len(self._waiting))
            self._hub.leave(waiting, group(job_id))

    def restart(self) -> None:
        """This process ends: answer all with the job as it is."""
        self._stopping = True
        self._stir()

    async def _heard(self, waiting: Waiting) -> None:
        """Wait until the job may have ended."""
        loop = asyncio.get_running_loop()
        due = loop.time() + READ_EVERY
        while not waiting.stirred.is_set():
            try:
                async with asyncio.timeout(LOOK_EVERY):
                    await waiting.stirred.wait()
            except TimeoutError:
                if self._hub.away or loop.time() >= due:
                    return
        waiting.stirred.clear()

    async def _read(self, job_id: UUID, tenant_id: UUID) -> Job | None:
        while (found := await self._find(Wish(job_id, tenant_id, None, None))) and not found.whole:
            # Other jobs filled the answer.
            pass
        return found.job if found else None

    def _stir(self) -> None:
        for waiting in self._waiting:
            waiting.stirred.set()
