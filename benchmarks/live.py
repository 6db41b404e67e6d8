"""The live stream: how soon a commit is a frame, what a delivery costs, and what an idle connection holds.

    python benchmarks/live.py [--sockets 1000] [--idle 5000] [--rounds 3]

One web process as it is served. A process of its own receives, with bare sockets, and only counts. What a delivery
costs is the CPU time of the web process, so that what else the machine does matters little; beside it, in turns,
stock Channels does the same: a consumer a socket and `group_send`, on both of its Redis layers, on the same uvicorn.
"""

import argparse
import asyncio
import multiprocessing
import os
import resource
import secrets
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import uvloop
from channels_redis.core import RedisChannelLayer
from channels_redis.pubsub import RedisPubSubChannelLayer
from uuid_utils.compat import uuid7

from headway import keys
from headway.embedded import Embedded
from headway.events import Events, layer
from headway.job import Claim, Priority
from headway.lifecycle import Lifecycle
from headway.queue import Queue, connect
from headway.store import Store
from headway.submission import NewJob

PORT, PEER_PORT = 18795, 18796
P50_GOAL, P99_GOAL = 3.0, 15.0
DELIVERIES_GOAL, RATIO_GOAL = 20_000, 5.0
SOCKET_GOAL, STREAM_GOAL = 32.0, 12.0
RATE = 500
# Statements that write them at a time.
WRITERS = 5
KIND = "demo.countdown"
# What every event that is counted says, before its number.
MARK = b"delivery "
DIGITS = 7
# How a ping begins, which uvicorn wants an answer to; the text of events is ASCII.
PING = b"\x89\x04"
PAD = "x" * 100
# Connections that are opened first, so that what is made once is not counted.
WARM = 200
FILES = 16_384


class Receiver:
    """A process that holds connections: how much has arrived, and when what had a number did.

    It is ready once each connection has received `first`, after the head of the answer.
    """

    def __init__(self, port: int, heads: Sequence[bytes], *, events: int = 0, first: bytes = b'"snapshot"') -> None:
        context = multiprocessing.get_context("spawn")
        self.count = RawValue("Q", 0)
        self.at = RawArray("d", events)
        self._ready = context.Event()
        self._process = context.Process(
            target=receive, args=(port, heads, first, (self.count, self.at, self._ready)), daemon=True
        )

    async def open(self) -> None:
        self._process.start()
        await asyncio.to_thread(self._ready.wait, 120)
        assert self._ready.is_set(), "the connections were not opened"

    async def arrived(self, count: int) -> None:
        """Wait until so many have been received in all."""
        async with asyncio.timeout(60):
            while self.count.value < count:
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def receive(port: int, heads: Sequence[bytes], first: bytes, told: tuple[Any, Any, Any]) -> None:
    """Open a connection for each head of a request; then count what comes."""
    count, at, ready = told
    poll, connections = select.epoll(), {}

    def take(timeout: float) -> None:
        for descriptor, _ in poll.poll(timeout):
            data = connections[descriptor].recv(1 << 18)
            if not data:
                poll.unregister(descriptor)
                continue
            count.value += data.count(MARK)
            if (place := data.find(PING)) >= 0:
                payload = data[place + len(PING) : place + len(PING) + 4]
                connections[descriptor].sendall(b"\x8a\x84\0\0\0\0" + payload)
            place = data.find(MARK) if len(at) else -1
            while place >= 0:
                at[int(data[place + len(MARK) : place + len(MARK) + DIGITS])] = time.monotonic()
                place = data.find(MARK, place + 1)

    for begin in range(0, len(heads), 50):
        batch = []
        for head in heads[begin : begin + 50]:
            one = socket.create_connection(("127.0.0.1", port))
            one.sendall(head)
            batch.append(one)
        for one in batch:
            answer = one.recv(1 << 16)
            assert answer.startswith((b"HTTP/1.1 101", b"HTTP/1.1 200")), "the connection was refused"
            while first not in answer:
                answer += one.recv(1 << 16)
            one.setblocking(False)
            connections[one.fileno()] = one
            poll.register(one, select.EPOLLIN)
        take(0)
    ready.set()
    while True:
        take(60)


class Writer:
    """Writes events of jobs as a worker does."""

    def __init__(self, store: Store, lifecycle: Lifecycle, tenant: UUID) -> None:
        self._store = store
        self._tenant = tenant
        self.lifecycle = lifecycle

    async def running(self, count: int) -> list[Claim]:
        """So many jobs that run."""
        jobs = [await self.lifecycle.submit(self._new()) for _ in range(count)]
        ids = [job.id for job, _ in jobs]
        claims = []
        for first in range(0, count, 100):
            claims += await self.lifecycle.claim(ids[first : first + 100], [KIND], "bench")
        assert len(claims) == count
        return claims

    def _new(self) -> NewJob:
        return NewJob(
            kind=KIND,
            input={"seconds": 1},
            timeout=3600,
            max_attempts=1,
            tags=(),
            priority=Priority.NORMAL,
            tenant_id=self._tenant,
        )


