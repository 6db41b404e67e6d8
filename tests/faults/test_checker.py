"""The checker proves itself: it accepts every valid history, and catches each way in which one can be wrong."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings

from tests.faults.checker import CHECKS, check
from tests.faults.history import History, Line, Recorder, merge
from tests.faults.lives import Plan, plans, valid


def of(lines: Sequence[Line], job: int = 1, **fields: Any) -> list[Line]:
    """The lines of the fixed job of that number that have these fields."""
    job_id = str(UUID(int=job))
    ids = {line["id"]: line["asked"] for line in lines if line["type"] == "invoke"}
    tag = f"tag-{job}"

    def belongs(line: Line) -> bool:
        asked = ids.get(line.get("id", ""), {})
        return job_id in (line.get("id"), line.get("job"), asked.get("job")) or asked.get("tag") == tag

    return [line for line in lines if belongs(line) and fields.items() <= line.items()]


Mutation = Callable[[list[Line]], Any]
MUTATIONS: dict[str, tuple[str, Mutation]] = {}


def spoils(check_name: str) -> Callable[[Mutation], Mutation]:
    """Register a mutation that this check must catch."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS[mutation.__name__] = (check_name, mutation)
        return mutation

    return register


def state_event(lines: list[Line], state: str, job: int = 1, number: int = 0) -> Line:
    events = of(lines, job, type="event", kind="state")
    return [event for event in events if event["data"]["state"] == state][number]


def row(lines: list[Line], job: int = 1) -> Line:
    return of(lines, job, type="job")[0]


def answer(lines: list[Line], name: str, job: int = 1, number: int = 0) -> Line:
    invoked = {line["id"] for line in lines if line["type"] == "invoke" and line["name"] == name}
    return [line for line in of(lines, job, type="ok") if line["id"] in invoked][number]["answer"]  # type: ignore[no-any-return]


@spoils("losses")
def an_accepted_job_is_gone(lines: list[Line]) -> None:
    for line in of(lines):
        if line["type"] in ("job", "event", "artifact"):
            lines.remove(line)


@spoils("losses")
def a_job_never_ends(lines: list[Line]) -> None:
    row(lines)["state"] = "queued"


@spoils("inventions")
def a_job_that_nobody_submitted(lines: list[Line]) -> None:
    row(lines)["tags"] = ["tag-unheard-of"]


@spoils("inventions")
def one_submit_makes_two_jobs(lines: list[Line]) -> None:
    lines.append({**row(lines), "id": str(UUID(int=10**6))})


@spoils("inventions")
def a_refused_submit_makes_a_job(lines: list[Line]) -> None:
    of(lines, type="ok")[0]["type"] = "fail"


@spoils("inventions")
def a_run_without_a_submit(lines: list[Line]) -> None:
    of(lines, type="start")[0]["job"] = str(UUID(int=10**6))


def submits(lines: list[Line], tag: str) -> list[Line]:
    """The answers to the submits of this tag."""
    ids = [line["id"] for line in lines if line["type"] == "invoke" and line["asked"].get("tag") == tag]
    return [line for line in lines if line["type"] != "invoke" and line.get("id") in ids]


@spoils("idempotency")
def a_repeated_submit_makes_another_job(lines: list[Line]) -> None:
    lines.append({**row(lines, 6), "id": str(UUID(int=10**6))})


@spoils("idempotency")
def a_key_is_given_to_another_request_too(lines: list[Line]) -> None:
    lines.append({**row(lines, 6), "id": str(UUID(int=10**6)), "tags": ["another than tag-6"]})


@spoils("idempotency")
def another_request_is_told_that_the_job_is_its_own(lines: list[Line]) -> None:
    accepted = submits(lines, "tag-6")[-1]
    submits(lines, "another than tag-6")[0].update(type="ok", answer=accepted["answer"])


@spoils("idempotency")
def a_repeated_submit_is_refused(lines: list[Line]) -> None:
    submits(lines, "tag-6")[-1].update(type="fail", answer={"status": 422})


@spoils("places")
def two_jobs_of_a_key_run_at_a_time(lines: list[Line]) -> None:
    state_event(lines, "running", 7)["data"]["at"] = state_event(lines, "running", 6)["data"]["at"]


@spoils("places")
def a_job_begins_while_its_keys_only_place_is_taken(lines: list[Line]) -> None:
    state_event(lines, "succeeded", 6)["data"]["at"] = state_event(lines, "succeeded", 7)["data"]["at"]


@spoils("groups")
def a_parent_is_woken_before_its_children_have_ended(lines: list[Line]) -> None:
    state_event(lines, "succeeded", 9)["data"]["at"] = state_event(lines, "succeeded", 8)["data"]["at"]


