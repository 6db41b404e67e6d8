"""`/jobs`: read, cancel, retry."""

import base64
import time
from typing import Literal
from uuid import UUID

from django.http import HttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict, model_validator
from structlog.contextvars import bind_contextvars

from headway.errors import BadRequest, NotFound
from headway.job import Job
from headway.states import JobState
from services.web.api import schemas
from services.web.api.answers import answer, not_modified
from services.web.api.request import ApiRequest
from services.web.live.waits import LONGEST

# Jobs that a bulk request changes in one transaction, and the seconds after which it leaves the rest to the next one.
BULK = 500
BULK_TIME = 20.0

router = Router(tags=["jobs"])


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


@router.get("", summary="List jobs, newest first", response=schemas.Jobs)
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


@router.get(
    "/{uuid:job_id}",
    summary="One job",
    response=schemas.Job,
    openapi_extra=schemas.headers(schemas.IF_NONE_MATCH),
)
async def get_job(request: ApiRequest, job_id: UUID, held: Query[Wait]) -> HttpResponse:
    """The job as it is now; with `wait=N` as it is once it has ended, or after N seconds, 60 at most.

    `ETag` changes with every event; with `If-None-Match` the answer may be 304.
    """
    request.only(Wait)
    job = await end(request, job_id, held.wait) if held.wait else await _job(request, job_id)
    if job is None:
        raise _no_job(job_id)
    etag = f'"{job.epoch}-{job.seq}"'
    if known(request, etag):
        return not_modified({"ETag": etag})
    return answer(job.as_json(), headers={"ETag": etag})


@router.post("/{uuid:job_id}/cancel", summary="Cancel a job", response={200: schemas.Job, 202: schemas.Job})
async def cancel(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """202 while a running job is being stopped; 200 with the job as it ended if it is over."""
    request.only()
    job = await request.app.lifecycle.cancel(job_id, request.auth.tenant_id)
    return answer(job.as_json(), 200 if job.state.terminal else 202)


@router.post("/{uuid:job_id}/retry", summary="Run an ended job again", response={200: schemas.Job, 202: schemas.Job})
async def retry(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """202 with a new job of the same kind and input, whose `retry_of` is this one; 200 if it is there already.

    The old job stays as it ended. While it is open the answer is 409.
    """
    request.only()
    job, created = await request.app.lifecycle.retry(job_id, request.auth.tenant_id)
    bind_contextvars(job_id=str(job.id))
    return answer(job.as_json(), 202 if created else 200, {"Location": f"/api/v1/jobs/{job.id}"})


@router.post("/bulk", summary="Cancel or retry all jobs that match", response=schemas.Changed)
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


@router.get("/{uuid:job_id}/failures", summary="Why attempts of a job failed", response=schemas.Failures, by_alias=True)
async def list_failures(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """One for each attempt that failed, oldest first: type, message, and for exceptions class and traceback."""
    request.only()
    await find_job(request, job_id)
    return answer({"failures": await request.app.store.failures(job_id, request.auth.tenant_id)})


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


async def end(request: ApiRequest, job_id: UUID, seconds: float) -> Job | None:
    """The job once it has ended, or as it is after so many seconds. Raises Disconnected once nobody waits any more."""
    return await request.unless_left(request.app.waits.ended(job_id, request.auth.tenant_id, seconds))


def cursor_of(last: UUID) -> str:
    """The cursor of the page after the one that ends with this id."""
    return base64.urlsafe_b64encode(last.bytes).decode().rstrip("=")


def id_before(cursor: str) -> UUID:
    """The id before which the page of a cursor begins. Raises BadRequest."""
    try:
        return UUID(bytes=base64.urlsafe_b64decode(cursor + "=="))
    except ValueError:
        raise BadRequest("The cursor was not issued here; send `next_cursor` of the page before.") from None
