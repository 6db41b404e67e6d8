"""What handlers share: `@on_startup` functions, opened once by each worker and closed when it stops."""

import asyncio
import inspect
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from headway.errors import InvalidSettings, StartFailed, innermost

F = TypeVar("F", bound=Callable[[], AsyncIterator[Any]])

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Dependency:
    """What an `@on_startup` function yields, found by its type."""

    name: str
    type: Any
    open: Callable[[], AbstractAsyncContextManager[Any]]


_registry: dict[str, Dependency] = {}


def on_startup(function: F) -> F:
    """Make what an async generator function yields a dependency of handlers.

    ```
    @on_startup
    async def warehouse() -> AsyncIterator[asyncpg.Pool]:
        async with asyncpg.create_pool(URL) as pool:
            yield pool
    ```

    A handler gets it by a further parameter of that type: `async def build(job: JobContext, input: In, pool:
    asyncpg.Pool) -> Out`. It is opened before the worker takes jobs, if one of its kinds needs it, and closed after the
    last of them; an exception here ends the worker. A kind that runs as a process has its own, for each attempt.

    Raises InvalidSettings if the function has another form.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    hint = typing.get_type_hints(function).get("return")
    yields = inspect.isasyncgenfunction(function) and typing.get_origin(hint) in (AsyncIterator, AsyncGenerator)
    if not yields or inspect.signature(function).parameters:
        raise InvalidSettings(
            f"{name} must look like `async def warehouse() -> AsyncIterator[Pool]`, and yield once: what handlers "
            "are to have, between opening and closing it."
        )
    _registry[name] = Dependency(name, typing.get_args(hint)[0], asynccontextmanager(function))
    return function


def find(wanted: Any) -> Dependency:
    """The dependency of a type. Raises LookupError, with a sentence, if there is none or more than one."""
    found = [dependency for dependency in _registry.values() if dependency.type == wanted]
    if not found:
        raise LookupError("no function with @on_startup yields that; write one above the handler, or import it first")
    if len(found) > 1:
        names = " and ".join(dependency.name for dependency in found)
        raise LookupError(f"{names} yield that; give one of them a type of its own")
    return found[0]


@asynccontextmanager
async def opened(dependencies: Iterable[Dependency]) -> AsyncIterator[Mapping[Dependency, Any]]:
    """Open in this order, close in the reverse one. Raises StartFailed, which names the function."""
    values: dict[Dependency, Any] = {}
    async with AsyncExitStack() as stack:
        for dependency in dependencies:
            try:
                values[dependency] = await stack.enter_async_context(dependency.open())
            except Exception as error:
                log.exception("a function with @on_startup failed", function=dependency.name)
                cause = innermost(error)
                raise StartFailed(
                    f"{dependency.name}, which handlers need, failed at start: {type(cause).__name__}: {cause}. "
                    "The log has its traceback."
                ) from error
        yield values


class Opened:
    """Dependencies that are open until `close`. A task of their own enters and leaves them, as task groups require."""

    def __init__(self) -> None:
        self.values: Mapping[Dependency, Any] = {}
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self, dependencies: Iterable[Dependency]) -> None:
        """Raises StartFailed."""
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._hold(dependencies, ready))
        waiting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        finally:
            waiting.cancel()
        if self._task.done():
            self._task.result()

    async def watch(self) -> None:
        """Returns only if something that was opened breaks by itself: raises what it raised."""
        assert self._task is not None
        await asyncio.wait({self._task})
        self._task.result()

    async def close(self) -> None:
        """Close all; what cannot be closed is logged."""
        if self._task is None:
            return
        self._closing.set()
        await asyncio.wait({self._task})
        if not self._task.cancelled() and (error := self._task.exception()):
            log.error("what a function with @on_startup has opened was not closed", exc_info=error)

    async def _hold(self, dependencies: Iterable[Dependency], ready: asyncio.Event) -> None:
        async with opened(dependencies) as self.values:
            ready.set()
            await self._closing.wait()
