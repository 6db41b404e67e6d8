"""What `chaos` does its worst to: Postgres, Redis, web services and workers, in a home folder of their own."""

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from headway.embedded import Embedded, end_with_parent
from tests.conftest import PEPPER, make_tenant
from tests.faults.history import Recorder
from tests.faults.proxy import Proxy
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN = 60.0
# A process that is told to stop may have to wait for a server that comes back.
STOP_WITHIN = 60.0


@dataclass(frozen=True)
class Options:
    """How long, how much and how bad. `lease` is the workers' in seconds; None is their own."""

    seconds: float
    seed: int
    workers: int = 3
    webs: int = 2
    rate: float = 60.0
    fault_every: float = 2.2
    lease: float | None = None
    unfenced: bool = False
    faults: Sequence[str] = ()


class Member:
    """A web service or a worker: started, started again when it ends, reaching Postgres through a proxy of its own."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], proxy: Proxy, home: Path) -> None:
        self.name = name
        self.proxy = proxy
        self.busy = asyncio.Lock()
        self.url = f"http://127.0.0.1:{environment['HEADWAY_PORT']}"
        self._ready = f"http://127.0.0.1:{environment['HEADWAY_OPS_PORT']}/readyz"
        self._command = command
        self._environment = environment
        self._log = home / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "start() first"
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=end_with_parent,
            )

    async def ready(self) -> None:
        """Returns when the process says that it may be given work."""
        async with asyncio.timeout(READY_WITHIN):
            while not await _answers(self._ready):
                assert self.running, f"{self.name} did not start: {self.tail()}"
                await asyncio.sleep(0.05)

    def send(self, number: int) -> None:
        if self.running:
            self.process.send_signal(number)

    async def end(self, number: int = signal.SIGTERM) -> str | None:
        """Send the signal and wait; what was wrong with how the process then ended."""
        self.send(number)
        try:
            async with asyncio.timeout(STOP_WITHIN):
                code = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
            return f"did not end within {STOP_WITHIN:g} s of {signal.Signals(number).name}"
        if code in (0, -signal.SIGKILL):
            return None
        return f"ended with code {code} after {signal.Signals(number).name}: {self.tail()}"

    def tail(self) -> str:
        return self._log.read_text(errors="replace")[-1500:] if self._log.exists() else ""


class Stack:
    """The whole, and the ways to its parts. `open` it; `heal` undoes whatever faults left behind."""

    def __init__(self, options: Options, home: Path, recorder: Recorder) -> None:
        self.options = options
        self.home = home
        self.history = home / "history"
        self.recorder = recorder
        self.servers = Embedded(home)
        self.webs: list[Member] = []
        self.workers: list[Member] = []
        self.api_key = ""
        self.redis_busy = asyncio.Lock()
        self.postgres_busy = asyncio.Lock()
        self._revivals: set[asyncio.Task[None]] = set()
        # The servers end with the thread that started them, so it must be one that lasts.
        self._thread = ThreadPoolExecutor(1)

    @property
    def database_url(self) -> str:
        """Postgres itself, past the proxies."""
        return self.servers.postgres_url("headway")

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Start everything; at the end stop everything that was started."""
        async with AsyncExitStack() as parts:
            parts.callback(self._thread.shutdown)
            parts.push_async_callback(self._in_thread, self.servers.stop)
            await self.start_servers()
            await self._in_thread(self.servers.create_database, "headway")
            common = self._environment()
            await _run([sys.executable, "-m", "services.web.manage", "migrate", "--skip-checks"], common)
            connection = await asyncpg.connect(self.database_url)
            self.api_key = (await make_tenant(connection, "chaos")).api_key
            await connection.close()
            for kind, count in (("worker", self.options.workers), ("web", self.options.webs)):
                for number in range(count):
                    proxy = await parts.enter_async_context(Proxy(urlsplit(self.database_url).port or 0))
                    self._add(kind, f"{kind}-{number}", proxy, common)
            parts.push_async_callback(self._stop)
            for member in self.members:
                await member.start()
            await asyncio.gather(*(member.ready() for member in self.members))
            watching = asyncio.create_task(self._watch())
            parts.callback(watching.cancel)
            yield

    @property
    def members(self) -> list[Member]:
        return [*self.workers, *self.webs]

    async def start_servers(self) -> None:
        """Bring back whichever of Postgres and Redis has ended."""
        await self._in_thread(self.servers.start)

    def server_pid(self, name: str) -> int:
        """The process of `postgres` or `redis`, which its lock names."""
        return int((self.home / f"{name}.lock").read_text())

    async def heal(self) -> None:
        """Wait for faults under way, and see that everything runs."""
        for lock in (self.redis_busy, self.postgres_busy, *(member.busy for member in self.members)):
            async with lock:
                pass
        await self.start_servers()
        for member in self.members:
            member.proxy.restore()
            member.send(signal.SIGCONT)

    async def _watch(self) -> None:
        """Start members again that ended by themselves. Only a kind that kills its worker may do that."""
        while True:
            await asyncio.sleep(0.1)
            for member in self.members:
                if member.running or member.busy.locked():
                    continue
                code = member.process.returncode
                if code != -signal.SIGKILL:
                    self.recorder.write(
                        "exit", process=member.name, how=f"ended by itself with code {code}: {member.tail()}"
                    )
                self._revivals.add(revival := asyncio.create_task(self._revive(member)))
                revival.add_done_callback(self._revivals.discard)

    async def _revive(self, member: Member) -> None:
        """Start it; no fault befalls it before it is there, for a signal would end a Python that has just begun."""
        async with member.busy:
            await member.start()
            with suppress(TimeoutError, AssertionError):
                async with asyncio.timeout(10):
                    await member.ready()

    async def _stop(self) -> None:
        await asyncio.gather(*self._revivals)
        for member in self.members:
            member.send(signal.SIGCONT)
        for how in await asyncio.gather(*(member.end() for member in self.members if member.running)):
            if how:
                self.recorder.write("exit", process="at the end a process", how=how)

    def _add(self, kind: str, name: str, proxy: Proxy, common: Mapping[str, str]) -> None:
        port = free_ports(2)
        url = urlsplit(self.database_url)
        through = url._replace(netloc=f"{url.username}:{url.password}@127.0.0.1:{proxy.port}")
        environment = {
            **common,
            "HEADWAY_DATABASE_URL": urlunsplit(through),
            "HEADWAY_PORT": str(port),
            "HEADWAY_OPS_PORT": str(port + 1),
        }
        if kind == "web":
            self.webs.append(Member(name, ["-m", "services.web"], environment, proxy, self.home))
            return
        command = ["-m", "services.worker"]
        if self.options.lease is not None or self.options.unfenced:
            command = ["-m", "tests.faults.altered_worker", str(self.options.lease or 0)]
            command += ["--unfenced"] * self.options.unfenced
        self.workers.append(Member(name, command, environment, proxy, self.home))

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEADWAY_", "DJANGO_"))}
        return kept | {
            "HEADWAY_HOME": str(self.home),
            "HEADWAY_DATABASE_URL": self.database_url,
            "HEADWAY_REDIS_URL": self.servers.redis_url,
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": PEPPER,
            "HEADWAY_KINDS": "tests.faults.chaos_kinds",
            "HEADWAY_SLOTS": "20",
            # Most clients of a run share a key.
            "HEADWAY_CONNECTIONS": "5000",
            "HEADWAY_DRAIN": "0.1",
            "HEADWAY_LOG_LEVEL": "WARNING",
            "CHAOS_HISTORY": str(self.history),
        }

    async def _in_thread(self, function: object, *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)  # type: ignore[arg-type]


async def _run(command: list[str], environment: Mapping[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def _answers(url: str) -> bool:
    """Whether a GET is answered 200."""
    where = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(f"GET {where.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
    except OSError:
        return False
    return b" 200 " in line
