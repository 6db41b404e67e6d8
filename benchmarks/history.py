"""What a million finished jobs cost: pickup, listing and a worker's statements, beside a table that is almost empty.

    python benchmarks/history.py [--jobs 1000000] [--rounds 5]

Two databases on one Postgres: one holds the finished jobs, the other a hundred, so that its pages are as full. Each has
a worker of its own, the real one. A pickup is the time from a job's insert to its claim, both on the database's clock,
one job at a time on an idle worker. The two take turns; every round gives a ratio of medians. Goal: at most 1.2, for
pickup and for each listing.
"""

import argparse
import asyncio
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import psycopg

from headway import queue
from headway.embedded import Embedded
from headway.events import Events, layer
from headway.job import Priority
from headway.lifecycle import FIRST_KEY, Lifecycle
from headway.states import JobState
from headway.store import Store, prepare
from headway.store.groups import GroupStore
from headway.submission import NewJob

GOAL = 1.2
TENANT = UUID(int=1)
KIND = "demo.countdown"
FEW = 100
PAGE = 50
REPEATS = 30

# Finished jobs, the last one just now. One in $2 has failed, one in $2 has a tag, so that both tables have full pages.
HISTORY = """
INSERT INTO jobs (id, tenant_id, kind, state, input, tags, timeout, attempt, token, created_at, started_at,
    finished_at, progress, result, seq)
SELECT uuidv7(make_interval(secs => n - 1 - $3::int)), $1, 'demo.countdown',
    CASE WHEN n % $2 = 0 THEN 'failed' ELSE 'succeeded' END, '{"seconds": 0}',
    CASE WHEN n % $2 = 1 THEN ARRAY['nightly'] ELSE '{}' END, 60, 1, 1, now(), now(), now(), '{"done": 1}',
    '{"seconds": 0}', 3
FROM generate_series(1, $3::int) n
"""


class Side:
    """One of the two databases, and what is measured on it."""

    def __init__(self, url: str, redis_url: str) -> None:
        self.store = Store(url, pool=3)
        self.queue = queue.Queue(queue.connect(redis_url))
        self.events = Events(layer(redis_url))
        self.lifecycle = Lifecycle(self.store, self.queue, self.events)
        self.url = url

    async def open(self, jobs: int, *, rare: int) -> None:
        """Fill the table."""
        await self.store.open()
        self.database = await asyncpg.connect(self.url)
        await prepare(self.database)
        await self.database.execute("INSERT INTO tenants (id, name) VALUES ($1, 'bench')", TENANT)
        await self.database.execute(HISTORY, TENANT, rare, jobs)
        await self.database.execute("VACUUM ANALYZE jobs, job_tags")
        self.middle = await self.database.fetchval(
            "SELECT id FROM jobs ORDER BY id OFFSET $1 LIMIT 1", jobs // 2 + PAGE // 2
        )

    async def close(self) -> None:
        await self.lifecycle.close()
        await self.queue.close()
        await self.events.close()
        await self.store.close()
        await self.database.close()

    async def pickup(self) -> float:
        """Milliseconds, of a job on an idle worker."""
        await asyncio.sleep(random.uniform(0.02, 0.05))
        new = NewJob(TENANT, KIND, {"seconds": 0}, (), Priority.NORMAL, timeout=60, max_attempts=1)
        job, _ = await self.lifecycle.submit(new)
        while not job.state.terminal:
            await asyncio.sleep(0.002)
            found = await self.store.get(job.id, TENANT)
            assert found is not None
            job = found
        assert job.started_at is not None
        return (job.started_at - job.created_at) / timedelta(milliseconds=1)

    def statements(self) -> Mapping[str, Callable[[], Awaitable[Any]]]:
        """What is timed, by name; each listing is a page of 51, as the API asks for."""

        def page(**filters: Any) -> Callable[[], Awaitable[Any]]:
            asked = {"before": None, "state": None, "kind": None, "tag": None, "limit": PAGE + 1} | filters
            return lambda: self.store.list_jobs(TENANT, **asked)

        return {
            "list: newest": page(),
            "list: from the middle": page(before=self.middle),
            "list: of a kind": page(kind=KIND),
            "list: failed": page(state=JobState.FAILED),
            "list: with a tag": page(tag="nightly"),
            "list: running": page(state=JobState.RUNNING),
            "ready": lambda: self.store.ready([KIND], 20, "a worker"),
            "promote": lambda: self.store.promote(500),
            "wake, tally": self.waiting,
            "rescue": lambda: self.lifecycle.rescue(100),
            "keys to unpark": lambda: self.store.keys(FIRST_KEY, 500),
            "count open jobs": self.store.open_jobs,
        }

    async def waiting(self) -> None:
        await GroupStore(self.store).waiting(UUID(int=0), 50)
        await self.store.promote(1000, waiting=True)


