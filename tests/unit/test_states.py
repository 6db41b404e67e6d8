"""The table of moves by itself; `tests/integration/test_lifecycle.py` holds it against the store."""

import pytest

from headway.states import TERMINAL, TRANSITIONS, JobState


def test_every_state_has_its_moves() -> None:
    assert TRANSITIONS.keys() == set(JobState)


@pytest.mark.parametrize("state", JobState)
def test_terminal_states_are_those_without_a_move(state: JobState) -> None:
    assert state.terminal == (state in TERMINAL) == (not TRANSITIONS[state])


@pytest.mark.parametrize("state", JobState)
def test_no_state_leads_to_itself(state: JobState) -> None:
    assert state not in TRANSITIONS[state]


def test_an_end_can_be_reached_from_every_state() -> None:
    for state in JobState:
        reached, seen = {state}, set()
        while reached:
            seen |= reached
            reached = {move for one in reached for move in TRANSITIONS[one]} - seen
        assert seen & TERMINAL


def test_a_state_is_its_word() -> None:
    assert [f"{state}" for state in JobState] == ["scheduled", "queued", "running", "succeeded", "failed", "cancelled"]
