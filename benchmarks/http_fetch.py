"""`http.fetch` against a bare aiohttp gather with a semaphore: requests a second, same URLs, same local server.

    python benchmarks/http_fetch.py [--urls 10000] [--concurrency 20] [--rounds 5] [--giant 1000000]

The server runs in a process of its own; both run on uvloop, as the worker does, in turns. Every round gives a ratio.
Goal: their median is at least 0.8. Headway reads its URLs from a file of one a line, as the bare gather has them in a
list. `--giant` then fetches so many URLs of a file once, and tells how memory grows from a tenth of them to the end:
goal, by at most 32 MiB.
"""

import argparse
import asyncio
import multiprocessing
import os
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import uvloop
from aiohttp import web

from headway import JobContext
from headway.context import ArtifactWriter
from headway.files import Files
from headway.job import File
from services.worker.kinds.http_fetch import FetchInput, fetch

GOAL = 0.8
GROWTH = 32
BODY = secrets.token_bytes(2048)


def serve(ready: Connection) -> None:
    """Answer every path with 2 KiB until the process is ended; tell the port first."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=BODY)

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    uvloop.run(main())


class Unrecorded(JobContext):
    """A job that nobody follows: the artifact's bytes are counted and dropped, its parts are written to a folder."""

    interruption = None
    checkpoint = None

    def __init__(self, folder: Path, urls: Iterable[str]) -> None:
        self.written = self.saved = 0
        self.file = Lines(folder / "urls.txt", urls)
        self.memory: list[float] = []
        self._files = Files(folder.as_uri(), max_size=1 << 30)

    async def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        if total and done >= total * (len(self.memory) + 1) / 10:
            self.memory.append(resident())

    async def log(self, message: str, *, level: str = "info") -> None: ...

    async def save_checkpoint(self, value: Any) -> None: ...

    async def save_part(self, data: bytes) -> str:
        self.saved += 1
        await self._files.save(key := f"parts/{self.saved}", data)
        return key

    def read_part(self, key: str) -> AsyncIterator[bytes]:
        return self._files.read(key)

    async def open_file(self, file_id: UUID) -> "Lines":
        return self.file

    @asynccontextmanager
    async def artifact(self, name: str, content_type: str = "") -> AsyncIterator[ArtifactWriter]:
        yield self

    async def write(self, data: bytes) -> None:
        self.written += len(data)

    def source(self, name: str, *, reading: bool = False) -> str:
        raise NotImplementedError


class Lines:
    """A file of lines on disk, as one that was uploaded."""

    def __init__(self, path: Path, lines: Iterable[str]) -> None:
        with path.open("w") as out:
            out.writelines(f"{line}\n" for line in lines)
        now = datetime.now(UTC)
        self.file = File(uuid4(), uuid4(), path.name, "text/plain", path.stat().st_size, "", now, None)
        self._path = path

    async def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        with self._path.open("rb") as lines:
            lines.seek(start)
            while chunk := lines.read(size):
                yield chunk


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def headway(urls: list[str], concurrency: int) -> None:
    with TemporaryDirectory() as folder:
        job = Unrecorded(Path(folder), urls)
        result = await fetch(job, asked(job, concurrency))
    assert result.ok == len(urls), result


def asked(job: Unrecorded, concurrency: int) -> FetchInput:
    return FetchInput(file=job.file.file.id, concurrency=concurrency, per_host=min(concurrency, 50))


async def giant(base: str, count: int, concurrency: int) -> None:
    with TemporaryDirectory() as folder:
        job = Unrecorded(Path(folder), (f"{base}/{number}" for number in range(count)))
        result = await fetch(job, asked(job, concurrency))
    assert result.ok == count, result
    growth = job.memory[-1] - job.memory[0]
    print(
        f"giant    {count / result.seconds:8,.0f} requests/s   ({count:,} URLs in {result.seconds:,.0f} s, "
        f"{job.written / (1 << 20):,.0f} MiB of lines)"
    )
    verdict = "met" if growth <= GROWTH else "missed"
    print(
        f"memory   {job.memory[0]:8,.0f} MiB at a tenth, {job.memory[-1]:,.0f} MiB at the end   "
        f"growth {growth:,.0f}, goal {GROWTH}: {verdict}"
    )


async def bare(urls: list[str], concurrency: int) -> None:
    slots = asyncio.Semaphore(concurrency)

    async def one(session: aiohttp.ClientSession, url: str) -> None:
        async with slots, session.get(url) as response:
            assert response.status == 200
            await response.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
        await asyncio.gather(*(one(session, url) for url in urls))


def report(rates: Mapping[str, list[float]]) -> None:
    for name, measured in rates.items():
        print(
            f"{name:8} {statistics.median(measured):8,.0f} requests/s   ({min(measured):,.0f} to {max(measured):,.0f})"
        )
    ratios = [ours / theirs for ours, theirs in zip(rates["headway"], rates["bare"], strict=True)]
    ratio = statistics.median(ratios)
    verdict = "met" if ratio >= GOAL else "missed"
    print(f"ratio    {ratio:8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})   goal {GOAL}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--giant", type=int, default=0, help="so many URLs of a file, once")
    options = parser.parse_args()
    os.environ.update(
        HEADWAY_FETCH_ALLOW="127.0.0.0/8",
        # Settings are read whole; these are not used here.
        HEADWAY_DATABASE_URL="postgresql://127.0.0.1/none",
        HEADWAY_REDIS_URL="redis://127.0.0.1/0",
        HEADWAY_SECRET_KEY=secrets.token_hex(),
        HEADWAY_KEY_PEPPER=secrets.token_hex(),
    )
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    server.start()
    try:
        port = receiver.recv()
        urls = [f"http://127.0.0.1:{port}/{number}" for number in range(options.urls)]
        rates: dict[str, list[float]] = {"headway": [], "bare": []}
        for _ in range(options.rounds):
            for contender in (bare, headway):
                started = time.perf_counter()
                uvloop.run(contender(urls, options.concurrency))
                rates[contender.__name__].append(len(urls) / (time.perf_counter() - started))
        report(rates)
        if options.giant:
            uvloop.run(giant(f"http://127.0.0.1:{port}", options.giant, options.concurrency))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
