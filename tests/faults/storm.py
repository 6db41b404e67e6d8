"""`python -m tests.faults.storm --sockets 1000 --reconnects 20 --events 10000 --seed 1`: the live stream under faults.

Clients of two tenants follow jobs, sets and rooms through a front that spreads over two web services, and lose their
connection again and again, while Redis, web services and workers are killed, paused and wiped. Then what each of them
was sent is held against the record. The exit code is 1 if anything was violated; the logs are kept then.
"""

import argparse
import asyncio
import math
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import uvloop
from click import echo

from headway.store import prepare
from tests.conftest import make_tenant
from tests.faults.chaos import EVENTS, drained, until_told
from tests.faults.chaos_stack import Options, Stack
from tests.faults.faults import Faults
from tests.faults.history import Recorder
from tests.faults.live_checker import Checker, Truth
from tests.faults.live_clients import BROKEN, Follower, Scene, Submitted
from tests.faults.live_sockets import JobsFollower, RoomFollower, SetFollower
from tests.faults.live_streams import JobStreamFollower, SetStreamFollower
from tests.faults.proxy import Proxy

KIND = "chaos.talk"
TENANTS = ("chaos", "others")
ROOMS = ("lobby", "attic")
MESSAGES = 10
# Durable events of a job: its log lines, and that it is queued, running and over.
LINES, STATES = 37, 3
# Reconnects a second that a machine of two cores bears, and jobs that run at a time.
PACE = 60.0
AT_ONCE = 40
# Seconds of a job at most. A worker lives for about 80 s, and of jobs that have lost two each runs one at a time.
LONGEST = 15.0
# How long clients may take to get the rest once faults have stopped.
REST = 120.0
SAY_EVERY = 5.0
FILES = 16_384
FAULTS = (
    "kill-redis",
    "flush-redis",
    "pause-redis",
    "kill-web",
    "stop-web",
    "pause-web",
    "kill-worker",
    "stop-worker",
    "end-connections",
    "reset",
)

JOBS = "SELECT jobs.id, tenants.name FROM jobs JOIN tenants ON tenants.id = tenant_id"


