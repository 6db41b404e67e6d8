"""What becomes of rooms when a web process is killed: who was there leaves, and what was said stays said, once."""

import asyncio
from contextlib import suppress

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.conftest import until, web
from tests.engine import Engine
from tests.faults.conftest import Spawner
from tests.integration.room_clients import client, ticket, visitor

WORDS = 60


async def test_whoever_was_there_through_a_killed_process_leaves_and_nothing_said_is_lost_or_doubled(
    engine: Engine, spawn: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.web.live import presence, rooms  # Django must be set up

    monkeypatch.setattr(rooms, "RENEW_EVERY", 0.5)
    monkeypatch.setattr(presence, "LIVES", 10)
    doomed, theirs = await spawn.web()
    headers = {"Authorization": f"Bearer {engine.tenant.api_key}"}
    elsewhere = httpx.AsyncClient(
        base_url=str(theirs.base_url).removesuffix("/api/v1/"), headers=headers, trust_env=False, verify=False
    )
    async with (
        web(engine.settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
        elsewhere,
        visitor(http, "ada") as ada,
    ):
        acknowledged: set[str] = set()
        async with visitor(elsewhere, "bob") as bob:
            await ada.wait(lambda frame: frame.get("joined") == "bob")
            killed = asyncio.get_running_loop().time() + 0.4
            for n in range(WORDS):
                if bob.seqs() and asyncio.get_running_loop().time() > killed and doomed.process.returncode is None:
                    doomed.process.kill()
                with suppress(ConnectionClosed):
                    await bob.send(message=f"word {n}", key=str(n))
                await asyncio.sleep(0.03)
            await bob.ended()
            acknowledged = {frame["ack"]["key"] for frame in bob.frames if "ack" in frame}
            held = max(bob.seqs())
        assert 0 < len(acknowledged) < WORDS
        assert ("left", "bob") not in ada.presence()
        again = await ticket(http, user="bob")
        async with client(http, f"/ws/rooms/lobby?since={held}", ticket=again, origin=url) as back:
            for n in range(WORDS):
                await back.send(message=f"word {n}", key=str(n))
                await asyncio.sleep(0.06)
            for one in (ada, back):
                await one.wait(lambda frame: frame.get("message") == f"word {WORDS - 1}", 20)
            assert back.seqs() == list(range(held + 1, WORDS + 1))
        assert ada.said() == [f"word {n}" for n in range(WORDS)]
        assert ada.seqs() == list(range(1, WORDS + 1))
        # Both of bob's sockets are gone now, one without a word.
        await ada.wait(lambda frame: frame.get("left") == "bob", 20)
        assert ada.presence() == [("here", ["ada"]), ("joined", "bob"), ("left", "bob")]

        async def alone() -> bool:
            return (await http.get("/api/v1/rooms/lobby/presence")).json() == {"here": ["ada"]}

        await until(alone)
