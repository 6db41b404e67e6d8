"""Every frame of the protocol, described once: the AsyncAPI document is made from here."""

from typing import Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from headway.states import JobState

FrameId = str | int


class Frame(BaseModel):
    """What all frames have in common: nothing that is not written here."""

    model_config = ConfigDict(extra="forbid")


class Progress(Frame):
    """How far an attempt is."""

    done: float
    total: float | None
    unit: str = Field(description="What `done` and `total` count.")
    message: str
    counts: dict[str, int] = Field(description="What else the job counts.")
    rate: float | None = Field(description="Units a second.")
    eta: float | None = Field(description="Seconds that are left.")


class Failure(Frame):
    """Why a job failed."""

    type: str
    message: str


class Job(Frame):
    """A job as `GET /api/v1/jobs/{id}` shows it."""

    id: UUID
    kind: str
    state: JobState
    input: Any
    tags: list[str]
    priority: Literal["high", "normal", "low"]
    timeout: float
    max_attempts: int
    concurrency_key: str | None
    concurrency_limit: int
    parent_id: UUID | None
    retry_of: UUID | None
    attempt: int
    interruptions: int
    crashes: int
    created_at: AwareDatetime
    run_at: AwareDatetime | None
    started_at: AwareDatetime | None
    finished_at: AwareDatetime | None
    cancel_requested_at: AwareDatetime | None
    progress: Progress | None
    result: Any
    error: Failure | None
    epoch: int
    seq: int


class Envelope(Frame):
    """Something about a job."""

    job: UUID
    epoch: int = Field(description="Changes when the count of `seq` begins anew; what was held is void then.")
    prev: int | None = Field(
        description="The seq of the envelope before, of this job in this subscription; null if there was none. "
        "One that is not what the client holds means that a frame is missing."
    )
    seq: int = Field(
        ge=0,
        description="The number of this event of the job, from 1. Where it is more than one above `prev`, progress was "
        "folded on purpose.",
    )
    set: list[str] | None = Field(
        default=None, min_length=1, description="The names of the sets that the job belongs to."
    )
    cursor: str | None = Field(
        default=None, description="Where the sets are to be resumed after this envelope; opaque, on durable ones only."
    )


class Snapshot(Envelope):
    """The job as it is now. Whatever was known of it before is void."""

    t: Literal["snapshot"]
    prev: None
    d: Job


class StateChange(Frame):
    """What has changed with the state; a key that is not here has not changed."""

    state: JobState
    attempt: int
    at: AwareDatetime
    run_at: AwareDatetime | None = None
    cancel_requested_at: AwareDatetime | None = None
    progress: Progress | None = None
    result: Any = None
    error: Failure | None = None
    reason: str | None = Field(default=None, description="Why a running job went back.")


class State(Envelope):
    """The job's state changed, or its cancel was asked for. Durable: it comes again when a stream is resumed."""

    t: Literal["state"]
    d: StateChange


class ProgressReport(Envelope):
    """The newest progress. Older ones are left out, and none comes again."""

    t: Literal["progress"]
    d: Progress


class LogLine(Frame):
    message: str
    level: str
    at: AwareDatetime


class Log(Envelope):
    """A line that the job logged. Durable."""

    t: Literal["log"]
    d: LogLine


class Farewell(Frame):
    reason: Literal["terminal", "restart"]


class Bye(Frame):
    """Nothing more will come: of this job, since it has ended, or on this socket, since its server is restarted."""

    t: Literal["bye"]
    job: UUID | None = None
    d: Farewell


class Limits(Frame):
    frame: int = Field(description="Bytes of a client's frame.")
    subscriptions: int = Field(description="Jobs, sets and rooms of a socket.")
    commands: int = Field(description="Client frames a second.")


class Hello(Frame):
    protocol: Literal["jobs.v1"]
    socket: UUID
    hb: float = Field(description="Seconds between two `hb`. Silence of more than twice as long is a dead socket.")
    limits: Limits


class Welcome(Frame):
    """The first frame of `/ws/v1`."""

    t: Literal["welcome"]
    d: Hello


class Done(Frame):
    jobs: list[UUID] | None = Field(default=None, description="Of a subscribe: what holds now.")
    sets: list[str] | None = None
    rooms: list[str] | None = None
    room: str | None = Field(default=None, description="Of a publish.")
    seq: int | None = Field(default=None, description="Of a publish: the message's number in the room.")


class Ack(Frame):
    """A command was carried out. Snapshots of a subscribe come after its ack."""

    t: Literal["ack"]
    id: FrameId
    d: Done


class FieldError(Frame):
    field: str
    message: str


class Refusal(Frame):
    type: str = Field(pattern="^urn:headway:problem:[a-z-]+$")
    detail: str = Field(description="What to do, for people.")
    job: str | None = None
    set: str | None = None
    room: str | None = None
    errors: list[FieldError] | None = Field(default=None, description="The fields that are wrong.")


class Error(Frame):
    """A command, or one item of a subscribe, was refused; the other items hold."""

    t: Literal["error"]
    id: FrameId | None = None
    d: Refusal


class Cause(Frame):
    reason: Literal["epoch", "retention", "cursor"]


class Resync(Frame):
    """What was held of this job, set or room is void, since the place to resume from is not known; snapshots follow."""

    t: Literal["resync"]
    job: UUID | None = None
    set: str | None = None
    room: str | None = None
    d: Cause


class Marks(Frame):
    jobs: dict[UUID, int] = {}
    rooms: dict[str, int] = {}
    cursor: str | None = None


class Heartbeat(Frame):
    """Sent every 15 s: how far each subscription is by the record. All of it has been sent before."""

    t: Literal["hb"]
    d: Marks


class Said(Frame):
    id: UUID
    author: str
    message: str = Field(description="Text as it was sent; never markup.")
    at: AwareDatetime


class Message(Frame):
    """A message of a room. Durable."""

    t: Literal["message"]
    room: str
    prev: int | None
    seq: int = Field(ge=1, description="The number of the message in its room, from 1, without a hole.")
    d: Said


class Here(Frame):
    """Who is in the room."""

    here: list[str]


class Joined(Frame):
    """Somebody came."""

    joined: str


class Left(Frame):
    """Somebody is gone."""

    left: str


class Presence(Frame):
    """Who is in a room: all of them when one joins, then who joined and who left."""

    t: Literal["presence"]
    room: str
    d: Here | Joined | Left


class RoomMessage(Frame):
    """A message, on `/ws/rooms/{room}`."""

    message: str
    author: str
    at: AwareDatetime
    seq: int
    room: str
    id: UUID


class RoomResync(Frame):
    """What was held of the room is void: it is too long ago, or not of this room. The newest messages follow."""

    resync: Cause


class RoomError(Frame):
    """What was sent is refused."""

    error: Refusal


class RoomReceipt(Frame):
    key: str
    seq: int


class RoomAck(Frame):
    """What was sent with a `key` is said."""

    ack: RoomReceipt
