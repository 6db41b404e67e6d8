"""Jobs that sessions follow one by one: a snapshot, or what was missed, then every event as it happens.

An event that comes out of turn is not sent: what stands before it is read from the record first, so that a client sees
no gap. Only progress may be missing, since a newer one takes its place.
"""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from headway import metrics
from headway.errors import NotFound
from headway.events import group, message
from headway.job import Event
from headway.store.batch import Batch
from headway.store.live import TAIL, Found, LiveStore, Wish
from services.web.live.chain import Chain
from services.web.live.commands import JobItem
from services.web.live.hub import Hub
from services.web.live.lines import News, Plain, encode
from services.web.live.session import NORMAL, Opening, Session, refusal

# Events that are held back while what stands before them is read.
MOST_HELD = 256
# An event that is committed may still be on its way through Redis for so long.
ON_ITS_WAY = 0.1


class Jobs:
    """What all sessions of the process need to follow jobs."""

    def __init__(self, store: LiveStore, hub: Hub) -> None:
        self.hub = hub
        # Wishes of many sessions share a statement.
        self.find: Batch[Wish, Found | None] = Batch(store.find, most=256)
        self._store = store

    def part(self, session: Session) -> "JobsPart":
        return JobsPart(self, session)

    async def check(self, parts: Sequence["JobsPart"]) -> None:
        following = [one for part in parts for one in part.following.values() if one.live]
        record = await self._store.seqs({one.job_id for one in following})
        if any(one.behind(record) for one in following):
            await asyncio.sleep(ON_ITS_WAY)
        for one in following:
            if one.live and one.behind(record):
                metrics.live_repairs.inc()
                one.read_on()

    async def close(self) -> None:
        """There is nothing to end."""


class JobsPart:
    """The jobs that one session follows."""

    def __init__(self, jobs: Jobs, session: Session) -> None:
        self.jobs = jobs
        self.session = session
        self.following: dict[UUID, Following] = {}

    def __len__(self) -> int:
        return len(self.following)

    async def subscribe(self, wanted: Sequence[JobItem]) -> Opening:
        """Follow these jobs anew. One that another tenant has is refused like one that does not exist."""
        allowed = self.session.principal.jobs
        new = []
        for item in {item.job: item for item in wanted}.values():
            self.drop(item.job)
            if allowed is None or item.job in allowed:
                one = self.following[item.job] = Following(self, item)
                new.append(one)
        await self.jobs.hub.join(*((one, group(one.job_id)) for one in new))
        found = dict(zip(new, await asyncio.gather(*(one.find() for one in new)), strict=True))
        for one in new:
            if found[one] is None:
                self.drop(one.job_id)
        names = [str(one.job_id) for one in new if not one.over]
        refused = [
            refusal(NotFound(f"There is no job {item.job}."), job=str(item.job))
            for item in wanted
            if item.job not in self.following
        ]

        async def send() -> None:
            for one, job in found.items():
                if job is not None:
                    await one.begin(job)

        return Opening(names, refused, send, complete=all(job is None or job.ended for job in found.values()))

    def refresh(self, jobs: Sequence[UUID]) -> None:
        """Send a fresh snapshot of each of these jobs that is followed."""
        for job_id in jobs:
            if (one := self.following.get(job_id)) is not None:
                one.refresh()

    def unsubscribe(self, names: Sequence[UUID]) -> None:
        for job_id in names:
            self.drop(job_id)

    def drop(self, job_id: UUID) -> None:
        """Follow this job no longer."""
        if (one := self.following.pop(job_id, None)) is not None:
            one.over = True
            self.jobs.hub.leave(one, group(job_id))

    def marks(self) -> dict[str, Any]:
        return {"jobs": {str(one.job_id): one.seq for one in self.following.values() if one.live}}

    def close(self) -> None:
        for job_id in tuple(self.following):
            self.drop(job_id)


