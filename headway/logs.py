"""Structured logs: one line an event, with request, job and attempt ids from the context they happen in."""

import json
import logging
import sys

import structlog
from structlog.typing import Processor

from headway.settings import Settings


class Lines:
    """Where our own lines go: straight to stderr. Through `logging` a line would cost three times as much."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def write(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")

    debug = info = warning = error = critical = write


def configure(settings: Settings, service: str) -> None:
    """Send every log line of the process, libraries' included, to stderr as JSON or text."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    encode = json.JSONEncoder(default=repr).encode
    render = (
        structlog.processors.JSONRenderer(serializer=lambda event, **_: encode(event))
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, render],
        logger_factory=Lines,
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # arq logs arguments and results at INFO; uvicorn the query of a WebSocket, and at DEBUG all its headers, among them
    # keys and tickets. None of that is ours to show.
    for name in ("arq", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
