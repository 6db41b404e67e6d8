"""What the hot statements read when a hundred thousand jobs have ended: never all of them."""

import json
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
import pytest_asyncio
from psycopg.sql import Literal
from psycopg.types.json import Json
from uuid_utils.compat import uuid7

from headway.embedded import Embedded
from headway.lifecycle import FIRST_KEY
from headway.store import files, groups, live, reads, retention, rooms, sets, sql
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.integration.test_concurrency import announce

FINISHED = 100_000
OPEN = 50
# Jobs that stand aside for their concurrency key.
PARKED = 5_000
# A worker of 100 slots and a page of jobs read a few blocks each; a hundred thousand jobs are thousands of them.
MOST_BLOCKS = 700

# Finished jobs of 21 tenants, the first with most of them; one in a thousand has failed, one is tagged.
HISTORY = """
INSERT INTO jobs (id, tenant_id, kind, state, input, tags, timeout, attempt, token, created_at, started_at,
    finished_at, progress, result, seq)
SELECT uuidv7(make_interval(secs => n - 200000)), CASE WHEN n % 5 = 0 THEN others[1 + n % 20] ELSE $1 END,
    CASE WHEN n % 500 = 1 THEN 'rare.kind' ELSE 'test.call' END,
    CASE WHEN n % 1000 = 3 THEN 'failed' ELSE 'succeeded' END,
    '{"rows": 1000}',
    CASE WHEN n % 1000 = 2 THEN ARRAY['nightly'] WHEN n % 3 = 0 THEN ARRAY['tag ' || n % 100] ELSE '{}' END,
    60, 1, 1, now(), now(), now(), '{"done": 1}', '{"rows": 1000}', 3
FROM generate_series(1, $2::int) n, (SELECT array_agg(id) AS others FROM tenants WHERE id <> $1)
"""

# Whole files, every tenth of them an upload that is not whole yet, and a few that are over.
FILES = """
INSERT INTO files (id, tenant_id, name, content_type, size, sha256, expires_at, parts, received, tidied)
SELECT uuidv7(make_interval(secs => n - 200000)), $1, 'a', 'a/b', 10, CASE WHEN n % 10 <> 0 THEN 'x' END,
    now() + make_interval(secs => n - 20), '[]', 0, n % 1000 <> 1 FROM generate_series(1, 20000) n
"""

BACKLOG = """
INSERT INTO jobs (id, tenant_id, kind, state, input, timeout, position, concurrency_key, parked, seq)
SELECT uuidv7(), $1, 'test.call', 'queued', '{}', 60, n, 'key ' || n % 10, true, 1 FROM generate_series(1, $2::int) n
"""

