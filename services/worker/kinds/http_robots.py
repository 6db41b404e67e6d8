"""robots.txt as RFC 9309 has it: what a host asks programs to leave alone."""

import asyncio
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote_to_bytes

from yarl import URL

from headway.fetching.fetcher import Fetcher
from headway.fetching.requests import Request

# By this name a file may speak of us; by `*` it speaks of all.
AGENT = "headway"
MOST_BYTES = 512 << 10
# Of all rules that are remembered, by their length.
REMEMBERED = 16 << 20
LONGEST_RULE = 2048
# What comes out the same whether it is escaped or not.
SAFE = "/?=&*$:@!'(),;+~-._"


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a file that are for us: each allows or forbids the paths that begin like it."""

    rules: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Rules":
        """Those of the groups that name us, or where none does, of those for all."""
        groups: dict[str, list[tuple[str, bool]]] = {}
        agents: list[str] = []
        naming = False
        for line in text.lstrip("\ufeff").splitlines():
            field, colon, value = line.partition("#")[0].partition(":")
            field, value = field.strip().lower(), value.strip()
            if not colon or field not in ("user-agent", "allow", "disallow"):
                continue
            if field == "user-agent":
                agents = [*agents, _product(value)] if naming else [_product(value)]
                naming = True
                groups.setdefault(agents[-1], [])
                continue
            naming = False
            if value and len(value) <= LONGEST_RULE:
                for agent in set(agents) & {AGENT, "*"}:
                    groups[agent].append((_written(value), field == "allow"))
        return cls(tuple(groups.get(AGENT, groups.get("*", []))))

    @property
    def size(self) -> int:
        return 100 + sum(100 + len(rule) for rule, _ in self.rules)

    def allow(self, path: str) -> bool:
        """Whether a path, with its query, may be asked for. The longest rule decides, and of two that allows."""
        path = _written(path)
        longest, allowed = -1, True
        for rule, allows in self.rules:
            if len(rule) < longest or (len(rule) == longest and allowed) or not _fits(rule, path):
                continue
            longest, allowed = len(rule), allows
        return allowed


ALL, NOTHING = Rules(), Rules((("/", False),))


class Robots:
    """The rules of each origin, asked for once and remembered as far as there is room."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = replace(fetcher, kept="archive", max_bytes=MOST_BYTES)
        self._rules: OrderedDict[str, asyncio.Future[Rules]] = OrderedDict()
        self._size = 0

    async def allow(self, url: str) -> bool:
        """Whether a URL may be asked for. One that is no URL may: what is wrong with it is for others to say."""
        try:
            target = URL(url)
            origin = str(target.origin())
        except ValueError:
            return True
        if (known := self._rules.get(origin)) is not None:
            # Whoever waits may be cancelled; the others go on to wait.
            return (await asyncio.shield(known)).allow(target.raw_path_qs)
        asking = self._rules[origin] = asyncio.get_running_loop().create_future()
        try:
            rules = await self._ask(origin)
        except asyncio.CancelledError:
            # The job ends, and with it whoever waits for this.
            asking.cancel()
            raise
        asking.set_result(rules)
        self._size += rules.size
        while self._size > REMEMBERED:
            oldest = next((name for name, found in self._rules.items() if found.done()), None)
            if oldest is None:
                break
            self._size -= self._rules.pop(oldest).result().size
        return rules.allow(target.raw_path_qs)

    async def _ask(self, origin: str) -> Rules:
        record = await self._fetcher.fetch(Request(0, f"{origin}/robots.txt"))
        if record["error"] is None and record["status"] < 300:
            return Rules.parse(record["body"].decode(errors="replace"))
        # A host that has no such file asks for nothing; one that cannot say is to be left alone.
        unknown = record["error"] is not None or record["status"] >= 500
        return NOTHING if unknown else ALL


def _product(value: str) -> str:
    """The name at the front of an agent, without its version."""
    match = re.match(r"\*|[A-Za-z_-]+", value)
    return match[0].lower() if match else ""


def _written(path: str) -> str:
    return quote(unquote_to_bytes(path), safe=SAFE)


def _fits(rule: str, path: str) -> bool:
    """Whether the path begins like the rule, in which `*` is anything and `$` at its end is the end."""
    ends = rule.endswith("$")
    first, *rest = rule.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    place = len(first)
    if not rest:
        return not ends or place == len(path)
    *middle, last = rest
    for piece in middle:
        found = path.find(piece, place)
        if found < 0:
            return False
        place = found + len(piece)
    if ends:
        return len(path) - len(last) >= place and path.endswith(last)
    return path.find(last, place) >= 0
