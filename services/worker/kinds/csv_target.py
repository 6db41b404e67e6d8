"""Where the rows of an import are to be: what Postgres and SQLite have in common. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal
from uuid import UUID

from headway import Fatal

Mode = Literal["create", "append", "replace", "upsert"]

PREFIX = "headway_import_"
# How long what an import has begun may wait for the next attempt of its job.
KEPT = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Target:
    """The table that rows are to be in, and how they come into it."""

    table: str
    mode: Mode = "create"
    key: Sequence[str] = ()


def staging_name(job_id: UUID) -> str:
    """What the table is called that a job fills until the import is complete."""
    return f"{PREFIX}{job_id.hex}"


def require(there: Collection[str], columns: Sequence[str], target: Target) -> bool:
    """Whether the table exists, which has the columns `there`; only for `replace` need it not.

    Raises Fatal if the file's `columns` do not fit it.
    """
    table = target.table
    if not there:
        if target.mode == "replace":
            return False
        raise Fatal(f'There is no table {table!r} to {target.mode} to. Create it, or import with "mode": "create".')
    if unknown := [name for name in columns if name not in there]:
        raise Fatal(f"The table {table!r} has no column {unknown[0]!r}; it has: {', '.join(sorted(there))}.")
    if missing := [name for name in target.key if name not in columns]:
        raise Fatal(f"The file has no column {missing[0]!r}, which is to be a key; it has: {', '.join(columns)}.")
    return True


def keyless(key: Sequence[str]) -> Fatal:
    """The error where a row has no value in the key."""
    return Fatal(f"Rows without a value in the key ({', '.join(key)}) cannot be found again. Leave them out.")


def taken(source: str, table: str) -> Fatal:
    """The error where the name of the table is not free."""
    return Fatal(
        f"The source {source!r} has a table or type {table!r} already. "
        "Choose another name for the table, or drop it first."
    )
