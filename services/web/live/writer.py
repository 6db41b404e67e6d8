"""The writer of a session: lines wait here in order, bounded, until they are sent.

A client that keeps up is written to as the loop turns; a task waits for one that does not.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from headway import metrics
from services.web.live.lines import Line

# Lines that may wait for a client, and their bytes. Progress, of which only the newest waits, does not count.
MOST_LINES = 256
MOST_BYTES = 1 << 20
# What is read from Postgres is put in only while less than this waits.
ROOM_LINES = MOST_LINES // 4
ROOM_BYTES = MOST_BYTES // 4
# What is not urgent leaves this often, in one go.
FLUSH_EVERY = 0.05
# Lines and bytes that a frame may hold where a client takes several in one.
FRAME_LINES = 64
FRAME_BYTES = 64 << 10

SLOW = 4008
SLOW_REASON = "You read more slowly than events come; connect again with `since`."

log = structlog.get_logger(__name__)


class Transport(Protocol):
    """Where lines go: a WebSocket, or an SSE stream."""

    # Whether several lines may be sent at once.
    batch: bool

    @property
    def ready(self) -> bool:
        """Whether the client takes what is sent without a wait, so that `send_now` will do."""

    def send_now(self, lines: Sequence[Line]) -> None:
        """Only while `ready`."""

    async def send(self, lines: Sequence[Line]) -> None:
        """Waits while the client does not read. Raises OSError once it has gone."""

    async def close(self, code: int, reason: str) -> None:
        """Say goodbye. Raises OSError once the client has gone."""

    def abort(self) -> None:
        """Drop the connection, whatever still waits to be read."""


class Later:
    """Calls back what may wait, all of it FLUSH_EVERY seconds after the first: one timer for all sessions."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def call(self, back: Callable[[], None]) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_later(FLUSH_EVERY, self._run)
        self._waiting.append(back)

    def _run(self) -> None:
        loop = asyncio.get_running_loop()
        waiting, self._waiting = self._waiting, []
        for back in waiting:
            loop.call_soon(back)


class Writer:
    """Sends lines in the order in which they were put in."""

    __slots__ = (
        "_bytes",
        "_ending",
        "_flushed",
        "_handle",
        "_later",
        "_lines",
        "_room",
        "_slow",
        "_soon",
        "_task",
        "_transport",
        "_waiting",
        "_waits",
        "since",
    )

    def __init__(self, transport: Transport, later: Later) -> None:
        self._transport = transport
        self._later = later
        # No deque: an idle one holds 700 bytes, and this one is short.
        self._waiting: list[Line] = []
        self._lines = 0
        self._bytes = 0
        self._flushed = 0.0
        # What waits is sent in this turn of the loop if there is a handle, or else when `later` calls back.
        self._handle: asyncio.Handle | None = None
        self._waits = False
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Event | None = None
        self._ending: tuple[int, str] | None = None
        self._slow = False
        # Since when the client has not taken what was sent to it; None if it has.
        self.since: float | None = None

    @property
    def ending(self) -> bool:
        """Whether the session is over, or about to be: nothing more is taken."""
        return self._ending is not None

    def put(self, line: Line, *, urgent: bool = True) -> None:
        """Send a line after those that wait: at once, or if it is not urgent, within 50 ms.

        If more waits than may, the session is closed as slow.
        """
        if self._ending is not None:
            return
        self._waiting.append(line)
        if line.durable:
            self._lines += 1
            self._bytes += line.size
            if self._lines > MOST_LINES or self._bytes > MOST_BYTES + line.size:
                self._waiting.clear()
                self.give_up()
                return
        self._schedule(urgent)

    @property
    def free(self) -> bool:
        """Whether so little waits that more may be put in without a thought."""
        return self._lines <= MOST_LINES // 2 and self._bytes <= MOST_BYTES // 2

    async def room(self) -> None:
        """Wait until more may be put in: for whoever has more to say than may wait."""
        while self._ending is None and (self._lines > ROOM_LINES or self._bytes > ROOM_BYTES):
            if self._room is None:
                self._room = asyncio.Event()
            self._room.clear()
            await self._room.wait()

    def end(self, code: int, reason: str = "") -> None:
        """Close the session once what waits is sent."""
        if self._ending is None:
            self._ending = (code, reason)
            self._schedule(True)
            self._make_room()

    def give_up(self) -> None:
        """Close the session, since its client does not keep up."""
        if not self._slow:
            self._slow = True
            metrics.live_slow.inc()
        self.end(SLOW, SLOW_REASON)

    def drop(self) -> None:
        """The client has gone, or is to go at once: send nothing more."""
        self._ending = self._ending or (1006, "")
        self._waiting.clear()
        self._make_room()
        self._unschedule()
        if self._task is not None:
            self._task.cancel()

    async def done(self) -> None:
        """Wait until what waits now is sent."""
        if self._handle is not None:
            self._go()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _schedule(self, urgent: bool) -> None:
        if self._task is not None or self._handle is not None:
            return
        loop = asyncio.get_running_loop()
        if urgent or self._flushed + FLUSH_EVERY <= loop.time():
            self._handle = loop.call_soon(self._go)
        elif not self._waits:
            self._waits = True
            self._later.call(self._called)

    def _unschedule(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _called(self) -> None:
        self._waits = False
        if self._waiting and self._task is None:
            self._go()

    def _go(self) -> None:
        self._unschedule()
        while self._waiting and self._transport.ready:
            lines = self._take()
            self._transport.send_now(lines)
            self._left(lines)
        self._flushed = asyncio.get_running_loop().time()
        if self._waiting or self._ending is not None:
            self._task = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                lines = self._take()
                self.since = loop.time()
                await self._transport.send(lines)
                self.since = None
                self._left(lines)
            if self._ending is not None:
                self.since = loop.time()
                await self._transport.close(*self._ending)
                self.since = None
        except OSError as error:
            log.debug("a client has gone", error=repr(error))
            self._ending = self._ending or (1006, "")
            self._waiting.clear()
            self._make_room()
        finally:
            self._flushed = loop.time()
            self._task = None

    def _take(self) -> Sequence[Line]:
        count, size = 1, self._waiting[0].size
        if self._transport.batch:
            while count < min(len(self._waiting), FRAME_LINES) and size < FRAME_BYTES:
                size += self._waiting[count].size
                count += 1
        lines = self._waiting[:count]
        del self._waiting[:count]
        return lines

    def _left(self, lines: Sequence[Line]) -> None:
        for line in lines:
            if line.durable:
                self._lines -= 1
                self._bytes -= line.size
        if self._room is not None and self._lines <= ROOM_LINES and self._bytes <= ROOM_BYTES:
            self._room.set()

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set()
