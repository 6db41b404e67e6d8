"""WebSockets as Channels consumers: `/ws/v1` speaks `jobs.v1`, `/ws/jobs/{id}` follows one job without a word."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import structlog
from channels.exceptions import StopConsumer
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import URLRouter
from django.urls import path

from headway import metrics
from headway.errors import InvalidRequest, OriginRefused, Problem, TicketRefused, TooMany, Unauthenticated, Unavailable
from headway.rooms import check_name
from headway.store import OUTAGES
from services.web.app import App
from services.web.live.commands import JobItem, RoomItem
from services.web.live.entrance import enter
from services.web.live.lines import Line
from services.web.live.session import (
    BAD_MESSAGE,
    BROKEN,
    CONNECTION_LIMIT,
    EXPIRED,
    FOREIGN,
    NO_SUCH_JOB,
    PROTOCOL,
    TRY_AGAIN,
    UNAUTHORISED,
    Session,
)
from services.web.live.visits import RoomSession
from services.web.protocol import WebSocket

SEQ = re.compile(r"[0-9]{1,15}", re.ASCII)
# What refuses a client that connects, and the code that its socket is closed with.
CODES: dict[type[Problem], int] = {
    TicketRefused: EXPIRED,
    Unauthenticated: UNAUTHORISED,
    OriginRefused: FOREIGN,
    TooMany: CONNECTION_LIMIT,
    Unavailable: TRY_AGAIN,
}

log = structlog.get_logger(__name__)


class LiveConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket and its session. What can be refused is accepted first: a browser is told no reason otherwise."""

    channel_layer_alias = None
    # Whether the client takes several lines in one frame, as an array.
    batch = False
    kind: type[Session] = Session

    def __init__(self) -> None:
        super().__init__()
        self.session: Session | None = None
        self._socket: WebSocket | None = None

    async def dispatch(self, message: dict[str, Any]) -> None:
        """As Channels does, without its visit to a thread to close ORM connections: there are none here."""
        await getattr(self, message["type"].replace(".", "_"))(message)

    async def websocket_connect(self, message: dict[str, Any]) -> None:
        self._socket = self.scope.get("headway.socket")
        await self.accept(PROTOCOL if PROTOCOL in self.scope["subprotocols"] else None)
        metrics.ws_connections.inc()
        sessions = self.app.sessions
        try:
            session = self.kind(sessions, await enter(self.app, self.scope), self)
            sessions.enter(session)
        except Problem as problem:
            code = next(code for refused, code in CODES.items() if isinstance(problem, refused))
            await self.close(code, str(problem)[:120])
        except OUTAGES as error:
            log.warning("a socket was closed: the database is not available", error=repr(error))
            await self.close(TRY_AGAIN, "The database cannot be reached; connect again in a moment.")
        except Exception:
            metrics.errors_caught.labels("socket").inc()
            log.exception("a socket failed")
            await self.close(BROKEN, "Something broke here; connect again.")
        else:
            self.session = session
            self.begin(session)

    async def websocket_disconnect(self, message: dict[str, Any]) -> None:
        metrics.ws_connections.dec()
        if self.session is not None:
            self.app.sessions.leave(self.session)
        raise StopConsumer

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        """Nothing is expected from the client; what it sends is passed over."""

    @property
    def app(self) -> App:
        return self.scope["headway"]  # type: ignore[no-any-return]

    def begin(self, session: Session) -> None:
        """The session is open."""

    # Transport

    @property
    def ready(self) -> bool:
        """Only our own protocol of uvicorn tells; elsewhere every line is waited for."""
        return self._socket is not None and self._socket.ready

    def send_now(self, lines: Sequence[Line]) -> None:
        assert self._socket is not None
        self._socket.write(_frame(lines))

    async def send(self, lines: Sequence[Line]) -> None:
        await self.base_send({"type": "websocket.send", "text": _frame(lines)})

    async def accept(self, subprotocol: str | None = None, headers: Any = None) -> None:
        await self.base_send({"type": "websocket.accept", "subprotocol": subprotocol})

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.base_send({"type": "websocket.close", "code": code, "reason": reason})

    def abort(self) -> None:
        """Only our own protocol of uvicorn can; elsewhere the server drops a peer when it sees fit."""
        if self._socket is not None:
            self._socket.abort()


def _frame(lines: Sequence[Line]) -> str:
    for line in lines:
        metrics.series(metrics.ws_frames, line.type).inc()
    return lines[0].text() if len(lines) == 1 else f"[{','.join([line.text() for line in lines])}]"


class JobsConsumer(LiveConsumer):
    """Many jobs, sets and rooms on one socket, by the protocol `jobs.v1`."""

    batch = True

    def begin(self, session: Session) -> None:
        session.welcome()

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        if self.session is not None:
            self.session.take(message.get("text"))


class JobConsumer(LiveConsumer):
    """One job, from its snapshot to its end."""

    def begin(self, session: Session) -> None:
        session.single = session.subscribed = True
        session.spawn(self._follow(session))

    async def _follow(self, session: Session) -> None:
        job_id = self.scope["url_route"]["kwargs"]["job_id"]
        opening = await session.part("jobs").subscribe([JobItem(job=job_id)])
        if opening.names:
            await opening.send()
        else:
            session.close(NO_SUCH_JOB, f"There is no job {job_id}.")


class RoomConsumer(LiveConsumer):
    """One room: what is said in it, as flat objects, and who comes and goes. What the client sends is said."""

    kind = RoomSession

    def begin(self, session: Session) -> None:
        session.subscribed = True
        session.spawn(self._join(session))

    async def websocket_receive(self, message: dict[str, Any]) -> None:
        if self.session is not None:
            self.session.take(message.get("text"))

    async def _join(self, session: Session) -> None:
        assert isinstance(session, RoomSession)
        room = self.scope["url_route"]["kwargs"]["room"]
        try:
            check_name(room)
            item = RoomItem(room=room, since=_since(self.scope["query_string"]))
        except InvalidRequest as problem:
            session.close(BAD_MESSAGE, str(problem)[:120])
            return
        session.room = room
        opening = await session.part("rooms").subscribe([item])
        if opening.names:
            await opening.send()
        elif session.principal.may_join(room):
            session.close(NO_SUCH_JOB, f"There is no job {room.removeprefix('job:')}.")
        else:
            session.close(UNAUTHORISED, "The ticket does not let you into this room.")


def _since(query: bytes) -> int | None:
    """The seq after which to begin, of `?since=`. Raises InvalidRequest."""
    given = parse_qs(query.decode("latin1"), keep_blank_values=True)
    since = given.pop("since", [None])[-1]
    if given or (since is not None and not SEQ.fullmatch(since)):
        raise InvalidRequest("There is one parameter here, since: the seq of the last message that you have.")
    return None if since is None else int(since)


async def _no_such_path(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 4500})


websockets = URLRouter(
    [
        path("ws/v1", JobsConsumer.as_asgi()),
        path("ws/rooms/<str:room>", RoomConsumer.as_asgi()),
        path("ws/jobs/<uuid:job_id>", JobConsumer.as_asgi()),
        path("<path:rest>", _no_such_path),  # type: ignore[arg-type]  # Channels routes to ASGI applications
    ]
)
