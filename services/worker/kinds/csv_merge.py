"""The last step of an import into a table of Postgres: its rows go from the import's own table into that, all at once.

The same transaction remembers the job in a small table of the source, so that a job whose worker dies after the commit
finds that all is done.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from headway import Fatal
from services.worker.kinds.csv_position import Position
from services.worker.kinds.csv_target import Target, keyless

if TYPE_CHECKING:
    from services.worker.kinds.csv_source import Connection

# Two that make the table at the same time would meet in the catalogue; the lock is the table's own name.
LEDGER = """
BEGIN;
SELECT pg_advisory_xact_lock(hashtextextended('headway_imports', 0));
CREATE TABLE IF NOT EXISTS headway_imports (job uuid PRIMARY KEY, at timestamptz NOT NULL, position text NOT NULL);
COMMIT
"""
# As long as an unfinished import may wait for its next attempt.
REMEMBER = """
WITH old AS (DELETE FROM headway_imports WHERE at < now() - interval '7 days')
INSERT INTO headway_imports (job, at, position) VALUES ($1, now(), $2)
"""
COLUMNS = """
SELECT attname AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = to_regclass(quote_ident(current_schema()) || '.' || quote_ident($1)) AND attnum > 0
    AND NOT attisdropped
"""


async def remembered(connection: "Connection", job_id: UUID) -> Position | None:
    """Where the import ended, if its rows are in the table already."""
    if await connection.fetchval("SELECT to_regclass('headway_imports') IS NULL"):
        await connection.execute(LEDGER)
    return Position.of(await connection.fetchval("SELECT position FROM headway_imports WHERE job = $1", job_id))


async def columns_of(connection: "Connection", table: str) -> dict[str, str]:
    """The types of a table's columns by their names; empty if there is no such table."""
    return {row["name"]: row["type"] for row in await connection.fetch(COLUMNS, table)}


async def merge(connection: "Connection", staging: str, columns: Mapping[str, str], target: Target) -> None:
    """Move the rows, within the transaction. Raises Fatal in words of Postgres if the table refuses them."""
    table, key = target.table, target.key
    types = await columns_of(connection, table)
    names = ", ".join(f'"{name}"' for name in columns)
    values = ", ".join(
        f'"{name}"' if types.get(name) == _long(column_type) else f'"{name}"::text::{types[name]}'
        for name, column_type in columns.items()
    )
    with _refused(table):
        if target.mode == "replace":
            await connection.execute(f'TRUNCATE "{table}"')
        if target.mode != "upsert":
            await connection.execute(f'INSERT INTO "{table}" ({names}) SELECT {values} FROM {staging}')
            return
        keys = ", ".join(f'"{name}"' for name in key)
        if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {staging} WHERE {_any_null(key)})"):
            raise keyless(key)
        changes = ", ".join(f'"{name}" = excluded."{name}"' for name in columns if name not in key)
        # Rows lie in the order of the file: of those with the same key the last is taken.
        await connection.execute(
            f'INSERT INTO "{table}" ({names}) SELECT {values} FROM '
            f"(SELECT DISTINCT ON ({keys}) * FROM {staging} ORDER BY {keys}, ctid DESC) AS latest "
            f"ON CONFLICT ({keys}) DO {f'UPDATE SET {changes}' if changes else 'NOTHING'}"
        )


async def remember(connection: "Connection", staging: str, position: Position) -> None:
    """The import is done, once the transaction is committed."""
    await connection.execute(f"DROP TABLE {staging}")
    await connection.execute(REMEMBER, position.job, position.model_dump_json())


def _any_null(key: Sequence[str]) -> str:
    return " OR ".join(f'"{name}" IS NULL' for name in key)


def _long(column_type: str) -> str:
    """A type of ours as `format_type` writes it."""
    zones = {"timestamp": "timestamp without time zone", "timestamptz": "timestamp with time zone"}
    return zones.get(column_type, column_type)


@contextmanager
def _refused(table: str) -> Iterator[None]:
    try:
        yield
    except (
        asyncpg.IntegrityConstraintViolationError,
        asyncpg.DataError,
        asyncpg.InvalidColumnReferenceError,
        asyncpg.CannotCoerceError,
        asyncpg.FeatureNotSupportedError,
        asyncpg.GeneratedAlwaysError,
        asyncpg.RaiseError,
    ) as error:
        detail = f" {error.detail}" if getattr(error, "detail", None) else ""
        raise Fatal(f"The table {table!r} refuses the rows: {error}.{detail}") from error
