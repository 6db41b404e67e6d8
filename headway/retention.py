"""Retention: ended jobs are kept for a time, and up to a number; then they go, with all that they made.

What was said in rooms is kept for the same time.
"""

from datetime import timedelta
from uuid import UUID

from headway import metrics
from headway.errors import NoStorage
from headway.files import Files
from headway.store import Store
from headway.store.retention import RetentionStore

# So few that no statement holds a lock for long.
DELETED_AT_ONCE = 200
MESSAGES_AT_ONCE = 1000
# Jobs whose bytes cannot be deleted: the place of files is away.
MOST_KEPT = 100


class Retention:
    """Deletes jobs that ended longer than `age` ago, and of each tenant all but the `most` that ended last.

    And messages older than `age`.
    """

    def __init__(self, store: Store, files: Files, *, age: timedelta, most: int) -> None:
        self._retention = RetentionStore(store)
        self._files = files
        self._age = age
        self._most = most

    async def sweep(self) -> int:
        """Delete what is kept no longer; how many jobs that were. Several may sweep at once.

        Raises NoStorage once all others are deleted if bytes of a job cannot be, and at once if those of many cannot.
        """
        deleted, kept, failure = 0, list[UUID](), None
        for tenant_id, bound in await self._retention.bounds(self._age, self._most):
            while ids := await self._retention.expired(tenant_id, bound, DELETED_AT_ONCE, kept):
                gone = []
                # Bytes first: if this is cut off, the row leads to what is left of them.
                for job_id in ids:
                    try:
                        await self._files.delete_job(job_id)
                    except NoStorage as error:
                        kept.append(job_id)
                        failure = error
                        if len(kept) == MOST_KEPT:
                            raise
                    else:
                        gone.append(job_id)
                count = await self._retention.delete(gone)
                metrics.jobs_deleted.inc(count)
                deleted += count
        if failure is not None:
            raise failure
        return deleted

    async def sweep_rooms(self) -> int:
        """Delete messages that are kept no longer, then rooms that are left empty; how many messages that were."""
        deleted = 0
        while gone := await self._retention.delete_messages(self._age, MESSAGES_AT_ONCE):
            deleted += gone
            metrics.messages_deleted.inc(gone)
        while await self._retention.forget_rooms(self._age, DELETED_AT_ONCE):
            pass
        return deleted