# Rooms of the first tenant, a few of them idle for long, with as many messages each.
ROOMS = """
INSERT INTO rooms (tenant_id, name, seq, last_at)
SELECT $1, 'room-' || n, CASE WHEN n % 500 = 0 THEN 0 ELSE 50 END, now() - n * interval '1 minute'
FROM generate_series(1, 2000) n
"""
MESSAGES = """
INSERT INTO messages (tenant_id, room, seq, id, author, key_id, publish_key, text, created_at)
SELECT $1, 'room-' || n, seq, gen_random_uuid(), 'ada', 'key', seq, 'hi', now() - (n + 50 - seq) * interval '1 minute'
FROM generate_series(1, 2000) n, generate_series(1, 50) seq WHERE n % 500 <> 0
"""
LARGE = ("jobs", "job_tags", "events", "rooms", "messages", "files")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("plans")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(servers: Embedded, folder: Path) -> AsyncIterator[Engine]:
    """Jobs of long ago, and a few that are open."""
    async with make_engine(servers, folder) as engine:
        await announce(engine, "test.call", "rare.kind")
        await engine.database.execute(FILES, engine.tenant.id)
        await engine.database.execute(
            "INSERT INTO tenants (id, name) SELECT uuidv7(), 'tenant-' || n FROM generate_series(1, 20) n"
        )
        await engine.database.execute(HISTORY, engine.tenant.id, FINISHED)
        await engine.database.execute(BACKLOG, engine.tenant.id, PARKED)
        await engine.database.execute(
            "INSERT INTO events (job_id, seq, type, data, xid) "
            "SELECT id, 3, 'state', '{\"state\": \"succeeded\"}', '1' FROM jobs WHERE state = 'succeeded'"
        )
        ids = [await engine.submit_kind("test.call", {}) for _ in range(OPEN)]
        await engine.lifecycle.claim(ids[: OPEN // 2], ["test.call"], "a worker")
        # However long the tests take.
        await engine.database.execute(
            "UPDATE jobs SET lease_expires_at = now() + interval '1 hour' WHERE state = 'running'"
        )
        await engine.database.execute(ROOMS, engine.tenant.id)
        await engine.database.execute(MESSAGES, engine.tenant.id)
        # Of every row: what a sample says of rare ones differs each time, and with it the plan.
        await engine.database.execute("SET default_statistics_target = 400")
        await engine.database.execute("VACUUM ANALYZE jobs, job_tags, events, rooms, messages, files")
        yield engine
        # The database is shared, and to delete them one by one takes a while.
        await engine.database.execute("TRUNCATE jobs, job_tags, events, artifacts, rooms, messages, files")


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes(part)


@pytest.fixture(scope="module")
def planning(engine: Engine) -> Iterator[psycopg.Connection]:
    with psycopg.connect(engine.settings.database_url.get_secret_value()) as connection:
        yield connection


def explain(planning: psycopg.Connection, statement: str, *values: Any) -> None:
    """Fail if the statement, run with these values, scans a large table or reads many blocks of it. Undoes its work.

    That must hold for its first run, which is planned for its values, and for the tenth, which Postgres may not have.
    """
    execute = "EXECUTE it"
    if values:
        execute += f" ({', '.join(Literal(_literal(value)).as_string(planning) for value in values)})"
    try:
        planning.execute(f"PREPARE it AS {statement}")
        for _ in range(10):
            planning.execute("SAVEPOINT before")
            [explained] = planning.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {execute}").fetchone()[0]
            planning.execute("ROLLBACK TO before")
            shown = json.dumps(explained, indent=1)
            for node in nodes(explained["Plan"]):
                if node.get("Relation Name") in LARGE:
                    assert node["Node Type"] != "Seq Scan", shown
                    assert node.get("Rows Removed by Filter", 0) <= 1000, shown
            blocks = explained["Plan"]["Shared Hit Blocks"] + explained["Plan"]["Shared Read Blocks"]
            assert blocks <= MOST_BLOCKS, f"{blocks} blocks: {shown}"
    finally:
        planning.rollback()
        planning.execute("DEALLOCATE ALL")
        planning.rollback()


def _literal(value: Any) -> Any:
    return (
        Json(value)
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict))
        else value
    )


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def ids(engine: Engine, state: str) -> list[UUID]:
    return [
        row["id"]
        for row in await engine.database.fetch("SELECT id FROM jobs WHERE state = $1 AND NOT parked LIMIT 20", state)
    ]


async def test_claim(engine: Engine, planning: psycopg.Connection) -> None:
    queued = await ids(engine, "queued")
    explain(planning, sql.CLAIM, queued, ["test.call"], "a worker", timedelta(seconds=15))
    # Most of these have no place.
    parked = [row["id"] for row in await engine.database.fetch("SELECT id FROM jobs WHERE parked LIMIT 20")]
    explain(planning, sql.CLAIM, parked, ["test.call"], "a worker", timedelta(seconds=15))


async def test_ready(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, sql.READY, ["test.call"], 20, "a worker")
    explain(planning, sql.READY, ["kind.of_no_job"], 20, "a worker")


async def test_promote(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, sql.PROMOTE, 500)


async def test_concurrency_keys(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, sql.KEYS, *FIRST_KEY, 500)
    explain(planning, sql.UNPARK, [engine.tenant.id] * 10, [f"key {n}" for n in range(10)])


