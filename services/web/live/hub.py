"""The hub: one connection to Redis a process, and one subscription a topic, however many listen.

Topics are groups of the channel layer. Their Redis channels are subscribed to here directly: a subscription is
acknowledged that way, and a connection that was lost is noticed. What comes is a hint; Postgres has the record.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from headway import metrics
from headway.events import CHANNEL, EVERYONE, Layer

# Redis is asked for a sign of life when it was silent this long, and taken for lost after SILENCE.
BEAT = 1.0
SILENCE = 5.0
# How long a new listener waits for Redis to acknowledge its topics.
ACKNOWLEDGED_WITHIN = 3.0
LONGEST_PAUSE = 1.0
# Messages after which others get their turn: the writers of those who listen, above all.
TURN = 50
AT_ONCE = 1000

log = structlog.get_logger(__name__)


class Listener(Protocol):
    """Whoever joins topics."""

    def hear(self, message: Any) -> None:
        """Called for each message of its topics, in order. Must not block."""


class Hub:
    """Spreads what Redis brings among the listeners of this process.

    `decode` makes of a message what listeners hear. `restored` are called when messages may have been lost, and all
    topics are heard again.
    """

    def __init__(self, redis_url: str, layer: Layer, decode: Callable[[dict[str, Any]], Any]) -> None:
        self._redis = Redis.from_url(redis_url, socket_connect_timeout=1, socket_timeout=5)
        self._layer = layer
        self._decode = decode
        self._listeners: dict[str, set[Listener]] = {}
        self._asked: set[str] = set()
        self._acknowledged: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}
        self._changed: set[str] = set()
        self._change = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._expected = 0
        self.away = False
        self.restored: list[Callable[[], None]] = []

    async def join(self, *pairs: tuple[Listener, str]) -> bool:
        """Let each listener hear its topic from now on: True once Redis has acknowledged all of them.

        False if it does not answer in time; `restored` are called once they are heard.
        """
        for listener, topic in pairs:
            if topic not in self._listeners:
                self._listeners[topic] = set()
                self._note(topic)
            self._listeners[topic].add(listener)
        unheard = [topic for _, topic in pairs if topic not in self._acknowledged]
        if not unheard:
            return True
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        if self.away:
            return False
        events = [self._waiting.setdefault(topic, asyncio.Event()) for topic in unheard]
        try:
            async with asyncio.timeout(ACKNOWLEDGED_WITHIN):
                for event in events:
                    await event.wait()
        except TimeoutError:
            log.warning("Redis has not acknowledged a subscription", topics=len(unheard))
            return False
        return all(topic in self._acknowledged for topic in unheard)

    def leave(self, listener: Listener, topic: str) -> None:
        """Let a listener hear a topic no longer."""
        listeners = self._listeners.get(topic)
        if listeners is None:
            return
        listeners.discard(listener)
        if not listeners:
            del self._listeners[topic]
            self._note(topic)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._redis.aclose()

    def _note(self, topic: str) -> None:
        """A topic has got its first listener, or lost its last."""
        self._changed.add(topic)
        self._change.set()
        metrics.live_topics.set(len(self._listeners))

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                async with self._redis.pubsub() as connection, asyncio.TaskGroup() as both:
                    await self._begin(connection)
                    pause = 0.05
                    both.create_task(self._read(connection))
                    both.create_task(self._follow_changes(connection))
            except* (RedisError, OSError) as errors:
                if not self.away:
                    log.warning("no live events from Redis; Postgres is read instead", error=repr(errors.exceptions[0]))
            except* Exception:
                metrics.errors_caught.labels("hub").inc()
                log.exception("the connection to Redis failed; making a new one")
            self.away = True
            metrics.live_losses.inc()
            self._acknowledged.clear()
            # Whoever waits is told that it waits in vain.
            for event in self._waiting.values():
                event.set()
            self._waiting.clear()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _begin(self, connection: PubSub) -> None:
        self._changed.clear()
        topics = [EVERYONE, *self._listeners]
        self._asked = set(topics)
        self._expected = len(topics)
        for first in range(0, len(topics), AT_ONCE):
            await connection.subscribe(*(CHANNEL + topic for topic in topics[first : first + AT_ONCE]))

    async def _follow_changes(self, connection: PubSub) -> None:
        """Subscribe to topics that got listeners, and unsubscribe from those that lost them."""
        while True:
            await self._change.wait()
            self._change.clear()
            changed, self._changed = self._changed, set()
            new = [topic for topic in changed if topic in self._listeners and topic not in self._asked]
            gone = [topic for topic in changed if topic not in self._listeners and topic in self._asked]
            self._asked.update(new)
            self._asked.difference_update(gone)
            self._acknowledged.difference_update(gone)
            for first in range(0, len(new), AT_ONCE):
                await connection.subscribe(*(CHANNEL + topic for topic in new[first : first + AT_ONCE]))
            if gone:
                await connection.unsubscribe(*(CHANNEL + topic for topic in gone))

    async def _read(self, connection: PubSub) -> None:
        loop = asyncio.get_running_loop()
        heard, turn = loop.time(), 0
        prefix = len(CHANNEL)
        while True:
            message = await connection.parse_response(block=False, timeout=BEAT)
            if message is None:
                if loop.time() - heard > SILENCE:
                    raise ConnectionError(f"Redis has said nothing for {SILENCE:.0f} seconds.")
                await connection.ping()
                continue
            heard = loop.time()
            if message[0] == b"message":
                self._spread(message[1][prefix:].decode(), message[2])
                turn += 1
                if turn % TURN == 0:
                    await asyncio.sleep(0)
            elif message[0] == b"subscribe":
                self._acknowledge(message[1][prefix:].decode())

    def _acknowledge(self, topic: str) -> None:
        if topic in self._asked:
            self._acknowledged.add(topic)
        if (event := self._waiting.pop(topic, None)) is not None:
            event.set()
        if self._expected:
            self._expected -= 1
            if not self._expected:
                self.away = False
                self._tell_restored()

    def _tell_restored(self) -> None:
        for tell in self.restored:
            tell()

    def _spread(self, topic: str, data: bytes) -> None:
        if topic == EVERYONE:
            self._tell_restored()
            return
        listeners = self._listeners.get(topic)
        if not listeners:
            return
        try:
            message = self._decode(self._layer.deserialize(data))
        except Exception:
            metrics.errors_caught.labels("hub").inc()
            log.exception("a live event cannot be read; the record has it")
            return
        for listener in tuple(listeners):
            try:
                listener.hear(message)
            except Exception:
                metrics.errors_caught.labels("hub").inc()
                log.exception("a listener failed")
