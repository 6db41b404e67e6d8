"""How a handler is called, in each of the forms that it may have."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any

from headway.blocking import SyncJobContext
from headway.context import JobContext
from headway.errors import HandlerFailed
from headway.job import Progress
from headway.kinds import Kind
from headway.startup import Dependency


async def perform(kind: Kind, job: JobContext, value: Any, opened: Mapping[Dependency, Any]) -> Any:
    """What the handler gives for `value`, with what it needs of what is open. Raises what it raises."""
    given = {name: opened[dependency] for name, dependency in kind.needs.items()}
    match kind.form:
        case "coroutine":
            return await kind.handler(job, value, **given)
        case "async generator":
            return await _exhaust(kind.handler(job, value, **given), job)
        case "function":
            return await _in_thread(job, lambda plain: kind.handler(plain, value, **given))
        case "generator":
            return await _in_thread(job, lambda plain: _exhaust_plain(kind.handler(plain, value, **given), plain))


class _Yielded:
    """What a generator has yielded: Progress, and last its result."""

    def __init__(self) -> None:
        self.result: Any = None
        self._complete = False

    def take(self, item: Any) -> Progress | None:
        """What is to be reported."""
        if self._complete:
            raise HandlerFailed("The handler yielded something after its result; the result must come last.")
        if isinstance(item, Progress):
            return item
        self.result, self._complete = item, True
        return None


async def _exhaust(generator: AsyncGenerator[Any, None], job: JobContext) -> Any:
    """The result. What a report raises, a cancel too, is raised where the generator yields."""
    yielded = _Yielded()
    step = generator.__anext__()
    while True:
        try:
            item = await step
        except StopAsyncIteration:
            return yielded.result
        try:
            if progress := yielded.take(item):
                await job.report(**_reported(progress))
        except BaseException as error:
            step = generator.athrow(error)
        else:
            step = generator.__anext__()


def _exhaust_plain(generator: Generator[Any, None, Any], job: SyncJobContext) -> Any:
    yielded = _Yielded()
    step: Callable[[], Any] = partial(next, generator)
    while True:
        try:
            item = step()
        except StopIteration as end:
            if end.value is not None:
                raise HandlerFailed("The handler returned its result; a generator yields it, as its last.") from None
            return yielded.result
        step = partial(next, generator)
        try:
            if progress := yielded.take(item):
                job.report(**_reported(progress))
        except BaseException as error:
            step = partial(generator.throw, error)


def _reported(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in ("done", "total", "message", "unit", "counts")}


async def _in_thread(job: JobContext, call: Callable[[SyncJobContext], Any]) -> Any:
    """What a plain function gives, from a thread of its own.

    When this is cancelled the function is told, and waited for. Cancelled once more, this leaves the thread behind;
    the process may end without it.
    """
    loop = asyncio.get_running_loop()
    plain = SyncJobContext(job, loop)
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def run() -> None:
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = call(plain), None
        except BaseException as error:
            outcome = None, error
        # Nobody is left to be told once the loop is closed.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set_result, outcome)

    threading.Thread(target=copy_context().run, args=(run,), name=f"job {job.id}", daemon=True).start()
    try:
        result, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        plain.interrupt()
        result, error = await asyncio.shield(ended)
    await plain.flush()
    if error is not None:
        raise error
    return result
