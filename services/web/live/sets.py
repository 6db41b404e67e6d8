"""Sets of jobs that sessions follow: all of a tenant, or those of a kind, a tag or a parent.

A set is told of what happens by the feed. While it has to catch up, after a cursor or because its client is slow, it
reads for itself, in pages as the client takes them, and holds back what the feed tells meanwhile.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from headway import metrics
from headway.errors import InvalidRequest
from headway.events import message
from headway.job import Event, Job
from headway.store.cursor import BadCursor, Cursor
from headway.store.live import LiveStore, Wish
from headway.store.sets import Filter, Happening, Missed, SetStore
from services.web.live.chain import Chain
from services.web.live.commands import SetItem
from services.web.live.feed import Feed, Round
from services.web.live.hub import Hub
from services.web.live.lines import News, Plain, encode
from services.web.live.session import Opening, Session, refusal

# Jobs that a set remembers what it has told of; one that it has forgotten is told by a snapshot again.
MOST_KNOWN = 10_000
# Happenings that are held back while a set catches up; past that it reads once more.
MOST_HELD = 256
# A set that missed no more than this goes live after it.
FEW = 50


class Sets:
    """What all sessions of the process need to follow sets."""

    def __init__(self, jobs: LiveStore, sets: SetStore, hub: Hub, *, keep: float) -> None:
        self.jobs = jobs
        self.store = sets
        self.feed = Feed(sets, hub)
        # Seconds that events are kept, and so that a cursor is good for.
        self.keep = keep

    def part(self, session: Session) -> "SetsPart":
        return SetsPart(self, session)

    async def check(self, parts: Sequence["SetsPart"]) -> None:
        """The feed misses no event; progress that Redis lost is told as if it had come."""
        held: dict[UUID, int] = {}
        for one in (one for part in parts for one in part.following.values() if one.live):
            for job, chain in one.known.items():
                held[UUID(job)] = min(held.get(UUID(job), chain.seq or 0), chain.seq or 0)
        for tenant_id, job_id, epoch, seq, progress in await self.store.progress(list(held)) if held else ():
            if seq > held[job_id]:
                self.feed.hear(tenant_id, News(str(job_id), epoch, seq, "progress", encode(progress)))

    async def close(self) -> None:
        await self.feed.close()


class SetsPart:
    """The sets that one session follows, by the names that the client gave them."""

    def __init__(self, sets: Sets, session: Session) -> None:
        self.sets = sets
        self.session = session
        self.following: dict[str, FollowingSet] = {}

    def __len__(self) -> int:
        return len(self.following)

    async def subscribe(self, wanted: Sequence[SetItem]) -> Opening:
        new, refused = [], []
        for item in {item.set: item for item in wanted}.values():
            self.drop(item.set)
            try:
                cursor = Cursor.decode(item.since) if item.since is not None else None
            except BadCursor as error:
                refused.append(refusal(InvalidRequest(str(error)), set=item.set))
                continue
            one = self.following[item.set] = FollowingSet(self, item, cursor)
            new.append(one)

        async def send() -> None:
            for one in new:
                self.session.spawn(one.read())

        return Opening([one.name for one in new], refused, send)

    def unsubscribe(self, names: Sequence[str]) -> None:
        for name in names:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Follow this set no longer."""
        if (one := self.following.pop(name, None)) is not None:
            one.over = True
            self.sets.feed.leave(one)

    def marks(self) -> dict[str, Any]:
        """A cursor that is good for all sets, once all of them are live."""
        cursors = [one.cursor for one in self.following.values() if one.live]
        if not cursors or len(cursors) < len(self.following):
            return {}
        # Of two snapshots the earlier one is good for both.
        return {"cursor": min(cursors, key=lambda cursor: (cursor.since.xmax, -len(cursor.since.running))).encode()}

    def close(self) -> None:
        for name in tuple(self.following):
            self.drop(name)


