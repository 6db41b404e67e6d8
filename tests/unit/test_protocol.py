"""What the web service's protocols say by themselves, as another implementation reads it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from services.web.protocol import Http, WebSocket, frame
from tests.conftest import until


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 1_000_000])
@pytest.mark.parametrize("character", ["a", "ü", "😀"])
def test_a_frame_is_read_as_what_was_said(size: int, character: str) -> None:
    text = (character * size)[: size // len(character.encode())].ljust(size - size % len(character.encode()), "-")
    client = ClientProtocol(parse_uri("ws://localhost/"), max_size=None)
    client.state = OPEN
    client.reader.feed_data(frame(text))
    client.parser = client.parse()
    next(client.parser)
    assert client.events_received() == [Frame(Opcode.TEXT, text.encode())]


@asynccontextmanager
async def served(application: Any) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """An application behind our protocols; the server and its port."""
    server = uvicorn.Server(
        uvicorn.Config(
            application, port=0, lifespan="off", log_config=None, http=Http, ws=WebSocket, timeout_graceful_shutdown=1
        )
    )
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def test_a_socket_that_is_still_opening_when_the_server_stops_is_told_to_come_again() -> None:
    stopped = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        """Accepts nobody before the server stops."""
        server.should_exit = True
        await receive()
        assert (await receive())["type"] == "websocket.disconnect"
        stopped.set()

    async with served(application) as (server, port):
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"ws://127.0.0.1:{port}/", proxy=None)
        assert refused.value.response.status_code == 503
    assert stopped.is_set()


async def test_requests_that_come_before_the_answer_to_another_are_answered_in_turn() -> None:
    asked: list[str] = []
    go = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await go.wait()
        body = scope["path"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": body})

    async with served(application) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % number for number in range(5)))
        await until(lambda: asked == ["/0"])
        go.set()
        for number in range(5):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"/%d" % number
        writer.close()
        await writer.wait_closed()
