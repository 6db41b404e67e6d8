"""Structured logs: one line an event, with request, job and attempt ids from the context they happen in."""

import logging
import sys

import structlog
from structlog.typing import Processor

from headway.settings import Settings


def configure(settings: Settings, service: str) -> None:
    """Send every log line of the process, libraries' included, to stderr as JSON or text."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    as_json = settings.log_format == "json"
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer()
                if as_json
                else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    # arq logs arguments and results at INFO, asyncio its slow callbacks; neither is ours to show.
    logging.getLogger("arq").setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(service=service)