async def test_idle_kinds(engine: Engine, planning: psycopg.Connection) -> None:
    await engine.database.execute("UPDATE kinds SET paused_at = now() WHERE name = 'rare.kind'")
    explain(planning, sql.FOLLOW)
    await engine.database.execute("UPDATE kinds SET paused_at = NULL")


async def test_submit(engine: Engine, planning: psycopg.Connection) -> None:
    record = {"tenant_id": str(engine.tenant.id), "kind": "test.call", "input": {}, "tags": [], "priority": 1}
    record |= {"timeout": 60, "max_attempts": 1, "concurrency_limit": 1, "depth": 0}
    explain(planning, sql.SUBMIT, [record | {"id": str(uuid7()), "concurrency_key": key} for key in (None, "key 1")])


async def test_groups(engine: Engine, planning: psycopg.Connection) -> None:
    [parent, *others] = await ids(engine, "queued")
    key = f"child {parent} 0"
    await engine.database.execute(
        "UPDATE jobs SET state = 'scheduled', run_at = NULL, progress = '{\"done\": 0, \"total\": 9}' WHERE id = $1",
        parent,
    )
    await engine.database.execute("UPDATE jobs SET parent_id = $1 WHERE id = ANY($2)", parent, others)
    explain(planning, groups.WAITING, UUID(int=0), 50)
    explain(planning, sql.TALLY, [parent])
    explain(planning, sql.WAKE, 1000)
    explain(planning, groups.ORPHANS, 500)
    explain(planning, groups.CHILDREN, engine.tenant.id, [key] * 100)
    explain(planning, reads.LIST, engine.tenant.id, None, None, None, parent, 51)


async def test_rescue(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, sql.RESCUE, 3, {"type": "crashed"}, 100)


async def test_cancel_requested(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, sql.CANCEL_REQUESTED, await ids(engine, "running"))


async def test_open(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, reads.OPEN)


async def test_report_renew_and_finish(engine: Engine, planning: psycopg.Connection) -> None:
    running = await ids(engine, "running")
    records = [{"id": str(job_id), "token": 1, "progress": {}} for job_id in running]
    explain(planning, sql.REPORT, records)
    explain(planning, sql.RENEW, running, [1] * len(running), timedelta(seconds=15))
    explain(planning, sql.RENEW_CLAIMED, "a worker", running[1:], timedelta(seconds=15))
    endings = [record | {"state": "succeeded", "artifacts": []} for record in records]
    explain(planning, sql.FINISH, endings)


@pytest.mark.parametrize(
    ("state", "kind", "tag"),
    [
        (None, None, None),
        ("failed", None, None),
        ("running", None, None),
        ("cancelled", None, None),
        (None, "rare.kind", None),
        (None, "kind.of_no_job", None),
        ("failed", "test.call", None),
        (None, None, "nightly"),
        ("failed", None, "of no job"),
    ],
)
async def test_list(
    engine: Engine, planning: psycopg.Connection, state: str | None, kind: str | None, tag: str | None
) -> None:
    middle = await engine.database.fetchval("SELECT id FROM jobs ORDER BY id OFFSET 50000 LIMIT 1")
    for before in (None, middle):
        asked = engine.tenant.id, before, state, kind, None, 51
        if tag is None:
            explain(planning, reads.LIST, *asked)
        else:
            explain(planning, reads.LIST_TAGGED, *asked, tag)


async def test_rooms(engine: Engine, planning: psycopg.Connection) -> None:
    tenant, [job, *_] = engine.tenant.id, await ids(engine, "queued")
    for room, job_id, key in (
        ("room-7", None, None),
        ("room-7", None, "50"),
        ("room-7", None, "51"),
        ("none", job, None),
    ):
        explain(planning, rooms.PUBLISH, tenant, room, job_id, uuid7(), "ada", "key", key, "hi")
    explain(planning, rooms.MAKE, tenant, f"job:{job}", job, 10_000)
    explain(planning, rooms.EXTENTS, tenant, ["room-7", "none", f"job:{job}"], [None, None, job])
    explain(planning, rooms.MESSAGES, tenant, "room-7", 40, 100)
    explain(planning, rooms.MISSED, [tenant] * 50, [f"room-{n}" for n in range(1, 51)], [49] * 50, 200)
    for before in ((None, None), (datetime.now(UTC) - timedelta(hours=10), "room-600")):
        explain(planning, rooms.LIST, tenant, *before, 51)
    explain(planning, retention.DELETE_MESSAGES, timedelta(minutes=2040), 100)
    explain(planning, retention.FORGET_ROOMS, timedelta(minutes=1990), 100)


