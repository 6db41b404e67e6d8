"""POST /query: what it answers, what it refuses, and what it ends in the source."""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headway.embedded import Embedded
from headway.settings import Settings, Source
from tests.conftest import Tenant, make_tenant, until, web

QUERY = "/api/v1/query"
OURS = "application_name = 'headway' AND datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture
def settings(settings: Settings, servers: Embedded, tmp_path: Path) -> Settings:
    """A source of each kind: one with a role that only reads, one of SQLite, some that are not there."""
    url = settings.sources["default"].url.get_secret_value()
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        if not admin.execute("SELECT FROM pg_roles WHERE rolname = 'query_reader'").rowcount:
            admin.execute("CREATE ROLE query_reader LOGIN PASSWORD 'reader'")
    reader = f"postgresql+asyncpg://query_reader:reader@{url.rpartition('@')[2]}"
    lite = tmp_path / "a %b?.db"
    with sqlite3.connect(lite) as connection:
        connection.execute("CREATE TABLE t (id INTEGER, name TEXT, data BLOB, price REAL)")
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", [(1, "Ada", b"\0\xff", 1.5), (2, None, None, None)])
    connection.close()
    sources = {
        "default": {"url": url},
        "split": {"url": url, "read_url": reader},
        "lite": {"url": f"sqlite+aiosqlite:///{str(lite).replace('%', '%25').replace('?', '%3F')}"},
        "missing": {"url": f"sqlite+aiosqlite:///{tmp_path}/none.db"},
        "gone": {"url": "postgresql+asyncpg://nobody:hunter2@127.0.0.1:1/none"},
        "my": {"url": "mysql+aiomysql://nobody:hunter2@127.0.0.1:1/none"},
    }
    given = {name: Source.model_validate(source) for name, source in sources.items()}
    return settings.model_copy(update={"sources": given, "source_pool": 2, "query_bytes": 100_000, "query_rows": 5000})


@pytest.fixture
async def http(settings: Settings, tenant: Tenant, source: asyncpg.Connection) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with web(settings) as url, httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
        yield client


