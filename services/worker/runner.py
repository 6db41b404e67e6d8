"""One attempt, from claim to finish: perform it, see how it ended, write that down."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from uuid import UUID

import structlog

from headway import metrics
from headway.errors import (
    JOB_ERRORS,
    Fatal,
    HandlerFailed,
    InputRefused,
    JobError,
    LeaseLost,
    Retry,
    TimedOut,
    innermost,
)
from headway.job import Artifact, Claim, Ending
from headway.kinds import Kind
from headway.lifecycle import kept
from headway.startup import Dependency
from headway.states import JobState
from headway.store import OUTAGES, REFUSALS
from services.worker import process
from services.worker.context import Context, Parts
from services.worker.handling import Failed, as_job_error, handle, text

# How long a handler that was interrupted may take to clean up before it is left to itself.
GRACE = 10.0

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a handler ended, before it is written down."""

    state: JobState
    result: Any = None
    error: JobError | None = None


class Attempt:
    """A handler under way. `reason` says why it was interrupted: cancelled, timed-out, drained, waiting or lost."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stirred: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def perform(self, handling: Coroutine[Any, Any, Any], seconds: float) -> "asyncio.Task[Any]":
        """The handler's task: done, or left behind if it did not end though it was interrupted."""
        task = self._task = asyncio.create_task(handling)
        task.add_done_callback(lambda _: self._stir())
        timer = asyncio.get_running_loop().call_later(seconds, self.interrupt, "timed-out")
        try:
            await self._stirred
        finally:
            timer.cancel()
        if not task.done():
            await asyncio.wait({task}, timeout=GRACE)
        return task

    def interrupt(self, reason: str) -> bool:
        """Cancel the handler; whether that came in time.

        The first reason stays, but losing the lease outweighs it, for then nothing may be written.
        """
        if self._task is None or self._task.done():
            return False
        if self.reason == "lost" or (self.reason is not None and reason != "lost"):
            return False
        if self.reason is None:
            self._task.cancel()
        self.reason = reason
        self._stir()
        return True

    def _stir(self) -> None:
        if not self._stirred.done():
            self._stirred.set_result(None)


