"""The WebSocket half of the client: following a job without losing anything."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from headway.client.errors import ApiError, ConnectionFailed, NotFound, Unauthenticated, Unavailable
from headway.states import TERMINAL

if TYPE_CHECKING:
    from headway.client.http import Client

# A socket that says nothing for so long is checked over HTTP: the last frame may be the one that was lost.
QUIET = 15.0
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
PATIENCE = 300.0
LARGEST_FRAME = 16 << 20
RESTART, UNAUTHORISED, NO_SUCH_JOB = 1012, 4501, 4506

Json = dict[str, Any]

log = logging.getLogger("headway.client")


class _Lost(Exception):
    """The socket cannot be had or cannot be trusted; `pause` is the longest wait before the next."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class _Position:
    """How much of a job has been yielded."""

    def __init__(self) -> None:
        self.epoch: Any = None
        self.seq = -1

    def advance(self, epoch: Any, seq: int) -> bool:
        """Move to `seq`; False if that is not ahead."""
        if epoch == self.epoch and seq <= self.seq:
            return False
        self.epoch, self.seq = epoch, seq
        return True


async def follow(client: "Client", job_id: str) -> AsyncGenerator[Json, None]:
    """See Client.follow. While there is no socket the job is read over HTTP and yielded as a snapshot."""
    loop = asyncio.get_running_loop()
    position = _Position()
    heard: float | None = None
    failures = 0
    while True:
        try:
            async with aclosing(_live(client, job_id, position)) as live:
                async for envelope in live:
                    heard, failures = loop.time(), 0
                    yield envelope
                    if _ended(envelope):
                        return
        except _Lost as lost:
            reason, pause = str(lost), lost.pause or min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))
        try:
            job = await client.get(job_id)
        except (ConnectionFailed, Unavailable):
            if heard is None or loop.time() - heard > PATIENCE:
                raise
        else:
            heard = loop.time()
            if position.advance(job["epoch"], job["seq"]):
                yield _snapshot(job)
            if job["state"] in TERMINAL:
                return
        # Where sockets never get through, one warning is enough.
        log.log(logging.DEBUG if failures else logging.WARNING, "The live connection broke (%s); trying again.", reason)
        failures += 1
        await asyncio.sleep(random.uniform(0, pause))  # noqa: S311


async def _live(client: "Client", job_id: str, position: _Position) -> AsyncGenerator[Json, None]:
    """The envelopes of one socket that are ahead of `position`. Ends only by _Lost or ApiError."""
    url = f"ws{client.url.removeprefix('http')}/ws/jobs/{quote(job_id, safe='')}"
    seq: int | None = None
    try:
        async with connect(
            url, additional_headers=client.headers, max_size=LARGEST_FRAME, compression=None, close_timeout=1
        ) as socket:
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        frame = await socket.recv()
                except TimeoutError:
                    await _check(client, job_id, position)
                    continue
                for envelope in _read(frame):
                    if envelope["t"] != "snapshot":
                        if seq is None or envelope["epoch"] != position.epoch:
                            raise _Lost("there was no snapshot")
                        if envelope["seq"] <= seq:
                            continue
                        if envelope["prev"] != seq:
                            raise _Lost("a frame is missing")
                    seq = envelope["seq"]
                    if position.advance(envelope["epoch"], envelope["seq"]):
                        yield envelope
    except ConnectionClosed as error:
        raise _closed(error) from None
    except (OSError, WebSocketException) as error:
        raise _Lost(str(error) or type(error).__name__) from None


async def _check(client: "Client", job_id: str, position: _Position) -> None:
    """Raises _Lost if the job has moved on without us."""
    try:
        job = await client.get(job_id)
    except (ConnectionFailed, Unavailable) as error:
        raise _Lost(str(error)) from None
    if (job["epoch"], job["seq"]) != (position.epoch, position.seq):
        raise _Lost("a frame is missing")


def _read(frame: str | bytes) -> list[Json]:
    """The envelopes of a frame that count: `bye` and the like carry no seq."""
    try:
        read = json.loads(frame)
        envelopes = [item for item in (read if isinstance(read, list) else [read]) if "seq" in item]
        if all({"t", "epoch", "prev", "d"} <= item.keys() and isinstance(item["seq"], int) for item in envelopes):
            return envelopes
    except (ValueError, TypeError, AttributeError):
        pass
    raise _Lost("a frame is not an envelope")


def _closed(error: ConnectionClosed) -> Exception:
    """4500 and up are final; everything else is worth another try."""
    if error.rcvd is None:
        return _Lost("it ended without a goodbye")
    code, reason = error.rcvd.code, error.rcvd.reason
    if code == UNAUTHORISED:
        return Unauthenticated(reason or "The API key is not valid.", status=401)
    if code == NO_SUCH_JOB:
        return NotFound(reason or "There is no such job.", status=404)
    if 4500 <= code < 4600:
        return ApiError(reason or f"The server closed the live connection with code {code}.", status=code)
    return _Lost(f"code {code}", LONGEST_PAUSE if code == RESTART else None)


def _snapshot(job: Json) -> Json:
    return {"t": "snapshot", "job": job["id"], "epoch": job["epoch"], "prev": None, "seq": job["seq"], "d": job}


def _ended(envelope: Json) -> bool:
    return envelope["t"] in ("snapshot", "state") and envelope["d"]["state"] in TERMINAL
