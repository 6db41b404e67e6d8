"""All sessions of the process: how many each key has, their heartbeats, and their end."""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping

import structlog

from headway import metrics
from headway.errors import TooMany
from headway.store import OUTAGES
from services.web.live.hub import Hub
from services.web.live.session import (
    BAD_MESSAGE,
    FIRST_SUBSCRIBE_WITHIN,
    RESTART,
    TOO_OLD,
    Session,
    Sort,
)
from services.web.live.writer import Later

TICK = 1.0
# While there are no live events, Postgres is read this often.
CHECK_EVERY = 2.0
# Seconds that a client may not read what was sent to it.
PATIENCE = 10.0
# Seconds that a client has to read that the server stops.
GOODBYE = 3.0

log = structlog.get_logger(__name__)


class Sessions:
    """Opens and ends sessions, and looks after those that are open."""

    def __init__(self, hub: Hub, sorts: Mapping[str, Sort], *, most: int) -> None:
        self.sorts = sorts
        self.open: set[Session] = set()
        self.later = Later()
        self._hub = hub
        self._most = most
        self._held: Counter[tuple[str, str]] = Counter()
        self._pulse: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._checked = 0.0
        self._stopping = False
        hub.restored.append(self._restored)

    def enter(self, session: Session) -> None:
        """Count a session in. Raises TooMany if its key and user have as many as they may."""
        who = (session.principal.key_id, session.principal.user)
        if self._held[who] >= self._most:
            raise TooMany(f"A key or user has {self._most} connections at most; close one, or follow more on each.")
        self._held[who] += 1
        self.open.add(session)
        if self._stopping:
            session.close(RESTART)
        if self._pulse is None:
            self._pulse = asyncio.create_task(self._beat())

    def leave(self, session: Session) -> None:
        """The session's connection is no more."""
        session.ended()
        if session not in self.open:
            return
        self.open.discard(session)
        who = (session.principal.key_id, session.principal.user)
        self._held[who] -= 1
        if not self._held[who]:
            del self._held[who]

    async def restart(self) -> None:
        """Tell all that this process ends, and close them; those that do not read it are dropped."""
        self._stopping = True
        for session in self.open:
            if session.hello:
                session.put("bye", {"reason": "restart"})
            session.close(RESTART)
        told = {asyncio.create_task(session.writer.done()): session for session in self.open}
        if told:
            _, late = await asyncio.wait(told, timeout=GOODBYE)
            for task in late:
                task.cancel()
                told[task].writer.drop()
                told[task].transport.abort()

    async def close(self) -> None:
        tasks = [task for task in (self._pulse, self._checking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sort in self.sorts.values():
            await sort.close()

    def _restored(self) -> None:
        """Live events flow again; what came meanwhile is lost."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._repair())

    async def _repair(self) -> None:
        metrics.live_rechecks.inc()
        try:
            await self._check(tuple(self.open))
        except OUTAGES as error:
            log.warning("sessions were not compared with the record; their heartbeat does it", error=repr(error))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self._tick()
            except OUTAGES as error:
                log.warning("heartbeats wait for the database", error=repr(error))
            except Exception:
                metrics.errors_caught.labels("heartbeat").inc()
                log.exception("a heartbeat failed")

    async def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        for session in tuple(self.open):
            if session.writer.since is not None and now - session.writer.since > PATIENCE:
                log.warning("a client does not read; it is dropped", session=session.id)
                session.writer.give_up()
                session.writer.drop()
                session.transport.abort()
            elif now > session.ends:
                session.close(TOO_OLD, "This connection is old; connect again with `since`.")
            elif not session.subscribed and now - session.began > FIRST_SUBSCRIBE_WITHIN:
                session.close(BAD_MESSAGE, f"Subscribe within {FIRST_SUBSCRIBE_WITHIN:.0f} seconds.")
        if self._hub.away and now - self._checked > CHECK_EVERY:
            self._checked = now
            await self._check(tuple(self.open))
        due = [session for session in self.open if session.beats <= now and not session.writer.ending]
        if due:
            await self._check(due)
            for session in due:
                session.heartbeat()

    async def _check(self, sessions: Collection[Session]) -> None:
        for name, sort in self.sorts.items():
            parts = [session.parts[name] for session in sessions if name in session.parts]
            if parts:
                await sort.check(parts)
