"""The one place that changes a job's state: submit, claim, report, finish, release, rescue, cancel.

Each change is committed first and announced after. A write of a running job names the attempt's token; if it matches
no row the attempt is over, and LeaseLost says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from headway import metrics
from headway.errors import Crashed, JobError, LeaseLost, NotFound
from headway.events import Events
from headway.job import Artifact, Claim, Event, Job
from headway.queue import Queue
from headway.states import JobState
from headway.store import Store
from headway.store.batch import Batch

LEASE = timedelta(seconds=15)
MOST_CRASHES = 3
MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client asks for, already checked."""

    tenant_id: UUID
    kind: str
    input: Any
    tags: Sequence[str]
    timeout: float


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended."""

    claim: Claim
    state: JobState
    result: Any = None
    error: JobError | None = None
    progress: Mapping[str, Any] | None = None
    artifacts: Sequence[Artifact] = ()


class Lifecycle:
    """Moves jobs from state to state in `store`, and tells `queue` and `events`."""

    def __init__(self, store: Store, queue: Queue, events: Events) -> None:
        self._store = store
        self._queue = queue
        self._events = events
        self._submit = Batch(self._store.submit, most=200, faulty=(asyncpg.DataError,))
        self._report = Batch(self._store.report, most=500)
        self._finish = Batch(
            self._store.finish, most=200, faulty=(asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
        )

    async def submit(self, new: NewJob) -> Job:
        """Accept a job: it is committed when this returns."""
        job = await self._submit(
            {
                "id": str(uuid7()),
                "tenant_id": str(new.tenant_id),
                "kind": new.kind,
                "input": new.input,
                "tags": list(new.tags),
                "timeout": new.timeout,
            }
        )
        metrics.jobs_submitted.labels(new.kind).inc()
        self._queue.wake(job.id)
        return job

    async def claim(self, ids: Sequence[UUID], kinds: Sequence[str], worker: str) -> list[Claim]:
        """Take those of `ids` that are still queued. One that is missing from the answer is someone else's."""
        claims = []
        for claim, event, waited in await self._store.claim(ids, kinds, worker, LEASE):
            if claim.token == 1:
                metrics.queue_wait.labels(claim.kind).observe(waited)
            self._events.publish(event)
            claims.append(claim)
        return claims

    async def report(self, claim: Claim, progress: Mapping[str, Any]) -> bool:
        """Write progress; True means that the job is to be cancelled. Raises LeaseLost."""
        written = await self._report((claim, progress))
        if written is None:
            raise self._lost(claim)
        event, cancel_requested = written
        self._events.publish(event)
        return cancel_requested

    async def log(self, claim: Claim, message: str, level: str) -> None:
        """Add a log event; the message is cut at 2,000 characters. Raises LeaseLost."""
        self._announce(claim, await self._store.log(claim, message.replace("\0", "")[:MESSAGE], level))

    async def save_checkpoint(self, claim: Claim, value: Any) -> None:
        """Keep what the next attempt starts from. Raises LeaseLost."""
        if not await self._store.save_checkpoint(claim, value):
            raise self._lost(claim)

    async def finish(self, ending: Ending) -> None:
        """End the job: state, result, error and artifacts become visible together. Raises LeaseLost."""
        self._announce(
            ending.claim,
            await self._finish(
                (ending.claim, ending.state, ending.result, ending.error, ending.progress, ending.artifacts)
            ),
        )
        metrics.jobs_finished.labels(ending.claim.kind, ending.state.value).inc()

    async def release(self, claim: Claim) -> None:
        """Give a job back that was interrupted; the attempt does not count. Raises LeaseLost."""
        self._announce(claim, await self._store.release(claim))
        metrics.interrupted.labels(claim.kind).inc()
        self._queue.wake(claim.job_id)

    async def rescue(self, limit: int) -> int:
        """Take back jobs of workers that died; how many there were."""
        crashed = Crashed(f"The worker died {MOST_CRASHES} times while it ran this job; its log says why.")
        rescued = await self._store.rescue(MOST_CRASHES, crashed, limit)
        for kind, event in rescued:
            state = JobState(event.data["state"])
            metrics.rescued.labels(state.value).inc()
            if state.terminal:
                metrics.jobs_finished.labels(kind, state.value).inc()
            else:
                self._queue.wake(event.job_id)
            self._events.publish(event)
        return len(rescued)

    async def cancel(self, job_id: UUID, tenant_id: UUID) -> Job:
        """The job after the request: cancelled, or running and about to be, or as it ended before. Raises NotFound."""
        changed = await self._store.cancel(job_id, tenant_id)
        if changed is None:
            if (job := await self._store.get(job_id, tenant_id)) is None:
                raise NotFound(f"There is no job {job_id}.")
            return job
        job, event = changed
        if job.state.terminal:
            metrics.jobs_finished.labels(job.kind, job.state.value).inc()
        self._events.publish(event)
        return job

    def _announce(self, claim: Claim, event: Event | None) -> None:
        if event is None:
            raise self._lost(claim)
        self._events.publish(event)

    def _lost(self, claim: Claim) -> LeaseLost:
        metrics.lease_lost.inc()
        return LeaseLost(f"Attempt {claim.attempt} of job {claim.job_id} is over; another worker may have it.")
