"""Every answer of the API, described once: its OpenAPI document is made from here. A job is as live frames have it."""

from typing import Any, Literal, TypeAlias
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from headway.errors import PROBLEMS
from services.web.live import schemas as frames
from services.web.live.schemas import FieldError, LogLine, StateChange

Job: TypeAlias = frames.Job
Here: TypeAlias = frames.Here

NEXT = Field(description="`cursor` of the next page; null if this is the last one.")
SIZE = Field(ge=0, description="Bytes.")
DIGEST = Field(pattern="^[0-9a-f]{64}$")


def header(name: str, description: str, *, required: bool = False, **schema: Any) -> dict[str, Any]:
    """A header that an operation heeds."""
    about = {"in": "header", "name": name, "description": description, "required": required}
    return {**about, "schema": {"type": "string", **schema}}


def headers(*described: dict[str, Any]) -> dict[str, Any]:
    """What an operation's `openapi_extra` says of the headers that it heeds."""
    return {"parameters": list(described)}


IDEMPOTENCY_KEY = header(
    "Idempotency-Key",
    "A name of this request: sent again, it is done once, and answered with `Idempotent-Replayed: true`.",
    pattern="^[!-~]{1,255}$",
)
PREFER = header("Prefer", "`wait=N` holds the answer for the job's end, N seconds or 60 at most.", examples=["wait=10"])
IF_NONE_MATCH = header("If-None-Match", "The `ETag` of what the client has; 304 if that is still right.")
LAST_EVENT_ID = header("Last-Event-ID", "The id of the last event that was received; the stream goes on after it.")
# Of the type that the file has.
BYTES: dict[str, Any] = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
DOWNLOAD: dict[str, Any] = headers(header("Range", "`bytes=a-b`, one range."), IF_NONE_MATCH) | {
    "responses": {200: {"content": BYTES}, 206: {"description": "A part of it.", "content": BYTES}}
}


class Answer(BaseModel):
    """What all answers have in common: nothing that is not written here."""

    model_config = ConfigDict(extra="forbid")


class Problem(Answer):
    """What went wrong (RFC 9457)."""

    type: str = Field(
        description="Never changes.",
        json_schema_extra={"enum": [f"urn:headway:problem:{problem.slug}" for problem in PROBLEMS]},
    )
    title: str
    status: int
    detail: str = Field(description="What to do, for people.")
    errors: list[FieldError] | None = Field(default=None, min_length=1, description="The fields that are wrong.")


class Jobs(Answer):
    jobs: list[Job]
    next_cursor: str | None = NEXT


class JobsTogether(Answer):
    jobs: list[Job] = Field(description="In the order in which they were sent.")


class Changed(Answer):
    matched: int = Field(description="How many jobs were looked at.")
    changed: int = Field(description="How many of them were changed.")
    next_cursor: str | None = Field(description="`cursor` of the request that goes on; null if all were looked at.")


class Trace(Answer):
    """Why an attempt failed."""

    type: str
    message: str
    exception: str | None = Field(default=None, alias="class", description="Of an exception, with its module.")
    traceback: str | None = None


class FailedAttempt(Answer):
    attempt: int
    at: AwareDatetime
    error: Trace


class Failures(Answer):
    failures: list[FailedAttempt]


class Artifact(Answer):
    name: str
    content_type: str
    size: int = SIZE
    sha256: str = DIGEST


class Artifacts(Answer):
    artifacts: list[Artifact]


class JobEvent(Answer):
    """A durable event of a job."""

    t: Literal["state", "log"]
    job: UUID
    epoch: int
    seq: int
    d: StateChange | LogLine


class Events(Answer):
    events: list[JobEvent]
    next_after: int | None = Field(description="`after` of the next page; null if this is the last one.")


class File(Answer):
    id: UUID
    name: str
    content_type: str
    size: int = SIZE
    sha256: str = DIGEST
    created_at: AwareDatetime
    expires_at: AwareDatetime | None


class Files(Answer):
    files: list[File]
    next_cursor: str | None = NEXT


class Upload(Answer):
    id: UUID
    name: str
    content_type: str
    size: int = SIZE
    offset: int = Field(ge=0, description="How many of the bytes have arrived.")
    created_at: AwareDatetime
    expires_at: AwareDatetime
    file: UUID | None = Field(description="The id of the file, once it is whole.")


class Kind(Answer):
    name: str
    description: str
    timeout: float = Field(description="Seconds an attempt may run.")
    max_attempts: int
    input_schema: dict[str, Any] | bool
    result_schema: dict[str, Any] | bool
    paused_at: AwareDatetime | None


class Kinds(Answer):
    kinds: list[Kind]


class Schedule(Answer):
    id: UUID
    name: str
    cron: str
    timezone: str
    catch_up: Literal["skip", "one", "all"]
    job: dict[str, Any] = Field(description="What was said of the job.")
    next_at: AwareDatetime | None = Field(description="The next slot; null while the schedule is paused.")
    paused_at: AwareDatetime | None
    created_at: AwareDatetime


class Schedules(Answer):
    schedules: list[Schedule]


class Room(Answer):
    room: str
    seq: int = Field(description="The number of its newest message.")
    last_at: AwareDatetime


class Rooms(Answer):
    rooms: list[Room]
    next_cursor: str | None = NEXT


class Message(Answer):
    room: str
    seq: int
    message: str
    author: str
    at: AwareDatetime
    id: UUID


class Messages(Answer):
    messages: list[Message]
    seq: int = Field(description="The number of the room's newest message; 0 if there is none.")


class Ticket(Answer):
    ticket: str
    expires_at: AwareDatetime


class Column(Answer):
    name: str
    type: str | None = Field(description="The name of the source's type; null where it has none.")


class Found(Answer):
    columns: list[Column]
    rows: list[list[Any]]
    truncated: bool = Field(description="Whether there are more rows.")
    ms: float


class FetchFailure(Answer):
    type: str
    message: str


class Fetched(Answer):
    index: int
    url: str
    final_url: str | None
    status: int | None
    headers: dict[str, str]
    ms: float
    bytes: int
    sha256: str | None = None
    body: str | None = None
    error: FetchFailure | None


class FetchResults(Answer):
    results: list[Fetched] = Field(description="In the order of `urls`.")
    complete: bool = Field(description="Whether all were done in time.")
    ms: float
