import asyncio
import csv
import gzip
import io
import zipfile
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import count
from typing import Any
from uuid import UUID

import asyncpg
import psycopg
import pytest
from backports import zstd
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headway.embedded import Embedded
from headway.settings import Settings, Source
from services.worker.kinds import csv_import
from services.worker.kinds.csv_target import staging_name
from tests.conftest import Service, until

TABLES = count(1)
CELLS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
    st.text(',;"\n\r\\.', max_size=4),
    st.sampled_from(["", "NULL", r"\.", r"\N", "007", "1.50"]),
)


@pytest.fixture
def settings(settings: Settings, servers: Embedded) -> Settings:
    """The usual settings, and sources that do not fit or do not answer."""
    default = settings.sources["default"].url.get_secret_value()
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS reader")
        admin.execute("CREATE ROLE reader LOGIN PASSWORD 'reader'")
    place = default.rpartition("@")[2]
    sources = {
        "default": default,
        "reader": f"postgresql+asyncpg://reader:reader@{place}",
        "mine": "mysql+aiomysql://root@127.0.0.1/mine",
        "nofile": f"sqlite+aiosqlite:///{settings.home}/none.db",
        "gone": "postgresql+asyncpg://nobody:none@127.0.0.1:1/none",
    }
    return settings.model_copy(update={"sources": {name: Source(url=url) for name, url in sources.items()}})


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece that was copied is kept."""
    monkeypatch.setattr(csv_import, "KEEP_EVERY", 0.0)


async def submit(service: Service, data: bytes, table: str = "t", source: str = "default", **more: Any) -> str:
    sent = await service.http.post("/api/v1/files", params={"name": "t.csv"}, content=data)
    assert sent.status_code == 201, sent.text
    job = await service.client.submit(
        "csv.import", {"file": sent.json()["id"], "table": table, "source": source, **more}, max_attempts=1
    )
    return str(job["id"])


async def ended(
    service: Service, data: bytes, table: str = "t", source: str = "default", **more: Any
) -> dict[str, Any]:
    return await service.client.wait(await submit(service, data, table, source, **more), timeout=30)


async def rejected(service: Service, job: dict[str, Any]) -> list[list[str]]:
    text = "".join([chunk.decode() async for chunk in service.client.read(job["id"], "rejected.csv")])
    return list(csv.reader(io.StringIO(text, newline="")))


async def tables(source: asyncpg.Connection) -> list[str]:
    return [
        row["relname"] for row in await source.fetch("SELECT relname FROM pg_class WHERE relkind = 'r' AND oid > 16383")
    ]


async def importing(service: Service, job_id: str) -> bool:
    job = await service.client.get(job_id)
    assert job["state"] in ("queued", "running"), job
    return bool(job["progress"] and job["progress"]["done"] > 1 << 20)


def rows(number: int) -> bytes:
    return b"".join(b"%d,%d.50,name %d,2024-01-01\n" % (n, n, n) for n in range(number))


async def test_a_file_becomes_a_table_with_the_types_of_its_values(
    service: Service, source: asyncpg.Connection
) -> None:
    job = await ended(
        service,
        b"\xef\xbb\xbfid;Unit price;Sold;at;at;ok;zip;note\r\n"
        b'1;2.50;2024-02-29;2024-02-29 12:30;2024-02-29T12:30:00+02:00;true;00501;"a ""b"";\r\nc"\r\n'
        b'-2;3;;"";;FALSE;"";\r\n',
    )

    assert job["state"] == "succeeded", job["error"]
    assert job["result"].pop("seconds") > 0
    assert job["result"] == {
        "table": "t",
        "source": "default",
        "rows": 2,
        "rejected": 0,
        "columns": [
            {"name": "id", "type": "bigint", "title": None},
            {"name": "unit_price", "type": "numeric", "title": "Unit price"},
            {"name": "sold", "type": "date", "title": "Sold"},
            {"name": "at", "type": "timestamp", "title": None},
            {"name": "at_2", "type": "timestamptz", "title": "at"},
            {"name": "ok", "type": "boolean", "title": None},
            {"name": "zip", "type": "text", "title": None},
            {"name": "note", "type": "text", "title": None},
        ],
    }
    assert [tuple(row) for row in await source.fetch("SELECT * FROM t")] == [
        (
            1,
            Decimal("2.50"),
            date(2024, 2, 29),
            datetime(2024, 2, 29, 12, 30),  # noqa: DTZ001  the column has no time zone
            datetime(2024, 2, 29, 10, 30, tzinfo=UTC),
            True,
            "00501",
            'a "b";\r\nc',
        ),
        (-2, Decimal(3), None, None, None, False, None, None),
    ]
    assert job["progress"]["done"] == job["progress"]["total"]
    assert job["progress"]["counts"] == {"rows": 2, "rejected": 0}


@pytest.mark.usefixtures("small_chunks")
async def test_a_value_far_down_decides_the_type_of_its_column(service: Service, source: asyncpg.Connection) -> None:
    data = b"id,price,name,day\n" + rows(40_000) + b"x1,1e3,,unknown\n" + b"5,6,7,\n"

    job = await ended(service, data)

    assert job["state"] == "succeeded", job["error"]
    assert [column["type"] for column in job["result"]["columns"]] == ["text", "numeric", "text", "text"]
    assert job["result"]["rows"] == 40_002
    assert tuple(await source.fetchrow("SELECT count(*), sum(price), count(day) FROM t")) == (
        40_002,
        sum(n + Decimal("0.5") for n in range(40_000)) + 1006,
        40_001,
    )
    assert job["progress"]["done"] == job["progress"]["total"] == 2 * len(data)


@pytest.mark.usefixtures("small_chunks")
async def test_rows_that_cannot_be_read_are_left_out_and_listed(service: Service, source: asyncpg.Connection) -> None:
    # The widening of `b` at the end makes a second pass, which must not list them twice.
    data = b'a,b\n1,2\n3\n"4\n4",5,6\n7,\xff\n8,"x"y\n9,a\0b\n' + b"10,11\n" * 60_000 + b"12,x\n"

    job = await ended(service, data)

    assert job["state"] == "succeeded", job["error"]
    assert (job["result"]["rows"], job["result"]["rejected"]) == (60_002, 5)
    assert job["progress"]["counts"] == {"rows": 60_002, "rejected": 5}
    assert await source.fetchval("SELECT count(*) FROM t") == 60_002
    assert await rejected(service, job) == [
        ["line", "reason", "row"],
        ["3", "1 field, not 2 as in the header", "3"],
        ["4", "3 fields, not 2 as in the header", '"4\n4",5,6'],
        ["6", "not UTF-8; save the file as UTF-8", "7,\\xff"],
        ["7", "text after a closing quote", '8,"x"y'],
        ["8", "a NUL character", "9,a\\x00b"],
    ]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("data", "message", "listed"),
    [
        (
            b"a,b\n" + b"1,2\n" * 20_000 + b"1\n" * 1001,
            "More than 1,000 rows cannot be read: line 20,002, 1 field",
            1001,
        ),
        (b"a,b\n1,2\n1\n2\n", "More than half of the rows cannot be read: line 3, 1 field", 2),
    ],
)
async def test_a_file_with_too_many_bad_rows_fails_and_lists_them(
    service: Service, source: asyncpg.Connection, data: bytes, message: str, listed: int
) -> None:
    job = await ended(service, data)

    assert job["state"] == "failed"
    assert job["error"]["message"].startswith(message)
    assert len(await rejected(service, job)) == listed + 1
    assert await tables(source) == []


@pytest.mark.usefixtures("small_chunks")
async def test_what_is_no_whole_csv_file_fails_in_words_and_leaves_no_table(
    service: Service, source: asyncpg.Connection
) -> None:
    cases = {
        b"": "The file is empty",
        b"\n\n": "The file is empty",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR": "Save it as CSV in UTF-8",
        b"PK\x03\x04" + bytes(1000): "an Excel workbook",
        b"a,b\n1,2\n3": "cut off there. Upload the whole file again",
        b'a,b\n1,2\n3,"x\n4,5\n': "The row on line 3 has no closing quote",
        b"a,b\n" + b"1,2\n" * 100_000 + b'3,"x\n': "The row on line 100,002 has no closing quote",
        b",".join(b"c%d" % n for n in range(1601)) + b"\n": "1,601 columns",
        b",".join([b"a"] * 1600) + b"\n" + b",".join([b"2.5"] * 1600) + b"\n": "row is too big",
    }

    for data, message in cases.items():
        job = await ended(service, data)

        assert (job["state"], job["error"]["type"]) == ("failed", "fatal")
        assert message in job["error"]["message"]
    assert await tables(source) == []


async def test_a_header_alone_makes_an_empty_table(service: Service, source: asyncpg.Connection) -> None:
    job = await ended(service, b"a,b\n")

    assert (job["state"], job["result"]["rows"]) == ("succeeded", 0)
    assert [column["type"] for column in job["result"]["columns"]] == ["text", "text"]
    assert await source.fetch("SELECT a, b FROM t") == []


async def test_a_table_that_exists_is_left_alone(service: Service, source: asyncpg.Connection) -> None:
    await source.execute("CREATE TABLE t AS SELECT 1 AS mine")

    job = await ended(service, b"a\n1\n")

    assert job["state"] == "failed"
    assert "has a table or type 't' already. Choose another name" in job["error"]["message"]
    assert await source.fetchval("SELECT mine FROM t") == 1


async def test_rows_come_into_a_table_that_exists(service: Service, source: asyncpg.Connection) -> None:
    await source.execute("""
        CREATE TABLE t (id int PRIMARY KEY, price numeric(8, 2), code varchar(9), day timestamptz, made int DEFAULT 7);
        INSERT INTO t VALUES (1, 1.00, 'one', NULL, 1)
    """)

    async def found() -> list[Any]:
        return [tuple(row) for row in await source.fetch("SELECT id, price::text, code, made FROM t ORDER BY id")]

    assert (await ended(service, b"id,price,code\n2,2.5,0\n3,3,007\n", mode="append"))["state"] == "succeeded"
    assert await found() == [(1, "1.00", "one", 1), (2, "2.50", "0", 7), (3, "3.00", "007", 7)]
    changed = b"code,id,day\nx,2,2024-01-01\nnew,4,\ntwo,2,2024-01-02\n"
    job = await ended(service, changed, mode="upsert", key=["id"])
    assert (job["state"], job["result"]["rows"]) == ("succeeded", 3), job["error"]
    assert await found() == [(1, "1.00", "one", 1), (2, "2.50", "two", 7), (3, "3.00", "007", 7), (4, None, "new", 7)]
    assert (await ended(service, b"id\n9\n", mode="replace"))["state"] == "succeeded"
    assert await found() == [(9, None, None, 7)]
    assert (await ended(service, b"id\n8\n", table="u", mode="replace"))["state"] == "succeeded"
    assert await source.fetchval("SELECT id FROM u") == 8
    for data, more, message in (
        (b"id\n9\n", {"mode": "append"}, "(id)=(9) already exists"),
        (b"id\n9999999999\n", {"mode": "append"}, "out of range"),
        (b"id\nx\n", {"mode": "append"}, "invalid input syntax"),
        (b"id\n1\n", {"mode": "append", "table": "v"}, "no table 'v'"),
        (b"id,more\n1,2\n", {"mode": "append"}, "no column 'more'"),
        (b"id,code\n1,2\n", {"mode": "upsert", "key": ["code"]}, "no unique or exclusion constraint"),
        (b"id,code\n1,2\n", {"mode": "upsert", "key": ["price"]}, "no column 'price'"),
        (b"id,code\n,2\n", {"mode": "upsert", "key": ["id"]}, "without a value in the key"),
    ):
        job = await ended(service, data, **{"table": "t", **more})
        assert (job["state"], job["error"]["type"]) == ("failed", "fatal"), data
        assert message in job["error"]["message"]
    assert await found() == [(9, None, None, 7)]
    assert sorted(await tables(source)) == ["headway_imports", "t", "u"]


async def test_a_file_may_be_compressed_and_in_another_encoding(service: Service, source: asyncpg.Connection) -> None:
    text = "a;b\n" + "".join(f"{n};größe {n}\n" for n in range(50_000)) + "1;2;3\n"
    plain = text.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("orders.csv", plain)
    for data, more in (
        (gzip.compress(plain), {}),
        (zstd.compress(plain), {}),
        (packed.getvalue(), {}),
        (text.encode("utf-16"), {}),
        (gzip.compress(text.encode("windows-1252")), {"encoding": "windows-1252"}),
    ):
        job = await ended(service, data, mode="replace", **more)
        assert job["state"] == "succeeded", job["error"]
        assert (job["result"]["rows"], job["result"]["rejected"]) == (50_000, 1)
        assert job["progress"]["done"] == job["progress"]["total"]
        assert tuple(await source.fetchrow("SELECT sum(a), max(b) FROM t")) == (1_249_975_000, "größe 9999")
        assert (await rejected(service, job))[1] == ["50002", "3 fields, not 2 as in the header", "1;2;3"]


async def test_what_is_known_of_a_file_can_be_said(service: Service, source: asyncpg.Connection) -> None:
    job = await ended(service, b"1,5|x\n2,5|y\nz\n", delimiter="|", header=False, max_rejected=1)
    assert job["state"] == "succeeded", job["error"]
    assert [column["name"] for column in job["result"]["columns"]] == ["column_1", "column_2"]
    assert [tuple(row) for row in await source.fetch("SELECT * FROM t")] == [("1,5", "x"), ("2,5", "y")]
    job = await ended(service, b"a,b\n1,2\n3,4\n5\n", table="u", max_rejected=0)
    assert job["error"]["message"].startswith("More than 0 rows cannot be read: line 4")
    for wrong in ({"encoding": "klingon"}, {"encoding": "zlib"}, {"mode": "upsert"}, {"key": ["a"]}):
        file = {"file": "0192d3b0-7b5e-7000-8000-000000000000", "table": "t"}
        job = await service.client.submit("csv.import", {**file, **wrong}, max_attempts=1)
        assert (await service.client.wait(job["id"], timeout=10))["error"]["type"] == "input-refused", wrong


async def test_types_and_dialect_can_be_given(service: Service, source: asyncpg.Connection) -> None:
    data = b"ID|zip|price\n1|10115|2\n2|'a|!'b'|3\nx|1|4\n4||4.5\n"
    given = {"quote": "'", "escape": "!", "types": {"id": "bigint", "zip": "text", "price": "numeric"}}

    job = await ended(service, data, **given)

    assert job["state"] == "succeeded", job["error"]
    assert [column["type"] for column in job["result"]["columns"]] == ["bigint", "text", "numeric"]
    assert [tuple(row) for row in await source.fetch("SELECT id, zip, price::text FROM t")] == [
        (1, "10115", "2"),
        (2, "a|'b", "3"),
        (4, None, "4.5"),
    ]
    assert (await rejected(service, job))[1:] == [["4", "id is no bigint: x", "x|1|4"]]
    for wrong, message in (
        ({"types": {"ID": "text"}}, "types has 'ID', but the file has no such column; it has: id, zip, price."),
        ({"quote": "|", "delimiter": "|"}, "must differ"),
        ({"delimiter": "a"}, "no letter"),
    ):
        job = await ended(service, data, table="u", **wrong)
        assert message in job["error"]["message"], wrong


async def test_of_two_imports_into_one_table_one_succeeds(service: Service, source: asyncpg.Connection) -> None:
    data = b"a,b,c,d\n" + rows(20_000)

    jobs = await asyncio.gather(ended(service, data), ended(service, data))

    assert sorted(job["state"] for job in jobs) == ["failed", "succeeded"]
    failed = next(job for job in jobs if job["state"] == "failed")
    assert "'t'" in failed["error"]["message"]
    assert await source.fetchval("SELECT count(*) FROM t") == 20_000


@pytest.mark.usefixtures("source")
async def test_a_source_that_cannot_take_a_table_is_named(service: Service) -> None:
    cases = {
        "nowhere": ("fatal", "There is no source 'nowhere'"),
        "mine": ("fatal", "'mine' is a database of mysql; csv.import takes Postgres and SQLite"),
        "nofile": ("handler-failed", "The source 'nofile' cannot be opened"),
        "reader": ("fatal", "does not let its user make a table"),
        "gone": ("handler-failed", "The source 'gone' cannot be reached"),
    }

    for name, (kind, message) in cases.items():
        job = await ended(service, b"a\n1\n", source=name)

        assert (job["state"], job["error"]["type"]) == ("failed", kind)
        assert message in job["error"]["message"]
        assert "none@" not in job["error"]["message"]


async def test_a_table_name_that_is_no_identifier_is_refused_at_once(service: Service) -> None:
    for table in ["", "1a", "a-b", "a.b", 'a"b', "a" * 64, "tablé", "a\n"]:
        answer = await service.http.post(
            "/api/v1/jobs",
            json={"kind": "csv.import", "input": {"file": "0192d3b0-7b5e-7000-8000-000000000000", "table": table}},
        )

        assert answer.status_code == 422, (table, answer.text)


async def stop_by_cancel(service: Service, source: asyncpg.Connection, job_id: str) -> None:
    await service.client.cancel(job_id)


async def stop_by_lost_connection(service: Service, source: asyncpg.Connection, job_id: str) -> None:
    await source.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'headway csv%'"
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("stop", "state", "message"),
    [
        (stop_by_cancel, "cancelled", None),
        (
            stop_by_lost_connection,
            "failed",
            "ConnectionError: The source 'default' closed the connection during the import.",
        ),
    ],
)
async def test_an_import_that_is_stopped_midway_leaves_no_table(
    service: Service, source: asyncpg.Connection, stop: Callable[..., Any], state: str, message: str | None
) -> None:
    """But the one that a next attempt would go on with, if the job is not cancelled."""
    data = b"a,b,c,d\n" + rows(50_000) * 30
    job_id = await submit(service, data)
    await until(lambda: importing(service, job_id))
    staging = staging_name(UUID(job_id))
    assert await tables(source) == [staging]

    await stop(service, source, job_id)

    job = await service.client.wait(job_id, timeout=30)
    assert job["state"] == state
    assert job["progress"]["done"] < len(data)
    assert (job["error"] and job["error"]["message"]) == message
    assert await tables(source) == ([] if state == "cancelled" else [staging])
    # Nothing of it is left that would hold up the next.
    assert (await ended(service, b"a\n1\n"))["state"] == "succeeded"


async def test_a_cancel_during_the_commit_comes_too_late(service: Service, source: asyncpg.Connection) -> None:
    await source.execute("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); RETURN NULL; END';
        CREATE FUNCTION wait_at_commit() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
            EXECUTE 'CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON '
                || (SELECT object_identity FROM pg_event_trigger_ddl_commands())
                || ' DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()';
        END $$;
        CREATE EVENT TRIGGER wait ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION wait_at_commit()
    """)
    job_id = await submit(service, b"a,b\n1,2\n")
    await until(lambda: source.fetchval("SELECT 1 FROM pg_stat_activity WHERE query = 'COMMIT' AND state = 'active'"))

    await service.client.cancel(job_id)

    job = await service.client.wait(job_id, timeout=10)
    assert job["cancel_requested_at"]
    assert job["state"] == "succeeded"
    assert await source.fetchval("SELECT count(*) FROM t") == 1


@hypothesis_settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=9)
    ),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    times=st.sampled_from([1, 200]),
)
async def test_what_the_csv_module_writes_comes_back_the_same(
    service: Service, source: asyncpg.Connection, table: list[list[str]], quoting: Any, times: int
) -> None:
    width = len(table[0]) if table else 1
    # The first row makes every column text.
    expected = [["text"] * width, *table] * times
    written = io.StringIO()
    csv.writer(written, quoting=quoting).writerows([[f"c{n}" for n in range(width)], *expected])
    name = f"t{next(TABLES)}"

    job = await ended(service, written.getvalue().encode(), table=name)

    assert job["state"] == "succeeded", job["error"]
    found = await source.fetch(f"SELECT * FROM {name}")
    assert [list(row) for row in found] == [[cell or None for cell in row] for row in expected]
