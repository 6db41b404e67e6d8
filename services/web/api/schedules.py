"""`/schedules`: jobs that are submitted at the times of a cron expression."""

from typing import Annotated, Any
from uuid import UUID

from django.http import HttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import AfterValidator, ConfigDict

from headway.schedules import MOST_SCHEDULES
from headway.store.schedules import CatchUp, Schedule
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest
from services.web.api.submissions import Submission, idempotency_key, submitted

router = Router(tags=["schedules"])


def _timeless(job: Submission) -> Submission:
    if job.run_at is not None or job.delay is not None:
        raise ValueError("the schedule says when; leave out run_at and delay")
    if len(job.tags) == 20:
        raise ValueError("the schedule adds a tag of its own; send 19 tags at most")
    return job


Name = Annotated[
    str,
    Field(
        max_length=80,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Its jobs have the tag `schedule:NAME`.",
        examples=["nightly"],
    ),
]
Cron = Annotated[
    str,
    Field(
        max_length=255,
        description="Minute, hour, day of month, month, day of week, as cron has them; also `L`, `LW`, `5L`, `MON#1`.",
        examples=["30 2 * * MON-FRI"],
    ),
]
Zone = Annotated[
    str, Field(max_length=64, description="Time zone of the cron expression, by its IANA name.", examples=["UTC"])
]
Missed = Annotated[
    CatchUp,
    Field(
        description="What is submitted of slots that no worker submitted within a minute: nothing, the latest, or all."
    ),
]
Job = Annotated[
    Submission, AfterValidator(_timeless), Field(description="As for `POST /jobs`, without run_at and delay.")
]


class NewSchedule(Schema):
    """A job, and when to submit it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name
    cron: Cron
    timezone: Zone = "UTC"
    catch_up: Missed = "one"
    job: Job


class ScheduleChange(Schema):
    """What to change. What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name | None = None
    cron: Cron | None = None
    timezone: Zone | None = None
    catch_up: Missed | None = None
    job: Job | None = None


class Limit(Schema):
    """How many schedules to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=MOST_SCHEDULES)


@router.post("", summary="Create a schedule", response={201: schemas.Schedule})
async def create_schedule(request: ApiRequest, schedule: NewSchedule) -> HttpResponse:
    """The first slot lies ahead: `next_at` tells it. A tenant has 1,000 schedules at most, each of another name."""
    request.only()
    created = await request.app.schedules.create(
        request.auth.tenant_id,
        name=schedule.name,
        cron=schedule.cron,
        timezone=schedule.timezone,
        catch_up=schedule.catch_up,
        job=await _checked(request, schedule.job),
    )
    return answer(created.as_json(), 201, {"Location": f"/api/v1/schedules/{created.id}"})


@router.get("", summary="List schedules, by name", response=schemas.Schedules)
async def list_schedules(request: ApiRequest, wanted: Query[Limit]) -> HttpResponse:
    """The first of them; with `limit=1000`, all."""
    request.only(Limit)
    found = await request.app.schedules.list_schedules(request.auth.tenant_id, wanted.limit)
    return answer({"schedules": [schedule.as_json() for schedule in found]})


@router.get("/{uuid:schedule_id}", summary="One schedule", response=schemas.Schedule)
async def get_schedule(request: ApiRequest, schedule_id: UUID) -> HttpResponse:
    """`next_at` is the next slot, in UTC; null while the schedule is paused."""
    return answer((await _schedule(request, schedule_id)).as_json())


@router.patch("/{uuid:schedule_id}", summary="Change a schedule", response=schemas.Schedule)
async def change_schedule(request: ApiRequest, schedule_id: UUID, change: ScheduleChange) -> HttpResponse:
    """New times hold from now on. `job` is replaced whole."""
    request.only()
    job = await _checked(request, change.job) if change.job else None
    changed = await request.app.schedules.change(
        schedule_id,
        request.auth.tenant_id,
        name=change.name,
        cron=change.cron,
        timezone=change.timezone,
        catch_up=change.catch_up,
        job=job,
    )
    return answer(changed.as_json())


@router.delete("/{uuid:schedule_id}", summary="Delete a schedule", response={204: None})
async def delete_schedule(request: ApiRequest, schedule_id: UUID) -> HttpResponse:
    """Its jobs stay, those that run go on."""
    request.only()
    await request.app.schedules.delete(schedule_id, request.auth.tenant_id)
    response = HttpResponse(status=204)
    del response.headers["Content-Type"]
    return response


@router.post("/{uuid:schedule_id}/pause", summary="Pause a schedule", response=schemas.Schedule)
async def pause_schedule(request: ApiRequest, schedule_id: UUID) -> HttpResponse:
    """Slots that come while it is paused are dropped, whatever `catch_up` says."""
    request.only()
    return answer((await request.app.schedules.pause(schedule_id, request.auth.tenant_id)).as_json())


@router.post("/{uuid:schedule_id}/resume", summary="Resume a schedule", response=schemas.Schedule)
async def resume_schedule(request: ApiRequest, schedule_id: UUID) -> HttpResponse:
    """It goes on with the next slot from now."""
    request.only()
    return answer((await request.app.schedules.resume(schedule_id, request.auth.tenant_id)).as_json())


@router.post(
    "/{uuid:schedule_id}/run",
    summary="Run a schedule's job now",
    response={200: schemas.Job, 202: schemas.Job},
    openapi_extra=schemas.headers(schemas.IDEMPOTENCY_KEY, schemas.PREFER),
)
async def run_schedule(request: ApiRequest, schedule_id: UUID) -> HttpResponse:
    """Submits the job at once, paused or not, and leaves the slots as they are. Answers as `POST /jobs` does."""
    schedule = await _schedule(request, schedule_id)
    await request.app.catalog.check(schedule.job["kind"], schedule.job["input"])
    job, created = await request.app.schedules.run(schedule, idempotency_key(request))
    return await submitted(request, job, created=created)


async def _schedule(request: ApiRequest, schedule_id: UUID) -> Schedule:
    request.only()
    return await request.app.schedules.get(schedule_id, request.auth.tenant_id)


async def _checked(request: ApiRequest, job: Submission) -> dict[str, Any]:
    """What is kept of a job: what was said of it, once its kind takes the input."""
    await request.app.catalog.check(job.kind, job.input)
    said = job.model_dump(exclude_unset=True)
    return {name: value for name, value in said.items() if value is not None or name == "input"}
