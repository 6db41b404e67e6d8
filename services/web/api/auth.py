"""Who calls: API keys from the Authorization header."""

import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from uuid import UUID

from django.http import HttpRequest
from ninja.security import HttpBearer

from headway import keys
from headway.errors import Unauthenticated
from headway.store import Store

# A revoked key works no longer than this.
REMEMBERED = 5.0
MOST_REMEMBERED = 10_000

REFUSAL = "Send `Authorization: Bearer hw_live_…` with a key that is neither revoked nor expired."


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant that a request acts for, and the key it came with."""

    tenant_id: UUID
    key_id: str


class Keyring:
    """Checks keys against the store and remembers the answer for a few seconds."""

    def __init__(self, store: Store, pepper: str) -> None:
        self._store = store
        self._pepper = pepper
        self._known: OrderedDict[str, tuple[float, UUID, bytes]] = OrderedDict()

    async def authenticate(self, text: str) -> Principal:
        """The principal of a key. Raises Unauthenticated, with one message for every reason."""
        key = keys.parse(text)
        if key is None:
            raise Unauthenticated(REFUSAL)
        known = self._known.get(key.id)
        if known is None or known[0] < time.monotonic():
            row = await self._store.get_key(key.id)
            if row is None:
                self._known.pop(key.id, None)
                raise Unauthenticated(REFUSAL)
            known = (time.monotonic() + REMEMBERED, *row)
            self._known[key.id] = known
            if len(self._known) > MOST_REMEMBERED:
                self._known.popitem(last=False)
        if not hmac.compare_digest(known[2], key.digest(self._pepper)):
            raise Unauthenticated(REFUSAL)
        return Principal(known[1], key.id)


class Bearer(HttpBearer):
    """django-ninja's hook: sets `request.auth` to the Principal."""

    async def authenticate(self, request: HttpRequest, token: str) -> Principal:
        return await request.app.keyring.authenticate(token)  # type: ignore[attr-defined,no-any-return]
