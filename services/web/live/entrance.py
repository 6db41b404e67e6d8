"""Who may connect: programs with a key, browsers with a ticket from a page that is known. No cookie counts."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headway.errors import OriginRefused
from services.web.api.auth import Principal, bearer
from services.web.api.origins import is_permitted, own_origin
from services.web.api.request import ApiRequest

if TYPE_CHECKING:
    from services.web.app import App

TICKET = "ticket."
# The paths at which a ticket in the query opens a stream, and nothing else: an EventSource can send no header.
STREAMS = re.compile(r"/api/v1/(?:jobs/[^/]+/)?events")
EVENT_STREAM = "text/event-stream"


async def enter(app: "App", scope: Mapping[str, Any]) -> Principal:
    """Who opens this WebSocket.

    An Origin is needed with a ticket, and must be the ticket's own; with a key it may be missing, but not be foreign.
    Raises Unauthenticated, TicketRefused, OriginRefused or Unavailable.
    """
    headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
    origin = headers.get("origin")
    if "authorization" not in headers:
        for protocol in scope["subprotocols"]:
            if protocol.startswith(TICKET):
                return await app.tickets.redeem(protocol.removeprefix(TICKET), origin, own=None)
    if origin is not None and not is_permitted(origin, scope["scheme"], headers, app.settings):
        raise OriginRefused("Pages of this origin may not connect; HEADWAY_ORIGINS lists those that may.")
    return await app.keyring.authenticate(bearer(headers.get("authorization", "")))


def has_ticket(request: ApiRequest) -> bool:
    """Whether the request opens a stream, and shows a ticket in place of a key."""
    return (
        "ticket" in request.GET
        and "HTTP_AUTHORIZATION" not in request.META
        and request.method == "GET"
        and STREAMS.fullmatch(request.path_info) is not None
        and EVENT_STREAM in request.META.get("HTTP_ACCEPT", "")
    )


async def enter_stream(request: ApiRequest) -> Principal:
    """Who opens this stream. Raises TicketRefused, OriginRefused or Unavailable."""
    settings = request.app.settings
    own = own_origin(request.scheme or "", request.META.get("HTTP_HOST", ""), settings.allowed_hosts)
    return await request.app.tickets.redeem(request.GET["ticket"], request.META.get("HTTP_ORIGIN"), own=own)
