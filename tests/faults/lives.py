"""Valid histories, drawn by hypothesis: what a system without a fault would leave behind of a few jobs' lives."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from tests.faults.history import Line


@dataclass(frozen=True)
class Claim:
    """What one attempt did before it ended."""

    logs: int = 0
    reports: int = 0
    saves: int = 0
    ending: str = "crash"


@dataclass(frozen=True)
class Plan:
    """A job's life."""

    claims: Sequence[Claim]
    acknowledged: bool = True
    cancelled_while_queued: bool = False
    reads: bool = True
    followed: bool = True
    # Whether it is submitted with an idempotency key, again with the same one, and by another request as well.
    repeated: bool = False
    # Whether it has the concurrency key that one job at a time may have.
    keyed: bool = False


def _plan(*, before: list[Claim], final: Claim, queued: bool, **more: bool) -> Plan:
    return Plan(before if queued else [*before, final], cancelled_while_queued=queued, **more)


few = st.integers(0, 2)
plans = st.lists(
    st.builds(
        _plan,
        before=st.lists(st.builds(Claim, few, few, few, st.sampled_from(["crash", "interrupt"])), max_size=2),
        final=st.builds(Claim, few, few, few, st.sampled_from(["succeed", "artifact", "fail", "cancel"])),
        queued=st.booleans(),
        acknowledged=st.booleans(),
        reads=st.booleans(),
        followed=st.booleans(),
        repeated=st.booleans(),
        keyed=st.booleans(),
    ),
    max_size=3,
)
# Each history holds these, so that there is something to spoil whatever hypothesis draws.
RICH = Plan([Claim(2, 2, 2, "crash"), Claim(1, 1, 1, "interrupt"), Claim(2, 2, 2, "artifact")])
FIXED = (
    RICH,
    Plan([Claim(1, 1, 0, "crash"), Claim(0, 0, 0, "cancel")]),
    Plan([Claim(1, 0, 0, "fail")]),
    Plan([], cancelled_while_queued=True),
    Plan([Claim(1, 0, 1, "crash"), Claim(0, 0, 0, "crash"), Claim(0, 0, 0, "crash")]),
    Plan([Claim(ending="succeed")], repeated=True, keyed=True),
    Plan([Claim(ending="crash"), Claim(ending="succeed")], keyed=True),
    Plan([Claim(ending="wait"), Claim(ending="gather")]),
)


class Writer:
    """Writes the history that a correct system would leave behind."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.final: list[Line] = []
        self._jobs = 0
        self.clock = datetime(2026, 1, 1, tzinfo=UTC)

    def write(self, type: str, **fields: Any) -> None:
        self.lines.append({"at": len(self.lines), "type": type, **fields})

    def call(self, name: str, asked: Line, outcome: str, answer: Line) -> None:
        key = f"{name}-{len(self.lines)}"
        self.write("invoke", id=key, name=name, client=1, asked=asked)
        self.write(outcome, id=key, answer=answer)

    def live(self, plan: Plan, parent: str | None = None) -> str:
        """Write a life; the job's id."""
        self._jobs += 1
        job = str(UUID(int=self._jobs))
        _Life(self, plan, job, f"tag-{self._jobs}", parent).write()
        return job


