"""Groups in Postgres: a parent, its children, and what becomes of both."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from headway.job import ChildEnding
from headway.states import JobState
from headway.store import Store
from headway.store.sql import OPEN_STATES

# The children that were submitted under these keys. $1: tenant, $2: idempotency keys, in order
CHILDREN = """
SELECT k.number, jobs.id, jobs.kind, jobs.state, jobs.result, jobs.error
FROM unnest($2::text[]) WITH ORDINALITY AS k (key, number)
JOIN jobs ON jobs.tenant_id = $1 AND jobs.idempotency_key = k.key
ORDER BY k.number
"""

# Jobs that wait for their children. $1: the id after which to begin, $2: how many
WAITING = """
SELECT id FROM jobs WHERE state = 'scheduled' AND run_at IS NULL AND id > $1 ORDER BY id LIMIT $2
"""

# The open children of jobs that were cancelled or failed. Of each parent the index gives one row first.
# $1: how many
ORPHANS = f"""
WITH RECURSIVE p AS (
    (SELECT parent_id FROM jobs WHERE parent_id IS NOT NULL AND state IN {OPEN_STATES} ORDER BY parent_id LIMIT 1)
    UNION ALL
    SELECT following.* FROM p CROSS JOIN LATERAL (
        SELECT parent_id FROM jobs WHERE parent_id > p.parent_id AND state IN {OPEN_STATES} ORDER BY parent_id LIMIT 1
    ) following
)
SELECT c.id, c.tenant_id
FROM p JOIN jobs ON jobs.id = p.parent_id AND jobs.state IN ('cancelled', 'failed')
CROSS JOIN LATERAL (
    SELECT id, tenant_id FROM jobs
    WHERE parent_id = p.parent_id AND state IN {OPEN_STATES} AND cancel_requested_at IS NULL LIMIT $1
) c
LIMIT $1
"""


class GroupStore:
    """What is read of groups."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def children(self, tenant_id: UUID, keys: Sequence[str]) -> dict[int, ChildEnding]:
        """By their place in `keys`, from 0, the children that there are."""
        return {
            row["number"] - 1: ChildEnding(
                row["id"], row["kind"], JobState(row["state"]), result=row["result"], error=row["error"]
            )
            for row in await self._store.rows(CHILDREN, tenant_id, keys)
        }

    async def waiting(self, after: UUID, limit: int) -> list[UUID]:
        """The next jobs that wait for their children, in order."""
        return [row["id"] for row in await self._store.rows(WAITING, after, limit)]

    async def orphans(self, limit: int) -> list[tuple[UUID, UUID]]:
        """Id and tenant of open children whose parent was cancelled or failed."""
        return [(row["id"], row["tenant_id"]) for row in await self._store.rows(ORPHANS, limit)]

    async def kinds(self) -> dict[str, dict[str, Any]]:
        """The announced kinds by name."""
        return {kind["name"]: kind for kind in await self._store.kinds()}
