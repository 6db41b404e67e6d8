"""`python -m tests.faults.chaos --seconds 600 --seed 1`: jobs and faults for a while, then what the checker says.

Everything runs in a home folder of its own on loopback ports. The exit code is 1 if anything was violated; then the
folder, with the history and the logs, is kept.
"""

import argparse
import asyncio
import hashlib
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import asyncpg
from click import echo

from headway.store import prepare
from tests.faults import checker
from tests.faults.chaos_clients import Clients
from tests.faults.chaos_stack import Options, Stack
from tests.faults.faults import Faults
from tests.faults.history import History, Recorder, merge

SAY_EVERY = 5.0
# Longer than it takes to notice three times that a worker has died.
NOTHING_ENDS_FOR = 90.0

OPEN = "SELECT count(*) FROM jobs WHERE state IN ('scheduled', 'queued', 'running')"
JOBS = "SELECT to_jsonb(jobs) - 'input' AS row FROM jobs ORDER BY id"
EVENTS = "SELECT job_id, seq, type, data FROM events ORDER BY job_id, seq"
ARTIFACTS = "SELECT job_id, name, size, sha256, key FROM artifacts ORDER BY job_id, name"


@dataclass(frozen=True)
class Report:
    """What a run came to."""

    jobs: int
    states: Counter[str]
    faults: Counter[str]
    outcomes: Counter[str]
    violations: list[str]

    def __str__(self) -> str:
        def told(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"

        return "\n".join(
            [
                f"{self.jobs} jobs: {told(self.states)}",
                f"{self.faults.total()} faults: {told(self.faults)}",
                f"clients: {told(self.outcomes)}",
                f"{len(self.violations)} violations",
                *self.violations[:50],
            ]
        )


async def run(options: Options, home: Path) -> Report:
    """Everything, from the start of the servers to the check."""
    history = home / "history"
    history.mkdir(parents=True)
    recorder = Recorder(history, "chaos")
    stack = Stack(options, home, recorder)
    clients = Clients(stack, Random(f"clients {options.seed}"))
    async with stack.open(), clients.open():
        faults = Faults(stack, clients.submit, Random(f"faults {options.seed}"))
        began = time.monotonic()
        tasks = [asyncio.create_task(each) for each in (clients.run(), faults.run(), _say(began, clients, faults))]
        done, _ = await asyncio.wait(tasks, timeout=options.seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            task.cancel()
        for task in done:
            task.result()
        await faults.end()
        await stack.heal()
        await clients.end()
        echo(f"{time.monotonic() - began:.0f} s: faults have stopped; waiting for the queue to drain")
        await drained(stack)
        await _read_all(stack, recorder)
    recorder.close()
    found = History.of(merge(history))
    states = Counter(str(job["state"]) for job in found.jobs)
    return Report(len(found.jobs), states, faults.injected, clients.outcomes, checker.check(found))


async def _say(began: float, clients: Clients, faults: Faults) -> None:
    while True:
        await asyncio.sleep(SAY_EVERY)
        counts = ", ".join(f"{name} {count}" for name, count in faults.injected.most_common())
        echo(
            f"{time.monotonic() - began:.0f} s: {clients.outcomes['submit ok']} jobs accepted, "
            f"{faults.injected.total()} faults ({counts})",
        )


async def drained(stack: Stack) -> None:
    """Wait until no job is open, or none has ended for a while: the checker names those that are open."""
    connection = await asyncpg.connect(stack.database_url)
    fewest, since = await connection.fetchval(OPEN), time.monotonic()
    while fewest and time.monotonic() < since + NOTHING_ENDS_FOR:
        await asyncio.sleep(0.2)
        if (count := await connection.fetchval(OPEN)) < fewest:
            fewest, since = count, time.monotonic()
    await connection.close()


async def _read_all(stack: Stack, recorder: Recorder) -> None:
    """The final read."""
    connection = await asyncpg.connect(stack.database_url)
    await prepare(connection)
    for record in await connection.fetch(JOBS):
        recorder.write("job", **record["row"])
    for record in await connection.fetch(EVENTS):
        recorder.write("event", job=record["job_id"], seq=record["seq"], kind=record["type"], data=record["data"])
    for record in await connection.fetch(ARTIFACTS):
        path = stack.home / "files" / record["key"]
        stored = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
        recorder.write("artifact", job=record["job_id"], sha256=record["sha256"], stored=stored)
    await connection.close()


def main() -> int:
    arguments = _arguments()
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    echo(f"seed {options.seed}")
    home = arguments.home or Path(tempfile.mkdtemp(prefix="headway-chaos-"))
    try:
        report = asyncio.run(until_told(run(options, home)))
    except asyncio.CancelledError:
        echo("stopped before the end")
        failed, wanted = True, False
    else:
        echo(str(report))
        failed = wanted = bool(report.violations)
    if wanted or arguments.home:
        echo(f"the history and the logs are in {home}; seed {options.seed}")
    else:
        shutil.rmtree(home)
    return int(failed)


async def until_told(work: Coroutine[object, object, Any]) -> Any:
    """`work`, which Ctrl-C and SIGTERM cancel, so that it stops what it has started."""
    task = asyncio.create_task(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32))
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--webs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=60, help="submits a second")
    parser.add_argument("--fault-every", type=float, default=2.2, help="seconds, on average")
    parser.add_argument("--lease", type=float, help="seconds, more than 2; the workers' own if left out")
    parser.add_argument("--unfenced", action="store_true", help="workers whose writes are not fenced")
    parser.add_argument("--faults", nargs="*", default=(), help="only these")
    parser.add_argument("--home", type=Path, help="an empty folder to work in, which is kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
