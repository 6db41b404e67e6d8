"""The feed: what was committed to the jobs of all tenants that have live sets here, read once for all of them.

It reads when a hint of Redis says so, and every two seconds anyhow. Each round tells what is in a snapshot of Postgres
and was not in the one before; progress that was heard before a round began is told after it, so that the events of a
job come in order.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

import structlog

from headway import metrics
from headway.events import message, tenant_group
from headway.store import OUTAGES
from headway.store.cursor import Cursor, Snapshot
from headway.store.live import Wish
from headway.store.sets import Happening, SetStore
from services.web.live.hub import Hub
from services.web.live.lines import News

# Rounds are so far apart at least, and at most.
SOONEST = 0.05
LATEST = 2.0
# Happenings that sets are told of in one go.
PART = 100
# After an outage of the database.
AGAIN = 1.0

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Told:
    """Something that happened, as all sets are told of it. `cursor` resumes after it for whoever saw what is before."""

    happening: Happening
    news: News
    cursor: str


@dataclass(slots=True)
class Round:
    """What is in `upto` and not in `since`, of one tenant, or a part of it; with the jobs that are new to a set.

    Progress comes with the last part.
    """

    database: str
    since: Snapshot
    upto: Snapshot
    snapshots: dict[UUID, News]
    told: list[Told]
    progress: list[News]
    last: bool


class Reader(Protocol):
    """A set that is told of rounds."""

    @property
    def tenant_id(self) -> UUID: ...

    def knows(self, happening: Happening) -> bool:
        """Whether it can be told of it without a snapshot of the job."""

    def take(self, round: Round) -> None: ...

    def lost(self) -> None:
        """There was more than can be told: it is to read for itself, from what it has."""


class Feed:
    """Reads for all sets of the process, while there are any."""

    def __init__(self, store: SetStore, hub: Hub) -> None:
        self._store = store
        self._hub = hub
        self._readers: dict[UUID, set[Reader]] = {}
        self._tenants: dict[UUID, _Tenant] = {}
        self._position: Snapshot | None = None
        self._database = ""
        self._progress: dict[UUID, dict[str, News]] = {}
        self._wake = asyncio.Event()
        self._reading = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def join(self, reader: Reader) -> None:
        """Tell a reader of all rounds from now on: of what is committed after this returns, and maybe of some before.

        Raises one of OUTAGES.
        """
        # A round that is under way does not know of it.
        async with self._reading:
            if self._position is None:
                self._database, self._position = await self._store.now()
            tenant_id = reader.tenant_id
            self._readers.setdefault(tenant_id, set()).add(reader)
            if tenant_id not in self._tenants:
                self._tenants[tenant_id] = _Tenant(self, tenant_id)
                await self._hub.join((self._tenants[tenant_id], tenant_group(tenant_id)))
            if self._task is None:
                self._task = asyncio.create_task(self._run())

    def leave(self, reader: Reader) -> None:
        """Tell a reader no more."""
        tenant_id = reader.tenant_id
        if (readers := self._readers.get(tenant_id)) is None:
            return
        readers.discard(reader)
        if not readers:
            del self._readers[tenant_id]
            self._hub.leave(self._tenants.pop(tenant_id), tenant_group(tenant_id))
            self._progress.pop(tenant_id, None)

    def hear(self, tenant_id: UUID, heard: Any) -> None:
        """Progress of a job, or a hint that there is something to read."""
        if isinstance(heard, News):
            self._progress.setdefault(tenant_id, {})[heard.job] = heard
        self._wake.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            pause = SOONEST
            try:
                if self._readers:
                    async with self._reading:
                        await self._round()
                else:
                    # Whoever comes next begins with what is committed then.
                    self._position = None
            except OUTAGES as error:
                log.warning("live sets wait for the database", error=repr(error))
                pause = AGAIN
            except Exception:
                metrics.errors_caught.labels("feed").inc()
                log.exception("live sets could not be told what happened; trying again")
                pause = AGAIN
            await asyncio.sleep(pause)
            try:
                async with asyncio.timeout(LATEST):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _round(self) -> None:
        since = self._position
        assert since is not None
        tenants = list(self._readers)
        progress, self._progress = self._progress, {}
        try:
            read = await self._store.news(since, tenants, self._unknown)
        except BaseException:
            # What came meanwhile is newer.
            for tenant_id, jobs in progress.items():
                self._progress[tenant_id] = jobs | self._progress.get(tenant_id, {})
            raise
        metrics.feed_rounds.inc()
        self._position = read.upto
        if read.happenings is None or read.database != self._database:
            self._database = read.database
            for reader in self._everyone():
                reader.lost()
            return
        told: dict[UUID, list[Told]] = {tenant_id: [] for tenant_id in tenants}
        for happening in read.happenings:
            event = happening.event
            cursor = Cursor(read.database, since, read.upto, event.job_id, event.seq).encode()
            told[event.tenant_id].append(Told(happening, News.of(message(event)), cursor))
        snapshots = {job.id: News.snapshot(job) for job in read.jobs.values()}
        for tenant_id, happened in told.items():
            for first in range(0, len(happened) or 1, PART):
                part, last = happened[first : first + PART], first + PART >= len(happened)
                newest = list(progress.get(tenant_id, {}).values()) if last else []
                round = Round(read.database, since, read.upto, snapshots, part, newest, last)
                for reader in tuple(self._readers.get(tenant_id, ())):
                    reader.take(round)
                if not last:
                    # So that writers send what they were given.
                    await asyncio.sleep(0)

    def _everyone(self) -> list[Reader]:
        return [reader for readers in self._readers.values() for reader in readers]

    def _unknown(self, happenings: list[Happening]) -> Iterable[Wish]:
        wishes = {}
        for happening in happenings:
            event = happening.event
            if any(not reader.knows(happening) for reader in self._readers.get(event.tenant_id, ())):
                wishes[event.job_id] = Wish(event.job_id, event.tenant_id)
        return wishes.values()


class _Tenant:
    """Listens to the topic of a tenant."""

    def __init__(self, feed: Feed, tenant_id: UUID) -> None:
        self._feed = feed
        self._tenant_id = tenant_id

    def hear(self, message: Any) -> None:
        self._feed.hear(self._tenant_id, message)
