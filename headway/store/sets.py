"""What live sessions read of sets of jobs: what was committed since a snapshot of Postgres, exactly.

Every event has the transaction that wrote it. What a reader has seen is a snapshot; what is new to it are the events of
transactions that its snapshot does not see. So nothing is missed that commits late, and nothing is read twice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from headway.job import Event, Job
from headway.store import Store, as_job
from headway.store.cursor import Cursor, Snapshot
from headway.store.live import FIND, MOST_BYTES, SMALL, TAIL, Found, Wish, columns_of, found_of
from headway.store.sql import OPEN_STATES

# Events that a reader may be behind, and events of all tenants that are looked through for them.
MOST_BEHIND = 10_000
MOST_SCANNED = 100_000
# Open jobs of which a new set is told.
MOST_OPEN = 1000

# Which database this is: one that was restored or promoted counts its transactions anew.
DATABASE = """(
    SELECT left(encode(sha256(convert_to(concat_ws('/', system_identifier, timeline_id, d.oid), 'UTF8')), 'hex'), 12)
    FROM pg_control_system(), pg_control_checkpoint(), pg_database d WHERE d.datname = current_database()
)"""

NOW = f"SELECT pg_current_snapshot()::text AS upto, {DATABASE} AS database"


def _fresh(columns: str, until: str = "") -> str:
    """The events that a snapshot does not see, by its xmax $1 and its running transactions $2; $3 of each at most.

    Two ranges of the index: a transaction that runs for long makes nothing be read twice.
    """
    return f"""
    (SELECT {columns} FROM events WHERE xid >= $1::text::xid8 {until} ORDER BY xid LIMIT $3)
    UNION ALL
    (SELECT {columns} FROM events WHERE xid = ANY($2::text[]::xid8[]) LIMIT $3)"""


def _fits(first: int) -> str:
    """Whether a job is in a set: its tenant, kind, tag and parent are the parameters from `first` on."""
    tenant, kind, tag, parent = (f"${first + place}" for place in range(4))
    return f"""tenant_id = {tenant} AND ({kind}::text IS NULL OR kind = {kind})
        AND ({tag}::text IS NULL OR (tags @> ARRAY[{tag}] AND tags <> '{{}}'))
        AND ({parent}::uuid IS NULL OR parent_id = {parent})"""


# What was committed to tenants' jobs since a snapshot, in the order of jobs and seqs; the snapshot of now, and how many
# events of all tenants there were. Past so many bytes the data is left out.
# $1: xmax, $2: running, $3: how many events of all tenants, $4: tenants, $5: bytes
NEWS = f"""
WITH fresh AS MATERIALIZED ({_fresh("job_id, seq, type, data, xid")}
)
SELECT pg_current_snapshot()::text AS upto, {DATABASE} AS database, (SELECT count(*) FROM fresh) AS seen, n.*
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT job_id, f.seq, type, xid::text, tenant_id, kind, tags, parent_id, epoch,
        CASE WHEN sum(pg_column_size(data)) OVER (ORDER BY job_id, f.seq) <= $5 THEN data END AS data
    FROM fresh f JOIN jobs ON jobs.id = f.job_id WHERE tenant_id = ANY($4::uuid[])
    ORDER BY job_id, f.seq
) n ON true
"""

# Where the events of a set of jobs stand that were committed since a snapshot and are seen by another, or by now; those
# after a job and seq. With the bytes of each.
# $1: xmax, $2: running, $3: how many events of all tenants, $4: tenant, $5: kind, $6: tag, $7: parent,
# $8: the other snapshot, $9: its xmax, $10: job, $11: seq, $12: how many
MISSED = f"""
WITH fresh AS MATERIALIZED ({
    _fresh("job_id, seq, xid, pg_column_size(data) AS size", "AND ($9::text IS NULL OR xid < $9::text::xid8)")
}
)
SELECT coalesce($8::text::pg_snapshot, pg_current_snapshot())::text AS upto, {DATABASE} AS database,
    pg_snapshot_xmax(pg_current_snapshot())::text AS xmax, (SELECT count(*) FROM fresh) AS seen, n.*
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT job_id, f.seq, size FROM fresh f JOIN jobs ON jobs.id = f.job_id
    WHERE {_fits(4)}
        AND ($8::text IS NULL OR pg_visible_in_snapshot(xid, $8::text::pg_snapshot))
        AND ($10::uuid IS NULL OR (job_id, f.seq) > ($10, $11::bigint))
    ORDER BY job_id, f.seq LIMIT $12
) n ON true
"""

# Events by job and seq, in order. $1: jobs, $2: seqs
EVENTS_AT = """
SELECT k.job_id, tenant_id, epoch, k.seq, type, data
FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS k (job_id, seq, place)
JOIN events e ON e.job_id = k.job_id AND e.seq = k.seq JOIN jobs ON jobs.id = k.job_id
ORDER BY place
"""

# The newest open jobs of a set, and the snapshot that sees them so.
# $1: how many, $2: bytes past which input is left out, $3: tenant, $4: kind, $5: tag, $6: parent
OPEN_JOBS = f"""
WITH found AS (
    SELECT j.id FROM unnest(ARRAY{OPEN_STATES.replace("(", "[").replace(")", "]")}) AS s (state) CROSS JOIN LATERAL (
        SELECT id FROM jobs WHERE state = s.state AND state IN {OPEN_STATES} AND {_fits(3)} ORDER BY id DESC LIMIT $1
    ) j
    ORDER BY j.id DESC LIMIT $1
)
SELECT pg_current_snapshot()::text AS upto, {DATABASE} AS database, n.*
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT {SMALL}, NULL::jsonb AS result, whole, CASE WHEN whole THEN input END AS input FROM (
        SELECT jobs.*, sum(pg_column_size(input)) OVER (ORDER BY id DESC) <= $2 AS whole FROM jobs JOIN found USING (id)
    ) sized
    ORDER BY id
) n ON true
"""


# The newest progress of running jobs. $1: ids
PROGRESS = """
SELECT tenant_id, id, epoch, seq, progress FROM jobs WHERE id = ANY($1::uuid[]) AND progress IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs of a tenant are in a set: those that fit all that is not None."""

    tenant_id: UUID
    kind: str | None = None
    tag: str | None = None
    parent: UUID | None = None


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, and what sets its job is in. `xid` is the transaction that wrote it."""

    event: Event
    xid: int
    kind: str
    tags: Sequence[str]
    parent: UUID | None

    def fits(self, wanted: Filter) -> bool:
        """Whether it is of a job of the set. The tenant must be the same."""
        return (
            (wanted.kind is None or self.kind == wanted.kind)
            and (wanted.tag is None or wanted.tag in self.tags)
            and (wanted.parent is None or self.parent == wanted.parent)
        )


