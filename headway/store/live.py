"""What live sessions read of single jobs: each with the events after a seq, for many sessions at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from headway.job import Event, Job
from headway.store import Store, as_job
from headway.store.sql import JOB

# Events of a job that one statement reads at most.
TAIL = 1000
# Bytes of inputs, results and events, about, past which they are left out of an answer.
MOST_BYTES = 4 << 20

# What every job is read with; input and result may be large.
SMALL = ", ".join(name for name in "".join(JOB.split()).split(",") if name not in ("input", "result"))

# Jobs, each with the durable events after `since`, if its epoch is the one that is held and `since` not from the
# future. Where that holds, or where the jobs before it fill the answer, input and result are left out.
# $1: ids, $2: tenants, $3: since of each, $4: epochs, $5: how many events of each, $6: bytes
FIND = f"""
WITH r AS (
    SELECT r.place, r.since, jobs.*, coalesce(r.epoch = jobs.epoch AND r.since BETWEEN 0 AND jobs.seq, false) AS fits
    FROM unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::int[]) WITH ORDINALITY
        AS r (job_id, owner_id, since, epoch, place)
    JOIN jobs ON jobs.id = r.job_id AND jobs.tenant_id = r.owner_id
), sized AS (
    SELECT *, coalesce(sum(CASE WHEN fits THEN 0 ELSE pg_column_size(input) + coalesce(pg_column_size(result), 0) END)
        OVER (ORDER BY place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) <= $6 AS whole
    FROM r
)
SELECT place, {SMALL}, fits, whole,
    CASE WHEN whole AND NOT fits THEN input END AS input, CASE WHEN whole AND NOT fits THEN result END AS result,
    CASE WHEN fits THEN ARRAY(
        SELECT jsonb_build_array(e.seq, e.type, e.data) FROM events e
        WHERE e.job_id = sized.id AND e.seq > sized.since ORDER BY e.seq LIMIT $5
    ) END AS tail
FROM sized
"""

# How far jobs are. $1: ids
SEQS = "SELECT id, epoch, seq FROM jobs WHERE id = ANY($1::uuid[])"


@dataclass(frozen=True, slots=True)
class Wish:
    """A job of a tenant, and what is held of it: `since` of an `epoch`, or nothing."""

    job_id: UUID
    tenant_id: UUID
    since: int | None = None
    epoch: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A job in the record. `tail` are the events after what is held, TAIL at most; None if they do not follow on.

    Without a tail the job is `whole`, unless the answer was full: then it is to be asked for again. With a tail it has
    neither input nor result.
    """

    job: Job
    whole: bool
    tail: list[Event] | None

    @property
    def ended(self) -> bool:
        """Whether the job has ended, and all of it is held."""
        return self.job.state.terminal and self.tail == []


class LiveStore:
    """Reads for live sessions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, wishes: Sequence[Wish]) -> list[Found | None]:
        """Each job that is wished for; None if the tenant has none of that id."""
        return found_of(wishes, await self._store.rows(FIND, *columns_of(wishes), TAIL, MOST_BYTES))

    async def seqs(self, ids: Iterable[UUID]) -> dict[UUID, tuple[int, int]]:
        """Epoch and newest seq of each of these jobs that there is."""
        return {row["id"]: (row["epoch"], row["seq"]) for row in await self._store.rows(SEQS, list(ids))}


def columns_of(wishes: Sequence[Wish]) -> tuple[list[Any], ...]:
    """The parameters of FIND that say what is wished for."""
    return tuple([getattr(wish, name) for wish in wishes] for name in ("job_id", "tenant_id", "since", "epoch"))


def found_of(wishes: Sequence[Wish], rows: Sequence[asyncpg.Record]) -> list[Found | None]:
    """The rows of FIND, each in the place of its wish."""
    found: list[Found | None] = [None] * len(wishes)
    for row in rows:
        job = as_job(row)
        tail = [Event(job.id, job.tenant_id, job.epoch, *event) for event in row["tail"]] if row["fits"] else None
        found[row["place"] - 1] = Found(job, row["whole"], tail)
    return found