def message(number: int) -> str:
    return f"{MARK.decode()}{number:0{DIGITS}} {PAD}"


class Bench:
    """The servers, and web processes on demand."""

    def __init__(self, servers: Embedded, folder: str) -> None:
        self.servers = servers
        self._pepper = secrets.token_hex(32)
        self._key = keys.new()
        self._tenant = uuid7()
        self._environment = os.environ | {
            "HEADWAY_HOME": folder,
            "HEADWAY_DATABASE_URL": servers.postgres_url("headway"),
            "HEADWAY_REDIS_URL": servers.redis_url,
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": self._pepper,
            "HEADWAY_PORT": str(PORT),
            "HEADWAY_OPS_PORT": "0",
            "HEADWAY_LOG_LEVEL": "ERROR",
            "HEADWAY_CONNECTIONS": "100000",
            "HEADWAY_DRAIN": "0",
        }

    async def prepare(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "services.web.manage", "migrate", "--verbosity", "0"],
            env=self._environment,
            check=True,
        )
        connection = await asyncpg.connect(self.servers.postgres_url("headway"))
        await connection.execute("INSERT INTO tenants (id, name) VALUES ($1, 'bench')", self._tenant)
        await connection.execute(
            "INSERT INTO api_keys (id, tenant_id, name, digest) VALUES ($1, $2, 'bench', $3)",
            *(self._key.id, self._tenant, self._key.digest(self._pepper)),
        )
        await connection.close()

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[Writer]:
        store = Store(self.servers.postgres_url("headway"), pool=WRITERS)
        await store.open()
        events, queue = Events(layer(self.servers.redis_url)), Queue(connect(self.servers.redis_url))
        lifecycle = Lifecycle(store, queue, events)
        try:
            yield Writer(store, lifecycle, self._tenant)
        finally:
            await lifecycle.close()
            await queue.close()
            await events.close()
            await store.close()

    @contextmanager
    def web(self) -> Iterator[subprocess.Popen[bytes]]:
        with _serving([sys.executable, "-m", "services.web"], self._environment, PORT) as process:
            yield process

    @contextmanager
    def channels(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """Stock Channels on a layer."""
        command = ["uvicorn", "--app-dir", str(Path(__file__).parent / "peers"), "--port", str(PEER_PORT)]
        command += ["--no-access-log", "--log-level", "error", "--ws-per-message-deflate", "false"]
        environment = self._environment | {"LAYER": name}
        with _serving([sys.executable, "-m", *command, "channels_app:application"], environment, PEER_PORT) as process:
            yield process

    def socket(self, job_id: UUID) -> bytes:
        return _upgrade(f"/ws/jobs/{job_id}", f"Authorization: Bearer {self._key.text}\r\n")

    def stream(self, job_id: UUID) -> bytes:
        return (
            f"GET /api/v1/jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
            f"Authorization: Bearer {self._key.text}\r\n\r\n"
        ).encode()


@contextmanager
def _serving(command: list[str], environment: dict[str, str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None and time.monotonic() < deadline, f"{command} does not serve"
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _upgrade(path: str, more: str = "") -> bytes:
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{more}\r\n"
    ).encode()


def cpu(process: subprocess.Popen[bytes]) -> float:
    """Seconds of CPU time that a process has had."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: subprocess.Popen[bytes]) -> float:
    """KiB that are resident."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1024


async def latency(bench: Bench, count: int, seconds: float) -> list[float]:
    """Milliseconds from commit to frame of 500 events a second, of as many jobs as there are sockets."""
    events = int(RATE * seconds)
    with bench.web():
        async with bench.writer() as writer:
            claims = await writer.running(count)
            receiver = Receiver(PORT, [bench.socket(claim.job_id) for claim in claims], events=events)
            await receiver.open()
            committed = [0.0] * events
            numbers = iter(range(events))
            began = time.monotonic()

            async def write() -> None:
                for number in numbers:
                    await asyncio.sleep(began + number / RATE - time.monotonic())
                    await writer.lifecycle.log(claims[number % count], message(number), "info")
                    committed[number] = time.monotonic()

            await asyncio.gather(*(write() for _ in range(WRITERS)))
            rate = events / (time.monotonic() - began)
            await receiver.arrived(events)
            print(f"{count:,} jobs with a socket each: {rate:,.0f} events/s")
            receiver.close()
    return sorted((arrived - sent) * 1000 for arrived, sent in zip(receiver.at, committed, strict=True))


async def fan_out(bench: Bench, count: int, events: int) -> float:
    """Microseconds of CPU time for each delivery of one job's events to so many sockets."""
    with bench.web() as web:
        async with bench.writer() as writer:
            [claim] = await writer.running(1)
            receiver = Receiver(PORT, [bench.socket(claim.job_id)] * count)
            await receiver.open()

            async def send(number: int) -> None:
                await writer.lifecycle.log(claim, message(number), "info")

            return await _cost(web, receiver, send, count, events)


async def stock(bench: Bench, name: str, count: int, events: int) -> float:
    """The same of Channels with a layer."""
    sort = {"core": RedisChannelLayer, "pubsub": RedisPubSubChannelLayer}[name]
    with bench.channels(name) as web:
        receiver = Receiver(PEER_PORT, [_upgrade("/ws")] * count, first=b"")
        await receiver.open()
        channels = sort(hosts=[bench.servers.redis_url])

        async def send(number: int) -> None:
            frame = {"t": "log", "prev": number, "seq": number + 1, "d": {"level": "info", "message": message(number)}}
            await channels.group_send("job", {"type": "job.event", "frame": frame})

        try:
            return await _cost(web, receiver, send, count, events)
        finally:
            await channels.flush()


async def _cost(web: subprocess.Popen[bytes], receiver: Receiver, send: Any, count: int, events: int) -> float:
    """Send one after the other, each once all have received the one before."""
    for number in range(5):
        await send(number)
        await receiver.arrived((number + 1) * count)
    before = cpu(web)
    for number in range(5, 5 + events):
        await send(number)
        await receiver.arrived((number + 1) * count)
    spent = cpu(web) - before
    receiver.close()
    return spent / (events * count) * 1e6


async def idle(bench: Bench, count: int, *, sockets: bool) -> float:
    """KiB for each of so many connections that follow a job of which nothing happens."""
    with bench.web() as web:
        async with bench.writer() as writer:
            claims = await writer.running(min(count, 1000))
        head = bench.socket if sockets else bench.stream
        warm = Receiver(PORT, [head(claims[number % len(claims)].job_id) for number in range(WARM)])
        await warm.open()
        before = memory(web)
        receiver = Receiver(PORT, [head(claims[number % len(claims)].job_id) for number in range(count)])
        await receiver.open()
        held = (memory(web) - before) / count
        warm.close()
        receiver.close()
    return held


async def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder, Embedded(Path(folder)) as servers:
        servers.create_database("headway")
        bench = Bench(servers, folder)
        await bench.prepare()
        halves: list[tuple[float, float]] = []
        costs: dict[str, list[float]] = {"headway": [], "core": [], "pubsub": []}
        for _ in range(options.rounds):
            times = await latency(bench, options.sockets, options.seconds)
            halves.append((times[len(times) // 2], times[len(times) * 99 // 100]))
            costs["headway"].append(await fan_out(bench, options.sockets, options.events))
            for name in ("core", "pubsub"):
                costs[name].append(await stock(bench, name, options.sockets, options.events))
        of_sockets = [await idle(bench, options.idle, sockets=True)]
        of_streams = [await idle(bench, options.idle, sockets=False)]
    print(f"{options.sockets:,} sockets; CPU time of a delivery, µs: ", end="")
    print(", ".join(f"{name} {statistics.median(values):.0f}" for name, values in costs.items()))
    verdict("commit to frame, p50, ms", [p50 for p50, _ in halves], P50_GOAL)
    verdict("commit to frame, p99, ms", [p99 for _, p99 in halves], P99_GOAL)
    verdict("deliveries/s of a core", [1e6 / cost for cost in costs["headway"]], DELIVERIES_GOAL, least=True)
    for name in ("core", "pubsub"):
        ratios = [theirs / ours for ours, theirs in zip(costs["headway"], costs[name], strict=True)]
        verdict(f"Channels ({name}) / Headway", ratios, RATIO_GOAL, least=True)
    verdict(f"KiB an idle WebSocket of {options.idle:,}", of_sockets, SOCKET_GOAL)
    verdict(f"KiB an idle SSE stream of {options.idle:,}", of_streams, STREAM_GOAL)


def verdict(what: str, values: list[float], goal: float, *, least: bool = False) -> None:
    value = statistics.median(values)
    met = value >= goal if least else value <= goal
    spread = f"({min(values):,.2f} to {max(values):,.2f})" if len(values) > 1 else ""
    print(f"{what:34}{value:10,.2f}   {spread:24} goal {goal:,g}: {'met' if met else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--idle", type=int, default=5000)
    parser.add_argument("--events", type=int, default=50, help="of one job, to all sockets, a round")
    parser.add_argument("--seconds", type=float, default=10.0, help="of 500 events a second, a round")
    parser.add_argument("--rounds", type=int, default=3)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
