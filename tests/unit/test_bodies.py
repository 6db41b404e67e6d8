"""Request bodies: strict JSON, and streams that end as they should."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import BadRequest, TooLarge, TooSlow
from services.web.api import bodies
from services.web.api.bodies import Body, Disconnected, parse

TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"))
KEPT = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)


@given(KEPT)
@settings(max_examples=40)
def test_json_is_read_as_it_was_meant(value: Any) -> None:
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=60) | st.text().map(lambda text: json.dumps(text)[:-1].encode()))
def test_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        value = parse(body)
    except BadRequest as refusal:
        assert refusal.detail
    else:
        assert value == json.loads(body)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'"a" "b"', "not JSON"),
        (b"NaN", "NaN is not a number"),
        (b"[Infinity]", "Infinity is not a number"),
        (b"1e400", "too large"),
        (b"-1e999", "too large"),
        (b"1" * 5000, "too many digits"),
        (b"[" * 65 + b"]" * 65, "64 levels"),
        (b"[" * 100_000, "64 levels"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "64 levels"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b'[{"a": {"b": 1, "b": 2}}]', "twice"),
        (b'"\\u0000"', "NUL"),
        (b'{"\\u0000": 1}', "NUL"),
        (b'"\\ud800"', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_a_reason(body: bytes, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        parse(body)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse(b'"\\ud83d\\udca9"') == "\N{PILE OF POO}"
    assert parse(b"[" * 63 + b"]" * 63)


def arriving(*chunks: bytes, whole: bool = True, length: int | None = None) -> Body:
    """A body of these chunks, after which the client stays or leaves."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request"} if whole else {"type": "http.disconnect"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else await asyncio.Event().wait()  # type: ignore[return-value]

    return Body(receive, length)


async def test_a_body_is_whole_up_to_its_limit() -> None:
    body = arriving(b"ab", b"", b"c")
    assert await body.whole(3) == b"abc"
    assert body.read
    assert await arriving().whole(0) == b""
    with pytest.raises(TooLarge):
        await arriving(b"ab", b"cd").whole(3)
    announced = arriving(b"ab", length=4)
    with pytest.raises(TooLarge):
        await announced.whole(3)
    assert not announced.read


async def test_a_client_that_leaves_is_told_from_one_that_has_finished() -> None:
    with pytest.raises(Disconnected):
        await arriving(b"ab", whole=False).whole(100)
    received = []
    with pytest.raises(Disconnected):
        async for chunk in arriving(b"ab", b"cd", whole=False).chunks():
            received.append(chunk)
    assert received == [b"ab", b"cd"]


async def test_nobody_waits_for_a_body_that_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "STALLED", 0.01)

    async def never() -> dict[str, Any]:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async with asyncio.timeout(5):
        with pytest.raises(TooSlow):
            await Body(never, 100).whole(100)
        with pytest.raises(TooSlow):
            await anext(Body(never, 100).chunks())


async def test_nobody_waits_without_end_for_a_body_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "LONGEST", 0.05)

    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": True}

    async with asyncio.timeout(5):
        with pytest.raises(TooSlow, match="longer than"):
            await Body(drip, None).whole(100)


async def test_what_is_discarded_is_read_to_its_end_or_for_a_while() -> None:
    for body in (arriving(b"ab", b"cd"), arriving(b"ab", whole=False)):
        await body.discard(5)
    stuck = Body(asyncio.Event().wait, None)  # type: ignore[arg-type]
    await asyncio.wait_for(stuck.discard(0.01), 5)
    assert not stuck.read
