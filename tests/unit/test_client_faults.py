"""The client against scripted servers: what no well-behaved one does on demand."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import Request, Response, ServerConnection, serve

from headway.client import ApiError, Client, ClientError, ConnectionFailed, NotFound, Unauthenticated, Unavailable
from headway.client import follow as following
from headway.client import http as client_http

ID = "01975e13-0000-7000-8000-000000000000"


def job(seq: int, state: str = "running") -> dict[str, Any]:
    return {"id": ID, "epoch": 1, "seq": seq, "state": state}


def snapshot(seq: int, state: str = "running") -> dict[str, Any]:
    return {"t": "snapshot", "job": ID, "epoch": 1, "prev": None, "seq": seq, "d": job(seq, state)}


def progress(prev: int, seq: int) -> dict[str, Any]:
    return {"t": "progress", "job": ID, "epoch": 1, "prev": prev, "seq": seq, "d": {"done": seq}}


def state(prev: int, seq: int, name: str) -> dict[str, Any]:
    return {"t": "state", "job": ID, "epoch": 1, "prev": prev, "seq": seq, "d": {"state": name, "attempt": 1}}


class Script:
    """A server: one list of frames for each socket, and the answers of `GET /jobs/{id}`, the last one for ever."""

    def __init__(self) -> None:
        self.sockets: list[list[Any]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = [(200, job(0))]
        self.requests: list[str] = []
        self.connected = 0

    async def serve(self, socket: ServerConnection) -> None:
        self.connected += 1
        for frame in self.sockets.pop(0):
            if frame == "drop":
                socket.transport.abort()
            elif frame == "silence":
                await socket.wait_closed()
            elif isinstance(frame, int):
                await socket.close(frame, "because")
            else:
                await socket.send(frame if isinstance(frame, str) else json.dumps(frame))

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path.startswith("/ws/"):
            if request.headers["Authorization"] != "Bearer hw_live_key":
                return connection.respond(HTTPStatus.UNAUTHORIZED, "")
            return None if self.sockets else connection.respond(HTTPStatus.FORBIDDEN, "")
        self.requests.append(request.path)
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        response = connection.respond(HTTPStatus(status), json.dumps(body))
        if status == 503:
            response.headers["Retry-After"] = "0"
        return response


@pytest.fixture
async def script(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Script]:
    for module in (following, client_http):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(following, "LONGEST_PAUSE", 0.05)
    yield Script()


@pytest.fixture
async def client(script: Script) -> AsyncIterator[Client]:
    async with serve(script.serve, "127.0.0.1", 0, process_request=script.answer) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}", "hw_live_key") as client:
            yield client


@asynccontextmanager
async def answering(status: int, body: bytes, *headers: bytes, length: int | None = None) -> AsyncIterator[str]:
    """A server that says the same to everyone; yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        declared = b"Content-Length: %d" % (len(body) if length is None else length)
        head = b"HTTP/1.1 %d X" % status, b"Connection: close", declared, *headers
        writer.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def seqs(client: Client) -> list[int]:
    return [envelope["seq"] async for envelope in client.follow(ID)]


async def test_a_hole_is_closed_by_a_new_snapshot(script: Script, client: Client) -> None:
    script.sockets = [[snapshot(1), progress(1, 2), progress(3, 4), "silence"], [snapshot(5), state(5, 6, "succeeded")]]
    script.answers = [(200, job(4))]

    assert await seqs(client) == [1, 2, 4, 5, 6]


async def test_nothing_comes_twice(script: Script, client: Client) -> None:
    script.sockets = [
        [snapshot(2), progress(1, 2), progress(2, 3), "drop"],
        [snapshot(3), [progress(3, 4), state(4, 5, "failed")]],
    ]
    script.answers = [(200, job(3))]

    assert await seqs(client) == [2, 3, 4, 5]


async def test_folded_progress_is_no_hole(script: Script, client: Client) -> None:
    script.sockets = [[snapshot(2), progress(2, 9), state(9, 20, "cancelled")]]

    assert await seqs(client) == [2, 9, 20]
    assert script.requests == []


