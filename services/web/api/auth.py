"""Who calls: API keys from the Authorization header, and what whoever holds one may do."""

import hmac
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from headway import keys
from headway.errors import Unauthenticated
from headway.rooms import job_of
from headway.store import Store
from headway.store.batch import Batch

# A revoked key works no longer than this.
REMEMBERED = 5.0
MOST_REMEMBERED = 10_000

REFUSAL = "Send `Authorization: Bearer hw_live_…` with a key that is neither revoked nor expired."


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant that a request acts for, the key it came with, and what it may do.

    `user` is the name that others see in rooms. `jobs` and `rooms` are those that a ticket is limited to; None is no
    limit. Without `publish` it only reads.
    """

    tenant_id: UUID
    key_id: str
    user: str
    jobs: frozenset[UUID] | None = None
    rooms: frozenset[str] | None = None
    publish: bool = True

    def may_follow(self, job_id: UUID) -> bool:
        return self.jobs is None or job_id in self.jobs

    def may_join(self, room: str) -> bool:
        """Whether the room is among those that are permitted, and, if it is a job's, that job as well."""
        job_id = job_of(room)
        return (self.rooms is None or room in self.rooms) and (job_id is None or self.may_follow(job_id))


class Keyring:
    """Checks keys against the store, remembers those that hold for a few seconds."""

    def __init__(self, store: Store, pepper: str) -> None:
        self._store = store
        self._pepper = pepper
        # By the hash of the key: what is remembered must not be worth stealing.
        self._known: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        # Many tickets are shown at once after a deploy: their keys share a query.
        self._lives: Batch[str, bool] = Batch(self._live, most=1000)

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

    async def lives(self, key_id: str) -> bool:
        """Whether a key is neither revoked nor expired at this moment."""
        return await self._lives(key_id)

    async def _look_up(self, text: str) -> Principal:
        key = keys.parse(text)
        live = (await self._store.live_keys([key.id])).get(key.id) if key else None
        if key is None or live is None or not hmac.compare_digest(live.digest, key.digest(self._pepper)):
            raise Unauthenticated(REFUSAL)
        return Principal(live.tenant_id, live.id, live.name)

    async def _live(self, ids: Sequence[str]) -> list[bool]:
        live = await self._store.live_keys(list(set(ids)))
        return [key_id in live for key_id in ids]


def bearer(header: str) -> str:
    """The token of an `Authorization: Bearer TOKEN` header; empty if it is something else."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
