"""Attempts that fail, and what becomes of them."""

from collections.abc import Iterator

import asyncpg
import pytest

from headway import Retry
from headway.settings import Settings
from tests.conftest import Service, run
from tests.integration import engine_kinds


@pytest.fixture
def settings(settings: Settings) -> Iterator[Settings]:
    engine_kinds.calls.clear()
    yield settings.model_copy(update={"kinds": (engine_kinds.__name__,)})


async def test_an_attempt_that_fails_is_run_again_until_it_succeeds(service: Service) -> None:
    job = await run(service, "engine.fail", {"times": 2})

    assert (job["state"], job["attempt"], job["result"], job["error"]) == ("succeeded", 3, "done", None)
    assert [attempt for _, attempt in engine_kinds.calls] == [1, 2, 3]


async def test_a_job_fails_when_no_attempt_is_left_and_every_failure_can_be_read(service: Service) -> None:
    job = await run(service, "engine.fail", {}, max_attempts=2)

    assert (job["state"], job["attempt"]) == ("failed", 2)
    assert job["error"] == {"type": "handler-failed", "message": "ValueError: attempt 2"}
    failures = (await service.http.get(f"/api/v1/jobs/{job['id']}/failures")).json()["failures"]
    assert [failure["error"]["message"] for failure in failures] == ["ValueError: attempt 1", "ValueError: attempt 2"]
    assert failures[0]["error"]["class"] == "builtins.ValueError"
    assert "raise ValueError" in failures[0]["error"]["traceback"]


async def test_fatal_is_not_run_again(service: Service) -> None:
    job = await run(service, "engine.fail", {"fatal": True})

    assert (job["state"], job["attempt"]) == ("failed", 1)
    assert job["error"] == {"type": "fatal", "message": "Never."}


async def test_a_handler_chooses_when_to_be_run_again(service: Service, database: asyncpg.Connection) -> None:
    job = await run(service, "engine.fail", {"after": 0.3, "times": 0})

    assert (job["state"], job["attempt"]) == ("succeeded", 2)
    events = [row["data"] for row in await database.fetch("SELECT data FROM events ORDER BY seq")]
    assert [event["state"] for event in events] == ["queued", "running", "scheduled", "queued", "running", "succeeded"]
    assert events[2]["error"] == {"type": "retry", "message": "Not yet."}


@pytest.mark.parametrize(("asked", "kept"), [(-1.0, 0.0), (1e12, 400 * 86400.0), (float("inf"), 400 * 86400.0)])
def test_a_time_that_cannot_be_is_the_nearest_that_can(asked: float, kept: float) -> None:
    """What other servers say in Retry-After may be handed on."""
    assert Retry(after=asked).after == kept


def test_no_number_is_no_time() -> None:
    with pytest.raises(ValueError, match="not NaN"):
        Retry(after=float("nan"))
