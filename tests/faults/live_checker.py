"""What clients of the live stream hold, and what must hold of it. Knows the protocol, and nothing of the server.

A client puts what it receives into a `Received`, which outlives its connections. What is wrong in itself is noted at
once: an envelope out of turn, another content than someone else was sent, a version that goes back. At the end `check`
compares all of it with the `Truth`, the record as it stands then. All that is wrong is in `Checker.violations`.
"""

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Frame = dict[str, Any]
Version = tuple[int, int]

ENVELOPES = ("snapshot", "state", "log", "progress")
OTHERS = ("welcome", "ack", "error", "hb", "bye", "resync", "message", "presence")
# Those that everyone is sent alike.
SHARED = ("state", "log", "progress", "message")
TERMINAL = ("succeeded", "failed", "cancelled")
# The subscription of a job by its id; sets have names.
ALONE = ""
MOST_NOTED = 1000
DECODER = json.JSONDecoder()


@dataclass
class Truth:
    """The record: each job's tenant, its events as (type, data) by seq, and what was said in rooms by seq."""

    tenants: Mapping[str, str]
    events: Mapping[str, Mapping[int, tuple[str, Any]]]
    rooms: Mapping[tuple[str, str], Mapping[int, Any]] = field(default_factory=dict)

    def end(self, job: str) -> int:
        """The seq of the terminal event; 0 if there is none."""
        ends = [seq for seq, (type, data) in self.events[job].items() if type == "state" and data["state"] in TERMINAL]
        return max(ends, default=0)

    def state(self, job: str, seq: int) -> str:
        """The state after the event of this seq."""
        states = [at for at, (type, _) in self.events[job].items() if type == "state" and at <= seq]
        return str(self.events[job][max(states)][1]["state"]) if states else ""


class Checker:
    """All clients of one run, what they were told alike, and what was wrong."""

    def __init__(self, *, resets: Collection[str] = ()) -> None:
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        # The content of every event and message that anyone was sent.
        self.said: dict[tuple[Any, ...], str] = {}
        # Reasons for which a client may be told that what it holds is void.
        self.resets = resets
        self._clients: list[Received] = []

    def client(self, name: str, tenant: str) -> "Received":
        client = Received(self, name, tenant)
        self._clients.append(client)
        return client

    def note(self, violation: str) -> None:
        self.counts["violations"] += 1
        if len(self.violations) < MOST_NOTED:
            self.violations.append(violation)

    def agree(self, who: str, what: tuple[Any, ...], content: str) -> None:
        """Everyone is sent the same bytes."""
        if self.said.setdefault(what, content) != content:
            self.note(f"{who} was sent {content[:200]} as {what}, and others {self.said[what][:200]}")

    def check(self, truth: Truth) -> list[str]:
        """Compare what everyone holds with the record; all violations."""
        for what, content in self.said.items():
            for violation in _contents(what, json.loads(content), truth):
                self.note(violation)
        for client in self._clients:
            for violation in (*_jobs(client, truth), *_rooms(client, truth)):
                self.note(violation)
        for place, messages in truth.rooms.items():
            if sorted(messages) != list(range(1, len(messages) + 1)):
                self.note(f"room {place} has messages {sorted(messages)[:20]} …: they are not numbered from 1")
        return self.violations


class Slice:
    """One job in one subscription: what was received since the last snapshot, or since the client was reset."""

    __slots__ = ("began", "chain", "durable", "epoch", "held", "linked", "resumed")

    def __init__(self, epoch: int, began: int) -> None:
        self.epoch = epoch
        self.began = began
        self.held = began
        self.durable = array("Q")
        # The last envelope of this connection, and whether there was one.
        self.chain: int | None = None
        self.linked = False
        # Whether nothing new came on this connection yet.
        self.resumed = False