async def paired(*runs: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """The medians, in milliseconds, of many runs in turns: what else the machine does then falls on both alike."""
    took: list[list[float]] = [[], []]
    for turn in range(REPEATS):
        for side in (turn % 2, 1 - turn % 2):
            began = time.perf_counter()
            answer = await runs[side]()
            took[side].append(answer if isinstance(answer, float) else (time.perf_counter() - began) * 1000)
    return statistics.median(took[0]), statistics.median(took[1])


@contextmanager
def worker(environment: Mapping[str, str]) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.worker"],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def measure(sides: list[Side], jobs: int, rounds: int) -> None:
    empty, full = sides
    for side, count, rare in ((empty, FEW, 2), (full, jobs, max(2, jobs // 1000))):
        await side.open(count, rare=rare)
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    # The first round is not counted: in it the workers get going, and Postgres gets its plans.
    for number in range(rounds + 1):
        times["pickup"].append(await paired(empty.pickup, full.pickup))
        for name, run in empty.statements().items():
            times[name].append(await paired(run, full.statements()[name]))
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    show({name: pairs[1:] for name, pairs in times.items()}, jobs)
    for side in sides:
        await side.close()


def show(times: Mapping[str, list[tuple[float, float]]], jobs: int) -> None:
    print(f"{'median ms with':24}{FEW:>10,}{jobs:>12,} finished jobs")
    for name, pairs in times.items():
        few, many = (statistics.median(values) for values in zip(*pairs, strict=True))
        ratios = [with_jobs / without for without, with_jobs in pairs]
        ratio = statistics.median(ratios)
        goal = f"   goal {GOAL}: {'met' if ratio <= GOAL else 'missed'}" if name.startswith(("pickup", "list")) else ""
        print(f"{name:24}{few:>10.2f}{many:>12.2f}   ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}){goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Embedded(Path(folder)) as servers:
        sides, environments = [], []
        for number, name in enumerate(("few", "many")):
            servers.create_database(name)
            # A database of its own in Redis too: the two queues are apart.
            redis_url = servers.redis_url.removesuffix("0") + str(number)
            environment = {key: value for key, value in os.environ.items() if not key.startswith("HEADWAY_")}
            environment |= {
                "HEADWAY_HOME": folder,
                "HEADWAY_DATABASE_URL": servers.postgres_url(name),
                "HEADWAY_REDIS_URL": redis_url,
                "HEADWAY_SECRET_KEY": secrets.token_hex(32),
                "HEADWAY_KEY_PEPPER": secrets.token_hex(32),
                "HEADWAY_OPS_PORT": "0",
            }
            migrate = [sys.executable, "-m", "services.web.manage", "migrate", "--verbosity", "0"]
            subprocess.run(migrate, env=environment, check=True)
            with psycopg.connect(servers.postgres_url(name), autocommit=True) as connection:
                # Its runs would fall on the one or the other.
                connection.execute("ALTER TABLE jobs SET (autovacuum_enabled = off)")
            sides.append(Side(servers.postgres_url(name), redis_url))
            environments.append(environment)
        with worker(environments[0]), worker(environments[1]):
            asyncio.run(measure(sides, options.jobs, options.rounds))


if __name__ == "__main__":
    main()
