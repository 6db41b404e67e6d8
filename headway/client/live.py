"""The socket that a client's subscriptions share. It is made again whenever it breaks, and each of them resumed."""

import asyncio
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from headway.client.errors import BY_STATUS, ApiError, ClientError, ConnectionFailed, Unauthenticated
from headway.client.subscription import Broken, Key, Lost, Subscription

if TYPE_CHECKING:
    from headway.client.http import Client

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
LARGEST_FRAME = 16 << 20
MOST_SUBSCRIPTIONS = 256
# The server takes 20 commands a second, and frames of 16 KiB.
PACE = 0.1
AT_ONCE = 100
WELCOME = 10.0
# Seconds that a heartbeat may be late, beyond a whole one.
SLACK = 5.0
RESTART, UNAUTHORISED = 1012, 4501
# What the refusal of a single subscription would be over HTTP.
STATUS = {"not-found": 404, "forbidden": 403, "unavailable": 503, "too-many": 4505}

Json = dict[str, Any]

log = logging.getLogger("headway.client")


class Live:
    """A client's sockets: one, unless there are more subscriptions than fit on it or two of the same."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._lines: list[Line] = []

    @asynccontextmanager
    async def subscribed(self, subscription: Subscription) -> AsyncIterator[None]:
        """Frames are kept for a subscription from here on, whatever breaks."""
        line = next((line for line in self._lines if line.has_room_for(subscription)), None)
        if line is None:
            line = Line(self._client)
            self._lines.append(line)
        line.add(subscription)
        try:
            yield
        finally:
            line.remove(subscription)
            if line.empty:
                self._lines.remove(line)
                await line.close()

    async def close(self) -> None:
        """Whoever still reads is told that nothing more comes."""
        for line in self._lines:
            line.refuse(ClientError("The client is closed."))
            await line.close()


class Line:
    """One socket after the other, as long as there are subscriptions."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._subscriptions: dict[Key, Subscription] = {}
        # What the server was asked for on this socket. Commands make it what the subscriptions want.
        self._asked: dict[Key, Subscription] = {}
        self._unanswered: dict[int, Sequence[Subscription]] = {}
        self._commands = 0
        self._changed = asyncio.Event()
        self._heard = -math.inf
        self._task: asyncio.Task[None] | None = None

    @property
    def empty(self) -> bool:
        return not self._subscriptions

    def has_room_for(self, subscription: Subscription) -> bool:
        """A line that was refused takes no more."""
        ended = self._task is not None and self._task.done()
        return (
            not ended and len(self._subscriptions) < MOST_SUBSCRIPTIONS and subscription.key not in self._subscriptions
        )

    def add(self, subscription: Subscription) -> None:
        self._subscriptions[subscription.key] = subscription
        subscription.changed = self._changed.set
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._last())

    def remove(self, subscription: Subscription) -> None:
        del self._subscriptions[subscription.key]
        self._changed.set()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _last(self) -> None:
        """Connect again and again, until the server says that there is no use in it."""
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while True:
                began = loop.time()
                try:
                    await self._connected()
                except Lost as lost:
                    reason, pause = str(lost), lost.pause
                if loop.time() - began > LONGEST_PAUSE:
                    failures = 0
                # Where sockets never get through, none would help.
                log.log(
                    logging.DEBUG if failures or self._heard < 0 else logging.WARNING,
                    "The live connection broke (%s); trying again.",
                    reason,
                )
                for subscription in self._subscriptions.values():
                    subscription.broke(Broken(reason, self._heard))
                pause = pause or min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(0, pause))  # noqa: S311
                failures += 1
        except ClientError as error:
            self.refuse(error)
        except Exception as error:
            log.exception("The live connection failed.")
            self.refuse(ConnectionFailed(f"The live connection failed: {error!r}."))

    def refuse(self, error: ClientError) -> None:
        for subscription in self._subscriptions.values():
            subscription.refuse(error)

    async def _connected(self) -> None:
        """One socket. Ends only by Lost or ApiError."""
        try:
            async with connect(
                f"ws{self._client.url.removeprefix('http')}/ws/v1",
                additional_headers=self._client.headers,
                subprotocols=["jobs.v1"],  # type: ignore[list-item]
                max_size=LARGEST_FRAME,
                compression=None,
                close_timeout=1,
            ) as socket:
                silence = await self._welcome(socket)
                commanding = asyncio.create_task(self._command(socket))
                try:
                    while True:
                        self._take_all(await _read(socket, silence))
                finally:
                    commanding.cancel()
                    with suppress(asyncio.CancelledError, ConnectionClosed):
                        await commanding
        except ConnectionClosed as error:
            raise _closed(error) from None
        except (OSError, WebSocketException) as error:
            raise Lost(str(error) or type(error).__name__) from None
        finally:
            for subscription in self._asked.values():
                subscription.open = False
            self._asked.clear()
            self._unanswered.clear()

    async def _welcome(self, socket: ClientConnection) -> float:
        """The seconds of silence after which a socket counts as dead."""
        try:
            (welcome,) = await _read(socket, WELCOME)
            return 2 * float(welcome["d"]["hb"]) + SLACK
        except (ValueError, KeyError, TypeError):
            raise Lost("there was no welcome") from None

    async def _command(self, socket: ClientConnection) -> None:
        """Tell the server whatever changes in what is wanted. Ends with the socket."""
        while True:
            command = self._change()
            if command is None:
                self._changed.clear()
                await self._changed.wait()
                continue
            await socket.send(json.dumps(command))
            await asyncio.sleep(PACE)

    def _change(self) -> Json | None:
        """The next command that brings the server nearer to what is wanted; None if it is there."""
        wanted = {key: one for key, one in self._subscriptions.items() if not one.behind}
        gone = [one for key, one in self._asked.items() if wanted.get(key) is not one][:AT_ONCE]
        new = [one for key, one in wanted.items() if key not in self._asked][:AT_ONCE]
        if not (gone or new):
            return None
        self._commands += 1
        items: defaultdict[str, list[Any]] = defaultdict(list)
        for one in gone:
            del self._asked[one.key]
            one.open = False
            items[one.section].append(one.key[1])
        if gone:
            return {"t": "unsubscribe", "id": self._commands, **items}
        for one in new:
            self._asked[one.key] = one
            items[one.section].append(one.request())
        self._unanswered[self._commands] = new
        return {"t": "subscribe", "id": self._commands, **items}

    def _take_all(self, frames: Sequence[Json]) -> None:
        self._heard = asyncio.get_running_loop().time()
        for frame in frames:
            try:
                self._take(frame)
            except (KeyError, TypeError, AttributeError, ValueError):
                raise Lost("a frame is not of the protocol") from None

    def _take(self, frame: Json) -> None:
        kind, data = frame["t"], frame["d"]
        if kind == "ack":
            for one in self._unanswered.pop(frame["id"], ()):
                one.begin()
        elif kind == "hb":
            for one in self._asked.values():
                one.mark(data)
        elif kind == "error":
            error = _refusal(data)
            named = [self._asked[key] for key in _keys(data) if key in self._asked]
            for one in named or self._unanswered.pop(frame["id"], ()):
                one.refuse(error)
        else:
            for key in _keys(frame):
                if subscription := self._asked.get(key):
                    subscription.offer(frame)
                    if kind == "bye":
                        del self._asked[key]