class Received:
    """What one client was sent, over all its connections, of which it has one at a time."""

    def __init__(self, checker: Checker, name: str, tenant: str) -> None:
        self.name = name
        self.tenant = tenant
        # What is held now by subscription and job, and what was held before it was void or a snapshot took its place.
        self.slices: dict[tuple[str, str], Slice] = {}
        self.closed: list[tuple[str, Slice]] = []
        self.ended: set[tuple[str, str]] = set()
        self.versions: dict[str, Version] = {}
        self.snapshots: set[tuple[str, int, str]] = set()
        self.cursor: str | None = None
        self.rooms: dict[str, array[int]] = {}
        # Messages of this client: their texts by the seq that an ack named.
        self.acked: dict[tuple[str, int], str] = {}
        self._checker = checker

    def connected(self) -> None:
        """A new connection: chains begin anew."""
        for slice in self.slices.values():
            slice.chain, slice.linked, slice.resumed = None, False, True

    def since(self, job: str) -> Frame:
        """What to subscribe to a job with."""
        slice = self.slices.get((ALONE, job))
        if slice is None:
            return {"job": job}
        # The server goes on from here, and says so in `prev`.
        slice.chain, slice.linked = slice.held, True
        return {"job": job, "since": slice.held, "epoch": slice.epoch}

    def after(self, subscription: str) -> Frame:
        """What to subscribe to a set with, beside what it is a set of."""
        if self.cursor is None:
            self._void(place for place in self.slices if place[0] == subscription)
            return {"set": subscription}
        return {"set": subscription, "since": self.cursor}

    def resumed_after(self, job: str) -> str | None:
        """`Last-Event-ID` of a stream of one job."""
        wanted = self.since(job)
        return f"{wanted['epoch']}-{wanted['since']}" if "since" in wanted else None

    def holds(self, subscription: str, job: str) -> bool:
        """Whether the client knows that the job has ended."""
        return (subscription, job) in self.ended

    def said_up_to(self, room: str) -> int:
        """The seq of the last message of the room, 0 if there was none: `since` for the next connection."""
        held = self.rooms.get(room)
        return held[-1] if held else 0

    def take(self, frame: Frame, content: str = "") -> None:
        """A frame, and the text of its `d` as it came."""
        type = frame["t"]
        self._checker.counts[type] += 1
        if type in ENVELOPES:
            self.cursor = frame.get("cursor", self.cursor)
            for subscription in frame.get("set", (ALONE,)):
                self._envelope(subscription, frame, content)
        elif type == "message":
            self._message(frame, content)
        elif type == "hb":
            self.cursor = frame["d"].get("cursor", self.cursor)
            self._heartbeat(frame["d"])
        elif type == "resync":
            self._resync(frame)
        elif type == "bye" and "job" in frame:
            if (ALONE, frame["job"]) not in self.ended:
                self.note(f"was told bye of job {frame['job']} before its end")
        elif type not in OTHERS:
            self.note(f"was sent a frame of no known type: {frame}")

    def note(self, violation: str) -> None:
        self._checker.note(f"{self.name} {violation}")

    # Answers to requests

    def version(self, job: str) -> Version:
        """What the client knows before it asks."""
        return self.versions.get(job, (0, 0))

    def read(self, job: str, known: Version, epoch: int, seq: int, state: str) -> None:
        """An answer that shows a job; `known` is the version when it was asked for."""
        if (epoch, seq) < known:
            self.note(f"read job {job} at {(epoch, seq)} after it was shown {known}")
        self._saw(job, epoch, seq)
        self.snapshots.add((job, seq, state))

    def missing(self, job: str) -> None:
        """An accepted job of the client's own tenant is said not to exist."""
        self.note(f"was told that job {job} does not exist, after it was accepted")

    def let_in(self, what: str) -> None:
        """Something of another tenant was answered as if it were the client's own."""
        self.note(f"of tenant {self.tenant} was let in to {what} of another tenant")

    def acknowledged(self, room: str, seq: int, text: str) -> None:
        """A message of the client is kept with this seq."""
        if self.acked.setdefault((room, seq), text) != text:
            self.note(f"was told that {text!r} and {self.acked[room, seq]!r} are both message {seq} of room {room}")

    # Frames

    def _envelope(self, subscription: str, frame: Frame, content: str) -> None:
        type, job, epoch, seq, prev = frame["t"], frame["job"], frame["epoch"], frame["seq"], frame["prev"]
        place = (subscription, job)
        if type == "snapshot":
            self._snapshot(place, frame)
            return
        self._checker.agree(self.name, (job, epoch, seq, type), content)
        slice = self.slices.get(place)
        if slice is None or slice.epoch != epoch:
            self.note(f"was sent {_short(frame)} without a snapshot before it")
            return
        if prev != slice.chain and (slice.linked or prev is not None):
            self.note(f"was sent {_short(frame)} after {slice.chain}: there is a gap")
        slice.chain, slice.linked = seq, True
        if seq <= slice.held:
            # A cursor may say less than the client holds, which passes over these then.
            self._checker.counts["passed over"] += 1
            if not slice.resumed or subscription == ALONE:
                self.note(f"was sent {_short(frame)} and holds {slice.held}: a duplicate, or out of order")
            return
        slice.resumed = False
        slice.held = seq
        self._saw(job, epoch, seq)
        if type != "progress":
            slice.durable.append(seq)
            if type == "state" and frame["d"]["state"] in TERMINAL:
                self.ended.add(place)

    def _snapshot(self, place: tuple[str, str], frame: Frame) -> None:
        job, epoch, seq, state = frame["job"], frame["epoch"], frame["seq"], frame["d"]["state"]
        slice = self.slices.get(place)
        if frame["prev"] is not None:
            self.note(f"was sent a snapshot that follows on {frame['prev']}")
        if slice is not None and (place[0] == ALONE or not slice.resumed):
            self.note(f"was sent {_short(frame)} that nobody asked for, and holds {slice.held}")
        if (epoch, seq) < self.version(job):
            self.note(f"was sent {_short(frame)} after it was shown {self.version(job)}")
        self._saw(job, epoch, seq)
        self.snapshots.add((job, seq, state))
        self._void([place])
        slice = self.slices[place] = Slice(epoch, seq)
        slice.chain, slice.linked = seq, True
        if state in TERMINAL:
            self.ended.add(place)

    def _void(self, places: Iterable[tuple[str, str]]) -> None:
        for place in tuple(places):
            self.ended.discard(place)
            if (slice := self.slices.pop(place, None)) is not None:
                self.closed.append((place[1], slice))

    def _resync(self, frame: Frame) -> None:
        reason = frame["d"]["reason"]
        if reason not in self._checker.resets or "room" in frame:
            self.note(f"was reset without need: {frame}")
        if "job" in frame:
            self._void([(ALONE, frame["job"])])
        elif "set" in frame:
            self._void(place for place in self.slices if place[0] == frame["set"])
            self.cursor = None

    def _heartbeat(self, marks: Frame) -> None:
        for job, seq in marks.get("jobs", {}).items():
            slice = self.slices.get((ALONE, job))
            if slice is None or slice.held < seq:
                self.note(f"was told that it has job {job} up to {seq}, and has it to {slice and slice.held}")
        for room, seq in marks.get("rooms", {}).items():
            if self.said_up_to(room) < (seq or 0):
                self.note(f"was told that it has room {room} up to {seq}, and has it to {self.said_up_to(room)}")

    def _message(self, frame: Frame, content: str) -> None:
        room, seq = frame["room"], frame["seq"]
        self._checker.agree(self.name, (self.tenant, room, seq), content)
        last = self.said_up_to(room)
        if seq != last + 1 or frame["prev"] not in (None, last):
            self.note(f"was sent message {seq} of room {room}, which follows on {frame['prev']}, after {last}")
        if seq > last:
            self.rooms.setdefault(room, array("Q")).append(seq)

    def _saw(self, job: str, epoch: int, seq: int) -> None:
        self.versions[job] = max(self.versions.get(job, (0, 0)), (epoch, seq))


