"""`/rooms`: what was said in rooms, and by whom they are visited. `services.web.live` tells it as it happens."""

import base64
import binascii
from datetime import datetime
from typing import Annotated

from django.http import HttpResponse
from ninja import Field, Path, Query, Router, Schema
from pydantic import ConfigDict

from headway.errors import BadRequest
from headway.rooms import LONGEST, ROOM_NAME
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest
from services.web.api.submissions import idempotency_key

router = Router(tags=["rooms"])

Name = Annotated[str, Path(pattern=ROOM_NAME, description="A name of your own, or `job:<id>`.", examples=["lobby"])]


class NewMessage(Schema):
    """What is said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    message: str = Field(
        min_length=1, max_length=LONGEST, description="Kept as it came; escape it when you show it.", examples=["hi"]
    )


class Page(Schema):
    """Which messages of a room."""

    model_config = ConfigDict(extra="forbid")

    after: int = Field(default=0, ge=0, lt=1 << 63, description="The seq of the last message that you have.")
    limit: int = Field(default=50, ge=1, le=500)


class Listing(Schema):
    """Which rooms."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=50, ge=1, le=500)
    cursor: str | None = Field(default=None, max_length=200, description="`next_cursor` of the page before.")


@router.get("", summary="List rooms, the one that was last spoken in first", response=schemas.Rooms)
async def list_rooms(request: ApiRequest, wanted: Query[Listing]) -> HttpResponse:
    """A page of rooms, and the cursor of the next page, or null. A room is there once something was said in it."""
    request.only(Listing)
    before = _before(wanted.cursor) if wanted.cursor else None
    rooms = await request.app.rooms.list_rooms(request.auth.tenant_id, before, wanted.limit + 1)
    page = rooms[: wanted.limit]
    cursor = _cursor(page[-1].last_at, page[-1].name) if len(rooms) > len(page) else None
    return answer({"rooms": [room.as_json() for room in page], "next_cursor": cursor})


@router.post(
    "/{room}/messages",
    summary="Say something in a room",
    response={200: schemas.Message, 201: schemas.Message},
    openapi_extra=schemas.headers(schemas.IDEMPOTENCY_KEY),
)
async def publish(request: ApiRequest, room: Name, said: NewMessage) -> HttpResponse:
    """201 once the message is committed; whoever is in the room is told. The author is the key's name.

    With an `Idempotency-Key` a repeat says nothing twice: 200 with the first message.
    """
    request.only()
    auth = request.auth
    message, new = await request.app.rooms.publish(
        auth.tenant_id,
        room,
        said.message,
        author=auth.user,
        key_id=auth.key_id,
        publish_key=idempotency_key(request),
    )
    if new:
        return answer(message.as_json(), 201)
    return answer(message.as_json(), 200, {"Idempotent-Replayed": "true"})


@router.get("/{room}/messages", summary="What was said in a room", response=schemas.Messages)
async def list_messages(request: ApiRequest, room: Name, wanted: Query[Page]) -> HttpResponse:
    """Messages after a seq, oldest first, and the seq of the newest one.

    A seq counts a room's messages and leaves no number out. If the first is not the one after `after`, those between
    are kept no longer.
    """
    request.only(Page)
    messages, newest = await request.app.rooms.history(
        request.auth.tenant_id, room, after=wanted.after, limit=wanted.limit
    )
    return answer({"messages": [message.as_json() for message in messages], "seq": newest})


@router.get("/{room}/presence", summary="Who is in a room", response=schemas.Here)
async def list_presence(request: ApiRequest, room: Name) -> HttpResponse:
    """The names of all who have joined, over WebSockets, in alphabetical order; at most 1,000."""
    request.only()
    await request.app.rooms.newest(request.auth.tenant_id, room)
    return answer({"here": await request.app.presence.here(request.auth.tenant_id, room)})


def _cursor(last_at: datetime, name: str) -> str:
    return base64.urlsafe_b64encode(f"{last_at.isoformat()} {name}".encode()).decode().rstrip("=")


def _before(cursor: str) -> tuple[datetime, str]:
    try:
        at, _, name = base64.urlsafe_b64decode(cursor + "==").decode().partition(" ")
        before = datetime.fromisoformat(at)
    except (ValueError, binascii.Error):
        before, name = None, ""
    if before is None or before.tzinfo is None or "\0" in name:
        raise BadRequest("The cursor was not issued here; send `next_cursor` of the page before.")
    return before, name
