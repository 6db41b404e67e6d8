"""The client against scripted servers: what no well-behaved one does on demand."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from websockets.asyncio.server import Request, Response, ServerConnection, serve

from headway.client import (
    ApiError,
    Client,
    ClientError,
    ConnectionFailed,
    NotFound,
    Unauthenticated,
    Unavailable,
    live,
    subscription,
)
from headway.client import http as client_http
from headway.client import watch as watching
from tests.conftest import until

ID = "01975e13-0000-7000-8000-000000000000"


def job(seq: int, state: str = "running") -> dict[str, Any]:
    return {"id": ID, "epoch": 1, "seq": seq, "state": state}


def snapshot(seq: int, state: str = "running") -> dict[str, Any]:
    return {"t": "snapshot", "job": ID, "epoch": 1, "prev": None, "seq": seq, "d": job(seq, state)}


def progress(prev: int, seq: int) -> dict[str, Any]:
    return {"t": "progress", "job": ID, "epoch": 1, "prev": prev, "seq": seq, "d": {"done": seq}}


def log(prev: int, seq: int) -> dict[str, Any]:
    return {"t": "log", "job": ID, "epoch": 1, "prev": prev, "seq": seq, "d": {"message": str(seq)}}


def state(prev: int, seq: int, name: str) -> dict[str, Any]:
    return {"t": "state", "job": ID, "epoch": 1, "prev": prev, "seq": seq, "d": {"state": name, "attempt": 1}}


class Script:
    """A server: what it says on each socket, and the answers of `GET /jobs/{id}`, the last one for ever.

    A socket begins with a welcome; a list is a frame of several, a number closes, and "command" waits for the next
    command, which is acknowledged. All but those that close at once begin with that.
    """

    def __init__(self) -> None:
        self.sockets: list[list[Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = [(200, job(0))]
        self.requests: list[str] = []
        self.connected = 0

    async def serve(self, socket: ServerConnection) -> None:
        self.connected += 1
        said = self.sockets.pop(0)
        if not isinstance(said[0], int):
            await socket.send('{"t":"welcome","d":{"hb":0}}')
            said = ["command", *said]
        for frame in said:
            if frame == "command":
                command = json.loads(await socket.recv())
                self.commands.append(command)
                await socket.send(json.dumps({"t": "ack", "id": command["id"], "d": {}}))
            elif frame == "drop":
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
    for module in (live, client_http):
        monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(live, "LONGEST_PAUSE", 0.05)
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


async def test_after_a_hole_the_rest_is_asked_for(script: Script, client: Client) -> None:
    script.sockets = [
        [snapshot(1), progress(1, 2), progress(3, 4), "silence"],
        [log(2, 3), progress(3, 5), state(5, 6, "succeeded")],
    ]
    script.answers = [(200, job(2))]

    assert await seqs(client) == [1, 2, 3, 5, 6]
    assert [command["jobs"] for command in script.commands] == [[{"job": ID}], [{"job": ID, "since": 2, "epoch": 1}]]


async def test_what_was_held_is_void_after_a_resync(script: Script, client: Client) -> None:
    resync = {"t": "resync", "job": ID, "d": {"reason": "epoch"}}
    restored = snapshot(3) | {"epoch": 2}
    script.sockets = [[snapshot(5), "drop"], [resync, restored, "drop"], [state(3, 4, "failed") | {"epoch": 2}]]
    script.answers = [(200, job(5)), (200, job(3) | {"epoch": 2})]

    assert await seqs(client) == [5, 3, 4]
    assert [command["jobs"][0].get("since") for command in script.commands] == [None, 5, 3]


async def test_nothing_comes_twice(script: Script, client: Client) -> None:
    script.sockets = [
        [snapshot(2), progress(2, 3), "drop"],
        [progress(2, 3), [progress(3, 4), state(4, 5, "failed")]],
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
    [(4501, Unauthenticated, 401), (4500, ApiError, 4500), (4504, ApiError, 4504)],
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


async def test_a_heartbeat_shows_that_the_last_frame_was_lost(script: Script, client: Client) -> None:
    hb = {"t": "hb", "d": {"jobs": {ID: 1}}}
    script.sockets = [[snapshot(1), hb, hb | {"d": {"jobs": {ID: 2}}}, "silence"], [state(1, 2, "succeeded")]]
    script.answers = [(200, job(1))]

    assert await seqs(client) == [1, 2]


async def test_a_silent_server_is_left(script: Script, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SLACK", 1.0)
    script.sockets = [[snapshot(1), "silence"], [state(1, 2, "succeeded")]]
    script.answers = [(200, job(1))]

    assert await seqs(client) == [1, 2]


async def test_the_end_may_be_a_goodbye(script: Script, client: Client) -> None:
    script.sockets = [[snapshot(1), {"t": "bye", "job": ID, "d": {"reason": "terminal"}}, "silence"]]

    assert await seqs(client) == [1]


async def test_all_that_is_followed_shares_a_socket(script: Script, client: Client) -> None:
    other = "01975e13-0000-7000-8000-000000000001"
    refused = {"t": "error", "id": 2, "d": {"type": "urn:headway:problem:not-found", "detail": "no", "job": other}}
    script.sockets = [[snapshot(1), "command", refused, state(1, 2, "succeeded")]]

    async with aclosing(client.follow(ID)) as envelopes:
        assert (await anext(envelopes))["seq"] == 1
        with pytest.raises(NotFound, match="no"):
            await anext(client.follow(other))
        assert [envelope["seq"] async for envelope in envelopes] == [2]
    assert script.connected == 1


async def test_one_that_does_not_read_is_left_behind_and_catches_up(
    script: Script, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "MOST_WAITING", 6)
    lines = [log(seq - 1, seq) for seq in range(2, 10)]
    script.sockets = [[snapshot(1), *lines, "command", "command", *lines[5:], state(9, 10, "failed")]]

    async with aclosing(client.follow(ID)) as envelopes:
        assert (await anext(envelopes))["seq"] == 1
        await until(lambda: len(script.commands) == 2)
        assert [envelope["seq"] async for envelope in envelopes] == list(range(2, 11))
    unsubscribe, subscribe = script.commands[1:]
    assert (unsubscribe["t"], unsubscribe["jobs"]) == ("unsubscribe", [ID])
    # The first frame may have been read before the others came.
    assert (subscribe["t"], subscribe["jobs"][0]["since"] in (6, 7)) == ("subscribe", True)


def of_set(name: str, job_id: str, prev: int | None, seq: int, cursor: str) -> dict[str, Any]:
    return state(0, seq, "running") | {"job": job_id, "prev": prev, "set": [name], "cursor": cursor}


async def test_a_set_is_resumed_by_its_cursor(
    script: Script, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watching, "uuid4", lambda: UUID(int=7))
    name, other = UUID(int=7).hex, "01975e13-0000-7000-8000-000000000001"
    script.sockets = [
        [of_set(name, ID, None, 1, "c1"), of_set(name, other, None, 1, "c2"), of_set(name, ID, 1, 2, "c3"), "drop"],
        [{"t": "hb", "d": {"jobs": {}, "rooms": {}, "cursor": "c5"}}, "drop"],
        [of_set(name, other, None, 1, "c5"), of_set(name, other, 1, 2, "c6"), of_set(name, ID, 1, 3, "c7"), "silence"],
        [of_set(name, ID, 2, 3, "c7"), "silence"],
    ]
    seen = []
    async with aclosing(client.watch(tag="a", since="c0")) as envelopes:
        async for envelope in envelopes:
            seen.append((envelope["job"] == ID, envelope["seq"]))
            if len(seen) == 5:
                break
    assert seen == [(True, 1), (False, 1), (True, 2), (False, 2), (True, 3)]
    asked = [command["sets"] for command in script.commands]
    assert asked == [[{"set": name, "tag": "a", "since": since}] for since in ("c0", "c3", "c5")]


async def test_a_room_is_resumed_after_the_last_message(script: Script, client: Client) -> None:
    def said(seq: int, prev: int | None) -> dict[str, Any]:
        return {"t": "message", "room": "ops", "prev": prev, "seq": seq, "d": {"message": str(seq)}}

    here = {"t": "presence", "room": "ops", "d": {"here": ["ada"]}}
    script.sockets = [
        [here, said(3, None), said(4, 3), {"t": "hb", "d": {"rooms": {"ops": 5}}}, "silence"],
        [here, said(5, 4), said(5, 5), said(6, 5), "silence"],
    ]
    seen = []
    async with aclosing(aiter(client.room("ops", since=2))) as frames:
        async for frame in frames:
            seen.append(frame.get("seq", "here"))
            if frame.get("seq") == 6:
                break
    assert seen == ["here", 3, 4, "here", 5, 6]
    assert [command["rooms"][0]["since"] for command in script.commands] == [2, 4]


async def test_a_client_that_is_closed_ends_its_iterators(script: Script, client: Client) -> None:
    script.sockets = [[snapshot(1), "silence"]]
    async with aclosing(client.follow(ID)) as envelopes:
        await anext(envelopes)
        await client.close()
        with pytest.raises(ClientError, match="closed"):
            await anext(envelopes)


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
