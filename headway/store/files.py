"""Uploads: rows of `files` that are not whole yet, and what becomes of them.

A row is there before its bytes are, and until they are gone, so none are ever lost sight of. `tenants.stored` counts
the bytes of whole files and those that uploads have announced; every statement that changes `files.size` changes it
too. Each takes the file's lock first, then the tenant's.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from headway.job import File, Part, Upload
from headway.store import Store
from headway.store.reads import FILE

UPLOAD = f"{FILE}, received, metadata, keep_until"

# Make room for a file and its row, and how many bytes more the tenant may keep; no row if there is no room.
# $1: id, $2: tenant, $3: name, $4: content type, $5: size, $6: metadata, $7: keep until, $8: how long it may wait for
# bytes, $9: quota, $10: whether one request brings it whole
BEGIN = f"""
WITH room AS (
    UPDATE tenants SET stored = stored + $5::bigint
    WHERE id = $2 AND ($9::bigint IS NULL OR stored + $5::bigint <= $9::bigint)
    RETURNING $9::bigint - stored AS bytes
)
INSERT INTO files (id, tenant_id, name, content_type, size, metadata, keep_until, expires_at, parts, tidied)
SELECT $1::uuid, $2, $3::text, $4::text, $5::bigint, $6::text, $7::timestamptz, now() + $8::interval, '[]', $10::bool
FROM room
RETURNING {UPLOAD}, (SELECT bytes FROM room) AS room
"""

# An upload in several requests, or the file that it became. $1: id, $2: tenant
GET_UPLOAD = f"""
SELECT {UPLOAD} FROM files
WHERE id = $1 AND tenant_id = $2 AND expires_at > now() AND (sha256 IS NOT NULL OR NOT tidied)
"""

# Bytes arrive: the upload is not given up. $1: id, $2: how long it may wait for more
RENEW = """
UPDATE files SET expires_at = now() + $2::interval WHERE id = $1 AND sha256 IS NULL AND expires_at > now()
RETURNING id
"""

# Add a part at an offset, unless another request was there first.
# $1: id, $2: tenant, $3: offset, $4: size of the part, $5: its key, $6: how long the upload may wait for more
APPEND = f"""
UPDATE files
SET received = received + $4, parts = parts || jsonb_build_array(jsonb_build_array($5::text, $4::bigint)),
    expires_at = now() + $6::interval
