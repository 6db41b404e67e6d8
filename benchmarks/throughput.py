"""Headway beside arq, SAQ, taskiq, streaq and Dramatiq, one worker process each, on one Redis.

    python benchmarks/throughput.py [--quick] [--rounds 3] [--only NAME ...]

Measured are jobs that do nothing, sent beforehand, on 100 slots, in jobs a second from the first begin to the last end;
200 jobs of 50 ms on 10 slots, of which 200 a second is the ideal; and the time from a submit to the begin of the job on
an idle worker. Headway runs as it is served: each job is committed to Postgres three times, at submit, claim and end,
fsync on, and it ends when that is committed. The others keep no record, and Redis here keeps nothing on disk. The
systems take turns; every round gives a ratio. Each of the others has a virtual environment of its own, made on first
use in `.headway-bench/`, from `benchmarks/peers/NAME.txt`.
Goals: 4 times the jobs a second of the best of the others, 90 % of the ideal, pickup p50 5 ms and p99 20 ms.
"""

import argparse
import math
import os
import secrets
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis

from headway.embedded import Embedded

PEERS = ("arq", "saq", "taskiq", "streaq", "dramatiq")
FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parent / ".headway-bench"
MANY_SLOTS, FEW_SLOTS = 100, 10
SLEEPS = 200
IDEAL = 200.0
RATE_GOAL, SLOTS_GOAL, P50_GOAL, P99_GOAL = 4.0, 0.9, 5.0, 20.0
# A worker that has not begun by then does not work.
BEGIN_WITHIN = 30.0


@dataclass(frozen=True)
class System:
    """A queue: its name, the Python that has it, and what its programs find in the environment."""

    name: str
    python: str
    environment: dict[str, str]
    record: Path
    # Whether all that ran is written; the others have nothing to write.
    settled: Callable[[], bool] = lambda: True

    def run(self, slots: int, *arguments: str) -> str:
        """What its program prints."""
        return subprocess.run(self._command(*arguments), **self._options(slots), stdout=-1, check=True).stdout

    @contextmanager
    def worker(self, slots: int) -> Iterator[None]:
        with (self.record.parent / f"{self.name}.log").open("w") as log:
            options = self._options(slots) | {"stdout": log, "stderr": log}
            process = subprocess.Popen(self._command("work"), **options, start_new_session=True)
            try:
                yield
            finally:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(5)

    def ended(self, count: int, within: float) -> float:
        """Jobs a second once `count` have ended, or once `within` seconds have passed since the first began."""
        deadline = time.time() + BEGIN_WITHIN
        while not (jobs := self._records()) and time.time() < deadline:
            time.sleep(0.01)
        if not jobs:
            sys.exit(f"{self.name} runs nothing:\n{(self.record.parent / f'{self.name}.log').read_text()}")
        began = jobs[0][0]
        while len(jobs) < count and time.time() < began + within:
            time.sleep(0.02)
            jobs = self._records()
        last = max(end for _, end in jobs)
        if len(jobs) == count and not self.settled():
            while not self.settled():
                time.sleep(0.005)
            last = time.time()
        return len(jobs) / (last - began)

    def _records(self) -> list[tuple[float, float]]:
        return sorted(struct.iter_unpack("dd", self.record.read_bytes()))

    def _command(self, *arguments: str) -> list[str]:
        return [self.python, str(FOLDER / "peers" / f"{self.name}_app.py"), *arguments]

    def _options(self, slots: int) -> dict[str, object]:
        more = {"BENCH_SLOTS": str(slots), "HEADWAY_SLOTS": str(slots), "BENCH_RECORD": str(self.record)}
        return {"env": self.environment | more, "text": True}


