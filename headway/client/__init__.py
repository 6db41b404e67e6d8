"""The client: submit jobs, follow them, move files.

async with Client.from_environment() as client:
    job = await client.submit("demo.countdown", {"seconds": 5})
    job = await client.wait(job["id"])
"""

from typing import TYPE_CHECKING, Any

from headway.client.errors import (
    ApiError,
    ClientError,
    ConnectionFailed,
    InvalidRequest,
    NotConfigured,
    NotFound,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from headway.client.http import Client

__all__ = [
    "ApiError",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "InvalidRequest",
    "NotConfigured",
    "NotFound",
    "Unauthenticated",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    # httpx takes longer to import than `headway --help` may take.
    if name == "Client":
        from headway.client.http import Client  # noqa: PLC0415

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
