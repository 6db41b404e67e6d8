"""Server-sent events: a session whose lines leave as the body of an HTTP answer."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from django.http import HttpResponse
from django.http.response import HttpResponseBase

from headway import metrics
from headway.errors import NotFound
from services.web.api.auth import Principal
from services.web.api.request import ApiRequest
from services.web.live.lines import Line
from services.web.live.session import Opening, Session
from services.web.live.sessions import Sessions

# EventSource connects again after so many milliseconds.
AGAIN = b"retry: 2000\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # Proxies such as nginx are not to collect events before they pass them on.
    "X-Accel-Buffering": "no",
}

Send = Callable[[dict[str, Any]], Awaitable[None]]


class EventStream(HttpResponseBase):
    """An answer that `services.web.handler` serves until the client leaves, or its session ends."""

    streaming = True
    batch = True

    def __init__(self, sessions: Sessions, principal: Principal, scope: Any) -> None:
        super().__init__(status=200, headers=HEADERS)
        self.session = Session(sessions, principal, self)
        self.session.hello = self.session.subscribed = True
        self._sessions = sessions
        self._abort: Callable[[], None] = scope.get("headway.abort", lambda: None)
        self._send: Send | None = None
        self._opening: Opening | None = None

    @classmethod
    async def open(cls, request: ApiRequest, sort: str, item: Any, *, single: bool = False) -> HttpResponseBase:
        """A stream of what `item` names; 204 if the client has all that there will ever be.

        Raises TooMany, or NotFound for what cannot be followed.
        """
        sessions = request.app.sessions
        stream = cls(sessions, request.auth, request.scope)
        stream.session.single = single
        sessions.enter(stream.session)
        try:
            stream._opening = opening = await stream.session.part(sort).subscribe([item])
        finally:
            if stream._opening is None or opening.refused or opening.complete:
                stream.leave()
        if opening.refused:
            raise NotFound(opening.refused[0]["detail"])
        return HttpResponse(status=204) if opening.complete else stream

    def head(self) -> HttpResponse:
        """The answer to HEAD."""
        self.leave()
        return HttpResponse(headers=HEADERS)

    def leave(self) -> None:
        """End the session."""
        self._sessions.leave(self.session)

    async def serve(self, receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
        """Send what the session has to say."""
        assert self._opening is not None
        metrics.sse_streams.inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._head()})
            await send({"type": "http.response.body", "body": AGAIN, "more_body": True})
            self._send = send
            if self.session.writer.ending:
                await self.close(0, "")
            self.session.spawn(self._opening.send())
            self._opening = None
            # Once the answer is complete, the client counts as gone.
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            metrics.sse_streams.dec()
            self.leave()

    def _head(self) -> list[tuple[bytes, bytes]]:
        return [(name.lower().encode("ascii"), value.encode("latin1")) for name, value in self.items()]

    # Transport

    ready = False

    def send_now(self, lines: Sequence[Line]) -> None:
        """An answer is always waited for."""
        raise NotImplementedError

    async def send(self, lines: Sequence[Line]) -> None:
        if self._send is None:
            # The process is told to stop before the answer has begun, which then ends at once.
            return
        await self._send({"type": "http.response.body", "body": b"".join(map(_event, lines)), "more_body": True})

    async def close(self, code: int, reason: str) -> None:  # type: ignore[override]
        """There is no code in HTTP: the client connects again, and is answered then."""
        if self._send is not None:
            await self._send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        self._abort()


def _event(line: Line) -> bytes:
    id = f"id: {line.mark}\n" if line.mark is not None else ""
    if line.type == "hb":
        # An id alone is no event, but is remembered.
        return f"{id}: still here\n\n".encode()
    metrics.sse_events.labels(line.type).inc()
    return f"event: {line.type}\n{id}data: {line.text()}\n\n".encode()
