"""Every error that Headway raises or answers with.

HeadwayError
├── InvalidSettings            at start: the process ends
├── StartFailed                at start of `make run` or of a worker: the process ends
├── Problem                    an answer of the API, RFC 9457
│   ├── BadRequest             400 bad-request
│   ├── Unauthenticated        401 unauthenticated
│   │   └── TicketRefused      401 ticket-refused
│   ├── Forbidden              403 forbidden
│   │   └── OriginRefused      403 origin-refused
│   ├── NotFound               404 not-found
│   ├── MethodNotAllowed       405 method-not-allowed
│   ├── TooSlow                408 too-slow
│   ├── Conflict               409 conflict
│   ├── WrongVersion           412 wrong-version
│   ├── TooLarge               413 too-large
│   │   └── QuotaExceeded      413 quota-exceeded
│   ├── WrongType              415 wrong-type
│   ├── NoSuchRange            416 range-not-satisfiable
│   ├── InvalidRequest         422 invalid-request
│   │   ├── UnknownKind        422 unknown-kind
│   │   ├── KeyReused          422 idempotency-key-reused
│   │   ├── InvalidInput       422 invalid-input
│   │   ├── QueryRefused       422 query-refused
│   │   └── DigestMismatch     422 digest-mismatch
│   ├── TooMany                429 too-many
│   ├── ChecksumMismatch       460 checksum-mismatch
│   ├── Internal               500 internal
│   ├── Unavailable            503 unavailable
│   ├── SourceUnavailable      503 source-unavailable
│   ├── DeadlinePassed         504 deadline-passed
│   └── NoStorage              507 no-storage
├── JobError                   a job's `error`, shown to its owner
│   ├── Fatal                  fatal          raised by handlers: this input can never succeed
│   ├── Retry                  retry          raised by handlers: try again after so many seconds
│   ├── InputRefused           input-refused  the worker's model refuses the input
│   ├── TimedOut               timed-out
│   ├── HandlerFailed          handler-failed any other exception of a handler
│   ├── ChildDied              child-died     the process of a handler died under it
│   └── Crashed                crashed        the worker died under it, as often as is allowed
└── LeaseLost                  a fenced write matched no row: stop, write nothing
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class HeadwayError(Exception):
    """The root. The message is for people and says what to do."""


class InvalidSettings(HeadwayError):
    """A setting is missing or wrong."""


class StartFailed(HeadwayError):
    """A part that was asked for cannot be started."""


class LeaseLost(HeadwayError):
    """The attempt is no longer the job's: another worker has it, or it ended. Stop, and write nothing."""


class Problem(HeadwayError):
    """An answer that is not a success, as problem+json.

    `type` is `urn:headway:problem:<slug>` and never changes; `detail` says what to do.
    """

    status: ClassVar[int]
    slug: ClassVar[str]
    title: ClassVar[str]

    def __init__(
        self, detail: str, *, errors: Sequence[Mapping[str, Any]] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}

    def as_json(self) -> dict[str, Any]:
        """The body: type, title, status, detail, and `errors` where single fields are wrong."""
        body: dict[str, Any] = {
            "type": f"urn:headway:problem:{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            body["errors"] = list(self.errors)
        return body


class BadRequest(Problem):
    """The request cannot be read: broken JSON, a wrong header, a cursor that was not issued."""

    status, slug, title = 400, "bad-request", "The request cannot be read"


class Unauthenticated(Problem):
    """No valid API key came with the request."""

    status, slug, title = 401, "unauthenticated", "A valid API key is needed"


class TicketRefused(Unauthenticated):
    """The ticket was used before, has expired, or its key has ended. Get a new one, and connect again."""

    slug, title = "ticket-refused", "The ticket does not hold"


class Forbidden(Problem):
    """The ticket does not permit this."""

    status, slug, title = 403, "forbidden", "Not permitted"


class OriginRefused(Forbidden):
    """The page that connects is not one that may: its origin is neither the service's own nor in `HEADWAY_ORIGINS`."""

    slug, title = "origin-refused", "The origin is not permitted"


class NotFound(Problem):
    """There is nothing here, or it belongs to another tenant."""

    status, slug, title = 404, "not-found", "Not found"


class MethodNotAllowed(Problem):
    """The path exists but not for this method; the Allow header lists those that do."""

    status, slug, title = 405, "method-not-allowed", "The method is not allowed here"


class TooSlow(Problem):
    """No more of the body came for a while, or JSON took too long. An upload that can be resumed keeps what arrived."""

    status, slug, title = 408, "too-slow", "The body did not arrive in time"


class Conflict(Problem):
    """The thing is in a state that does not permit this."""

    status, slug, title = 409, "conflict", "Not possible in the present state"


class WrongVersion(Problem):
    """The request is of another version of the tus protocol; the Tus-Version header lists those spoken here."""

    status, slug, title = 412, "wrong-version", "Another version of the protocol"


class TooLarge(Problem):
    """The body is over a limit; the detail names the limit."""

    status, slug, title = 413, "too-large", "Over a size limit"


class QuotaExceeded(TooLarge):
    """The files of the tenant would be over its quota. Delete some, or ask the operator for more."""

    slug, title = "quota-exceeded", "Over the quota of the tenant"


class WrongType(Problem):
    """The body is of another content type than this takes; the detail names what it takes."""

    status, slug, title = 415, "wrong-type", "Not this content type"


class NoSuchRange(Problem):
    """The range begins past the end. `Content-Range` tells the size; ask for less, or for the whole."""

    status, slug, title = 416, "range-not-satisfiable", "There are no such bytes"


class InvalidRequest(Problem):
    """The JSON is well-formed but fields are missing, unknown or wrong; `errors` lists each."""

    status, slug, title = 422, "invalid-request", "Some fields are wrong"


class UnknownKind(InvalidRequest):
    """No worker has announced this kind."""

    slug, title = "unknown-kind", "There is no such kind"


class KeyReused(InvalidRequest):
    """The Idempotency-Key was used for another request before. Use a new key for a new request."""

    slug, title = "idempotency-key-reused", "The key belongs to another request"


class InvalidInput(InvalidRequest):
    """`input` does not fit the kind's schema; `errors` lists each field."""

    slug, title = "invalid-input", "The input does not fit the kind"


class QueryRefused(InvalidRequest):
    """The statement is not one that reads, or the source refuses it; the detail has the source's own words."""

    slug, title = "query-refused", "The statement is refused"


class DigestMismatch(InvalidRequest):
    """What arrived is not what Content-Digest or Digest announced. Nothing of it was kept; send it again."""

    slug, title = "digest-mismatch", "The body was damaged on its way"


class TooMany(Problem):
    """More connections, subscriptions or calls than a client may have at a time; the detail names the limit."""

    status, slug, title = 429, "too-many", "More than is allowed at a time"


class ChecksumMismatch(Problem):
    """What arrived is not what Upload-Checksum announced. Nothing of it was kept; send it again."""

    status, slug, title = 460, "checksum-mismatch", "The bytes were damaged on their way"


class Internal(Problem):
    """Something broke on our side; the request id finds it in the log."""

    status, slug, title = 500, "internal", "Something broke here"


class Unavailable(Problem):
    """Postgres, or for tickets and presence Redis, cannot be reached or is overloaded, or the process is about to stop.

    Whether the request was done is not known; ask again later.
    """

    status, slug, title = 503, "unavailable", "Not available right now"

    def __init__(self, detail: str, *, retry_after: int = 2) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after)})


