"""What becomes of open sessions whose key is revoked or expires: they are closed within five seconds."""

import asyncio
from collections.abc import Collection

import structlog

from headway import metrics
from headway.store import OUTAGES, Store
from services.web.live.session import EXPIRED, Session

# With what a query takes, and with one that fails, that is less than five seconds.
LOOK_EVERY = 2.0

log = structlog.get_logger(__name__)


class Revocation:
    """Looks at the keys of all open sessions of the process with one query, as long as it is not closed."""

    def __init__(self, store: Store, sessions: Collection[Session]) -> None:
        self._store = store
        self._sessions = sessions
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Look every two seconds, for ever. While Postgres is away nobody can tell; that is made up for afterwards."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self._look()
            except OUTAGES as error:
                log.warning("the keys of open sessions were not checked; the next look follows", error=repr(error))
            except Exception:
                metrics.errors_caught.labels("revocation").inc()
                log.exception("the keys of open sessions were not checked; the next look follows")

    async def _look(self) -> None:
        keys = {session.principal.key_id for session in self._sessions}
        if not keys:
            return
        ended = keys - (await self._store.live_keys(list(keys))).keys()
        for session in tuple(self._sessions):
            if session.principal.key_id in ended:
                session.close(EXPIRED, "The key has been revoked, or has expired.")
