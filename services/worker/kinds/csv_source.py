"""A connection to the Postgres that an import fills, COPY through it, and what Postgres refuses, in words."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import asyncpg

from headway import Fatal, Retry
from headway.sources.postgres import dsn
from services.worker.kinds.csv_target import taken

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

CONNECT_TIMEOUT = 10.0


@asynccontextmanager
async def connected(url: str, source: str) -> AsyncIterator["Connection"]:
    """A connection to the source. A transaction that is under way when the block ends never was.

    Raises ConnectionError if the source cannot be reached.
    """
    try:
        connection = await asyncpg.connect(
            dsn(url),
            timeout=CONNECT_TIMEOUT,
            server_settings={"application_name": "headway csv.import"},
        )
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"The source {source!r} cannot be reached: {reason}.") from error
    try:
        yield connection
    finally:
        # Not `close`, which waits for the server: a cancelled import must let go of it at once.
        connection.terminate()


async def copy(
    connection: "Connection", table: str, columns: Iterable[str], rows: AsyncIterator[bytes], delimiter: str
) -> int:
    """Copy rows of CSV into a table; how many they were. An exception of `rows` passes through.

    Raises ConnectionError if the source goes away meanwhile.
    """
    copying = asyncio.ensure_future(
        connection.copy_to_table(
            table, source=rows, format="csv", encoding="UTF8", delimiter=delimiter, force_null=list(columns)
        )
    )

    # asyncpg goes on waiting for leave to write when the connection is gone.
    def stop(_: object) -> None:
        copying.cancel()

    connection.add_termination_listener(stop)
    try:
        status = await copying
    except asyncio.CancelledError:
        if not connection.is_closed():
            raise
        raise ConnectionError from None
    finally:
        connection.remove_termination_listener(stop)
    return int(status.removeprefix("COPY "))


@contextmanager
def refusals(source: str, table: str) -> Iterator[None]:
    """Errors of the source as those of a job: Fatal, Retry where a lock was in the way, ConnectionError."""
    try:
        yield
    except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
        raise taken(source, table) from None
    except asyncpg.LockNotAvailableError:
        raise Retry(f"Someone else has locked the table of this import in the source {source!r}.", after=10) from None
    except (
        asyncpg.InsufficientPrivilegeError,
        asyncpg.InvalidSchemaNameError,
        asyncpg.ReadOnlySQLTransactionError,
    ) as error:
        raise Fatal(
            f"The source {source!r} does not let its user make a table: {error}. "
            "Ask its operator for the right to create tables, or name another source."
        ) from error
    except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
        where = f" ({error.context})" if error.context else ""
        raise Fatal(f"Postgres refuses the rows: {error}{where}. Correct the file and upload it again.") from error
    except (
        ConnectionError,
        asyncpg.PostgresConnectionError,
        asyncpg.AdminShutdownError,
        asyncpg.CrashShutdownError,
        asyncpg.InterfaceError,
        # A statement that is begun between Postgres' last word on a connection and its end.
        asyncpg.InternalClientError,
    ) as error:
        raise ConnectionError(f"The source {source!r} closed the connection during the import.") from error
