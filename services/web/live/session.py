"""A session: one WebSocket or one SSE stream, with what it follows."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import structlog

from headway import metrics
from headway.errors import InvalidRequest, Problem, TooMany
from headway.store import OUTAGES
from services.web.api.auth import Principal
from services.web.live import commands
from services.web.live.lines import Plain, encode
from services.web.live.writer import Transport, Writer

if TYPE_CHECKING:
    from services.web.live.sessions import Sessions

PROTOCOL = "jobs.v1"
MOST_SUBSCRIPTIONS = 256
# Commands a second, how many may come at once, and how many may wait for those before them.
COMMANDS = 20
BURST = 40
HEARTBEAT = 15.0
FIRST_SUBSCRIBE_WITHIN = 10.0
OLDEST = 12 * 3600.0
MOST_FRAME = 16 << 10

NORMAL, RESTART, TRY_AGAIN, BROKEN = 1000, 1012, 1013, 1011
TOO_OLD, EXPIRED, OVERLOAD = 4000, 4001, 4013
BAD_MESSAGE, UNAUTHORISED, FOREIGN = 4500, 4501, 4503
CONNECTION_LIMIT, SUBSCRIPTION_LIMIT, NO_SUCH_JOB = 4504, 4505, 4506

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opening:
    """What came of a wish to subscribe: what holds now, an `error` for each item that does not, and what to do next.

    `send` is called once the client is told: it sends snapshots and what was missed. If it is `complete`, the client
    has all that there will ever be.
    """

    names: Sequence[str]
    refused: Sequence[dict[str, Any]]
    send: Callable[[], Coroutine[Any, Any, None]]
    complete: bool = False


class Part(Protocol):
    """What a session follows of one sort: jobs, sets or rooms."""

    def __len__(self) -> int:
        """How many, of the 256 that a session may have."""

    async def subscribe(self, wanted: Sequence[Any]) -> Opening:
        """Raises one of OUTAGES."""

    def unsubscribe(self, names: Sequence[Any]) -> None:
        """Names that are not subscribed to are passed over."""

    def marks(self) -> dict[str, Any]:
        """What a heartbeat says of it."""

    def close(self) -> None:
        """The session is over: leave all topics."""


class Sort(Protocol):
    """One sort of subscription, for all sessions of the process."""

    def part(self, session: "Session") -> Part: ...

    async def check(self, parts: Sequence[Any]) -> None:
        """Compare what these sessions were sent with the record, in one query, and send what is missing.

        Called before each heartbeat, and when messages of Redis may have been lost. Raises one of OUTAGES.
        """

    async def close(self) -> None:
        """The process ends."""


def refusal(problem: Problem, **item: str) -> dict[str, Any]:
    """The `d` of an error line; `item` names what it is about: job, set or room."""
    d: dict[str, Any] = {"type": f"urn:headway:problem:{problem.slug}", "detail": problem.detail, **item}
    if problem.errors:
        d["errors"] = list(problem.errors)
    return d


class Session:
    """Obeys the commands of one client, and sends it what it follows."""

    __slots__ = (
        "_allowance",
        "_commands",
        "_counted",
        "_obeying",
        "_refused",
        "_sessions",
        "_tasks",
        "beats",
        "began",
        "ends",
        "hello",
        "id",
        "parts",
        "principal",
        "single",
        "subscribed",
        "transport",
        "writer",
    )

    def __init__(self, sessions: "Sessions", principal: Principal, transport: Transport) -> None:
        self.id = str(uuid4())
        self.principal = principal
        self.transport = transport
        self.writer = Writer(transport, sessions.later)
        self.parts: dict[str, Any] = {}
        # Whether the session ends with the one job that it follows.
        self.single = False
        # Whether the client understands heartbeats, and what else is not about a job.
        self.hello = False
        self._sessions = sessions
        self._commands: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._obeying: asyncio.Task[None] | None = None
        self._allowance, self._counted = float(BURST), 0.0
        self._refused = False
        now = asyncio.get_running_loop().time()
        self.began = now
        self.ends = now + OLDEST * random.uniform(0.9, 1.1)  # noqa: S311
        self.beats = now + HEARTBEAT
        self.subscribed = False

    def welcome(self) -> None:
        """Begin the protocol `jobs.v1`."""
        self.hello = True
        limits = {"frame": MOST_FRAME, "subscriptions": MOST_SUBSCRIPTIONS, "commands": COMMANDS}
        self.put("welcome", {"protocol": PROTOCOL, "socket": self.id, "hb": int(HEARTBEAT), "limits": limits})

    def put(self, type: str, d: Any, **fields: Any) -> None:
        """Send a line of the protocol's own."""
        self.writer.put(Plain.of(type, **fields, d=d))

    def part(self, name: str) -> Any:
        """The Part of this name, made when it is first needed."""
        if name not in self.parts:
            self.parts[name] = self._sessions.sorts[name].part(self)
        return self.parts[name]

    def heartbeat(self) -> None:
        """Tell how far everything is, so that a client knows that it has all; and be due again 15 s later."""
        self.beats = asyncio.get_running_loop().time() + HEARTBEAT
        if not self.hello:
            return
        d: dict[str, Any] = {}
        for part in self.parts.values():
            d |= part.marks()
        self.writer.put(Plain("hb", encode({"t": "hb", "d": d}), d.get("cursor")))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something that ends with the session; if it fails, so does the session."""
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self, code: int, reason: str = "") -> None:
        """Close once what waits is sent."""
        self.writer.end(code, reason)

    def ended(self) -> None:
        """The connection is no more."""
        self.writer.drop()
        for task in tuple(self._tasks):
            task.cancel()
        for part in self.parts.values():
            part.close()

    # Commands

    def take(self, text: str | None) -> None:
        """A frame of the client; None if it was binary. Frames that come too fast end the session."""
        if text is None or len(text) > MOST_FRAME:
            self.close(BAD_MESSAGE, "Send text frames with JSON, of 16 KiB at most.")
            return
        now = asyncio.get_running_loop().time()
        self._allowance = min(BURST, self._allowance + (now - self._counted) * COMMANDS)
        self._counted = now
        if self._allowance < 1:
            self.close(OVERLOAD, f"Send {COMMANDS} commands a second at most; connect again with `since`.")
            return
        self._allowance -= 1
        if self.writer.ending:
            return
        self._commands.append(text)
        if self._obeying is None or self._obeying.done():
            self._obeying = self.spawn(self._obey())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OUTAGES as error:
            log.warning("a session was closed: the database is not available", error=repr(error))
            self.close(TRY_AGAIN, "The database cannot be reached; connect again in a moment.")
        except Exception:
            metrics.errors_caught.labels("session").inc()
            log.exception("a session failed")
            self.close(BROKEN, "Something broke here; connect again.")

    async def _obey(self) -> None:
        while self._commands and not self.writer.ending:
            await self.obey(self._commands.pop(0))

    async def obey(self, text: str) -> None:
        """Do as a frame says, and answer it."""
        try:
            command = commands.read(text)
        except commands.Unusable as error:
            self.close(BAD_MESSAGE, str(error)[:120])
            return
        if isinstance(command, tuple):
            self.put("error", refusal(command[1]), id=command[0])
            return
        try:
            await self._do(command)
        except Problem as problem:
            self.put("error", refusal(problem), id=command.id)

    async def _do(self, command: commands.Command) -> None:
        if isinstance(command, commands.Subscribe):
            await self.subscribe(command)
        elif isinstance(command, commands.Unsubscribe):
            for name, names in (("jobs", command.jobs), ("sets", command.sets), ("rooms", command.rooms)):
                if name in self.parts:
                    self.parts[name].unsubscribe(names)
            self.put("ack", {}, id=command.id)
        elif isinstance(command, commands.Refresh):
            self.put("ack", {}, id=command.id)
            self.part("jobs").refresh(command.jobs)
        elif isinstance(command, commands.Publish):
            self.put("ack", await self.part("rooms").publish(command), id=command.id)
        else:
            self.put("ack", {}, id=command.id)

    async def subscribe(self, command: commands.Subscribe) -> None:
        """Do as the command says. Raises TooMany; a second time it closes the session."""
        wanted: dict[str, Sequence[Any]] = {"jobs": command.jobs, "sets": command.sets, "rooms": command.rooms}
        asked = {name: items for name, items in wanted.items() if items}
        if not asked:
            raise InvalidRequest("Name jobs, sets or rooms to subscribe to.")
        if sum(len(held) for held in (*self.parts.values(), *asked.values())) > MOST_SUBSCRIPTIONS:
            detail = f"A connection has {MOST_SUBSCRIPTIONS} subscriptions at most; open another, or follow a set."
            if self._refused:
                self.close(SUBSCRIPTION_LIMIT, detail)
            self._refused = True
            raise TooMany(detail)
        self.subscribed = True
        openings = {name: await self.part(name).subscribe(items) for name, items in asked.items()}
        self.put("ack", {name: list(opening.names) for name, opening in openings.items()}, id=command.id)
        for opening in openings.values():
            for d in opening.refused:
                self.put("error", d, id=command.id)
        for opening in openings.values():
            await opening.send()