@spoils("groups")
def the_ending_of_a_child_is_missing(lines: list[Line]) -> None:
    row(lines, 8)["result"]["children"].pop()


@spoils("groups")
def a_child_is_submitted_twice(lines: list[Line]) -> None:
    lines.append({**row(lines, 9), "id": str(UUID(int=10**6))})


@spoils("groups")
def a_child_outlives_its_parents_row(lines: list[Line]) -> None:
    row(lines, 9)["parent_id"] = str(UUID(int=10**6))


@spoils("transitions")
def two_terminal_events(lines: list[Line]) -> None:
    ending = state_event(lines, "succeeded")
    lines.append({**ending, "at": 10**10, "seq": ending["seq"] + 1})


@spoils("transitions")
def a_claim_is_not_recorded(lines: list[Line]) -> None:
    lines.remove(state_event(lines, "running", number=1))


@spoils("transitions")
def events_are_reordered(lines: list[Line]) -> None:
    one, other = state_event(lines, "running"), state_event(lines, "succeeded")
    one["at"], other["at"] = other["at"], one["at"]


@spoils("transitions")
def the_row_says_something_else(lines: list[Line]) -> None:
    row(lines)["state"] = "failed"


@spoils("fencing")
def a_claim_is_run_twice(lines: list[Line]) -> None:
    start = of(lines, type="start")[0]
    lines.append({**start, "run": UUID(int=10**6).hex})


@spoils("fencing")
def tokens_are_swapped(lines: list[Line]) -> None:
    starts = of(lines, type="start")
    starts[0]["token"], starts[-1]["token"] = starts[-1]["token"], starts[0]["token"]


@spoils("fencing")
def an_old_run_ends_the_job(lines: list[Line]) -> None:
    old, new = of(lines, type="start")[1], of(lines, type="start")[2]
    for line in lines:
        if line["type"] in ("end", "saved") and line["run"] == new["run"]:
            line["run"] = old["run"]
    row(lines)["result"]["run"] = old["run"]


@spoils("fencing")
def an_old_run_writes_a_log_event(lines: list[Line]) -> None:
    logs = of(lines, type="event", kind="log")
    logs[-1]["data"]["message"] = logs[0]["data"]["message"]


@spoils("fencing")
def a_checkpoint_goes_back(lines: list[Line]) -> None:
    of(lines, type="start")[1]["checkpoint"] = {"step": 1}


@spoils("fencing")
def an_old_run_overwrites_the_checkpoint(lines: list[Line]) -> None:
    row(lines)["checkpoint"] = {"step": 1}


@spoils("fencing")
def a_result_of_a_run_that_failed(lines: list[Line]) -> None:
    of(lines, type="start")
    for line in lines:
        if line["type"] == "end" and line["run"] == row(lines)["result"]["run"]:
            line["outcome"] = "raised"


@spoils("attempts")
def an_interruption_counts_as_an_attempt(lines: list[Line]) -> None:
    row(lines)["attempt"] += 1


@spoils("attempts")
def a_crash_is_not_counted(lines: list[Line]) -> None:
    row(lines)["crashes"] -= 1


@spoils("attempts")
def a_poison_job_loops(lines: list[Line]) -> None:
    row(lines, 5)["crashes"] = 4


@spoils("sequence")
def an_event_is_lost(lines: list[Line]) -> None:
    # Without reports there is nothing that a gap could be.
    lines.remove(of(lines, 3, type="event", kind="log")[0])


@spoils("sequence")
def an_event_is_there_twice(lines: list[Line]) -> None:
    event = state_event(lines, "running")
    lines.insert(lines.index(event), dict(event))


@spoils("sequence")
def an_event_comes_after_the_end(lines: list[Line]) -> None:
    row(lines, 3)["seq"] += 1
    log = of(lines, 3, type="event", kind="log")[0]
    lines.append({**log, "at": 10**10, "seq": row(lines, 3)["seq"]})


@spoils("followers")
def a_frame_is_dropped(lines: list[Line]) -> None:
    lines.remove(of(lines, type="frame", t="state")[1])


@spoils("followers")
def a_hole_is_hidden_from_the_follower(lines: list[Line]) -> None:
    frames = [frame for frame in of(lines, type="frame") if frame["t"] != "bye"]
    dropped = of(lines, type="frame", t="state")[1]
    frames[frames.index(dropped) + 1]["prev"] = dropped["prev"]
    lines.remove(dropped)


@spoils("followers")
def a_frame_is_altered(lines: list[Line]) -> None:
    of(lines, type="frame", t="log")[0]["d"] = {"message": "something else"}


