"""What is kept no longer: ended jobs, by age and by number, and messages of rooms, by age."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from headway.store import Store

# For each tenant the time up to which ended jobs are to go. $1: age, $2: how many are kept
BOUNDS = """
SELECT id, greatest(
    now() - $1::interval,
    (
        SELECT finished_at FROM jobs WHERE tenant_id = tenants.id AND finished_at IS NOT NULL
        ORDER BY finished_at DESC OFFSET $2 LIMIT 1
    )
) AS bound
FROM tenants
"""

# Jobs of a tenant that ended up to a time, the oldest first. A child stays while its parent may still read its result.
# $1: tenant, $2: time, $3: how many, $4: those to leave out
EXPIRED = """
SELECT id FROM jobs
WHERE tenant_id = $1 AND finished_at <= $2 AND id <> ALL($4::uuid[]) AND NOT (
    parent_id IS NOT NULL AND EXISTS (SELECT FROM jobs p WHERE p.id = jobs.parent_id AND p.finished_at IS NULL)
)
ORDER BY finished_at LIMIT $3
"""

# Delete ended jobs with their events, failures and artifacts. $1: ids
DELETE = """
WITH gone AS (
    DELETE FROM jobs WHERE id = ANY($1::uuid[]) AND finished_at IS NOT NULL RETURNING id
), events AS (
    DELETE FROM events USING gone WHERE job_id = gone.id
), failures AS (
    DELETE FROM failures USING gone WHERE job_id = gone.id
), artifacts AS (
    DELETE FROM artifacts USING gone WHERE job_id = gone.id
)
SELECT id FROM gone
"""

# Delete messages of long ago, the oldest first; how many there were. $1: age, $2: how many
DELETE_MESSAGES = """
WITH gone AS (
    DELETE FROM messages m USING (
        SELECT tenant_id, room, seq FROM messages WHERE created_at < now() - $1::interval
        ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
    ) old
    WHERE m.tenant_id = old.tenant_id AND m.room = old.room AND m.seq = old.seq
    RETURNING 1
)
SELECT count(*) FROM gone
"""

# Forget rooms whose messages are all gone, and let new ones of their tenants count on from there; how many there were.
# $1: age, $2: how many
FORGET_ROOMS = """
WITH gone AS (
    DELETE FROM rooms r USING (
        SELECT tenant_id, name FROM rooms
        WHERE last_at < now() - $1::interval
            AND NOT EXISTS (SELECT FROM messages WHERE tenant_id = rooms.tenant_id AND room = rooms.name)
        ORDER BY last_at LIMIT $2 FOR UPDATE SKIP LOCKED
    ) old
    WHERE r.tenant_id = old.tenant_id AND r.name = old.name
    RETURNING r.tenant_id, r.seq
), counted AS (
    UPDATE tenants SET rooms_seq = greatest(rooms_seq, ended.seq)
    FROM (SELECT tenant_id, max(seq) AS seq FROM gone GROUP BY tenant_id) ended
    WHERE id = ended.tenant_id
)
SELECT count(*) FROM gone
"""


class RetentionStore:
    """Finds and deletes what is kept no longer."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def bounds(self, age: timedelta, most: int) -> list[tuple[UUID, datetime]]:
        """Each tenant, and the time up to which its ended jobs are to go."""
        return [(row["id"], row["bound"]) for row in await self._store.rows(BOUNDS, age, most)]

    async def expired(self, tenant_id: UUID, bound: datetime, limit: int, but: Sequence[UUID]) -> list[UUID]:
        """Those that are to go, the oldest first, `but` for some."""
        return [row["id"] for row in await self._store.rows(EXPIRED, tenant_id, bound, limit, but)]

    async def delete(self, ids: Sequence[UUID]) -> int:
        """How many there were."""
        return len(await self._store.rows(DELETE, ids))

    async def delete_messages(self, age: timedelta, limit: int) -> int:
        """How many there were."""
        return int((await self._store.rows(DELETE_MESSAGES, age, limit))[0]["count"])

    async def forget_rooms(self, age: timedelta, limit: int) -> int:
        """How many there were."""
        return int((await self._store.rows(FORGET_ROOMS, age, limit))[0]["count"])
