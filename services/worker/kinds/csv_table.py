"""A new table of a Postgres source: created, filled through COPY and committed as one, or not there at all."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import asyncpg
import structlog

from headway import Fatal

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

CONNECT_TIMEOUT = 10.0
CREATE_TIMEOUT = 30.0
COMMIT_TIMEOUT = 5.0

log = structlog.get_logger(__name__)


@asynccontextmanager
async def connected(url: str, source: str) -> AsyncIterator["Connection"]:
    """A connection to the source for one import. Whatever is not committed when the block ends never was.

    Raises Fatal if the source is not Postgres, ConnectionError if it cannot be reached.
    """
    scheme, _, place = url.partition("://")
    if scheme.partition("+")[0] not in {"postgresql", "postgres"}:
        raise Fatal(f"The source {source!r} is not a Postgres database; csv.import needs one. Name another source.")
    try:
        connection = await asyncpg.connect(
            f"postgresql://{place}",
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


class NewTable:
    """Raises Fatal if the table exists, or the source refuses it or its rows."""

    def __init__(self, connection: "Connection", source: str, name: str) -> None:
        self._connection = connection
        self._source = source
        self._name = name

    async def create(self, columns: Mapping[str, str]) -> None:
        """Begin: make the table, with the types of its columns by their names, for this transaction alone to see."""
        definition = ", ".join(f'"{column}" {column_type}' for column, column_type in columns.items())
        with self._refusals():
            await self._connection.execute("BEGIN; SET LOCAL lock_timeout = '5s'", timeout=CREATE_TIMEOUT)
            await self._connection.execute(f'CREATE TABLE "{self._name}" ({definition})', timeout=CREATE_TIMEOUT)

    async def fill(self, columns: Mapping[str, str], rows: AsyncIterator[bytes], delimiter: str) -> int:
        """Copy rows of CSV in; how many they were. An exception of `rows` passes through.

        Raises ConnectionError if the source goes away meanwhile.
        """

        with self._refusals():
            copying = asyncio.ensure_future(
                self._connection.copy_to_table(
                    self._name,
                    source=rows,
                    format="csv",
                    encoding="UTF8",
                    delimiter=delimiter,
                    force_null=list(columns),
                )
            )

            # asyncpg goes on waiting for leave to write when the connection is gone.
            def stop(_: object) -> None:
                copying.cancel()

            self._connection.add_termination_listener(stop)
            try:
                status = await copying
            except asyncio.CancelledError:
                if not self._connection.is_closed():
                    raise
                raise ConnectionError(f"The source {self._source!r} closed the connection during the import.") from None
            finally:
                self._connection.remove_termination_listener(stop)
        return int(status.removeprefix("COPY "))

    async def undo(self) -> None:
        """The table never was; `create` may begin anew."""
        await self._connection.execute("ROLLBACK", timeout=CREATE_TIMEOUT)

    async def commit(self) -> None:
        """Let the table appear. A cancel that comes while it does is too late, and has no effect."""
        commit = asyncio.ensure_future(self._connection.execute("COMMIT"))
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            if not (await asyncio.wait({commit}, timeout=COMMIT_TIMEOUT))[0]:
                commit.cancel()
                raise
            commit.result()
            log.info("a cancel came too late: the import was being committed")

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
            raise Fatal(
                f"The source {self._source!r} has a table or type {self._name!r} already. "
                "Choose another name for the table, or drop it first."
            ) from None
        except asyncpg.LockNotAvailableError:
            raise Fatal(
                f"Another import is making the table {self._name!r} in the source {self._source!r}. "
                "Choose another name for the table, or wait for that import."
            ) from None
        except (
            asyncpg.InsufficientPrivilegeError,
            asyncpg.InvalidSchemaNameError,
            asyncpg.ReadOnlySQLTransactionError,
        ) as error:
            raise Fatal(
                f"The source {self._source!r} does not let its user make a table: {error}. "
                "Ask its operator for the right to create tables, or name another source."
            ) from error
        except (asyncpg.DataError, asyncpg.ProgramLimitExceededError) as error:
            where = f" ({error.context})" if error.context else ""
            raise Fatal(f"Postgres refuses the rows: {error}{where}. Correct the file and upload it again.") from error
