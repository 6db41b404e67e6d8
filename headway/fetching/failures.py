"""Why a URL has no usable answer, in words that never change."""

import os

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError

from headway.addresses import AddressRefused


class FetchError(Exception):
    """Why a URL has no usable answer, as its line says it."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type

    def as_json(self) -> dict[str, str]:
        return {"type": self.type, "message": str(self)}


def explain(error: Exception) -> FetchError:  # noqa: PLR0911 - a table with an order
    """The error in stable words. None of them tells what a name resolved to."""
    match error:
        case FetchError():
            return error
        case aiohttp.ClientConnectorError(os_error=AddressRefused()):
            return FetchError("refused-address", "The address is not public, so it is not fetched.")
        case aiohttp.ClientConnectorDNSError():
            return FetchError("dns", "The host name could not be resolved.")
        case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
            return FetchError("tls", f"The certificate was refused: {getattr(cause, 'verify_message', 'invalid')}.")
        case aiohttp.ClientSSLError():
            return FetchError("tls", "The server does not speak TLS as it should.")
        case aiohttp.ClientConnectorError(os_error=cause):
            return FetchError(
                "connect", f"No connection: {os.strerror(cause.errno) if cause.errno else 'no reason known'}."
            )
        case TimeoutError():
            return FetchError("timeout", "Not finished in the time that it has.")
        case aiohttp.InvalidURL():
            return FetchError("invalid-url", "The URL cannot be asked for.")
        case aiohttp.ClientPayloadError() if isinstance(error.__cause__, ContentEncodingError):
            return FetchError("decode", "The body is not compressed as its headers say.")
        case aiohttp.ClientResponseError():
            return FetchError("bad-response", "The answer is not valid HTTP.")
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            return FetchError("disconnected", "The connection ended before the answer was complete.")
    return FetchError("internal", "Something broke here; the log has the details.")
