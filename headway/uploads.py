"""Uploads: files that arrive in one request or in several, whole or not at all.

A part of an upload is an object of its own. Its bytes are written first, then one compare-and-set makes it count, so of
two requests that write at the same offset one wins and nothing has to be locked; a connection that hangs delays nobody.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import structlog
from uuid_utils.compat import uuid7

from headway import metrics
from headway.errors import ChecksumMismatch, Conflict, NoStorage, NotFound, QuotaExceeded, TooLarge, TooSlow
from headway.files import CutOff, Files, Stored, file_folder
from headway.job import File, Upload
from headway.settings import Settings
from headway.store import OUTAGES, Store
from headway.store.files import FileStore

if TYPE_CHECKING:
    from hashlib import _Hash

# A part is closed, and counts, after so many bytes or seconds: what a web process that is killed can lose.
PART = 64 << 20
PART_TIME = 10.0
# An upload has no more parts than this, but for those that were closed early.
MOST_PARTS = 1000
# An upload in one request is given up when no bytes came for so long, which is told so often.
WAIT = timedelta(minutes=5)
RENEW_EVERY = 60.0
# Uploads of which the digest so far is remembered; of others all bytes are read again at the end.
MOST_DIGESTS = 10_000
SWEPT_AT_ONCE = 100
# What keeps a failed upload from being forgotten at once.
AWAY: tuple[type[BaseException], ...] = (*OUTAGES, NoStorage)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the bytes of a request must come to: `sha1` or `sha256`, and the digest."""

    algorithm: str
    digest: bytes