async def test_followed_jobs(engine: Engine, planning: psycopg.Connection) -> None:
    followed = await ids(engine, "running")
    tenants = [engine.tenant.id] * len(followed)
    none = [None] * len(followed)
    explain(planning, live.FIND, followed, tenants, none, none, live.TAIL, live.MOST_BYTES)
    explain(
        planning, live.FIND, followed, tenants, [1] * len(followed), [1] * len(followed), live.TAIL, live.MOST_BYTES
    )
    explain(planning, live.SEQS, followed)
    explain(planning, sets.PROGRESS, followed)


async def test_sets(engine: Engine, planning: psycopg.Connection) -> None:
    tenant_id = engine.tenant.id
    before = await engine.database.fetchval("SELECT pg_current_snapshot()::text")
    for _ in range(20):
        await engine.submit_kind("test.call", {})
    xmax = before.split(":")[1]
    explain(planning, sets.NEWS, xmax, [], sets.MOST_BEHIND + 1, [tenant_id], live.MOST_BYTES)
    explain(planning, sets.NEWS, xmax, ["5", "7"], sets.MOST_BEHIND + 1, [tenant_id], live.MOST_BYTES)
    wanted: list[tuple[Any, Any, Any]] = [(None, None, None), ("rare.kind", None, None), (None, "nightly", None)]
    for kind, tag, parent in wanted:
        missed = [xmax, ["5"], sets.MOST_SCANNED + 1, tenant_id, kind, tag, parent, None, None, None, None]
        explain(planning, sets.MISSED, *missed, sets.MOST_BEHIND + 1)
        explain(planning, sets.OPEN_JOBS, 50, live.MOST_BYTES, tenant_id, kind, tag, parent)
    explain(planning, sets.EVENTS_AT, (await ids(engine, "queued"))[:10], [1] * 10)


async def test_files_are_listed_and_found(engine: Engine, planning: psycopg.Connection) -> None:
    file_id = await engine.database.fetchval(
        "SELECT id FROM files WHERE sha256 IS NOT NULL ORDER BY id OFFSET 9000 LIMIT 1"
    )
    explain(planning, reads.GET_FILE, file_id, engine.tenant.id)
    explain(planning, reads.LIST_FILES, engine.tenant.id, None, 51)
    explain(planning, reads.LIST_FILES, engine.tenant.id, file_id, 51)


async def test_uploads_begin_grow_and_end(engine: Engine, planning: psycopg.Connection) -> None:
    tenant_id, wait = engine.tenant.id, timedelta(hours=1)
    upload_id = await engine.database.fetchval("SELECT id FROM files WHERE sha256 IS NULL ORDER BY id DESC LIMIT 1")
    explain(planning, files.BEGIN, uuid7(), tenant_id, "a", "a/b", 10, "", None, wait, 1 << 40, True)
    explain(planning, files.GET_UPLOAD, upload_id, tenant_id)
    explain(planning, files.APPEND, upload_id, tenant_id, 0, 10, "key", wait)
    explain(planning, files.RENEW, upload_id, wait)
    explain(planning, files.FINISH, upload_id, tenant_id, 10, "x", Json([]), wait, 1 << 40)
    explain(planning, files.GIVE_UP, upload_id, tenant_id, False)


async def test_sweeps_read_what_is_over_alone(engine: Engine, planning: psycopg.Connection) -> None:
    explain(planning, files.EXPIRE, 20)
    explain(planning, files.UNTIDY, 100)
