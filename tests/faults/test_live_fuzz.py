"""Frames that are none, and commands that are none: each gets its close code, and the service goes on."""

import asyncio
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import until
from tests.engine import Engine
from tests.faults.bare_sockets import BareSocket
from tests.faults.conftest import Spawner, WorkerProcess

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
FIN, RESERVED = 0x80, 0x40
MOST_FRAME = 16 << 10
MOST_MEMORY = 48 << 20

# What a client may be closed with for what it sends, in the protocol of frames and in that of jobs.
CODES = {1000, 1002, 1003, 1007, 1009, 4013, 4500, 4505}

pytestmark = pytest.mark.timeout(120)


class Target:
    """A web service in a process of its own, and how to reach it."""

    def __init__(self, web: WorkerProcess, port: int, key: str) -> None:
        self.web = web
        self._port = port
        self._key = key

    def connect(self, path: str = "/ws/v1") -> BareSocket:
        client = BareSocket(self._port, path, self._key)
        assert client.head().startswith(b"HTTP/1.1 101 ")
        return client

    def memory(self) -> int:
        return int(Path(f"/proc/{self.web.process.pid}/statm").read_text().split()[1]) * 4096

    async def check(self) -> None:
        """It serves, has let everyone go, and has nothing to complain of."""
        await asyncio.to_thread(self._serves)
        await until(self._deserted, 15)
        assert self.web.process.returncode is None
        log = self.web.log.read_text()
        assert "Traceback" not in log and '"error"' not in log and "[error" not in log, log[-3000:]

    def _serves(self) -> None:
        client = self.connect()
        client.send(TEXT, json.dumps({"t": "pong", "id": "still there?"}).encode())
        texts = client.texts()
        assert json.loads(next(texts))["t"] == "welcome"
        assert json.loads(next(texts)) == {"t": "ack", "id": "still there?", "d": {}}
        client.close()

    async def _deserted(self) -> bool:
        return await self.web.counted("headway_ws_connections") == 0


@pytest.fixture
async def target(engine: Engine, spawn: Spawner) -> Target:
    web, http = await spawn.web()
    return Target(web, urlsplit(str(http.base_url)).port or 0, engine.tenant.api_key)


# Frames that libraries do not send


def _send_parts(client: BareSocket, parts: list[bytes], opcode: int) -> None:
    """A message in parts, of which all but the first have this opcode."""
    for place, part in enumerate(parts):
        client.send(opcode if place else TEXT, part, first=FIN if place == len(parts) - 1 else 0)


def _flood(client: BareSocket) -> None:
    # The server may hang up before all are sent.
    with suppress(ConnectionError):
        for number in range(10_000):
            client.send(TEXT, b'{"t":"pong","id":%d}' % number)


def _subscribe_to_too_much(client: BareSocket) -> None:
    """Twice: the first time there is only an error."""
    wanted = {"t": "subscribe", "id": 1, "jobs": [{"job": str(uuid4())} for _ in range(257)]}
    for _ in range(2):
        client.send(TEXT, json.dumps(wanted).encode())


def _half_a_character_and_goodbye(client: BareSocket) -> None:
    """At once: the server has taken the goodbye before it looks at the text."""
    client.socket.sendall(client.frame(TEXT, b"\xe2\x82") + client.frame(CLOSE, struct.pack("!H", 1000)))


WRONG: dict[str, tuple[Callable[[BareSocket], None], int]] = {
    "no mask": (lambda client: client.send(TEXT, b"{}", masked=False), 1002),
    "a reserved bit": (lambda client: client.send(TEXT, b"{}", first=FIN | RESERVED), 1002),
    "an opcode that there is not": (lambda client: client.send(3, b"{}"), 1002),
    "a control opcode that there is not": (lambda client: client.send(11, b""), 1002),
    "a ping in parts": (lambda client: client.send(PING, b"", first=0), 1002),
    "a ping that is too long": (lambda client: client.send(PING, b"x" * 126), 1002),
    "a continuation of nothing": (lambda client: client.send(CONTINUATION, b"{}"), 1002),
    "a message within a message": (lambda client: _send_parts(client, [b"{", b"}"], TEXT), 1002),
    "a close code of one byte": (lambda client: client.send(CLOSE, b"x"), 1002),
    "a close code that there is not": (lambda client: client.send(CLOSE, struct.pack("!H", 99)), 1002),
    "half a character": (lambda client: client.send(TEXT, b"\xe2\x82"), 1007),
    "half a character, and goodbye": (_half_a_character_and_goodbye, 1000),
    "a surrogate": (lambda client: client.send(TEXT, b'"\xed\xa0\x80"'), 1007),
    "more than a frame may hold": (lambda client: client.send(TEXT, b" " * (MOST_FRAME + 1)), 1009),
    "the promise of 16 MiB": (lambda client: client.send(TEXT, b"", length=16 << 20), 1009),
    "the promise of exabytes": (lambda client: client.send(TEXT, b"", length=(1 << 63) - 1), 1009),
    "too much in parts": (
        lambda client: _send_parts(client, [b" " * 4096] * 5, CONTINUATION),
        1009,
    ),
    "bytes": (lambda client: client.send(BINARY, b"{}"), 4500),
    "no JSON": (lambda client: client.send(TEXT, b"subscribe!"), 4500),
    "nothing": (lambda client: client.send(TEXT, b""), 4500),
    "an array": (lambda client: client.send(TEXT, b'[{"t":"pong","id":1}]'), 4500),
    "no id": (lambda client: client.send(TEXT, b'{"t":"pong"}'), 4500),
    "JSON ten thousand deep": (lambda client: client.send(TEXT, b"[" * 10_000), 4500),
    "a number beyond all": (lambda client: client.send(TEXT, b'{"t":"pong","id":1e400}'), 4500),
    "twice the same field": (lambda client: client.send(TEXT, b'{"t":"pong","id":1,"id":2}'), 4500),
    "10,000 commands": (_flood, 4013),
    "257 subscriptions, twice": (_subscribe_to_too_much, 4505),
}