class _Life:
    def __init__(self, writer: Writer, plan: Plan, job: str, tag: str, parent: str | None) -> None:
        self.writer = writer
        self.plan = plan
        self.row: Line = {
            **{"id": job, "tags": [tag], "state": "queued", "attempt": 0, "interruptions": 0, "crashes": 0},
            **{"token": 0, "seq": 0, "epoch": 1, "cancel_requested_at": None, "result": None, "error": None},
            **{"checkpoint": None, "concurrency_key": "one" if plan.keyed else None, "concurrency_limit": 1},
            "parent_id": parent,
        }
        self.children: list[list[str]] = []
        self.key = f"key of {tag}" if plan.repeated else None
        self.runs = 0
        self.shown = 0

    def write(self) -> None:
        self.event("state", state="queued", attempt=0)
        outcome = "ok" if self.plan.acknowledged else "unknown"
        asked = {"tag": self.row["tags"][0], "key": self.key}
        if self.row["parent_id"] is None:
            self.writer.call("submit", asked, outcome, self.answer() if outcome == "ok" else {})
        if self.plan.followed:
            self.frame("snapshot", {"state": "queued"})
            self.shown = 1
        for claim in self.plan.claims:
            self.attempt(claim)
        if self.plan.cancelled_while_queued and self.row["state"] == "queued":
            self.row |= {"cancel_requested_at": "then"}
            self.move("cancelled", cancel_requested_at="then")
            self.writer.call("cancel", {"job": self.row["id"]}, "ok", self.answer())
        self.read()
        if self.key is not None:
            self.writer.call("submit", asked, "ok", self.answer())
            other = asked | {"tag": f"another than {asked['tag']}"}
            self.writer.call("submit", other, "fail", {"status": 422})
        if self.plan.followed:
            self.writer.write("frame", socket=f"socket-{self.row['id']}", job=self.row["id"], t="bye", d={})
        self.writer.final.append({"type": "job", **self.row})

    def attempt(self, claim: Claim) -> None:
        self.row["token"] += 1
        self.row["attempt"] += 1
        self.move("running")
        self.runs += 1
        run = UUID(int=UUID(self.row["id"]).int * 100 + self.runs).hex
        of = {"run": run, "job": self.row["id"], "token": self.row["token"], "attempt": self.row["attempt"]}
        self.writer.write("start", **of, checkpoint=self.row["checkpoint"])
        for _ in range(claim.logs):
            self.event("log", message=f"run {run}", level="info")
        for report in range(claim.reports):
            self.event("progress", done=report)
        for _ in range(claim.saves):
            step = (self.row["checkpoint"] or {"step": 0})["step"] + 1
            self.row["checkpoint"] = {"step": step}
            self.writer.write("saved", run=run, step=step)
        self.read()
        getattr(self, claim.ending)(run, claim.reports)
        self.read()

    def crash(self, run: str, reports: int) -> None:
        self.row["crashes"] += 1
        self.row["token"] += 1
        if self.row["crashes"] == 3:
            self.row["error"] = {"type": "crashed", "message": "The worker died 3 times while it ran this job."}
            self.move("failed", reason="worker died", error=self.row["error"])
        else:
            self.row["attempt"] -= 1
            self.move("queued", reason="worker died")

    def interrupt(self, run: str, reports: int) -> None:
        self.writer.write("end", run=run, outcome="raised", reports=reports)
        self.row["interruptions"] += 1
        self.row["attempt"] -= 1
        self.move("queued", reason="interrupted")

    def wait(self, run: str, reports: int) -> None:
        self.writer.write("end", run=run, outcome="raised", reports=reports)
        self.row["attempt"] -= 1
        self.move("scheduled", reason="waits for its children")
        child = Plan([Claim(ending="succeed")], reads=False, followed=False)
        self.children = [[self.writer.live(child, self.row["id"]), "succeeded"] for _ in range(2)]
        self.move("queued")

    def gather(self, run: str, reports: int) -> None:
        self.succeed(run, reports, children=self.children)

    def succeed(self, run: str, reports: int, **result: Any) -> None:
        self.row["result"] = {"run": run, **result}
        self.writer.write("end", run=run, outcome="returned", reports=reports, **result)
        self.move("succeeded", result=self.row["result"])

    def artifact(self, run: str, reports: int) -> None:
        self.succeed(run, reports, sha256=f"digest of {run}")
        digest = self.row["result"]["sha256"]
        self.writer.final.append({"type": "artifact", "job": self.row["id"], "sha256": digest, "stored": digest})
        self.writer.call("download", {"job": self.row["id"]}, "ok", {"status": 200, "sha256": digest})

    def fail(self, run: str, reports: int) -> None:
        self.writer.write("end", run=run, outcome="raised", reports=reports)
        self.row["error"] = {"type": "handler-failed", "message": f"RuntimeError: run {run}"}
        self.move("failed", error=self.row["error"])

    def cancel(self, run: str, reports: int) -> None:
        self.row["cancel_requested_at"] = "then"
        self.event("state", state="running", attempt=self.row["attempt"], cancel_requested_at="then")
        self.writer.call("cancel", {"job": self.row["id"]}, "ok", self.answer())
        self.writer.write("end", run=run, outcome="raised", reports=reports)
        self.move("cancelled")
        self.writer.call("cancel", {"job": self.row["id"]}, "ok", self.answer())

    def move(self, state: str, **data: Any) -> None:
        self.row["state"] = state
        self.event("state", state=state, attempt=self.row["attempt"], **data)

    def event(self, kind: str, **data: Any) -> None:
        self.row["seq"] += 1
        self.writer.clock += timedelta(seconds=1)
        if kind == "state":
            data["at"] = self.writer.clock.isoformat()
        if kind != "progress":
            self.writer.final.append(
                {"type": "event", "job": self.row["id"], "seq": self.row["seq"], "kind": kind, "data": data}
            )
        if self.shown:
            self.frame(kind, data, prev=self.shown)
            self.shown = self.row["seq"]

    def frame(self, t: str, d: Line, prev: int | None = None) -> None:
        socket = f"socket-{self.row['id']}"
        self.writer.write("frame", socket=socket, job=self.row["id"], t=t, prev=prev, seq=self.row["seq"], d=d)

    def read(self) -> None:
        if self.plan.reads and self.plan.acknowledged:
            self.writer.call("read", {"job": self.row["id"]}, "ok", self.answer())

    def answer(self) -> Line:
        return {"status": 200, "job": self.row["id"]} | {
            name: self.row[name] for name in ("state", "seq", "epoch", "result")
        }


def valid(drawn: Sequence[Plan]) -> list[Line]:
    """A history in which all went well, with these lives in it."""
    writer = Writer()
    for plan in [*FIXED, *drawn]:
        writer.live(plan)
    finals = [copy.deepcopy(line) | {"at": 10**9 + number} for number, line in enumerate(writer.final)]
    return [*copy.deepcopy(writer.lines), *finals]
