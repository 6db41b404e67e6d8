"""Postgres, where everything is remembered. SQL is in `sql.py` and `reads.py`; here it meets records.

Only `headway.lifecycle` calls what changes a job.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg

from headway import metrics
from headway.errors import Conflict, JobError, KeyReused, LeaseLost
from headway.job import Artifact, Claim, Ending, Event, File, Job, Priority, timestamp
from headway.keys import LiveKey
from headway.states import JobState
from headway.store import reads, sql

# What a broken, absent or overloaded Postgres looks like. A statement that met one of these may or may not have run.
OUTAGES: tuple[type[BaseException], ...] = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # A statement that is begun between Postgres' last word on a connection and its end.
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
)
# What Postgres or its driver refuses because of the values it was given, and would refuse again.
REFUSALS: tuple[type[Exception], ...] = (
    ValueError,
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
)

# A tenant's concurrency key.
Key = tuple[UUID, str]
# A job, its position and, if its idempotency key was taken, the digest of the request that took it.
Submitted = tuple[Job, float, str | None]
# Runs a statement with its values.
Statement = Callable[..., Awaitable[list[asyncpg.Record]]]
REUSED = "This Idempotency-Key came with another request before; use a new key for a new job."
# How often a claim is run that meets another worker's at the same place of a concurrency key.
CLAIMS = 5


async def prepare(connection: asyncpg.Connection) -> None:
    """Read and write jsonb as Python values."""
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    # Postgres writes nothing around a value, for which `decode` would look twice.
    decode = json.JSONDecoder().raw_decode
    await connection.set_type_codec("jsonb", encoder=encode, decoder=lambda text: decode(text)[0], schema="pg_catalog")


async def keep(_: asyncpg.Connection) -> None:
    """Give a connection back as it is: nothing here changes a session, and asyncpg's reset is a round trip more."""