def contents(text: str) -> Iterator[tuple[Frame, str]]:
    """The objects of a frame, one or an array of them, and the text of the `d` of each that is an event or message."""
    place = 1 if text.startswith("[") else 0
    while place < len(text) and text[place] == "{":
        frame, end = DECODER.raw_decode(text, place)
        content = ""
        if frame["t"] in SHARED:
            at = text.index('"d":', place) + 4
            content = text[at : DECODER.raw_decode(text, at)[1]]
        yield frame, content
        place = end + 1


def _contents(what: tuple[Any, ...], content: Any, truth: Truth) -> Iterator[str]:
    """8. What was sent is what is kept."""
    if len(what) == 3:
        tenant, room, seq = what
        if truth.rooms.get((tenant, room), {}).get(seq) != content:
            yield f"message {seq} of room {room} was sent as {content}, and is not kept so"
        return
    job, _, seq, type = what
    kept = truth.events.get(job, {}).get(seq)
    if type == "progress":
        if kept is not None:
            yield f"event {seq} of job {job} was sent as progress, and is a {kept[0]}"
    elif kept != (type, content):
        yield f"event {seq} of job {job} was sent as {type} {content}, and is kept as {kept}"


def _jobs(client: Received, truth: Truth) -> Iterator[str]:
    """7., 11. and 13. A slice of the record without a hole, of the client's own jobs."""
    durable: dict[str, list[int]] = defaultdict(list)
    held = [(job, slice, False) for job, slice in client.closed]
    held += [(job, slice, (name, job) in client.ended) for (name, job), slice in client.slices.items()]
    for job, slice, over in held:
        if truth.tenants.get(job) != client.tenant:
            yield f"{client.name} of tenant {client.tenant} was sent job {job} of {truth.tenants.get(job)}"
            continue
        if job not in durable:
            durable[job] = sorted(truth.events[job])
        last = truth.end(job) if over else slice.held
        expected = [seq for seq in durable[job] if slice.began < seq <= last]
        if list(slice.durable) != expected:
            missing = sorted(set(expected) - set(slice.durable))[:20]
            others = sorted(set(slice.durable) - set(expected))[:20]
            yield (
                f"{client.name} holds job {job} from {slice.began} to {slice.held}, without {missing}, "
                f"with {others} that are not in the record"
            )
    for job, seq, state in client.snapshots:
        if job in truth.events and truth.state(job, seq) != state:
            yield f"{client.name} was shown job {job} as {state} at {seq}, where it was {truth.state(job, seq)}"


def _rooms(client: Received, truth: Truth) -> Iterator[str]:
    """8. and 13. One order for all, and each acknowledged message is there exactly once."""
    for room, held in client.rooms.items():
        kept = truth.rooms.get((client.tenant, room), {})
        if list(held) != [seq for seq in sorted(kept) if seq <= held[-1]]:
            yield f"{client.name} holds {len(held)} messages of room {room} up to {held[-1]}, and {len(kept)} are kept"
    for (room, seq), text in client.acked.items():
        kept = truth.rooms.get((client.tenant, room), {})
        at = [number for number, content in kept.items() if content["message"] == text]
        if at != [seq]:
            yield f"{client.name} was told that {text!r} is message {seq} of room {room}; it is {at}"


def _short(frame: Frame) -> str:
    return f"{frame['t']} {frame['seq']} of job {frame['job']}"
