"""How long a request may take."""

import asyncio
import time
from typing import Any


class Deadlines:
    """`with deadlines:` gives the task so many seconds, then raises TimeoutError, as asyncio.timeout does.

    All requests have the same time, so one timer for the oldest does; a timer for each would cost a tenth of a fetch.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[asyncio.Task[Any], float] = {}  # oldest first
        self._late: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> None:
        self._ends[_this_task()] = time.perf_counter() + self._seconds

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task = _this_task()
        self._ends.pop(task, None)
        if task in self._late:
            self._late.remove(task)
            # Above 0, someone else has cancelled the task as well: then it ends.
            if task.uncancel() == 0 and kind is asyncio.CancelledError:
                raise TimeoutError

    async def watch(self) -> None:
        """Interrupt the late ones, for ever."""
        while True:
            now, wait = time.perf_counter(), self._seconds
            for task, end in list(self._ends.items()):
                if end > now:
                    wait = end - now
                    break
                del self._ends[task]
                self._late.add(task)
                task.cancel()
            await asyncio.sleep(wait)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
