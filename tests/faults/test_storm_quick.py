"""A few seconds of `storm` with a fixed seed. `make storm` is the long form."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.storm import Plan, run

# Servers, services and faults of their own take their time on a busy machine.
pytestmark = pytest.mark.timeout(300)

# Those after which all is well again at once.
QUICK = ("kill-redis", "flush-redis", "kill-web", "kill-worker", "end-connections", "reset")


@pytest.fixture
def home() -> Iterator[Path]:
    """Not below pytest's folders: another run of pytest closes those to the user that the servers run as."""
    with tempfile.TemporaryDirectory(prefix="headway-storm-") as folder:
        yield Path(folder)


async def test_no_client_sees_a_gap_a_duplicate_or_what_is_not_its_own(home: Path) -> None:
    plan = Plan(sockets=40, reconnects=3, events=240, seed=3, seconds=5, fault_every=0.6, faults=QUICK)
    report = await run(plan, home)
    assert report.violations == []
    assert report.events >= plan.events
    assert report.reconnects >= plan.sockets * plan.reconnects * 0.8
    assert report.faults.total() >= 3
