"""csv.import into sources of SQLite: the same results as into Postgres."""

import asyncio
import csv
import io
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from headway import Retry
from headway.settings import Settings, Source
from services.worker.kinds import csv_import, csv_sqlite
from services.worker.kinds.csv_position import Position
from services.worker.kinds.csv_sqlite import SqliteTable
from services.worker.kinds.csv_target import Target, staging_name
from services.worker.kinds.csv_types import ColumnType
from tests.conftest import Service, until

COLUMNS = {"a": "bigint", "b": "text"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A database that is empty, with characters that mean something in a URL."""
    path = tmp_path / "lite 100%.db"
    with closing(sqlite3.connect(path)) as made:
        made.execute("VACUUM")
    return path


@pytest.fixture
def settings(settings: Settings, place: Path) -> Settings:
    source = Source.model_validate({"url": f"sqlite+aiosqlite:///{place}"})
    return settings.model_copy(update={"sources": {"lite": source}})


@pytest.fixture
def lite(place: Path) -> Iterator[sqlite3.Connection]:
    """A connection of the test's own."""
    with closing(sqlite3.connect(place, isolation_level=None)) as lite:
        yield lite


async def submit(service: Service, data: bytes, **more: Any) -> str:
    sent = await service.http.post("/api/v1/files", params={"name": "t.csv"}, content=data)
    assert sent.status_code == 201, sent.text
    input = {"file": sent.json()["id"], "table": "t", "source": "lite"} | more
    return str((await service.client.submit("csv.import", input, max_attempts=1))["id"])


async def ended(service: Service, data: bytes, **more: Any) -> dict[str, Any]:
    return await service.client.wait(await submit(service, data, **more), timeout=40)


def tables(lite: sqlite3.Connection) -> list[str]:
    return [name for (name,) in lite.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]


async def test_a_file_becomes_a_table_with_the_types_of_its_values(service: Service, lite: sqlite3.Connection) -> None:
    job = await ended(
        service,
        b"id;Unit price;Sold;at;ok;zip;note\r\n"
        b'1;2.50;2024-02-29;2024-02-29T12:30:00+02:00;true;00501;"a ""b"";\r\nc"\r\n'
        b'-9223372036854775808;3;;;FALSE;"";\r\n'
        b"3\r\n",
    )

    assert job["state"] == "succeeded", job["error"]
    assert (job["result"]["rows"], job["result"]["rejected"]) == (2, 1)
    assert [column["type"] for column in job["result"]["columns"]] == [
        *("bigint", "numeric", "date", "timestamptz", "boolean", "text", "text")
    ]
    assert lite.execute("SELECT * FROM t").fetchall() == [
        (1, 2.5, "2024-02-29", "2024-02-29T12:30:00+02:00", 1, "00501", 'a "b";\r\nc'),
        (-(2**63), 3, None, None, 0, None, None),
    ]
    assert [row[0] for row in lite.execute("SELECT lower(type) FROM pragma_table_info('t')")] == [
        *("bigint", "numeric", "date", "timestamptz", "boolean", "text", "text")
    ]
    assert tables(lite) == ["headway_imports", "t"]
    assert job["progress"]["done"] == job["progress"]["total"]


async def test_a_value_far_down_decides_the_type_of_its_column(
    service: Service, lite: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_import, "KEEP_EVERY", 0.0)
    data = b"id,day\n" + b"".join(b"%d,2024-01-01\n" % n for n in range(40_000)) + b"x1,unknown\n"

    job = await ended(service, data)

    assert job["state"] == "succeeded", job["error"]
    assert [column["type"] for column in job["result"]["columns"]] == ["text", "text"]
    assert lite.execute("SELECT count(*), max(typeof(id)), min(typeof(id)) FROM t").fetchone() == (
        40_001,
        "text",
        "text",
    )
    assert job["progress"]["done"] == job["progress"]["total"] == 2 * len(data)


async def test_rows_come_into_a_table_that_exists(service: Service, lite: sqlite3.Connection) -> None:
    lite.executescript("""
        CREATE TABLE t (id INTEGER PRIMARY KEY, price REAL, Code TEXT, ok BOOLEAN, made INT DEFAULT 7);
        INSERT INTO t VALUES (1, 1, 'one', 0, 1);
    """)

    def found() -> list[Any]:
        return lite.execute("SELECT id, price, code, ok, made FROM t ORDER BY id").fetchall()

    assert (await ended(service, b"id,price,code,ok\n2,2.5,0,true\n3,3,007,\n", mode="append"))["state"] == "succeeded"
    assert found() == [(1, 1.0, "one", 0, 1), (2, 2.5, "0", 1, 7), (3, 3.0, "007", None, 7)]
    changed = b"code,id\nx,2\nnew,4\ntwo,2\n"
    job = await ended(service, changed, mode="upsert", key=["id"])
    assert (job["state"], job["result"]["rows"]) == ("succeeded", 3), job["error"]
    assert found() == [
        *((1, 1.0, "one", 0, 1), (2, 2.5, "two", 1, 7), (3, 3.0, "007", None, 7), (4, None, "new", None, 7))
    ]
    assert (await ended(service, b"id\n9\n", mode="replace"))["state"] == "succeeded"
    assert found() == [(9, None, None, None, 7)]
    assert (await ended(service, b"id\n8\n", table="u", mode="replace"))["state"] == "succeeded"
    assert lite.execute("SELECT id FROM u").fetchall() == [(8,)]
    for data, more, message in (
        (b"id\n1\n", {}, "has a table or type 't' already"),
        (b"id\n1\n9\n", {"mode": "append"}, "UNIQUE constraint failed"),
        (b"id\nx\n", {"mode": "append"}, "datatype mismatch"),
        (b"id\n1\n", {"mode": "append", "table": "v"}, "no table 'v'"),
        (b"id,more\n1,2\n", {"mode": "append"}, "no column 'more'"),
        (b"id,code\n1,2\n", {"mode": "upsert", "key": ["code"]}, "does not match any PRIMARY KEY or UNIQUE"),
        (b"id,code\n,2\n", {"mode": "upsert", "key": ["id"]}, "without a value in the key"),
        (b"a\n0.1234567890123456789\n", {"table": "v"}, '"types": {"a": "text"}'),
        (b"a\n1e999\n", {"table": "v"}, "cannot keep as a number"),
        (b"a\n1\n", {"table": "sqlite_v"}, "reserved for internal use"),
    ):
        job = await ended(service, data, **more)
        assert (job["state"], job["error"]["type"]) == ("failed", "fatal"), data
        assert message in job["error"]["message"]
    assert found() == [(9, None, None, None, 7)]
    assert tables(lite) == ["headway_imports", "t", "u"]


async def test_imports_and_readers_of_one_database_wait_for_each_other(
    service: Service, lite: sqlite3.Connection, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_import, "KEEP_EVERY", 0.0)
    data = b"a\n" + b"".join(b"%d\n" % n for n in range(30_000))
    lite.execute("CREATE TABLE mine (a)")
    lite.execute("BEGIN")
    lite.execute("SELECT * FROM mine").fetchall()

    answer = await service.http.post("/api/v1/query", json={"source": "lite", "sql": "SELECT count(*) FROM mine"})
    assert answer.json()["rows"] == [[0]]
    jobs = [asyncio.create_task(ended(service, data, table=name)) for name in ("t", "u")]

    def waits() -> bool:
        """Whether an import stands before its commit: then nobody new may read."""
        with closing(sqlite3.connect(place, timeout=0)) as other:
            try:
                other.execute("SELECT * FROM mine").fetchall()
            except sqlite3.OperationalError:
                return True
        return False

    await until(waits)
    lite.execute("COMMIT")

    assert [(await job)["state"] for job in jobs] == ["succeeded", "succeeded"]
    assert lite.execute("SELECT (SELECT sum(a) FROM t), (SELECT sum(a) FROM u)").fetchone() == (449_985_000,) * 2


async def test_an_import_that_begins_while_somebody_commits_waits_for_that(
    service: Service, lite: sqlite3.Connection, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[bool] = []

    def connect(url: str) -> sqlite3.Connection | None:
        connection = connected(url)
        tries.append(connection is not None)
        return connection

    connected = csv_sqlite._connect
    monkeypatch.setattr(csv_sqlite, "_connect", connect)
    lite.execute("CREATE TABLE mine (a)")
    lite.execute("BEGIN")
    lite.execute("SELECT * FROM mine").fetchall()
    with closing(sqlite3.connect(place, timeout=0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO mine VALUES (1)")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("COMMIT")
        importing = asyncio.create_task(ended(service, b"a\n1\n"))
        await until(lambda: len(tries) > 2)
        assert not any(tries)
        lite.execute("COMMIT")
        other.execute("COMMIT")
        assert (await importing)["state"] == "succeeded"


async def test_a_cancelled_import_leaves_no_table(
    service: Service, lite: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_import, "KEEP_EVERY", 0.0)
    job_id = await submit(service, b"a,b\n" + b"".join(b"%d,name %d\n" % (n, n) for n in range(1_000_000)))
    await until(lambda: staging_name(UUID(job_id)) in tables(lite), 20)

    await service.client.cancel(job_id)

    assert (await service.client.wait(job_id, timeout=20))["state"] == "cancelled"
    assert tables(lite) == ["headway_imports"]
    assert lite.execute("SELECT * FROM headway_imports").fetchall() == []


def at(table: SqliteTable, job_id: UUID, rows: int, *, when: datetime | None = None) -> Position:
    return Position(
        job=job_id,
        writer=table.writer,
        at=when or datetime.now(UTC),
        offset=4 + rows * 4,
        lines=1 + rows,
        rows=rows,
        passes=1,
        types=[ColumnType.BIGINT, ColumnType.TEXT],
        rejected=[],
        seconds=1,
    )


async def fill(table: SqliteTable, rows: int, *, anew: bool = False) -> None:
    async def given() -> AsyncIterator[bytes]:
        yield b"1,x\n" * rows

    await table.begin(COLUMNS, anew=anew)
    assert await table.fill(COLUMNS, given(), ",") == rows


async def test_an_attempt_whose_import_was_taken_over_adds_nothing(place: Path, lite: sqlite3.Connection) -> None:
    url, job_id, target = f"sqlite+aiosqlite:///{place}", uuid4(), Target("t")
    async with (
        SqliteTable.opened(url, "lite", target, job_id) as old,
        SqliteTable.opened(url, "lite", target, job_id) as new,
    ):
        assert await old.find() is None
        await fill(old, 2, anew=True)
        await old.keep(at(old, job_id, 2))

        found = await new.find()
        assert found is not None
        assert (found.rows, found.writer) == (2, old.writer)
        with pytest.raises(Retry):
            await fill(old, 7)
        await fill(new, 3)
        await new.finish(at(new, job_id, 5), COLUMNS)
        assert lite.execute("SELECT count(*) FROM t").fetchone() == (5,)

    async with SqliteTable.opened(url, "lite", target, job_id) as again:
        done = await again.find()
        assert (again.complete, done and done.rows) == (True, 5)
    assert tables(lite) == ["headway_imports", "t"]


async def test_an_import_drops_what_others_left_behind_a_week_ago(place: Path, lite: sqlite3.Connection) -> None:
    url, old, young = f"sqlite+aiosqlite:///{place}", uuid4(), uuid4()
    for job_id, days in ((old, 8), (young, 6)):
        async with SqliteTable.opened(url, "lite", Target("t"), job_id) as table:
            await table.find()
            await fill(table, 2, anew=True)
            await table.keep(at(table, job_id, 2, when=datetime.now(UTC) - timedelta(days=days)))

    async with SqliteTable.opened(url, "lite", Target("t"), uuid4()):
        assert set(tables(lite)) == {"headway_imports", staging_name(young)}


async def test_what_the_csv_module_writes_comes_back_the_same(service: Service, lite: sqlite3.Connection) -> None:
    rows = [["a", "b"], ["x", 'é"\n,;'], ["", "\r\n"], ["NULL", r"\."], ["007", " "]] * 300
    written = io.StringIO()
    csv.writer(written).writerows([["c0", "c1"], *rows])

    job = await ended(service, written.getvalue().encode())

    assert job["state"] == "succeeded", job["error"]
    assert [list(row) for row in lite.execute("SELECT * FROM t")] == [[cell or None for cell in row] for row in rows]
