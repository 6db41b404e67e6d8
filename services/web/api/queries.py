"""`/query`: one statement that reads, on a source, answered as JSON. Its long form is the kind `sql.export`."""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from django.http import HttpResponse
from ninja import Field, Router, Schema
from pydantic import ConfigDict

from headway.errors import InvalidRequest, TooLarge
from headway.sources import Reading
from headway.sources.columns import Column, converters, encoded, typed
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest

# Rows are taken and encoded so many at a time; between two of these it is others' turn.
AT_A_TIME = 100
# On the wire a row takes at most about so many times the bytes that it has as JSON.
WIRE = 8

router = Router(tags=["query"])


class Query(Schema):
    """A statement and how much of its answer is wanted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source: str = Field(default="default", max_length=200, description="The source to ask.")
    sql: str = Field(min_length=1, description="One statement that reads.")
    parameters: list[Any] | dict[str, Any] = Field(
        default_factory=list,
        description="Values to bind: a list for `$1, $2` (Postgres) or `?` (SQLite), an object for `:name`.",
    )
    limit: int | None = Field(default=None, ge=1, description="Most rows; HEADWAY_QUERY_ROWS if left out.")
    timeout: float | None = Field(default=None, gt=0, description="Seconds; HEADWAY_QUERY_TIMEOUT if left out.")


@dataclass(slots=True)
class Found:
    """Rows as they are answered."""

    columns: Sequence[Column]
    rows: list[bytes]
    truncated: bool


@router.post("", summary="Read from a source", response=schemas.Found)
async def query(request: ApiRequest, query: Query) -> HttpResponse:
    """Columns with the source's types, rows as arrays, and whether there were more of them than are answered.

    The transaction can only read. A statement that takes too long is ended in the source, and answered with 504.
    """
    request.only()
    app, settings = request.app, request.app.settings
    _require(settings.sources_of(request.auth.tenant_id), query.source)
    began = time.perf_counter()
    async with app.sources.read(
        query.source,
        query.sql,
        query.parameters,
        seconds=min(query.timeout or settings.query_timeout, settings.query_timeout),
        most_bytes=WIRE * settings.query_bytes,
    ) as reading:
        found = await _found(
            reading, min(query.limit or settings.query_rows, settings.query_rows), settings.query_bytes
        )
    head = json.dumps([asdict(column) for column in found.columns], separators=(",", ":")).encode()
    ms = round((time.perf_counter() - began) * 1000)
    return answer(
        b'{"columns":%b,"rows":[%b],"truncated":%b,"ms":%d}'
        % (head, b",".join(found.rows), b"true" if found.truncated else b"false", ms)
    )


def _require(names: Collection[str], name: str) -> None:
    if name not in names:
        there = ", ".join(sorted(names)) or "none; the operator names them in HEADWAY_SOURCES"
        message = f"There is no source {name!r}; there are: {there}."
        raise InvalidRequest(message, errors=[{"field": "source", "message": message}])


async def _found(reading: Reading, most: int, most_bytes: int) -> Found:
    """The rows up to a number of them, and of bytes. Raises TooLarge if not even the first fits."""
    found = Found(reading.columns, [], truncated=False)
    size = 0
    convert = converters(reading.columns)
    while rows := await reading.rows(min(AT_A_TIME, most + 1 - len(found.rows))):
        found.columns = typed(found.columns, rows)
        for row in rows:
            line = encoded(row, convert)
            size += len(line) + 1
            found.truncated = size > most_bytes or len(found.rows) == most
            if size > most_bytes and not found.rows:
                raise TooLarge(f"The first row is over the limit of {most_bytes:,} bytes; select shorter columns.")
            if found.truncated:
                return found
            found.rows.append(line)
    return found
