"""The one place that changes a job's state, from submit to finish, cancel and rescue.

Each change is committed first and announced after, also when its caller has gone away meanwhile. A write of a running
job names the attempt's token; if it matches no row the attempt is over, and LeaseLost says so.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog

from headway import metrics
from headway.errors import Conflict, Crashed, KeyReused, LeaseLost, NotFound
from headway.events import Events
from headway.job import Claim, Ending, Event, Job
from headway.queue import Queue
from headway.states import JobState
from headway.store import OUTAGES, REFUSALS, REUSED, Key, Store, Submitted
from headway.store.batch import Batch
from headway.submission import NewJob, again

LEASE = timedelta(seconds=15)
MOST_CRASHES = 3
# A submit that fails sooner than this is tried once more after a pause; one that waited longer is refused.
SUBMIT_AGAIN = 2.0
SUBMIT_PAUSE = 0.3
MESSAGE = 2000
# Concurrency keys that one statement looks at.
MOST_KEYS = 500
# What all keys come after.
FIRST_KEY: Key = (UUID(int=0), "")

log = structlog.get_logger(__name__)


def kept(text: str) -> str:
    """What is kept of a message: 2,000 characters at most, and none that Postgres cannot hold."""
    return text[:MESSAGE].replace("\0", "").encode(errors="replace").decode()


class Lifecycle:
    """Moves jobs from state to state in `store`, and tells `queue` and `events`. A claim lasts for `lease`."""

    def __init__(self, store: Store, queue: Queue, events: Events, *, lease: timedelta = LEASE) -> None:
        self._store = store
        self._queue = queue
        self._events = events
        self._lease = lease
        self._submit = Batch(self._submit_all, most=200, faulty=REFUSALS)
        self._report = Batch(self._report_all, most=500, faulty=REFUSALS)
        self._finish = Batch(self._finish_all, most=200, faulty=REFUSALS)
        self._freed: set[Key] = set()
        self._looked_at = FIRST_KEY
        self._unparking: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Let parked jobs stand in the queue for which a place was freed."""
        if self._unparking is not None:
            await self._unparking

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Accept a job: it is committed when this returns. False if the key's job was there already.

        Raises KeyReused if the idempotency key belongs to another request.
        """
        job, first = await self._submit(new.as_record())
        if first is not None:
            _check_same(first, new)
        return job, first is None

    async def submit_batch(self, batch: Sequence[NewJob]) -> tuple[list[Job], bool]:
        """Accept jobs together: all are committed when this returns, or none is. False if they were there already.

        Raises KeyReused as `submit` does, or Conflict if some that were there are deleted by now.
        """
        written = await self._insert([new.as_record() for new in batch], together=True)
        self._accepted(written)
        return [job for job, _, _ in written], any(first is None for _, _, first in written)

    async def submitted_before(self, batch: Sequence[NewJob]) -> list[Job] | None:
        """The jobs that this request made before, if it has an idempotency key and did.

        Raises KeyReused as `submit` does.
        """
        if any(new.idempotency_key is None for new in batch):
            return None
        asked = [new.as_record() for new in batch]
        found = await self._store.submitted_before(asked)
        if len(found) < len(batch):
            return None
        jobs = []
        for new, record in zip(batch, asked, strict=True):
            job, _, first = found[UUID(record["id"])]
            if first is not None:
                _check_same(first, new)
            jobs.append(job)
        return jobs

    async def promote(self, limit: int, *, waiting: bool = False) -> int:
        """Queue scheduled jobs that are due, or, `waiting`, whose children have all ended; how many there were."""
        promoted = await self._store.promote(limit, waiting=waiting)
        for event, position, key in promoted:
            self._events.publish(event)
            self._due(event.job_id, position, key)
        return len(promoted)

    async def claim(self, ids: Sequence[UUID], kinds: Sequence[str], worker: str) -> list[Claim]:
        """Take those of `ids` that are still queued. One that is missing from the answer is someone else's."""
        claims = []
        claimed, full = await self._store.claim(ids, kinds, worker, self._lease)
        # A place may have been freed while the jobs were parked.
        self._free(*full)
        for claim, event, waited in claimed:
            if claim.token == 1:
                metrics.series(metrics.queue_wait, claim.kind).observe(waited)
            self._events.publish(event)
            claims.append(claim)
        return claims

    async def report(self, claim: Claim, progress: Mapping[str, Any]) -> bool:
        """Write progress; True means that the job is to be cancelled. Raises LeaseLost."""
        written = await self._report((claim, progress))
        if written is None:
            raise self._lost(claim)
        return written[1]

    async def log(self, claim: Claim, message: str, level: str) -> None:
        """Add a log event; the message is cut at 2,000 characters. Raises LeaseLost."""
        self._announce(claim, await self._store.log(claim, kept(message), level))

    async def save_checkpoint(self, claim: Claim, value: Any) -> None:
        """Keep what the next attempt starts from. Raises LeaseLost."""
        if not await self._store.save_checkpoint(claim, value):
            raise self._lost(claim)

    async def finish(self, ending: Ending) -> JobState:
        """End the attempt: state, result, error and artifacts become visible together. Raises LeaseLost.

        With state `scheduled` the job is run again after `delay` seconds, unless it was to be cancelled; the answer is
        the state that it came to. After an outage it may be called again: an ending that was written, though the answer
        was lost, stands.
        """
        event = await self._finish(ending)
        if event is None:
            event = await self._store.ended_by(ending)
            if event is None:
                raise self._lost(ending.claim)
            self._ended(ending, event)
        return JobState(event.data["state"])

    async def release(self, claim: Claim) -> None:
        """Give a job back that was interrupted; the attempt does not count. Raises LeaseLost.

        A job that was to be cancelled is cancelled.
        """
        released = await self._store.release(claim)
        if not released:
            raise self._lost(claim)
        self._released(released)

    async def release_unheld(self, worker: str, held: Sequence[tuple[UUID, int]]) -> int:
        """Give back what a worker has by claims whose answers it never got; how many jobs that were.

        `held` are the jobs and tokens that it knows of. It must not claim meanwhile.
        """
        released = await self._store.release_unheld(worker, held)
        self._released(released)
        return len(released)

    async def wait(self, claim: Claim, progress: Mapping[str, Any]) -> None:
        """Let a job wait for its children without a slot; the attempt does not count. Raises LeaseLost.

        A job that was to be cancelled is cancelled.
        """
        event = self._announce(claim, await self._store.wait(claim, progress))
        self._free(_key(claim))
        if event.terminal:
            metrics.jobs_finished.labels(claim.kind, event.data["state"]).inc()

    async def tally(self, ids: Sequence[UUID]) -> None:
        """Bring the progress of jobs that wait for their children up to date."""
        for event in await self._store.tally(ids):
            self._events.publish(event)

    async def submit_all(self, jobs: Sequence[NewJob]) -> None:
        """Accept jobs in one statement; those whose idempotency keys are taken are there already.

        Raises LeaseLost for children of an attempt that is over.
        """
        await self._submit_all([new.as_record() for new in jobs])

    async def rescue(self, limit: int) -> int:
        """Take back jobs of workers that died; how many there were."""
        crashed = Crashed(f"The worker died {MOST_CRASHES} times while it ran this job; its log says why.")
        rescued = await self._store.rescue(MOST_CRASHES, crashed, limit)
        for kind, event, position, key in rescued:
            self._free(key)
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
        if changed := await self._cancel_all([job_id], tenant_id):
            return changed[0]
        if (job := await self._store.get(job_id, tenant_id)) is None:
            raise NotFound(f"There is no job {job_id}.")
        return job

    async def cancel_many(self, ids: Sequence[UUID], tenant_id: UUID) -> int:
        """Cancel those of a tenant's jobs that are open; how many that changed."""
        return len(await self._cancel_all(ids, tenant_id))

    async def retry(self, job_id: UUID, tenant_id: UUID) -> tuple[Job, bool]:
        """A new job that does again what an ended one was to do; False if there was one already.

        Raises NotFound, or Conflict while the job is open.
        """
        job = await self._store.get(job_id, tenant_id)
        if job is None:
            raise NotFound(f"There is no job {job_id}.")
        if not job.state.terminal:
            raise Conflict(
                f"The job is {job.state.value}; it can be retried once it has ended. Cancel it to end it now."
            )
        return await self.submit(again(job))

    async def retry_many(self, jobs: Sequence[Job]) -> int:
        """Retry ended jobs; how many were not retried before."""
        written = await self._submit_all([again(job).as_record() for job in jobs])
        return sum(first is None for _, first in written)

    async def unpark(self) -> None:
        """See for the next concurrency keys whether parked jobs may stand in the queue: what an outage cut off."""
        keys = await self._store.keys(self._looked_at, MOST_KEYS)
        self._looked_at = keys[-1] if len(keys) == MOST_KEYS else FIRST_KEY
        self._free(*keys)

    async def _cancel_all(self, ids: Sequence[UUID], tenant_id: UUID) -> list[Job]:
        changed = await self._store.cancel(ids, tenant_id)
        for job, event in changed:
            if job.state.terminal:
                metrics.jobs_finished.labels(job.kind, job.state.value).inc()
                self._free(_key(job))
            self._events.publish(event)
        return [job for job, _ in changed]

    async def _submit_all(self, jobs: Sequence[Mapping[str, Any]]) -> Sequence[tuple[Job, str | None]]:
        written = await self._insert(jobs)
        self._accepted(written)
        return [(job, first) for job, _, first in written]

    def _accepted(self, written: Sequence[Submitted]) -> None:
        for job, position, first in written:
            if first is None:
                metrics.series(metrics.jobs_submitted, job.kind).inc()
                # A worker hears of it before those who only watch.
                if job.state is JobState.QUEUED:
                    self._due(job.id, position, _key(job))
                self._events.submitted(job.tenant_id)

    async def _insert(self, jobs: Sequence[Mapping[str, Any]], *, together: bool = False) -> Sequence[Submitted]:
        """Insert, once more if the connection broke: whether the first try was committed is then known."""
        began = time.monotonic()
        try:
            return await self._store.submit(jobs, together=together)
        except OUTAGES:
            if time.monotonic() - began > SUBMIT_AGAIN:
                raise
        await asyncio.sleep(SUBMIT_PAUSE)
        return await self._store.submit(jobs, together=together)

    async def _report_all(
        self, reports: Sequence[tuple[Claim, Mapping[str, Any]]]
    ) -> Sequence[tuple[Event, bool] | None]:
        written = await self._store.report(reports)
        for answer in written:
            if answer is not None:
                self._events.publish(answer[0])
        return written

    async def _finish_all(self, endings: Sequence[Ending]) -> Sequence[Event | None]:
        written = await self._store.finish(endings)
        for ending, event in zip(endings, written, strict=True):
            if event is not None:
                self._ended(ending, event)
        return written

    def _ended(self, ending: Ending, event: Event) -> None:
        if event.terminal:
            metrics.series(metrics.jobs_finished, ending.claim.kind, event.data["state"]).inc()
        else:
            metrics.retried.labels(ending.claim.kind).inc()
        self._free(_key(ending.claim))
        self._events.publish(event)

    def _due(self, job_id: UUID, position: float, key: Key | None) -> None:
        """Tell a worker of a queued job, or see whether it has to stay parked."""
        if key is None:
            self._queue.wake(job_id, position)
        else:
            self._free(key)

    def _free(self, *keys: Key | None) -> None:
        """Note that a place of these keys may be free. Nobody waits for that; a scan repeats what fails."""
        self._freed.update(key for key in keys if key is not None)
        if self._freed and (self._unparking is None or self._unparking.done()):
            self._unparking = asyncio.create_task(self._unpark())

    async def _unpark(self) -> None:
        while self._freed:
            keys = [self._freed.pop() for _ in range(min(len(self._freed), MOST_KEYS))]
            try:
                for job_id, position in await self._store.unpark(keys):
                    self._queue.wake(job_id, position)
            except OUTAGES as error:
                log.warning("parked jobs were not looked at; a scan does it again", error=repr(error))

    def _released(self, released: Sequence[tuple[str, Event, float, Key | None]]) -> None:
        for kind, event, position, key in released:
            self._events.publish(event)
            metrics.interrupted.labels(kind).inc()
            self._free(key)
            if event.terminal:
                metrics.jobs_finished.labels(kind, event.data["state"]).inc()
            else:
                self._queue.wake(event.job_id, position)

    def _announce(self, claim: Claim, event: Event | None) -> Event:
        if event is None:
            raise self._lost(claim)
        self._events.publish(event)
        return event

    def _lost(self, claim: Claim) -> LeaseLost:
        metrics.lease_lost.inc()
        return LeaseLost(f"Attempt {claim.attempt} of job {claim.job_id} is over; another worker may have it.")


def _check_same(first: str, new: NewJob) -> None:
    if not new.is_request(first):
        raise KeyReused(REUSED)


def _key(job: Job | Claim) -> Key | None:
    return (job.tenant_id, job.concurrency_key) if job.concurrency_key is not None else None
