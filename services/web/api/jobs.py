"""`/jobs`: submit, read, cancel, retry."""

import base64
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from django.http import HttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import AwareDatetime, BeforeValidator, ConfigDict, model_validator
from structlog.contextvars import bind_contextvars

from headway.errors import BadRequest, InvalidRequest, NotFound
from headway.job import (
    DEFAULTED,
    LONGEST_KEY,
    LONGEST_TAG,
    LONGEST_TIMEOUT,
    MOST_ATTEMPTS,
    MOST_PLACES,
    MOST_TAGS,
    Job,
    Priority,
    timestamp,
)
from headway.states import JobState
from headway.submission import NewJob
from services.web.api.answers import answer, not_modified
from services.web.api.request import ApiRequest
from services.web.live.waits import LONGEST

FARTHEST = 400 * 86400.0
# A client's clock may be this far off before its run_at counts as past.
CLOCKS = 60.0
# Jobs that a bulk request changes in one transaction, and the seconds after which it leaves the rest to the next one.
BULK = 500
BULK_TIME = 20.0
KEY = re.compile(r"[!-~]{1,255}")
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]", re.ASCII)
PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\"?\s*(?:$|[,;])", re.ASCII | re.IGNORECASE)

router = Router(tags=["jobs"])


def _written(moment: Any) -> Any:
    if not (isinstance(moment, str) and RFC_3339.match(moment)):
        # A number would be taken for seconds or for milliseconds since 1970, whichever fits.
        raise ValueError("send a time with its zone as RFC 3339 has it, such as 2027-01-31T18:00:00Z")
    return moment


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]
Tag = Annotated[str, Field(min_length=1, max_length=LONGEST_TAG)]


class Submission(Schema):
    """A job to be run."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(max_length=200, description="One of `GET /kinds`.", examples=["demo.countdown"])
    input: Any = Field(
        description="What the kind works on; its input_schema says what fits.", examples=[{"seconds": 5}]
    )
    tags: list[Tag] = Field(
        default=[], max_length=MOST_TAGS, description="Words to find the job by.", examples=[["first"]]
    )
    priority: Literal["high", "normal", "low"] = Field(
        default="normal", description="Which of the tenant's jobs go first; low ones wait longer, but not for ever."
    )
    run_at: Moment | None = Field(
        default=None, strict=False, description="When to run it, with a time zone; now if left out."
    )
    delay: float | None = Field(default=None, ge=0, le=FARTHEST, description="Seconds to wait, instead of run_at.")
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=LONGEST_TIMEOUT,
        description="Seconds an attempt may run; the kind's own if left out.",
        examples=[60],
    )
    max_attempts: int | None = Field(
        default=None, ge=1, le=MOST_ATTEMPTS, description="Attempts it may take; the kind's own number if left out."
    )
    concurrency_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=LONGEST_KEY,
        description="Jobs with the same key share `concurrency_limit` places, across all workers.",
    )
    concurrency_limit: int = Field(
        default=1, ge=1, le=MOST_PLACES, description="How many jobs with this job's key may run when it is to start."
    )

    @model_validator(mode="after")
    def _one_time(self) -> "Submission":
        if self.run_at is not None and self.delay is not None:
            raise ValueError("send run_at or delay, not both")
        if self.concurrency_key is None and "concurrency_limit" in self.model_fields_set:
            raise ValueError("concurrency_limit needs a concurrency_key, which says whose limit it is")
        if self.concurrency_key is not None and "\0" in self.concurrency_key:
            raise ValueError("concurrency_key has a NUL character, which cannot be kept; leave it out")
        return self


class Filter(Schema):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    state: JobState | None = None
    kind: str | None = Field(default=None, max_length=200)
    tag: str | None = Field(default=None, max_length=100)
    parent: UUID | None = Field(default=None, description="The children of this job.")
    limit: int = Field(default=50, ge=1, le=500)
    cursor: str | None = Field(default=None, max_length=100, description="`next_cursor` of the page before.")


class Bulk(Schema):
    """What to do with which jobs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    action: Literal["cancel", "retry"]
    state: JobState = Field(strict=False, description="Open to cancel: scheduled, queued, running; ended to retry.")
    kind: str | None = Field(default=None, max_length=200)
    tag: str | None = Field(default=None, max_length=100)
    limit: int = Field(default=10_000, ge=1, le=100_000, description="How many jobs to look at, at most.")
    cursor: str | None = Field(default=None, max_length=100, description="`next_cursor` of the answer before.")

    @model_validator(mode="after")
    def _possible(self) -> "Bulk":
        if self.state.terminal == (self.action == "cancel"):
            there = "scheduled, queued or running" if self.action == "cancel" else "succeeded, failed or cancelled"
            raise ValueError(f"{self.action} needs a state that is {there}")
        return self


