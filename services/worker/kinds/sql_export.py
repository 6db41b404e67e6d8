"""`sql.export`: the rows of a query of a source, of any number, as a CSV, JSONL or Parquet artifact."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headway import Fatal, JobContext, kind
from headway.context import ArtifactWriter
from headway.errors import QueryRefused, SourceUnavailable, TooLarge
from headway.settings import Source
from headway.sources import Column, Reading, Sources
from headway.sources.columns import typed
from services.worker.kinds.sql_parquet import ParquetRows
from services.worker.kinds.sql_text import CsvRows, JsonRows

# Rows are fetched in batches of about so many bytes, and no more than so many rows, which is what memory holds.
BATCH = 512 << 10
MOST_ROWS = 5000
FIRST_ROWS = 100
# One batch that is larger than this is a row of a size that is not to be exported.
MOST_BYTES = 64 << 20

Rows = Sequence[Sequence[Any]]


class ExportInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sql: str = Field(min_length=1, max_length=100_000, description="One statement that reads.")
    parameters: list[Any] | dict[str, Any] = Field(
        default_factory=list, description="Values to bind: a list for `$1` (Postgres) or `?` (SQLite), or by `:name`."
    )
    source: str = Field("default", description="The source to read: Postgres or SQLite.")
    format: Literal["csv", "jsonl", "parquet"] = "csv"
    name: str | None = Field(
        None, min_length=1, max_length=200, pattern=r"^[^/\\\x00-\x1f]+$", description="The artifact's; export.csv."
    )
    delimiter: Literal[",", ";", "\t", "|"] = Field(",", description="Of CSV.")
    escape_formulas: bool = Field(
        True, description="In CSV, a ' before text that a spreadsheet would take for a formula."
    )


class ExportResult(BaseModel):
    artifact: str
    source: str
    rows: int
    columns: list[dict[str, str | None]] = Field(description="Name and type of each, as the source has them.")
    seconds: float


@kind("sql.export", timeout="1h", runs="process")
async def export(job: JobContext, input: ExportInput) -> ExportResult:
    """Export the rows of a query of a source to an artifact, CSV, JSONL or Parquet.

    It reads one snapshot, in a transaction that can only read; an interruption starts it over.
    """
    source = Source.model_validate({"url": job.source(input.source, reading=True)})
    sources = Sources({input.source: source}, pool=1)
    try:
        async with sources.read(
            input.source, input.sql, input.parameters, most_bytes=MOST_BYTES, estimate=True
        ) as reading:
            return await _Export(job, input, reading).run()
    except (QueryRefused, TooLarge) as error:
        raise Fatal(str(error)) from None
    except SourceUnavailable as error:
        raise ConnectionError(str(error)) from error
    finally:
        await sources.close()


class _Export:
    def __init__(self, job: JobContext, input: ExportInput, reading: Reading) -> None:
        self._job = job
        self._input = input
        self._reading = reading
        self._name = input.name or f"export.{input.format}"
        self._began = time.monotonic()
        self._done = 0
        self._total = reading.estimate

    async def run(self) -> ExportResult:
        batches = self._batches()
        first: Rows = await anext(batches, [])
        columns = typed(self._reading.columns, first)
        _require_names(columns)
        if self._input.format == "parquet":
            content_type = "application/vnd.apache.parquet"
            async with self._job.artifact(self._name, content_type) as out:
                await self._parquet(out, columns, first, batches)
        else:
            rows = self._texts(columns)
            async with self._job.artifact(self._name, rows.content_type) as out:
                await out.write(rows.head)
                await out.write(rows.encode(first))
                async for batch in batches:
                    await out.write(rows.encode(batch))
        await self._job.report(self._done, self._done, "exporting", unit="rows")
        return ExportResult(
            artifact=self._name,
            source=self._input.source,
            rows=self._done,
            columns=[{"name": column.name, "type": column.type} for column in columns],
            seconds=round(time.monotonic() - self._began, 3),
        )

    def _texts(self, columns: Sequence[Column]) -> CsvRows | JsonRows:
        if self._input.format == "jsonl":
            return JsonRows(columns)
        return CsvRows(columns, delimiter=self._input.delimiter, escape=self._input.escape_formulas)

    async def _parquet(
        self, out: ArtifactWriter, columns: Sequence[Column], first: Rows, batches: AsyncIterator[Rows]
    ) -> None:
        async with ParquetRows(out, columns, self._row_size) as rows:
            if first:
                await rows.write(first)
            async for batch in batches:
                await rows.write(batch)

    @property
    def _row_size(self) -> int:
        return max(1, self._reading.received // max(1, self._done))

    async def _batches(self) -> AsyncIterator[Rows]:
        """The rows as they are read, each batch reported when it was written."""
        most = FIRST_ROWS
        while rows := await self._reading.rows(most):
            self._done += len(rows)
            yield rows
            most = max(1, min(MOST_ROWS, BATCH // self._row_size))
            if self._total is not None and self._done >= self._total:
                # The planner expected fewer; how many there are is told by nothing but the end.
                self._total = self._done + self._done // 4
            await self._job.report(self._done, self._total, "exporting", unit="rows")


def _require_names(columns: Sequence[Column]) -> None:
    """Raises Fatal if a name stands twice: neither an object nor Parquet could hold both."""
    name, count = Counter(column.name for column in columns).most_common(1)[0]
    if count > 1:
        raise Fatal(f"The query has {count} columns named {name!r}; name them apart: SELECT … AS other_name.")