WHERE id = $1 AND tenant_id = $2 AND sha256 IS NULL AND received = $3 AND expires_at > now()
RETURNING {UPLOAD}
"""

# The upload is whole. No row if it was given up, or if it is larger than announced and there is no room.
# $1: id, $2: tenant, $3: size, $4: sha256, $5: parts, $6: how long files are kept, $7: quota
FINISH = f"""
WITH mine AS (
    SELECT id, size FROM files
    WHERE id = $1 AND tenant_id = $2 AND sha256 IS NULL AND expires_at > now() FOR UPDATE
), room AS (
    UPDATE tenants SET stored = stored + $3::bigint - mine.size FROM mine
    WHERE tenants.id = $2
        AND ($7::bigint IS NULL OR $3::bigint <= mine.size OR stored + $3::bigint - mine.size <= $7::bigint)
    RETURNING mine.id AS mine
)
UPDATE files
SET size = $3, received = $3, sha256 = $4, parts = $5::jsonb, expires_at = coalesce(keep_until, now() + $6::interval)
FROM room WHERE id = mine
RETURNING {UPLOAD}
"""

# Give up a file, whole or not: nobody sees it from now on, and a sweep deletes it. $1: id, $2: tenant, $3: whole
GIVE_UP = """
WITH mine AS (
    SELECT id, size FROM files
    WHERE id = $1 AND tenant_id = $2 AND (sha256 IS NOT NULL) = $3 AND (expires_at IS NULL OR expires_at > now())
    FOR UPDATE
), freed AS (
    UPDATE tenants SET stored = stored - mine.size FROM mine WHERE tenants.id = $2
)
UPDATE files SET sha256 = NULL, size = 0, expires_at = now() FROM mine WHERE files.id = mine.id RETURNING files.id
"""

# Files and uploads whose time is over, given up. $1: how many
EXPIRE = """
WITH due AS (
    SELECT id, tenant_id, size FROM files WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
), freed AS (
    UPDATE tenants SET stored = stored - sums.size
    FROM (SELECT tenant_id, sum(size)::bigint AS size FROM due GROUP BY tenant_id) sums
    WHERE tenants.id = sums.tenant_id
)
UPDATE files SET sha256 = NULL, size = 0 FROM due WHERE files.id = due.id RETURNING files.id, files.tenant_id
"""

# The row of a file that was given up and has no bytes left. $1: id
FORGET = "DELETE FROM files WHERE id = $1 AND sha256 IS NULL AND expires_at <= now() RETURNING id"

# Whole files beside which requests that died may have left bytes. $1: how many
UNTIDY = f"SELECT {UPLOAD} FROM files WHERE NOT tidied AND sha256 IS NOT NULL LIMIT $1"

# $1: id
TIDIED = "UPDATE files SET tidied = true WHERE id = $1"

# How much a tenant keeps. $1: tenant
STORED = "SELECT stored FROM tenants WHERE id = $1"


class FileStore:
    """What changes files and uploads. Times are how long from now."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(
        self, upload: Upload, wait: timedelta, quota: int | None, *, one_request: bool
    ) -> tuple[Upload, int | None] | None:
        """The upload and the bytes left of the quota, None without one; nothing at all if there is no room."""
        rows = await self._store.rows(
            BEGIN,
            upload.id,
            upload.tenant_id,
            upload.name,
            upload.content_type,
            upload.size,
            upload.metadata,
            upload.keep_until,
            wait,
            quota,
            one_request,
        )
        return (_upload(rows[0]), rows[0]["room"]) if rows else None

    async def get(self, upload_id: UUID, tenant_id: UUID) -> Upload | None:
        rows = await self._store.rows(GET_UPLOAD, upload_id, tenant_id)
        return _upload(rows[0]) if rows else None

    async def renew(self, upload_id: UUID, wait: timedelta) -> bool:
        return bool(await self._store.rows(RENEW, upload_id, wait))

    async def append(self, upload: Upload, key: str, size: int, wait: timedelta) -> Upload | None:
        """The upload with one part more; nothing if another request was there first."""
        rows = await self._store.rows(APPEND, upload.id, upload.tenant_id, upload.received, size, key, wait)
        return _upload(rows[0]) if rows else None

    async def finish(
        self, upload: Upload, parts: Sequence[Part], sha256: str, keep: timedelta, quota: int | None
    ) -> File | None:
        size = sum(part[1] for part in parts)
        rows = await self._store.rows(FINISH, upload.id, upload.tenant_id, size, sha256, parts, keep, quota)
        return _file(rows[0]) if rows else None

    async def give_up(self, file_id: UUID, tenant_id: UUID, *, whole: bool) -> bool:
        """Whether there was such a file, or such an upload."""
        return bool(await self._store.rows(GIVE_UP, file_id, tenant_id, whole))

    async def expire(self, limit: int) -> list[tuple[UUID, UUID]]:
        """The tenant and id of each file that is to be deleted."""
        return [(row["tenant_id"], row["id"]) for row in await self._store.rows(EXPIRE, limit)]

    async def forget(self, file_id: UUID) -> bool:
        """Whether the row was there until now."""
        return bool(await self._store.rows(FORGET, file_id))

    async def untidy(self, limit: int) -> list[Upload]:
        return [_upload(row) for row in await self._store.rows(UNTIDY, limit)]

    async def tidied(self, file_id: UUID) -> None:
        await self._store.rows(TIDIED, file_id)

    async def stored(self, tenant_id: UUID) -> int:
        rows = await self._store.rows(STORED, tenant_id)
        return int(rows[0]["stored"])


def _upload(row: Any) -> Upload:
    return Upload(**{name: row[name] for name in Upload.__slots__})


def _file(row: Any) -> File:
    return File(**{name: row[name] for name in File.__slots__})
