"""Job, Claim, Ending, Child, Progress, Event, File, Upload, Artifact: frozen records and their JSON shape."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any, Literal
from uuid import UUID

from headway.errors import Fatal
from headway.states import JobState

# What one job may ask for. Times are seconds, lengths are characters.
# Of what a client may leave out the kind has the defaults of these.
DEFAULTED = ("timeout", "max_attempts")
LONGEST_TIMEOUT = 7 * 86400.0
MOST_ATTEMPTS = 100
MOST_TAGS = 20
LONGEST_TAG = 100
LONGEST_KEY = 200
MOST_PLACES = 100

EventType = Literal["state", "progress", "log"]
# Where a piece of a file is kept, and its size in bytes.
Part = Sequence[Any]


class Priority(IntEnum):
    """Which of a tenant's jobs go first. A lower one waits longer, but never for ever."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


def timestamp(at: datetime | None) -> str | None:
    """RFC 3339 in UTC, milliseconds, `Z`; None stays None."""
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an attempt is: `done` of `total` in `unit`; `rate` in units a second, `eta` in seconds."""

    done: float
    total: float | None = None
    unit: str = "items"
    message: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None
    eta: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of `jobs`, as clients see it. `seq` is the number of its newest event."""

    id: UUID
    tenant_id: UUID
    kind: str
    state: JobState
    input: Any
    tags: tuple[str, ...]
    priority: Priority
    timeout: float
    max_attempts: int
    concurrency_key: str | None
    concurrency_limit: int
    parent_id: UUID | None
    retry_of: UUID | None
    attempt: int
    interruptions: int
    crashes: int
    created_at: datetime
    run_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    progress: Mapping[str, Any] | None
    result: Any
    error: Mapping[str, Any] | None
    epoch: int
    seq: int

    def as_json(self) -> dict[str, Any]:
        """The job as the API, the snapshot frame and the CLI show it; times are RFC 3339 in UTC."""
        return {
            "id": str(self.id),
            "kind": self.kind,
            "state": self.state.value,
            "input": self.input,
            "tags": list(self.tags),
            "priority": self.priority.name.lower(),
            "timeout": self.timeout,
            "max_attempts": self.max_attempts,
            "concurrency_key": self.concurrency_key,
            "concurrency_limit": self.concurrency_limit,
            "parent_id": str(self.parent_id) if self.parent_id else None,
            "retry_of": str(self.retry_of) if self.retry_of else None,
            "attempt": self.attempt,
            "interruptions": self.interruptions,
            "crashes": self.crashes,
            "created_at": timestamp(self.created_at),
            "run_at": timestamp(self.run_at),
            "started_at": timestamp(self.started_at),
            "finished_at": timestamp(self.finished_at),
            "cancel_requested_at": timestamp(self.cancel_requested_at),
            "progress": self.progress,
            "result": self.result,
            "error": self.error,
            "epoch": self.epoch,
            "seq": self.seq,
        }


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker holds while it runs an attempt. `token` fences every write of the attempt."""

    job_id: UUID
    tenant_id: UUID
    kind: str
    input: Any
    timeout: float
    max_attempts: int
    concurrency_key: str | None
    depth: int
    attempt: int
    token: int
    checkpoint: Any


@dataclass(frozen=True, slots=True)
class Child:
    """A job that a handler submits as a part of its own. What is left out is the kind's own; `timeout` is seconds.

    Raises Fatal for what `POST /jobs` would refuse.
    """

    kind: str
    input: Any
    tags: Sequence[str] = ()
    priority: Priority = Priority.NORMAL
    timeout: float | None = None
    max_attempts: int | None = None
    concurrency_key: str | None = None
    concurrency_limit: int = 1

    def __post_init__(self) -> None:
        key = self.concurrency_key
        limits = {
            f"timeout is a time above 0 and at most {LONGEST_TIMEOUT:,.0f} seconds": (
                self.timeout is None or 0 < self.timeout <= LONGEST_TIMEOUT
            ),
            f"max_attempts is a number from 1 to {MOST_ATTEMPTS}": (
                self.max_attempts is None or 1 <= self.max_attempts <= MOST_ATTEMPTS
            ),
            f"tags are at most {MOST_TAGS}, each of 1 to {LONGEST_TAG} characters": (
                len(self.tags) <= MOST_TAGS and all(1 <= len(tag) <= LONGEST_TAG for tag in self.tags)
            ),
            f"concurrency_key has 1 to {LONGEST_KEY} characters": key is None or 1 <= len(key) <= LONGEST_KEY,
            f"concurrency_limit is a number from 1 to {MOST_PLACES}": 1 <= self.concurrency_limit <= MOST_PLACES,
        }
        if wrong := [limit for limit, kept in limits.items() if not kept]:
            raise Fatal(f"A child of the kind {self.kind!r} cannot be submitted: {'; '.join(wrong)}.")


@dataclass(frozen=True, slots=True)
class ChildEnding:
    """How a child ended: `result` if it succeeded, `error` as `{"type", "message"}` if it failed."""

    id: UUID
    kind: str
    state: JobState
    result: Any = None
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job, committed before anyone hears of it.

    `seq` counts a job's events from 1 without a gap; `epoch` changes when the count starts anew.
    """

    job_id: UUID
    tenant_id: UUID
    epoch: int
    seq: int
    type: EventType
    data: Mapping[str, Any]

    @property
    def terminal(self) -> bool:
        """Whether this is the job's last event."""
        return self.type == "state" and JobState(self.data["state"]).terminal


@dataclass(frozen=True, slots=True)
class File:
    """An uploaded file. `sha256` is hex; a file that was uploaded before there were times to keep one has none."""

    id: UUID
    tenant_id: UUID
    name: str
    content_type: str
    size: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None
    parts: Sequence[Part] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "id": str(self.id),
            "name": self.name,
            "content_type": self.content_type,
            "size": self.size,
            "sha256": self.sha256,
            "created_at": timestamp(self.created_at),
            "expires_at": timestamp(self.expires_at),
        }


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that arrives in several requests: `received` of `size` bytes so far. Whole once it has a `sha256`.

    `metadata` is the Upload-Metadata that its client sent; `keep_until` when the file is to go.
    """

    id: UUID
    tenant_id: UUID
    name: str
    content_type: str
    size: int
    received: int
    sha256: str | None
    created_at: datetime
    expires_at: datetime
    keep_until: datetime | None
    parts: Sequence[Part]
    metadata: str

    def as_json(self) -> dict[str, Any]:
        """The upload as the API shows it; `file` is the id of the file once it is whole."""
        return {
            "id": str(self.id),
            "name": self.name,
            "content_type": self.content_type,
            "size": self.size,
            "offset": self.received,
            "created_at": timestamp(self.created_at),
            "expires_at": timestamp(self.expires_at),
            "file": str(self.id) if self.sha256 else None,
        }


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a job made. It becomes visible in the transaction that finishes the attempt."""

    name: str
    content_type: str
    size: int
    sha256: str
    key: str

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "content_type": self.content_type, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended: for good, or with state `scheduled` to be run again after `delay` seconds.

    `failure` is what is kept of this attempt beside the error that the job's owner sees first.
    """

    claim: Claim
    state: JobState
    result: Any = None
    error: Mapping[str, str] | None = None
    failure: Mapping[str, str] | None = None
    delay: float | None = None
    progress: Mapping[str, Any] | None = None
    artifacts: Sequence[Artifact] = ()