@spoils("followers")
def a_follower_is_told_bye_too_early(lines: list[Line]) -> None:
    lines.remove(of(lines, type="frame", t="state")[-1])


@spoils("cancels")
def a_cancelled_job_is_committed_after_all(lines: list[Line]) -> None:
    answer(lines, "cancel", 4)["state"] = "succeeded"


@spoils("cancels")
def something_is_written_after_the_cancel(lines: list[Line]) -> None:
    answer(lines, "cancel", 4)["seq"] -= 1


@spoils("cancels")
def a_cancel_is_forgotten(lines: list[Line]) -> None:
    row(lines, 2)["cancel_requested_at"] = None


@spoils("cancels")
def a_job_that_nobody_cancelled_is(lines: list[Line]) -> None:
    for line in of(lines, 4, type="invoke", name="cancel"):
        lines.remove(line)


@spoils("reads")
def a_read_goes_back(lines: list[Line]) -> None:
    answer(lines, "read", number=-1)["seq"] = 1


@spoils("reads")
def an_accepted_job_is_not_found(lines: list[Line]) -> None:
    line = of(lines, type="ok")[1]
    line |= {"type": "fail", "answer": {"status": 404}}


@spoils("reads")
def a_read_shows_an_end_that_is_not_the_end(lines: list[Line]) -> None:
    answer(lines, "read", number=-1)["state"] = "cancelled"


@spoils("reads")
def a_read_shows_a_result_that_was_not_kept(lines: list[Line]) -> None:
    answer(lines, "read", number=-1)["result"] = {"run": "another"}


@spoils("results")
def stored_bytes_are_damaged(lines: list[Line]) -> None:
    of(lines, type="artifact")[0]["stored"] = "another digest"


@spoils("results")
def an_artifact_is_missing(lines: list[Line]) -> None:
    lines.remove(of(lines, type="artifact")[0])


@spoils("results")
def a_failed_job_shows_an_artifact(lines: list[Line]) -> None:
    lines.append({**of(lines, type="artifact")[0], "job": row(lines, 2)["id"]})


@spoils("results")
def the_handler_wrote_other_bytes(lines: list[Line]) -> None:
    for line in lines:
        if line["type"] == "end" and line["run"] == row(lines)["result"]["run"]:
            line["sha256"] = "another digest"


@spoils("results")
def a_download_is_damaged(lines: list[Line]) -> None:
    answer(lines, "download")["sha256"] = "another digest"


@spoils("conservation")
def there_are_more_jobs_than_submits(lines: list[Line]) -> None:
    lines.extend({**row(lines), "id": str(UUID(int=10**6 + number))} for number in range(10))


@spoils("conservation")
def a_row_vanishes_and_its_events_stay(lines: list[Line]) -> None:
    lines.remove(row(lines))


@spoils("failures")
def a_job_fails_because_of_a_fault(lines: list[Line]) -> None:
    row(lines, 3)["error"] = {"type": "handler-failed", "message": "ConnectionError: the connection was lost"}


@spoils("answers")
def a_read_is_answered_500(lines: list[Line]) -> None:
    answer(lines, "read")["status"] = 500


@spoils("exits")
def a_process_dies_by_itself(lines: list[Line]) -> None:
    lines.append({"at": 1, "type": "exit", "process": "worker-1", "how": "ended by itself with exit code 1"})


@given(plans)
def test_a_valid_history_passes(drawn: Sequence[Plan]) -> None:
    assert check(History.of(valid(drawn))) == []


@pytest.mark.parametrize("name", MUTATIONS)
@settings(max_examples=10)
@given(drawn=plans)
def test_a_spoilt_history_is_caught(name: str, drawn: Sequence[Plan]) -> None:
    check_name, mutation = MUTATIONS[name]
    lines = valid(drawn)
    mutation(lines)
    found = check(History.of(sorted(lines, key=lambda line: line["at"])))
    assert any(violation.startswith(f"{check_name}:") for violation in found), found


def test_every_check_has_a_mutation_that_it_catches() -> None:
    assert {each.__name__ for each in CHECKS} == {check_name for check_name, _ in MUTATIONS.values()}


def test_a_history_outlives_a_process_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    first, second = Recorder(tmp_path, "first"), Recorder(tmp_path, "second")
    first.invoke("submit", 1, tag="a").end("ok", job="1")
    second.write("fault", name="kill")
    first.close()
    second.close()
    with (tmp_path / "second.jsonl").open("a") as file:
        file.write(json.dumps({"at": 1, "type": "fault"})[:10])
    assert [line["type"] for line in merge(tmp_path)] == ["invoke", "ok", "fault"]
    assert History.of(merge(tmp_path)).named("submit")[0].outcome == "ok"
