"""Hosts take turns, and every request has its time."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.fetching.deadlines import Deadlines
from headway.fetching.requests import Request
from services.worker.kinds.http_turns import Host, Turns, host_of

hosts = st.sampled_from(["a", "b.example", "b.example:8080", "[::1]"])
urls = st.lists(hosts.map(lambda host: f"http://{host}/path"), max_size=40)


async def filled(turns: Turns, urls: list[str]) -> None:
    for index, url in enumerate(urls):
        await turns.add(Request(index, url))


async def taken(turns: Turns) -> tuple[Request, Host] | None:
    """The next request and its host, if there is one whose turn it is now."""
    try:
        async with asyncio.timeout(0):
            return await turns.take()
    except TimeoutError:
        return None


@given(urls=urls, per_host=st.integers(1, 5), workers=st.integers(1, 8), data=st.data())
def test_every_url_has_one_turn_and_no_host_more_than_its_share(
    urls: list[str], per_host: int, workers: int, data: st.DataObject
) -> None:
    async def play() -> list[int]:
        turns, done, under_way = Turns(per_host), list[int](), list[Host]()
        await filled(turns, urls)
        while len(done) < len(urls):
            while len(under_way) < workers and (found := await taken(turns)):
                request, host = found
                assert request.url == urls[request.index]
                assert host.name == host_of(request.url)
                done.append(request.index)
                under_way.append(host)
                assert max(Counter(each.name for each in under_way).values()) <= per_host
            turns.give_back(under_way.pop(data.draw(st.integers(0, len(under_way) - 1))))
        return done

    assert sorted(asyncio.run(play())) == list(range(len(urls)))


async def test_hosts_come_in_turn_however_the_list_is_ordered() -> None:
    turns = Turns(per_host=50)
    await filled(turns, [*["http://first/"] * 50, "http://SECOND/x", "https://third?y"])

    assert [(await turns.take())[1].name for _ in range(4)] == ["first", "second", "third", "first"]


async def test_only_so_many_wait_at_a_time() -> None:
    turns = Turns(per_host=1, window=3)
    filling = asyncio.create_task(filled(turns, ["http://a/"] * 10))
    seen = []
    while len(seen) < 10:
        request, host = await turns.take()
        assert not filling.done() or request.index >= 7
        seen.append(request.index)
        turns.give_back(host)
    await filling

    assert seen == list(range(10))


async def test_a_host_has_no_more_than_its_rate_and_holds_up_no_other() -> None:
    loop = asyncio.get_running_loop()
    turns = Turns(per_host=5, rate=20)
    await filled(turns, [*["http://a/"] * 5, *["http://b/"] * 5])
    at: dict[str, list[float]] = {"a": [], "b": []}
    for _ in range(10):
        _, host = await turns.take()
        at[host.name].append(loop.time())
        turns.give_back(host)

    for times in at.values():
        # However late a turn comes, none comes before its time; the clock has a grain.
        assert times[-1] - times[0] >= 4 / 20 - 0.01


async def test_a_host_that_is_paused_is_left_alone_and_what_failed_comes_again() -> None:
    loop = asyncio.get_running_loop()
    turns = Turns(per_host=1)
    await filled(turns, ["http://a/1", "http://a/2", "http://b/"])
    first, host = await turns.take()
    began = loop.time()
    turns.pause(host, 0.2)
    turns.again(first, 0.1)
    turns.give_back(host)

    request, host = await turns.take()
    turns.give_back(host)
    order = [request]
    for _ in range(2):
        request, host = await turns.take()
        assert loop.time() - began >= 0.19
        order.append(request)
        turns.give_back(host)
    assert [request.url for request in order] == ["http://b/", "http://a/2", "http://a/1"]


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
