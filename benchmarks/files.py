"""Large files: what an upload and a download of 2 GiB cost the web process.

    python benchmarks/files.py [--gib 2]

Starts PostgreSQL, Redis and the web service of its own. A file is sent by `POST /files`, then another in one PATCH by
tus while the first is downloaded, through plain sockets, so that the clients take little of the machine. While that
goes on the web process measures how late its event loop runs each tick of 5 ms, and its memory is read from outside.
Before that the same is measured of an idle loop. On a machine that others use a tick is late when the process gets no
processor, so it is also told how long the loop's thread computed at most between two ticks: what it holds up by itself.

Goals: memory grows by at most 64 MiB, no tick is later than 20 ms.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

GROWTH_GOAL = 64.0
LAG_GOAL = 20.0
TICK = 0.005
MIB = 1 << 20
TUS = {"Tus-Resumable": "1.0.0", "Content-Type": "application/offset+octet-stream"}


async def measure_lag(late: list[float], busy: list[float]) -> None:
    """Note in milliseconds how late each tick is, and how long the loop's thread has computed since the one before."""
    loop = asyncio.get_running_loop()
    while True:
        due, began = loop.time() + TICK, time.thread_time()
        await asyncio.sleep(TICK)
        late.append((loop.time() - due) * 1000)
        busy.append((time.thread_time() - began) * 1000)


def serve() -> None:
    """The web service; at each SIGUSR1 it prints the lags since the one before, as JSON."""
    import uvloop

    from headway import logs, settings
    from services.web.__main__ import serve as serve_web

    async def main() -> None:
        late: list[float] = []
        busy: list[float] = []

        def tell() -> None:
            late.sort()
            at = [late[min(len(late) - 1, int(len(late) * part))] for part in (0.5, 0.99, 1)] if late else [0, 0, 0]
            print(json.dumps([len(late), *at, max(busy, default=0)]), flush=True)
            late.clear()
            busy.clear()

        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
        measuring = asyncio.create_task(measure_lag(late, busy))
        await serve_web(config)
        measuring.cancel()

    config = settings.load()
    logs.configure(config, "web")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


