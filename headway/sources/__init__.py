"""Sources: databases that the operator has named, read through connections that are opened once and kept.

A statement is read in a transaction that can only read, under a deadline that the source itself has no say in: what
runs longer is ended from outside, and its connection is thrown away.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from headway.errors import DeadlinePassed, QueryRefused
from headway.settings import Source, dialect
from headway.sources.columns import Column
from headway.sources.postgres import PostgresReader
from headway.sources.sqlite import SqliteReader

__all__ = ["Column", "Reader", "Reading", "Sources"]

Parameters = Sequence[Any] | Mapping[str, Any]


class Reading(Protocol):
    """A statement under way."""

    @property
    def columns(self) -> Sequence[Column]:
        """What each row has. Of SQLite, whose types are those of values, only the names are known."""

    @property
    def estimate(self) -> int | None:
        """How many rows the planner expects; None if it was not asked, or cannot tell."""

    @property
    def received(self) -> int:
        """The bytes that have come so far, about."""

    async def rows(self, most: int) -> Sequence[Any]:
        """The next rows, each a sequence of values, maybe fewer than `most`; none at the end.

        Numbers and booleans are Python's, everything else is text as the source writes it, in lists for arrays; bytes
        of SQLite are bytes. Raises QueryRefused, SourceUnavailable, or TooLarge where the rows are over the limit.
        """


class Reader(Protocol):
    """What reads one source. A block that is cancelled, such as at its deadline, ends the statement in the source."""

    def reading(
        self, sql: str, parameters: Parameters, *, seconds: float | None, most_bytes: int, estimate: bool = False
    ) -> AbstractAsyncContextManager[Reading]: ...

    async def close(self) -> None: ...


class Sources:
    """The sources of one process, each opened by its first use."""

    def __init__(self, sources: Mapping[str, Source], *, pool: int) -> None:
        self._sources = sources
        self._pool = pool
        self._readers: dict[str, Reader] = {}

    @asynccontextmanager
    async def read(
        self,
        name: str,
        sql: str,
        parameters: Parameters = (),
        *,
        seconds: float | None = None,
        most_bytes: int,
        estimate: bool = False,
    ) -> AsyncIterator[Reading]:
        """`async with sources.read("default", "SELECT …", [1], seconds=10, most_bytes=1 << 20) as reading`.

        One statement, which gives rows and only reads. `parameters` are `$1, $2` of Postgres and `?` of SQLite, or by
        name `:name` of both. The block has so many `seconds`; leaving it early ends the statement in the source. At
        most `most_bytes` are taken from it between two calls of `rows`.

        Raises KeyError for a name that is not there, QueryRefused, DeadlinePassed and SourceUnavailable.
        """
        if name not in self._readers:
            self._readers[name] = _reader(name, self._sources[name], self._pool)
        reader, limit = self._readers[name], asyncio.timeout(seconds)
        try:
            async with (
                limit,
                reader.reading(sql, parameters, seconds=seconds, most_bytes=most_bytes, estimate=estimate) as reading,
            ):
                yield reading
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlinePassed(
                f"The source {name!r} did not answer within {seconds:g} s; the statement was ended there. "
                "Select less, or submit an sql.export."
            ) from None

    async def close(self) -> None:
        """Disconnect, within seconds also from a source that does not answer."""
        readers, self._readers = list(self._readers.values()), {}
        for reader in readers:
            await reader.close()


def _reader(name: str, source: Source, pool: int) -> Reader:
    url = source.reading.get_secret_value()
    match dialect(source.reading):
        case "postgresql":
            return PostgresReader(name, url, pool)
        case "sqlite":
            return SqliteReader(name, url, pool)
        case other:
            raise QueryRefused(
                f"The source {name!r} is a database of {other}; queries and exports take Postgres and SQLite. "
                "Kinds of your own can use it."
            )
