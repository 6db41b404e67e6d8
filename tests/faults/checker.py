"""What must hold of a history once faults have stopped and the queue has drained. Pure: a history in, sentences out.

Each check looks at the rows, the events and what clients and handlers wrote down, and names the jobs that break it.
Those here are of jobs and their runs; those of keys and groups are in `checker_keys`, those of what clients were
shown in `checker_views`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from headway.states import TERMINAL, TRANSITIONS, JobState
from tests.faults.checker_keys import groups, idempotency, places
from tests.faults.checker_views import answers, cancels, followers, reads, results
from tests.faults.history import History, Line, Operation, Run, asks, claims, states

MOST_CRASHES = 3
# How handlers name their run in results, errors and log lines.
RUN = re.compile(r"\brun ([0-9a-f]{32})\b")
WAITS = "waits for its children"
BETTER = ("ok", "unknown", "fail")
BACK = {"interrupted": "interruptions", "worker died": "crashes"}

Check = Callable[[History], Iterator[str]]


def losses(history: History) -> Iterator[str]:
    """1. Every accepted job is there, and every job has ended."""
    known = {job["id"] for job in history.jobs}
    for submit in history.named("submit"):
        if submit.outcome == "ok" and submit.answer["job"] not in known:
            yield f"job {submit.answer['job']} was accepted and is gone"
    for job in history.jobs:
        if job["state"] not in TERMINAL:
            yield f"job {job['id']} never ended; it is {job['state']}"


def inventions(history: History) -> Iterator[str]:
    """2. Whatever ran was submitted; a submit leads to one job at most, and one that was refused to none."""
    submits: defaultdict[str, list[Operation]] = defaultdict(list)
    for submit in history.named("submit"):
        submits[submit.asked["tag"]].append(submit)
    jobs: defaultdict[str, list[str]] = defaultdict(list)
    for job in history.jobs:
        if job.get("parent_id") is None:
            jobs[" ".join(job["tags"])].append(job["id"])
    for tag, ids in jobs.items():
        sent = submits.get(tag, [])
        if not sent:
            yield f"job {ids[0]} was never submitted"
        elif all(submit.outcome == "fail" for submit in sent):
            yield f"job {ids[0]} exists though its submit was refused"
        if len(ids) > 1:
            yield f"one submit led to {len(ids)} jobs: {', '.join(ids)}"
        for submit in sent:
            if submit.outcome == "ok" and submit.answer["job"] != ids[0]:
                yield f"a submit was answered with job {submit.answer['job']} and led to {ids[0]}"
    known = {job["id"] for job in history.jobs}
    for run in history.runs:
        if run.job not in known:
            yield f"run {run.id} is of job {run.job}, which does not exist"


def transitions(history: History) -> Iterator[str]:
    """3. Only legal edges from submit to one terminal state, which the row and the last event agree on."""
    for job in history.jobs:
        state: JobState | None = None
        for event in states(history, job):
            new = JobState(event["data"]["state"])
            if state is None and new not in (JobState.QUEUED, JobState.SCHEDULED):
                yield f"job {job['id']} begins {new}"
            elif state is not None and new not in TRANSITIONS[state] and not (new == state and asks(event)):
                yield f"job {job['id']} went from {state} to {new} (event {event['seq']})"
            state = new
        if state != job["state"]:
            yield f"job {job['id']} is {job['state']}, and its last state event says {state}"


def fencing(history: History) -> Iterator[str]:
    """4. Each claim is run once, and nothing that was committed comes from a run whose claim was over."""
    runs = {run.id: run for run in history.runs}
    runs_of: defaultdict[str, list[Run]] = defaultdict(list)
    for run in history.runs:
        runs_of[run.job].append(run)
    for job in history.jobs:
        mine = runs_of[job["id"]]
        claimed = sum(claims(event) for event in states(history, job))
        for token, times in Counter(run.token for run in mine).items():
            if times > 1:
                yield f"job {job['id']} was run {times} times with token {token}"
            if token > job["token"]:
                yield f"job {job['id']} was run with token {token}, and its last token is {job['token']}"
        if len(mine) > claimed:
            yield f"job {job['id']} was run {len(mine)} times and claimed {claimed} times"
        yield from _ending(job, runs)
        yield from _authors(job, history.events.get(job["id"], ()), runs)
        yield from _checkpoints(job, mine)


def _ending(job: Line, runs: dict[str, Run]) -> Iterator[str]:
    """The result or error comes from the run with the last token."""
    named = (job["result"] or {}).get("run")
    if named is None and (found := RUN.search((job["error"] or {}).get("message", ""))):
        named = found[1]
    run = runs.get(named or "")
    if named is None:
        if job["state"] == JobState.SUCCEEDED:
            yield f"job {job['id']} succeeded without a result"
    elif run is None or run.job != job["id"]:
        yield f"job {job['id']} ended by run {named}, which is not one of its runs"
    elif run.token != job["token"]:
        yield f"job {job['id']} ended by a run with token {run.token}, and its last token is {job['token']}"
    elif (run.outcome == "returned") != (job["state"] == JobState.SUCCEEDED):
        yield f"job {job['id']} is {job['state']}, and its handler {run.outcome or 'never ended'}"


def _authors(job: Line, events: Sequence[Line], runs: dict[str, Run]) -> Iterator[str]:
    """Between two claims only one run writes log events, and later ones have higher tokens."""
    claim, author, last = 0, 0, 0
    for event in events:
        if event["kind"] == "state":
            claim += claims(event)
        elif event["kind"] == "log" and (named := RUN.search(event["data"]["message"])):
            run = runs.get(named[1])
            if run is None or run.job != job["id"]:
                yield f"job {job['id']} has log event {event['seq']} of run {named[1]}, which is not one of its runs"
            elif run.token < last or (run.token > last and author == claim):
                yield f"job {job['id']} has log event {event['seq']} by token {run.token} in the wrong claim"
            elif run.token == last and author != claim:
                yield f"job {job['id']} has log event {event['seq']} by token {run.token} after the next claim"
            else:
                author, last = claim, run.token


def _checkpoints(job: Line, runs: Sequence[Run]) -> Iterator[str]:
    """What was saved is what the next run starts from: a checkpoint never goes back."""
    saved = 0
    for run in sorted(runs, key=lambda run: run.token):
        found = (run.started.get("checkpoint") or {}).get("step", 0)
        if found < saved:
            yield f"job {job['id']} started from checkpoint {found} with token {run.token} after {saved} was saved"
        saved = max(saved, *run.saved, 0)
    if job.get("checkpoint") and job["checkpoint"].get("step", 0) < saved:
        yield f"job {job['id']} keeps checkpoint {job['checkpoint']['step']} after {saved} was saved"


def attempts(history: History) -> Iterator[str]:
    """5. A claim adds an attempt; an interruption or a crash takes it back and is counted apart, crashes up to 3."""
    for job in history.jobs:
        attempt, state = 0, None
        counted: Counter[str] = Counter()
        for event in states(history, job):
            data = event["data"]
            reason = BACK.get(data.get("reason", ""))
            counted[reason or ""] += 1
            if data["state"] == JobState.RUNNING and state != JobState.RUNNING:
                attempt += 1
            elif (reason or data.get("reason") == WAITS) and data["state"] not in TERMINAL:
                attempt -= 1
            if data["attempt"] != attempt:
                yield f"job {job['id']} has attempt {data['attempt']} in event {event['seq']}, not {attempt}"
                attempt = data["attempt"]
            state = data["state"]
        if job["attempt"] != attempt:
            yield f"job {job['id']} has attempt {job['attempt']} in its row and {attempt} in its events"
        if attempt > job.get("max_attempts", 1):
            yield f"job {job['id']} had {attempt} attempts, more than allowed"
        for column in BACK.values():
            if job[column] != counted[column]:
                yield f"job {job['id']} has {job[column]} {column} in its row and {counted[column]} in its events"
        crashed = (job["error"] or {}).get("type") == "crashed"
        if job["crashes"] > MOST_CRASHES or crashed != (job["crashes"] == MOST_CRASHES and job["state"] == "failed"):
            yield f"job {job['id']} crashed {job['crashes']} times and is {job['state']}: {job['error']}"


def sequence(history: History) -> Iterator[str]:
    """6. Events count up from 1; only reports, which are not kept, leave gaps; nothing comes after the terminal one."""
    reports: Counter[str] = Counter()
    unbounded = set()
    for run in history.runs:
        reports[run.job] += run.ended.get("reports", 0)
        if run.outcome is None:
            unbounded.add(run.job)
    for job in history.jobs:
        events = history.events.get(job["id"], [])
        seqs = [event["seq"] for event in events]
        if any(after <= before for before, after in pairwise(seqs)):
            yield f"job {job['id']} has events out of order: {seqs}"
        if seqs[:1] != [1]:
            yield f"job {job['id']} has no event 1"
        missing = job["seq"] - len(set(seqs))
        if missing < 0 or (missing > reports[job["id"]] and job["id"] not in unbounded):
            yield f"job {job['id']} lacks {missing} of {job['seq']} events and had {reports[job['id']]} reports"
        ends = [event["seq"] for event in events if event["kind"] == "state" and event["data"]["state"] in TERMINAL]
        if job["state"] in TERMINAL and ends != [job["seq"]]:
            yield f"job {job['id']} has terminal events {ends}, and its last event is {job['seq']}"


def conservation(history: History) -> Iterator[str]:
    """14. Submitted = terminal + open; between what was acknowledged and what was sent without a refusal."""
    # A submit that was sent again is one submit, of which the best answer counts.
    best: dict[str, str] = {}
    for submit in history.named("submit"):
        best[submit.asked["tag"]] = min(best.get(submit.asked["tag"], "fail"), submit.outcome, key=BETTER.index)
    outcomes = Counter(best.values())
    count = sum(job.get("parent_id") is None for job in history.jobs)
    if not outcomes["ok"] <= count <= outcomes["ok"] + outcomes["unknown"]:
        yield f"{count} jobs in the database, of {dict(outcomes)} submits"
    if len({job["id"] for job in history.jobs}) != len(history.jobs):
        yield "a job is there twice"
    for job_id in history.events.keys() - {job["id"] for job in history.jobs}:
        yield f"job {job_id} has events and no row"


def failures(history: History) -> Iterator[str]:
    """A job fails by its handler, by the timeout that was asked for or by too many crashes: never by a fault alone."""
    timeouts = {submit.asked["tag"]: submit.asked.get("timeout") for submit in history.named("submit")}
    for job in history.jobs:
        error = job["error"] or {}
        ours = error.get("type") == "crashed" or RUN.search(error.get("message", ""))
        if job["state"] == JobState.FAILED and not ours and not timeouts.get(job["tags"][0]):
            yield f"job {job['id']} ({job.get('kind')}) failed: {error}"


def exits(history: History) -> Iterator[str]:
    """Processes end when they are told to, with exit code 0, and never by themselves."""
    for ended in history.exits:
        yield f"{ended['process']} {ended['how']}"


CHECKS: tuple[Check, ...] = (
    losses,
    inventions,
    idempotency,
    places,
    groups,
    transitions,
    fencing,
    attempts,
    sequence,
    followers,
    cancels,
    reads,
    results,
    conservation,
    failures,
    answers,
    exits,
)


def check(history: History) -> list[str]:
    """Every violation, each with the name of its check."""
    return [f"{each.__name__}: {violation}" for each in CHECKS for violation in each(history)]
