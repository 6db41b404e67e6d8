"""`/ws-tickets`: what lets a browser connect, which can send no header. One use, within seconds, from one origin."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Annotated
from uuid import UUID

import structlog
from django.http import HttpResponse
from ninja import Field, Router, Schema
from pydantic import AfterValidator, ConfigDict
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headway.errors import InvalidRequest, OriginRefused, TicketRefused, Unavailable
from headway.job import timestamp
from headway.rooms import ROOM_NAME
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.auth import Keyring, Principal
from services.web.api.origins import is_permitted, own_origin
from services.web.api.request import ApiRequest

LIFE = timedelta(seconds=30)
PREFIX = "headway:ticket:"
MOST_NAMED = 256
# Tickets that are issued or redeemed at the same time; more take turns, and not as many connections.
AT_ONCE = 8
# Seconds that Redis is waited for.
PATIENCE = 3.0

REFUSAL = "The ticket was used before, has expired or was never issued; get a new one from POST /api/v1/ws-tickets."

router = Router(tags=["live"])
log = structlog.get_logger(__name__)


class Tickets:
    """Issues and redeems tickets. Redis has the hash of each, and forgets it when it is used or has expired."""

    def __init__(self, redis: Redis, keyring: Keyring) -> None:
        self._redis = redis
        self._keyring = keyring
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def issue(self, principal: Principal, origin: str) -> tuple[str, datetime]:
        """A ticket that pages of `origin` may connect with as `principal`, and when it expires. Raises Unavailable."""
        ticket = secrets.token_urlsafe(32)
        kept = json.dumps(
            {
                "tenant": str(principal.tenant_id),
                "key": principal.key_id,
                "user": principal.user,
                "jobs": None if principal.jobs is None else [str(job_id) for job_id in principal.jobs],
                "rooms": None if principal.rooms is None else list(principal.rooms),
                "publish": principal.publish,
                "origin": origin,
            }
        )
        async with self._reached(), self._redis.pipeline(transaction=False) as pipe:
            pipe.set(_name(ticket), kept, ex=LIFE)
            # Redis makes it expire, so its clock tells when.
            pipe.time()
            _, (second, _) = await pipe.execute()
        return ticket, datetime.fromtimestamp(second, UTC) + LIFE

    async def redeem(self, ticket: str, origin: str | None, *, own: str | None) -> Principal:
        """Whoever the ticket was issued for; it holds no more. `own` is the service's own origin.

        A page of the service itself sends no Origin with a plain GET, so that `None` stands for `own` there: pass `own`
        as None where browsers always send one. Raises TicketRefused, OriginRefused or Unavailable.
        """
        async with self._reached():
            kept = await self._redis.getdel(_name(ticket))
        if kept is None:
            raise TicketRefused(REFUSAL)
        said = json.loads(kept)
        if (origin or own) != said["origin"]:
            raise OriginRefused(
                "The ticket was for pages of another origin, and holds no more. Get one for this origin."
            )
        if not await self._keyring.lives(said["key"]):
            raise TicketRefused("The key that the ticket was issued with has been revoked, or has expired.")
        return Principal(
            tenant_id=UUID(said["tenant"]),
            key_id=said["key"],
            user=said["user"],
            jobs=None if said["jobs"] is None else frozenset(map(UUID, said["jobs"])),
            rooms=None if said["rooms"] is None else frozenset(said["rooms"]),
            publish=said["publish"],
        )

    @asynccontextmanager
    async def _reached(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(PATIENCE), self._turns:
                yield
        except (RedisError, OSError) as error:
            log.warning("tickets are not available: Redis does not answer", error=repr(error))
            raise Unavailable("Redis cannot be reached, which keeps the tickets. Try again.") from None


def _name(ticket: str) -> str:
    return PREFIX + sha256(ticket.encode(errors="replace")).hexdigest()


def shown(name: str) -> str:
    """Refuses a name that is not what it looks like. Raises ValueError."""
    if name != name.strip() or not name.isprintable():
        raise ValueError("a name has visible characters only, and no space at either end")
    return name


class NewTicket(Schema):
    """Who is to connect, from where, and what they may do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    origin: str = Field(
        max_length=300,
        description="Origin of the page that will connect: the service's own, or one of `HEADWAY_ORIGINS`.",
        examples=["http://127.0.0.1:8000"],
    )
    user: Annotated[str, AfterValidator(shown)] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Name that others in a room see; the key's own if left out.",
        examples=["ada"],
    )
    jobs: list[Annotated[UUID, Field(strict=False)]] | None = Field(
        default=None, max_length=MOST_NAMED, description="The only jobs that may be followed; all if left out."
    )
    rooms: list[Annotated[str, Field(pattern=ROOM_NAME)]] | None = Field(
        default=None, max_length=MOST_NAMED, description="The only rooms that may be joined; all if left out."
    )
    publish: bool = Field(default=True, description="Whether messages may be sent to rooms.")


@router.post("", summary="Get a ticket for a browser", response={201: schemas.Ticket})
async def issue_ticket(request: ApiRequest, wanted: NewTicket) -> HttpResponse:
    """A ticket opens one WebSocket or event stream, within 30 seconds, from a page of `origin`.

    The page sends it as a subprotocol: `new WebSocket(url, ["jobs.v1", "ticket." + ticket])`, or as `?ticket=` to an
    EventSource.
    """
    request.only()
    app = request.app
    headers = {"host": request.META.get("HTTP_HOST", "")}
    if not is_permitted(wanted.origin, request.scheme or "", headers, app.settings):
        own = own_origin(request.scheme or "", headers["host"], app.settings.allowed_hosts)
        why = f"neither the service's own origin{f', {own},' if own else ''} nor listed in HEADWAY_ORIGINS"
        raise InvalidRequest(f"origin: {why}.", errors=[{"field": "origin", "message": why}])
    auth = request.auth
    principal = Principal(
        tenant_id=auth.tenant_id,
        key_id=auth.key_id,
        user=wanted.user or auth.user,
        jobs=None if wanted.jobs is None else frozenset(wanted.jobs),
        rooms=None if wanted.rooms is None else frozenset(wanted.rooms),
        publish=wanted.publish,
    )
    ticket, expires_at = await app.tickets.issue(principal, wanted.origin)
    return answer({"ticket": ticket, "expires_at": timestamp(expires_at)}, 201, {"Cache-Control": "no-store"})
