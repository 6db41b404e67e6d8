"""Group commit, under every order of calls, cancellations and failures that hypothesis thinks of."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.store.batch import Batch


class Faulty(Exception):
    pass


class Outage(Exception):
    pass


async def ticks(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.sampled_from(["good", "good", "good", "faulty"])),
        st.tuples(st.just("tick"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    max_size=40,
)


@given(steps=steps, most=st.integers(1, 5), slow=st.integers(0, 4), outages=st.sets(st.integers(1, 12), max_size=3))
def test_every_call_gets_its_own_answer(steps: list[tuple[str, Any]], most: int, slow: int, outages: set[int]) -> None:
    asyncio.run(live(steps, most, slow, outages))


async def live(steps: list[tuple[str, Any]], most: int, slow: int, outages: set[int]) -> None:
    written: list[int] = []
    met_outage: set[int] = set()
    runs, under_way = 0, 0

    async def run(items: Sequence[tuple[int, str]]) -> list[str]:
        nonlocal runs, under_way
        runs += 1
        this, under_way = runs, under_way + 1
        assert under_way == 1, "two statements at a time"
        assert 1 <= len(items) <= most
        try:
            await ticks(slow)
            if this in outages:
                met_outage.update(number for number, _ in items)
                raise Outage(this)
            if any(sort == "faulty" for _, sort in items):
                raise Faulty(this)
        finally:
            under_way -= 1
        written.extend(number for number, _ in items)
        return [f"answer {number}" for number, _ in items]

    batch = Batch(run, most=most, faulty=(Faulty,))
    calls: list[tuple[str, asyncio.Task[str]]] = []
    for action, value in steps:
        if action == "call":
            calls.append((value, asyncio.create_task(batch((len(calls), value)))))
        elif action == "tick":
            await ticks(value)
        elif value < len(calls):
            calls[value][1].cancel()
    answers = await asyncio.wait_for(asyncio.gather(*(task for _, task in calls), return_exceptions=True), timeout=5)
    # A batch whose callers have all gone is still written.
    await ticks(400)

    for number, ((sort, _), answer) in enumerate(zip(calls, answers, strict=True)):
        if isinstance(answer, str):
            assert (answer, sort) == (f"answer {number}", "good")
            assert written.count(number) == 1
        elif isinstance(answer, Faulty):
            assert sort == "faulty"
        elif isinstance(answer, Outage):
            assert number in met_outage
        else:
            assert isinstance(answer, asyncio.CancelledError)
    assert written == sorted(written), "what came first was not written first"
    assert len(written) == len(set(written)), "something was written twice"


Run = Callable[[Sequence[int]], Awaitable[Sequence[int]]]


async def test_calls_that_come_while_a_statement_runs_share_the_next() -> None:
    sizes: list[int] = []
    go_on = asyncio.Event()

    async def run(items: Sequence[int]) -> Sequence[int]:
        sizes.append(len(items))
        await go_on.wait()
        return items

    batch: Batch[int, int] = Batch(run, most=100)
    first = asyncio.create_task(batch(0))
    await ticks(3)
    rest = [asyncio.create_task(batch(number)) for number in range(1, 51)]
    await ticks(3)
    go_on.set()

    assert await asyncio.gather(first, *rest) == list(range(51))
    assert sizes == [1, 50]


async def test_the_one_that_is_to_blame_is_found_by_halving() -> None:
    runs = 0

    async def run(items: Sequence[int]) -> Sequence[int]:
        nonlocal runs
        runs += 1
        if 77 in items:
            raise Faulty
        return items

    batch: Batch[int, int] = Batch(run, most=200, faulty=(Faulty,))
    answers = await asyncio.gather(*map(batch, range(200)), return_exceptions=True)

    assert [number for number, answer in enumerate(answers) if isinstance(answer, Faulty)] == [77]
    assert runs < 20


@pytest.mark.parametrize("fails", [True, False])
async def test_a_caller_that_goes_away_keeps_no_other_from_its_answer(fails: bool) -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        await ticks(3)
        if fails:
            raise Outage
        return items

    batch: Batch[int, int] = Batch(run, most=10)
    first, second = (asyncio.create_task(batch(number)) for number in (1, 2))
    await ticks(2)
    first.cancel()

    async with asyncio.timeout(5):
        answers = await asyncio.gather(first, second, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert isinstance(answers[1], Outage) if fails else answers[1] == 2


@pytest.mark.parametrize("given_back", [[], [1], [1, 2, 3]])
async def test_a_wrong_number_of_results_reaches_every_caller(given_back: list[int]) -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        return given_back

    batch: Batch[int, int] = Batch(run, most=10)
    answers = await asyncio.gather(batch(1), batch(2), return_exceptions=True)

    assert [type(answer) for answer in answers] == [ValueError, ValueError]
