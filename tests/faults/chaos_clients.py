"""Clients that submit, read, cancel, follow and download, and write down what they asked and what they were told."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any
from uuid import uuid4

import aiohttp

from headway.states import TERMINAL
from tests.faults.chaos_stack import Stack
from tests.faults.history import Line, Outcome

TIMEOUT = aiohttp.ClientTimeout(total=8, connect=3)
CLIENTS = 8
MOST_AT_ONCE = 1000

# Kind, weight, and the ranges of `ms` and `times`.
MIX: tuple[tuple[str, int, tuple[int, int], tuple[int, int]], ...] = (
    ("chaos.instant", 30, (0, 0), (0, 0)),
    ("chaos.sleep", 22, (10, 500), (0, 0)),
    ("chaos.report", 14, (50, 300), (2, 8)),
    ("chaos.steps", 12, (50, 500), (2, 6)),
    ("chaos.artifact", 10, (5, 200), (1, 16)),
    ("chaos.fail", 8, (0, 100), (0, 1)),
    ("chaos.group", 3, (5, 200), (1, 4)),
    ("chaos.block", 2, (5, 150), (0, 0)),
)
# Concurrency keys, each with its limit, and the share of jobs that have one.
KEYS = {"one": 1, "two": 2, "three": 3}
KEYED = 0.06
# The share of submits with an Idempotency-Key; half of them are sent again, and a quarter with another body.
IDEMPOTENT = 0.15
# How many jobs in a thousand kill their worker, once or, rarer still, whenever they run.
CRASHING = 0.5


class Clients:
    """Submits at `rate` a second until cancelled; each job's client then does with it what chance says."""

    def __init__(self, stack: Stack, random: Random) -> None:
        self.outcomes: Counter[str] = Counter()
        self._stack = stack
        self._random = random
        self._record = stack.recorder
        self._session: aiohttp.ClientSession | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connections, for as long as jobs are submitted and clients want something of them."""
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._stack.api_key}"},
            timeout=TIMEOUT,
            connector=aiohttp.TCPConnector(limit=MOST_AT_ONCE),
        ) as self._session:
            yield

    async def run(self) -> None:
        """Submit for ever; what is under way when this is cancelled goes on to its end."""
        due = time.monotonic()
        while True:
            due += self._random.expovariate(self._stack.options.rate)
            await asyncio.sleep(due - time.monotonic())
            if len(self._under_way) < MOST_AT_ONCE:
                task = asyncio.create_task(self._live(self._random.randrange(CLIENTS)))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def end(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way)

    async def _live(self, client: int) -> None:
        """One job, from submit to whatever its client wants of it."""
        kind, work, timeout = self._draw()
        if (job := await self._submit(client, kind, work, timeout)) is None:
            return
        chance = self._random.random()
        if chance < 0.12:
            await self._cancel(client, job)
        elif chance < 0.32:
            await self._read(client, job)
        elif chance < 0.40:
            await self._follow(job)
        elif kind == "chaos.artifact":
            await self._download(client, job)

    async def submit(self, kind: str, ms: int) -> str | None:
        """A job for a fault that needs one; its id, if it was accepted."""
        return await self._send(0, {"kind": kind, "input": {"ms": ms, "times": 4}, "tags": [uuid4().hex]})

    async def _submit(self, client: int, kind: str, work: Line, timeout: float | None) -> str | None:
        body: Line = {"kind": kind, "input": work, "tags": [uuid4().hex]} | ({"timeout": timeout} if timeout else {})
        if self._random.random() < KEYED:
            name, limit = self._random.choice(list(KEYS.items()))
            body |= {"concurrency_key": name, "concurrency_limit": limit}
        if self._random.random() >= IDEMPOTENT:
            return await self._send(client, body)
        key = uuid4().hex
        job = await self._send(client, body, key)
        chance = self._random.random()
        if chance < 0.5:
            await asyncio.sleep(self._random.uniform(0, 3))
            job = await self._send(self._random.randrange(CLIENTS), body, key) or job
        if chance < 0.25:
            await self._send(client, body | {"tags": [uuid4().hex]}, key)
        return job

    async def _send(self, client: int, body: Line, key: str | None = None) -> str | None:
        asked = {"tag": body["tags"][0], "kind": body["kind"], "timeout": body.get("timeout"), "key": key}
        headers = {"Idempotency-Key": key} if key else {}
        accepted = await self._call("submit", client, "POST", "/jobs", asked, json=body, headers=headers)
        return accepted["id"] if accepted else None

    def _draw(self) -> tuple[str, Line, float | None]:
        if self._random.random() < CRASHING / 1000:
            return "chaos.crash", {"times": self._random.choice([1, 1, 1, 9])}, None
        [(kind, _, ms, times)] = self._random.choices(MIX, [weight for _, weight, *_ in MIX])
        work = {"ms": self._random.randint(*ms), "times": self._random.randint(*times)}
        return kind, work, 0.1 if kind == "chaos.sleep" and self._random.random() < 0.05 else None

    async def _cancel(self, client: int, job: str) -> None:
        for _ in range(self._random.choice([1, 1, 2])):
            await asyncio.sleep(self._random.uniform(0, 0.4))
            await self._call("cancel", client, "POST", f"/jobs/{job}/cancel", {"job": job})
        await self._read(self._random.randrange(CLIENTS), job)

    async def _read(self, client: int, job: str) -> None:
        for _ in range(self._random.randint(1, 3)):
            await self._call("read", client, "GET", f"/jobs/{job}", {"job": job})
            await asyncio.sleep(self._random.uniform(0, 0.5))

    async def _download(self, client: int, job: str) -> None:
        """Wait for the end, then for the bytes."""
        for _ in range(20):
            shown = await self._call("read", client, "GET", f"/jobs/{job}", {"job": job})
            if shown and shown["state"] in TERMINAL:
                break
            await asyncio.sleep(0.5)
        else:
            return
        if shown["state"] == "succeeded":
            await self._call("download", client, "GET", f"/jobs/{job}/artifacts/bytes.bin", {"job": job})

    async def _call(
        self, name: str, client: int, method: str, path: str, asked: Line, **request: Any
    ) -> dict[str, Any] | None:
        """The answer, if it is a success. A refusal is without effect, but for 503: Postgres may have done it."""
        assert self._session is not None
        invocation = self._record.invoke(name, client, **asked)
        url = f"{self._random.choice(self._stack.webs).url}/api/v1{path}"
        try:
            async with self._session.request(method, url, **request) as response:
                content = await response.read()
        except aiohttp.ClientConnectorError as error:
            invocation.end("fail", error=repr(error))
            self.outcomes[f"{name} fail"] += 1
            return None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            invocation.end("unknown", error=repr(error))
            self.outcomes[f"{name} unknown"] += 1
            return None
        outcome: Outcome = "ok" if response.ok else "unknown" if response.status >= 500 else "fail"
        self.outcomes[f"{name} {outcome}"] += 1
        if outcome != "ok":
            invocation.end(outcome, status=response.status, error=content[:300].decode(errors="replace"))
            return None
        if name == "download":
            invocation.end("ok", status=response.status, sha256=hashlib.sha256(content).hexdigest())
            return None
        job: dict[str, Any] = json.loads(content)
        shown = {name: job[name] for name in ("state", "attempt", "epoch", "seq", "cancel_requested_at", "result")}
        invocation.end("ok", status=response.status, job=job["id"], **shown)
        return job

    async def _follow(self, job: str) -> None:
        """Write down what WebSockets show, each for itself, until one shows the end."""
        assert self._session is not None
        for _ in range(10):
            socket = uuid4().hex
            url = f"{self._random.choice(self._stack.webs).url}/ws/jobs/{job}"
            try:
                async with asyncio.timeout(30), self._session.ws_connect(url) as connection:
                    async for message in connection:
                        frame = json.loads(message.data)
                        self._record.write("frame", socket=socket, **frame)
                        self.outcomes["frame"] += 1
                        if frame["t"] == "bye":
                            return
                if connection.close_code and 4500 <= connection.close_code < 4600:
                    self._record.write("exit", process=f"socket of job {job}", how=f"closed: {connection.close_code}")
                    return
            except (aiohttp.ClientError, OSError, TimeoutError):
                self.outcomes["socket broken"] += 1
            await asyncio.sleep(0.3)