class Store:
    """Headway's tables, through one pool of connections."""

    def __init__(self, url: str, *, pool: int) -> None:
        self._url = url
        self._size = pool
        self._pool: asyncpg.Pool | None = None

    async def open(self) -> None:
        """Make the pool. It fills as it is used, so a Postgres that is away is no error yet."""
        self._pool = asyncpg.create_pool(
            self._url,
            min_size=0,
            max_size=self._size,
            init=prepare,
            reset=keep,
            timeout=3,
            command_timeout=10,
            server_settings={"timezone": "UTC", "application_name": "headway"},
        )
        await self._pool

    async def close(self) -> None:
        """Disconnect, within seconds also from a Postgres that does not answer."""
        if self._pool is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await self._pool.close()

    async def rows(self, statement: str, *values: Any) -> list[asyncpg.Record]:
        """Run one statement on a connection of the pool. Waits at most 5 s for one.

        Raises one of OUTAGES, or one of REFUSALS if the values do not fit.
        """
        assert self._pool is not None, "open() first"
        try:
            async with self._pool.acquire(timeout=5) as connection:
                return await connection.fetch(statement, *values)
        except OUTAGES as error:
            # asyncpg's error for a value that it cannot encode is of the class that says that a connection is closed.
            if isinstance(error, ValueError):
                raise ValueError(str(error)) from error  # noqa: TRY004
            metrics.database_failures.inc()
            raise

    def reading(self) -> AbstractAsyncContextManager[Statement]:
        """Several statements that see the same; what it yields is called as `rows` is. Raises one of OUTAGES."""
        return self._transaction(isolation="repeatable_read", readonly=True)

    @asynccontextmanager
    async def _transaction(self, **how: Any) -> AsyncIterator[Statement]:
        assert self._pool is not None, "open() first"
        try:
            async with self._pool.acquire(timeout=5) as connection, connection.transaction(**how):
                yield connection.fetch
        except OUTAGES:
            metrics.database_failures.inc()
            raise

    async def submit(self, jobs: Sequence[Mapping[str, Any]], *, together: bool = False) -> list[Submitted]:
        """For each job its row, its position and, if its idempotency key was taken, the digest of the first request.

        Raises LeaseLost for children of an attempt that is over; then none of `jobs` was written that is such a child.
        `together` all of them are written, or none: KeyReused if the key of one came with another request, Conflict if
        they were there before and some are deleted by now.
        """
        async with self._transaction() if together else nullcontext(self.rows) as statement:
            if together:
                # Who vanishes in the middle must not hold the keys.
                await statement("SET LOCAL idle_in_transaction_session_timeout = '5s'")
            rows: dict[UUID, Submitted] = {
                row["id"]: (as_job(row), row["position"], None) for row in await statement(sql.SUBMIT, jobs)
            }
            if missing := [job for job in jobs if UUID(job["id"]) not in rows]:
                rows |= await self.submitted_before(missing, statement)
            if together:
                _check_whole(jobs, [rows.get(UUID(job["id"])) for job in jobs])
        if gone := [job for job in missing if UUID(job["id"]) not in rows]:
            if any(job["parent_id"] for job in gone):
                raise LeaseLost("The attempt that submits children is over; another worker may have the job.")
            # The job that had the key was deleted meanwhile.
            written = await self.submit(gone, together=together)
            rows |= {UUID(job["id"]): row for job, row in zip(gone, written, strict=True)}
        return [rows[UUID(job["id"])] for job in jobs]

    async def submitted_before(
        self, jobs: Sequence[Mapping[str, Any]], statement: Statement | None = None
    ) -> dict[UUID, Submitted]:
        """Those of `jobs` that were submitted before, each by the id that it has now."""
        asked = [{name: job[name] for name in ("id", "tenant_id", "idempotency_key")} for job in jobs]
        return {
            row["asked"]: (as_job(row), row["position"], None if row["asked"] == row["id"] else row["request_digest"])
            for row in await (statement or self.rows)(sql.REPLAY, asked)
        }

    async def promote(self, limit: int, *, waiting: bool = False) -> list[tuple[Event, float, Key | None]]:
        """The event, position and concurrency key of each scheduled job that is due and now queued.

        With `waiting` those that waited for children, all of which have ended.
        """
        rows = await self.rows(sql.WAKE if waiting else sql.PROMOTE, limit)
        return [(_state_event(row, row["tenant_id"]), row["position"], _key(row)) for row in rows]

    async def claim(
        self, ids: Sequence[UUID], kinds: Sequence[str], worker: str, lease: timedelta
    ) -> tuple[list[tuple[Claim, Event, float]], list[Key]]:
        """This worker's jobs, each with its event and the seconds it waited, and the keys that had no place."""
        for _ in range(CLAIMS):
            try:
                rows = await self.rows(sql.CLAIM, ids, kinds, worker, lease)
            except asyncpg.UniqueViolationError:
                metrics.claims_repeated.inc()
                continue
            claims = [
                (_claim(row), _state_event(row, row["tenant_id"]), row["waited"])
                for row in rows
                if row["kind"] is not None
            ]
            return claims, [key for row in rows if row["kind"] is None and (key := _key(row))]
        # Nothing is lost: a scan finds the jobs again.
        return [], []

    async def unpark(self, keys: Sequence[Key]) -> list[tuple[UUID, float]]:
        """The id and position of each parked job that now stands in the queue."""
        tenants, names = zip(*keys, strict=True)
        return [(row["id"], row["position"]) for row in await self.rows(sql.UNPARK, tenants, names)]

    async def keys(self, after: Key, limit: int) -> list[Key]:
        """The next concurrency keys of queued jobs, in order."""
        return [key for row in await self.rows(sql.KEYS, *after, limit) if (key := _key(row))]

    async def ready(self, kinds: Sequence[str], limit: int, worker: str) -> list[UUID]:
        """What this worker may claim next."""
        return [row["id"] for row in await self.rows(sql.READY, kinds, limit, worker)]

    async def report(self, reports: Sequence[tuple[Claim, Mapping[str, Any]]]) -> list[tuple[Event, bool] | None]:
        """For each report its event and whether a cancel is asked for; None where the lease is lost."""
        records = [{"id": str(c.job_id), "token": c.token, "progress": progress} for c, progress in reports]
        rows = {(row["id"], row["token"]): row for row in await self.rows(sql.REPORT, records)}
        return [
            (
                Event(claim.job_id, claim.tenant_id, row["epoch"], row["seq"], "progress", progress),
                row["cancel_requested"],
            )
            if (row := rows.get((claim.job_id, claim.token)))
            else None
            for claim, progress in reports
        ]

    async def log(self, claim: Claim, message: str, level: str) -> Event | None:
        rows = await self.rows(sql.LOG, claim.job_id, claim.token, message, level)
        if not rows:
            return None
        return Event(claim.job_id, claim.tenant_id, rows[0]["epoch"], rows[0]["seq"], "log", rows[0]["data"])

    async def save_checkpoint(self, claim: Claim, value: Any) -> bool:
        return bool(await self.rows(sql.CHECKPOINT, claim.job_id, claim.token, value))

    async def finish(self, endings: Sequence[Ending]) -> list[Event | None]:
        """For each ending its event; None where the lease is lost."""
        records = [_finished(ending) for ending in endings]
        rows = {(row["id"], row["token"]): row for row in await self.rows(sql.FINISH, records)}
        return [
            _state_event(row, ending.claim.tenant_id)
            if (row := rows.get((ending.claim.job_id, ending.claim.token)))
            else None
            for ending in endings
        ]

    async def ended_by(self, ending: Ending) -> Event | None:
        """The event by which the attempt ended like this, if it did."""
        rows = await self.rows(sql.ENDED_BY, ending.claim.job_id, ending.claim.token, ending.state.value)
        return _state_event(rows[0], ending.claim.tenant_id) if rows else None

    async def release(self, claim: Claim) -> list[tuple[str, Event, float, Key | None]]:
        """The kind, event, position and concurrency key of the job, if the claim still holds."""
        return [_given_back(row) for row in await self.rows(sql.RELEASE, claim.job_id, claim.token)]

    async def release_unheld(
        self, worker: str, held: Sequence[tuple[UUID, int]]
    ) -> list[tuple[str, Event, float, Key | None]]:
        """The same of each job that runs under the name of a worker which holds only these jobs and tokens."""
        ids, tokens = [job_id for job_id, _ in held], [token for _, token in held]
        return [_given_back(row) for row in await self.rows(sql.RELEASE_UNHELD, worker, ids, tokens)]

    async def wait(self, claim: Claim, progress: Mapping[str, Any]) -> Event | None:
        rows = await self.rows(sql.WAIT, claim.job_id, claim.token, progress)
        return _state_event(rows[0], claim.tenant_id) if rows else None

    async def tally(self, ids: Sequence[UUID]) -> list[Event]:
        """The event of each waiting job whose progress changed."""
        rows = await self.rows(sql.TALLY, ids)
        return [
            Event(row["id"], row["tenant_id"], row["epoch"], row["seq"], "progress", row["progress"]) for row in rows
        ]

    async def rescue(
        self, most_crashes: int, error: JobError, limit: int
    ) -> list[tuple[str, Event, float, Key | None]]:
        """The kind, event, position and concurrency key of each job that was taken back from a worker that died."""
        rows = await self.rows(sql.RESCUE, most_crashes, error.as_json(), limit)
        return [_given_back(row) for row in rows]

    async def cancel_requested(self, ids: Sequence[UUID]) -> list[tuple[UUID, int]]:
        """Which of these running jobs are to be cancelled, each with the token of its attempt."""
        return [(row["id"], row["token"]) for row in await self.rows(sql.CANCEL_REQUESTED, ids)]

    async def cancel(self, ids: Sequence[UUID], tenant_id: UUID) -> list[tuple[Job, Event]]:
        """Each job that the request changed, and the event of it."""
        return [(as_job(row), _state_event(row, tenant_id)) for row in await self.rows(sql.CANCEL, ids, tenant_id)]

    async def get(self, job_id: UUID, tenant_id: UUID) -> Job | None:
        rows = await self.rows(reads.GET, job_id, tenant_id)
        return as_job(rows[0]) if rows else None

    async def list_jobs(
        self,
        tenant_id: UUID,
        *,
        before: UUID | None,
        state: JobState | None,
        kind: str | None,
        tag: str | None,
        parent: UUID | None = None,
        limit: int,
    ) -> list[Job]:
        asked = tenant_id, before, state.value if state else None, kind, parent, limit
        rows = await (self.rows(reads.LIST_TAGGED, *asked, tag) if tag is not None else self.rows(reads.LIST, *asked))
        return [as_job(row) for row in rows]

    async def events(self, job_id: UUID, tenant_id: UUID, *, after: int, limit: int) -> list[Event]:
        rows = await self.rows(reads.EVENTS, job_id, tenant_id, after, limit)
        return [Event(row["id"], tenant_id, row["epoch"], row["seq"], row["type"], row["data"]) for row in rows]

    async def artifacts(self, job_id: UUID, tenant_id: UUID) -> list[Artifact]:
        return [Artifact(**row) for row in await self.rows(reads.ARTIFACTS, job_id, tenant_id)]

    async def failures(self, job_id: UUID, tenant_id: UUID) -> list[dict[str, Any]]:
        """Why attempts failed, oldest first."""
        return [
            {"attempt": row["attempt"], "at": timestamp(row["at"]), "error": row["error"]}
            for row in await self.rows(reads.FAILURES, job_id, tenant_id)
        ]

    async def get_file(self, file_id: UUID, tenant_id: UUID) -> File | None:
        rows = await self.rows(reads.GET_FILE, file_id, tenant_id)
        return File(**rows[0]) if rows else None

    async def list_files(self, tenant_id: UUID, *, before: UUID | None, limit: int) -> list[File]:
        """Without their parts."""
        return [File(**row) for row in await self.rows(reads.LIST_FILES, tenant_id, before, limit)]

    async def live_keys(self, ids: Sequence[str]) -> dict[str, LiveKey]:
        """Those of the keys that are neither revoked nor expired."""
        return {row["id"]: LiveKey(**row) for row in await self.rows(reads.LIVE_KEYS, ids)}

    async def announce_kinds(self, kinds: Sequence[Mapping[str, Any]]) -> None:
        await self.rows(reads.ANNOUNCE_KINDS, kinds)

    async def tend_kinds(self, kinds: Sequence[str]) -> None:
        """Say that a worker still runs these, and let jobs of idle ones keep up; to be called every few seconds."""
        await self.rows(reads.KEEP_ANNOUNCED, kinds)
        await self.rows(sql.FOLLOW)

    async def kinds(self) -> list[dict[str, Any]]:
        return [dict(row) for row in await self.rows(reads.KINDS)]

    async def open_jobs(self) -> tuple[dict[str, int], float]:
        """How many jobs are open, by state, and the age of the oldest that is queued."""
        rows = await self.rows(reads.OPEN)
        return {row["state"]: row["jobs"] for row in rows}, max((row["oldest"] for row in rows), default=0.0)

    async def ready_check(self) -> bool:
        """Whether Postgres takes writes and the schema is there."""
        return bool((await self.rows(reads.READY_CHECK))[0][0])


