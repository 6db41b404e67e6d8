"""Where bytes are kept: a folder of this machine, or a bucket of S3. Both by obstore, and both whole or not at all."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypedDict
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, S3Store

from headway.errors import InvalidSettings

# S3 takes no smaller pieces than 5 MiB, and 10,000 of an object.
PIECE = 8 << 20
PIECES = 10_000
# A slow reader of a bucket must not hold a connection open that S3 would close, so it is read in spans.
SPAN = 4 << 20


class Writing(TypedDict):
    """How obstore cuts and sends an object; the product is the memory that it takes."""

    chunk_size: int
    max_concurrency: int


class Place(Protocol):
    """What differs between a folder and a bucket. Keys are paths without a leading slash."""

    writing: Writing

    @property
    def store(self) -> ObjectStore: ...

    def read(self, key: str, start: int, end: int | None, chunk: int) -> AsyncIterator[bytes]:
        """Raises FileNotFoundError."""
        ...

    async def settle(self, key: str) -> None:
        """Returns once what is kept under `key` outlasts a loss of power."""

    async def clear(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        """Delete the doomed keys below a prefix, also those of what was still being written when a process died."""


def open_place(location: str, *, options: Mapping[str, str], largest: int) -> Place:
    """The place behind a `file:///` or `s3://` URL. Raises InvalidSettings."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Folder(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return Bucket(parts.netloc, parts.path.strip("/"), options, largest)
    raise InvalidSettings(f"HEADWAY_FILES_URL must be file:///folder or s3://bucket/prefix, not {parts.scheme}://.")


class Folder:
    """A folder. What is being written lies beside its name with a suffix, which only `clear` sees."""

    def __init__(self, path: Path) -> None:
        try:
            self.store = LocalStore(path, mkdir=True, automatic_cleanup=True)
        except OSError as error:
            raise InvalidSettings(
                f"Files cannot be kept in {path}: {error}. Check HEADWAY_FILES_URL or HEADWAY_HOME."
            ) from None
        self.writing: Writing = {"chunk_size": 1 << 20, "max_concurrency": 12}
        self._path = path

    async def read(self, key: str, start: int, end: int | None, chunk: int) -> AsyncIterator[bytes]:
        # The store refuses a range of a file without bytes.
        span: obstore.GetOptions = (
            {"range": (start, end)} if end is not None else {"range": {"offset": start}} if start else {}
        )
        found = await obstore.get_async(self.store, key, options=span)
        async for piece in found.stream(chunk):
            yield bytes(piece)

    async def settle(self, key: str) -> None:
        await asyncio.to_thread(self._sync, key)

    async def clear(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        await asyncio.to_thread(self._clear, self._path / prefix, doomed)

    def _sync(self, key: str) -> None:
        """Have the disk hold a file, and the folders that lead to it."""
        path = self._path / key
        for each in (path, *path.parents[: len(Path(key).parts)]):
            descriptor = os.open(each, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _clear(self, path: Path, doomed: Callable[[str], bool]) -> None:
        # Files that were kept before they had folders of their own.
        if path.is_file() and doomed(self._key(path)):
            path.unlink()
        # Unlike rglob, walk puts up with what others delete meanwhile.
        for folder, _, names in os.walk(path, topdown=False, onerror=_not_gone):
            for file in (Path(folder, name) for name in names):
                if doomed(self._key(file)):
                    file.unlink(missing_ok=True)
            with suppress(OSError):
                Path(folder).rmdir()

    def _key(self, path: Path) -> str:
        return path.relative_to(self._path).as_posix()


def _not_gone(error: OSError) -> None:
    """A folder that cannot be read may have bytes in it; one that others have deleted has none."""
    if not isinstance(error, FileNotFoundError):
        raise error


class Bucket:
    """A bucket of S3, or of what speaks like it. Unfinished uploads of objects are for a lifecycle rule to delete."""

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, str], largest: int) -> None:
        plain = options.get("endpoint", "").startswith("http://")
        try:
            self.store = S3Store(
                bucket,
                prefix=prefix or None,
                config=dict(options),  # type: ignore[arg-type]  # a TypedDict with these names
                client_options={"allow_http": True} if plain else None,
                retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=20)},
            )
        except (BaseError, ValueError) as error:
            raise InvalidSettings(
                f"The bucket of HEADWAY_FILES_URL cannot be used: {str(error).splitlines()[0]}."
            ) from None
        self.writing: Writing = {"chunk_size": max(PIECE, -(-largest // PIECES)), "max_concurrency": 3}

    async def read(self, key: str, start: int, end: int | None, chunk: int) -> AsyncIterator[bytes]:
        if end is None:
            end = (await obstore.head_async(self.store, key))["size"]
        for first in range(start, end, SPAN):
            span = await obstore.get_range_async(self.store, key, start=first, end=min(end, first + SPAN))
            for place in range(0, len(span), chunk):
                yield bytes(memoryview(span)[place : place + chunk])

    async def settle(self, key: str) -> None:
        """S3 answers once it has an object."""

    async def clear(self, prefix: str, doomed: Callable[[str], bool]) -> None:
        async for found in obstore.list(self.store, prefix, chunk_size=1000):
            if keys := [item["path"] for item in found if doomed(item["path"])]:
                await obstore.delete_async(self.store, keys)
