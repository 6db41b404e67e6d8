"""A few seconds of `chaos` with a fixed seed, and the same with fencing switched off, which the checker must catch.

`make chaos` is the long form.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.chaos import run
from tests.faults.chaos_stack import Options

# Servers, services and faults of their own take their time on a busy machine.
pytestmark = pytest.mark.timeout(180)

# Those after which all is well again at once.
QUICK = (
    "kill-worker",
    "pause-worker",
    "pause-past-lease",
    "flush-redis",
    "kill-redis",
    "end-connections",
    "repeat-wakeups",
    "reset",
    "lose-reply",
)


@pytest.fixture
def home() -> Iterator[Path]:
    """Not below pytest's folders: another run of pytest closes those to the user that the servers run as."""
    with tempfile.TemporaryDirectory(prefix="headway-chaos-") as folder:
        yield Path(folder)


async def test_no_promise_is_broken_under_random_faults(home: Path) -> None:
    options = Options(seconds=4, seed=5, workers=2, webs=1, rate=30, fault_every=0.4, lease=2, faults=QUICK)
    report = await run(options, home)
    assert report.violations == []
    assert report.jobs > 50
    assert report.faults.total() >= 3


async def test_a_build_without_fencing_is_caught(home: Path) -> None:
    faults = ("pause-past-lease",)
    options = Options(
        seconds=3, seed=5, workers=2, webs=1, rate=10, fault_every=0.2, lease=2, faults=faults, unfenced=True
    )
    # Whether a paused worker holds a job that others take meanwhile is chance, which a busy machine makes small.
    reports = []
    for seed in range(5, 9):
        (home / str(seed)).mkdir()
        reports.append(await run(replace(options, seed=seed), home / str(seed)))
        if any(violation.startswith("fencing:") for violation in reports[-1].violations):
            return
    pytest.fail(f"not caught: {reports}")
