"""Group commit: what arrives while a statement runs shares the next one."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batch(Generic[Item, Result]):
    """Gathers calls into lists. `run` is given the items and returns their results in the same order.

    One `run` is under way at a time, and no caller that goes away stops it. An exception of `run` reaches every caller
    of that list, unless `faulty` says that an item is to blame: then both halves of the list are run apart, until the
    one to blame stands alone.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        most: int,
        faulty: tuple[type[Exception], ...] = (),
    ) -> None:
        self._run = run
        self._most = most
        self._faulty = faulty
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                await self._settle(taken)
        finally:
            self._task = None

    async def _settle(self, taken: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            settled = list(zip(taken, await self._run([item for item, _ in taken]), strict=True))
        except Exception as error:
            if isinstance(error, self._faulty) and len(taken) > 1:
                middle = len(taken) // 2
                await self._settle(taken[:middle])
                await self._settle(taken[middle:])
                return
            for _, future in taken:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in settled:
                if not future.done():
                    future.set_result(result)