def python_of(peer: str) -> str:
    """The Python of a peer's environment, which is made if it is not there."""
    home, wanted = ENVIRONMENTS / peer, (FOLDER / "peers" / f"{peer}.txt").read_text()
    done = home / "installed.txt"
    python = home / "bin" / "python"
    if not done.exists() or done.read_text() != wanted:
        print(f"Installing {peer} ...", flush=True)
        venv.create(home, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", FOLDER / "peers" / f"{peer}.txt"], check=True, stderr=subprocess.DEVNULL)
        done.write_text(wanted)
    return str(python)


@contextmanager
def systems(names: list[str]) -> Iterator[tuple[list[System], Callable[[], None]]]:
    """Headway and the others, and what empties all that they keep."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Embedded(Path(folder) / "postgres", redis=False) as database,
        Embedded(Path(folder) / "redis", postgres=False, durable=False) as carrier,
    ):
        database.create_database("headway")
        url, record = database.postgres_url("headway"), Path(folder) / "record"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")}
        plain |= {"BENCH_REDIS": carrier.redis_url, "PYTHONWARNINGS": "ignore"}
        ours = plain | {
            "HEADWAY_HOME": folder,
            "HEADWAY_DATABASE_URL": url,
            "HEADWAY_REDIS_URL": carrier.redis_url,
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": secrets.token_hex(32),
            "HEADWAY_KINDS": "headway_app",
            "HEADWAY_OPS_PORT": "0",
            "HEADWAY_LOG_LEVEL": "WARNING",
            "PYTHONPATH": str(FOLDER / "peers"),
        }
        migrate = [sys.executable, "-m", "services.web.manage", "migrate", "--verbosity", "0"]
        subprocess.run(migrate, env=ours, check=True)
        with psycopg.connect(url, autocommit=True) as connection, redis.Redis.from_url(carrier.redis_url) as client:
            connection.execute(
                "INSERT INTO tenants (id, name) VALUES ('00000000-0000-0000-0000-000000000001', 'bench')"
            )

            def settled() -> bool:
                return not connection.execute("SELECT FROM jobs WHERE finished_at IS NULL LIMIT 1").fetchall()

            def empty() -> None:
                client.flushall()
                connection.execute("TRUNCATE jobs, events, failures, artifacts")
                record.write_bytes(b"")

            headway = System("headway", sys.executable, ours, record, settled)
            yield [headway, *(System(name, python_of(name), plain, record) for name in names)], empty


Figures = dict[str, list[float]]


def measure(options: argparse.Namespace) -> tuple[Figures, Figures, Figures]:
    """Per system: jobs a second, jobs of 50 ms a second, milliseconds of a pickup."""
    rates: Figures = defaultdict(list)
    sleeps: Figures = defaultdict(list)
    pickups: Figures = defaultdict(list)
    with systems(options.only) as (contenders, empty):
        for number in range(options.rounds):
            for system in contenders:
                empty()
                system.run(MANY_SLOTS, "fill", "noop", str(options.jobs))
                with system.worker(MANY_SLOTS):
                    rates[system.name].append(system.ended(options.jobs, options.seconds))
                empty()
                with system.worker(FEW_SLOTS):
                    count = 10 * options.pickups if system.name == "headway" else options.pickups
                    printed = system.run(FEW_SLOTS, "pickup", str(count)).split()
                    pickups[system.name] += [float(seconds) * 1000 for seconds in printed]
                    system.record.write_bytes(b"")
                    system.run(FEW_SLOTS, "fill", "sleep", str(SLEEPS))
                    sleeps[system.name].append(system.ended(SLEEPS, 60))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return rates, sleeps, pickups


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def show(rates: Figures, sleeps: Figures, pickups: Figures) -> None:
    print(f"{'':10}{'no-op jobs/s':>14}{'50 ms jobs/s':>14}{'pickup p50':>14}{'p99':>11}")
    for name, values in rates.items():
        print(
            f"{name:10}{statistics.median(values):>14,.0f}{statistics.median(sleeps[name]):>14,.1f}"
            f"{statistics.median(pickups[name]):>11,.1f} ms{p99(pickups[name]):>8,.1f} ms"
        )
    others = [values for name, values in rates.items() if name != "headway"]
    ratios = [ours / max(theirs) for ours, *theirs in zip(rates["headway"], *others, strict=True)] if others else []
    shares = [rate / IDEAL for rate in sleeps["headway"]]
    ours = pickups["headway"]
    if ratios:
        verdict("no-op jobs/s / the best of the others", ratios, RATE_GOAL, least=True)
    verdict("50 ms jobs/s / the ideal", shares, SLOTS_GOAL, least=True)
    verdict("pickup p50, ms", [statistics.median(ours)], P50_GOAL, least=False)
    verdict("pickup p99, ms", [p99(ours)], P99_GOAL, least=False)


def verdict(what: str, values: list[float], goal: float, *, least: bool) -> None:
    value = statistics.median(values)
    met = value >= goal if least else value <= goal
    spread = f"   ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    print(f"{what:40}{value:7.2f}{spread}   goal {goal:g}: {'met' if met else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=3000, help="no-op jobs a round")
    parser.add_argument("--seconds", type=float, default=4, help="most seconds for the no-op jobs of one system")
    parser.add_argument(
        "--pickups", type=int, default=10, help="submits to an idle worker a round; Headway gets ten times as many"
    )
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS), help="the others to compare with")
    parser.add_argument("--quick", action="store_true", help="one small round, to see that all works")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.jobs, options.seconds, options.pickups = 1, 500, 2, 3
    show(*measure(options))


if __name__ == "__main__":
    main()
