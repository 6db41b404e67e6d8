"""Submit jobs: one, or up to a thousand together."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from django.http import HttpResponse
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from structlog.contextvars import bind_contextvars

from headway.errors import BadRequest, InvalidRequest
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
from headway.submission import NewJob
from services.web.api import jobs as reads
from services.web.api import schemas
from services.web.api.answers import MOST_ERRORS, answer
from services.web.api.request import ApiRequest
from services.web.live.waits import LONGEST

FARTHEST = 400 * 86400.0
# A client's clock may be this far off before its run_at counts as past.
CLOCKS = 60.0
MOST_JOBS = 1000
EXAMPLE: JsonDict = {"kind": "demo.countdown", "input": {"seconds": 5}, "tags": ["first"]}
KEY = re.compile(r"[!-~]{1,255}")
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]", re.ASCII)
PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\"?\s*(?:$|[,;])", re.ASCII | re.IGNORECASE)

# django-ninja looks for a path in one router only.
router = reads.router


def _written(moment: Any) -> Any:
    if not (isinstance(moment, str) and RFC_3339.match(moment)):
        # A number would be taken for seconds or for milliseconds since 1970, whichever fits.
        raise ValueError("send a time with its zone as RFC 3339 has it, such as 2027-01-31T18:00:00Z")
    return moment


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]
Tag = Annotated[str, Field(min_length=1, max_length=LONGEST_TAG)]


# django-ninja's Schema looks each field up through a getter of its own: 80 µs a job, as much as all else about it.
class Submission(BaseModel):
    """A job to be run."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]})

    kind: str = Field(max_length=200, description="One of `GET /kinds`.")
    input: Any = Field(description="What the kind works on; its input_schema says what fits.")
    tags: list[Tag] = Field(default=[], max_length=MOST_TAGS, description="Words to find the job by.")
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


class Batch(BaseModel):
    """Jobs that belong together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    jobs: list[Submission] = Field(
        min_length=1, max_length=MOST_JOBS, description="Each as `POST /jobs` takes it; all are accepted, or none."
    )


@router.post(
    "",
    summary="Submit a job",
    response={200: schemas.Job, 202: schemas.Job},
    openapi_extra=schemas.headers(schemas.IDEMPOTENCY_KEY, schemas.PREFER),
)
async def submit(request: ApiRequest, job: Submission) -> HttpResponse:
    """Answers 202 once the job is committed; `Location` is where to follow it.

    With `Prefer: wait=N` the answer is held for N seconds, 60 at most: 200 with the job if it ends in that time.
    """
    request.only()
    app = request.app
    key = idempotency_key(request)
    kind: Mapping[str, Any] = {}
    try:
        kind = (await app.catalog.check(job.kind, job.input)).kind
        _check_time(job)
    except InvalidRequest:
        # Sent again after an outage, its time may have passed, or a release have changed its kind: that makes it no
        # other request.
        if (before := await app.lifecycle.submitted_before([_new(request, job, kind, key)])) is None:
            raise
        return await submitted(request, before[0], created=False)
    accepted, created = await app.lifecycle.submit(_new(request, job, kind, key))
    return await submitted(request, accepted, created=created)


@router.post(
    "/batch",
    summary="Submit jobs together",
    response={200: schemas.JobsTogether, 202: schemas.JobsTogether},
    openapi_extra=schemas.headers(schemas.IDEMPOTENCY_KEY),
)
async def submit_batch(request: ApiRequest, batch: Batch) -> HttpResponse:
    """Accepts up to 1,000 jobs in one transaction: all of them or, if one is refused, none.

    Answers 202 with `jobs` in the order in which they were sent, or 200 if the request came with its Idempotency-Key
    before. An error's field says which job it is of: `jobs.3.input.seconds` is of the fourth.
    """
    request.only()
    app = request.app
    key = idempotency_key(request)
    kinds: list[Mapping[str, Any]] = []
    refusals: list[InvalidRequest] = []
    for number, job in enumerate(batch.jobs):
        try:
            kind = (await app.catalog.check(job.kind, job.input)).kind
            _check_time(job)
            kinds.append(kind)
        except InvalidRequest as refusal:
            refusals.append(_of(number, refusal))
            kinds.append({})
    new = [
        # No client can send a key with a space.
        _new(request, job, kind, key and f"{key} {number}", len(batch.jobs))
        for number, (job, kind) in enumerate(zip(batch.jobs, kinds, strict=True))
    ]
    if refusals:
        if (before := await app.lifecycle.submitted_before(new)) is None:
            errors = [error for refusal in refusals for error in refusal.errors][:MOST_ERRORS]
            raise type(refusals[0])(refusals[0].detail, errors=errors)
        jobs, created = before, False
    else:
        jobs, created = await app.lifecycle.submit_batch(new)
    bind_contextvars(jobs=len(jobs))
    headers = {} if created else {"Idempotent-Replayed": "true"}
    return answer({"jobs": [job.as_json() for job in jobs]}, 202 if created else 200, headers)


async def submitted(request: ApiRequest, job: Job, *, created: bool) -> HttpResponse:
    """The answer to a submission, held as it prefers, and the job's id in the log line of the request."""
    bind_contextvars(job_id=str(job.id))
    headers = {"Location": f"/api/v1/jobs/{job.id}"}
    if not created:
        headers["Idempotent-Replayed"] = "true"
    if (seconds := _preferred_wait(request)) is not None:
        job = await reads.end(request, job.id, seconds) or job
        headers["Preference-Applied"] = f"wait={seconds:g}"
    return answer(job.as_json(), 202 if created and not job.state.terminal else 200, headers)


def idempotency_key(request: ApiRequest) -> str | None:
    """The request's Idempotency-Key, if it has one. Raises BadRequest if that cannot be one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not KEY.fullmatch(key):
        raise BadRequest("An Idempotency-Key has 1 to 255 visible ASCII characters, such as a UUID.")
    return key


def _check_time(job: Submission) -> None:
    """Raises InvalidRequest."""
    if job.run_at is not None and not -CLOCKS <= (job.run_at - datetime.now(UTC)).total_seconds() <= FARTHEST:
        why = "lies more than a minute behind, or more than 400 days ahead; leave it out to run the job at once"
        raise InvalidRequest(f"run_at: {why}.", errors=[{"field": "run_at", "message": why}])


def _new(
    request: ApiRequest, job: Submission, kind: Mapping[str, Any], key: str | None, batch: int | None = None
) -> NewJob:
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
        idempotency_key=key,
        left_out=[name for name in DEFAULTED if getattr(job, name) is None],
        batch=batch,
    )


def _of(number: int, refusal: InvalidRequest) -> InvalidRequest:
    """A refusal of one job as one of a batch."""
    fields = refusal.errors or [{"field": "kind", "message": refusal.detail}]
    errors = [{**error, "field": f"jobs.{number}.{error['field']}"} for error in fields]
    return type(refusal)(f"jobs.{number}: {refusal.detail}", errors=errors)


def _preferred_wait(request: ApiRequest) -> float | None:
    """Seconds of `Prefer: wait=N`; what else a client may prefer is passed over, as RFC 7240 has it."""
    found = PREFER_WAIT.search(request.headers.get("Prefer", ""))
    return min(float(found[1]), LONGEST) if found else None