def as_job(row: asyncpg.Record) -> Job:
    """A row with the columns of `sql.JOB`."""
    values = {name: row[name] for name in Job.__slots__}
    return Job(
        **{
            **values,
            "state": JobState(row["state"]),
            "tags": tuple(row["tags"]),
            "priority": Priority(row["priority"]),
        }
    )


def _check_whole(jobs: Sequence[Mapping[str, Any]], rows: Sequence[Submitted | None]) -> None:
    """Raises KeyReused or Conflict if not all of `rows` were written by one request, of this one's jobs."""
    first = [row[2] if row else None for row in rows]
    if any(digest not in (None, job["digest"]) for job, digest in zip(jobs, first, strict=True)):
        raise KeyReused(REUSED)
    if any(first) and not all(first):
        raise Conflict("This request was done before, and some of its jobs are deleted by now; use a new key.")


def _claim(row: asyncpg.Record) -> Claim:
    return Claim(job_id=row["id"], **{name: row[name] for name in Claim.__slots__ if name != "job_id"})


def _finished(ending: Ending) -> dict[str, Any]:
    """An ending as FINISH takes it: what is None is left out."""
    given = {
        "result": ending.result,
        "error": ending.error,
        "failure": ending.failure,
        "delay": ending.delay,
        "progress": ending.progress,
        "artifacts": [asdict(artifact) for artifact in ending.artifacts] or None,
    }
    return {
        "id": str(ending.claim.job_id),
        "token": ending.claim.token,
        "state": ending.state.value,
        **{name: value for name, value in given.items() if value is not None},
    }


def _key(row: asyncpg.Record) -> Key | None:
    return (row["tenant_id"], row["concurrency_key"]) if row["concurrency_key"] is not None else None


def _given_back(row: asyncpg.Record) -> tuple[str, Event, float, Key | None]:
    return row["kind"], _state_event(row, row["tenant_id"]), row["position"], _key(row)


def _state_event(row: asyncpg.Record, tenant_id: UUID) -> Event:
    return Event(row["id"], tenant_id, row["epoch"], row["seq"], "state", row["data"])
