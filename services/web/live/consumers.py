"""`/ws/jobs/{id}`: a job's snapshot, then its events as they happen, then `bye`."""

import asyncio
import json
from typing import Any
from uuid import UUID

import structlog
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import URLRouter
from django.urls import path

from headway import events, metrics
from headway.errors import Unauthenticated
from headway.job import Job
from headway.store import OUTAGES
from services.web.api.auth import Principal, bearer
from services.web.app import App
from services.web.live.hub import Follower

# A follower that heard nothing this long looks at Postgres: nothing that was lost stays lost.
QUIET = 2.0
MOST_EVENTS = 1000
# Seconds that a frame may wait for a client that does not read.
PATIENCE = 10.0

UNAUTHORISED = 4501
NO_SUCH_JOB = 4506
TRY_AGAIN = 1013

log = structlog.get_logger(__name__)


class ClientLeft(Exception):
    """The client has gone, or does not read what it is sent."""


class JobConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket that follows one job."""

    channel_layer_alias = None

    async def dispatch(self, message: dict[str, Any]) -> None:
        """As Channels does, without its visit to a thread to close ORM connections: there are none here."""
        await getattr(self, message["type"].replace(".", "_"))(message)

    async def connect(self) -> None:
        await self.accept()
        metrics.ws_connections.inc()
        self._task = asyncio.create_task(self._serve())

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Nothing is expected from the client here; what it sends is ignored."""

    async def disconnect(self, code: int) -> None:
        metrics.ws_connections.dec()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _serve(self) -> None:
        app: App = self.scope["headway"]
        job_id: UUID = self.scope["url_route"]["kwargs"]["job_id"]
        with structlog.contextvars.bound_contextvars(job_id=str(job_id)):
            try:
                principal = await app.keyring.authenticate(_token(self.scope["headers"]))
                async with app.hub.follow(job_id) as follower:
                    await Following(app, principal, job_id, follower, self).run()
            except Unauthenticated as error:
                await self.close(UNAUTHORISED, str(error)[:120])
            except ClientLeft:
                # Not closed: the close frame would wait in line. The server drops a peer that answers no ping.
                pass
            except OUTAGES as error:
                log.warning("a socket was closed: the database is not available", error=repr(error))
                await self.close(TRY_AGAIN, "The database cannot be reached; connect again in a moment.")
            except Exception:
                metrics.errors_caught.labels("socket").inc()
                log.exception("a socket failed")
                await self.close(1011, "Something broke here; connect again.")


class Following:
    """What one socket has been sent of a job, and what comes next."""

    def __init__(self, app: App, principal: Principal, job_id: UUID, follower: Follower, socket: JobConsumer) -> None:
        self._app = app
        self._tenant_id = principal.tenant_id
        self._job_id = job_id
        self._follower = follower
        self._socket = socket
        self._epoch = 0
        self._seq: int | None = None

    async def run(self) -> None:
        """Send until the job has ended, then close."""
        job = await self._read()
        if job is None:
            await self._socket.close(NO_SUCH_JOB, f"There is no job {self._job_id}.")
            return
        await self._snapshot(job)
        ended = job.state.terminal
        while not ended:
            event = await self._follower.next(QUIET)
            if event is None or self._follower.behind or event["epoch"] != self._epoch:
                ended = await self._catch_up()
            elif event["seq"] > self._seq_held + 1:
                ended = await self._fill(event["seq"]) or await self._forward(event)
            elif event["seq"] > self._seq_held:
                ended = await self._forward(event)
        await self._send("bye", f'{{"t":"bye","job":"{self._job_id}","d":{{"reason":"terminal"}}}}')
        await self._socket.close(1000)

    @property
    def _seq_held(self) -> int:
        return self._seq or 0

    async def _read(self) -> Job | None:
        return await self._app.store.get(self._job_id, self._tenant_id)

    async def _snapshot(self, job: Job) -> None:
        self._epoch = job.epoch
        await self._envelope("snapshot", job.seq, json.dumps(job.as_json(), separators=(",", ":")))

    async def _catch_up(self) -> bool:
        """Compare with Postgres; True if the job has ended. Live events may have been lost, or the count begun anew."""
        self._follower.behind = False
        await self._app.hub.ensure(self._job_id)
        job = await self._read()
        if job is None:
            return True
        if job.epoch != self._epoch:
            await self._snapshot(job)
            return job.state.terminal
        if job.seq > self._seq_held:
            if await self._fill(job.seq + 1):
                return True
            if job.seq > self._seq_held and job.progress is not None:
                await self._envelope("progress", job.seq, json.dumps(job.progress, separators=(",", ":")))
        return False

    async def _fill(self, before: int) -> bool:
        """Send the durable events that are missing up to `before`; True if one of them ended the job.

        What else is missing there is progress that a later one has overtaken.
        """
        while True:
            missed = await self._app.store.events(
                self._job_id, self._tenant_id, after=self._seq_held, limit=MOST_EVENTS
            )
            for event in missed:
                if event.seq < before and await self._forward(events.message(event)):
                    return True
            if len(missed) < MOST_EVENTS or missed[-1].seq >= before:
                return False

    async def _forward(self, event: dict[str, Any]) -> bool:
        await self._envelope(event["t"], event["seq"], event["d"])
        return bool(event["terminal"])

    async def _envelope(self, kind: str, seq: int, data: str) -> None:
        prev = "null" if self._seq is None or kind == "snapshot" else self._seq
        frame = f'{{"t":"{kind}","job":"{self._job_id}","epoch":{self._epoch},"prev":{prev},"seq":{seq},"d":{data}}}'
        self._seq = seq
        await self._send(kind, frame)

    async def _send(self, kind: str, frame: str) -> None:
        metrics.ws_frames.labels(kind).inc()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._socket.send(text_data=frame)
        except TimeoutError:
            log.warning("a client does not read; nothing more is sent to it")
            raise ClientLeft from None
        except OSError as error:
            log.debug("a client has gone", error=repr(error))
            raise ClientLeft from None


def _token(headers: list[tuple[bytes, bytes]]) -> str:
    return next((bearer(value.decode("latin1")) for name, value in headers if name.lower() == b"authorization"), "")


async def _no_such_path(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 4500})


websockets = URLRouter(
    [
        path("ws/jobs/<uuid:job_id>", JobConsumer.as_asgi()),
        path("<path:rest>", _no_such_path),  # type: ignore[arg-type]  # Channels routes to ASGI applications
    ]
)
