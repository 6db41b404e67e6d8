"""One attempt, from claim to finish: check the input, perform, see how it ended, write that down."""

import asyncio
import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from pydantic import ValidationError

from headway import metrics
from headway.errors import Fatal, HandlerFailed, InputRefused, JobError, LeaseLost, Retry, TimedOut
from headway.job import Claim
from headway.kinds import Kind
from headway.lifecycle import MESSAGE, Ending
from headway.states import JobState
from headway.store import OUTAGES
from services.worker.context import Context, Parts

# How long a handler that was interrupted may take to clean up before it is left to itself.
GRACE = 10.0
# How much of a traceback's end is kept.
TRACEBACK = 20_000

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a handler ended, before it is written down."""

    state: JobState
    result: Any = None
    error: JobError | None = None
    failure: Mapping[str, Any] | None = None
    delay: float | None = None


class Attempt:
    """A handler under way. `reason` says why it was interrupted: cancelled, timed-out, drained or lost."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.task: asyncio.Task[Any] | None = None

    def interrupt(self, reason: str) -> None:
        """The first reason stays; losing the lease outweighs it, for then nothing may be written."""
        if self.reason is None or reason == "lost":
            first, self.reason = self.reason is None, reason
            if first and self.task is not None:
                self.task.cancel()


class Runner:
    """Runs claims and remembers which are under way."""

    def __init__(self, kinds: Mapping[str, Kind], parts: Parts) -> None:
        self._kinds = kinds
        self._parts = parts
        self._attempts: dict[UUID, Attempt] = {}

    def interrupt(self, job_id: UUID, reason: str) -> None:
        """Stop one attempt, if it is under way here."""
        if attempt := self._attempts.get(job_id):
            attempt.interrupt(reason)

    def interrupt_all(self, reason: str) -> None:
        for attempt in self._attempts.values():
            attempt.interrupt(reason)

    async def run(self, claim: Claim) -> None:
        """Perform the attempt and write how it ended. Raises nothing."""
        attempt = self._attempts[claim.job_id] = Attempt()
        context = Context(claim, self._parts, attempt.interrupt)
        began = time.monotonic()
        with structlog.contextvars.bound_contextvars(
            job_id=str(claim.job_id), kind=claim.kind, attempt=claim.attempt, token=claim.token
        ):
            try:
                outcome = await self._perform(claim, attempt, context)
                progress = await context.close()
                metrics.run_time.labels(claim.kind).observe(time.monotonic() - began)
                if outcome is None:
                    await self._give_up(claim, attempt, context)
                else:
                    await self._finish(
                        Ending(
                            claim,
                            outcome.state,
                            result=outcome.result,
                            error=outcome.error,
                            failure=outcome.failure,
                            progress=progress,
                            artifacts=context.artifacts,
                            delay=outcome.delay,
                        )
                    )
            except LeaseLost as error:
                log.warning("the lease was lost; nothing was written", error=str(error))
            except Exception:
                log.exception("an attempt could not be ended; its lease will run out")
            finally:
                del self._attempts[claim.job_id]

    async def _perform(self, claim: Claim, attempt: Attempt, context: Context) -> Outcome | None:
        """How the attempt ended; None if it was drained or lost."""
        task = attempt.task = asyncio.create_task(self._handle(claim, context))
        if attempt.reason is not None:
            task.cancel()
        if not (await asyncio.wait({task}, timeout=claim.timeout))[0]:
            attempt.interrupt("timed-out")
        await _await_end(task)
        error = None if not task.done() or task.cancelled() else task.exception()
        if isinstance(error, LeaseLost):
            attempt.reason = "lost"
        if attempt.reason == "lost":
            return None
        if task.done() and not task.cancelled() and error is None:
            return Outcome(JobState.SUCCEEDED, result=task.result())
        if attempt.reason == "cancelled":
            return Outcome(JobState.CANCELLED)
        if attempt.reason == "drained":
            return None
        if attempt.reason == "timed-out":
            error = TimedOut(f"The attempt ran longer than its timeout, {claim.timeout:g} s.")
        return self._failed(claim, error or asyncio.CancelledError())

    def _failed(self, claim: Claim, error: BaseException) -> Outcome:
        """Failed for good, or to be run again: if the error permits it and an attempt is left."""
        failure = {"type": HandlerFailed.slug, "message": _message(error)}
        if isinstance(error, JobError):
            shown, failure = error, {**error.as_json()}
        else:
            log.error("a handler failed", exc_info=error)
            shown = HandlerFailed(failure["message"])
            failure["class"] = f"{type(error).__module__}.{type(error).__qualname__}"
            failure["traceback"] = "".join(traceback.format_exception(error)).replace("\0", "")[-TRACEBACK:]
        if isinstance(shown, Fatal | InputRefused) or claim.attempt >= claim.max_attempts:
            return Outcome(JobState.FAILED, error=shown, failure=failure)
        delay = shown.after if isinstance(shown, Retry) else self._kinds[claim.kind].backoff(claim.attempt)
        return Outcome(JobState.SCHEDULED, error=shown, failure=failure, delay=delay)

    async def _handle(self, claim: Claim, context: Context) -> Any:
        """The handler's result as JSON values."""
        kind = self._kinds[claim.kind]
        try:
            value = kind.input.validate_python(claim.input)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in ("input", *first["loc"]))
            raise InputRefused(f"{where}: {first['msg']}.") from None
        result = kind.result.dump_python(await kind.handler(context, value), mode="json", warnings="error")
        encoded = json.dumps(result, allow_nan=False)
        if len(encoded) > self._parts.settings.max_result:
            raise Fatal(
                f"The result has {len(encoded):,} bytes, over the limit of {self._parts.settings.max_result:,}; "
                "write large results to an artifact."
            )
        if "\\u0000" in encoded:
            raise Fatal("The result holds the character NUL, which cannot be kept.")
        return result

    async def _finish(self, ending: Ending) -> None:
        """Write the ending, also over an outage of the database: until it is there, or someone else has the job."""
        wait = 0.2
        while True:
            try:
                await self._parts.lifecycle.finish(ending)
            except OUTAGES as error:
                log.warning("the ending was not written; trying again", error=repr(error), wait=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, 2.0)
            else:
                log.info("a job ended", state=ending.state.value, error=ending.error and ending.error.slug)
                return

    async def _give_up(self, claim: Claim, attempt: Attempt, context: Context) -> None:
        """Leave nothing of an attempt that does not count; give the job back if it is still ours."""
        await self._parts.files.delete([artifact.key for artifact in context.artifacts])
        if attempt.reason == "drained":
            await self._parts.lifecycle.release(claim)
            log.info("a job was given back")
        else:
            log.warning("an attempt was stopped: its lease was lost")


async def _await_end(task: "asyncio.Task[Any]") -> None:
    """Wait until a handler that was interrupted has cleaned up; one that ignores it is left behind."""
    if not (await asyncio.wait({task}, timeout=GRACE))[0]:
        log.error("a handler does not end though it was cancelled; it is left behind")


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\0", "")[:MESSAGE]
