"""Who is in a room: entries in Redis that the process of each socket renews, and that lapse when it dies.

A sorted set for each room has an entry `socket|name` with the second, on Redis' clock, at which it was renewed. All of
it may vanish: the next renewal brings it back.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headway import metrics
from headway.errors import Unavailable

# Seconds.
LIVES = 30
PATIENCE = 3.0
MOST_SHOWN = 1000
# A thousand sockets that open or close at once take turns, and not as many connections.
AT_ONCE = 8

# The names whose entries hold, each once.
NAMES = """
local now = tonumber(redis.call('TIME')[1])
local names, seen = {}, {}
local function read()
    for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], '+inf')) do
        local name = string.sub(entry, string.find(entry, '|', 1, true) + 1)
        if not seen[name] then
            seen[name] = true
            names[#names + 1] = name
        end
    end
end
"""
# ARGV: seconds that an entry holds
READ = f"{NAMES} read() return names"
# Renew entries and drop those that have lapsed: the names that are left, and those that thereby went.
# ARGV: seconds that an entry holds, entries
RENEW = f"""
{NAMES}
for place = 2, #ARGV do
    redis.call('ZADD', KEYS[1], now, ARGV[place])
end
redis.call('EXPIRE', KEYS[1], 2 * ARGV[1])
read()
local lapsed, gone = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now - ARGV[1])), {{}}
for _, entry in ipairs(lapsed) do
    redis.call('ZREM', KEYS[1], entry)
    local name = string.sub(entry, string.find(entry, '|', 1, true) + 1)
    if not seen[name] then
        gone[#gone + 1] = name
    end
end
return {{names, gone}}
"""
# Drop an entry; the names that are left. ARGV: seconds that an entry holds, the entry
LEAVE = f"""
{NAMES}
redis.call('ZREM', KEYS[1], ARGV[2])
read()
return names
"""

log = structlog.get_logger(__name__)

Place = tuple[UUID, str]
# For each room the names that are in it, and those that have lapsed.
Seen = dict[Place, tuple[set[str], set[str]]]


class Presence:
    """The entries of all rooms, by tenant and room."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._read = redis.register_script(READ)
        self._renew = redis.register_script(RENEW)
        self._leave = redis.register_script(LEAVE)
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def here(self, tenant_id: UUID, room: str) -> list[str]:
        """The names of those who are in a room, in alphabetical order, 1,000 at most. Raises Unavailable."""
        try:
            async with asyncio.timeout(PATIENCE), self._turns:
                names = await self._read(keys=[_key((tenant_id, room))], args=[LIVES])
        except (RedisError, OSError) as error:
            log.warning("who is in a room is not known: Redis does not answer", error=repr(error))
            raise Unavailable("Redis cannot be reached, which knows who is in a room. Try again.") from None
        return shown(_decoded(names))

    async def renew(self, entries: Mapping[Place, Sequence[tuple[UUID, str]]]) -> Seen:
        """Renew the sockets and names in each room, and see who is there. While Redis is away the answer is empty."""
        places = list(entries)
        if not places:
            return {}
        try:
            async with asyncio.timeout(PATIENCE), self._turns, self._redis.pipeline(transaction=False) as pipe:
                for place in places:
                    members = [_entry(*entry) for entry in entries[place]]
                    await self._renew(keys=[_key(place)], args=[LIVES, *members], client=pipe)
                answers = await pipe.execute()
        except (RedisError, OSError) as error:
            metrics.presence_failures.inc()
            log.warning("who is in rooms was not renewed; the next time follows", error=repr(error))
            return {}
        return {place: (_decoded(names), _decoded(gone)) for place, (names, gone) in zip(places, answers, strict=True)}

    async def leave(self, place: Place, socket: UUID, name: str) -> bool:
        """A socket leaves a room. Whether the name is still there, by another socket, as far as Redis is."""
        try:
            async with asyncio.timeout(PATIENCE), self._turns:
                names = await self._leave(keys=[_key(place)], args=[LIVES, _entry(socket, name)])
        except (RedisError, OSError) as error:
            metrics.presence_failures.inc()
            log.warning("Redis was not told that someone left a room; the entry lapses", error=repr(error))
            return False
        return name in _decoded(names)


def shown(names: Collection[str]) -> list[str]:
    """What is shown of the names in a room."""
    return sorted(names)[:MOST_SHOWN]


def _key(place: Place) -> str:
    return f"headway:here:{place[0]}:{place[1]}"


def _entry(socket: UUID, name: str) -> str:
    return f"{socket}|{name}"


def _decoded(names: Sequence[bytes]) -> set[str]:
    return {name.decode() for name in names}
