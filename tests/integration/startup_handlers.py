"""Kinds that need what `@on_startup` functions open. Child processes import this module."""

import asyncio
import os
from collections.abc import AsyncIterator

from headway import JobContext, SyncJobContext, kind, on_startup

# What was opened and closed in this process, in order.
happened: list[str] = []
# Names of functions that are to fail.
faulty: set[str] = set(os.environ.get("FAULTY", "").split())


class Warehouse:
    def __init__(self) -> None:
        self.asked = 0
        self.broken = asyncio.Event()

    async def refresh(self) -> None:
        await self.broken.wait()
        raise ConnectionError("the warehouse is gone")


class Shelf:
    pid = os.getpid()


class Unneeded: ...


class Model(str): ...


@on_startup
async def warehouse() -> AsyncIterator[Warehouse]:
    # A task group, as many libraries keep one open, has to be left by the task that entered it.
    async with asyncio.TaskGroup() as group:
        if "warehouse" in faulty:
            raise ConnectionError("nobody answers")
        happened.append("warehouse opened")
        refresh = group.create_task((warehouse := Warehouse()).refresh())
        yield warehouse
        refresh.cancel()
    happened.append("warehouse closed")


@on_startup
async def shelf() -> AsyncIterator[Shelf]:
    happened.append("shelf opened")
    yield Shelf()
    happened.append("shelf closed")


@on_startup
async def unneeded() -> AsyncIterator[Unneeded]:
    happened.append("unneeded opened")
    yield Unneeded()


@on_startup
async def model() -> AsyncIterator[Model]:
    """Only a process needs it."""
    happened.append("model opened")
    if "model" in faulty:
        raise MemoryError("the model is too large")
    yield Model(f"model of {os.getpid()}")


@kind("startup.ask")
async def ask(job: JobContext, input: int, warehouse: Warehouse, there: Shelf) -> int:
    assert there.pid == os.getpid()
    warehouse.asked += input
    return warehouse.asked


@kind("startup.thread", runs="thread")
def ask_in_a_thread(job: SyncJobContext, input: int, warehouse: Warehouse) -> int:
    warehouse.asked += input
    return warehouse.asked


@kind("startup.process", runs="process", max_attempts=1)
async def compute(job: JobContext, input: int, model: Model) -> list[str]:
    return [model, *happened]


@kind("startup.break")
async def break_warehouse(job: JobContext, input: None, warehouse: Warehouse) -> None:
    """Lets a task that the warehouse has in the background fail."""
    warehouse.broken.set()
    await asyncio.Event().wait()
