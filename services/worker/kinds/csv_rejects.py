"""The rows that an import leaves out, as an artifact."""

import csv
import io
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from headway import Fatal, JobContext
from headway.kinds import ArtifactWriter
from services.worker.kinds.csv_rows import Rejected

MAX_REJECTED = 1000


class Rejects:
    """The artifact `rejected.csv`, begun with the first row that is rejected. A Fatal that ends the block keeps it."""

    def __init__(self, job: JobContext) -> None:
        self.count = 0
        self._job = job
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
        self.count += len(rows)
        self._first = [*self._first, *rows][:3]
        if self.count > MAX_REJECTED:
            raise Fatal(f"More than {MAX_REJECTED:,} rows cannot be read: {self.examples}")

    async def _write(self, rows: Sequence[Sequence[object]]) -> None:
        assert self._out is not None
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        await self._out.write(text.getvalue().encode())
