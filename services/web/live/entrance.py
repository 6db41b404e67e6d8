"""Who may connect: programs with a key, browsers with a ticket from a page that is known. No cookie counts."""

from collections.abc import Mapping
from typing import Any

from headway.errors import OriginRefused
from services.web.api.auth import Principal, bearer
from services.web.api.origins import is_permitted
from services.web.app import App

TICKET = "ticket."


async def enter(app: App, scope: Mapping[str, Any]) -> Principal:
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