class Web:
    """The web process, from outside."""

    def __init__(self, process: Any, port: int, api_key: str) -> None:
        self._process = process
        self._port = port
        self._headers = {"Authorization": f"Bearer {api_key}"}

    def lags(self) -> tuple[int, float, float, float, float]:
        """Since the call before: how many ticks, how late they were (p50, p99, at most), the most that one computed."""
        self._process.send_signal(signal.SIGUSR1)
        while not (line := self._process.stdout.readline()).startswith("["):
            assert line, "the web process has ended"
        return tuple(json.loads(line))  # type: ignore[return-value]

    def memory(self, *, peak: bool = False) -> float:
        """MiB that are resident now, or that were at most since the call before."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]) / 1024
        # Writing 5 there sets the peak back to what is in use now.
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        return found

    def ask(self, method: str, path: str, size: int = 0, **headers: str) -> dict[str, str]:
        """Headers of the answer; the body that is sent has `size` bytes."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.putrequest(method, f"/api/v1{path}")
        for name, value in {**self._headers, **headers, "Content-Length": str(size)}.items():
            connection.putheader(name, value)
        connection.endheaders()
        piece = bytes(MIB)
        for _ in range(size // MIB):
            connection.send(piece)
        answer = connection.getresponse()
        assert answer.status < 300, answer.read()
        into, held = bytearray(MIB), 0
        while got := answer.readinto(into):
            held += got
        assert method != "GET" or held == int(answer.headers["Content-Length"])
        return dict(answer.headers)

    def upload(self, size: int) -> str:
        return self.ask("POST", "/files", size)["Location"].removeprefix("/api/v1")

    def resumable(self, size: int) -> str:
        created = self.ask("POST", "/uploads", **TUS, **{"Upload-Length": str(size)})
        path = created["Location"].removeprefix("/api/v1")
        return f"/files/{self.ask('PATCH', path, size, **TUS, **{'Upload-Offset': '0'})['headway-file']}"

    def download(self, path: str) -> None:
        self.ask("GET", f"{path}/content")


@contextmanager
def web(home: Path) -> Iterator[Web]:
    import subprocess

    import psycopg
    from uuid_utils.compat import uuid7

    from headway import keys
    from headway.embedded import Embedded

    with Embedded(home / "servers") as servers, socket.create_server(("127.0.0.1", 0)) as probe:
        servers.create_database("headway")
        port, pepper = probe.getsockname()[1], "a pepper of this benchmark alone, of some length"
        probe.close()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")} | {
            "HEADWAY_HOME": str(home),
            "HEADWAY_PORT": str(port),
            "HEADWAY_OPS_PORT": "0",
            "HEADWAY_DATABASE_URL": servers.postgres_url("headway"),
            "HEADWAY_REDIS_URL": servers.redis_url,
            "HEADWAY_SECRET_KEY": pepper,
            "HEADWAY_KEY_PEPPER": pepper,
            "HEADWAY_LOG_LEVEL": "WARNING",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        migrate = [sys.executable, "-m", "services.web.manage", "migrate", "-v0"]
        subprocess.run(migrate, env=environment, check=True)
        key, tenant = keys.new(), uuid7()
        with psycopg.connect(servers.postgres_url("headway"), autocommit=True) as database:
            database.execute("INSERT INTO tenants (id, name) VALUES (%s, 'files')", [tenant])
            database.execute(
                "INSERT INTO api_keys (id, tenant_id, name, digest) VALUES (%s, %s, 'files', %s)",
                [key.id, tenant, key.digest(pepper)],
            )
        command = [sys.executable, __file__, "--serve"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            while True:
                assert process.poll() is None, "the web process has ended"
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield Web(process, port, key.text)
        finally:
            process.terminate()
            process.wait()


def timed(name: str, web: Web, size: int, *calls: Callable[[], Any]) -> tuple[float, float, list[Any]]:
    """Run these side by side: the growth in memory, the largest lag, and what they returned."""
    returned: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        returned[number] = calls[number]()

    before = web.memory()
    web.lags()
    began = time.perf_counter()
    threads = [threading.Thread(target=run, args=[number]) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    growth = web.memory(peak=True) - before
    ticks, p50, p99, most, busy = web.lags()
    rate = len(calls) * size / MIB / seconds
    print(
        f"{name:<38}{seconds:>7.1f} s {rate:>6.0f} MiB/s   memory +{growth:>5.1f} MiB   "
        f"lag p50 {p50:>4.1f}  p99 {p99:>5.1f}  at most {most:>5.1f} ms of {ticks:,} ticks, {busy:.1f} ms computing",
        flush=True,
    )
    return growth, most, returned


def measure(web: Web, size: int) -> None:
    for path in (web.upload(16 * MIB), web.resumable(16 * MIB)):
        web.download(path)
    timed("idle", web, 0, lambda: time.sleep(5))
    growths, lags = [], []
    growth, lag, [first] = timed("POST /files", web, size, lambda: web.upload(size))
    growths.append(growth)
    lags.append(lag)
    growth, lag, [second, _] = timed(
        "PATCH /uploads, and a download beside", web, size, lambda: web.resumable(size), lambda: web.download(first)
    )
    growths.append(growth)
    lags.append(lag)
    for path in (first, second):
        web.ask("DELETE", path)
    growth, lag = max(growths), max(lags)
    print(f"memory     +{growth:.1f} MiB   goal {GROWTH_GOAL:.0f}: {'met' if growth <= GROWTH_GOAL else 'missed'}")
    print(f"lag     {lag:.1f} ms   goal {LAG_GOAL:.0f}: {'met' if lag <= LAG_GOAL else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2, help="size of each file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if sys.platform != "linux":
        sys.exit("Memory is read from /proc, which only Linux has.")
    with tempfile.TemporaryDirectory() as folder, web(Path(folder)) as process:
        measure(process, int(options.gib * 1024) * MIB)


if __name__ == "__main__":
    main()
