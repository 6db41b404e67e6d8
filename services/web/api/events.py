"""What happens to jobs: their durable events as pages, and all of it live as server-sent events."""

import re
from uuid import UUID

from django.http.response import HttpResponseBase
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict

from headway.errors import BadRequest, NotFound
from headway.store.cursor import BadCursor, Cursor
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest
from services.web.live.commands import JobItem, SetItem
from services.web.live.entrance import EVENT_STREAM
from services.web.live.stream import EventStream

MARK = re.compile(r"([0-9]{1,9})-([0-9]{1,15})", re.ASCII)

router = Router(tags=["events"])


class Page(Schema):
    """Which events of a job."""

    model_config = ConfigDict(extra="forbid")

    after: int = Field(default=0, ge=0, le=1 << 53, description="The seq of the last event that is known.")
    limit: int = Field(default=100, ge=1, le=1000)
    last_event_id: str | None = Field(
        default=None, max_length=100, description="In place of the header Last-Event-ID, for a stream."
    )
    ticket: str | None = Field(
        default=None, max_length=100, description="In place of the header Authorization, for a stream to a browser."
    )


@router.get(
    "/jobs/{uuid:job_id}/events",
    summary="The events of a job",
    response=schemas.Events,
    openapi_extra=schemas.headers(schemas.LAST_EVENT_ID) | {"responses": {200: {"content": schemas.EVENT_STREAM}}},
)
async def list_events(request: ApiRequest, job_id: UUID, wanted: Query[Page]) -> HttpResponseBase:
    """A page of its durable events, states and log lines, and `next_after` for the next page, or null.

    With `Accept: text/event-stream` the job live: a snapshot, then every event, progress too, until `bye`. The header
    `Last-Event-ID` continues after the event of that id. Once the job has ended and all was received, it answers 204.
    """
    request.only(Page)
    if EVENT_STREAM in request.headers.get("Accept", ""):
        return await EventStream.open(request, "jobs", _after(job_id, _last(request, wanted)), single=True)
    store, tenant_id = request.app.store, request.auth.tenant_id
    if await store.get(job_id, tenant_id) is None:
        raise NotFound(f"There is no job {job_id}.")
    events = await store.events(job_id, tenant_id, after=wanted.after, limit=wanted.limit + 1)
    page = events[: wanted.limit]
    return answer(
        {
            "events": [
                {"t": event.type, "job": str(job_id), "epoch": event.epoch, "seq": event.seq, "d": event.data}
                for event in page
            ],
            "next_after": page[-1].seq if len(events) > len(page) else None,
        }
    )


class SetOfJobs(Schema):
    """Which jobs; those that fit all that is given."""

    model_config = ConfigDict(extra="forbid")

    tag: str | None = Field(default=None, min_length=1, max_length=100)
    kind: str | None = Field(default=None, min_length=1, max_length=200)
    parent: UUID | None = None
    last_event_id: str | None = Field(
        default=None, max_length=12_000, description="In place of the header Last-Event-ID."
    )
    ticket: str | None = Field(
        default=None, max_length=100, description="In place of the header Authorization, for a stream to a browser."
    )


@router.get(
    "/events",
    summary="What happens to many jobs, live",
    openapi_extra=schemas.headers(schemas.LAST_EVENT_ID) | {"responses": {200: {"content": schemas.EVENT_STREAM}}},
)
async def follow_events(request: ApiRequest, wanted: Query[SetOfJobs]) -> HttpResponseBase:
    """Server-sent events of all jobs that fit: a snapshot of each that is open, then every event, and new jobs.

    The header `Last-Event-ID` continues after the event of that id, up to as long ago as ended jobs are kept.
    """
    request.only(SetOfJobs)
    since = _last(request, wanted)
    if since is not None:
        try:
            Cursor.decode(since)
        except BadCursor as error:
            raise BadRequest(str(error)) from None
    item = SetItem(set="events", tag=wanted.tag, kind=wanted.kind, parent=wanted.parent, since=since)
    return await EventStream.open(request, "sets", item)


def _last(request: ApiRequest, wanted: Page | SetOfJobs) -> str | None:
    """The id of the last event that the client received."""
    return request.headers.get("Last-Event-ID") or wanted.last_event_id


def _after(job_id: UUID, last: str | None) -> JobItem:
    if last is None:
        return JobItem(job=job_id)
    mark = MARK.fullmatch(last)
    if mark is None:
        raise BadRequest("Last-Event-ID is not an id of this stream; leave it out to begin with a snapshot.")
    return JobItem(job=job_id, epoch=int(mark[1]), since=int(mark[2]))
