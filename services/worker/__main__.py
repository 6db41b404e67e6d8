"""`python -m services.worker`: run jobs until SIGTERM or SIGINT, with the operations port beside it."""

import asyncio
import signal
import sys

import asyncpg
import structlog
import uvloop

from headway import logs, settings
from headway.errors import HeadwayError
from headway.ops import Ops
from headway.settings import Settings
from headway.store import OUTAGES
from services.worker.app import App

log = structlog.get_logger(__name__)


async def work(config: Settings) -> None:
    """Run jobs until told to stop; jobs under way get `drain` seconds, then go back to the queue."""
    app = await App.open(config)
    stopping = asyncio.Event()

    async def ready() -> str | None:
        if stopping.is_set():
            return "draining"
        try:
            return None if await app.store.ready_check() else "the database is not migrated, or takes no writes"
        except OUTAGES as error:
            return f"the database cannot be reached: {type(error).__name__}"

    ops = Ops(config.ops_host, config.ops_port, ready)
    await ops.start()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    working = asyncio.create_task(app.worker.async_run())
    told = asyncio.create_task(stopping.wait())
    log.info("the worker runs", worker=app.worker.name, slots=config.slots)
    await asyncio.wait({working, told}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        # Only a fault of ours ends the loop by itself; dying loudly lets the supervisor start it anew.
        working.result()
    await app.worker.drain(config.drain)
    await asyncio.gather(working, return_exceptions=True)
    await ops.stop()
    await app.close()
    log.info("the worker has stopped")


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