@dataclass(frozen=True, slots=True)
class News:
    """What happened up to a snapshot, and jobs as it sees them; None if it was too much for one answer."""

    database: str
    upto: Snapshot
    happenings: list[Happening] | None
    jobs: dict[UUID, Job]


@dataclass(frozen=True, slots=True)
class Missed:
    """Where the events stand that a reader has missed: job, seq and bytes of each.

    `void` says why they cannot be told: the cursor is of another database, or from the future, or too far behind.
    """

    database: str
    upto: Snapshot
    keys: list[tuple[UUID, int, int]]
    void: str | None

    def pages(self) -> Iterator[list[tuple[UUID, int, int]]]:
        """The keys in pages that may be read at once."""
        page: list[tuple[UUID, int, int]] = []
        size = 0
        for key in self.keys:
            if page and (len(page) == TAIL or size + key[2] > MOST_BYTES):
                yield page
                page, size = [], 0
            page.append(key)
            size += key[2]
        if page:
            yield page


class SetStore:
    """Reads for live sets."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def now(self) -> tuple[str, Snapshot]:
        """Which database this is, and what is committed."""
        [row] = await self._store.rows(NOW)
        return row["database"], Snapshot.parse(row["upto"])

    async def news(
        self, since: Snapshot, tenants: Sequence[UUID], unknown: Callable[[list[Happening]], Iterable[Wish]]
    ) -> News:
        """What was committed to tenants' jobs since a snapshot.

        `unknown` says which jobs are to be read as they were then; one that is too large is left out.
        """
        async with self._store.reading() as rows:
            found = await rows(NEWS, *_places(since), MOST_BEHIND + 1, tenants, 4 * MOST_BYTES)
            happenings = [_happening(row) for row in found if row["job_id"] is not None]
            database, upto = found[0]["database"], Snapshot.parse(found[0]["upto"])
            if found[0]["seen"] > MOST_BEHIND or any(h.event.data is None for h in happenings):
                return News(database, upto, None, {})
            wishes = list(unknown(happenings))
            jobs = found_of(wishes, await rows(FIND, *columns_of(wishes), 0, MOST_BYTES)) if wishes else []
        return News(database, upto, happenings, {one.job.id: one.job for one in jobs if one is not None and one.whole})

    async def missed(self, cursor: Cursor, wanted: Filter) -> Missed:
        """What the reader of a set has missed."""
        upto = cursor.upto
        rows = await self._store.rows(
            MISSED,
            *_places(cursor.since),
            MOST_SCANNED + 1,
            *(wanted.tenant_id, wanted.kind, wanted.tag, wanted.parent),
            *((upto.text, str(upto.xmax), cursor.job, cursor.seq) if upto else (None, None, None, None)),
            MOST_BEHIND + 1,
        )
        first = rows[0]
        keys = [(row["job_id"], row["seq"], row["size"]) for row in rows if row["job_id"] is not None]
        void = None
        if cursor.database != first["database"] or (upto or cursor.since).xmax > int(first["xmax"]):
            void = "cursor"
        elif first["seen"] > MOST_SCANNED or len(keys) > MOST_BEHIND:
            void = "retention"
        return Missed(first["database"], Snapshot.parse(first["upto"]), keys, void)

    async def events_at(self, keys: Sequence[tuple[UUID, int, int]]) -> list[Event]:
        """The events at these places that are still there."""
        rows = await self._store.rows(EVENTS_AT, [job_id for job_id, _, _ in keys], [seq for _, seq, _ in keys])
        return [_event(row) for row in rows]

    async def open_jobs(self, wanted: Filter) -> tuple[str, Snapshot, list[Found]]:
        """The newest open jobs of a set, oldest first; the database and the snapshot that this is of."""
        rows = await self._store.rows(
            OPEN_JOBS, MOST_OPEN, MOST_BYTES, wanted.tenant_id, wanted.kind, wanted.tag, wanted.parent
        )
        found = [Found(as_job(row), row["whole"], None) for row in rows if row["id"] is not None]
        return rows[0]["database"], Snapshot.parse(rows[0]["upto"]), found

    async def progress(self, ids: Iterable[UUID]) -> list[tuple[UUID, UUID, int, int, Any]]:
        """Tenant, id, epoch, newest seq and progress of those of these jobs that have any."""
        return [tuple(row) for row in await self._store.rows(PROGRESS, list(ids))]


def _places(snapshot: Snapshot) -> tuple[str, list[str]]:
    return str(snapshot.xmax), [str(xid) for xid in snapshot.running]


def _event(row: asyncpg.Record) -> Event:
    return Event(row["job_id"], row["tenant_id"], row["epoch"], row["seq"], row["type"], row["data"])


def _happening(row: asyncpg.Record) -> Happening:
    return Happening(_event(row), int(row["xid"]), row["kind"], row["tags"], row["parent_id"])