class Wait(Schema):
    """How long to hold the answer."""

    model_config = ConfigDict(extra="forbid")

    wait: float = Field(
        default=0, ge=0, description=f"Seconds to hold the answer for the job's end; {LONGEST:.0f} at most count."
    )


@router.post("", summary="Submit a job", response={200: None, 202: None})
async def submit(request: ApiRequest, job: Submission) -> HttpResponse:
    """Answers 202 once the job is committed; `Location` is where to follow it.

    With `Prefer: wait=N` the answer is held for N seconds, 60 at most: 200 with the job if it ends in that time.
    """
    request.only()
    app = request.app
    try:
        kind = (await app.catalog.check(job.kind, job.input)).kind
        _check_time(job)
    except InvalidRequest:
        # Sent again after an outage, its time may have passed, or a release have changed its kind: that makes it no
        # other request.
        if (before := await app.lifecycle.submitted_before(_new(request, job, {}))) is None:
            raise
        return await submitted(request, before, created=False)
    accepted, created = await app.lifecycle.submit(_new(request, job, kind))
    return await submitted(request, accepted, created=created)


@router.get("", summary="List jobs, newest first")
async def list_jobs(request: ApiRequest, wanted: Query[Filter]) -> HttpResponse:
    """A page of jobs, and the cursor of the next page, or null."""
    request.only(Filter)
    jobs = await request.app.store.list_jobs(
        request.auth.tenant_id,
        before=id_before(wanted.cursor) if wanted.cursor else None,
        state=wanted.state,
        kind=wanted.kind,
        tag=wanted.tag,
        parent=wanted.parent,
        limit=wanted.limit + 1,
    )
    page = jobs[: wanted.limit]
    return answer(
        {
            "jobs": [job.as_json() for job in page],
            "next_cursor": cursor_of(page[-1].id) if len(jobs) > len(page) else None,
        }
    )


@router.get("/{uuid:job_id}", summary="One job")
async def get_job(request: ApiRequest, job_id: UUID, held: Query[Wait]) -> HttpResponse:
    """The job as it is now; with `wait=N` as it is once it has ended, or after N seconds, 60 at most.

    `ETag` changes with every event; with `If-None-Match` the answer may be 304.
    """
    request.only(Wait)
    job = await _end(request, job_id, held.wait) if held.wait else await _job(request, job_id)
    if job is None:
        raise _no_job(job_id)
    etag = f'"{job.epoch}-{job.seq}"'
    if known(request, etag):
        return not_modified({"ETag": etag})
    return answer(job.as_json(), headers={"ETag": etag})


