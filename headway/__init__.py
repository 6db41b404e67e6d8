"""Headway: long jobs over HTTP, with progress you can trust.

The names here are those that job authors use.
"""

from typing import TYPE_CHECKING, Any

from headway.errors import Fatal, LeaseLost, Retry
from headway.job import Child, ChildEnding, Progress

if TYPE_CHECKING:
    from headway.blocking import SyncJobContext
    from headway.context import JobContext
    from headway.kinds import kind
    from headway.startup import on_startup

__all__ = [
    "Child",
    "ChildEnding",
    "Fatal",
    "JobContext",
    "LeaseLost",
    "Progress",
    "Retry",
    "SyncJobContext",
    "kind",
    "on_startup",
]


def __getattr__(name: str) -> Any:
    # The CLI and the client need no pydantic, which takes longer to import than they take to run.
    if name in __all__:
        from headway import kinds, startup  # noqa: PLC0415

        return getattr(startup if name == "on_startup" else kinds, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