def _keys(frame: Json) -> list[Key]:
    """The subscriptions that a frame is for."""
    if "set" in frame:
        names = frame["set"]
        return [("sets", name) for name in ([names] if isinstance(names, str) else names)]
    return [(f"{word}s", frame[word]) for word in ("job", "room") if word in frame]


async def _read(socket: ClientConnection, wait: float) -> list[Json]:
    """What comes next. Raises Lost after `wait` seconds without anything."""
    try:
        async with asyncio.timeout(wait):
            read = json.loads(await socket.recv())
    except TimeoutError:
        raise Lost("the server is silent") from None
    except ValueError:
        raise Lost("a frame is not of the protocol") from None
    return read if isinstance(read, list) else [read]


def _refusal(data: Json) -> ApiError:
    slug = data["type"].rpartition(":")[2]
    status = STATUS.get(slug, 422)
    return BY_STATUS.get(status, ApiError)(data["detail"], status=status, type=data["type"])


def _closed(error: ConnectionClosed) -> Exception:
    """4500 and up are final; everything else is worth another try."""
    if error.rcvd is None:
        return Lost("it ended without a goodbye")
    code, reason = error.rcvd.code, error.rcvd.reason
    if code == UNAUTHORISED:
        return Unauthenticated(reason or "The API key is not valid.", status=401)
    if 4500 <= code < 4600:
        return ApiError(reason or f"The server closed the live connection with code {code}.", status=code)
    return Lost(f"code {code}", LONGEST_PAUSE if code == RESTART else None)
