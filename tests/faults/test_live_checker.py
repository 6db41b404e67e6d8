"""The checker of the live stream, proven: a right history passes, and each that was changed on purpose fails."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.live_checker import Checker, Frame, Truth, contents

JOB, STRANGE = "job-1", "job-of-others"
LOBBY = "lobby"
CLIENTS = {"socket": "ours", "stream": "ours", "set": "ours", "stranger": "others"}

EVENTS: dict[int, tuple[str, Any]] = {
    1: ("state", {"state": "queued"}),
    2: ("state", {"state": "running"}),
    3: ("log", {"line": "first"}),
    5: ("log", {"line": "second"}),
    7: ("log", {"line": "third"}),
    8: ("state", {"state": "succeeded"}),
}
MESSAGES = {seq: {"message": f"message {seq}", "author": "ada"} for seq in range(1, 5)}


def truth() -> Truth:
    return Truth(
        {JOB: "ours", STRANGE: "others"},
        {JOB: EVENTS, STRANGE: {1: EVENTS[1], 2: ("state", {"state": "cancelled"})}},
        {("ours", LOBBY): MESSAGES},
    )


def event(seq: int, prev: int | None, **more: Any) -> Frame:
    type, d = EVENTS.get(seq, ("progress", {"done": seq}))
    return {"t": type, "job": JOB, "epoch": 1, "prev": prev, "seq": seq, "d": d, **more}


def snapshot(seq: int, state: str, **more: Any) -> Frame:
    return {"t": "snapshot", "job": JOB, "epoch": 1, "prev": None, "seq": seq, "d": {"state": state}, **more}


def message(seq: int, prev: int | None) -> Frame:
    return {"t": "message", "room": LOBBY, "prev": prev, "seq": seq, "d": MESSAGES[seq]}


MINE = {"set": ["mine"], "cursor": "c"}

# What clients did and were sent, in order: the name of a client, what happened to it, and the rest.
RIGHT: list[list[Any]] = [
    ["socket", "connects"],
    ["socket", "subscribes", JOB],
    ["socket", "is sent", snapshot(1, "queued")],
    ["socket", "is sent", event(2, 1)],
    ["socket", "is sent", event(3, 2)],
    ["socket", "is sent", event(4, 3)],
    ["socket", "connects"],
    ["socket", "subscribes", JOB],
    ["socket", "is sent", event(5, 4)],
    ["socket", "is sent", event(6, 5)],
    ["socket", "reads", JOB, 6, "running"],
    ["socket", "is sent", event(7, 6)],
    ["socket", "is sent", {"t": "hb", "d": {"jobs": {JOB: 7}, "rooms": {}}}],
    ["socket", "is sent", event(8, 7)],
    ["socket", "is sent", {"t": "bye", "job": JOB, "d": {"reason": "terminal"}}],
    ["stream", "connects"],
    ["stream", "subscribes", JOB],
    ["stream", "is sent", snapshot(3, "running")],
    ["stream", "is sent", event(5, 3)],
    ["stream", "is sent", event(7, 5)],
    ["stream", "connects"],
    ["stream", "subscribes", JOB],
    ["stream", "is sent", event(8, 7)],
    ["set", "connects"],
    ["set", "follows", "mine"],
    ["set", "is sent", snapshot(2, "running", **MINE)],
    ["set", "is sent", event(3, 2, **MINE)],
    ["set", "is sent", event(4, 3, set=["mine"])],
    ["set", "connects"],
    ["set", "follows", "mine"],
    ["set", "is sent", event(3, None, **MINE)],
    ["set", "is sent", event(5, 3, **MINE)],
    ["set", "is sent", event(7, 5, **MINE)],
    ["set", "is sent", event(8, 7, **MINE)],
    ["set", "is sent", message(1, None)],
    ["set", "is told", LOBBY, 2, "message 2"],
    ["set", "is sent", message(2, 1)],
    ["set", "connects"],
    ["set", "is sent", message(3, 2)],
    ["set", "is sent", message(4, 3)],
    ["set", "is sent", {"t": "hb", "d": {"rooms": {LOBBY: 4}}}],
    ["socket", "is sent", message(1, None)],
    ["socket", "is sent", message(2, 1)],
]


def violations(history: list[list[Any]], record: Truth, **options: Any) -> list[str]:
    checker = Checker(**options)
    clients = {name: checker.client(name, tenant) for name, tenant in CLIENTS.items()}
    for name, what, *rest in history:
        client = clients[name]
        if what == "connects":
            client.connected()
        elif what == "subscribes":
            client.since(*rest)
        elif what == "follows":
            client.after(*rest)
        elif what == "reads":
            job, seq, state = rest
            client.read(job, client.version(job), 1, seq, state)
        elif what == "misses":
            client.missing(*rest)
        elif what == "is told":
            client.acknowledged(*rest)
        else:
            for frame, content in contents(json.dumps(rest, separators=(",", ":"))):
                client.take(frame, content)
    return checker.check(record)


def test_a_right_history_passes() -> None:
    assert violations(RIGHT, truth()) == []


Mutation = Callable[[list[list[Any]], Truth], Any]
MUTATIONS: dict[str, Mutation] = {}


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def at(history: list[list[Any]], client: str, type: str, seq: int) -> int:
    """Where a client is sent the frame."""
    return next(
        place
        for place, (name, what, *rest) in enumerate(history)
        if (name, what) == (client, "is sent") and rest[0]["t"] == type and rest[0].get("seq") == seq
    )


@mutation
def an_event_is_dropped(history: list[list[Any]], record: Truth) -> None:
    del history[at(history, "socket", "log", 3)]


@mutation
def an_event_is_dropped_and_the_hole_hidden(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "socket", "log", 3)
    history[place + 1][2]["prev"] = 2
    del history[place]


@mutation
def an_event_is_lost_between_two_connections(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "stream", "log", 7)
    history[place + 3][2]["prev"] = 5
    del history[place]


@mutation
def an_event_of_a_set_is_dropped(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "set", "log", 5)
    history[place + 1][2]["prev"] = 3
    del history[place]


@mutation
def the_end_is_dropped(history: list[list[Any]], record: Truth) -> None:
    del history[at(history, "socket", "state", 8)]


@mutation
def an_event_is_sent_twice(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "socket", "log", 7)
    history.insert(place, history[place])


@mutation
def an_event_is_sent_again_after_a_reconnect(history: list[list[Any]], record: Truth) -> None:
    history.insert(at(history, "stream", "state", 8), ["stream", "is sent", event(7, 7)])


@mutation
def an_event_of_a_set_is_sent_twice(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "set", "log", 7)
    history.insert(place + 1, ["set", "is sent", event(7, 7, **MINE)])


@mutation
def two_events_change_places(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "stream", "log", 5)
    history[place : place + 2] = [["stream", "is sent", event(7, 3)], ["stream", "is sent", event(5, 7)]]


@mutation
def a_snapshot_takes_the_place_of_events(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "stream", "log", 5)] = ["stream", "is sent", snapshot(5, "running")]


@mutation
def a_snapshot_takes_the_place_of_the_tail(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "stream", "state", 8)] = ["stream", "is sent", snapshot(8, "succeeded")]


@mutation
def a_snapshot_shows_another_state(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "socket", "snapshot", 1)][2]["d"]["state"] = "running"


@mutation
def a_job_is_told_of_without_a_snapshot(history: list[list[Any]], record: Truth) -> None:
    del history[at(history, "set", "snapshot", 2)]


@mutation
def bye_comes_before_the_end(history: list[list[Any]], record: Truth) -> None:
    bye = next(line for line in history if line[1] == "is sent" and line[2]["t"] == "bye")
    history.remove(bye)
    history.insert(at(history, "socket", "state", 8), bye)


@mutation
def another_tenants_job_is_sent(history: list[list[Any]], record: Truth) -> None:
    history.append(["socket", "is sent", {**snapshot(1, "queued"), "job": STRANGE}])


@mutation
def another_tenants_events_are_sent(history: list[list[Any]], record: Truth) -> None:
    history += [["stranger", "connects"], ["stranger", "is sent", snapshot(7, "running")]]


@mutation
def another_tenants_message_is_sent(history: list[list[Any]], record: Truth) -> None:
    history.append(["stranger", "is sent", message(1, None)])


@mutation
def one_client_is_sent_other_bytes(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "stream", "log", 5)][2]["d"] = {"line": "2nd"}


@mutation
def one_client_is_sent_other_progress(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "set", "progress", 4)][2]["d"] = {"done": 40}


@mutation
def all_are_sent_what_is_not_kept(history: list[list[Any]], record: Truth) -> None:
    for client in ("socket", "stream", "set"):
        history[at(history, client, "log", 5)][2]["d"] = {"line": "2nd"}


@mutation
def an_event_that_was_sent_is_not_kept(history: list[list[Any]], record: Truth) -> None:
    del record.events[JOB][5]  # type: ignore[attr-defined]


@mutation
def a_heartbeat_tells_of_more(history: list[list[Any]], record: Truth) -> None:
    next(line for line in history if line[1] == "is sent" and line[2]["t"] == "hb")[2]["d"]["jobs"][JOB] = 8


@mutation
def a_read_goes_back(history: list[list[Any]], record: Truth) -> None:
    next(line for line in history if line[1] == "reads")[3] = 5


@mutation
def a_snapshot_goes_back(history: list[list[Any]], record: Truth) -> None:
    history[:0] = [["stream", "reads", JOB, 5, "running"]]


@mutation
def an_accepted_job_is_not_found(history: list[list[Any]], record: Truth) -> None:
    history.append(["socket", "misses", JOB])


@mutation
def a_client_is_reset_without_need(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "stream", "state", 8)
    history[place : place + 1] = [
        ["stream", "is sent", {"t": "resync", "job": JOB, "d": {"reason": "cursor"}}],
        ["stream", "is sent", snapshot(8, "succeeded")],
    ]


@mutation
def a_message_is_dropped(history: list[list[Any]], record: Truth) -> None:
    del history[at(history, "set", "message", 3)]


@mutation
def a_message_is_sent_twice(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "set", "message", 3)
    history.insert(place, history[place])


@mutation
def two_messages_change_places(history: list[list[Any]], record: Truth) -> None:
    place = at(history, "set", "message", 3)
    history[place], history[place + 1] = history[place + 1], history[place]


@mutation
def one_client_is_sent_another_message(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "socket", "message", 2)][2]["d"] = {"message": "message 3", "author": "ada"}


@mutation
def an_acknowledged_message_is_lost(history: list[list[Any]], record: Truth) -> None:
    history.append(["socket", "is told", LOBBY, 5, "message 5"])


@mutation
def an_acknowledged_message_is_there_twice(history: list[list[Any]], record: Truth) -> None:
    history[at(history, "set", "message", 4)][2]["d"] = MESSAGES[2]
    record.rooms["ours", LOBBY][4] = MESSAGES[2]  # type: ignore[index]


@mutation
def a_number_of_a_room_is_left_out(history: list[list[Any]], record: Truth) -> None:
    record.rooms["ours", LOBBY][6] = {"message": "later", "author": "ada"}  # type: ignore[index]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_history_that_was_changed_is_caught(name: str) -> None:
    history, record = copy.deepcopy((RIGHT, truth()))
    MUTATIONS[name](history, record)
    assert violations(history, record), name


def test_past_retention_a_reset_is_as_it_should_be() -> None:
    history = copy.deepcopy(RIGHT)
    a_client_is_reset_without_need(history, truth())
    assert violations(history, truth(), resets=("cursor",)) == []


def test_what_several_frames_in_one_say_is_read_apart() -> None:
    text = '[{"t":"log","seq":1,"d":{"d":"\\"d\\":[}"},"set":["s"]},{"t":"hb","d":{}},{"t":"state","d":{"a":1.50}}]'
    assert [content for _, content in contents(text)] == ['{"d":"\\"d\\":[}"}', "", '{"a":1.50}']
