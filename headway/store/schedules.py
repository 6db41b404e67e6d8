"""Schedules in Postgres: the record, and the SQL of its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NoReturn
from uuid import UUID

import asyncpg

from headway.errors import Conflict
from headway.job import DEFAULTED, Priority, timestamp
from headway.store import Store

CatchUp = Literal["skip", "one", "all"]

# Every schedule is read with the database's clock, and with what its kind says of jobs that do not say it themselves.
# A kind that was never announced has no say; its jobs wait for a worker that knows it.
SCHEDULE = """
    s.id, s.tenant_id, s.name, s.cron, s.timezone, s.catch_up, s.job, s.next_at, s.paused_at, s.created_at,
    coalesce((s.job ->> 'timeout')::float8, kinds.timeout, 3600) AS timeout,
    coalesce((s.job ->> 'max_attempts')::int, kinds.max_attempts, 1) AS max_attempts, now() AS read_at"""
KINDS = "LEFT JOIN kinds ON kinds.name = s.job ->> 'kind'"

# The database's clock, and how many schedules a tenant has. $1: tenant
ROOM = "SELECT now() AS now, count(*) AS schedules FROM schedules WHERE tenant_id = $1"

# No row comes back if the name is taken.
# $1: id, $2: tenant, $3: name, $4: cron, $5: time zone, $6: catch-up, $7: job, $8: next slot
ADD = f"""
WITH s AS (
    INSERT INTO schedules (id, tenant_id, name, cron, timezone, catch_up, job, next_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
    ON CONFLICT (tenant_id, name) DO NOTHING RETURNING *
)
SELECT {SCHEDULE} FROM s {KINDS}
"""

# $1: id, $2: tenant
GET = f"SELECT {SCHEDULE} FROM schedules s {KINDS} WHERE s.id = $1 AND s.tenant_id = $2"

# By name. $1: tenant, $2: how many
LIST = f"SELECT {SCHEDULE} FROM schedules s {KINDS} WHERE s.tenant_id = $1 ORDER BY s.name LIMIT $2"

# Change what is not NULL. The next slot belongs to the times that it was computed from, so no row matches if these, or
# the slot, changed meanwhile.
# $1: id, $2: tenant, $3: name, $4: catch-up, $5: job, $6: cron, $7: time zone, $8: next slot, $9 to $11: these three as
# they were read
CHANGE = f"""
WITH s AS (
    UPDATE schedules SET
        name = coalesce($3, name), catch_up = coalesce($4, catch_up), job = coalesce($5::jsonb, job),
        cron = $6, timezone = $7, next_at = $8
    WHERE id = $1 AND tenant_id = $2 AND cron = $9 AND timezone = $10 AND next_at = $11
    RETURNING *
)
SELECT {SCHEDULE} FROM s {KINDS}
"""

# $1: id, $2: tenant
PAUSE = f"""
WITH s AS (
    UPDATE schedules SET paused_at = coalesce(paused_at, now()) WHERE id = $1 AND tenant_id = $2 RETURNING *
)
SELECT {SCHEDULE} FROM s {KINDS}
"""

# Go on from the next slot, if it is still paused and its times are those that the slot was computed from.
# $1: id, $2: tenant, $3: next slot, $4: cron, $5: time zone
RESUME = f"""
WITH s AS (
    UPDATE schedules SET paused_at = NULL, next_at = $3
    WHERE id = $1 AND tenant_id = $2 AND paused_at IS NOT NULL AND cron = $4 AND timezone = $5
    RETURNING *
)
SELECT {SCHEDULE} FROM s {KINDS}
"""

# $1: id, $2: tenant
DELETE = "DELETE FROM schedules WHERE id = $1 AND tenant_id = $2 RETURNING id"

# The schedules that have a slot to submit, the one that is latest first. $1: how many
DUE = f"""
SELECT {SCHEDULE} FROM schedules s {KINDS} WHERE s.next_at <= now() AND s.paused_at IS NULL ORDER BY s.next_at LIMIT $1
"""

# Go on to the next slot where nobody else did, and nobody paused, changed or deleted the schedule.
# $1: [{id, cron, timezone, was, next_at}]
MOVE = """
WITH held AS (
    SELECT s.id, r.next_at FROM schedules s
    JOIN jsonb_to_recordset($1::jsonb) AS r (id uuid, cron text, timezone text, was timestamptz, next_at timestamptz)
        ON r.id = s.id AND r.cron = s.cron AND r.timezone = s.timezone AND r.was = s.next_at
    WHERE s.paused_at IS NULL ORDER BY s.id FOR NO KEY UPDATE OF s
)
UPDATE schedules SET next_at = held.next_at FROM held WHERE schedules.id = held.id RETURNING schedules.id
"""


@dataclass(frozen=True, slots=True)
class Schedule:
    """One row of `schedules`. `read_at` is the database's clock as it was read; all slots before `next_at` are done."""

    id: UUID
    tenant_id: UUID
    name: str
    cron: str
    timezone: str
    catch_up: CatchUp
    job: dict[str, Any]
    next_at: datetime
    paused_at: datetime | None
    created_at: datetime
    timeout: float
    max_attempts: int
    read_at: datetime

    def as_json(self) -> dict[str, Any]:
        """The schedule as the API shows it. One that is paused has no next slot."""
        return {
            "id": str(self.id),
            "name": self.name,
            "cron": self.cron,
            "timezone": self.timezone,
            "catch_up": self.catch_up,
            "job": self.job,
            "next_at": None if self.paused_at else timestamp(self.next_at),
            "paused_at": timestamp(self.paused_at),
            "created_at": timestamp(self.created_at),
        }

    def new_job(self) -> dict[str, Any]:
        """The fields of the NewJob that this schedule submits. The tag `schedule:NAME` finds its jobs."""
        own, tags = f"schedule:{self.name}", self.job.get("tags", [])
        return {
            "tenant_id": self.tenant_id,
            "kind": self.job["kind"],
            "input": self.job["input"],
            "tags": tags if own in tags else [*tags, own],
            "priority": Priority[self.job.get("priority", "normal").upper()],
            "timeout": self.timeout,
            "max_attempts": self.max_attempts,
            "concurrency_key": self.job.get("concurrency_key"),
            "concurrency_limit": self.job.get("concurrency_limit", 1),
            "left_out": [name for name in DEFAULTED if self.job.get(name) is None],
        }


class ScheduleStore:
    """The table of schedules. What no row answers is not there, not the tenant's, or no longer as it was read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def room(self, tenant_id: UUID) -> tuple[datetime, int]:
        """The database's clock, and how many schedules the tenant has."""
        [row] = await self._store.rows(ROOM, tenant_id)
        return row["now"], row["schedules"]

    async def add(
        self,
        schedule_id: UUID,
        tenant_id: UUID,
        *,
        name: str,
        cron: str,
        timezone: str,
        catch_up: CatchUp,
        job: dict[str, Any],
        next_at: datetime,
    ) -> Schedule:
        """Raises Conflict if the tenant has a schedule of this name."""
        rows = await self._store.rows(ADD, schedule_id, tenant_id, name, cron, timezone, catch_up, job, next_at)
        return _first(rows) or _taken(name)

    async def get(self, schedule_id: UUID, tenant_id: UUID) -> Schedule | None:
        return _first(await self._store.rows(GET, schedule_id, tenant_id))

    async def list_schedules(self, tenant_id: UUID, limit: int) -> list[Schedule]:
        return [Schedule(**row) for row in await self._store.rows(LIST, tenant_id, limit)]

    async def change(
        self,
        schedule: Schedule,
        *,
        name: str | None,
        catch_up: CatchUp | None,
        job: dict[str, Any] | None,
        cron: str,
        timezone: str,
        next_at: datetime,
    ) -> Schedule | None:
        """None leaves name, catch-up and job as they are. Raises Conflict if the name is another schedule's."""
        was = schedule.cron, schedule.timezone, schedule.next_at
        values = name, catch_up, job, cron, timezone, next_at
        try:
            return _first(await self._store.rows(CHANGE, schedule.id, schedule.tenant_id, *values, *was))
        except asyncpg.UniqueViolationError:
            _taken(name)

    async def pause(self, schedule_id: UUID, tenant_id: UUID) -> Schedule | None:
        return _first(await self._store.rows(PAUSE, schedule_id, tenant_id))

    async def resume(self, schedule: Schedule, next_at: datetime) -> Schedule | None:
        values = schedule.id, schedule.tenant_id, next_at, schedule.cron, schedule.timezone
        return _first(await self._store.rows(RESUME, *values))

    async def delete(self, schedule_id: UUID, tenant_id: UUID) -> bool:
        return bool(await self._store.rows(DELETE, schedule_id, tenant_id))

    async def due(self, limit: int) -> Sequence[Schedule]:
        """The schedules that have a slot to submit."""
        return [Schedule(**row) for row in await self._store.rows(DUE, limit)]

    async def move(self, following: Sequence[tuple[Schedule, datetime]]) -> set[UUID]:
        """Go on to the slot beside each schedule; which of them did."""
        records = [
            {
                "id": str(schedule.id),
                "cron": schedule.cron,
                "timezone": schedule.timezone,
                "was": schedule.next_at.isoformat(),
                "next_at": next_at.isoformat(),
            }
            for schedule, next_at in following
        ]
        return {row["id"] for row in await self._store.rows(MOVE, records)}


def _first(rows: Sequence[asyncpg.Record]) -> Schedule | None:
    return Schedule(**rows[0]) if rows else None


def _taken(name: str | None) -> NoReturn:
    raise Conflict(f"There is a schedule {name!r} already; change that one, or choose another name.")
