"""Holding on to running jobs: a thread with a loop and a connection of its own renews their leases.

A handler that blocks the worker's loop therefore keeps its job, and so do the jobs of a claim whose answer the loop has
not read. Where a lease cannot be renewed in time the attempt is told to stop before the lease ends, by this process's
clock, which can only be early.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from uuid import UUID

import asyncpg
import structlog

from headway import metrics
from headway.job import Claim
from headway.lifecycle import LEASE
from headway.store import OUTAGES, sql

# Shares of a lease: how often it is renewed, how soon again after a failure, and what must be left of it.
RENEW_EVERY = 1 / 3
RETRY_EVERY = 1 / 15
MARGIN = 2 / 15
# How long a claim may go unanswered before what it has got is renewed as well.
ANSWERED_WITHIN = 1 / 5
LOOK_EVERY = 0.2

log = structlog.get_logger(__name__)


class LeaseKeeper(threading.Thread):
    """Renews what is held. `lost` is called from this thread with the job and the token that are no longer ours."""

    def __init__(self, url: str, lost: Callable[[UUID, int], None], *, lease: timedelta = LEASE) -> None:
        super().__init__(name="leases", daemon=True)
        self._url = url
        self._lost = lost
        self._lease = lease
        self._ends: dict[tuple[UUID, int], float] = {}
        # Who claims, since when, and the ends of leases that were renewed meanwhile.
        self._claiming: tuple[str, float] | None = None
        self._claimed: dict[tuple[UUID, int], float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._connection: asyncpg.Connection | None = None

    @contextmanager
    def claiming(self, worker: str, sent_at: float) -> Iterator[None]:
        """While the answer to a claim for `worker` is awaited: renew what it has got, should the answer take long."""
        with self._lock:
            self._claiming = worker, sent_at
        try:
            yield
        finally:
            with self._lock:
                self._claiming = None
                self._claimed.clear()

    def hold(self, claim: Claim, claimed_at: float) -> bool:
        """Keep a job that was claimed by a statement sent at `claimed_at` (monotonic).

        False if its lease is as good as over, so that it must not be begun.
        """
        key = claim.job_id, claim.token
        with self._lock:
            ends = self._claimed.get(key, claimed_at + self._lease.total_seconds())
            if self._is_late(ends):
                return False
            self._ends[key] = ends
        return True

    def drop(self, claim: Claim) -> None:
        """Let a job go that has ended."""
        with self._lock:
            self._ends.pop((claim.job_id, claim.token), None)

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        asyncio.run(self._keep())

    async def _keep(self) -> None:
        renewing = asyncio.create_task(self._renew_for_ever())
        while not self._stopping.is_set():
            self._give_up_late()
            await asyncio.sleep(LOOK_EVERY)
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
        if self._connection is not None:
            with suppress(*OUTAGES):
                await self._connection.close(timeout=1)

    async def _renew_for_ever(self) -> None:
        while True:
            try:
                await self._renew()
            except Exception as error:
                outage = isinstance(error, OUTAGES)
                (metrics.database_failures if outage else metrics.errors_caught.labels("lease")).inc()
                log.warning("leases were not renewed", error=repr(error), exc_info=not outage)
                if self._connection is not None:
                    self._connection.terminate()
                    self._connection = None
                await asyncio.sleep(self._lease.total_seconds() * RETRY_EVERY)
            else:
                await asyncio.sleep(self._lease.total_seconds() * RENEW_EVERY)

    async def _renew(self) -> None:
        sent_at = time.monotonic()
        with self._lock:
            held, claiming = list(self._ends), self._claiming
        worker = None
        if claiming is not None and sent_at - claiming[1] > self._lease.total_seconds() * ANSWERED_WITHIN:
            worker = claiming[0]
        if not held and worker is None:
            return
        async with asyncio.timeout(3):
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self._url, timeout=3)
            ids, tokens = [key[0] for key in held], [key[1] for key in held]
            rows = await self._connection.fetch(sql.RENEW, ids, tokens, self._lease)
            claimed = await self._connection.fetch(sql.RENEW_CLAIMED, worker, ids, self._lease) if worker else []
        ends = sent_at + self._lease.total_seconds()
        renewed = {(row["id"], row["token"]) for row in rows}
        with self._lock:
            for key in renewed & self._ends.keys():
                self._ends[key] = ends
            if self._claiming == claiming:
                self._claimed |= {(row["id"], row["token"]): ends for row in claimed}
        for key in set(held) - renewed:
            self._let_go(key)

    def _give_up_late(self) -> None:
        with self._lock:
            late = [key for key, ends in self._ends.items() if self._is_late(ends)]
        for key in late:
            self._let_go(key)

    def _is_late(self, ends: float) -> bool:
        return time.monotonic() > ends - self._lease.total_seconds() * MARGIN

    def _let_go(self, key: tuple[UUID, int]) -> None:
        with self._lock:
            held = self._ends.pop(key, None)
        if held is not None:
            self._lost(*key)
