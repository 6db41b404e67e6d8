"""Rooms over HTTP and in the store: what is said is kept once, numbered without a gap, and seen by its tenant only."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import InvalidRequest
from headway.events import CHANNEL, EVERYONE
from headway.queue import connect
from headway.retention import Retention
from headway.rooms import LONGEST, MOST_BEHIND, NEWEST, Rooms, Start, check_name, group, job_of
from headway.settings import Settings
from tests.conftest import Tenant, make_tenant, until
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_jobs import idle, submit

INERT = (
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m\x07",
    "one\r\ntwo\r\n\r\nSet-Cookie: a=b",
    "\u202egnp.exe\u2066",
    "'; DROP TABLE messages; --",
    " \t ",
    "\ufeff\u200b\U0001f600\u0301",
    '{"t":"message"}',
)


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings, tenant) as http:
        yield http


@pytest.fixture
async def engine(servers: Any, tmp_path: Any) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


def rooms_of(engine: Engine) -> Rooms:
    return Rooms(engine.store, engine.lifecycle._events)


async def say(http: httpx.AsyncClient, text: str, room: str = "lobby", **headers: str) -> dict[str, Any]:
    answer = await http.post(f"/api/v1/rooms/{room}/messages", json={"message": text}, headers=headers)
    assert answer.status_code == 201, answer.text
    said: dict[str, Any] = answer.json()
    return said


async def page(http: httpx.AsyncClient, room: str = "lobby", **query: Any) -> dict[str, Any]:
    answer = await http.get(f"/api/v1/rooms/{room}/messages", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_what_is_said_is_numbered_and_read_in_pages(http: httpx.AsyncClient) -> None:
    assert await page(http) == {"messages": [], "seq": 0}
    said = [await say(http, f"word {n}") for n in range(1, 6)]
    assert [message["seq"] for message in said] == [1, 2, 3, 4, 5]
    assert said[0].keys() == {"room", "seq", "id", "author", "message", "at"}
    assert (said[0]["room"], said[0]["author"], said[0]["message"]) == ("lobby", "test", "word 1")
    assert await page(http) == {"messages": said, "seq": 5}
    assert await page(http, limit=2) == {"messages": said[:2], "seq": 5}
    assert await page(http, after=2, limit=2) == {"messages": said[2:4], "seq": 5}
    assert await page(http, after=5) == {"messages": [], "seq": 5}
    assert [message["at"] for message in said] == sorted(message["at"] for message in said)


async def test_many_who_speak_at_once_get_a_number_each(http: httpx.AsyncClient) -> None:
    said = await asyncio.gather(*(say(http, f"word {n}") for n in range(60)))
    assert sorted(message["seq"] for message in said) == list(range(1, 61))
    kept = (await page(http, limit=500))["messages"]
    assert kept == sorted(said, key=lambda message: message["seq"])
    assert [message["at"] for message in kept] == sorted(message["at"] for message in kept)


async def test_a_repeat_with_the_same_key_says_nothing_twice(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    path, headers = "/api/v1/rooms/lobby/messages", {"Idempotency-Key": "once"}
    answers = await asyncio.gather(*(http.post(path, json={"message": "hi"}, headers=headers) for _ in range(20)))
    assert sorted(answer.status_code for answer in answers) == [200] * 19 + [201]
    assert len({answer.text for answer in answers}) == 1
    assert all((answer.status_code == 200) == ("Idempotent-Replayed" in answer.headers) for answer in answers)
    refused(await http.post(path, json={"message": "other"}, headers=headers), 422, "idempotency-key-reused")
    assert (await page(http))["seq"] == 1
    assert (await say(http, "hi", "elsewhere", **headers))["seq"] == 1
    # A word that was said before is not a repeat.
    assert (await say(http, "hi"))["seq"] == 2


@pytest.mark.parametrize("text", INERT)
async def test_text_is_kept_as_it_came(http: httpx.AsyncClient, text: str) -> None:
    assert (await say(http, text))["message"] == text
    answer = await http.get("/api/v1/rooms/lobby/messages")
    assert answer.json()["messages"][0]["message"] == text
    assert answer.headers["Content-Type"] == "application/json"
    assert all(byte >= 0x20 for byte in answer.content)


async def test_bad_words_rooms_and_queries_are_refused(http: httpx.AsyncClient) -> None:
    path = "/api/v1/rooms/lobby/messages"
    for bad in ({}, {"message": ""}, {"message": 1}, {"message": "x" * (LONGEST + 1)}, {"message": "x", "author": "y"}):
        refused(await http.post(path, json=bad), 422, "invalid-request")
    assert (await say(http, "\U0001f600" * LONGEST))["seq"] == 1
    for text in (b'{"message": "a\\u0000"}', b'{"message": "\\ud800"}'):
        refused(await http.post(path, content=text), 400, "bad-request")
    for room in ("-a", ".", "a b", "a%2fb", "é", "x" * 65, "x" * 10_000, "job:x", "job:" + str(uuid4()).upper()):
        for method in ("GET", "POST"):
            answer = await http.request(method, f"/api/v1/rooms/{room}/messages", json={"message": "x"})
            assert answer.status_code in (404, 422), room
    for query in ("after=-1", "after=x", "limit=0", "limit=501", f"after={1 << 63}", "before=1"):
        refused(await http.get(f"{path}?{query}"), 422, "invalid-request")
    for cursor in ("x", "eA", "MjAyNi0wMS0wMSBh"):
        refused(await http.get("/api/v1/rooms", params={"cursor": cursor}), 400, "bad-request")


async def test_another_tenants_room_of_the_same_name_is_another_room(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    other = await make_tenant(database, "other")
    theirs = {"Authorization": f"Bearer {other.api_key}"}
    job = await submit(http)
    await say(http, "ours")
    await say(http, "ours", f"job:{job['id']}")
    assert (await http.get("/api/v1/rooms/lobby/messages", headers=theirs)).json() == {"messages": [], "seq": 0}
    assert (await http.get("/api/v1/rooms", headers=theirs)).json() == {"rooms": [], "next_cursor": None}
    assert (await say(http, "theirs", **theirs))["seq"] == 1
    assert [message["message"] for message in (await page(http))["messages"]] == ["ours"]
    foreign = await http.get(f"/api/v1/rooms/job:{job['id']}/messages", headers=theirs)
    missing = await http.get(f"/api/v1/rooms/job:{uuid4()}/messages", headers=theirs)
    assert refused(foreign, 404, "not-found").keys() == refused(missing, 404, "not-found").keys()
    answer = await http.post(f"/api/v1/rooms/job:{job['id']}/messages", json={"message": "x"}, headers=theirs)
    refused(answer, 404, "not-found")


async def test_a_job_has_a_room_of_its_own(http: httpx.AsyncClient) -> None:
    job = await submit(http)
    room = f"job:{job['id']}"
    assert await page(http, room) == {"messages": [], "seq": 0}
    assert (await say(http, "how far is it?", room))["room"] == room
    assert (await page(http, room))["seq"] == 1


async def test_rooms_are_listed_with_the_one_that_was_last_spoken_in_first(http: httpx.AsyncClient) -> None:
    for room in ("a", "b", "c", "d", "b"):
        last = await say(http, "x", room)
    first = (await http.get("/api/v1/rooms", params={"limit": 3})).json()
    assert [room["room"] for room in first["rooms"]] == ["b", "d", "c"]
    assert first["rooms"][0] == {"room": "b", "seq": 2, "last_at": last["at"]}
    rest = (await http.get("/api/v1/rooms", params={"cursor": first["next_cursor"]})).json()
    assert ([room["room"] for room in rest["rooms"]], rest["next_cursor"]) == (["a"], None)


async def test_there_are_so_many_rooms_and_no_more(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    await database.execute(
        "INSERT INTO rooms (tenant_id, name, seq, last_at) SELECT $1, n, 0, now() FROM generate_series(1, 10000) n",
        tenant.id,
    )
    refused(await http.post("/api/v1/rooms/more/messages", json={"message": "x"}), 409, "conflict")
    assert (await say(http, "x", "1"))["seq"] == 1
    assert (await say(http, "x", f"job:{(await submit(http))['id']}"))["seq"] == 1


async def test_a_message_is_told_once_it_is_committed(engine: Engine) -> None:
    rooms, tenant_id = rooms_of(engine), engine.tenant.id
    redis = connect(engine.settings.redis_url.get_secret_value())
    heard: list[bytes] = []
    async with redis.pubsub() as pubsub:
        # As the web service does: who is not in the first is not told of anything.
        for name in (EVERYONE, group(tenant_id, "lobby")):
            await pubsub.subscribe(CHANNEL + name)
            await pubsub.get_message(timeout=5)
        message, new = await rooms.publish(
            tenant_id, "lobby", "hi", author="ada", key_id=engine.tenant.key_id, publish_key="k"
        )
        again = await rooms.publish(
            tenant_id, "lobby", "hi", author="ada", key_id=engine.tenant.key_id, publish_key="k"
        )

        async def hear() -> bool:
            if got := await pubsub.get_message(timeout=0.1):
                heard.append(got["data"])
            return bool(heard)

        await until(hear)
        assert await pubsub.get_message(timeout=0.2) is None
    await redis.aclose()
    assert (new, again) == (True, (message, False))
    assert engine.layer.deserialize(heard[0])["seq"] == 1
    assert (await rooms.history(tenant_id, "lobby", after=0, limit=9)) == ([message], 1)
    # The same key of another author is another key.
    other, new = await rooms.publish(
        tenant_id, "lobby", "hi", author="bob", key_id=engine.tenant.key_id, publish_key="k"
    )
    assert (other.seq, new) == (2, True)


async def test_what_is_missed_is_read_for_many_rooms_at_once(engine: Engine) -> None:
    rooms, tenant_id = rooms_of(engine), engine.tenant.id
    for room in ("a", "b", "a"):
        await rooms.publish(tenant_id, room, "x", author="ada", key_id=engine.tenant.key_id)
    missed = await rooms.missed([(tenant_id, "a", 1), (tenant_id, "b", 1), (tenant_id, "c", 0), (uuid4(), "a", 0)])
    assert [(tenant, message.room, message.seq) for tenant, message in missed] == [(tenant_id, "a", 2)]
    assert await rooms.missed([]) == []


async def test_old_messages_go_and_a_room_that_comes_back_counts_on(engine: Engine) -> None:
    rooms, tenant_id = rooms_of(engine), engine.tenant.id

    async def say(room: str) -> int:
        return (await rooms.publish(tenant_id, room, "x", author="ada", key_id=engine.tenant.key_id))[0].seq

    async def age() -> None:
        for table, column in (("messages", "created_at"), ("rooms", "last_at")):
            await engine.database.execute(f"UPDATE {table} SET {column} = now() - interval '11 days'")

    job_room = f"job:{await engine.submit_kind('test.call', {})}"
    for room in ("old", "old", "old", "half", job_room):
        await say(room)
    await age()
    assert await say("half") == 2
    retention = Retention(engine.store, engine.files, age=timedelta(days=10), most=1000)
    assert await retention.sweep_rooms() == 5
    assert [(room.name, room.seq) for room in await rooms.list_rooms(tenant_id, None, 9)] == [("half", 2)]
    assert await retention.sweep_rooms() == 0
    # Whoever held "old" up to 3 is told 4 next, and up to 2 that it missed something.
    starts = await rooms.starts(tenant_id, {"old": 3, "half": 0})
    assert starts == {"old": Start(3, 3, follows=True), "half": Start(2, 1)}
    assert (await rooms.starts(tenant_id, {"old": 2}))["old"].reset == "retention"
    assert await say("old") == 4
    assert await say("new") == 4
    assert await say(job_room) == 4


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 6000))
def test_whoever_joins_is_told_all_that_it_missed_or_that_it_cannot_be(newest: int, kept: int, since: int) -> None:
    oldest = newest - kept + 1 if 0 < kept <= newest else None
    start = Start.of(since, newest, oldest)
    assert 0 <= start.after <= newest
    if start.follows:
        assert (start.after, start.reset) == (since, None)
        assert newest - since <= MOST_BEHIND
        assert since == newest or (oldest is not None and oldest <= since + 1)
    elif start.reset is None:
        assert since == 0
        assert start.after == (newest if oldest is None else oldest - 1)
    else:
        assert start.reset == ("cursor" if since > newest else "retention")
        assert start.after == max(0, newest - NEWEST)
    assert Start.of(None, newest, oldest) == Start(newest, newest)


@given(st.text(max_size=70))
def test_a_room_has_a_name_that_fits_anywhere(name: str) -> None:
    try:
        check_name(name)
    except InvalidRequest:
        return
    assert name.isascii()
    assert len(name) <= 64
    assert not set(name) & set("/\\ \"'<>|:\r\n")
    assert job_of(name) is None