class Uploads:
    """Takes files in, and lets them go.

    `quota` is in bytes for each tenant, None for no limit; `keep` how long a file is kept that names no time itself,
    `keep_unfinished` how long an upload in several requests waits for more.
    """

    def __init__(
        self,
        store: Store,
        files: Files,
        *,
        quota: int | None,
        max_size: int,
        keep: timedelta,
        keep_unfinished: timedelta,
    ) -> None:
        self._store = FileStore(store)
        self._files = files
        self._quota = quota
        self._max_size = max_size
        self._keep = keep
        self._keep_unfinished = keep_unfinished
        # The digest of what has arrived of an upload, and how many bytes that is.
        self._digests: OrderedDict[UUID, tuple[int, _Hash]] = OrderedDict()

    @classmethod
    def of(cls, settings: Settings, store: Store, files: Files) -> "Uploads":
        """Uploads as the settings have them."""
        return cls(
            store,
            files,
            quota=settings.quota,
            max_size=settings.max_file,
            keep=timedelta(days=settings.keep_days),
            keep_unfinished=timedelta(hours=settings.upload_hours),
        )

    async def receive(
        self,
        tenant_id: UUID,
        name: str,
        content_type: str,
        chunks: AsyncIterator[bytes],
        *,
        size: int | None,
        keep_until: datetime | None = None,
    ) -> File:
        """A file that arrives in one request; `size` is None if it is not known before.

        Raises TooLarge, QuotaExceeded, NoStorage, Conflict if no bytes came for minutes, and whatever `chunks` raises.
        In each case nothing is left behind.
        """
        new = _new(tenant_id, name, content_type, size or 0, keep_until=keep_until)
        upload, room = await self._begin(new, WAIT, one_request=True)
        key = _part_key(upload)
        try:
            most = None if room is None else upload.size + room
            stored = await self._files.put(key, self._watched(upload, chunks, most))
            return await self._finish(upload, key, stored)
        except BaseException:
            await self._drop(upload, key)
            raise

    async def create(
        self,
        tenant_id: UUID,
        name: str,
        content_type: str,
        size: int,
        *,
        metadata: str = "",
        keep_until: datetime | None = None,
    ) -> Upload:
        """An upload in several requests. Its room is kept from now on. Raises TooLarge or QuotaExceeded."""
        new = _new(tenant_id, name, content_type, size, keep_until=keep_until, metadata=metadata)
        upload, _ = await self._begin(new, self._keep_unfinished, one_request=False)
        return upload if size else await self._complete(upload)

    async def get(self, upload_id: UUID, tenant_id: UUID) -> Upload:
        """The upload, or the file that it became. Raises NotFound."""
        upload = await self._store.get(upload_id, tenant_id)
        if upload is None:
            raise NotFound(f"There is no upload {upload_id}; one that got no more bytes for too long is given up.")
        if upload.sha256 is None and upload.received == upload.size:
            # The process that got the last bytes died before it made the file.
            return await self._complete(upload)
        return upload

    async def append(self, upload: Upload, chunks: AsyncIterator[bytes], *, checksum: Checksum | None = None) -> Upload:
        """The upload with more bytes; the last ones make the file.

        What arrived before `chunks` raised CutOff or TooSlow is kept, unless there is a checksum to hold it against.
        Raises Conflict if another request wrote at the same offset, ChecksumMismatch, TooLarge and NoStorage.
        """
        most = max(PART, -(-upload.size // MOST_PARTS))
        check = hashlib.new(checksum.algorithm, usedforsecurity=False) if checksum else None
        chunks = _announced(upload, chunks)
        piece, broken = await _next(chunks)
        while piece:
            key, until, before = _part_key(upload), time.monotonic() + PART_TIME, self._digests.get(upload.id)
            digest = before[1].copy() if before and before[0] == upload.received else _first(upload)
            async with self._files.writer(key, digest) as out:
                while piece:
                    await out.write(piece)
                    if check:
                        check.update(piece)
                    piece, broken = await _next(chunks)
                    if not check and (out.size >= most or time.monotonic() > until):
                        break
                if checksum and check:
                    if broken:
                        raise broken
                    if check.digest() != checksum.digest:
                        raise ChecksumMismatch(f"The bytes do not have the {checksum.algorithm} of Upload-Checksum.")
            upload = await self._append(upload, key, out.size)
            if digest:
                self._remember(upload, digest)
        if upload.received == upload.size:
            return upload if upload.sha256 else await self._complete(upload)
        if broken:
            raise broken
        return upload

    async def delete(self, upload: Upload | File) -> None:
        """Let go of a file or an upload. Nobody sees it any more, its bytes go now, and its row with the next sweep.

        Raises NotFound if there was no such file or upload any more.
        """
        if not await self._store.give_up(upload.id, upload.tenant_id, whole=upload.sha256 is not None):
            raise NotFound(f"There is no {upload.id} any more.")
        self._digests.pop(upload.id, None)
        with suppress(NoStorage):
            await self._files.delete([key for key, _ in upload.parts])

    async def sweep(self) -> int:
        """Delete files and uploads whose time is over; how many. Several may sweep at once."""
        deleted = 0
        while due := await self._store.expire(SWEPT_AT_ONCE):
            for tenant_id, file_id in due:
                await self._files.delete_file(tenant_id, file_id)
                deleted += await self._store.forget(file_id)
        while untidy := await self._store.untidy(SWEPT_AT_ONCE):
            for upload in untidy:
                await self._files.delete_file(upload.tenant_id, upload.id, keep={key for key, _ in upload.parts})
                await self._store.tidied(upload.id)
        metrics.files_deleted.inc(deleted)
        return deleted

    async def _begin(self, new: Upload, wait: timedelta, *, one_request: bool) -> tuple[Upload, int | None]:
        if new.size > self._max_size:
            raise TooLarge(f"The file is over the limit of {self._max_size:,} bytes; send a smaller one.")
        begun = await self._store.begin(new, wait, self._quota, one_request=one_request)
        if begun is None:
            raise await self._over_quota(new.tenant_id, f"a file of {new.size:,} does not fit")
        return begun

    async def _watched(self, upload: Upload, chunks: AsyncIterator[bytes], most: int | None) -> AsyncIterator[bytes]:
        """The chunks. The row hears that they still come; more than `most` raises QuotaExceeded."""
        arrived, renew_at = 0, time.monotonic() + RENEW_EVERY
        async for chunk in chunks:
            arrived += len(chunk)
            if most is not None and arrived > most:
                raise await self._over_quota(upload.tenant_id, "the file does not fit")
            if time.monotonic() > renew_at:
                renew_at = time.monotonic() + RENEW_EVERY
                try:
                    await self._store.renew(upload.id, WAIT)
                except OUTAGES as error:
                    # It may wait for several of these; what comes after it finds out at the end.
                    log.warning("an upload was not renewed; the next time follows", error=repr(error))
            yield chunk

    async def _finish(self, upload: Upload, key: str, stored: Stored) -> File:
        """The file of an upload in one request."""
        parts = [(key, stored.size)] if stored.size else []
        file = await self._store.finish(upload, parts, stored.sha256, self._keep, self._quota)
        if file is None:
            if await self._store.renew(upload.id, WAIT):
                raise await self._over_quota(upload.tenant_id, f"a file of {stored.size:,} does not fit")
            raise Conflict("The upload was given up, for no bytes came for minutes; send the file again.")
        if not stored.size:
            await self._files.delete([key])
        return file

    async def _append(self, upload: Upload, key: str, size: int) -> Upload:
        """The upload with a part more, whose bytes are there. An outage leaves it open whether it counts."""
        grown = await self._store.append(upload, key, size, self._keep_unfinished)
        if grown is None:
            await self._files.delete([key])
            raise Conflict(
                "Another request has written to this upload; ask HEAD for its Upload-Offset and go on there."
            )
        return grown

    async def _complete(self, upload: Upload) -> Upload:
        """The upload once it is a file. Several may do so at once."""
        known = self._digests.pop(upload.id, None)
        digest = known[1] if known and known[0] == upload.size else await self._read_again(upload)
        await self._store.finish(upload, upload.parts, digest.hexdigest(), self._keep, self._quota)
        whole = await self._store.get(upload.id, upload.tenant_id)
        if whole is None or whole.sha256 is None:
            raise NotFound(f"The upload {upload.id} was deleted.")
        return whole

    async def _read_again(self, upload: Upload) -> "_Hash":
        """The digest of all parts: another process got some of them."""
        digest, size = hashlib.sha256(), 0
        async for piece in self._files.read_parts(upload.parts, 0, upload.size):
            digest.update(piece)
            size += len(piece)
        if size != upload.size:
            raise Conflict("Some bytes of this upload are lost; delete it and begin anew.")
        return digest

    def _remember(self, upload: Upload, digest: "_Hash") -> None:
        self._digests[upload.id] = (upload.received, digest)
        self._digests.move_to_end(upload.id)
        if len(self._digests) > MOST_DIGESTS:
            self._digests.popitem(last=False)

    async def _drop(self, upload: Upload, key: str) -> None:
        """Forget an upload in one request that failed, unless it is whole after all: an answer of Postgres was lost."""
        try:
            given_up = await self._store.give_up(upload.id, upload.tenant_id, whole=False)
            if given_up or await self._store.get(upload.id, upload.tenant_id) is None:
                await self._files.delete([key])
                await self._store.forget(upload.id)
        except AWAY as error:
            log.warning("a failed upload was not forgotten; a sweep will do it", error=repr(error))

    async def _over_quota(self, tenant_id: UUID, what: str) -> QuotaExceeded:
        stored = await self._store.stored(tenant_id)
        return QuotaExceeded(
            f"This tenant may keep {self._quota:,} bytes of files and keeps {stored:,}, unfinished uploads included; "
            f"{what}. Delete files, or ask the operator to raise HEADWAY_QUOTA."
        )


def _new(
    tenant_id: UUID, name: str, content_type: str, size: int, *, keep_until: datetime | None, metadata: str = ""
) -> Upload:
    now = datetime.now(UTC)
    return Upload(uuid7(), tenant_id, name, content_type, size, 0, None, now, now, keep_until, (), metadata)


def _part_key(upload: Upload) -> str:
    """A place for bytes that no other request writes to."""
    return f"{file_folder(upload.tenant_id, upload.id)}/{uuid7().hex}"


def _first(upload: Upload) -> "_Hash | None":
    return hashlib.sha256() if upload.received == 0 else None


async def _announced(upload: Upload, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks. Raises TooLarge if they are more than the upload was announced with."""
    left = upload.size - upload.received
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise TooLarge(f"The upload was announced with {upload.size:,} bytes; these are more.")
        yield chunk


async def _next(chunks: AsyncIterator[bytes]) -> tuple[bytes, CutOff | TooSlow | None]:
    """The next piece, empty at the end, and what made it the end if that was too early."""
    try:
        return await anext(chunks, b""), None
    except (CutOff, TooSlow) as error:
        return b"", error
