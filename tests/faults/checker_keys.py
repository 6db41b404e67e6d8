"""The checks of idempotency keys, of concurrency keys, and of parents and children. See `checker`."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise

from tests.faults.history import History, Line, Operation, asks, claims, states

# A claim's time is that of its statement's beginning, a little before the ending of another job that it saw.
SKEW = timedelta(milliseconds=100)


def idempotency(history: History) -> Iterator[str]:
    """10. An idempotency key leads to one job at most: its request gets it every time, another one is refused."""
    jobs: defaultdict[str, list[str]] = defaultdict(list)
    for job in history.jobs:
        jobs[job["tags"][0]].append(job["id"])
    sent: defaultdict[str, list[Operation]] = defaultdict(list)
    for submit in history.named("submit"):
        if submit.asked.get("key"):
            sent[submit.asked["key"]].append(submit)
    for key, submits in sent.items():
        there = {job: tag for tag in {submit.asked["tag"] for submit in submits} for job in jobs[tag]}
        if len(there) > 1:
            yield f"idempotency key {key} led to {len(there)} jobs: {', '.join(there)}"
        for submit in submits:
            mine = submit.asked["tag"] in there.values()
            if submit.outcome == "ok" and there.get(submit.answer["job"]) != submit.asked["tag"]:
                yield f"submit {submit.id} with key {key} was answered with another request's job"
            elif submit.answer.get("status") == 422 and (mine or not there):
                yield f"submit {submit.id} was refused, and no other request has its key {key}"


def places(history: History) -> Iterator[str]:
    """Of the jobs of a concurrency key no more run at a time, on the database's clock, than the limit of the newest."""
    held: defaultdict[str, list[tuple[datetime, datetime, Line]]] = defaultdict(list)
    for job in history.jobs:
        if key := job.get("concurrency_key"):
            moves = [event for event in states(history, job) if not asks(event)]
            for event, following in pairwise(moves):
                if claims(event):
                    held[key].append((_at(event), _at(following), job))
    for key, intervals in held.items():
        for mine in intervals:
            began, _, job = mine
            running = 1 + sum(other is not mine and other[0] <= began < other[1] - SKEW for other in intervals)
            if running > job["concurrency_limit"]:
                yield f"job {job['id']} began as one of {running} of the key {key}"


def groups(history: History) -> Iterator[str]:
    """A parent ends with the endings of all its children, none of which is there twice, and not before them."""
    jobs = {job["id"]: job for job in history.jobs}
    children: defaultdict[str, list[Line]] = defaultdict(list)
    for job in history.jobs:
        if (parent := job.get("parent_id")) is not None:
            children[parent].append(job)
            if parent not in jobs:
                yield f"job {job['id']} is a child of {parent}, which does not exist"
    for job in history.jobs:
        told = (job["result"] or {}).get("children")
        if told is None:
            continue
        there = {child["id"]: child["state"] for child in children[job["id"]]}
        if sorted(there.items()) != sorted((child, state) for child, state in told):
            yield f"job {job['id']} says that its children are {told}, and they are {there}"
        last = [_at(event) for event in states(history, job) if claims(event)][-1]
        for child in children[job["id"]]:
            if any(_at(event) - SKEW > last for event in states(history, child)[-1:]):
                yield f"job {job['id']} was claimed for the last time before its child {child['id']} ended"


def _at(event: Line) -> datetime:
    return datetime.fromisoformat(event["data"]["at"])
