"""What is sent to sessions. An event is encoded once for all of them; only `prev` may differ."""

import json
from typing import Any, Protocol

from headway.job import Job


def encode(value: Any) -> str:
    """JSON without spaces. Postgres keeps the keys of an object in an order of its own, so they are sorted."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


class Line(Protocol):
    """One JSON object that is sent. `size` is about its length; `durable` ones wait in line, others may be replaced.

    `mark` is the id by which an SSE stream can be resumed after it.
    """

    @property
    def type(self) -> str: ...
    @property
    def durable(self) -> bool: ...
    @property
    def size(self) -> int: ...
    @property
    def mark(self) -> str | None: ...
    def text(self) -> str:
        """The JSON. Called once, when it is sent."""


class Plain:
    """A line that is the same for everyone it goes to."""

    __slots__ = ("_text", "mark", "type")
    durable = True

    def __init__(self, type: str, text: str, mark: str | None = None) -> None:
        self.type = type
        self.mark = mark
        self._text = text

    @classmethod
    def of(cls, type: str, **fields: Any) -> "Plain":
        """`t` first, then the fields as they stand here."""
        rest = "".join(f',"{name}":{encode(value)}' for name, value in fields.items())
        return cls(type, f'{{"t":"{type}"{rest}}}')

    @classmethod
    def bare(cls, type: str, value: Any) -> "Plain":
        """What a socket without a protocol of its own is sent."""
        return cls(type, encode(value))

    @property
    def size(self) -> int:
        return len(self._text)

    def text(self) -> str:
        return self._text


class News:
    """An event of a job, or a snapshot of it, as all sessions of the process share it. `data` is JSON text."""

    __slots__ = ("_prev", "_text", "data", "epoch", "job", "seq", "terminal", "type")

    def __init__(self, job: str, epoch: int, seq: int, type: str, data: str, *, terminal: bool = False) -> None:
        self.job = job
        self.epoch = epoch
        self.seq = seq
        self.type = type
        self.data = data
        self.terminal = terminal
        self._prev: int | None = -1
        self._text = ""

    @classmethod
    def snapshot(cls, job: Job) -> "News":
        data = encode(job.as_json())
        return cls(str(job.id), job.epoch, job.seq, "snapshot", data, terminal=job.state.terminal)

    @classmethod
    def of(cls, message: dict[str, Any]) -> "News":
        """Of a message of `headway.events`."""
        return cls(
            message["job"], message["epoch"], message["seq"], message["t"], message["d"], terminal=message["terminal"]
        )

    def text(self, prev: int | None) -> str:
        """The envelope for whoever holds `prev`. Those who are asked for one after the other mostly hold the same."""
        if prev != self._prev:
            self._prev = prev
            self._text = (
                f'{{"t":"{self.type}","job":"{self.job}","epoch":{self.epoch},'
                f'"prev":{"null" if prev is None else prev},"seq":{self.seq},"d":{self.data}}}'
            )
        return self._text


def heard(message: dict[str, Any]) -> Any:
    """A message of a topic as its listeners hear it: News of a job, anything else as it came."""
    return News.of(message) if message["type"] == "job.event" else message


class Said:
    """A message of a room as all sessions of the process share it, after that with the seq `prev`. `data` is JSON."""

    __slots__ = ("_bare", "_framed", "data", "prev", "room", "seq")

    def __init__(self, room: str, prev: int | None, seq: int, data: str) -> None:
        self.room = room
        self.prev = prev
        self.seq = seq
        self.data = data
        self._framed: Plain | None = None
        self._bare: Plain | None = None

    @property
    def framed(self) -> Plain:
        """As `jobs.v1` has it."""
        if self._framed is None:
            prev = "null" if self.prev is None else self.prev
            text = f'{{"t":"message","room":"{self.room}","prev":{prev},"seq":{self.seq},"d":{self.data}}}'
            self._framed = Plain("message", text)
        return self._framed

    @property
    def bare(self) -> Plain:
        """As a socket of one room has it: one flat object."""
        if self._bare is None:
            self._bare = Plain("message", f'{self.data[:-1]},"seq":{self.seq},"room":"{self.room}"}}')
        return self._bare


class Change:
    """Who is `here` in a room, or has `joined` or `left` it."""

    __slots__ = ("bare", "framed")

    def __init__(self, room: str, d: dict[str, Any]) -> None:
        self.framed = Plain.of("presence", room=room, d=d)
        self.bare = Plain.bare("presence", d)