async def ask(http: httpx.AsyncClient, sql: str, parameters: Any = (), **more: Any) -> dict[str, Any]:
    answer = await http.post(QUERY, json={"sql": sql, "parameters": parameters, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(
    http: httpx.AsyncClient, sql: str, status: int = 422, slug: str = "query-refused", **more: Any
) -> str:
    answer = await http.post(QUERY, json={"sql": sql, **more})
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:headway:problem:{slug}"), answer.text
    assert "hunter2" not in answer.text
    return answer.json()["detail"]


async def test_values_are_answered_as_documented(http: httpx.AsyncClient) -> None:
    columns: list[tuple[str, str, Any]] = [
        ("1::int2", "int2", 1),
        ("9223372036854775807", "int8", 9223372036854775807),
        ("1.10", "numeric", "1.10"),
        ("'NaN'::numeric", "numeric", "NaN"),
        ("1.1::float4", "float4", 1.1),
        ("0.1::float8", "float8", 0.1),
        ("'-infinity'::float8", "float8", "-Infinity"),
        ("'NaN'::float8", "float8", "NaN"),
        ("true", "bool", True),
        ("null::date", "date", None),
        ("date '2024-02-29'", "date", "2024-02-29"),
        ("timestamp '2024-02-29 12:30:00.5'", "timestamp", "2024-02-29 12:30:00.5"),
        ("timestamptz '2024-02-29 12:30+02'", "timestamptz", "2024-02-29 10:30:00+00"),
        ("timestamp 'infinity'", "timestamp", "infinity"),
        ("interval '1 day 2 h'", "interval", "1 day 02:00:00"),
        ("'\\x00ff'::bytea", "bytea", "\\x00ff"),
        ("'6ba7b810-9dad-11d1-80b4-00c04fd430c8'::uuid", "uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        ("""'{"a": [1, null, 1e400]}'::jsonb -> 'a' -> 0""", "jsonb", 1),
        ("""'{"a": [1.5, null]}'::json""", "json", {"a": [1.5, None]}),
        ("array[1.5, null]", "numeric[]", ["1.5", None]),
        ("array[[1, 2], [3, 4]]", "int4[]", [[1, 2], [3, 4]]),
        ("array['a', 'b,\"c']", "text[]", ["a", 'b,"c']),
        ("inet '10.0.0.1/8'", "inet", "10.0.0.1/8"),
        ("E'q\"\\\\\\u00e9\\n'", "text", 'q"\\é\n'),
        ("row(1, 'x')", "record", [1, "x"]),
        ("int4range(1, 5)", "int4range", "[1,5)"),
        ("int4range(null, 5)", "int4range", "(,5)"),
    ]
    found = await ask(http, "SELECT " + ", ".join(sql for sql, _, _ in columns))
    assert [column["type"] for column in found["columns"]] == [type_name for _, type_name, _ in columns]
    assert found["rows"] == [[value for _, _, value in columns]]
    assert found["truncated"] is False
    assert "Cast it to text" in await refused(http, "SELECT daterange(null, null)")
    assert isinstance(found["ms"], int)


async def test_parameters_are_bound(http: httpx.AsyncClient) -> None:
    sql = "SELECT $1::date + 1, $2::numeric, $3::int[], $4::jsonb, $5 || '!', $6::bool"
    given = ["2024-02-28", 1.5, [1, 2], {"a": [None]}, "'; DROP TABLE t; --", False]
    assert (await ask(http, sql, given))["rows"] == [
        ["2024-02-29", "1.5", [1, 2], {"a": [None]}, "'; DROP TABLE t; --!", False]
    ]
    named = """SELECT :a::int + :a, ':b', "c:d", $$:e$$, x[1:2] -- :f
        FROM (SELECT array[1, 2, 3] AS x) AS t, (SELECT 1 AS "c:d") AS u WHERE /* :g */ :two = 2"""
    assert (await ask(http, named, {"a": 5, "two": 2}))["rows"] == [[10, ":b", 1, ":e", [1, 2]]]
    lite = "SELECT name FROM t WHERE id = {}"
    assert (await ask(http, lite.format("?"), [1], source="lite"))["rows"] == [["Ada"]]
    assert (await ask(http, lite.format(":id"), {"id": 1}, source="lite"))["rows"] == [["Ada"]]


async def test_parameters_that_do_not_fit_are_refused(http: httpx.AsyncClient) -> None:
    for sql, parameters, message in (
        ("SELECT $1::int", ["5"], "invalid input for query argument $1"),
        ("SELECT $1::int", [2**40], "out of int32 range"),
        ("SELECT $1::date", ["yesterday-ish"], "invalid input syntax"),
        ("SELECT $1", [], "1 parameters"),
        ("SELECT 1", [1], "0 parameters"),
        ("SELECT :a", {}, ":a"),
        ("SELECT 1", {"a": 1}, "no :a"),
    ):
        assert message in await refused(http, sql, parameters=parameters), sql
    assert (await ask(http, "SELECT 1"))["rows"] == [[1]]


async def test_sqlite_answers_with_the_types_of_its_values(http: httpx.AsyncClient) -> None:
    found = await ask(http, "SELECT id, name, data, price, NULL AS none FROM t ORDER BY id", source="lite")
    assert found["columns"] == [
        {"name": "id", "type": "integer"},
        {"name": "name", "type": "text"},
        {"name": "data", "type": "blob"},
        {"name": "price", "type": "real"},
        {"name": "none", "type": None},
    ]
    assert found["rows"] == [[1, "Ada", "\\x00ff", 1.5, None], [2, None, None, None, None]]


async def test_an_answer_is_cut_at_its_limits(http: httpx.AsyncClient) -> None:
    for source, numbers in (
        ("default", "SELECT n, repeat('x', {}) FROM generate_series(1, 100000) AS n"),
        (
            "lite",
            "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s LIMIT 100000) "
            "SELECT n, printf('%.*c', {}, 'x') FROM s",
        ),
    ):
        for length, limit, rows in ((1, 7, 7), (1, 100_000, 5000), (1000, None, 99)):
            found = await ask(http, numbers.format(length), limit=limit, source=source)
            assert (len(found["rows"]), found["truncated"]) == (rows, True), source
        exact = await ask(http, numbers.format(1).replace("100000", "7"), limit=7, source=source)
        assert (len(exact["rows"]), exact["truncated"]) == (7, False)
        assert "limit" in await refused(http, numbers.format(200_000), 413, "too-large", source=source)
    # Far more than a process may hold for it.
    assert "limit" in await refused(http, "SELECT repeat('x', 300000000)", 413, "too-large")
    assert "limit" in await refused(http, "SELECT zeroblob(300000000)", 413, "too-large", source="lite")
    assert (await ask(http, "SELECT 1"))["rows"] == [[1]]


BREAK_OUT = "SELECT 1) TO STDOUT; COMMIT; BEGIN READ WRITE; INSERT INTO t VALUES (2); COPY (SELECT 2"


async def test_what_does_not_only_read_is_refused_and_does_nothing(
    http: httpx.AsyncClient, source: asyncpg.Connection
) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS a; GRANT ALL ON t TO query_reader")
    await source.execute(
        "CREATE PROCEDURE p(INOUT a int) LANGUAGE plpgsql AS 'BEGIN COMMIT; INSERT INTO t VALUES (9); END'"
    )
    await source.execute("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (8) RETURNING a'")
    heard: list[Any] = []
    await source.add_listener("news", lambda *args: heard.append(args))
    for name in ("default", "split"):
        for sql in (
            "SELECT 1; SELECT 2",
            "SELECT 1; DELETE FROM t",
            BREAK_OUT,
            "DELETE FROM t",
            "DELETE FROM t RETURNING a",
            "WITH gone AS (DELETE FROM t RETURNING a) SELECT * FROM gone",
            "COPY t TO STDOUT",
            "COPY (SELECT 1) TO '/tmp/x'",
            "COPY (SELECT 1) TO PROGRAM 'id'",
            "DO $$ BEGIN SET TRANSACTION READ WRITE; DELETE FROM t; END $$",
            "CALL p(1)",
            "SELECT f()",
            "SELECT set_config('transaction_read_only', 'off', true)",
            "SET TRANSACTION READ WRITE",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
            "COMMIT",
            "ROLLBACK",
            "NOTIFY news",
            "LISTEN news",
            "SET statement_timeout = 0",
            "PREPARE x AS DELETE FROM t",
            "CREATE TABLE u (a int)",
            "EXPLAIN ANALYZE DELETE FROM t",
            "SELECT a FROM t FOR UPDATE",
            "SELECT nextval('s')",
            "SELECT * FROM nowhere",
            "SELECT 1 WHERE",
            "--",
            ";",
        ):
            await refused(http, sql, source=name)
        # These are permitted, and end with the transaction or the connection's return.
        for sql in (
            "SELECT pg_notify('news', 'x')",
            "SELECT pg_advisory_lock(7)",
            "SELECT set_config('default_transaction_read_only', 'off', false)",
            "SELECT set_config('search_path', 'nowhere', false)",
        ):
            await ask(http, sql, source=name)
        assert (await ask(http, "SELECT a FROM t", source=name))["rows"] == [[1]]
    assert await source.fetch("SELECT a FROM t") == [(1,)]
    assert await source.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    assert heard == []
    names = await source.fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    assert [row[0] for row in names] == ["t"]


async def test_the_role_that_reads_is_used_where_there_is_one(http: httpx.AsyncClient) -> None:
    assert (await ask(http, "SELECT current_user", source="split"))["rows"] == [["query_reader"]]
    assert (await ask(http, "SHOW transaction_read_only"))["rows"] == [["on"]]


async def test_sqlite_only_reads_and_only_its_own_file(http: httpx.AsyncClient, tmp_path: Path) -> None:
    for sql in (
        "SELECT 1; SELECT 2",
        "DELETE FROM t",
        "DELETE FROM t RETURNING id",
        "INSERT INTO t (id) VALUES (3)",
        "CREATE TABLE u (a)",
        "DROP TABLE t",
        f"ATTACH '{tmp_path}/other.db' AS other",
        "PRAGMA query_only = off",
        "PRAGMA writable_schema = on",
        f"VACUUM INTO '{tmp_path}/copy.db'",
        "BEGIN",
        "COMMIT",
        "SELECT load_extension('x')",
        "SELECT * FROM nowhere",
        "SELECT ?",
    ):
        await refused(http, sql, source="lite")
    assert not (tmp_path / "other.db").exists()
    assert not (tmp_path / "copy.db").exists()
    assert (await ask(http, "SELECT count(*) FROM t", source="lite"))["rows"] == [[2]]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT pg_sleep(600)",
        "SELECT pg_sleep(600) FROM (SELECT set_config('statement_timeout', '0', false)) AS s",
        "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b, generate_series(1, 100) c",
        "SELECT stubborn()",
    ],
)
async def test_what_takes_too_long_is_ended_in_postgres(
    http: httpx.AsyncClient, source: asyncpg.Connection, sql: str
) -> None:
    # It lets nobody cancel it: only the end of its session ends it.
    await source.execute("""
        CREATE FUNCTION stubborn() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
            LOOP BEGIN PERFORM pg_sleep(600); EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP;
        END $$
    """)
    began = time.monotonic()
    assert "ended there" in await refused(http, sql, 504, "deadline-passed", timeout=0.3)
    assert time.monotonic() - began < 10
    assert await source.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {OURS} AND state = 'active'") == 0
    assert (await ask(http, "SELECT 1"))["rows"] == [[1]]


async def test_a_file_that_is_put_in_the_place_of_another_is_read(http: httpx.AsyncClient, tmp_path: Path) -> None:
    assert (await ask(http, "SELECT count(*) FROM t", source="lite"))["rows"] == [[2]]
    with closing(sqlite3.connect(tmp_path / "new.db")) as new:
        new.execute("CREATE TABLE t (id)")
    (tmp_path / "new.db").replace(tmp_path / "a %b?.db")

    assert (await ask(http, "SELECT count(*) FROM t", source="lite"))["rows"] == [[0]]


async def test_what_takes_too_long_is_ended_in_sqlite(http: httpx.AsyncClient) -> None:
    endless = "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s) SELECT count(*) FROM s"
    for _ in range(3):
        began = time.monotonic()
        await refused(http, endless, 504, "deadline-passed", source="lite", timeout=0.2)
        assert time.monotonic() - began < 10
    assert (await ask(http, "SELECT 1", source="lite"))["rows"] == [[1]]


async def test_connections_are_opened_once_and_shared(http: httpx.AsyncClient, source: asyncpg.Connection) -> None:
    async def sessions() -> set[int]:
        return {row[0] for row in await source.fetch(f"SELECT pid FROM pg_stat_activity WHERE {OURS}")}

    await asyncio.gather(*(ask(http, "SELECT pg_sleep(0.01)") for _ in range(20)))
    first = await sessions()
    await asyncio.gather(*(ask(http, "SELECT pg_sleep(0.01)") for _ in range(20)))
    assert len(first) == 2
    assert await sessions() == first
    # Who waits for a connection waits no longer than the deadline.
    holding = [asyncio.create_task(ask(http, "SELECT pg_sleep(3)")) for _ in range(2)]
    await until(lambda: source.fetchval(f"SELECT count(*) = 2 FROM pg_stat_activity WHERE {OURS} AND state = 'active'"))
    await refused(http, "SELECT 1", 504, "deadline-passed", timeout=0.2)
    await asyncio.gather(*holding)


async def test_a_source_that_is_not_there_is_said(http: httpx.AsyncClient, source: asyncpg.Connection) -> None:
    assert "there are: default, gone" in await refused(http, "SELECT 1", 422, "invalid-request", source="nowhere")
    assert "cannot be reached" in await refused(http, "SELECT 1", 503, "source-unavailable", source="gone")
    assert "cannot be opened" in await refused(http, "SELECT 1", 503, "source-unavailable", source="missing")
    assert "mysql" in await refused(http, "SELECT 1", source="my")
    await ask(http, "SELECT 1")
    await source.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OURS}")

    async def answers() -> bool:
        answer = await http.post(QUERY, json={"sql": "SELECT 1"})
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    await until(answers)


async def test_a_source_that_is_not_granted_is_as_unknown_as_none(
    settings: Settings, database: asyncpg.Connection, source: asyncpg.Connection, tenant: Tenant
) -> None:
    stranger = await make_tenant(database, "stranger")
    default = settings.sources["default"]
    granted = {
        "default": default,
        "nobodys": default.model_copy(update={"tenants": frozenset()}),
        "payroll": default.model_copy(update={"tenants": frozenset({tenant.id})}),
    }
    async with (
        web(settings.model_copy(update={"sources": granted})) as url,
        httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {tenant.api_key}"}) as ours,
        httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {stranger.api_key}"}) as theirs,
    ):
        # The process has a connection to it by then.
        assert (await ask(ours, "SELECT 1", source="payroll"))["rows"] == [[1]]
        assert (await ask(theirs, "SELECT 1"))["rows"] == [[1]]
        for http, names, there in (
            (ours, ("nobodys", "nowhere"), "default, payroll"),
            (theirs, ("payroll", "nobodys", "nowhere"), "default"),
        ):
            for name in names:
                said = await refused(http, "SELECT 1", 422, "invalid-request", source=name)
                assert said == f"There is no source {name!r}; there are: {there}."


async def test_a_request_that_is_not_understood_is_refused(http: httpx.AsyncClient) -> None:
    for body in (
        {},
        {"sql": 5},
        {"sql": ""},
        {"sql": "SELECT 1", "parameters": "x"},
        {"sql": "SELECT 1", "limit": 0},
        {"sql": "SELECT 1", "timeout": -1},
        {"sql": "SELECT 1", "more": 1},
    ):
        answer = await http.post(QUERY, json=body)
        assert answer.status_code == 422, body
    assert (await http.post(QUERY, content=b'{"sql": "SELECT \\u0000"}')).status_code == 400
    assert (await http.get(QUERY)).status_code == 405
    assert (await http.post(QUERY, json={"sql": "SELECT 1"}, headers={"Authorization": ""})).status_code == 401


async def test_no_statement_is_answered_with_a_server_error(http: httpx.AsyncClient) -> None:
    loop = asyncio.get_running_loop()
    words = st.sampled_from(
        [
            "SELECT",
            "1",
            "'a",
            "'",
            '"',
            "$$",
            "$1",
            ":a",
            "::",
            "(",
            ")",
            ";",
            "--",
            "/*",
            "*/",
            "\\",
            "t",
            ",",
            "é",
            "%",
        ]
    )

    @given(
        st.lists(words, min_size=1).map(" ".join),
        st.sampled_from([[], [1], {}, {"a": "x"}]),
        st.sampled_from(["default", "lite"]),
    )
    @hypothesis_settings(max_examples=100, database=None, suppress_health_check=list(HealthCheck))
    def check(sql: str, parameters: Any, source: str) -> None:
        body = json.dumps({"sql": sql, "parameters": parameters, "source": source})
        answer = asyncio.run_coroutine_threadsafe(http.post(QUERY, content=body), loop).result(10)
        assert answer.status_code in (200, 422), answer.text

    await asyncio.to_thread(check)