@dataclass(frozen=True)
class Plan:
    """How many clients lose their connection how often, within how many seconds, while so many events happen."""

    sockets: int
    reconnects: int
    events: int
    seed: int
    seconds: float
    fault_every: float = 4.0
    faults: tuple[str, ...] = FAULTS

    @property
    def jobs(self) -> int:
        return math.ceil(self.events / (LINES + STATES))

    @property
    def tags(self) -> list[str]:
        """Each is that of ten jobs at least, two of which are the other tenant's."""
        return [f"t{number}" for number in range(max(1, min(10, self.jobs // 10)))]


@dataclass(frozen=True)
class Report:
    """What a run came to."""

    jobs: int
    events: int
    messages: int
    counts: Counter[str]
    faults: Counter[str]
    violations: list[str]

    @property
    def reconnects(self) -> int:
        return sum(count for name, count in self.counts.items() if name.startswith("forced: "))

    def __str__(self) -> str:
        def told(counts: Counter[str]) -> str:
            return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())) or "none"

        return "\n".join(
            [
                f"{self.jobs:,} jobs with {self.events:,} events, {self.messages:,} messages in rooms",
                f"{self.reconnects:,} forced reconnects; {self.faults.total()} faults: {told(self.faults)}",
                f"clients: {told(self.counts)}",
                f"{len(self.violations)} violations",
                *self.violations[:50],
            ]
        )


async def run(plan: Plan, home: Path) -> Report:
    """Everything, from the start of the servers to the check."""
    (home / "history").mkdir(parents=True)
    recorder = Recorder(home / "history", "storm")
    options = Options(plan.seconds, plan.seed, 2, 2, fault_every=plan.fault_every, lease=3, faults=plan.faults)
    stack = Stack(options, home, recorder)
    async with stack.open(), Proxy(*(urlsplit(web.url).port or 0 for web in stack.webs)) as front:
        connection = await asyncpg.connect(stack.database_url)
        await prepare(connection)
        keys = {TENANTS[0]: stack.api_key, TENANTS[1]: (await make_tenant(connection, TENANTS[1])).api_key}
        await connection.close()
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
            scene = Scene(f"http://127.0.0.1:{front.port}", keys, Checker(), http, {tenant: [] for tenant in TENANTS})
            storm = Storm(plan, stack, scene)
            await storm.rage()
            await storm.calm()
            truth = await _truth(stack.database_url, scene)
    recorder.close()
    events = sum(len(events) for events in truth.events.values())
    messages = sum(len(said) for said in truth.rooms.values())
    violations = scene.checker.check(truth)
    return Report(len(truth.events), events, messages, scene.checker.counts, storm.faults.injected, violations)


class Storm:
    """Clients, jobs and faults."""

    def __init__(self, plan: Plan, stack: Stack, scene: Scene) -> None:
        self._plan = plan
        self._stack = stack
        self._scene = scene
        self._random = Random(f"storm {plan.seed}")
        self.followers = _cast(plan, scene)
        self.faults = Faults(stack, self._submit_one, Random(f"faults {plan.seed}"))
        self._following = [asyncio.create_task(follower.run()) for follower in self.followers]
        self._saying = asyncio.create_task(self._say())

    async def rage(self) -> None:
        """Submit jobs and inject faults for the time that is planned."""
        injecting = asyncio.create_task(self.faults.run())
        try:
            await asyncio.gather(self._submit_all(), asyncio.sleep(self._plan.seconds))
        finally:
            injecting.cancel()
            await self.faults.end()
            await self._stack.heal()

    async def calm(self) -> None:
        """Let jobs end and clients get the rest; whoever does not get all of it is a violation."""
        await drained(self._stack)
        self._scene.complete = True
        deadline = time.monotonic() + REST
        waiting = self.followers
        while waiting and time.monotonic() < deadline:
            # One that has all is stopped: streams would go on, each with another job.
            for follower in waiting:
                if follower.finished:
                    follower.stop()
            waiting = [follower for follower in waiting if not follower.stopped]
            await asyncio.sleep(0.2)
        for follower in waiting:
            follower.received.note(f"never got {follower.lacks[:200] or 'so many connections'}")
            follower.stop()
        self._saying.cancel()
        done, late = await asyncio.wait(self._following, timeout=30)
        for task in late:
            task.cancel()
        for task in done:
            task.result()

    async def _submit_all(self) -> None:
        """Jobs whose events are spread over the time."""
        count = self._plan.jobs
        most = 0.8 * self._plan.seconds
        length = min(LONGEST, most * min(0.5, AT_ONCE / count))
        for number in range(count):
            await asyncio.sleep((most - length) / count)
            tenant = TENANTS[number % 5 == 0]
            tag = self._plan.tags[number // 5 % len(self._plan.tags)]
            while await self._submit(tenant, KIND, length * 1000, tag) is None:
                await asyncio.sleep(0.2)

    async def _submit_one(self, kind: str, ms: int) -> str | None:
        return await self._submit(TENANTS[0], kind, ms, self._plan.tags[0])

    async def _submit(self, tenant: str, kind: str, ms: float, tag: str) -> str | None:
        scene, sent = self._scene, time.monotonic()
        body = {"kind": kind, "input": {"ms": int(ms), "times": LINES}, "tags": [tag]}
        headers = {"Authorization": f"Bearer {scene.keys[tenant]}"}
        try:
            async with (
                asyncio.timeout(10),
                scene.http.post(f"{scene.url}/api/v1/jobs", json=body, headers=headers) as answer,
            ):
                if answer.status != 202:
                    scene.checker.counts[f"submit {answer.status}"] += 1
                    return None
                job: str = (await answer.json())["id"]
        except BROKEN:
            return None
        scene.jobs[tenant].append(Submitted(job, tag, sent))
        return job

    async def _say(self) -> None:
        began, told = time.monotonic(), 0
        while True:
            await asyncio.sleep(SAY_EVERY)
            for violation in self._scene.checker.violations[told:]:
                echo(f"violation: {violation}")
            told = len(self._scene.checker.violations)
            counts, jobs = self._scene.checker.counts, sum(map(len, self._scene.jobs.values()))
            left = sum(not follower.finished for follower in self.followers)
            echo(
                f"{time.monotonic() - began:.0f} s: {jobs} jobs, {counts['connections']:,} connections, "
                f"{counts['state'] + counts['log']:,} events and {counts['progress']:,} reports received, "
                f"{self.faults.injected.total()} faults, {counts['violations']} violations, {left} clients go on"
            )


def _cast(plan: Plan, scene: Scene) -> list[Follower]:
    """Of twenty clients eleven follow jobs, three a set, three a job as a stream, two a set as one; one is in a room.

    One in five is of the other tenant.
    """
    told: dict[tuple[str, str], int] = {}
    followers: list[Follower] = []
    for number in range(plan.sockets):
        random, part = Random(f"client {plan.seed} {number}"), number % 20
        who = (scene, f"client {number}", TENANTS[number // 20 % 5 == 0])
        wanted: dict[str, Any] = {"random": random, "reconnects": plan.reconnects, "seconds": plan.seconds}
        if part < 11:
            followers.append(JobsFollower(*who, tags=frozenset({random.choice(plan.tags)}), **wanted))
        elif part < 14:
            followers.append(SetFollower(*who, **_set(random.choice(plan.tags), random), **wanted))
        elif part < 17:
            followers.append(JobStreamFollower(*who, **wanted))
        elif part < 19:
            followers.append(SetStreamFollower(*who, **_set(random.choice(plan.tags), random), **wanted))
        else:
            followers.append(RoomFollower(*who, room=random.choice(ROOMS), messages=MESSAGES, told=told, **wanted))
    return followers


def _set(tag: str, random: Random) -> dict[str, Any]:
    """What a set is of, and the same of what was submitted."""
    return random.choice(
        (
            {"wanted": {"tag": tag}, "fits": lambda one: one.tag == tag},
            {"wanted": {"tag": tag, "kind": KIND}, "fits": lambda one: one.tag == tag},
            {"wanted": {"kind": KIND}, "fits": lambda one: True},
            {"wanted": {}, "fits": lambda one: True},
        )
    )


async def _truth(database_url: str, scene: Scene) -> Truth:
    """The record as Postgres has it; what the API's pages show must be the same."""
    connection = await asyncpg.connect(database_url)
    await prepare(connection)
    tenants = {str(row["id"]): row["name"] for row in await connection.fetch(JOBS)}
    events: dict[str, dict[int, tuple[str, Any]]] = {job: {} for job in tenants}
    for row in await connection.fetch(EVENTS):
        events[str(row["job_id"])][row["seq"]] = (row["type"], row["data"])
    await connection.close()
    for job, tenant in tenants.items():
        shown = {}
        async for one in _pages(scene, tenant, f"/jobs/{job}/events", "events"):
            shown[one["seq"]] = (one["t"], one["d"])
        if shown != events[job]:
            scene.checker.note(f"GET /jobs/{job}/events shows {len(shown)} events that are not those of the record")
    rooms = {}
    for tenant in TENANTS:
        for room in ROOMS:
            rooms[tenant, room] = {
                one["seq"]: {name: one[name] for name in ("message", "author", "at", "id")}
                async for one in _pages(scene, tenant, f"/rooms/{room}/messages", "messages")
            }
    return Truth(tenants, events, rooms)


async def _pages(scene: Scene, tenant: str, path: str, name: str) -> Any:
    """What the pages of a path list, one after the other."""
    after = 0
    while True:
        async with scene.http.get(
            f"{scene.url}/api/v1{path}",
            params={"after": after, "limit": 100},
            headers={"Authorization": f"Bearer {scene.keys[tenant]}"},
        ) as answer:
            answer.raise_for_status()
            page = (await answer.json())[name]
        for one in page:
            yield one
        if len(page) < 100:
            return
        after = page[-1]["seq"]


def main() -> int:
    arguments = _arguments()
    seconds = arguments.seconds or max(20.0, arguments.sockets * arguments.reconnects / PACE)
    plan = Plan(arguments.sockets, arguments.reconnects, arguments.events, arguments.seed, seconds)
    echo(f"seed {plan.seed}; {seconds:.0f} s of faults")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
    home = arguments.home or Path(tempfile.mkdtemp(prefix="headway-storm-"))
    try:
        report = uvloop.run(until_told(run(plan, home)))
    except asyncio.CancelledError:
        echo("stopped before the end")
        failed, wanted = True, False
    else:
        echo(str(report))
        failed = wanted = bool(report.violations)
    if wanted or arguments.home:
        echo(f"the logs are in {home}; seed {plan.seed}")
    else:
        shutil.rmtree(home)
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.storm", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--reconnects", type=int, default=20, help="of each socket, forced within the time")
    parser.add_argument("--events", type=int, default=10_000, help="durable ones, at least")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1 << 32))
    parser.add_argument("--seconds", type=float, help="of faults; 60 reconnects a second if left out")
    parser.add_argument("--home", type=Path, help="an empty folder to work in, which is kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