class Following(Chain):
    """One job that a session follows: what it has been sent, and what is to come.

    While something is read from the record, `held` takes what is heard meanwhile; otherwise it is None.
    """

    __slots__ = ("_afresh", "_held", "_overflowed", "_part", "job_id", "over")

    def __init__(self, part: JobsPart, item: JobItem) -> None:
        super().__init__(item.since, item.epoch)
        self.job_id = item.job
        self.over = False
        self._part = part
        self._held: list[News] | None = []
        self._overflowed = False
        self._afresh = False

    @property
    def live(self) -> bool:
        """Whether what is heard is sent at once."""
        return self._held is None

    def hear(self, news: News) -> None:
        if self._held is not None:
            if len(self._held) < MOST_HELD:
                self._held.append(news)
            else:
                self._overflowed = True
        elif news.epoch == self.epoch and news.seq <= (self.seq or 0):
            return
        elif news.epoch == self.epoch and news.seq == (self.seq or 0) + 1:
            self._put(news)
        else:
            self.read_on(news)

    def behind(self, record: dict[UUID, tuple[int, int]]) -> bool:
        """Whether the record has more of the job, or has it no longer."""
        return record.get(self.job_id) != (self.epoch, self.seq) and not self.over

    async def find(self) -> Found | None:
        """The job in the record, with what stands there after what was sent."""
        tenant_id = self._part.session.principal.tenant_id
        return await self._part.jobs.find(Wish(self.job_id, tenant_id, self.seq, self.epoch))

    def read_on(self, *heard: News) -> None:
        """Read what is missing from the record, and go on from there."""
        self._held = list(heard)
        self._part.session.spawn(self._read_on())

    async def begin(self, found: Found) -> None:
        """Send the first of it, and go live."""
        if not await self._take(found):
            await self._read_on()

    def refresh(self) -> None:
        """Send a snapshot, whatever the client holds."""
        if self._held is None:
            self.seq = None
            self.read_on()
        else:
            self._afresh = True

    async def _read_on(self) -> None:
        while not self.over:
            found = await self.find()
            if found is None:
                # Retention deletes ended jobs only: its end was missed.
                self._end()
                return
            if await self._take(found):
                return

    async def _take(self, found: Found) -> bool:
        """Send what was read; True once the job is live or over, False if there is more to read."""
        writer = self._part.session.writer
        await writer.room()
        if self.over:
            return True
        if found.tail is None:
            if not found.whole:
                return False
            if self.seq is not None:
                reason = "epoch" if found.job.epoch != self.epoch else "cursor"
                writer.put(Plain.of("resync", job=str(self.job_id), d={"reason": reason}))
            self.epoch = found.job.epoch
            self._put(News.snapshot(found.job))
        else:
            for event in found.tail:
                await writer.room()
                if self.over:
                    return True
                self._put(_news(event))
            if len(found.tail) == TAIL:
                return False
            if found.job.seq > (self.seq or 0) and found.job.progress is not None:
                data = encode(found.job.progress)
                self._put(News(str(self.job_id), found.job.epoch, found.job.seq, "progress", data))
            if found.job.state.terminal and not self.over:
                self._end()
        return self.over or self._release()

    def _release(self) -> bool:
        """Send what was held back, up to a gap; True if there is none."""
        held, self._held = self._held or [], []
        if self._afresh:
            self.seq = None
        if self._afresh or self._overflowed:
            self._afresh = self._overflowed = False
            return False
        for place, news in enumerate(held):
            if news.epoch != self.epoch or news.seq <= (self.seq or 0):
                continue
            if news.seq > (self.seq or 0) + 1:
                self._held = held[place:]
                return False
            self._put(news)
            if self.over:
                return True
        self._held = None
        return True

    def _put(self, news: News) -> None:
        self.put(self._part.session.writer, news)
        if news.terminal:
            self._end()

    def _end(self) -> None:
        self._part.session.put("bye", {"reason": "terminal"}, job=str(self.job_id))
        self._part.drop(self.job_id)
        if self._part.session.single:
            self._part.session.close(NORMAL)


def _news(event: Event) -> News:
    return News.of(message(event))
