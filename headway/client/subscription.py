"""What is followed, where it stands, and what came of it that was not read yet."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

from headway.client.errors import ClientError
from headway.states import TERMINAL

# Past so many frames that nobody reads, the rest is left with the server until the reader has caught up.
MOST_WAITING = 1000

Json = dict[str, Any]
# `jobs`, `sets` or `rooms`, and the name within.
Key = tuple[str, str]


class Lost(Exception):
    """The socket cannot be had or cannot be trusted; `pause` is the longest wait before the next."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class Broken:
    """Stands among the frames where the connection broke. `heard` is when the server was heard last, -inf for never."""

    def __init__(self, reason: str, heard: float) -> None:
        self.reason = reason
        self.heard = heard


class Subscription:
    """One thing that is followed. Subclasses know its position, and how what comes after that is asked for."""

    section: ClassVar[str]

    def __init__(self, name: str) -> None:
        self.key: Key = (self.section, name)
        # Whether what comes is for us: it is not between the subscribe and its ack.
        self.open = False
        self.behind = False
        self.changed: Callable[[], None] = lambda: None
        self._waiting: deque[Json | Broken | ClientError] = deque()
        self._arrived = asyncio.Event()
        # By job or room: the seq that came last.
        self._held: dict[str, int] = {}

    def request(self) -> Json:
        """The item of a subscribe that brings what comes after the position."""
        raise NotImplementedError

    def accept(self, frame: Json) -> bool:
        """Move the position to a frame; False if the reader is not to see it."""
        raise NotImplementedError

    def mark(self, marks: Json) -> None:
        """Compare with a heartbeat's marks. Raises Lost if there is more than has come."""
        raise NotImplementedError

    def begin(self) -> None:
        """The server has answered the subscribe."""
        self.open = True
        self._held.clear()

    def offer(self, frame: Json) -> None:
        """Keep a frame for the reader. Raises Lost if one before it is missing."""
        if not self.open or self.behind:
            return
        if "prev" in frame:
            name, prev = frame["job"] if "job" in frame else frame["room"], frame["prev"]
            if prev is not None and self._held.get(name, prev) != prev:
                raise Lost("a frame is missing")
            self._held[name] = frame["seq"]
            if ended(frame):
                del self._held[name]
        if self.accept(frame):
            self._put(frame)
            if len(self._waiting) >= MOST_WAITING:
                self.behind = True
                self.changed()

    def broke(self, broken: Broken) -> None:
        """The connection broke; the reader is told once."""
        if self._waiting and isinstance(self._waiting[-1], Broken):
            self._waiting.pop()
        self._put(broken)

    def refuse(self, error: ClientError) -> None:
        """Nothing more will come; the reader gets the reason, after what came before."""
        self._put(error)

    async def next(self) -> Json | Broken:
        """What came next. Raises what the server refused it with."""
        while not self._waiting:
            if self.behind:
                self.behind = False
                self.changed()
            self._arrived.clear()
            await self._arrived.wait()
        item = self._waiting.popleft()
        if isinstance(item, ClientError):
            raise item
        return item

    def _put(self, item: Json | Broken | ClientError) -> None:
        self._waiting.append(item)
        self._arrived.set()


def ended(frame: Json) -> bool:
    """Whether it is the last of its job."""
    return frame["t"] in ("snapshot", "state") and frame["d"]["state"] in TERMINAL
