"""The text of an uploaded file in UTF-8, piece by piece, however it is compressed and encoded."""

import asyncio
import codecs
import sys
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Protocol

from headway import Fatal
from headway.context import InputFile

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Checked on the event loop in about a millisecond, then it is others' turn. A thread would hold them up for longer: it
# gives way only every five.
PIECE = 64 << 10
# What becomes so many times as large is no text, and would fill the source with nothing.
EXPANSION = 250
GZIP, ZSTD, ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
# The most memory that a file of zstd may ask for: that of its own strongest level.
WINDOW_LOG = 27


class Text:
    """A file's text. `plain` if its bytes are that: only then can it be read from any byte on at once.

    `taken` is how many bytes of the file went into the pieces so far.
    """

    def __init__(self, file: InputFile, head: bytes, encoding: str | None) -> None:
        self.taken = 0
        self._file = file
        self._packing = next((packing for packing in _UNPACKERS if head.startswith(packing)), None)
        if encoding is None and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-16"
        self._encoding = encoding if encoding and codecs.lookup(encoding).name != "utf-8" else None
        self.plain = self._packing is None and self._encoding is None

    @classmethod
    async def open(cls, file: InputFile, encoding: str | None) -> "Text":
        """`encoding` is one of Python's names; without one it is UTF-8, or UTF-16 if the file begins as that."""
        head = b""
        async for chunk in file.chunks():
            head += chunk
            if len(head) >= len(ZIP):
                break
        return cls(file, head, encoding)

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return self._file.file.size

    async def pieces(self, start: int = 0) -> AsyncGenerator[bytes]:
        """The text from byte `start` of it on, so little at a time that others get their turn.

        Raises Fatal if the file is not what it seems to be, or becomes too large.
        """
        if self.plain:
            self.taken = start
            async for chunk in self._file.chunks(start=start):
                for place in range(0, len(chunk), PIECE):
                    piece = chunk[place : place + PIECE]
                    self.taken += len(piece)
                    yield piece
                    await asyncio.sleep(0)
            return
        before = start
        async with aclosing(self._decoded()) as decoded:
            async for piece in decoded:
                if len(piece) > before:
                    yield piece[before:]
                    await asyncio.sleep(0)
                before = max(0, before - len(piece))

    async def _decoded(self) -> AsyncGenerator[bytes]:
        decoder = codecs.getincrementaldecoder(self._encoding)("surrogateescape") if self._encoding else None
        async with aclosing(self._unpacked()) as unpacked:
            async for data in unpacked:
                yield decoder.decode(data).encode(errors="surrogateescape") if decoder else data
        if decoder:
            yield decoder.decode(b"", final=True).encode(errors="surrogateescape")

    async def _unpacked(self) -> AsyncGenerator[bytes]:
        self.taken = 0
        unpacker = _UNPACKERS[self._packing]() if self._packing else None
        made = 0
        try:
            async for chunk in self._file.chunks():
                for place in range(0, len(chunk), PIECE):
                    data = chunk[place : place + PIECE]
                    self.taken += len(data)
                    for piece in unpacker.feed(data) if unpacker else [data]:
                        made += len(piece)
                        if made > EXPANSION * self.size + PIECE:
                            raise Fatal(f"The file becomes more than {EXPANSION} times as large, which no text does.")
                        yield piece
            if unpacker:
                unpacker.end()
        except (zlib.error, zstd.ZstdError) as error:
            raise Fatal(f"The file cannot be decompressed: {error}. Compress it again and upload that.") from None


class _Unpacker(Protocol):
    def feed(self, data: bytes) -> Iterator[bytes]:
        """What comes out, at most PIECE at a time."""

    def end(self) -> None:
        """Raises Fatal if more was to come."""


class _Gzip:
    """One member of gzip or several in a row."""

    def __init__(self) -> None:
        self._object = zlib.decompressobj(31)

    def feed(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._object.eof:
                # Zeros may follow the last member, to fill a block.
                data = data.lstrip(b"\0")
            if not data:
                return
            if self._object.eof:
                self._object = zlib.decompressobj(31)
            yield from inflated(self._object, data)
            data = self._object.unused_data

    def end(self) -> None:
        if not self._object.eof:
            raise _cut_off()


class _Zstd:
    """One frame of zstd or several in a row."""

    def __init__(self) -> None:
        self._object = self._new()

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._object.eof:
                self._object = self._new()
            yield self._object.decompress(data, PIECE)
            while not (self._object.needs_input or self._object.eof):
                yield self._object.decompress(b"", PIECE)
            data = self._object.unused_data if self._object.eof else b""

    def end(self) -> None:
        if not self._object.eof:
            raise _cut_off()

    def _new(self) -> zstd.ZstdDecompressor:
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})


class _Zip:
    """An archive with one member, read from its front."""

    def __init__(self) -> None:
        self._before = b""
        self._after = b""
        self._object: zlib._Decompress | None = None
        self._crc = 0
        # None if it follows the member.
        self._known_crc: int | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        if self._object is None:
            self._before += data
            if (start := self._start()) is None:
                return
            data, self._before = self._before[start:], b""
            self._object = zlib.decompressobj(-15)
        if not self._object.eof:
            for piece in inflated(self._object, data):
                self._crc = zlib.crc32(piece, self._crc)
                yield piece
            data = self._object.unused_data
        if self._object.eof and len(self._after) < 64:
            self._after += data[:64]

    def end(self) -> None:
        if self._object is None or not self._object.eof:
            raise _cut_off()
        # The checksum and sizes may follow the member, with a mark of their own before them or without.
        if 0 <= self._after.find(ZIP) < 32 or not 0 <= self._after.find(b"PK\x01\x02") < 32:
            raise _not_one()
        if self._known_crc is None:
            self._known_crc = int.from_bytes(self._after.removeprefix(b"PK\x07\x08")[:4], "little")
        if self._known_crc != self._crc:
            raise Fatal(
                "The file cannot be decompressed: its checksum does not fit. Compress it again and upload that."
            )

    def _start(self) -> int | None:
        """Where the member's bytes begin, once that is known."""
        if len(self._before) < 30:
            return None
        flags, method = (int.from_bytes(self._before[place : place + 2], "little") for place in (6, 8))
        name, extra = (int.from_bytes(self._before[place : place + 2], "little") for place in (26, 28))
        if flags & 1 or method != 8:
            raise _not_one()
        self._known_crc = None if flags & 8 else int.from_bytes(self._before[14:18], "little")
        if len(self._before) < 30 + name + extra:
            return None
        if self._before[30:].startswith((b"[Content_Types]", b"_rels/", b"xl/", b"docProps/")):
            raise _not_one()
        return 30 + name + extra


def inflated(unpacking: "zlib._Decompress", data: bytes) -> Iterator[bytes]:
    """What becomes of data, at most PIECE at a time."""
    while True:
        piece = unpacking.decompress(data, PIECE)
        data = unpacking.unconsumed_tail
        yield piece
        if unpacking.eof or (not data and len(piece) < PIECE):
            return


def _cut_off() -> Fatal:
    return Fatal("The file ends before what is compressed in it does: it is cut off. Upload the whole file again.")


def _not_one() -> Fatal:
    return Fatal(
        "The file is a ZIP archive, and not of one compressed file without a password, or an Excel workbook. "
        "Put one CSV file into the archive, or save the workbook as CSV in UTF-8, and upload that."
    )


_UNPACKERS: dict[bytes, type[_Unpacker]] = {GZIP: _Gzip, ZSTD: _Zstd, ZIP: _Zip}
