"""Rooms in which sessions of this process are: each is told what is said, once and in order, and who comes and goes.

What Redis brings is a hint. A message that comes out of turn waits until those before it are read from the record. Who
is there is read anew whenever someone may have come or gone, and every ten seconds.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any
from uuid import UUID

import structlog

from headway import metrics
from headway.events import Events
from headway.rooms import MISSED_AT_ONCE, Rooms, encode, group
from headway.store import OUTAGES
from services.web.live.hub import Hub
from services.web.live.lines import Change, Said
from services.web.live.presence import Place, Presence, Seen, shown
from services.web.live.session import Session
from services.web.live.visits import RoomsPart, Visit

# Seconds after which the entries of those who are here are renewed.
RENEW_EVERY = 10.0
# If more have come or gone at once, all that are here are told in their place.
MOST_CHANGES = 20

log = structlog.get_logger(__name__)


class LiveRooms:
    """What all sessions of the process need to be in rooms."""

    def __init__(self, rooms: Rooms, presence: Presence, hub: Hub, events: Events) -> None:
        self.rooms = rooms
        self.presence = presence
        self.hub = hub
        self._events = events
        self._open: dict[Place, OpenRoom] = {}
        self._behind: set[OpenRoom] = set()
        self._changed: dict[OpenRoom, set[str]] = {}
        self._filling: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    def part(self, session: Session) -> RoomsPart:
        return RoomsPart(self, session)

    async def check(self, parts: Sequence[RoomsPart]) -> None:
        await self._fill({visit.room for part in parts for visit in part.visits.values()})

    async def close(self) -> None:
        """Let it be seen that those who were here have left."""
        tasks = [task for task in (self._filling, self._looking, self._renewing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._leaving, return_exceptions=True)

    def enter(self, visit: Visit, place: Place) -> "OpenRoom":
        """The room, which is open as long as someone visits it."""
        room = self._open.get(place)
        if room is None:
            room = self._open[place] = OpenRoom(self, place)
        room.visits.add(visit)
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._keep_renewing())
        return room

    def leave(self, visit: Visit) -> None:
        room = visit.room
        room.visits.discard(visit)
        if not room.visits and self._open.get(room.place) is room:
            del self._open[room.place]
            self.hub.leave(room, room.topic)
        if visit.counted:
            self._see_off_soon(visit)

    async def arrive(self, visits: Collection[Visit]) -> None:
        """Count these as being in their rooms, and tell each who else is, and the others of each."""
        arriving = {visit: visit.name not in visit.room.present() for visit in visits if not visit.over}
        for visit in arriving:
            visit.counted = True
        seen = await self._renew(arriving)
        for visit, new in arriving.items():
            if visit.over:
                continue
            room = visit.room
            names, lapsed = seen.get(room.place, (set(), set()))
            room.see(names, lapsed)
            visit.greet(room.here)
            if new or lapsed:
                self.announce(room, lapsed)

    def fill_soon(self, room: "OpenRoom") -> None:
        """Read what was said in the room and not heard."""
        self._behind.add(room)
        self._filling = self._unless_running(self._filling, self._fill_behind)

    def look_soon(self, room: "OpenRoom", left: Iterable[str]) -> None:
        """See who is in the room; those of `left` who are not there have left."""
        self._changed.setdefault(room, set()).update(left)
        self._looking = self._unless_running(self._looking, self._look)

    def announce(self, room: "OpenRoom", left: Collection[str]) -> None:
        """Let all processes see who is in the room."""
        self._events.tell(room.topic, {"type": "room.presence", "left": list(left)})

    def _unless_running(
        self, task: asyncio.Task[None] | None, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        return asyncio.create_task(self._guarded(work())) if task is None or task.done() else task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OUTAGES as error:
            log.warning("rooms wait for the database; the next heartbeat reads what was missed", error=repr(error))
        except Exception:
            metrics.errors_caught.labels("rooms").inc()
            log.exception("rooms are not up to date; the next heartbeat reads what was missed")

    async def _fill_behind(self) -> None:
        while self._behind:
            behind, self._behind = self._behind, set()
            await self._fill(behind)

    async def _fill(self, rooms: Iterable["OpenRoom"]) -> None:
        """Tell in each room what the record has and was not told: one query, unless much was missed."""
        behind = {room.place: room for room in rooms if room.held is not None and room.visits}
        while behind:
            missed = await self.rooms.missed([(*place, room.held or 0) for place, room in behind.items()])
            count: Counter[Place] = Counter()
            for tenant_id, message in sorted(missed, key=lambda one: one[1].seq):
                place = tenant_id, message.room
                count[place] += 1
                behind[place].tell(message.seq, encode(message))
            behind = {place: behind[place] for place, number in count.items() if number == MISSED_AT_ONCE}

    async def _look(self) -> None:
        while self._changed:
            changed, self._changed = self._changed, {}
            seen = await self.presence.renew({room.place: () for room in changed})
            for room, left in changed.items():
                if room.place in seen:
                    names, lapsed = seen[room.place]
                    room.see(names, left | lapsed)
                    if lapsed:
                        self.announce(room, lapsed)

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(RENEW_EVERY)
            await self._guarded(self._renew_all())

    async def _renew_all(self) -> None:
        rooms = dict(self._open)
        seen = await self._renew([visit for room in rooms.values() for visit in room.visits if visit.counted])
        for place, (names, lapsed) in seen.items():
            rooms[place].see(names, lapsed, periodic=True)
            if lapsed:
                self.announce(rooms[place], lapsed)

    async def _renew(self, visits: Collection[Visit]) -> Seen:
        """Renew the entries of these visits; who is in their rooms."""
        entries: defaultdict[Place, list[tuple[UUID, str]]] = defaultdict(list)
        for visit in visits:
            entries[visit.room.place].append((visit.id, visit.name))
        seen = await self.presence.renew(entries)
        for visit in visits:
            if visit.over:
                # It left meanwhile, and its entry may have come back after that.
                self._see_off_soon(visit)
        return seen

    def _see_off_soon(self, visit: Visit) -> None:
        task = asyncio.create_task(self._guarded(self._see_off(visit)))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _see_off(self, visit: Visit) -> None:
        room, name = visit.room, visit.name
        if not await self.presence.leave(room.place, visit.id, name) and name not in room.present():
            room.see(room.here - {name}, {name})
            self.announce(room, {name})


class OpenRoom:
    """A room in which some session of this process is. `held` is the seq of the newest message that was told here."""

    def __init__(self, rooms: LiveRooms, place: Place) -> None:
        self.place = place
        self.topic = group(*place)
        self.visits: set[Visit] = set()
        self.held: int | None = None
        # The names that whoever is here knows of, and those of them that were not there the last time.
        self.here: set[str] = set()
        self._unseen: set[str] = set()
        self._rooms = rooms
        self._newest = 0

    def hear(self, message: dict[str, Any]) -> None:
        """Called by the hub."""
        if message["type"] == "room.presence":
            self._rooms.look_soon(self, message["left"])
            return
        seq = message["seq"]
        self._newest = max(self._newest, seq)
        if self.held is None or seq <= self.held:
            return
        if seq == self.held + 1:
            self.tell(seq, message["d"])
        else:
            self._rooms.fill_soon(self)

    def begin(self, newest: int) -> None:
        """The record has messages up to `newest`; what comes after is told."""
        if self.held is None:
            self.held = newest
            if self._newest > newest:
                self._rooms.fill_soon(self)

    def tell(self, seq: int, data: str) -> None:
        """Tell a message, unless it was told."""
        if self.held is None or seq <= self.held:
            return
        said = Said(self.place[1], self.held, seq, data)
        self.held = seq
        for visit in tuple(self.visits):
            visit.hear(said)

    def present(self) -> set[str]:
        """The names of those who are here in this process."""
        return {visit.name for visit in self.visits if visit.counted}

    def see(self, names: set[str], left: Collection[str], *, periodic: bool = False) -> None:
        """Tell who has come and who has left, given the names that Redis has.

        It may have been wiped, and others may not have renewed their entries yet: whoever is neither there nor among
        `left` has left only if it was not there at the last periodic look either.
        """
        now = names | self.present()
        gone = self.here - now
        lost = {name for name in gone if name in left or (periodic and name in self._unseen)}
        if periodic:
            self._unseen = gone - lost
        new = now - self.here
        self.here = (self.here | new) - lost
        changes: list[dict[str, Any]] = [{"joined": name} for name in sorted(new)]
        changes += [{"left": name} for name in sorted(lost)]
        if len(changes) > MOST_CHANGES:
            changes = [{"here": shown(self.here)}]
        for change in changes:
            told = Change(self.place[1], change)
            for visit in tuple(self.visits):
                visit.notice(told)
