"""What is kept no longer: ended jobs, by age and by number."""

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
# $1: tenant, $2: time, $3: how many
EXPIRED = """
SELECT id FROM jobs
WHERE tenant_id = $1 AND finished_at <= $2 AND NOT (
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


class RetentionStore:
    """Finds and deletes what is kept no longer."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def bounds(self, age: timedelta, most: int) -> list[tuple[UUID, datetime]]:
        """Each tenant, and the time up to which its ended jobs are to go."""
        return [(row["id"], row["bound"]) for row in await self._store.rows(BOUNDS, age, most)]

    async def expired(self, tenant_id: UUID, bound: datetime, limit: int) -> list[UUID]:
        return [row["id"] for row in await self._store.rows(EXPIRED, tenant_id, bound, limit)]

    async def delete(self, ids: Sequence[UUID]) -> int:
        """How many there were."""
        return len(await self._store.rows(DELETE, ids))
