"""Retention: ended jobs are kept for a time, and up to a number; then they go, with all that they made."""

from datetime import timedelta

from headway import metrics
from headway.files import Files
from headway.store import Store
from headway.store.retention import RetentionStore

# So few that no statement holds a lock for long.
DELETED_AT_ONCE = 200


class Retention:
    """Deletes jobs that ended longer than `age` ago, and of each tenant all but the `most` that ended last."""

    def __init__(self, store: Store, files: Files, *, age: timedelta, most: int) -> None:
        self._retention = RetentionStore(store)
        self._files = files
        self._age = age
        self._most = most

    async def sweep(self) -> int:
        """Delete what is kept no longer; how many jobs that were. Several may sweep at once."""
        deleted = 0
        for tenant_id, bound in await self._retention.bounds(self._age, self._most):
            while ids := await self._retention.expired(tenant_id, bound, DELETED_AT_ONCE):
                # Bytes first: if this is cut off, the row leads to what is left of them.
                for job_id in ids:
                    await self._files.delete_job(job_id)
                deleted += await self._retention.delete(ids)
        metrics.jobs_deleted.inc(deleted)
        return deleted
