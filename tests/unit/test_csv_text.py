"""A file's text comes out the same however it is compressed and encoded, and no bomb goes off."""

import gzip
import io
import zipfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from headway import Fatal
from headway.job import File
from services.worker.kinds.csv_text import Text

CSV = b"".join(b"%d,name %d\n" % (number, number * 7919) for number in range(30_000))


class InMemory:
    """An uploaded file whose bytes are here."""

    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        self.file = File(uuid4(), uuid4(), "a.csv", "text/csv", len(data), "", datetime.now(UTC), None)
        self._data = data
        self._step = step

    async def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        for place in range(start, len(self._data), self._step):
            yield self._data[place : place + self._step]


async def read(data: bytes, encoding: str | None = None, *, step: int = 1 << 20, start: int = 0) -> bytes:
    text = await Text.open(InMemory(data, step), encoding)
    found = [piece async for piece in text.pieces(start)]
    assert text.taken == len(data)
    assert max(map(len, found), default=0) <= 4 * (64 << 10)
    return b"".join(found)


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED, stream: bool = False) -> bytes:
    class Unseekable(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    out = Unseekable() if stream else io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("step", [1, 1000, 1 << 20])
async def test_what_is_compressed_comes_out_the_same(step: int) -> None:
    data = CSV if step > 1 else CSV[:2000]
    for packed in (
        data,
        gzip.compress(data),
        gzip.compress(data[:500]) + gzip.compress(data[500:]) + bytes(512),
        zstd.compress(data),
        zstd.compress(data[:500]) + zstd.compress(data[500:]),
        zipped(("a.csv", data)),
        zipped(("a.csv", data), stream=True),
    ):
        assert await read(packed, step=step) == data
        assert await read(packed, step=step, start=700) == data[700:]


@given(st.text(), st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32"]), st.integers(1, 9))
async def test_what_is_encoded_comes_out_as_utf_8(text: str, encoding: str, step: int) -> None:
    assert await read(text.encode(encoding), encoding, step=step) == text.encode()


async def test_what_is_broken_or_a_bomb_is_refused_in_words() -> None:
    packed = zipped(("a.csv", CSV))
    for data, message in (
        (gzip.compress(CSV)[:-9], "cut off"),
        (zstd.compress(CSV)[:-9], "cut off"),
        (packed[:5000], "cut off"),
        (gzip.compress(CSV)[:5000] + b"x" * 5000, "cannot be decompressed"),
        (zstd.compress(CSV)[:5000] + b"x" * 5000, "cut off|cannot be decompressed"),
        (packed.replace(packed[14:18], b"\1\2\3\4"), "checksum"),
        (zipped(("a.csv", CSV), ("b.csv", CSV)), "not of one"),
        (zipped(("a.csv", CSV), method=zipfile.ZIP_STORED), "not of one"),
        (zipped(("[Content_Types].xml", CSV)), "Excel"),
        (gzip.compress(bytes(50_000_000)), "250 times"),
        (zstd.compress(bytes(50_000_000)), "250 times"),
        (zipped(("a.csv", bytes(50_000_000))), "250 times"),
    ):
        with pytest.raises(Fatal, match=message):
            await read(data)
