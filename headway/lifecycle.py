"""The one place that changes a job's state: submit, promote, claim, report, finish, release, rescue, cancel.

Each change is committed first and announced after. A write of a running job names the attempt's token; if it matches
no row the attempt is over, and LeaseLost says so.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
from uuid_utils.compat import uuid7

from headway import metrics
from headway.errors import Crashed, JobError, KeyReused, LeaseLost, NotFound
from headway.events import Events
from headway.job import Artifact, Claim, Event, Job, Priority
from headway.queue import Queue
from headway.states import JobState
from headway.store import Store
from headway.store.batch import Batch

LEASE = timedelta(seconds=15)
MOST_CRASHES = 3
MESSAGE = 2000


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client asks for, already checked. `run_at` is RFC 3339, `delay` and `timeout` are seconds."""

    tenant_id: UUID
    kind: str
    input: Any
    tags: Sequence[str]
    priority: Priority
    timeout: float
    max_attempts: int
    run_at: str | None = None
    delay: float | None = None
    idempotency_key: str | None = None

    def digest(self) -> str:
        """What tells this request from another one that comes with the same idempotency key."""
        asked = {name: getattr(self, name) for name in self.__slots__ if name not in ("tenant_id", "idempotency_key")}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended. `failure` is what is kept of it beside the error that the job's owner sees first."""

    claim: Claim
    state: JobState
    result: Any = None
    error: JobError | None = None
    failure: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    artifacts: Sequence[Artifact] = ()
    delay: float | None = None


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

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Accept a job: it is committed when this returns. False if the key's job was there already.

        Raises KeyReused if the idempotency key belongs to another request.
        """
        digest = new.digest() if new.idempotency_key else None
        job, position, first = await self._submit(
            {
                "id": str(uuid7()),
                "tenant_id": str(new.tenant_id),
                "kind": new.kind,
                "input": new.input,
                "tags": list(new.tags),
                "priority": new.priority.value,
                "timeout": new.timeout,
                "max_attempts": new.max_attempts,
                "run_at": new.run_at,
                "delay": new.delay,
                "idempotency_key": new.idempotency_key,
                "digest": digest,
            }
        )
        if first is not None:
            if first != digest:
                raise KeyReused("This Idempotency-Key came with another request before; use a new key for a new job.")
            return job, False
        metrics.jobs_submitted.labels(new.kind).inc()
        if job.state is JobState.QUEUED:
            self._queue.wake(job.id, position)
        return job, True

    async def promote(self, limit: int) -> int:
        """Queue scheduled jobs that are due; how many there were."""
        promoted = await self._store.promote(limit)
        for event, position in promoted:
            self._queue.wake(event.job_id, position)
            self._events.publish(event)
        return len(promoted)

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
        """End the attempt: state, result, error and artifacts become visible together. Raises LeaseLost.

        With state `scheduled` the job is run again after `delay` seconds.
        """
        self._announce(
            ending.claim,
            await self._finish(
                {
                    "id": str(ending.claim.job_id),
                    "token": ending.claim.token,
                    "state": ending.state.value,
                    "result": ending.result,
                    "error": ending.error.as_json() if ending.error else None,
                    "failure": ending.failure,
                    "delay": ending.delay,
                    "progress": ending.progress,
                    "artifacts": [asdict(artifact) for artifact in ending.artifacts],
                }
            ),
        )
        if ending.state.terminal:
            metrics.jobs_finished.labels(ending.claim.kind, ending.state.value).inc()
        else:
            metrics.retried.labels(ending.claim.kind).inc()

    async def release(self, claim: Claim) -> None:
        """Give a job back that was interrupted; the attempt does not count. Raises LeaseLost."""
        released = await self._store.release(claim)
        self._announce(claim, released and released[0])
        metrics.interrupted.labels(claim.kind).inc()
        if released:
            self._queue.wake(claim.job_id, released[1])

    async def rescue(self, limit: int) -> int:
        """Take back jobs of workers that died; how many there were."""
        crashed = Crashed(f"The worker died {MOST_CRASHES} times while it ran this job; its log says why.")
        rescued = await self._store.rescue(MOST_CRASHES, crashed, limit)
        for kind, event, position in rescued:
            state = JobState(event.data["state"])
            metrics.rescued.labels(state.value).inc()
            if state.terminal:
                metrics.jobs_finished.labels(kind, state.value).inc()
            else:
                self._queue.wake(event.job_id, position)
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
