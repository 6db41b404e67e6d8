"""Rooms on sockets: everyone hears everything once and in order, and sees who is there, whatever happens to Redis."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from headway.settings import Settings
from tests.conftest import Tenant, make_tenant, until, web
from tests.integration.room_clients import Client, client, opening, ticket, visitor
from tests.integration.test_api_jobs import idle, submit
from tests.integration.test_rooms import INERT, page, say


@pytest.fixture
async def http(settings: Settings, redis: Redis, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings.model_copy(update={"connections": 2000}), tenant) as http:
        yield http


def a_message(text: str) -> Any:
    return lambda frame: frame.get("message") == text or (frame.get("t") == "message" and frame["d"]["message"] == text)


async def joined(http: httpx.AsyncClient, stack: AsyncExitStack, *rooms: dict[str, Any], **options: Any) -> Client:
    """A socket of `jobs.v1` that is in rooms, once it is told who is there."""
    made = await stack.enter_async_context(client(http, "/ws/v1", **options))
    await made.send(t="subscribe", id=1, rooms=list(rooms))
    await made.wait(lambda frame: frame["t"] == "ack")
    return made


async def test_two_users_talk_to_each_other(http: httpx.AsyncClient) -> None:
    async with visitor(http, "ada") as ada, visitor(http, "bob") as bob:
        await ada.wait(lambda frame: frame.get("joined") == "bob")
        await ada.send(message="hi")
        await bob.send(message="hello")
        for one in (ada, bob):
            await one.wait(a_message("hi"))
            await one.wait(a_message("hello"))
            assert one.seqs() == [1, 2]
        heard = await bob.wait(a_message("hi"))
        assert list(heard) == ["message", "author", "at", "id", "seq", "room"]
        assert (heard["author"], heard["room"]) == ("ada", "lobby")
        await bob.close()
        await ada.wait(lambda frame: frame.get("left") == "bob")
        assert ada.presence() == [("here", ["ada"]), ("joined", "bob"), ("left", "bob")]
        assert bob.presence() == [("here", ["ada", "bob"])]
    assert [message["message"] for message in (await page(http))["messages"]] == sorted(
        ada.said(), key=ada.said().index
    )


async def test_rooms_share_a_socket_with_the_rest_of_the_protocol(http: httpx.AsyncClient) -> None:
    job_id = (await submit(http))["id"]
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(client(http, "/ws/v1"))
        await one.send(
            t="subscribe", id="s", rooms=[{"room": "lobby"}, {"room": f"job:{job_id}"}], jobs=[{"job": job_id}]
        )
        ack = await one.wait(lambda frame: frame["t"] == "ack")
        assert ack == {"t": "ack", "id": "s", "d": {"jobs": [job_id], "rooms": ["lobby", f"job:{job_id}"]}}
        await one.wait(lambda frame: frame["t"] == "snapshot")
        presence = [
            await one.wait(lambda f, r=room: f["t"] == "presence" and f["room"] == r) for room in ack["d"]["rooms"]
        ]
        assert [frame["d"] for frame in presence] == [{"here": ["test"]}] * 2
        await one.send(t="publish", id=2, room="lobby", message="hi", key="k")
        await one.send(t="publish", id=3, room="lobby", message="hi", key="k")
        for number in (2, 3):
            ack = await one.wait(lambda frame, n=number: frame.get("id") == n)
            assert (ack["t"], ack["d"]) == ("ack", {"room": "lobby", "seq": 1})
        await one.send(t="publish", id=4, room="lobby", message="other", key="k")
        error = await one.wait(lambda frame: frame.get("id") == 4)
        assert error["d"]["type"] == "urn:headway:problem:idempotency-key-reused"
        await one.send(t="publish", id=5, room=f"job:{job_id}", message="how far?")
        message = await one.wait(a_message("how far?"))
        assert (message["room"], message["prev"], message["seq"]) == (f"job:{job_id}", None, 1)
        await one.send(t="unsubscribe", id=6, rooms=["lobby"])
        await one.wait(lambda frame: frame.get("id") == 6)
        await say(http, "nobody hears")
        await one.send(t="publish", id=7, room=f"job:{job_id}", message="the end")
        await one.wait(a_message("the end"))
        assert one.said() == ["hi"]


async def test_what_was_missed_comes_first_and_then_what_is_said(http: httpx.AsyncClient) -> None:
    for _ in range(5):
        await asyncio.gather(*(say(http, "word") for _ in range(50)))
    async with AsyncExitStack() as stack:
        all_of_it = await joined(http, stack, {"room": "lobby", "since": 0})
        some = await joined(http, stack, {"room": "lobby", "since": 240})
        none = await joined(http, stack, {"room": "lobby"})
        ahead = await joined(http, stack, {"room": "lobby", "since": 999})
        plain = await stack.enter_async_context(client(http, "/ws/rooms/lobby?since=249"))
        everyone = (all_of_it, some, none, ahead, plain)
        for one in everyone:
            await one.wait(lambda frame: "here" in frame.get("d", frame))
        await say(http, "last")
        for one in everyone:
            await one.wait(a_message("last"))
        assert all_of_it.seqs() == list(range(1, 252))
        assert (some.seqs(), none.seqs(), plain.seqs()) == (list(range(241, 252)), [251], [250, 251])
        assert ahead.seqs() == list(range(151, 252))
        [resync] = [frame for frame in ahead.frames if frame["t"] == "resync"]
        assert resync == {"t": "resync", "room": "lobby", "d": {"reason": "cursor"}}
        assert ahead.frames.index(resync) < ahead.frames.index(next(f for f in ahead.frames if f["t"] == "message"))
        for one, began in ((all_of_it, None), (some, 240), (none, None), (ahead, None)):
            chain = [frame["prev"] for frame in one.frames if frame["t"] == "message"]
            assert chain == [began, *one.seqs()[:-1]]


async def test_whoever_was_away_for_too_long_is_told_so(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    for n in range(1, 6):
        await say(http, f"word {n}")
    await database.execute("DELETE FROM messages WHERE seq < 4")
    async with AsyncExitStack() as stack:
        late = await joined(http, stack, {"room": "lobby", "since": 1})
        plain = await stack.enter_async_context(client(http, "/ws/rooms/lobby?since=2"))
        fine = await joined(http, stack, {"room": "lobby", "since": 3})
        new = await joined(http, stack, {"room": "lobby", "since": 0})
        for one in (late, plain, fine, new):
            await one.wait(a_message("word 5"))
            assert one.seqs() == [4, 5]
        assert {"t": "resync", "room": "lobby", "d": {"reason": "retention"}} in late.frames
        assert {"resync": {"reason": "retention"}} in plain.frames
        assert not any(frame["t"] == "resync" for frame in (*fine.frames, *new.frames))


@pytest.mark.parametrize("text", INERT)
async def test_text_is_told_as_it_came(http: httpx.AsyncClient, text: str) -> None:
    async with visitor(http, "ada") as ada, AsyncExitStack() as stack:
        other = await joined(http, stack, {"room": "lobby"})
        await other.wait(lambda frame: frame["t"] == "presence")
        await ada.send(message=text)
        await ada.wait(a_message(text))
        frame = await other.wait(a_message(text))
        assert frame["d"]["author"] == "ada"
        assert all(raw.isascii() and raw.isprintable() for one in (ada, other) for raw in one.raw)


async def test_a_user_with_two_sockets_is_there_until_the_last_one_goes(http: httpx.AsyncClient) -> None:
    async with visitor(http, "ada") as ada, AsyncExitStack() as stack:
        first = await stack.enter_async_context(visitor(http, "bob"))
        second = await stack.enter_async_context(visitor(http, "bob"))
        await ada.wait(lambda frame: frame.get("joined") == "bob")
        assert (await http.get("/api/v1/rooms/lobby/presence")).json() == {"here": ["ada", "bob"]}
        await first.close()
        await second.send(message="still here")
        await ada.wait(a_message("still here"))
        await second.close()
        await ada.wait(lambda frame: frame.get("left") == "bob")
        assert ada.presence() == [("here", ["ada"]), ("joined", "bob"), ("left", "bob")]
        assert (await http.get("/api/v1/rooms/lobby/presence")).json() == {"here": ["ada"]}


async def test_processes_see_each_others_visitors_and_wiped_entries_come_back(
    http: httpx.AsyncClient, settings: Settings, redis: Redis, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import rooms  # Django must be set up

    monkeypatch.setattr(rooms, "RENEW_EVERY", 1)
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=http.headers, trust_env=False, verify=False) as elsewhere,
        visitor(http, "ada") as ada,
        visitor(elsewhere, "bob") as bob,
    ):
        await ada.wait(lambda frame: frame.get("joined") == "bob")
        assert bob.presence() == [("here", ["ada", "bob"])]
        await redis.flushall()

        async def back() -> bool:
            return (await elsewhere.get("/api/v1/rooms/lobby/presence")).json() == {"here": ["ada", "bob"]}

        await until(back)
        await bob.send(message="nobody left")
        await ada.wait(a_message("nobody left"))
        assert ada.presence() == [("here", ["ada"]), ("joined", "bob")]
        await bob.close()
        await ada.wait(lambda frame: frame.get("left") == "bob")


async def test_many_who_come_and_go_at_once_are_told_in_one(http: httpx.AsyncClient, settings: Settings) -> None:
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=http.headers, trust_env=False, verify=False) as elsewhere,
        visitor(http, "ada") as ada,
    ):
        async with AsyncExitStack() as stack:
            names = [f"user-{n:03}" for n in range(60)]
            tickets = [await ticket(elsewhere, user=name) for name in names]
            crowd = [client(elsewhere, "/ws/rooms/lobby", ticket=one, origin=url) for one in tickets]
            await asyncio.gather(*(stack.enter_async_context(one) for one in crowd))
            # Sooner than by the look that comes every ten seconds.
            await until(lambda: here(ada) == {"ada", *names}, 6)
        await until(lambda: here(ada) == {"ada"}, 6)
        assert ada.closed is None
        assert (await http.get("/api/v1/rooms/lobby/presence")).json() == {"here": ["ada"]}


async def test_a_process_that_is_stopped_sees_its_visitors_off(http: httpx.AsyncClient, settings: Settings) -> None:
    async with visitor(http, "ada") as ada, AsyncExitStack() as stack:
        async with web(settings) as url:
            elsewhere = httpx.AsyncClient(base_url=url, headers=http.headers, trust_env=False, verify=False)
            await stack.enter_async_context(elsewhere)
            bob = await stack.enter_async_context(visitor(elsewhere, "bob"))
            await ada.wait(lambda frame: frame.get("joined") == "bob")
        assert (await bob.ended())[0] == 1012
        await ada.wait(lambda frame: frame.get("left") == "bob", 6)


def here(one: Client) -> set[str]:
    """Who is there, as far as a client was told."""
    found: set[str] = set()
    for key, value in one.presence():
        found = set(value) if key == "here" else found | {value} if key == "joined" else found - {value}
    return found


async def test_no_message_is_lost_or_doubled_while_redis_is_wiped_and_its_subscribers_are_cut_off(
    http: httpx.AsyncClient, settings: Settings, redis: Redis
) -> None:
    async def wreck() -> None:
        while True:
            await redis.flushall()
            await redis.client_kill_filter(_type="pubsub")
            await asyncio.sleep(0.15)

    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=http.headers, trust_env=False, verify=False) as elsewhere,
        visitor(http, "ada") as ada,
        visitor(elsewhere, "bob") as bob,
    ):
        wrecking = asyncio.create_task(wreck())
        for n in range(100):
            await say(http if n % 2 else elsewhere, f"word {n}")
        wrecking.cancel()
        await asyncio.gather(wrecking, return_exceptions=True)
        await say(http, "last")
        for one in (ada, bob):
            await one.wait(a_message("last"), 20)
            assert one.seqs() == list(range(1, 102))
            assert one.said() == [*(f"word {n}" for n in range(100)), "last"]


async def test_without_redis_messages_are_read_from_the_record(settings: Settings, tenant: Tenant) -> None:
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    async with (
        idle(away, tenant) as http,
        client(http, "/ws/rooms/lobby") as one,
        client(http, "/ws/rooms/lobby") as two,
    ):
        for visitor in (one, two):
            assert await visitor.wait(lambda frame: "here" in frame) == {"here": ["test"]}
        await one.send(message="hi", key="k")
        await one.wait(lambda frame: "ack" in frame)
        await say(http, "hello")
        for visitor in (one, two):
            await visitor.wait(a_message("hello"))
            assert visitor.said() == ["hi", "hello"]


async def test_a_message_that_redis_lost_is_read_with_the_next_one(
    http: httpx.AsyncClient, tenant: Tenant, database: asyncpg.Connection
) -> None:
    async with visitor(http, "ada") as ada:
        await say(http, "heard")
        await ada.wait(a_message("heard"))
        await database.execute(
            "WITH r AS (UPDATE rooms SET seq = seq + 2 RETURNING *) INSERT INTO messages "
            "(tenant_id, room, seq, id, author, key_id, text, created_at) "
            "SELECT tenant_id, name, r.seq - 2 + n, gen_random_uuid(), 'x', 'x', 'lost ' || n, now() "
            "FROM r, generate_series(1, 2) n"
        )
        await say(http, "next")
        await ada.wait(a_message("next"))
        assert ada.said() == ["heard", "lost 1", "lost 2", "next"]


async def test_a_heartbeat_repairs_what_was_lost_at_the_end(
    http: httpx.AsyncClient, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import session  # Django must be set up

    monkeypatch.setattr(session, "HEARTBEAT", 1.5)
    async with AsyncExitStack() as stack:
        one = await joined(http, stack, {"room": "lobby"})
        await say(http, "heard")
        await one.wait(a_message("heard"))
        await database.execute(
            "WITH r AS (UPDATE rooms SET seq = seq + 1 RETURNING *) INSERT INTO messages "
            "(tenant_id, room, seq, id, author, key_id, text, created_at) "
            "SELECT tenant_id, name, r.seq, gen_random_uuid(), 'x', 'x', 'lost', now() FROM r"
        )
        await one.wait(a_message("lost"))
        beat = await one.wait(lambda frame: frame["t"] == "hb" and frame["d"]["rooms"] == {"lobby": 2})
        assert one.frames.index(beat) > one.frames.index(next(filter(a_message("lost"), one.frames)))


async def test_another_tenants_room_is_another_room(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    other = await make_tenant(database, "other")
    job_id = (await submit(http))["id"]
    async with visitor(http, "ada") as ada, client(http, "/ws/rooms/lobby", key=other.api_key) as stranger:
        assert await stranger.wait(lambda frame: "here" in frame) == {"here": ["test"]}
        await ada.send(message="secret")
        await stranger.send(message="anyone?")
        await ada.wait(a_message("secret"))
        await stranger.wait(a_message("anyone?"))
        assert (ada.said(), stranger.said()) == (["secret"], ["anyone?"])
        assert ada.presence() == [("here", ["ada"])]
        async with client(http, f"/ws/rooms/job:{job_id}", key=other.api_key) as refused:
            assert await refused.ended() == (4506, f"There is no job {job_id}.")
        async with AsyncExitStack() as stack:
            unknown = "00000000-0000-0000-0000-000000000000"
            one = await joined(http, stack, {"room": f"job:{job_id}"}, {"room": f"job:{unknown}"}, key=other.api_key)
            errors = [
                await one.wait(lambda f, r=room: f["t"] == "error" and f["d"]["room"] == r)
                for room in (f"job:{job_id}", f"job:{unknown}")
            ]
            assert len({json.dumps({**error["d"], "room": ""}) for error in errors}) == 1


async def test_bad_frames_and_names_are_refused_and_say_why(http: httpx.AsyncClient) -> None:
    async with visitor(http, "ada") as ada:
        bad = (
            "x",
            "[]",
            '"hi"',
            "{}",
            '{"message":""}',
            '{"message":1}',
            '{"message":"a\\u0000"}',
            '{"message":"\\ud800"}',
            '{"message":"x","author":"bob"}',
            json.dumps({"message": "x" * 4001}),
        )
        for number, frame in enumerate(bad):
            await ada.ws.send(frame)
            await until(lambda n=number: sum("error" in f for f in ada.frames) == n + 1)
        await ada.send(message="fine", key="k")
        assert await ada.wait(lambda frame: "ack" in frame) == {"ack": {"key": "k", "seq": 1}}
    for path, code in (
        ("/ws/rooms/-", 4500),
        ("/ws/rooms/" + "x" * 1000, 4500),
        ("/ws/rooms/lobby?since=x", 4500),
        ("/ws/rooms/lobby?sinc=1", 4500),
        ("/ws/rooms/job:x", 4500),
    ):
        async with client(http, path) as refused:
            assert (await refused.ended())[0] == code, path
    with pytest.raises(InvalidStatus) as too_long:
        await opening(http, "/ws/rooms/" + "x" * 10_000)
    assert too_long.value.response.status_code == 414
    async with AsyncExitStack() as stack:
        one = await joined(http, stack, {"room": "lobby"}, {"room": "-"}, {"room": "job:x"})
        await until(lambda: len([frame for frame in one.frames if frame["t"] == "error"]) == 2)
        ack = await one.wait(lambda frame: frame["t"] == "ack")
        assert ack["d"] == {"rooms": ["lobby"]}
        await one.send(t="subscribe", id=2, rooms=[{"room": "x" * 10_000}])
        error = await one.wait(lambda frame: frame.get("id") == 2)
        assert error["d"]["type"] == "urn:headway:problem:invalid-request"


async def test_a_socket_that_shouts_is_cut_off_and_nobody_else_is_disturbed(http: httpx.AsyncClient) -> None:
    async with visitor(http, "ada") as ada, visitor(http, "bob") as bob:

        async def shout() -> tuple[int, str]:
            try:
                async with asyncio.timeout(20):
                    while bob.closed is None:
                        for _ in range(500):
                            await bob.ws.send('{"message":"NOISE"}')
                        await asyncio.sleep(0.05)
            except Exception:
                pass
            return await bob.ended()

        shouting = asyncio.create_task(shout())
        for n in range(10):
            began = asyncio.get_running_loop().time()
            await ada.send(message=f"word {n}")
            await ada.wait(a_message(f"word {n}"))
            assert asyncio.get_running_loop().time() - began < 5
        assert (await shouting)[0] == 4013
        noise = [text for text in ada.said() if text == "NOISE"]
        assert len(noise) <= 45
        assert ada.seqs() == list(range(1, len(noise) + 11))


async def test_a_ticket_opens_what_it_names_and_nothing_else(http: httpx.AsyncClient) -> None:
    jobs = [(await submit(http))["id"] for _ in range(2)]
    own = str(http.base_url).rstrip("/")
    async with visitor(http, "ada", "/ws/v1", rooms=["lobby"], jobs=[jobs[0]], publish=False) as ada:
        wanted = ("lobby", "other", f"job:{jobs[0]}", f"job:{jobs[1]}")
        await ada.send(
            t="subscribe", id=1, rooms=[{"room": room} for room in wanted], jobs=[{"job": job} for job in jobs]
        )
        ack = await ada.wait(lambda frame: frame["t"] == "ack")
        assert ack["d"] == {"jobs": [jobs[0]], "rooms": ["lobby"]}
        await until(lambda: len([frame for frame in ada.frames if frame["t"] == "error"]) == 4)
        kinds = {
            frame["d"].get("room", "job"): frame["d"]["type"].rpartition(":")[2]
            for frame in ada.frames
            if frame["t"] == "error"
        }
        assert kinds == {
            "other": "forbidden",
            f"job:{jobs[0]}": "forbidden",
            f"job:{jobs[1]}": "forbidden",
            "job": "not-found",
        }
        await ada.send(t="publish", id=2, room="lobby", message="x")
        assert (await ada.wait(lambda frame: frame.get("id") == 2))["d"]["type"] == "urn:headway:problem:forbidden"
    async with visitor(http, "ada", "/ws/v1", rooms=["a", f"job:{jobs[0]}", f"job:{jobs[1]}"], jobs=[jobs[0]]) as ada:
        await ada.send(t="subscribe", id=1, rooms=[{"room": f"job:{job}"} for job in jobs])
        assert (await ada.wait(lambda frame: frame["t"] == "ack"))["d"] == {"rooms": [f"job:{jobs[0]}"]}
        await ada.send(t="publish", id=2, room="b", message="x")
        assert (await ada.wait(lambda frame: frame.get("id") == 2))["t"] == "error"
    one = await ticket(http, rooms=["lobby"])
    async with client(http, "/ws/rooms/other", ticket=one, origin=own) as refused:
        assert (await refused.ended())[0] == 4501
