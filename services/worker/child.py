"""`python -m services.worker.child FD`: run one attempt's handler for the worker at the other end of the socket."""

import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from headway import logs
from headway.errors import LeaseLost, innermost
from headway.kinds import find
from headway.settings import Settings
from headway.startup import opened
from services.worker import frames
from services.worker.handling import Failed, as_job_error, handle
from services.worker.proxy import Line, ProxyContext

_PR_SET_PDEATHSIG = 1

log = structlog.get_logger("services.worker.child")


async def work(connection: socket.socket) -> None:
    """Run the handler and say how it ended. The process ends at once if the worker does."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=frames.PIECE)
    try:
        start = (await frames.receive(reader))[0]["start"]
    except (EOFError, ConnectionError):
        return
    if sys.platform == "linux" and os.getppid() != start["worker"]:
        # It died before its death was to be told.
        return
    logs.configure(Settings.model_construct(**start["log"]), "worker")
    structlog.contextvars.bind_contextvars(
        job_id=start["id"], kind=start["kind"], attempt=start["attempt"], token=start["token"]
    )
    line = Line(reader, writer)
    job = ProxyContext(start, line)
    handling = asyncio.create_task(_handle(start, job))
    listening = asyncio.create_task(_listen(line, job, handling))
    await asyncio.wait({handling, listening}, return_when=asyncio.FIRST_COMPLETED)
    if listening.done():
        listening.result()
    job.flush()
    line.say(_last_word(handling))
    listening.cancel()
    await asyncio.wait({listening})
    await line.close()


async def _handle(start: Mapping[str, Any], job: ProxyContext) -> Any:
    sys.path[:] = start["path"]
    kind = find(start["kind"], start["module"], start["kinds"])
    async with opened(kind.needs.values()) as found:
        return await handle(kind, job, start["input"], start["max_result"], found)


async def _listen(line: Line, job: ProxyContext, handling: "asyncio.Task[Any]") -> None:
    try:
        while True:
            job.reason = await line.hear()
            handling.cancel()
    except (EOFError, ConnectionError):
        # The worker is gone, and with it the right to do anything for this job.
        os._exit(1)


def _last_word(handling: "asyncio.Task[Any]") -> dict[str, Any]:
    error = asyncio.CancelledError() if handling.cancelled() else innermost(handling.exception())
    if error is None:
        return {"result": handling.result()}
    if not isinstance(error, LeaseLost):
        error = as_job_error(error)
    if isinstance(error, Failed):
        log.error("a handler failed", error=str(error), exception=error.trace["traceback"])
    return {"error": frames.pack(error)}


def prepare() -> None:
    """Die with the worker, be the first to be killed when memory runs out, and leave SIGTERM to the handler.

    A handler is told to stop on the socket. SIGTERM may come to all processes of a service at once, when the worker
    still gives its jobs time to finish.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


def main() -> None:
    prepare()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    asyncio.run(work(connection))


if __name__ == "__main__":
    main()
