"""What a client can raise.

ClientError
├── NotConfigured        no URL or no API key was given
├── CannotBeSent         what was given is no JSON, or has characters that a header or a URL cannot have
├── ConnectionFailed     no answer, or one that broke off
└── ApiError             the server refused
    ├── Unauthenticated  401
    ├── NotFound         404
    ├── InvalidRequest   422
    └── Unavailable      503
"""

from collections.abc import Mapping, Sequence
from typing import Any

from headway.errors import HeadwayError


class ClientError(HeadwayError):
    """The root; raised itself when a file is not what it should be."""


class NotConfigured(ClientError):
    """There is no URL or no API key to work with; the message says where they are looked for."""


class CannotBeSent(ClientError):
    """What was given is no JSON, such as infinity, or has characters that a header or a URL cannot have."""


class ConnectionFailed(ClientError):
    """The server cannot be reached, or the connection broke."""


class ApiError(ClientError):
    """The server refused. `detail` says what to do; `errors` lists the fields that are wrong.

    `status` is the HTTP status, or the code that a WebSocket was closed with; `type` is the problem's URN.
    """

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        type: str = "about:blank",
        title: str = "",
        errors: Sequence[Mapping[str, Any]] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.type = type
        self.title = title
        self.errors = errors
        self.retry_after = retry_after


class Unauthenticated(ApiError):
    """The API key is missing, wrong, revoked or expired."""


class NotFound(ApiError):
    """There is nothing under this id or name, or it belongs to another tenant."""


class InvalidRequest(ApiError):
    """Some fields are wrong: `errors` lists each."""


class Unavailable(ApiError):
    """The server cannot do this right now. Whether the request was done is not known."""


BY_STATUS: dict[int, type[ApiError]] = {401: Unauthenticated, 404: NotFound, 422: InvalidRequest, 503: Unavailable}
