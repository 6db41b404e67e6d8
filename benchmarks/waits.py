"""A thousand requests that wait two seconds each for a job's end, on one web process, and others beside them.

    python benchmarks/waits.py [--waits 1000] [--seconds 2] [--rounds 3]

The web process runs as it is served; there is no worker, so every wait lasts its full time. Half of the waits are
`GET /jobs/{id}?wait=N`, half `POST /jobs` with `Prefer: wait=N`. Beside them one client asks for `GET /kinds` over and
over. In turns with them the same requests are sent without a wait: what they take is the cost of so many requests at
once. Goals: all waits are over within 1.25 times their length and that cost, and the median of the requests beside them
is at most three times what it is on the idle process.
"""

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg
import uvloop
from uuid_utils.compat import uuid7

from headway import keys, kinds
from headway.embedded import Embedded
from headway.store import Store

TIME_GOAL, BESIDE_GOAL = 1.25, 3.0
PORT = 18791
COUNTDOWN = {"kind": "demo.countdown", "input": {"seconds": 1}}


@asynccontextmanager
async def service() -> AsyncIterator[aiohttp.ClientSession]:
    """A web process with a tenant, and a client that has its key."""
    pepper = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as folder, Embedded(Path(folder)) as servers:
        servers.create_database("headway")
        url = servers.postgres_url("headway")
        environment = os.environ | {
            "HEADWAY_HOME": folder,
            "HEADWAY_DATABASE_URL": url,
            "HEADWAY_REDIS_URL": servers.redis_url,
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": pepper,
            "HEADWAY_PORT": str(PORT),
            "HEADWAY_OPS_PORT": "0",
            "HEADWAY_LOG_LEVEL": "WARNING",
        }
        subprocess.run(
            [sys.executable, "-m", "services.web.manage", "migrate", "--verbosity", "0"], env=environment, check=True
        )
        tenant, key = uuid7(), keys.new()
        connection = await asyncpg.connect(url)
        await connection.execute("INSERT INTO tenants (id, name) VALUES ($1, 'bench')", tenant)
        await connection.execute(
            "INSERT INTO api_keys (id, tenant_id, name, digest) VALUES ($1, $2, 'bench', $3)",
            *(key.id, tenant, key.digest(pepper)),
        )
        await connection.close()
        store = Store(url, pool=2)
        await store.open()
        await store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
        await store.close()
        web = subprocess.Popen([sys.executable, "-m", "services.web"], env=environment)
        try:
            async with aiohttp.ClientSession(
                f"http://127.0.0.1:{PORT}",
                headers={"Authorization": f"Bearer {key.text}"},
                connector=aiohttp.TCPConnector(limit=0),
            ) as http:
                await ready(http)
                yield http
        finally:
            web.terminate()
            web.wait()


async def ready(http: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                async with http.get("/api/v1/kinds") as answer:
                    answer.raise_for_status()
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.1)


async def ask(http: aiohttp.ClientSession, count: int, seconds: float, path: str) -> float:
    """Send that many requests at once; how long until all are answered."""

    async def one(number: int) -> None:
        if number % 2:
            async with http.get(path, params={"wait": seconds}) as answer:
                assert answer.status == 200
        else:
            async with http.post("/api/v1/jobs", json=COUNTDOWN, headers={"Prefer": f"wait={seconds:.0f}"}) as answer:
                assert answer.status == 202

    began = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - began


async def beside(http: aiohttp.ClientSession, seconds: float) -> list[float]:
    """Milliseconds of each of the requests that one client makes in this time."""
    times = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        async with http.get("/api/v1/kinds") as answer:
            await answer.read()
        times.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.005)
    return times


async def measure(options: argparse.Namespace) -> None:
    totals, ratios = [], []
    async with service() as http:
        async with http.post("/api/v1/jobs", json=COUNTDOWN) as answer:
            path = answer.headers["Location"]
        for _ in range(options.rounds):
            plain = await ask(http, options.waits, 0, path)
            alone = await beside(http, options.seconds)
            waiting = asyncio.create_task(ask(http, options.waits, options.seconds, path))
            crowded = await beside(http, options.seconds)
            took = await waiting
            totals.append(took / (options.seconds + plain))
            ratios.append(statistics.median(crowded) / statistics.median(alone))
            print(
                f"{options.waits:,} requests take {plain:.2f} s, with waits {took:.2f} s; beside them GET /kinds takes "
                f"{statistics.median(crowded):.2f} ms, on the idle process {statistics.median(alone):.2f} ms"
            )
    verdict("time / (length of a wait + requests)", totals, TIME_GOAL)
    verdict("requests beside the waits / alone", ratios, BESIDE_GOAL)


def verdict(what: str, values: list[float], goal: float) -> None:
    value = statistics.median(values)
    spread = f"({min(values):.2f} to {max(values):.2f})"
    print(f"{what:38}{value:6.2f}   {spread}   goal {goal:g}: {'met' if value <= goal else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waits", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
