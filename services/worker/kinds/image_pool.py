"""As many makers as there are cores, each a process that is killed and replaced when an image harms it."""

import asyncio
import math
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from services.worker import frames
from services.worker.kinds.image_files import Picture

# Of a core, for one image; the slowest honest ones take ten. By the clock it may be more where others use the cores.
SECONDS = 60.0
HANGS = 1800.0
# Images under way for each maker: the others go on while the order waits for one that has a large image.
AHEAD = 3
STARTUP = 60.0

# Of a container's memory, for each maker.
MEMORY = 1 << 30
# What a maker needs for the most pixels in the costliest format, and where a container has less, its share.
MAX_MEMORY = 3 << 30
CONTAINER = Path("/sys/fs/cgroup")

Made = tuple[dict[str, Any], bytes]


def room() -> int:
    """How many makers there are cores for, by affinity and by the container's quota, and memory, by its limit."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = map(int, (CONTAINER / "cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, min(cores, _container_memory() // MEMORY))


def _container_memory() -> int:
    try:
        return int((CONTAINER / "memory.max").read_text())
    except (OSError, ValueError):
        # It has none, or this is no container.
        return sys.maxsize


class Pool:
    """Makers under the same orders. Leaving the block kills them."""

    def __init__(self, orders: Mapping[str, Any], makers: int) -> None:
        limits = {"seconds": SECONDS, "memory": min(MAX_MEMORY, _container_memory() // (makers + 1))}
        self._makers = [_Maker({**orders, **limits}) for _ in range(makers)]
        self._idle: asyncio.Queue[_Maker] = asyncio.Queue()
        self._tasks: deque[asyncio.Task[Made]] = deque()

    async def __aenter__(self) -> Self:
        for maker in self._makers:
            self._idle.put_nowait(maker)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for maker in self._makers:
            await maker.end()

    async def make(self, images: AsyncIterator[tuple[Picture, bytes]]) -> AsyncGenerator[Made, None]:
        """What the makers answer of each image, in the order of the images."""
        async for picture, data in images:
            if len(self._tasks) >= AHEAD * len(self._makers):
                yield await self._next()
            self._tasks.append(asyncio.create_task(self._make(picture, data)))
        while self._tasks:
            yield await self._next()

    async def _next(self) -> Made:
        made = await self._tasks[0]
        self._tasks.popleft()
        return made

    async def _make(self, picture: Picture, data: bytes) -> Made:
        if picture.refusal is not None:
            return {"reason": picture.refusal}, b""
        maker = await self._idle.get()
        try:
            # A maker may have been killed for what others took of the memory; an image that kills two is to blame.
            for _ in range(2):
                await maker.start()
                try:
                    async with asyncio.timeout(HANGS):
                        return await maker.make(picture, data)
                except (EOFError, ConnectionError, TimeoutError):
                    if await maker.end() == -signal.SIGXCPU:
                        return {"reason": f"It takes more than {SECONDS:g} seconds of a core."}, b""
            return {"reason": "The process that reads it dies of it."}, b""
        finally:
            self._idle.put_nowait(maker)


class _Maker:
    """A process, started for its first image and again once it has died."""

    def __init__(self, orders: Mapping[str, Any]) -> None:
        self._orders = orders
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def start(self) -> None:
        """Have a process that is ready. Raises RuntimeError if it cannot be started."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        with theirs:
            self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=frames.PIECE)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.worker.kinds.image_maker", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        frames.send(self._writer, self._orders)
        try:
            async with asyncio.timeout(STARTUP):
                await frames.receive(self._reader)
        except (EOFError, ConnectionError, TimeoutError):
            await self.end()
            raise RuntimeError("A process for images does not start; the worker's log may tell why.") from None

    async def make(self, picture: Picture, data: bytes) -> Made:
        """Raises EOFError or ConnectionError if the process dies."""
        frames.send(self._writer, {"deflated": picture.deflated, "size": picture.size, "crc": picture.crc}, data)
        await self._writer.drain()
        return await frames.receive(self._reader)

    async def end(self) -> int | None:
        """Kill the process, if there is one that lives; how it has ended."""
        if self._process is None:
            return None
        self._writer.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        # Whoever is cancelled here leaves it to the next call to see that it has gone.
        code = await self._process.wait()
        self._process = None
        return code
