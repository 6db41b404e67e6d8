"""Workers as processes of their own, to be killed, paused and stopped."""

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from headway.embedded import Embedded, end_with_parent
from headway.settings import Settings
from tests.conftest import until
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.ports import free_ports

KINDS = "tests.faults.process_kinds"


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


@dataclass(frozen=True)
class WorkerProcess:
    """`python -m services.worker`, or `services.web`, running."""

    process: asyncio.subprocess.Process
    log: Path
    ops: httpx.AsyncClient

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, within: float = 10) -> int:
        """The exit code, or the negative number of the signal that ended it."""
        async with asyncio.timeout(within):
            return await self.process.wait()

    def said(self, words: str) -> bool:
        """Whether the log has these words."""
        return words in self.log.read_text()

    async def counted(self, metric: str) -> float:
        """What a metric without labels stands at."""
        text = (await self.ops.get("/metrics")).text
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{metric} "))


class Spawner:
    """Starts workers and web services, and ends at last those that still run."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._numbers = itertools.count()
        self._started: list[WorkerProcess] = []
        self._clients: list[httpx.AsyncClient] = []

    async def __call__(
        self,
        *,
        lease: float | None = None,
        clock: float | None = None,
        ready: bool = True,
        settings: Settings | None = None,
        **variables: str,
    ) -> WorkerProcess:
        """A worker that takes jobs; with another lease than the usual, the same program altered before it starts.

        `clock` is how many seconds its clock is fast.
        """
        program = ["services.worker"] if lease is None else ["tests.faults.altered_worker", str(lease)]
        worker = await self._start(program, clock, settings or self._engine.settings, variables)
        if ready:
            await until(lambda: worker.said("the worker runs") or self._complain(worker), 30)
        return worker

    async def web(self, *, clock: float | None = None) -> tuple[WorkerProcess, httpx.AsyncClient]:
        """A web service that answers, and a client of it that has a key."""
        port = free_ports()
        web = await self._start(["services.web"], clock, self._engine.settings, {"HEADWAY_PORT": str(port)})

        async def answers() -> bool:
            try:
                return (await web.ops.get("/readyz")).is_success
            except httpx.TransportError:
                return self._complain(web)

        await until(answers, 30)
        headers = {"Authorization": f"Bearer {self._engine.tenant.api_key}"}
        client = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}/api/v1", headers=headers, trust_env=False, verify=False
        )
        self._clients.append(client)
        return web, client

    async def _start(
        self, program: list[str], clock: float | None, settings: Settings, variables: Mapping[str, str]
    ) -> WorkerProcess:
        if clock is not None:
            program = ["tests.faults.shifted_clock", str(clock), *program]
        log = self._folder / f"process-{next(self._numbers)}.log"
        port = free_ports()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *program,
                env={
                    **{name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")},
                    "HEADWAY_DATABASE_URL": settings.database_url.get_secret_value(),
                    "HEADWAY_REDIS_URL": settings.redis_url.get_secret_value(),
                    "HEADWAY_SECRET_KEY": settings.secret_key.get_secret_value(),
                    "HEADWAY_KEY_PEPPER": settings.key_pepper.get_secret_value(),
                    "HEADWAY_HOME": str(settings.home),
                    "HEADWAY_OPS_PORT": str(port),
                    "HEADWAY_KINDS": KINDS,
                    "HEADWAY_DRAIN": "0",
                    **variables,
                },
                stdout=output,
                stderr=output,
                preexec_fn=end_with_parent,
            )
        worker = WorkerProcess(
            process, log, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, verify=False)
        )
        self._started.append(worker)
        return worker

    def _complain(self, worker: WorkerProcess) -> bool:
        assert worker.process.returncode is None, worker.log.read_text()
        return False

    async def end(self) -> None:
        for client in self._clients:
            await client.aclose()
        for worker in self._started:
            await worker.ops.aclose()
            if worker.process.returncode is None:
                worker.process.kill()
            await worker.process.wait()


@pytest.fixture
async def spawn(engine: Engine, tmp_path: Path) -> AsyncIterator[Spawner]:
    spawner = Spawner(engine, tmp_path)
    yield spawner
    await spawner.end()


@pytest.fixture
def flag(tmp_path: Path) -> Callable[[], None]:
    """Lets jobs of the kind `fault.wait` that were given its path go on."""
    return (tmp_path / "flag").touch
