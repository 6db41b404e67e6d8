"""Lines of the live stream."""

from uuid import UUID

from headway.events import message
from headway.job import Event
from services.web.live.lines import encode


def test_an_event_that_is_heard_and_one_that_is_read_again_are_the_same_bytes() -> None:
    heard = {"done": 1, "total": 2, "counts": {"rows": 1, "bad": 0}, "eta": 0.5}
    # jsonb puts short keys first.
    read = {"eta": 0.5, "done": 1, "total": 2, "counts": {"bad": 0, "rows": 1}}
    event = Event(UUID(int=1), UUID(int=2), 1, 3, "progress", heard)
    assert message(event)["d"] == encode(read)