class Runner:
    """Runs claims and remembers which are under way."""

    def __init__(self, kinds: Mapping[str, Kind], parts: Parts, opened: Mapping[Dependency, Any]) -> None:
        self._kinds = kinds
        self._parts = parts
        self._opened = opened
        self._attempts: dict[tuple[UUID, int], Attempt] = {}
        self._left_behind: set[asyncio.Task[Any]] = set()
        self._abandoned = False

    @property
    def running(self) -> list[UUID]:
        """The jobs with an attempt under way."""
        return [job_id for job_id, _ in self._attempts]

    def cancel(self, job_id: UUID, token: int) -> None:
        """Stop an attempt whose job is to be cancelled, if it is under way here."""
        if attempt := self._attempts.get((job_id, token)):
            attempt.interrupt("cancelled")

    def lose(self, job_id: UUID, token: int) -> None:
        """Stop an attempt whose lease cannot be held: it may write nothing more."""
        attempt = self._attempts.get((job_id, token))
        if attempt is not None and attempt.interrupt("lost"):
            metrics.lease_lost.inc()

    def drain(self) -> None:
        """Stop all attempts; their jobs go back to the queue."""
        for attempt in self._attempts.values():
            attempt.interrupt("drained")

    def abandon(self) -> None:
        """Write no ending again that an outage of the database has kept from being written."""
        self._abandoned = True

    async def run(self, claim: Claim, performed: Callable[[], None]) -> None:
        """Perform the attempt, and write how it ended; call `performed` once the handler is gone. Raises nothing."""
        key = claim.job_id, claim.token
        attempt = self._attempts[key] = Attempt()
        context = Context(claim, self._parts, attempt)
        began = time.monotonic()
        # The worker runs each claim in a task, and so in a context, of its own.
        structlog.contextvars.bind_contextvars(
            job_id=str(claim.job_id), kind=claim.kind, attempt=claim.attempt, token=claim.token
        )
        try:
            outcome = await self._perform(claim, attempt, context, performed)
            progress = await context.close()
            metrics.series(metrics.run_time, claim.kind).observe(time.monotonic() - began)
            await self._end(claim, attempt, outcome, progress, context)
        except LeaseLost as error:
            log.warning("the lease was lost; nothing was written", error=str(error))
            await self._delete(context.artifacts)
        except Exception:
            metrics.errors_caught.labels("attempt").inc()
            log.exception("an attempt could not be ended; its lease will run out")
        finally:
            del self._attempts[key]

    async def _perform(
        self, claim: Claim, attempt: Attempt, context: Context, performed: Callable[[], None]
    ) -> Outcome | None:
        """How the attempt ended; None if it was drained or lost.

        A handler that returns a result although it was interrupted has finished: the interruption came too late.
        """
        task = await attempt.perform(self._handle(claim, context), claim.timeout)
        if not task.done():
            log.error("a handler does not end though it was cancelled; it keeps its slot", reason=attempt.reason)
            self._left_behind.add(task)
            task.add_done_callback(self._came_late)
            task.add_done_callback(lambda _: performed())
            return _interrupted(attempt.reason, claim)
        performed()
        error = asyncio.CancelledError() if task.cancelled() else innermost(task.exception())
        if isinstance(error, LeaseLost):
            attempt.reason = "lost"
        if attempt.reason == "lost":
            return None
        if error is None:
            return Outcome(JobState.SUCCEEDED, result=task.result())
        if attempt.reason is not None:
            return _interrupted(attempt.reason, claim)
        if isinstance(error, JOB_ERRORS):
            return Outcome(JobState.FAILED, error=error)
        log.error("a handler failed", exc_info=error)
        return Outcome(JobState.FAILED, error=as_job_error(error))

    def _came_late(self, task: asyncio.Task[Any]) -> None:
        self._left_behind.discard(task)
        error = None if task.cancelled() else task.exception()
        log.info("a handler that was left behind has ended", error=error and repr(error))

    async def _handle(self, claim: Claim, context: Context) -> Any:
        """The handler's result as JSON values."""
        kind, settings = self._kinds[claim.kind], self._parts.settings
        if kind.runs == "process":
            return await process.handle(kind, claim, context, settings)
        return await handle(kind, context, claim.input, settings.max_result, self._opened)

    async def _end(
        self,
        claim: Claim,
        attempt: Attempt,
        outcome: Outcome | None,
        progress: Mapping[str, Any] | None,
        context: Context,
    ) -> None:
        """Write the outcome. Artifacts are kept of a success and of a Fatal; other endings leave none.

        A failure becomes another attempt if the error permits it and one is left.
        """
        artifacts = context.artifacts
        if outcome is None:
            await self._delete(artifacts)
            if attempt.reason == "waiting":
                await self._insist(lambda: self._parts.groups.wait(claim, context.asked))
                log.info("a job waits for its children", children=context.asked)
            elif attempt.reason == "drained":
                await self._insist(lambda: self._parts.lifecycle.release(claim))
                log.info("a job was given back")
            else:
                log.warning("an attempt was stopped: its lease was lost")
            return
        error = failure = delay = None
        if outcome.error is not None:
            error = {"type": outcome.error.slug, "message": kept(text(outcome.error))}
            failure = {**error, **outcome.error.trace} if isinstance(outcome.error, Failed) else error
            delay = self._delay(claim, outcome.error)
        keep = outcome.state == JobState.SUCCEEDED or isinstance(outcome.error, Fatal)
        ending = Ending(
            claim,
            outcome.state if delay is None else JobState.SCHEDULED,
            result=outcome.result,
            error=error,
            failure=failure,
            delay=delay,
            progress=progress,
            artifacts=artifacts if keep else (),
        )
        try:
            state = await self._insist(lambda: self._parts.lifecycle.finish(ending))
        except REFUSALS as refusal:
            log.warning("Postgres refuses the result", error=repr(refusal))
            detail = getattr(refusal, "detail", None) or ""
            error = HandlerFailed(kept(f"Postgres cannot keep the result: {refusal}. {detail}")).as_json()
            # What is refused may be the progress.
            keep, ending = False, Ending(claim, JobState.FAILED, error=error, failure=error)
            state = await self._insist(lambda: self._parts.lifecycle.finish(ending))
        log.info("an attempt ended", state=state.value, error=error and error["type"])
        if not keep:
            await self._delete(artifacts)
        if state.terminal:
            await self._forget(context)

    def _delay(self, claim: Claim, error: JobError) -> float | None:
        """Seconds until the next attempt; None if there is to be none."""
        if isinstance(error, Fatal | InputRefused) or claim.attempt >= claim.max_attempts:
            return None
        return error.after if isinstance(error, Retry) else self._kinds[claim.kind].backoff(claim.attempt)

    async def _insist(self, write: Callable[[], Awaitable[T]]) -> T:
        """Write, also over an outage of the database: until it is there, or someone else has the job."""
        wait = 0.2
        while True:
            try:
                return await write()
            except OUTAGES as error:
                if self._abandoned:
                    raise
                log.warning("the ending was not written; trying again", error=repr(error), wait=wait)
            await asyncio.sleep(wait)
            wait = min(wait * 2, 2.0)

    async def _delete(self, artifacts: Sequence[Artifact]) -> None:
        try:
            await self._parts.files.delete([artifact.key for artifact in artifacts])
        except Exception:
            metrics.errors_caught.labels("files").inc()
            log.exception("artifacts that nobody will see were not deleted")

    async def _forget(self, context: Context) -> None:
        try:
            await context.forget_parts()
        except Exception:
            metrics.errors_caught.labels("files").inc()
            log.exception("what the job's attempts have left was not deleted")


def _interrupted(reason: str | None, claim: Claim) -> Outcome | None:
    if reason == "cancelled":
        return Outcome(JobState.CANCELLED)
    if reason == "timed-out":
        return Outcome(
            JobState.FAILED, error=TimedOut(f"The attempt ran longer than its timeout, {claim.timeout:g} s.")
        )
    return None