@pytest.mark.parametrize("code", [1012, 1013, 4000, 4008, 4010])
async def test_a_transient_close_is_followed_by_another_socket(script: Script, client: Client, code: int) -> None:
    script.sockets = [[snapshot(1), code], [snapshot(2), state(2, 3, "succeeded")]]

    assert await seqs(client) == [1, 2, 3]
    assert script.connected == 2


@pytest.mark.parametrize(
    ("code", "error", "status"),
    [(4501, Unauthenticated, 401), (4506, NotFound, 404), (4500, ApiError, 4500), (4504, ApiError, 4504)],
)
async def test_a_final_close_is_raised(
    script: Script, client: Client, code: int, error: type[ApiError], status: int
) -> None:
    script.sockets = [[code]]

    with pytest.raises(error, match="because") as raised:
        await seqs(client)
    assert raised.value.status == status


async def test_where_no_socket_gets_through_the_job_is_polled(script: Script, client: Client) -> None:
    script.answers = [(200, job(1)), (200, job(1)), (200, job(2)), (200, job(7, "succeeded"))]

    assert [envelope["d"]["state"] async for envelope in client.follow(ID)] == ["running", "running", "succeeded"]


async def test_a_lost_last_frame_is_found(script: Script, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "QUIET", 0.05)
    script.sockets = [[snapshot(1), "silence"]]
    script.answers = [(200, job(1)), (200, job(2, "succeeded"))]

    assert await seqs(client) == [1, 2]


@pytest.mark.parametrize("frame", ["", "not JSON", "7", '{"seq": 1}', '{"t":"state","seq":"1","epoch":1}'])
async def test_a_frame_that_cannot_be_read_counts_as_lost(script: Script, client: Client, frame: str) -> None:
    script.sockets = [[snapshot(1), frame, "silence"], [snapshot(2), state(2, 3, "succeeded")]]

    assert await seqs(client) == [1, 2, 3]


async def test_a_server_that_never_answered_is_not_waited_for(client: Client, script: Script) -> None:
    async with Client("http://127.0.0.1:1", "hw_live_key") as nobody:
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
            await seqs(nobody)


async def test_reads_are_repeated_while_the_server_is_unavailable(script: Script, client: Client) -> None:
    script.answers = [(503, {"detail": "later"}), (503, {"detail": "later"}), (200, job(1))]

    assert (await client.get(ID))["seq"] == 1

    script.answers = [(503, {"detail": "Come back later."})]
    with pytest.raises(Unavailable, match=r"Come back later\."):
        await client.get(ID)
    assert len(script.requests) == 3 + client_http.TRIES


async def test_a_submit_is_repeated_with_one_key(script: Script) -> None:
    received: list[bytes] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()

    async with (
        await asyncio.start_server(hang_up, "127.0.0.1", 0) as server,
        Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "hw_live_key") as client,
    ):
        with pytest.raises(ConnectionFailed):
            await client.submit("demo.countdown", {})
        assert len(received) == client_http.TRIES
        keys = [re.search(rb"(?i)idempotency-key: (\S+)", head) for head in received]
        assert all(keys) and len({key[1] for key in keys if key}) == 1


@pytest.mark.parametrize(
    ("status", "body", "detail"),
    [
        (502, b"<html>Bad gateway", "answered 502"),
        (200, b"<html>Welcome", "does not answer as Headway does"),
        (404, b'{"detail": 5}', "5"),
        (409, b"[]", "answered 409"),
    ],
)
async def test_answers_that_are_not_of_headway_become_sentences(status: int, body: bytes, detail: str) -> None:
    async with answering(status, body) as url, Client(url, "hw_live_key") as client:
        with pytest.raises((ApiError, ConnectionFailed), match=detail):
            await client.cancel(ID)


@pytest.mark.parametrize(("headers", "length"), [([b'ETag: "%s"' % (b"0" * 64)], 5), ([], 9)])
async def test_a_download_that_is_damaged_or_cut_off_leaves_the_file_as_it_was(
    tmp_path: Path, headers: list[bytes], length: int
) -> None:
    kept = tmp_path / "out.csv"
    kept.write_text("before")

    async with answering(200, b"after", *headers, length=length) as url, Client(url, "hw_live_key") as client:
        with pytest.raises(ClientError):
            await client.download(ID, "out.csv", kept)

    assert kept.read_text() == "before"
    assert list(tmp_path.iterdir()) == [kept]
