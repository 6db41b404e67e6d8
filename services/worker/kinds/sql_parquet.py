"""Rows of a source as Parquet: converted a batch at a time, written by a thread that takes the batches."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from arro3.core import Array, DataType, Field, RecordBatch, RecordBatchReader, Schema
from arro3.io import write_parquet

from headway import Fatal
from headway.context import ArtifactWriter
from headway.sources.columns import Column
from services.worker.kinds.sql_text import text

# A row group is kept in memory, encoded, until it is complete.
GROUP = 32 << 20
PIECE = 1 << 20
# Digits of a numeric on each side of the point: Postgres does not say how many a column may have.
DECIMALS = 9
_ADVICE = "Cast it in the statement, such as to text or double precision."

# Of types that are read as text: what that is parsed as.
_PARSED = {
    "date": DataType.date32(),
    "timestamp": DataType.timestamp("us"),
    "timestamptz": DataType.timestamp("us", tz="UTC"),
    "numeric": DataType.decimal128(38, DECIMALS),
}
_NUMBERS = {
    "bool": DataType.bool(),
    "int2": DataType.int16(),
    "int4": DataType.int32(),
    "int8": DataType.int64(),
    "oid": DataType.int64(),
    "float4": DataType.float32(),
    "float8": DataType.float64(),
    "integer": DataType.int64(),
    "real": DataType.float64(),
}


class ParquetRows:
    """`async with ParquetRows(out, columns, row_size) as rows: await rows.write(…)`; complete when the block ends."""

    def __init__(self, out: ArtifactWriter, columns: Sequence[Column], row_size: int) -> None:
        self._out = out
        self._loop = asyncio.get_running_loop()
        self._makers = [_maker(column) for column in columns]
        self._columns = columns
        self._schema = Schema([Field(column.name, _type(column), nullable=True) for column in columns])
        self._group = max(1000, GROUP // max(1, row_size))
        self._batches: asyncio.Queue[RecordBatch | None] = asyncio.Queue(maxsize=2)
        self._buffer = bytearray()
        self._aborted = False
        self._writing: asyncio.Future[None] | None = None

    async def __aenter__(self) -> "ParquetRows":
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._write))
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        assert self._writing is not None
        self._aborted = error is not None
        if self._aborted:
            while not self._batches.empty():
                self._batches.get_nowait()
            self._batches.put_nowait(None)
            await asyncio.wait({self._writing})
            self._writing.exception()
            return
        await self._hand(None)
        await self._writing
        await self._out.write(bytes(self._buffer))

    async def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Raises Fatal for a value that Parquet cannot hold as its column's type."""
        arrays = [make(values) for make, values in zip(self._makers, zip(*rows, strict=True), strict=True)]
        await self._hand(RecordBatch.from_arrays(arrays, schema=self._schema))

    async def _hand(self, batch: "RecordBatch | None") -> None:
        assert self._writing is not None
        room = asyncio.ensure_future(self._batches.put(batch))
        try:
            await asyncio.wait({room, self._writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
        if self._writing.done():
            self._writing.result()

    def _write(self) -> None:
        reader = RecordBatchReader.from_batches(self._schema, self._taken())
        file: Any = _Pieces(self._piece)
        write_parquet(reader, file, compression="zstd(1)", max_row_group_size=self._group)

    def _taken(self) -> "Iterator[RecordBatch]":
        """The batches, in the thread; it raises where the file is not to be completed."""
        while (batch := asyncio.run_coroutine_threadsafe(self._batches.get(), self._loop).result()) is not None:
            yield batch
        if self._aborted:
            raise _Aborted

    def _piece(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= PIECE and not self._aborted:
            data, self._buffer = bytes(self._buffer), bytearray()
            asyncio.run_coroutine_threadsafe(self._out.write(data), self._loop).result()


class _Aborted(Exception):
    """The export gave up."""


class _Pieces:
    """The little of a file that the writer of Parquet needs."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take

    def write(self, data: bytes) -> int:
        self._take(data)
        return len(data)

    def flush(self) -> None:
        """What is taken goes on by itself."""

    def read(self, size: int = -1) -> bytes:
        raise OSError("It is only written.")

    def seek(self, place: int, whence: int = 0) -> int:
        raise OSError("It is only written.")


def _type(column: Column) -> DataType:
    if column.type in ("bytea", "blob"):
        return DataType.binary()
    return _PARSED.get(column.type or "") or _NUMBERS.get(column.type or "") or DataType.utf8()


def _maker(column: Column) -> Callable[[Sequence[Any]], Array]:
    """What makes an array of the column's values."""
    kind = _type(column)

    def plain(values: Sequence[Any]) -> Array:
        try:
            return Array(values, kind)
        except (TypeError, ValueError, OverflowError) as error:
            raise Fatal(f"The column {column.name!r} has values of several types ({error}). {_ADVICE}") from None

    def parsed(values: Sequence[Any]) -> Array:
        if column.type == "numeric" and (long := next(filter(_too_long, filter(None, values)), None)):
            raise Fatal(f"The column {column.name!r} has {long}, beyond {DECIMALS} decimals. {_ADVICE}")
        array = Array(values, DataType.utf8()).cast(kind)
        if array.null_count != values.count(None):
            lost = next(value for value, kept in zip(values, array.to_pylist(), strict=True) if value and kept is None)
            raise Fatal(f"The column {column.name!r} has {lost}, which Parquet cannot hold as {column.type}. {_ADVICE}")
        return array

    def texts(values: Sequence[Any]) -> Array:
        return plain([value if value is None or type(value) is str else _text(value) for value in values])

    def binary(values: Sequence[Any]) -> Array:
        return plain([bytes.fromhex(value[2:]) if type(value) is str else value for value in values])

    if column.type in _PARSED:
        return parsed
    if column.type in _NUMBERS:
        return plain
    return binary if column.type in ("bytea", "blob") else texts


def _text(value: Any) -> str:
    return str(text(value))


def _too_long(number: str) -> bool:
    return len(number.partition(".")[2]) > DECIMALS
