"""`python -m services.worker`: run jobs until SIGTERM or SIGINT, with the operations port beside it."""

import asyncio
import gc
import signal
import sys
from datetime import timedelta
from typing import Literal

import asyncpg
import structlog
import uvloop

from headway import logs, settings
from headway.errors import HeadwayError
from headway.lifecycle import LEASE
from headway.ops import Ops
from headway.settings import Settings
from headway.store import OUTAGES
from services.worker.app import App

log = structlog.get_logger(__name__)


async def work(config: Settings, *, lease: timedelta = LEASE) -> None:
    """Run jobs until told to stop; jobs under way get `drain` seconds, then go back to the queue."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    told = asyncio.create_task(stopping.wait())
    opening = asyncio.create_task(App.open(config, lease=lease))

    async def ready() -> str | None:
        if stopping.is_set():
            return "draining"
        if not opening.done():
            return "waiting for the database, or for what handlers need"
        try:
            migrated = await opening.result().store.ready_check()
        except OUTAGES as error:
            return f"the database cannot be reached: {type(error).__name__}"
        return None if migrated else "the database is not migrated, or takes no writes"

    ops = Ops(config.ops_host, config.ops_port, ready)
    await ops.start()
    await asyncio.wait({opening, told}, return_when=asyncio.FIRST_COMPLETED)
    if opening.done():
        await _run(opening.result(), told, config)
    else:
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
    await ops.stop()
    log.info("the worker has stopped")


async def _run(app: App, told: "asyncio.Task[Literal[True]]", config: Settings) -> None:
    # What start-up has made stays; the collector need not walk through it again and again while jobs run.
    gc.collect()
    gc.freeze()
    # Most of what a short job makes is gone before a collection this rare would look at it.
    gc.set_threshold(10_000, 20, 20)
    working = asyncio.create_task(app.worker.async_run())
    log.info("the worker runs", worker=app.worker.name, slots=config.slots)
    await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        # Only a fault of ours ends the loop by itself; dying loudly lets the supervisor start it anew.
        working.result()
    await app.worker.drain(config.drain)
    await asyncio.gather(working, return_exceptions=True)
    await app.close()


def main() -> None:
    try:
        config = settings.load()
        logs.configure(config, "worker")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(work(config))
    except HeadwayError as error:
        sys.exit(str(error))
    except asyncpg.UndefinedTableError:
        sys.exit("The database is not migrated; run `python -m services.web.manage migrate`.")


if __name__ == "__main__":
    main()
