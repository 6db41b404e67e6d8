"""The kind sql.export end to end: rows of a source to a file, and the file back by other readers."""

import csv
import io
import json
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headway.embedded import Embedded
from headway.settings import Settings, Source
from headway.sources import Column
from services.worker.kinds.sql_text import CsvRows, JsonRows
from tests.conftest import Service, until

# Two series: a single one would be made whole before its first row is given.
ROWS = "SELECT a * 10000 + b AS id FROM generate_series(1, 10000) AS a, generate_series(1, 10000) AS b"
READER = "export_reader"
ACTIVE = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'headway' AND state = 'active'"


@pytest.fixture
def settings(settings: Settings, servers: Embedded, tmp_path: Path) -> Settings:
    """The usual source, one with a role that reads, and one of SQLite."""
    url = settings.sources["default"].url.get_secret_value()
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        if not admin.execute("SELECT FROM pg_roles WHERE rolname = %s", [READER]).rowcount:
            admin.execute(f"CREATE ROLE {READER} LOGIN PASSWORD 'reader'")
    with sqlite3.connect(tmp_path / "lite.db") as lite:
        lite.execute("CREATE TABLE t (id INTEGER, name TEXT, data BLOB, price REAL)")
        lite.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", [(1, "Ada", b"\0\xff", 1.5), (2, None, None, None)])
    lite.close()
    more = {
        "split": {"url": url, "read_url": f"postgresql+asyncpg://{READER}:reader@{url.rpartition('@')[2]}"},
        "lite": {"url": f"sqlite+aiosqlite:///{tmp_path}/lite.db"},
    }
    sources = settings.sources | {name: Source.model_validate(source) for name, source in more.items()}
    return settings.model_copy(update={"sources": sources})


async def ended(service: Service, sql: str, **more: Any) -> dict[str, Any]:
    job = await service.client.submit("sql.export", {"sql": sql, **more}, max_attempts=1)
    return await service.client.wait(job["id"], timeout=40)


async def read(service: Service, job: dict[str, Any]) -> bytes:
    assert job["state"] == "succeeded", job["error"]
    return b"".join([chunk async for chunk in service.client.read(job["id"], job["result"]["artifact"])])


@pytest.mark.usefixtures("source")
async def test_rows_become_csv(service: Service) -> None:
    job = await ended(
        service,
        """SELECT 1 AS id, '=1+1' AS "=formula", -5 AS minus, -1.50 AS price, true AS yes, NULL AS none, 'a"b,
c' AS text, array[1, null] AS list, '{"a": 1}'::jsonb AS doc, 'NaN'::float8 AS nan, '-5' AS word, $1::date AS day""",
        parameters=["2024-02-29"],
    )
    [head, row] = csv.reader(io.StringIO((await read(service, job)).decode(), newline=""))
    assert dict(zip(head, row, strict=True)) == {
        "id": "1",
        "'=formula": "'=1+1",
        "minus": "-5",
        "price": "-1.50",
        "yes": "true",
        "none": "",
        "text": 'a"b,\nc',
        "list": "[1, null]",
        "doc": '{"a": 1}',
        "nan": "NaN",
        "word": "'-5",
        "day": "2024-02-29",
    }
    assert job["result"]["rows"] == 1
    assert job["result"]["columns"][3] == {"name": "price", "type": "numeric"}
    raw = await ended(service, "SELECT '=1+1' AS a, 2 AS b", escape_formulas=False, delimiter=";", name="my file.csv")
    assert await read(service, raw) == b"a;b\r\n=1+1;2\r\n"


@pytest.mark.usefixtures("source")
async def test_rows_become_lines_of_json(service: Service) -> None:
    sql = "SELECT 1 AS id, '=é' AS text, 1.10 AS price, '{\"a\": [1.5]}'::jsonb AS doc, array[now() - now()] AS list"
    job = await ended(service, f"{sql} UNION ALL SELECT 2, NULL, NULL, NULL, NULL", format="jsonl")
    lines = [json.loads(line) for line in (await read(service, job)).splitlines()]
    assert lines == [
        {"id": 1, "text": "=é", "price": "1.10", "doc": {"a": [1.5]}, "list": ["00:00:00"]},
        {"id": 2, "text": None, "price": None, "doc": None, "list": None},
    ]