@router.post("/{uuid:job_id}/cancel", summary="Cancel a job", response={200: None, 202: None})
async def cancel(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """202 while a running job is being stopped; 200 with the job as it ended if it is over."""
    request.only()
    job = await request.app.lifecycle.cancel(job_id, request.auth.tenant_id)
    return answer(job.as_json(), 200 if job.state.terminal else 202)


@router.post("/{uuid:job_id}/retry", summary="Run an ended job again", response={200: None, 202: None})
async def retry(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """202 with a new job of the same kind and input, whose `retry_of` is this one; 200 if it is there already.

    The old job stays as it ended. While it is open the answer is 409.
    """
    request.only()
    job, created = await request.app.lifecycle.retry(job_id, request.auth.tenant_id)
    bind_contextvars(job_id=str(job.id))
    return answer(job.as_json(), 202 if created else 200, {"Location": f"/api/v1/jobs/{job.id}"})


@router.post("/bulk", summary="Cancel or retry all jobs that match")
async def bulk(request: ApiRequest, wanted: Bulk) -> HttpResponse:
    """Works through the matching jobs, newest first, in small transactions.

    Answers how many matched and how many of these changed: those that had ended, or were retried before, do not. Where
    `next_cursor` is not null there may be more: send the same request with it as `cursor`.
    """
    request.only()
    app, tenant_id = request.app, request.auth.tenant_id
    before = id_before(wanted.cursor) if wanted.cursor else None
    matched = changed = 0
    began = time.monotonic()
    more = True
    while more and matched < wanted.limit and time.monotonic() - began < BULK_TIME:
        size = min(BULK, wanted.limit - matched)
        jobs = await app.store.list_jobs(
            tenant_id, before=before, state=wanted.state, kind=wanted.kind, tag=wanted.tag, limit=size
        )
        if wanted.action == "cancel":
            changed += await app.lifecycle.cancel_many([job.id for job in jobs], tenant_id)
        else:
            changed += await app.lifecycle.retry_many(jobs)
        matched += len(jobs)
        more = len(jobs) == size
        before = jobs[-1].id if jobs else before
    next_cursor = cursor_of(before) if more and before else None
    return answer({"matched": matched, "changed": changed, "next_cursor": next_cursor})


@router.get("/{uuid:job_id}/failures", summary="Why attempts of a job failed")
async def list_failures(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """One for each attempt that failed, oldest first: type, message, and for exceptions class and traceback."""
    request.only()
    await find_job(request, job_id)
    return answer({"failures": await request.app.store.failures(job_id, request.auth.tenant_id)})


def _check_time(job: Submission) -> None:
    """Raises InvalidRequest."""
    if job.run_at is not None and not -CLOCKS <= (job.run_at - datetime.now(UTC)).total_seconds() <= FARTHEST:
        why = "lies more than a minute behind, or more than 400 days ahead; leave it out to run the job at once"
        raise InvalidRequest(f"run_at: {why}.", errors=[{"field": "run_at", "message": why}])


def _new(request: ApiRequest, job: Submission, kind: Mapping[str, Any]) -> NewJob:
    """What is asked for; what the client left out is `kind`'s, or 0 if that does not say it."""
    return NewJob(
        request.auth.tenant_id,
        job.kind,
        job.input,
        job.tags,
        Priority[job.priority.upper()],
        job.timeout or kind.get("timeout", 0),
        job.max_attempts or kind.get("max_attempts", 0),
        run_at=timestamp(job.run_at),
        delay=job.delay,
        concurrency_key=job.concurrency_key,
        concurrency_limit=job.concurrency_limit,
        idempotency_key=idempotency_key(request),
        left_out=[name for name in DEFAULTED if getattr(job, name) is None],
    )


async def submitted(request: ApiRequest, job: Job, *, created: bool) -> HttpResponse:
    """The answer to a submission, held as it prefers, and the job's id in the log line of the request."""
    bind_contextvars(job_id=str(job.id))
    headers = {"Location": f"/api/v1/jobs/{job.id}"}
    if not created:
        headers["Idempotent-Replayed"] = "true"
    if (seconds := _preferred_wait(request)) is not None:
        job = await _end(request, job.id, seconds) or job
        headers["Preference-Applied"] = f"wait={seconds:g}"
    return answer(job.as_json(), 202 if created and not job.state.terminal else 200, headers)


def known(request: ApiRequest, etag: str) -> bool:
    """Whether the client says that it has this version."""
    given = request.headers.get("If-None-Match", "")
    return etag in given or given.strip() == "*"


async def find_job(request: ApiRequest, job_id: UUID) -> Job:
    """The tenant's job, for a request without parameters. Raises NotFound."""
    request.only()
    if (job := await _job(request, job_id)) is None:
        raise _no_job(job_id)
    return job


async def _job(request: ApiRequest, job_id: UUID) -> Job | None:
    return await request.app.store.get(job_id, request.auth.tenant_id)


def _no_job(job_id: UUID) -> NotFound:
    return NotFound(f"There is no job {job_id}.")


async def _end(request: ApiRequest, job_id: UUID, seconds: float) -> Job | None:
    """The job once it has ended, or as it is after so many seconds. Raises Disconnected once nobody waits any more."""
    return await request.unless_left(request.app.waits.ended(job_id, request.auth.tenant_id, seconds))


def _preferred_wait(request: ApiRequest) -> float | None:
    """Seconds of `Prefer: wait=N`; what else a client may prefer is passed over, as RFC 7240 has it."""
    found = PREFER_WAIT.search(request.headers.get("Prefer", ""))
    return min(float(found[1]), LONGEST) if found else None


def idempotency_key(request: ApiRequest) -> str | None:
    """The request's Idempotency-Key, if it has one. Raises BadRequest if that cannot be one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not KEY.fullmatch(key):
        raise BadRequest("An Idempotency-Key has 1 to 255 visible ASCII characters, such as a UUID.")
    return key


def cursor_of(last: UUID) -> str:
    """The cursor of the page after the one that ends with this id."""
    return base64.urlsafe_b64encode(last.bytes).decode().rstrip("=")


def id_before(cursor: str) -> UUID:
    """The id before which the page of a cursor begins. Raises BadRequest."""
    try:
        return UUID(bytes=base64.urlsafe_b64decode(cursor + "=="))
    except ValueError:
        raise BadRequest("The cursor was not issued here; send `next_cursor` of the page before.") from None
