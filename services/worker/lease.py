"""Holding on to running jobs: a thread with a loop and a connection of its own renews their leases.

A handler that blocks the worker's loop therefore keeps its job. Where a lease cannot be renewed in time the attempt is
told to stop before the lease ends, by this process's clock, which can only be early.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import asyncpg
import structlog

from headway.job import Claim
from headway.lifecycle import LEASE
from headway.store import OUTAGES, sql

RENEW_EVERY = LEASE.total_seconds() / 3
# Stop this long before the lease ends.
MARGIN = 2.0

log = structlog.get_logger(__name__)


class LeaseKeeper(threading.Thread):
    """Renews what is held. `lost` is called from this thread with the id of a job that is no longer ours."""

    def __init__(self, url: str, lost: Callable[[UUID], None]) -> None:
        super().__init__(name="leases", daemon=True)
        self._url = url
        self._lost = lost
        self._held: dict[UUID, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._connection: asyncpg.Connection | None = None

    def hold(self, claim: Claim, claimed_at: float) -> None:
        """Keep a job that was claimed by a statement sent at `claimed_at` (monotonic)."""
        with self._lock:
            self._held[claim.job_id] = (claim.token, claimed_at + LEASE.total_seconds())

    def drop(self, job_id: UUID) -> None:
        with self._lock:
            self._held.pop(job_id, None)

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        asyncio.run(self._renew_for_ever())

    async def _renew_for_ever(self) -> None:
        next_renewal = time.monotonic()
        while not self._stopping.is_set():
            if time.monotonic() >= next_renewal:
                next_renewal = time.monotonic() + (RENEW_EVERY if await self._renew() else 1.0)
            self._give_up_late()
            await asyncio.sleep(0.2)
        if self._connection is not None:
            with suppress(*OUTAGES):
                await self._connection.close(timeout=1)

    async def _renew(self) -> bool:
        """Renew all; whether Postgres answered."""
        with self._lock:
            held = {job_id: token for job_id, (token, _) in self._held.items()}
        if not held:
            return True
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(3):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await asyncpg.connect(self._url, timeout=3)
                rows = await self._connection.fetch(sql.RENEW, list(held), list(held.values()), LEASE)
        except OUTAGES as error:
            log.warning("leases were not renewed", jobs=len(held), error=repr(error))
            if self._connection is not None:
                self._connection.terminate()
                self._connection = None
            return False
        renewed = {row["id"] for row in rows}
        with self._lock:
            for job_id, token in held.items():
                if self._held.get(job_id, (None,))[0] == token and job_id in renewed:
                    self._held[job_id] = (token, sent_at + LEASE.total_seconds())
        for job_id in held.keys() - renewed:
            self._let_go(job_id)
        return True

    def _give_up_late(self) -> None:
        with self._lock:
            late = [job_id for job_id, (_, ends) in self._held.items() if time.monotonic() > ends - MARGIN]
        for job_id in late:
            self._let_go(job_id)

    def _let_go(self, job_id: UUID) -> None:
        with self._lock:
            held = self._held.pop(job_id, None)
        if held is not None:
            log.warning("a lease was lost", job_id=str(job_id), token=held[0])
            self._lost(job_id)
