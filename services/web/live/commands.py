"""What clients of `jobs.v1` send: one JSON object a frame, checked field by field."""

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from headway.errors import BadRequest, InvalidRequest
from headway.rooms import LONGEST
from services.web.api.bodies import parse

MOST_NAME = 64

Id = Annotated[str, Field(max_length=64)] | Annotated[int, Field(strict=True, ge=-(1 << 53), le=1 << 53)]
Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME)]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]
PublishKey = Annotated[str, Field(min_length=1, max_length=64)]
Seq = Annotated[int, Field(strict=True, ge=0, le=1 << 53)]


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobItem(Item):
    """A job to follow. With `since` and `epoch` the events after that seq are sent in place of a snapshot."""

    job: UUID
    since: Seq | None = None
    epoch: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] | None = None


class SetItem(Item):
    """All jobs that fit, under a name of the client's choice. `since` is the cursor of the last envelope received."""

    set: Name
    tag: str | None = Field(None, min_length=1, max_length=100)
    kind: str | None = Field(None, min_length=1, max_length=200)
    parent: UUID | None = None
    since: str | None = Field(None, max_length=12_000)


class RoomItem(Item):
    """A room to join. With `since` the messages after that seq come first."""

    room: Name
    since: Seq | None = None


class Command(Item):
    id: Id


class Subscribe(Command):
    """Follow jobs, sets and rooms beside those that are followed. Answered by `ack`, then what was missed."""

    t: Literal["subscribe"]
    jobs: list[JobItem] = []
    sets: list[SetItem] = []
    rooms: list[RoomItem] = []


class Unsubscribe(Command):
    """Follow these no longer."""

    t: Literal["unsubscribe"]
    jobs: list[UUID] = []
    sets: list[Name] = []
    rooms: list[Name] = []


class Publish(Command):
    """Say something in a room. A repeat with the same `key` is said once; both get the same ack."""

    t: Literal["publish"]
    room: Name
    message: Text
    key: PublishKey | None = None


class Refresh(Command):
    """Ask for a new snapshot of jobs that are followed."""

    t: Literal["refresh"]
    jobs: list[UUID]


class Pong(Command):
    """A sign of life."""

    t: Literal["pong"]


Any_ = Annotated[Subscribe | Unsubscribe | Publish | Refresh | Pong, Field(discriminator="t")]
_commands: TypeAdapter[Subscribe | Unsubscribe | Publish | Refresh | Pong] = TypeAdapter(Any_)
_id: TypeAdapter[str | int] = TypeAdapter(Id)


class Speech(Item):
    """What a socket of one room takes. `key` makes a repeat of it known."""

    message: Text
    key: PublishKey | None = None


class Unusable(Exception):
    """A frame that cannot even be answered: it has no usable id."""


def read(text: str) -> Subscribe | Unsubscribe | Publish | Refresh | Pong | tuple[str | int, InvalidRequest]:
    """The command in a frame, or its id and what is wrong with it. Raises Unusable."""
    try:
        value = parse(text.encode(errors="surrogatepass"))
    except BadRequest as error:
        raise Unusable(str(error).replace("The body", "The frame")) from None
    try:
        return _commands.validate_python(value)
    except ValidationError as error:
        return _given_id(value), _problem(error)


def read_speech(text: str) -> Speech:
    """What a frame on a socket of one room says. Raises BadRequest or InvalidRequest."""
    value = parse(text.encode(errors="surrogatepass"))
    try:
        return Speech.model_validate(value)
    except ValidationError as error:
        raise _problem(error, depth=0) from None


def _given_id(value: Any) -> str | int:
    try:
        return _id.validate_python(value["id"], strict=True)
    except (ValidationError, TypeError, KeyError):
        raise Unusable("A frame is a JSON object with a known `t` and an `id`, a short string or an integer.") from None


def _problem(error: ValidationError, *, depth: int = 1) -> InvalidRequest:
    errors = [
        {"field": ".".join(str(part) for part in item["loc"][depth:]) or "t", "message": item["msg"]}
        for item in error.errors(include_url=False, include_input=False)[:20]
    ]
    return InvalidRequest(f"{errors[0]['field']}: {errors[0]['message']}.", errors=errors)
