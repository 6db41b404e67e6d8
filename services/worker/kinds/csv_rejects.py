"""The rows that an import leaves out, as an artifact."""

import asyncio
import csv
import io
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Self

from headway import Fatal, JobContext
from headway.context import ArtifactWriter
from services.worker.kinds.csv_layout import Layout
from services.worker.kinds.csv_rows import Rejected, RowReader
from services.worker.kinds.csv_text import Text


class Rejects:
    """The artifact `rejected.csv`, begun with the first row that is rejected. A Fatal that ends the block keeps it.

    `places` are the byte and the line of the file that each of the rows begins on.
    """

    def __init__(self, job: JobContext, most: int) -> None:
        self.places: list[tuple[int, int]] = []
        self._job = job
        self._most = most
        self._open = AsyncExitStack()
        self._out: ArtifactWriter | None = None
        self._first: list[Rejected] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Fatal):
            await self.close()
        else:
            await self._open.__aexit__(kind, error, traceback)

    async def close(self) -> None:
        """Complete the artifact."""
        await self._open.aclose()

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.places)

    @property
    def examples(self) -> str:
        """The first few in words, and what to do."""
        rows = "; ".join(f"line {row.line:,}, {row.reason}" for row in self._first)
        return f"{rows}. All are in the artifact rejected.csv. Correct the file and upload it again."

    async def add(self, rows: Sequence[Rejected]) -> None:
        """Raises Fatal when they are more than an import may have."""
        if not rows:
            return
        if self._out is None:
            self._out = await self._open.enter_async_context(self._job.artifact("rejected.csv", "text/csv"))
            await self._write([("line", "reason", "row")])
        await self._write([(row.line, row.reason, row.row) for row in rows])
        self.places += [(row.offset, row.line) for row in rows]
        self._first = [*self._first, *rows][:3]
        if self.count > self._most:
            raise Fatal(f"More than {self._most:,} rows cannot be read: {self.examples}")

    async def restore(self, places: Sequence[tuple[int, int]], text: Text, layout: Layout) -> None:
        """Add the rows that an attempt before this one has rejected, from the file."""
        while self.count < len(places):
            offset, line = places[self.count]
            reader = RowReader(layout, offset=offset, lines=line - 1)
            async with aclosing(text.pieces(offset)) as pieces:
                async for piece in pieces:
                    reader.match(piece)
                    await asyncio.to_thread(reader.resolve)
                    # Text that cannot be read from any byte on is read once, for all of them.
                    if reader.rejected and (text.plain or len(reader.rejected) >= len(places)):
                        break
            found = reader.rejected[: len(places) - self.count]
            if not found:
                raise RuntimeError(f"Line {line}, which an attempt before this one has rejected, can be read now.")
            await self.add(found)

    async def _write(self, rows: Sequence[Sequence[object]]) -> None:
        assert self._out is not None
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        await self._out.write(text.getvalue().encode())