@pytest.mark.usefixtures("source")
async def test_another_tool_reads_the_parquet_back(service: Service) -> None:
    job = await ended(
        service,
        """SELECT n AS id, n::int2 AS small, n / 4.0::float8 AS half, (n * 1.25)::numeric AS price, n % 2 = 0 AS even,
            date '2024-02-28' + n AS day, timestamp '2024-01-01 00:00:00.25' + n * interval '1 s' AS at,
            timestamptz '2024-01-01 00:00+02' AS zoned, CASE WHEN n % 3 = 0 THEN NULL ELSE 'näme ' || n END AS name,
            '\\x00ff'::bytea AS data, '{"a": 1}'::jsonb AS doc, array[n, null] AS list
            FROM generate_series(1, 20000) AS n""",
        format="parquet",
    )
    table = pq.read_table(io.BytesIO(await read(service, job)))
    assert table.num_rows == job["result"]["rows"] == 20_000
    types = [str(field.type) for field in table.schema]
    assert types == [
        *("int32", "int16", "double", "decimal128(38, 9)", "bool", "date32[day]", "timestamp[us]"),
        *("timestamp[us, tz=UTC]", "string", "binary", "string", "string"),
    ]
    row = table.slice(1, 1).to_pylist()[0]
    assert row | {"day": str(row["day"]), "at": str(row["at"]), "zoned": row["zoned"].isoformat()} == {
        "id": 2,
        "small": 2,
        "half": 0.5,
        "price": Decimal("2.5"),
        "even": True,
        "day": "2024-03-01",
        "at": "2024-01-01 00:00:02.250000",
        "zoned": "2023-12-31T22:00:00+00:00",
        "name": "näme 2",
        "data": b"\0\xff",
        "doc": '{"a": 1}',
        "list": "[2, null]",
    }
    assert table.column("id").to_pylist() == list(range(1, 20_001))
    assert table.column("name").null_count == 6666
    empty = await ended(service, "SELECT 1 AS a WHERE false", format="parquet")
    assert pq.read_table(io.BytesIO(await read(service, empty))).num_rows == 0


async def test_sqlite_is_exported_too(service: Service) -> None:
    job = await ended(service, "SELECT * FROM t ORDER BY id", source="lite")
    assert await read(service, job) == b"id,name,data,price\r\n1,Ada,\\x00ff,1.5\r\n2,,,\r\n"
    table = pq.read_table(
        io.BytesIO(await read(service, await ended(service, "SELECT * FROM t", source="lite", format="parquet")))
    )
    assert table.to_pylist() == [
        {"id": 1, "name": "Ada", "data": b"\0\xff", "price": 1.5},
        {"id": 2, "name": None, "data": None, "price": None},
    ]


@pytest.mark.usefixtures("source")
async def test_what_cannot_be_exported_fails_in_words_and_leaves_nothing(service: Service) -> None:
    for sql, more, message in (
        ("SELECT 1 AS a, 2 AS a", {}, "2 columns named 'a'"),
        ("DELETE FROM nowhere", {}, "nowhere"),
        ("SELECT 1) TO STDOUT; COMMIT; SELECT (2", {}, "refuses the statement"),
        ("SELECT 1; SELECT 2", {}, "multiple commands"),
        ("SELECT 1 / (n - 300) AS a FROM generate_series(1, 1000) AS n", {}, "division by zero"),
        ("SELECT timestamp 'infinity' AS a", {"format": "parquet"}, "'a' has infinity"),
        ("SELECT 1.0000000001 AS a", {"format": "parquet"}, "beyond 9 decimals"),
        ("SELECT repeat('x', 100000000) AS a", {}, "limit of bytes"),
        ("SELECT 1 UNION ALL SELECT 'x'", {"source": "lite", "format": "parquet"}, "several types"),
        ("SELECT 1", {"source": "none"}, "There is no source 'none'"),
    ):
        job = await ended(service, sql, **more)
        assert (job["state"], job["error"]["type"]) == ("failed", "fatal"), sql
        assert message in job["error"]["message"]
        assert await service.client.artifacts(job["id"]) == []


