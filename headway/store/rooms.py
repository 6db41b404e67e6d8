"""Rooms in Postgres: the records, and the SQL of their tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from headway.job import timestamp
from headway.store import Store

MESSAGE = "m.room, m.seq, m.id, m.author, m.text, m.created_at"

# Say something in a room. The lock on the room's row lets one at a time in, so seqs are committed in their order, and
# times with them. No row comes back if there is no such room, or no such job for a job's room.
# $1: tenant, $2: room, $3: the room's job or NULL, $4: id, $5: author, $6: key, $7: publish key or NULL, $8: text
PUBLISH = f"""
WITH said AS (
    SELECT m.* FROM messages m
    WHERE tenant_id = $1 AND room = $2 AND key_id = $6 AND author = $5 AND publish_key = $7
), counted AS (
    UPDATE rooms SET seq = seq + 1, last_at = clock_timestamp()
    WHERE tenant_id = $1 AND name = $2 AND NOT EXISTS (SELECT FROM said)
        AND ($3::uuid IS NULL OR EXISTS (SELECT FROM jobs WHERE id = $3 AND tenant_id = $1))
    RETURNING seq, last_at
), added AS (
    INSERT INTO messages (tenant_id, room, seq, id, author, key_id, publish_key, text, created_at)
    SELECT $1, $2, seq, $4, $5, $6, $7, $8, last_at FROM counted
    RETURNING *
)
SELECT {MESSAGE}, true AS new FROM added m UNION ALL SELECT {MESSAGE}, false FROM said m
"""

# Make a room, empty, unless it is there. One that comes back after it was forgotten counts on. No row comes back if
# there is no such job, or if there are too many rooms.
# $1: tenant, $2: room, $3: the room's job or NULL, $4: how many rooms there may be beside those of jobs
MAKE = """
INSERT INTO rooms (tenant_id, name, seq, last_at)
SELECT id, $2, rooms_seq, now() FROM tenants
WHERE id = $1 AND CASE
    WHEN $3::uuid IS NULL THEN (SELECT count(*) FROM rooms WHERE tenant_id = $1 AND name NOT LIKE 'job:%') < $4
    ELSE EXISTS (SELECT FROM jobs WHERE jobs.id = $3 AND jobs.tenant_id = $1)
END
ON CONFLICT (tenant_id, name) DO UPDATE SET name = excluded.name
RETURNING name
"""

# How far rooms are: the seqs of the newest message and of the oldest that is kept. A room whose job does not exist has
# no row. $1: tenant, $2: rooms, $3: their jobs or NULL
EXTENTS = """
SELECT asked.name, coalesce(
    (SELECT seq FROM rooms WHERE tenant_id = $1 AND name = asked.name),
    (SELECT rooms_seq FROM tenants WHERE id = $1)
) AS newest, (SELECT min(seq) FROM messages WHERE tenant_id = $1 AND room = asked.name) AS oldest
FROM unnest($2::text[], $3::uuid[]) AS asked (name, job_id)
WHERE asked.job_id IS NULL OR EXISTS (SELECT FROM jobs WHERE jobs.id = asked.job_id AND jobs.tenant_id = $1)
"""

# What was said in a room after a seq. $1: tenant, $2: room, $3: after seq, $4: how many
MESSAGES = f"""
SELECT {MESSAGE} FROM messages m WHERE tenant_id = $1 AND room = $2 AND seq > $3 ORDER BY seq LIMIT $4
"""

# The same for many rooms, of any tenants. $1: tenants, $2: rooms, $3: after seqs, $4: how many of each
MISSED = f"""
SELECT held.tenant_id, {MESSAGE}
FROM unnest($1::uuid[], $2::text[], $3::bigint[]) AS held (tenant_id, name, seq)
CROSS JOIN LATERAL (
    SELECT * FROM messages WHERE tenant_id = held.tenant_id AND room = held.name AND seq > held.seq
    ORDER BY seq LIMIT $4
) m
"""

# A tenant's rooms, the one that was last spoken in first. $1: tenant, $2 and $3: time and name before, $4: how many
LIST = """
SELECT name, seq, last_at FROM rooms
WHERE tenant_id = $1 AND ($2::timestamptz IS NULL OR (last_at, name) < ($2, $3))
ORDER BY last_at DESC, name DESC LIMIT $4
"""


@dataclass(frozen=True, slots=True)
class Message:
    """What was said in a room. `seq` counts a room's messages and leaves no number out."""

    room: str
    seq: int
    id: UUID
    author: str
    text: str
    created_at: datetime

    def as_json(self) -> dict[str, Any]:
        """The message as the API shows it; `data` and where it stands."""
        return {"room": self.room, "seq": self.seq, **self.data()}

    def data(self) -> dict[str, Any]:
        """What the frame `message` of a WebSocket says."""
        return {"message": self.text, "author": self.author, "at": timestamp(self.created_at), "id": str(self.id)}


@dataclass(frozen=True, slots=True)
class Room:
    """One row of `rooms`."""

    name: str
    seq: int
    last_at: datetime

    def as_json(self) -> dict[str, Any]:
        return {"room": self.name, "seq": self.seq, "last_at": timestamp(self.last_at)}


class RoomStore:
    """Adds and reads messages. `job_id` is that of a job's room, None for any other."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add(
        self,
        tenant_id: UUID,
        room: str,
        job_id: UUID | None,
        *,
        message_id: UUID,
        author: str,
        key_id: str,
        publish_key: str | None,
        text: str,
    ) -> tuple[Message, bool] | None:
        """The message, and whether it is new or a repeat; None if there is no such room or job."""
        values = tenant_id, room, job_id, message_id, author, key_id, publish_key, text
        while True:
            try:
                rows = await self._store.rows(PUBLISH, *values)
            except asyncpg.UniqueViolationError:
                # The same was said by another request while this one waited for its turn.
                continue
            return (_message(rows[0]), rows[0]["new"]) if rows else None

    async def make(self, tenant_id: UUID, room: str, job_id: UUID | None, most: int) -> bool:
        """Whether the room is there now; if not, its job is not, or there are `most` rooms."""
        return bool(await self._store.rows(MAKE, tenant_id, room, job_id, most))

    async def extents(
        self, tenant_id: UUID, rooms: Sequence[tuple[str, UUID | None]]
    ) -> dict[str, tuple[int, int | None]]:
        """The newest and the oldest seq of each room, given with its job; without that job the room is missing."""
        names, jobs = (list(column) for column in zip(*rooms, strict=True))
        rows = await self._store.rows(EXTENTS, tenant_id, names, jobs)
        return {row["name"]: (row["newest"], row["oldest"]) for row in rows}

    async def messages(self, tenant_id: UUID, room: str, *, after: int, limit: int) -> list[Message]:
        return [_message(row) for row in await self._store.rows(MESSAGES, tenant_id, room, after, limit)]

    async def missed(self, held: Sequence[tuple[UUID, str, int]], limit: int) -> list[tuple[UUID, Message]]:
        """What was said in rooms after the seqs that are held, `limit` of each at most, with the tenant."""
        tenants, names, seqs = (list(column) for column in zip(*held, strict=True))
        rows = await self._store.rows(MISSED, tenants, names, seqs, limit)
        return [(row["tenant_id"], _message(row)) for row in rows]

    async def list_rooms(self, tenant_id: UUID, before: tuple[datetime, str] | None, limit: int) -> list[Room]:
        at, name = before or (None, None)
        return [Room(**row) for row in await self._store.rows(LIST, tenant_id, at, name, limit)]


def _message(row: asyncpg.Record) -> Message:
    return Message(**{name: row[name] for name in Message.__slots__})