async def test_what_is_wrong_gets_its_code(target: Target) -> None:
    def attack() -> dict[str, int | None]:
        codes = {}
        for what, (send, _) in WRONG.items():
            client = target.connect()
            send(client)
            codes[what] = client.code()
            client.close()
        return codes

    assert await asyncio.to_thread(attack) == {what: code for what, (_, code) in WRONG.items()}
    await target.check()


async def test_pings_that_nobody_waits_for_are_not_kept(target: Target) -> None:
    before = target.memory()

    def attack() -> None:
        client = target.connect()
        client.socket.settimeout(5)
        pings = b"".join(b"\x89\xfd\0\0\0\0" + b"x" * 125 for _ in range(500))
        with suppress(OSError):
            for _ in range(2000):
                client.socket.sendall(pings)
        client.close()

    await asyncio.to_thread(attack)
    assert target.memory() - before < MOST_MEMORY
    await target.check()


# Anything at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
job_items = st.fixed_dictionaries(
    {"job": st.uuids().map(str) | json_values}, optional={"since": json_values, "epoch": json_values}
)
set_items = st.fixed_dictionaries(
    {"set": st.text(max_size=70) | json_values},
    optional={"since": st.text(max_size=60), "tag": json_values, "kind": json_values},
)
room_items = st.fixed_dictionaries({"room": st.text(max_size=70) | json_values}, optional={"since": json_values})
commands = st.fixed_dictionaries(
    {
        "t": st.sampled_from(["subscribe", "unsubscribe", "publish", "refresh", "pong", "welcome", ""]),
        "id": st.integers() | st.text(max_size=70),
    },
    optional={
        "jobs": st.lists(job_items, max_size=4) | st.lists(st.uuids().map(str), max_size=4) | json_values,
        "sets": st.lists(set_items, max_size=2) | json_values,
        "rooms": st.lists(room_items, max_size=2) | json_values,
        "room": st.text(max_size=70) | json_values,
        "message": st.text(max_size=50) | json_values,
        "key": json_values,
        "more": json_values,
    },
)
payloads = (
    commands.map(lambda value: json.dumps(value).encode())
    | json_values.map(lambda value: json.dumps(value).encode())
    | st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass"))
    | st.binary(max_size=200)
    | st.integers(MOST_FRAME - 2, MOST_FRAME + 2).map(lambda size: b" " * size)
)
right_frames = st.builds(lambda payload: {"opcode": TEXT, "payload": payload}, payloads)
any_frames = st.fixed_dictionaries(
    {"opcode": st.integers(0, 15), "payload": payloads},
    optional={
        "first": st.sampled_from([0, FIN, FIN, FIN | RESERVED, 0x20, 0x10]),
        "masked": st.booleans(),
        "length": st.sampled_from([0, 1, 126, MOST_FRAME, 1 << 16, (1 << 63) - 1]),
    },
)
scripts = st.lists(
    right_frames | right_frames | any_frames | st.binary(min_size=1, max_size=60), min_size=1, max_size=12
)


async def test_whatever_is_sent_the_service_goes_on(target: Target) -> None:
    @settings(max_examples=120, database=None, suppress_health_check=list(HealthCheck))
    @given(scripts, st.sampled_from(["end", "reset", "close"]))
    def attack(script: list[Any], ending: str) -> None:
        client = target.connect()
        code = None
        # The server may hang up at any of them.
        with suppress(ConnectionError):
            for step in script:
                if isinstance(step, bytes):
                    client.socket.sendall(step)
                else:
                    client.send(**step)
            if ending == "close":
                client.send(CLOSE, struct.pack("!H", 1000))
            if ending != "reset":
                client.end()
                code = client.code()
        client.close(reset=ending == "reset")
        assert code is None or code in CODES, f"closed with {code}"

    await target.check()
    before = target.memory()
    await asyncio.to_thread(attack)
    await target.check()
    assert target.memory() - before < MOST_MEMORY