async def test_a_cancel_ends_the_statement_in_the_source(service: Service, source: asyncpg.Connection) -> None:
    sleep = await service.client.submit("sql.export", {"sql": "SELECT pg_sleep(600)"})
    await until(lambda: source.fetchval(f"{ACTIVE} AND query LIKE '%pg_sleep(600)'"), 40)
    large = await service.client.submit("sql.export", {"sql": ROWS})
    await until(lambda: _progress(service, large["id"]), 40)
    for job in (sleep, large):
        await service.client.cancel(job["id"])
        assert (await service.client.wait(job["id"], timeout=20))["state"] == "cancelled"
    assert await source.fetchval(f"{ACTIVE} AND datname = current_database()") == 0


async def test_the_timeout_of_a_job_ends_a_statement_that_lets_nobody_cancel_it(
    service: Service, source: asyncpg.Connection
) -> None:
    await source.execute("""
        CREATE FUNCTION stubborn() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            PERFORM set_config('statement_timeout', '0', false);
            LOOP BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;
        END $$
    """)
    job = await service.client.submit("sql.export", {"sql": "SELECT stubborn()"}, timeout=10, max_attempts=1)
    await until(lambda: source.fetchval(f"{ACTIVE} AND query LIKE '%stubborn()'"), 40)
    job = await service.client.wait(job["id"], timeout=40)
    assert (job["state"], job["error"]["type"]) == ("failed", "timed-out")
    assert await source.fetchval(f"{ACTIVE} AND datname = current_database()") == 0


async def test_a_role_that_only_reads_is_used_and_held_to_that(service: Service, source: asyncpg.Connection) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS n; CREATE TABLE hidden AS SELECT 1 AS n")
    await source.execute(f"GRANT SELECT ON t TO {READER}")
    job = await ended(service, "SELECT current_user AS who, n FROM t", source="split")
    assert await read(service, job) == f"who,n\r\n{READER},1\r\n".encode()
    for sql in ("SELECT * FROM hidden", "INSERT INTO t VALUES (2) RETURNING n"):
        job = await ended(service, sql, source="split")
        assert "permission denied for table" in job["error"]["message"], sql


async def test_progress_is_of_the_planners_estimate(service: Service, source: asyncpg.Connection) -> None:
    await source.execute("CREATE TABLE t AS SELECT n FROM generate_series(1, 3000) AS n; ANALYZE t")
    job = await service.client.submit("sql.export", {"sql": "SELECT n, pg_sleep(0.001) FROM t"})
    seen = await until(lambda: _progress(service, job["id"]), 40)
    assert seen["unit"] == "rows"
    assert 2_000 < seen["total"] < 4_000
    assert (await service.client.wait(job["id"], timeout=40))["progress"]["done"] == 3000


async def _progress(service: Service, job_id: str) -> dict[str, Any] | None:
    progress = (await service.client.get(job_id))["progress"]
    return progress if progress and progress["total"] else None


VALUES = st.one_of(st.none(), st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[VALUES] * width), min_size=1)),
    st.sampled_from(",;\t|"),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.too_slow])
def test_what_is_written_is_read_back_the_same(rows: list[tuple[Any, ...]], delimiter: str) -> None:
    columns = [Column(f"c{place}", "text") for place in range(len(rows[0]))]
    written = CsvRows(columns, delimiter=delimiter, escape=False)
    text = (written.head + written.encode(rows)).decode()
    found = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    shown = [["" if v is None else str(v).lower() if isinstance(v, bool) else str(v) for v in row] for row in rows]
    assert found[1:] == [row if row != [""] else [""] for row in shown]
    lines = JsonRows(columns).encode(rows).decode().split("\n")[:-1]
    assert [tuple(json.loads(line).values()) for line in lines] == rows
    escaped = CsvRows(columns, delimiter=delimiter, escape=True).encode(rows).decode()
    for row in csv.reader(io.StringIO(escaped, newline=""), delimiter=delimiter):
        assert not any(field[:1] in set("=+-@\t\r\n") and not field[1:2].isdigit() for field in row if field)
