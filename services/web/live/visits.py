"""The rooms that one session is in."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from headway.errors import Forbidden, NotFound, Problem
from headway.rooms import Start, check_name, encode
from services.web.live import commands
from services.web.live.commands import Publish, RoomItem
from services.web.live.lines import Change, Plain, Said
from services.web.live.presence import shown
from services.web.live.session import Opening, Session, refusal

if TYPE_CHECKING:
    from services.web.live.rooms import LiveRooms

# Messages that are read from the record at a time.
PAGE = 100


class RoomsPart:
    """The rooms that one session is in."""

    def __init__(self, rooms: "LiveRooms", session: Session) -> None:
        self.rooms = rooms
        self.session = session
        self.visits: dict[str, Visit] = {}

    def __len__(self) -> int:
        return len(self.visits)

    async def subscribe(self, wanted: Sequence[RoomItem]) -> Opening:
        """Enter these rooms anew."""
        principal = self.session.principal
        refused, new = [], {}
        for item in {item.room: item for item in wanted}.values():
            self.drop(item.room)
            try:
                check_name(item.room)
                if not principal.may_join(item.room):
                    raise Forbidden("The ticket does not let you into this room.")
            except Problem as problem:
                refused.append(refusal(problem, room=item.room))
            else:
                new[item.room] = self.visits[item.room] = Visit(self, item.room)
        await self.rooms.hub.join(*((visit.room, visit.room.topic) for visit in new.values()))
        since = {item.room: item.since for item in wanted if item.room in new}
        starts = await self.rooms.rooms.starts(principal.tenant_id, since)
        for name in new.keys() - starts.keys():
            self.drop(name)
            refused.append(refusal(NotFound("There is no such job, and so no room of it."), room=name))
        for name, start in starts.items():
            new[name].room.begin(start.newest)

        async def send() -> None:
            await self.rooms.arrive([new[name] for name in starts])
            for name, start in starts.items():
                await new[name].begin(start)

        return Opening(list(starts), refused, send)

    async def publish(self, command: Publish) -> dict[str, Any]:
        """What the ack of the command says. Raises as `say`."""
        return {"room": command.room, "seq": await self.say(command.room, command.message, command.key)}

    async def say(self, room: str, text: str, publish_key: str | None) -> int:
        """Say something in a room; its seq. Raises InvalidRequest, Forbidden, NotFound, KeyReused or Conflict."""
        principal = self.session.principal
        check_name(room)
        if not principal.publish or not principal.may_join(room):
            raise Forbidden("The ticket does not let you speak in this room.")
        message, _ = await self.rooms.rooms.publish(
            principal.tenant_id,
            room,
            text,
            author=principal.user,
            key_id=principal.key_id,
            publish_key=publish_key,
        )
        return message.seq

    def unsubscribe(self, names: Sequence[str]) -> None:
        for name in names:
            self.drop(name)

    def drop(self, name: str) -> None:
        """Leave this room."""
        if (visit := self.visits.pop(name, None)) is not None:
            visit.over = True
            self.rooms.leave(visit)

    def marks(self) -> dict[str, Any]:
        return {"rooms": {name: visit.held for name, visit in self.visits.items() if visit.live}}

    def close(self) -> None:
        for name in tuple(self.visits):
            self.drop(name)


class RoomSession(Session):
    """A session of one room, which speaks no protocol: what is said is sent as it is."""

    room = ""

    async def obey(self, text: str) -> None:
        try:
            speech = commands.read_speech(text)
            seq = await self.part("rooms").say(self.room, speech.message, speech.key)
        except Problem as problem:
            self.writer.put(Plain.bare("error", {"error": refusal(problem)}))
        else:
            if speech.key is not None:
                self.writer.put(Plain.bare("ack", {"ack": {"key": speech.key, "seq": seq}}))


class Visit:
    """A session in a room.

    `held` is the seq of the newest message that the client was sent; while it is `live` that is all there is. `counted`
    is whether others see it there; the client is told of them once it was greeted.
    """

    __slots__ = ("_fresh", "_greeted", "_part", "counted", "held", "id", "live", "name", "over", "room")

    def __init__(self, part: RoomsPart, room: str) -> None:
        self.id = uuid4()
        self.name = part.session.principal.user
        self.held = 0
        self.live = False
        self.counted = False
        self.over = False
        # Whether what comes next follows on nothing that the client holds.
        self._fresh = False
        self._greeted = False
        self._part = part
        self.room = part.rooms.enter(self, (part.session.principal.tenant_id, room))

    async def begin(self, start: Start) -> None:
        """Send what the client missed, and go live."""
        self.held = start.after
        self._fresh = not start.follows
        if start.reset:
            self._reset(start.reset)
        elif self._part.session.hello and self.held == start.newest:
            # Without a message to tell it, the client would not know where to go on if the connection broke now.
            self._part.session.put("hb", {"jobs": {}, "rooms": {self.room.place[1]: self.held}})
        writer, rooms = self._part.session.writer, self._part.rooms.rooms
        # Nothing can be told between this look and `live`.
        while not self.over and self.held < (self.room.held or 0):
            await writer.room()
            page = await rooms.messages(*self.room.place, after=self.held, limit=PAGE)
            if not self._fresh and (not page or page[0].seq != self.held + 1):
                self._reset("retention")
            if not page:
                self.held = self.room.held or 0
            for message in page:
                await writer.room()
                self._send(Said(message.room, self.held, message.seq, encode(message)))
        self.live = not self.over

    def hear(self, said: Said) -> None:
        """Something was said in the room."""
        if self.live and said.seq > self.held:
            self._send(said)

    def greet(self, names: Collection[str]) -> None:
        """Tell who is here."""
        self._greeted = True
        self.notice(Change(self.room.place[1], {"here": shown(names)}))

    def notice(self, change: Change) -> None:
        """Someone has come or gone."""
        if self._greeted:
            session = self._part.session
            session.writer.put(change.framed if session.hello else change.bare)

    def _send(self, said: Said) -> None:
        if self._fresh:
            said = Said(said.room, None, said.seq, said.data)
            self._fresh = False
        self.held = said.seq
        session = self._part.session
        session.writer.put(said.framed if session.hello else said.bare)

    def _reset(self, reason: str) -> None:
        self._fresh = True
        session, d = self._part.session, {"reason": reason}
        if session.hello:
            session.put("resync", d, room=self.room.place[1])
        else:
            session.writer.put(Plain.bare("resync", {"resync": d}))