class SourceUnavailable(Problem):
    """The database that the request names cannot be reached, or went away. Ask again later."""

    status, slug, title = 503, "source-unavailable", "The source is not available right now"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "2"})


class DeadlinePassed(Problem):
    """The statement took longer than it may, and was ended in its database. Ask for less, or submit `sql.export`."""

    status, slug, title = 504, "deadline-passed", "The time is over"


class NoStorage(Problem):
    """A file cannot be kept or read: its place is full, read-only or away. Of a new one nothing is left."""

    status, slug, title = 507, "no-storage", "The file cannot be kept"


class JobError(HeadwayError):
    """Why an attempt failed, kept as the job's `error`: `{"type": …, "message": …}`."""

    slug: ClassVar[str]

    def as_json(self) -> dict[str, str]:
        return {"type": self.slug, "message": str(self)}


class Fatal(JobError):
    """Raised by a handler when this input can never succeed; the message says what to change."""

    slug = "fatal"


class Retry(JobError):
    """Raised by a handler to be run again `after` so many seconds; the message says why. It counts as an attempt.

    `after` may be what a server says in Retry-After: below 0 is at once, above 400 days is 400 days.
    """

    slug = "retry"

    def __init__(self, message: str = "The handler asked to be run again.", *, after: float) -> None:
        if math.isnan(after):
            raise ValueError("Retry takes seconds in `after`, not NaN.")
        super().__init__(message)
        self.after = min(max(after, 0.0), 400 * 86400.0)


class InputRefused(JobError):
    """The input does not fit the model that the worker has of the kind."""

    slug = "input-refused"


class TimedOut(JobError):
    """The attempt ran longer than the job's timeout."""

    slug = "timed-out"


class HandlerFailed(JobError):
    """The handler raised an exception; its class and message are the message."""

    slug = "handler-failed"


class ChildDied(JobError):
    """The process that ran the handler of a `runs="process"` kind died; the message names its signal or exit code."""

    slug = "child-died"


class Crashed(JobError):
    """The worker process died while it ran the job, as often as is allowed; see the worker's log for why."""

    slug = "crashed"


PROBLEMS: tuple[type[Problem], ...] = (
    BadRequest,
    Unauthenticated,
    TicketRefused,
    Forbidden,
    OriginRefused,
    NotFound,
    MethodNotAllowed,
    TooSlow,
    Conflict,
    WrongVersion,
    TooLarge,
    QuotaExceeded,
    WrongType,
    NoSuchRange,
    InvalidRequest,
    UnknownKind,
    KeyReused,
    InvalidInput,
    QueryRefused,
    DigestMismatch,
    TooMany,
    ChecksumMismatch,
    Internal,
    Unavailable,
    SourceUnavailable,
    DeadlinePassed,
    NoStorage,
)
JOB_ERRORS: tuple[type[JobError], ...] = (Fatal, Retry, InputRefused, TimedOut, HandlerFailed, ChildDied, Crashed)


def innermost(error: BaseException | None) -> BaseException | None:
    """What one task of a TaskGroup raised, out of the group that it is wrapped in."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
