"""The checks of what clients were shown: frames, answers to cancels and reads, artifacts. See `checker`."""

from collections import defaultdict
from collections.abc import Iterator

from headway.states import TERMINAL, JobState
from tests.faults.history import History, Operation


def followers(history: History) -> Iterator[str]:
    """7. and 8. A socket shows a slice of the events without a hole, the same to everyone, and then says bye."""
    shown: dict[tuple[str, int], object] = {}
    for socket, frames in history.frames.items():
        durable = {event["seq"]: event for event in history.events.get(frames[0]["job"], ())}
        held, ended = 0, False
        for frame in frames:
            where = f"socket {socket}, job {frame['job']}: frame {frame.get('seq')} ({frame['t']})"
            if ended != (frame["t"] == "bye"):
                yield f"{where} came {'after' if ended else 'before'} the end"
            if frame["t"] == "bye":
                continue
            if frame["t"] != "snapshot":
                if frame["prev"] != held or frame["seq"] <= held:
                    yield f"{where} says that {frame['prev']} came before it; it was {held}"
                if hole := [seq for seq in durable if held < seq < frame["seq"]]:
                    yield f"{where} came without events {hole}"
                kept = durable.get(frame["seq"])
                kind, data = (kept["kind"], kept["data"]) if kept else ("progress", frame["d"])
                if (kind, data) != (frame["t"], shown.setdefault((frame["job"], frame["seq"]), frame["d"])):
                    yield f"{where} is not what others were shown or what is kept"
            held, ended = frame["seq"], frame["d"].get("state") in TERMINAL


def cancels(history: History) -> Iterator[str]:
    """9. A final answer to a cancel is the job's end; a request is kept; nothing is cancelled that nobody cancelled."""
    jobs = {job["id"]: job for job in history.jobs}
    asked = {cancel.asked["job"] for cancel in history.named("cancel") if cancel.outcome != "fail"}
    for cancel in history.named("cancel"):
        job = jobs.get(cancel.asked["job"])
        if job is None or cancel.outcome != "ok":
            continue
        state, seq = cancel.answer["state"], cancel.answer["seq"]
        if state in TERMINAL and (state, seq) != (job["state"], job["seq"]):
            yield f"job {job['id']}: cancel was told {state} at {seq}, and it is {job['state']} at {job['seq']}"
        elif state not in TERMINAL and job["cancel_requested_at"] is None:
            yield f"job {job['id']}: a cancel was accepted and forgotten"
    for job in history.jobs:
        parent = jobs.get(job.get("parent_id"))
        left = parent is not None and parent["state"] in (JobState.CANCELLED, JobState.FAILED)
        if job["state"] == JobState.CANCELLED and job["id"] not in asked and not left:
            yield f"job {job['id']} is cancelled, and nobody cancelled it"


def reads(history: History) -> Iterator[str]:
    """11. After an accept there is no 404; whoever asks later is shown no older version; an end stays."""
    jobs = {job["id"]: job for job in history.jobs}
    answers: defaultdict[str, list[Operation]] = defaultdict(list)
    accepted: dict[str, int] = {}
    for operation in history.operations:
        if operation.outcome == "ok" and "seq" in operation.answer and operation.ended is not None:
            answers[operation.answer["job"]].append(operation)
            accepted[operation.answer["job"]] = min(operation.ended, accepted.get(operation.answer["job"], 1 << 63))
    for operation in history.operations:
        asked = operation.asked.get("job", "")
        if operation.answer.get("status") == 404 and accepted.get(asked, 1 << 63) < operation.began:
            yield f"job {asked} was accepted, and then not found by {operation.name} {operation.id}"
    for job_id, told in answers.items():
        for later in told:
            before = [_version(one) for one in told if one.ended is not None and one.ended < later.began]
            if before and _version(later) < max(before):
                yield f"job {job_id} went back from {max(before)} to {_version(later)} in {later.name} {later.id}"
            job = jobs.get(job_id)
            if job and later.answer["state"] in TERMINAL and later.answer["state"] != job["state"]:
                yield f"job {job_id} was shown {later.answer['state']} and is {job['state']}"
            shown = later.answer.get("result")
            if job and shown is not None and shown != job["result"]:
                yield f"job {job_id} was shown the result {shown} and has {job['result']}"


def results(history: History) -> Iterator[str]:
    """12. What a handler wrote is what is kept and what is downloaded; only a job that succeeded shows an artifact."""
    runs = {run.id: run for run in history.runs}
    kept: dict[str, str] = {}
    for job in history.jobs:
        artifacts = history.artifacts.get(job["id"], [])
        written = (job["result"] or {}).get("sha256")
        run = runs.get((job["result"] or {}).get("run", ""))
        if [artifact["sha256"] for artifact in artifacts] != ([written] if written else []):
            yield f"job {job['id']} ({job['state']}) shows {len(artifacts)} artifacts, and its result says {written}"
        if run and written != run.ended.get("sha256"):
            yield f"job {job['id']} says {written}, and its handler wrote {run.ended.get('sha256')}"
        for artifact in artifacts:
            kept[job["id"]] = artifact["sha256"]
            if artifact["stored"] != artifact["sha256"]:
                yield f"job {job['id']}: the stored bytes are {artifact['stored']}, not {artifact['sha256']}"
    for download in history.named("download"):
        if download.outcome == "ok" and download.answer["sha256"] != kept.get(download.asked["job"]):
            yield f"job {download.asked['job']}: download {download.id} got other bytes than are kept"


def answers(history: History) -> Iterator[str]:
    """A server that cannot answer says 503; 500 is a fault of its own."""
    for operation in history.operations:
        if operation.answer.get("status") == 500:
            yield f"{operation.name} {operation.id} was answered 500: {operation.answer.get('error')}"


def _version(operation: Operation) -> tuple[int, int]:
    return operation.answer["epoch"], operation.answer["seq"]