class FollowingSet:
    """One set that a session follows: which of its jobs it was told of, and how far.

    While it reads for itself, `_held` takes the rounds of the feed; otherwise that is None.
    """

    def __init__(self, part: SetsPart, item: SetItem, cursor: Cursor | None) -> None:
        self.name = item.set
        self.over = False
        self.known: OrderedDict[str, Chain] = OrderedDict()
        self._part = part
        self._wanted = Filter(part.session.principal.tenant_id, item.kind, item.tag, item.parent)
        self._allowed = part.session.principal.jobs
        self._name = f',"set":[{encode(item.set)}]'
        self._cursor = cursor
        # After a cursor the client knows jobs that are not known here.
        self._resumed = cursor is not None
        self._ended: set[str] = set()
        self._held: list[Round] | None = []
        self._overflowed = False

    @property
    def tenant_id(self) -> UUID:
        return self._wanted.tenant_id

    @property
    def live(self) -> bool:
        """Whether it is told of what happens as the feed tells it."""
        return self._held is None

    @property
    def cursor(self) -> Cursor:
        """How far it was told."""
        assert self._cursor is not None
        return self._cursor

    def knows(self, happening: Happening) -> bool:
        event = happening.event
        return not self._takes(happening) or self._follows_on(str(event.job_id), event.epoch, event.seq)

    def take(self, round: Round) -> None:
        if self._held is None:
            if not self._tell(round):
                self._start_reading()
        elif sum(len(held.told) for held in (*self._held, round)) <= MOST_HELD:
            self._held.append(round)
        else:
            self._overflowed = True

    def lost(self) -> None:
        if self._held is None:
            self._start_reading()
        else:
            self._overflowed = True

    async def read(self) -> None:
        """Tell what was missed, or of all jobs that are open; then go live."""
        sets, writer = self._part.sets, self._part.session.writer
        await sets.feed.join(self)
        if self._cursor is None:
            await self._begin()
        while not self.over:
            await writer.room()
            cursor = self.cursor
            # What the feed tells from here on is not in doubt; what it told before is read again.
            self._held, self._overflowed = [], False
            missed = await sets.store.missed(cursor, self._wanted)
            void = missed.void or ("retention" if cursor.at and time.time() - cursor.at > sets.keep else None)
            if void is not None:
                writer.put(Plain.of("resync", set=self.name, d={"reason": void}))
                await self._begin()
                continue
            for page in missed.pages():
                await self._tell_page(page, missed)
            if self.over:
                return
            self._cursor = Cursor(missed.database, missed.upto)
            if cursor.upto is None and len(missed.keys) <= FEW and self._release():
                # The client gets a cursor, also if nothing happens for a while.
                self._part.session.heartbeat()
                return

    def _start_reading(self) -> None:
        metrics.set_catch_ups.inc()
        self._held = []
        self._part.session.spawn(self.read())

    async def _begin(self) -> None:
        """Tell of the jobs that are open now."""
        self.known.clear()
        self._resumed = False
        database, upto, found = await self._part.sets.store.open_jobs(self._wanted)
        self._cursor = Cursor(database, upto)
        for one in found:
            if self._allowed is None or one.job.id in self._allowed:
                job = one.job if one.whole else await self._whole(one.job.id)
                await self._part.session.writer.room()
                if job is not None and not self.over:
                    self._introduce(News.snapshot(job), None)

    async def _whole(self, job_id: UUID) -> Job | None:
        """A job that was too large for an answer with others."""
        [found] = await self._part.sets.jobs.find([Wish(job_id, self.tenant_id)])
        return found.job if found is not None else None

    async def _tell_page(self, page: Sequence[tuple[UUID, int, int]], missed: Missed) -> None:
        writer, since = self._part.session.writer, self.cursor.since
        events = [
            event
            for event in await self._part.sets.store.events_at(page)
            if self._allowed is None or event.job_id in self._allowed
        ]
        new = {event.job_id for event in events if not self._follows_on(str(event.job_id), event.epoch, event.seq)}
        wishes = [Wish(job_id, self.tenant_id) for job_id in new]
        found = dict(zip(new, await self._part.sets.jobs.find(wishes), strict=True)) if wishes else {}
        for event in events:
            await writer.room()
            if self.over:
                return
            snapshot = None
            if not self._follows_on(str(event.job_id), event.epoch, event.seq):
                one = found.get(event.job_id)
                job = one.job if one is not None and one.whole else await self._whole(event.job_id)
                if job is None:
                    continue
                snapshot = News.snapshot(job)
            cursor = Cursor(missed.database, since, missed.upto, event.job_id, snapshot.seq if snapshot else event.seq)
            self._put(event, snapshot or News.of(message(event)), cursor.encode())
            self._cursor = cursor

    def _release(self) -> bool:
        """Tell what was held back; False if there was too much of it, or something has to be read first."""
        held, self._held = self._held or [], None
        if self._overflowed or not all(self._tell(round) for round in held):
            self._held = []
            return False
        self._forget_ended()
        return True

    def _tell(self, round: Round) -> bool:
        """Tell what is new in a round; False if something has to be read first, or the client is slow."""
        writer, since = self._part.session.writer, self.cursor.since
        if not since.includes(round.upto):
            exact = since is round.since
            for told in round.told:
                if not self._takes(told.happening) or (not exact and since.sees(told.happening.xid)):
                    continue
                news, cursor = told.news, told.cursor if exact else None
                event = told.happening.event
                if not self._follows_on(news.job, news.epoch, news.seq):
                    if event.job_id not in round.snapshots:
                        return False
                    news, cursor = round.snapshots[event.job_id], None
                if not writer.free:
                    return False
                self._cursor = Cursor(round.database, since, round.upto, event.job_id, news.seq)
                self._put(event, news, cursor or self._cursor.encode())
            if round.last:
                self._cursor = Cursor(round.database, round.upto)
        for news in round.progress:
            chain = self.known.get(news.job)
            if chain is not None and chain.epoch == news.epoch and news.seq > (chain.seq or 0):
                chain.put(writer, news, self._name)
        self._forget_ended()
        return True

    def _takes(self, happening: Happening) -> bool:
        allowed = self._allowed is None or happening.event.job_id in self._allowed
        return allowed and happening.fits(self._wanted)

    def _follows_on(self, job: str, epoch: int, seq: int) -> bool:
        """Whether an event can be told without a snapshot before it."""
        chain = self.known.get(job)
        return chain.epoch == epoch if chain is not None else self._resumed and seq > 1

    def _put(self, event: Event, news: News, cursor: str) -> None:
        """Tell of an event, by itself or by a snapshot of its job, which may hold what comes after it."""
        if event.terminal:
            self._ended.add(news.job)
        chain = self.known.get(news.job)
        if news.type == "snapshot":
            self._introduce(news, cursor)
            return
        if chain is None:
            chain = self.known[news.job] = Chain(epoch=news.epoch)
        if news.seq <= (chain.seq or 0):
            return
        chain.put(self._part.session.writer, news, f'{self._name},"cursor":"{cursor}"', cursor)
        self.known.move_to_end(news.job)
        self._forget_oldest()

    def _introduce(self, news: News, cursor: str | None) -> None:
        """Tell of a job that is new to the client."""
        chain = self.known[news.job] = Chain(epoch=news.epoch)
        more = f'{self._name},"cursor":"{cursor}"' if cursor else self._name
        chain.put(self._part.session.writer, news, more, cursor)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        if len(self.known) > MOST_KNOWN:
            self.known.popitem(last=False)

    def _forget_ended(self) -> None:
        """Once it is live, nothing more comes of jobs whose end was told, or passed over: it was in a snapshot."""
        if self._held is None:
            for job in self._ended:
                self.known.pop(job, None)
            self._ended.clear()
