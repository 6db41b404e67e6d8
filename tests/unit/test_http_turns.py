"""Hosts take turns, and every request has its time."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.fetching.deadlines import Deadlines
from services.worker.kinds.http_turns import Turns

hosts = st.sampled_from(["a", "b.example", "b.example:8080", "[::1]"])
urls = st.lists(hosts.map(lambda host: f"http://{host}/path"), max_size=40)


@given(urls=urls, per_host=st.integers(1, 5), workers=st.integers(1, 8), data=st.data())
def test_every_url_has_one_turn_and_no_host_more_than_its_share(
    urls: list[str], per_host: int, workers: int, data: st.DataObject
) -> None:
    async def play() -> list[int]:
        turns, taken, under_way = Turns(urls, per_host), [], []
        while len(taken) < len(urls):
            while len(under_way) < workers:
                try:
                    async with asyncio.timeout(0):
                        index, host = await turns.take()
                except TimeoutError:
                    break
                assert host in urls[index]
                taken.append(index)
                under_way.append(host)
                assert max(Counter(under_way).values()) <= per_host
            turns.give_back(under_way.pop(data.draw(st.integers(0, len(under_way) - 1))))
        return taken

    assert sorted(asyncio.run(play())) == list(range(len(urls)))


async def test_hosts_come_in_turn_however_the_list_is_ordered() -> None:
    turns = Turns([*["http://first/"] * 50, "http://SECOND/x", "https://third?y"], per_host=50)

    assert [(await turns.take())[1] for _ in range(4)] == ["first", "second", "third", "first"]


async def test_a_deadline_interrupts_what_is_late_and_only_that() -> None:
    deadlines = Deadlines(0.05)
    watching = asyncio.create_task(deadlines.watch())

    async def late() -> None:
        with deadlines:
            await asyncio.Event().wait()

    async def early() -> str:
        with deadlines:
            await asyncio.sleep(0)
        await asyncio.wait(latecomers)  # outside, time does not count
        return "early"

    latecomers = [asyncio.create_task(late()), asyncio.create_task(late())]
    results = await asyncio.gather(early(), *latecomers, return_exceptions=True)

    assert [type(result) for result in results] == [str, TimeoutError, TimeoutError]
    again = asyncio.create_task(late())
    with pytest.raises(TimeoutError):
        await again
    assert again.cancelling() == 0
    watching.cancel()


async def test_a_task_that_is_cancelled_while_late_is_cancelled() -> None:
    deadlines = Deadlines(0.01)

    async def late() -> None:
        with deadlines:
            await asyncio.Event().wait()

    task = asyncio.create_task(late())
    watching = asyncio.create_task(deadlines.watch())
    while not task.cancelling():
        await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    watching.cancel()
