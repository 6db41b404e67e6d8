"""The arq worker: woken through Redis, it claims in Postgres; without Redis it finds its jobs by scanning."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any
from uuid import UUID

import structlog
from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.exceptions import RedisError

from headway import metrics
from headway.groups import Groups
from headway.job import Claim
from headway.lifecycle import Lifecycle
from headway.queue import FUNCTION, NAME, Queue, serialize
from headway.store import OUTAGES, Store
from services.worker.lease import LeaseKeeper
from services.worker.runner import Runner

SCAN_EVERY = 0.5
RESCUE_EVERY = 2.0
UNPARK_EVERY = 2.0
COUNT_EVERY = 5.0
# Ids are taken of one lot while another is claimed, and a third one's handlers begin and end.
LISTENERS = 2
CLAIMED_AT_ONCE = 50
RESCUED_AT_ONCE = 100
# A delay is met to within this and a statement's time.
PROMOTE_EVERY = 0.05
PROMOTED_AT_ONCE = 500
# How long the endings of a drain may take to be written before what is left is left to a rescue.
END_WITHIN = 15.0
CANCEL_AGAIN = 1.0

log = structlog.get_logger(__name__)


class HeadwayWorker(Worker):
    """arq's worker with its polling loop replaced.

    arq polls twice a second and starts what it read of the queue; here a blocking pop wakes the worker at once, a
    freed slot is filled at once, and what may start is decided by the claim in Postgres.
    """

    def __init__(
        self,
        name: str,
        *,
        slots: int,
        kinds: Sequence[str],
        runner: Runner,
        lifecycle: Lifecycle,
        groups: Groups,
        store: Store,
        queue: Queue,
        keeper: LeaseKeeper,
        beside: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    ) -> None:
        async def run(ctx: dict[str, Any], job_id: str) -> None:
            """What a wake-up calls, in arq's terms."""
            await self.start_jobs([job_id.encode()])

        super().__init__(
            [func(run, name=FUNCTION)],
            queue_name=NAME,
            redis_pool=ArqRedis(connection_pool=queue.redis.connection_pool),
            handle_signals=False,
            max_jobs=slots,
            keep_result=0,
            job_serializer=serialize,
            log_results=False,
        )
        self.name = name
        self._kinds = kinds
        self._runner = runner
        self._lifecycle = lifecycle
        self._groups = groups
        self._store = store
        self._queue = queue
        self._keeper = keeper
        self._beside = beside
        self._claiming = asyncio.Lock()
        self._performing = 0
        self._asked = 0
        self._loops: list[asyncio.Task[None]] = []
        self._freed = asyncio.Event()
        self._hinted = False
        self._rescue_at = self._unpark_at = self._count_at = 0.0
        metrics.slots.set(slots)
        metrics.slots_busy.set_function(lambda: self._performing)

    @property
    def free(self) -> int:
        """Slots without a handler. Endings are written beside the next handlers, of as many jobs as there are slots."""
        if not self.allow_pick_jobs:
            return 0
        return min(self.max_jobs - self._performing, 2 * self.max_jobs - len(self.tasks))

    async def main(self) -> None:
        """Listen and scan until drained, and run what is to run `beside`.

        If one of these fails the others end, and an ExceptionGroup of what failed is raised.
        """
        if not self.allow_pick_jobs:
            # Told to stop before it began.
            return
        runs = (*[self._listen] * LISTENERS, self._find, self._look_after, self._tend, self._promote, *self._beside)
        self._loops = [asyncio.create_task(run()) for run in runs]
        try:
            await asyncio.wait(self._loops, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            await self._end_loops()
        if failed := [error for loop in self._loops if not loop.cancelled() and (error := loop.exception())]:
            raise BaseExceptionGroup("loops of the worker failed", failed)

    async def start_jobs(self, job_ids: Sequence[bytes]) -> None:
        """Claim those jobs that are still queued and run them; more than there are slots go back to the queue."""
        await self._claim([UUID(job_id.decode()) for job_id in job_ids])

    async def drain(self, wait: float) -> None:
        """Take no more jobs; let those under way finish for `wait` seconds, then give back the rest."""
        async with self._claiming:
            self.allow_pick_jobs = False
        if self.tasks:
            log.info("draining", jobs=len(self.tasks), wait=wait)
            await asyncio.wait(self.tasks.values(), timeout=wait)
        self._runner.drain()
        if self.tasks:
            await asyncio.wait(self.tasks.values(), timeout=END_WITHIN)
        if self.tasks:
            log.error("jobs could not be given back in time; they will be rescued", jobs=len(self.tasks))
            self._runner.abandon()
        await self._end_loops()

    async def _end_loops(self) -> None:
        while running := [loop for loop in self._loops if not loop.done()]:
            for loop in running:
                loop.cancel()
            # A cancel may be lost in a library that the loop waits in; then it is sent again.
            await asyncio.wait(running, timeout=CANCEL_AGAIN)

    async def _listen(self) -> None:
        """Take ids from Redis as they come, as many as slots are free and no other listener has ids for."""
        while True:
            while (asked := min(self.free - self._asked, CLAIMED_AT_ONCE)) <= 0:
                self._freed.clear()
                await self._freed.wait()
                # Handlers that end in the same turn of the loop free their slots for the same claim.
                await asyncio.sleep(0)
            self._asked += asked
            try:
                ids = await self._take(asked)
                self._give_back(asked - len(ids))
                asked = len(ids)
                await self._claim(ids)
            except OUTAGES as error:
                log.warning("jobs were not claimed; a scan finds them", error=repr(error))
            finally:
                self._give_back(asked)

    async def _take(self, count: int) -> list[UUID]:
        try:
            ids = await self._queue.take(count, wait=1)
        except (RedisError, OSError) as error:
            self._hinted = False
            log.warning("no wake-ups from Redis; Postgres is scanned", error=repr(error))
            await asyncio.sleep(1)
            return []
        self._hinted = bool(ids)
        return ids

    def _give_back(self, asked: int) -> None:
        """Let another listener ask for ids for these slots."""
        self._asked -= asked
        self._freed.set()

    async def _find(self) -> None:
        """Find in Postgres what Redis did not bring: twice a second, or at every free slot while Redis is silent."""
        more = False
        while True:
            if more and not self._hinted:
                await self._slot()
            else:
                await asyncio.sleep(SCAN_EVERY)
            try:
                if free := self.free:
                    ready = await self._store.ready(self._kinds, free, self.name)
                    more = len(ready) == free
                    await self._claim(ready)
            except OUTAGES as error:
                more = False
                log.warning("a scan failed; the next one follows", error=repr(error))

    async def _look_after(self) -> None:
        """See to jobs that are to be cancelled, to workers that died, to the kinds, and to the metrics."""
        while True:
            await asyncio.sleep(SCAN_EVERY)
            try:
                if running := self._runner.running:
                    for job_id, token in await self._store.cancel_requested(running):
                        self._runner.cancel(job_id, token)
                if time.monotonic() >= self._rescue_at:
                    while await self._lifecycle.rescue(RESCUED_AT_ONCE) == RESCUED_AT_ONCE:
                        pass
                    await self._release_unheld()
                    self._rescue_at = time.monotonic() + RESCUE_EVERY
                if time.monotonic() >= self._count_at:
                    await self._count()
                    await self._store.tend_kinds(self._kinds)
                    self._count_at = time.monotonic() + COUNT_EVERY
            except OUTAGES as error:
                log.warning("a look at the jobs failed; the next one follows", error=repr(error))

    async def _tend(self) -> None:
        """See to parents and children, and to what stands aside for a concurrency key: apart, for there may be many."""
        while True:
            await asyncio.sleep(SCAN_EVERY)
            try:
                await self._groups.tend()
                if time.monotonic() >= self._unpark_at:
                    await self._lifecycle.unpark()
                    self._unpark_at = time.monotonic() + UNPARK_EVERY
            except OUTAGES as error:
                log.warning("groups and concurrency keys were not looked at; the next look follows", error=repr(error))

    async def _promote(self) -> None:
        """Queue scheduled jobs as they become due, on the database's clock."""
        while True:
            try:
                while await self._lifecycle.promote(PROMOTED_AT_ONCE) == PROMOTED_AT_ONCE:
                    pass
            except OUTAGES as error:
                log.warning("scheduled jobs were not queued; the next look follows", error=repr(error))
            await asyncio.sleep(PROMOTE_EVERY)

    async def _slot(self) -> None:
        """Wait for a free slot."""
        while not self.free:
            self._freed.clear()
            await self._freed.wait()

    async def _claim(self, ids: Sequence[UUID]) -> None:
        async with self._claiming:
            taken, left = ids[: self.free], ids[self.free :]
            for job_id in left:
                self._queue.wake(job_id, 0)
            if not taken:
                return
            sent_at = time.monotonic()
            with self._keeper.claiming(self.name, sent_at):
                claims = await self._lifecycle.claim(taken, self._kinds, self.name)
                # What cannot be held any more _release_unheld gives back.
                begun = [claim for claim in claims if self._keeper.hold(claim, sent_at)]
            for claim in begun:
                self._performing += 1
                task = asyncio.create_task(self._runner.run(claim, self._performed))
                self.tasks[_key(claim)] = task
                task.add_done_callback(partial(self._ended, claim))

    async def _release_unheld(self) -> None:
        """Give back jobs that were claimed in this worker's name though the answer was lost."""
        async with self._claiming:
            held = [(UUID(job_id), int(token)) for job_id, token in (key.split(":") for key in self.tasks)]
            if released := await self._lifecycle.release_unheld(self.name, held):
                log.warning("jobs were given back whose claim was not answered", jobs=released)

    def _performed(self) -> None:
        self._performing -= 1
        self._freed.set()

    def _ended(self, claim: Claim, _: asyncio.Task[None]) -> None:
        self._keeper.drop(claim)
        del self.tasks[_key(claim)]
        self._freed.set()

    async def _count(self) -> None:
        counts, oldest = await self._store.open_jobs()
        for state in ("scheduled", "queued", "running"):
            metrics.jobs_open.labels(state).set(counts.get(state, 0))
        metrics.oldest_ready_age.set(oldest)


def _key(claim: Claim) -> str:
    """arq's name of a task. A job may run here twice at a time, while an attempt that lost its lease cleans up."""
    return f"{claim.job_id}:{claim.token}"
