"""Who calls: API keys from the Authorization header."""

import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from headway import keys
from headway.errors import Unauthenticated
from headway.store import Store

# A revoked key works no longer than this.
REMEMBERED = 5.0
MOST_REMEMBERED = 10_000

REFUSAL = "Send `Authorization: Bearer hw_live_…` with a key that is neither revoked nor expired."


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request or a session acts for: the tenant, the key it came with, and what it may do.

    `user` is the name that others in a room see. `jobs` and `rooms` are what may be followed and joined; None is all of
    the tenant's.
    """

    tenant_id: UUID
    key_id: str
    user: str
    jobs: frozenset[UUID] | None = None
    rooms: frozenset[str] | None = None
    publish: bool = True


class Keyring:
    """Checks keys against the store and remembers those that hold for a few seconds."""

    def __init__(self, store: Store, pepper: str) -> None:
        self._store = store
        self._pepper = pepper
        # By the hash of the key: what is remembered must not be worth stealing.
        self._known: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()

    async def authenticate(self, text: str) -> Principal:
        """The principal of a key. Raises Unauthenticated, with one message for every reason."""
        name = sha256(text.encode()).digest()
        known = self._known.get(name)
        if known is not None and time.monotonic() < known[0]:
            return known[1]
        self._known.pop(name, None)
        asked = time.monotonic()
        principal = await self._look_up(text)
        self._known[name] = (asked + REMEMBERED, principal)
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        return principal

    async def _look_up(self, text: str) -> Principal:
        key = keys.parse(text)
        row = await self._store.get_key(key.id) if key else None
        if key is None or row is None or not hmac.compare_digest(row[1], key.digest(self._pepper)):
            raise Unauthenticated(REFUSAL)
        return Principal(row[0], key.id, row[2])


def bearer(header: str) -> str:
    """The token of an `Authorization: Bearer TOKEN` header; empty if it is something else."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
