"""Rooms: what people and programs of a tenant say to each other, kept, numbered and told to all who are there.

A message is committed before it is told. A room comes into being with its first message; `job:<id>` is a job's room.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID

from uuid_utils.compat import uuid7

from headway import metrics
from headway.errors import Conflict, InvalidRequest, KeyReused, NotFound
from headway.events import Events
from headway.store import Store
from headway.store.rooms import Message, Room, RoomStore

UUID_FORM = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
ROOM_NAME = rf"^(?:[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}|job:{UUID_FORM})$"
NAME = re.compile(ROOM_NAME.strip("^$"))
JOB = "job:"
MOST_ROOMS = 10_000
LONGEST = 4000
# How far behind whoever joins is told all that it missed; beyond that it gets the newest few.
MOST_BEHIND = 1000
NEWEST = 100
MISSED_AT_ONCE = 200

Reset = Literal["cursor", "retention"]


def job_of(room: str) -> UUID | None:
    """The job whose room this is; None for any other room."""
    return UUID(room.removeprefix(JOB)) if room.startswith(JOB) else None


def check_name(room: str) -> None:
    """Raises InvalidRequest."""
    if not NAME.fullmatch(room):
        why = (
            "a room has a name of 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first, "
            "or is job:<id>"
        )
        raise InvalidRequest(f"room: {why}.", errors=[{"field": "room", "message": why}])


def check_text(text: str) -> None:
    """Raises InvalidRequest for what is empty, too long, or cannot be kept."""
    why = None
    if not 1 <= len(text) <= LONGEST:
        why = f"a message has 1 to {LONGEST:,} characters, not {len(text):,}"
    elif "\0" in text:
        why = "a message cannot hold the character NUL"
    elif not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        why = "a message cannot hold half of a surrogate pair"
    if why:
        raise InvalidRequest(f"message: {why}.", errors=[{"field": "message", "message": why}])


def group(tenant_id: UUID, room: str) -> str:
    """The group that a room's messages are sent to."""
    return f"room.{tenant_id}.{sha256(room.encode()).hexdigest()[:32]}"


def encode(message: Message) -> str:
    """What a message says, as JSON text. It is ASCII: no terminal or page takes any of it for its own."""
    return json.dumps(message.data(), separators=(",", ":"))


def told(message: Message) -> dict[str, Any]:
    """A message as it travels: `d` is JSON text."""
    return {"type": "room.message", "seq": message.seq, "d": encode(message)}


@dataclass(frozen=True, slots=True)
class Start:
    """Where whoever joins a room begins to be told: after the seq `after`, in a room whose newest message is `newest`.

    `follows` tells whether that follows on what it holds. With `reset` what it holds is void: it names a seq that is
    not there yet, or messages after it are kept no longer, or are too many. It then begins with the newest few.
    """

    newest: int
    after: int
    follows: bool = False
    reset: Reset | None = None

    @classmethod
    def of(cls, since: int | None, newest: int, oldest: int | None) -> "Start":
        """For whoever holds all up to `since`; 0 asks for all that is kept, None for what comes."""
        first = newest if oldest is None else oldest - 1
        if since is None:
            return cls(newest, newest)
        if since == 0 and newest - first <= MOST_BEHIND:
            return cls(newest, first)
        if since > newest or since < max(first, newest - MOST_BEHIND):
            return cls(newest, max(0, newest - NEWEST), reset="cursor" if since > newest else "retention")
        return cls(newest, since, follows=True)


class Rooms:
    """Adds to the rooms in `store` and tells `events`; reads what was said."""

    def __init__(self, store: Store, events: Events) -> None:
        self._store = RoomStore(store)
        self._events = events

    async def publish(
        self, tenant_id: UUID, room: str, text: str, *, author: str, key_id: str, publish_key: str | None = None
    ) -> tuple[Message, bool]:
        """Say something: it is committed when this returns. False if it was said before, with the same publish key.

        A publish key belongs to an author and a key. Raises InvalidRequest, KeyReused if the publish key came with
        another text, NotFound if the room's job does not exist, Conflict if there are too many rooms.
        """
        check_name(room)
        check_text(text)
        job_id, message_id = job_of(room), uuid7()
        while True:
            added = await self._store.add(
                tenant_id,
                room,
                job_id,
                message_id=message_id,
                author=author,
                key_id=key_id,
                publish_key=publish_key,
                text=text,
            )
            if added is not None:
                break
            if not await self._store.make(tenant_id, room, job_id, MOST_ROOMS):
                raise (
                    _missing(room)
                    if job_id
                    else Conflict(
                        f"There are {MOST_ROOMS:,} rooms, which is the most; one goes when its last message does."
                    )
                )
        message, new = added
        if message.text != text:
            raise KeyReused("This key came with another message before; use a new key for a new message.")
        if new:
            metrics.messages.inc()
            self._events.tell(group(tenant_id, room), told(message))
        return message, new

    async def starts(self, tenant_id: UUID, since: Mapping[str, int | None]) -> dict[str, Start]:
        """Where to begin in rooms, given the seq that is held of each, or None to begin with what comes. In one query.

        A room whose job does not exist is missing. Raises InvalidRequest for a name.
        """
        for room in since:
            check_name(room)
        extents = await self._store.extents(tenant_id, [(room, job_of(room)) for room in since]) if since else {}
        return {room: Start.of(since[room], *extent) for room, extent in extents.items()}

    async def newest(self, tenant_id: UUID, room: str) -> int:
        """The seq of the newest message. Raises InvalidRequest, NotFound."""
        start = (await self.starts(tenant_id, {room: None})).get(room)
        if start is None:
            raise _missing(room)
        return start.newest

    async def messages(self, tenant_id: UUID, room: str, *, after: int, limit: int) -> list[Message]:
        """What was said after a seq, oldest first."""
        return await self._store.messages(tenant_id, room, after=after, limit=limit)

    async def history(self, tenant_id: UUID, room: str, *, after: int, limit: int) -> tuple[list[Message], int]:
        """Messages after a seq, oldest first, and the newest seq. Raises InvalidRequest, NotFound."""
        newest = await self.newest(tenant_id, room)
        return await self.messages(tenant_id, room, after=after, limit=limit), newest

    async def missed(self, held: Sequence[tuple[UUID, str, int]]) -> list[tuple[UUID, Message]]:
        """What came after the seqs that are held of rooms, 200 of each at most, with the tenant. In one query."""
        return await self._store.missed(held, MISSED_AT_ONCE) if held else []

    async def list_rooms(self, tenant_id: UUID, before: tuple[datetime, str] | None, limit: int) -> list[Room]:
        """The room that was last spoken in first."""
        return await self._store.list_rooms(tenant_id, before, limit)


def _missing(room: str) -> NotFound:
    return NotFound(f"There is no job {room.removeprefix(JOB)}, and so no room of it.")
