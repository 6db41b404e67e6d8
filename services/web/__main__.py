"""`python -m services.web`: uvicorn with the API, WebSockets and pages, and the operations port beside it."""

import asyncio
import gc
import signal
import socket
import sys
from typing import TYPE_CHECKING

import structlog
import uvicorn
import uvloop

from headway import logs, settings
from headway.errors import HeadwayError
from headway.ops import Ops
from headway.settings import Settings
from headway.store import OUTAGES
from services.web.protocol import Http, WebSocket

if TYPE_CHECKING:
    from services.web.asgi import Application

log = structlog.get_logger(__name__)


def server_config(application: "Application", config: Settings) -> uvicorn.Config:
    """uvicorn as Headway runs it: no deflate, which costs 34 KiB a socket, and small WebSocket messages."""
    return uvicorn.Config(
        application,
        host=config.host,
        port=config.port,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=config.trusted_proxies,
        http=Http,
        ws=WebSocket,
        ws_max_size=16 * 1024,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=max(1, int(config.drain)),
        interface="asgi3",
    )


class Server(uvicorn.Server):
    """uvicorn, which tells those who wait or follow that it stops before it cuts their connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if (app := self.config.app.app) is not None:  # type: ignore[union-attr]  # it is our Application
            app.waits.restart()
            await app.sessions.restart()
        await super().shutdown(sockets)


async def serve(config: Settings) -> None:
    """Serve until SIGTERM or SIGINT; running requests get `drain` seconds to finish."""
    from services.web.asgi import application  # noqa: PLC0415  # after logging is set up

    app = await application.open()
    server = Server(server_config(application, config))

    async def ready() -> str | None:
        if server.should_exit:
            return "draining"
        if not server.started:
            return "starting"
        try:
            return None if await app.store.ready_check() else "the database is not migrated, or takes no writes"
        except OUTAGES as error:
            return f"the database cannot be reached: {type(error).__name__}"

    ops = Ops(config.ops_host, config.ops_port, ready)
    await ops.start()
    # What start-up has made stays; a walk of the collector through it would hold up every connection for 100 ms.
    gc.collect()
    gc.freeze()
    log.info("the web service starts", host=config.host, port=config.port)
    for stop in (signal.SIGTERM, signal.SIGINT):
        # uvicorn takes these while it serves, and raises them anew when it has stopped: the process is to exit with 0.
        signal.signal(stop, signal.SIG_IGN)
    await server.serve()
    await ops.stop()
    log.info("the web service has stopped")


def main() -> None:
    try:
        config = settings.load()
        logs.configure(config, "web")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config))
    except HeadwayError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
