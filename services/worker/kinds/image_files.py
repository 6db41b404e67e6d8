"""The images in uploaded files: each is one, or a zip of them. What could harm is refused before it is read."""

import io
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from uuid import UUID

from headway import Fatal, JobContext
from headway.context import InputFile

MAX_IMAGES = 20_000
# Bytes of an image, unpacked.
MAX_IMAGE = 64 << 20
# Bytes of all images of a zip, unpacked.
MAX_TOTAL = 16 << 30
# How often a member may be as large as what is packed, from so many bytes on. Images are packed already.
MAX_RATIO = 100
RATIO_FROM = 1 << 20
# The end of a zip, where its directory is: enough for MAX_IMAGES with long names.
DIRECTORY = 8 << 20
MAX_NAME = 500
# What archivers add that nobody has put in.
LITTER = re.compile(r"(^|/)(__MACOSX/|\._[^/]*$|\.DS_Store$|Thumbs\.db$|desktop\.ini$)")
UNSAFE = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\x00-\x1f\x7f]")
ENCRYPTED = 0x1
LOCAL_HEADER = 30


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that was found: where its bytes are, and how they are packed.

    `refusal` says why it is not to be read, if it is not.
    """

    name: str
    file: InputFile
    size: int
    packed: int
    start: int = 0
    member: bool = False
    deflated: bool = False
    crc: int | None = None
    refusal: str | None = None


async def find(job: JobContext, ids: Sequence[UUID]) -> list[Picture]:
    """The images of the files, in the order of the files and as they lie in a zip.

    Raises Fatal, saying what to change, for a zip that is damaged or made to harm, and for too many images.
    """
    pictures = list[Picture]()
    for number in ids:
        file = await job.open_file(number)
        if await _bytes(file, 0, 4) in (b"PK\x03\x04", b"PK\x05\x06"):
            pictures += await _members(file)
        else:
            name, size = file.file.name, file.file.size
            pictures.append(Picture(name, file, size, size, refusal=_too_large(size)))
        if len(pictures) > MAX_IMAGES:
            raise Fatal(f"These are more than {MAX_IMAGES:,} images; make several jobs of them.")
    return pictures


async def read(pictures: Sequence[Picture]) -> AsyncGenerator[tuple[Picture, bytes], None]:
    """The bytes of each, as they are packed; none for one that is refused.

    A zip is read from front to back, in one go where its members follow one another.
    """
    last: _Cursor | None = None
    try:
        for picture in pictures:
            if picture.refusal is not None:
                yield picture, b""
                continue
            if last is None or last.file is not picture.file:
                if last is not None:
                    await last.close()
                last = _Cursor(picture.file)
            await last.go(picture.start)
            if picture.member:
                header = await last.take(LOCAL_HEADER)
                await last.take(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
            yield picture, await last.take(picture.packed)
    finally:
        if last is not None:
            await last.close()


def names(pictures: Sequence[Picture], extension: str) -> list[str]:
    """What the thumbnails are called: as the images, with the extension, and no two alike in any case of letters."""
    taken, alike, made = set[str](), Counter[str](), list[str]()
    for picture in pictures:
        stem = str(PurePosixPath(picture.name).with_suffix("")) if picture.name.strip(".") else "file"
        name = f"{stem}.{extension}"
        while name.casefold() in taken:
            alike[stem.casefold()] += 1
            name = f"{stem}-{alike[stem.casefold()] + 1}.{extension}"
        taken.add(name.casefold())
        made.append(name)
    return made


async def _members(file: InputFile) -> list[Picture]:
    name, size = file.file.name, file.file.size
    start = max(0, size - DIRECTORY)
    tail = _Tail(start, await _bytes(file, start, size - start))
    try:
        with zipfile.ZipFile(tail) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            end = archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, OSError, struct.error) as error:
        raise Fatal(f"The zip {name!r} cannot be read: {error}. Make it anew and upload it again.") from None
    if len(members) > 2 * MAX_IMAGES:
        raise Fatal(f"The zip {name!r} has {len(members):,} members; put at most {MAX_IMAGES:,} images in one.")
    wrong = _wrong(members, end)
    if wrong is not None:
        raise Fatal(f"The zip {name!r} is refused: {wrong}. Put nothing but images with plain names in it.")
    found = [_picture(member, file) for member in members if not _left_out(member)]
    if not found:
        raise Fatal(f"The zip {name!r} holds no files; put the images in it.")
    return found


def _wrong(members: Sequence[zipfile.ZipInfo], end: int) -> str | None:
    """What makes a zip one that nobody packs by accident."""
    seen = set[str]()
    for member in members:
        path = _path(member)
        if (fault := "is there twice" if path in seen else _fault(member, path)) is not None:
            return f"its member {path[:100]!r} {fault}"
        seen.add(path)
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL:
        return f"its members have {total:,} bytes unpacked, more than {MAX_TOTAL:,}"
    starts = [*(member.header_offset for member in members), end]
    ends = [member.header_offset + LOCAL_HEADER + member.compress_size for member in members]
    if any(last > following for last, following in zip(ends, starts[1:], strict=True)):
        return "its members overlap"
    return None


def _fault(member: zipfile.ZipInfo, path: str) -> str | None:
    if UNSAFE.search(path):
        return "has an absolute name, or one with .. or control characters"
    if len(path) > MAX_NAME:
        return f"has a name of more than {MAX_NAME} characters"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a symbolic link"
    if member.file_size > RATIO_FROM and member.file_size > MAX_RATIO * member.compress_size:
        return f"grows more than {MAX_RATIO}-fold when it is unpacked"
    return None


def _picture(member: zipfile.ZipInfo, file: InputFile) -> Picture:
    # What is packed is held in memory too.
    refusal = _too_large(max(member.file_size, member.compress_size))
    if member.flag_bits & ENCRYPTED:
        refusal = "It is encrypted; make the zip without a password."
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        refusal = "It is packed in a way other than deflate; make the zip with the usual method."
    elif member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        refusal = "It is not what the zip's directory says: its two sizes differ."
    return Picture(
        name=_path(member),
        file=file,
        size=member.file_size,
        packed=member.compress_size,
        start=member.header_offset,
        member=True,
        deflated=member.compress_type == zipfile.ZIP_DEFLATED,
        crc=member.CRC,
        refusal=refusal,
    )


def _path(member: zipfile.ZipInfo) -> str:
    """As unpacking would have it: some archivers of Windows write backslashes."""
    path = member.orig_filename.replace("\\", "/")
    return path if path.startswith("/") else "/".join(part for part in path.split("/") if part not in ("", "."))


def _left_out(member: zipfile.ZipInfo) -> bool:
    return member.orig_filename.endswith(("/", "\\")) or bool(LITTER.search(_path(member)))


def _too_large(size: int) -> str | None:
    return f"It has {size:,} bytes, more than {MAX_IMAGE:,}." if size > MAX_IMAGE else None


async def _bytes(file: InputFile, start: int, count: int) -> bytes:
    cursor = _Cursor(file)
    await cursor.go(start)
    try:
        return await cursor.take(count)
    finally:
        await cursor.close()


class _Cursor:
    """A place in a file, which moves on as bytes are taken."""

    # Bytes that are passed over rather than to ask for the rest of the file anew.
    NEAR = 4 << 20

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self._place = 0
        self._held = bytearray()
        self._chunks: AsyncIterator[bytes] | None = None

    async def go(self, place: int) -> None:
        """Be there for the next take."""
        ahead = place - self._place
        if self._chunks is not None and 0 <= ahead <= self.NEAR:
            await self.take(ahead)
            return
        await self.close()
        self._place, self._held, self._chunks = place, bytearray(), self.file.chunks(start=place)

    async def take(self, count: int) -> bytes:
        """So many bytes; fewer at the end of the file."""
        assert self._chunks is not None
        while len(self._held) < count:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                break
            self._held += chunk
        taken = bytes(self._held[:count])
        del self._held[:count]
        self._place += len(taken)
        return taken

    async def close(self) -> None:
        """Read no more."""
        chunks, self._chunks = self._chunks, None
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


class _Tail(io.RawIOBase):
    """The end of a file, at its place in the whole."""

    def __init__(self, start: int, data: bytes) -> None:
        self._start = start
        self._data = io.BytesIO(data)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._start + self._data.tell()

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Raises zipfile.BadZipFile before the start."""
        if whence == io.SEEK_SET:
            if place < self._start:
                raise zipfile.BadZipFile(f"its directory is longer than {DIRECTORY:,} bytes, or damaged")
            place -= self._start
        self._data.seek(place, whence)
        return self.tell()

    def read(self, count: int = -1) -> bytes:
        return self._data.read(count)
