"""Handlers of `runs="process"` kinds: one child process for each attempt, served over a socket and killed at need."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

import structlog

from headway.context import JobContext
from headway.errors import ChildDied
from headway.job import Claim
from headway.kinds import Kind
from headway.settings import Settings
from services.worker import frames
from services.worker.answers import Answers

# How long the child may take to end once it was told to, or has said its last word, before it is killed. Shorter than
# what the runner grants a handler.
GRACE = 5.0

log = structlog.get_logger(__name__)


async def handle(kind: Kind, claim: Claim, context: JobContext, settings: Settings) -> Any:
    """The result of the kind's handler, as JSON values, from a child process that is gone when this returns.

    When it is cancelled the child's handler is cancelled, and the child is killed unless it ends within GRACE. Raises
    what the handler raises, and ChildDied.
    """
    child = _Child(context)
    living = asyncio.create_task(child.live(_start(kind, claim, settings)))
    while not living.done():
        try:
            await asyncio.wait({living})
        except asyncio.CancelledError:
            child.stop()
    return living.result()


class _Child:
    def __init__(self, context: JobContext) -> None:
        self._context = context
        self._answers = Answers(context)
        self._calls: set[asyncio.Task[None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False
        self._killing: asyncio.TimerHandle | None = None

    async def live(self, start: dict[str, Any]) -> Any:
        """Start the process, serve it until it is gone, and give its handler's result or raise its error."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=frames.PIECE)
            try:
                frames.send(self._writer, {"start": start})
                process = self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "services.worker.child", str(theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C is for the worker alone, and a kill reaches what the handler has started.
                    start_new_session=True,
                )
            except BaseException:
                self._writer.close()
                raise
        if self._stopped:
            self.stop()
        serving = asyncio.create_task(self._serve(reader))
        exiting = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({serving, exiting}, return_when=asyncio.FIRST_COMPLETED)
            # Both are to follow one another at once; processes that the handler has left behind may hold the socket.
            await asyncio.wait({serving, exiting}, timeout=GRACE)
        finally:
            if self._killing is not None:
                self._killing.cancel()
            if not (serving.done() and exiting.done()):
                self._kill()
            await self._end(serving)
            code = await exiting
        last = None if serving.cancelled() else serving.result()
        if last is None:
            raise ChildDied(
                f"The handler's process {_ending(code)}. The worker's log, or its memory limit, may tell why."
            )
        if "error" in last:
            raise frames.unpack(last["error"])
        return last["result"]

    def stop(self) -> None:
        """Let the child cancel its handler, and kill it after the grace."""
        self._stopped = True
        if self._process is None or self._process.returncode is not None or self._killing is not None:
            return
        assert self._writer is not None
        frames.send(self._writer, {"stop": self._context.interruption})
        # For a handler that blocks and listens to signals; otherwise the child passes over it.
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._killing = asyncio.get_running_loop().call_later(GRACE, self._kill)

    async def _serve(self, reader: asyncio.StreamReader) -> dict[str, Any] | None:
        """Do what the child asks for until it has said its last word; None if it died before."""
        while True:
            try:
                head, body = await frames.receive(reader)
            except (EOFError, ConnectionError):
                return None
            if "report" in head:
                await self._context.report(**head["report"])
            elif "call" in head:
                task = asyncio.create_task(self._answer(head, body))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            else:
                return head

    async def _answer(self, head: dict[str, Any], body: bytes) -> None:
        answer, data = None, b""
        try:
            answer, data = await self._answers.answer(head["call"], head["with"], body)
            reply = {"reply": head["number"], "answer": answer}
        except Exception as error:
            reply = {"reply": head["number"], "error": frames.pack(error)}
        assert self._writer is not None
        with suppress(ConnectionError):
            frames.send(self._writer, reply, data)
            await self._writer.drain()

    async def _end(self, serving: "asyncio.Task[Any]") -> None:
        tasks = {serving, *self._calls}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._answers.end()
        assert self._writer is not None
        self._writer.close()

    def _kill(self) -> None:
        """Kill the process and those that it has started, as far as they are there."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _start(kind: Kind, claim: Claim, settings: Settings) -> dict[str, Any]:
    """What the child must know. Sources hold passwords, so it is told on the socket and not by arguments."""
    return {
        "worker": os.getpid(),
        "path": list(map(str, sys.path)),
        "log": {"log_format": settings.log_format, "log_level": settings.log_level},
        "kinds": settings.kinds,
        "module": kind.handler.__module__,
        "kind": kind.name,
        "id": str(claim.job_id),
        "attempt": claim.attempt,
        "token": claim.token,
        "checkpoint": claim.checkpoint,
        "input": claim.input,
        "max_result": settings.max_result,
        "sources": {
            name: [source.url.get_secret_value(), source.reading.get_secret_value()]
            for name, source in settings.sources_of(claim.tenant_id).items()
        },
    }


def _ending(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    return f"was ended by {names.get(-code, -code)}" if code < 0 else f"ended with exit code {code}"
