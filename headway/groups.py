"""Groups: a job that submits others and is woken when all of them have ended.

Children are ordinary jobs with a parent. Each has an idempotency key of its own, so that a handler that is run again
finds those that it submitted before. The parent waits in Postgres, without a slot; any worker keeps its progress and
wakes it.
"""

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from headway.errors import Fatal
from headway.job import Child, ChildEnding, Claim, Progress
from headway.lifecycle import Lifecycle
from headway.store import Store
from headway.store.groups import GroupStore
from headway.submission import NewJob

MOST_CHILDREN = 10_000
# Children may have children, but a kind that submits itself must come to an end.
MOST_DEPTH = 5
SUBMITTED_AT_ONCE = 500
TENDED_AT_ONCE = 1000
# Parents whose open children are counted in one statement: each may have 10,000.
TALLIED_AT_ONCE = 50


class Groups:
    """Submits children, and looks after those who wait for them."""

    def __init__(self, store: Store, lifecycle: Lifecycle) -> None:
        self._groups = GroupStore(store)
        self._lifecycle = lifecycle
        # The last parent whose children were counted; the next ones come next.
        self._tallied = UUID(int=0)

    async def endings(self, claim: Claim, children: Sequence[Child], first: int) -> list[ChildEnding] | None:
        """How the children ended, in their order; None while some are open. Those that are missing are submitted.

        `first` is how many children of the job come before these. Raises Fatal if there are too many, if their parents
        are too many generations, or if a kind is unknown.
        """
        if first + len(children) > MOST_CHILDREN:
            raise Fatal(f"A job may have {MOST_CHILDREN:,} children, not {first + len(children):,}; make larger parts.")
        keys = [f"child {claim.job_id} {number}" for number in range(first, first + len(children))]
        there = await self._groups.children(claim.tenant_id, keys)
        missing = [number for number in range(len(children)) if number not in there]
        if missing:
            await self._submit(claim, [(children[number], keys[number]) for number in missing])
        if missing or not all(ending.state.terminal for ending in there.values()):
            return None
        return list(there.values())

    async def wait(self, claim: Claim, total: int) -> None:
        """Let the job wait until its `total` children have ended. Raises LeaseLost."""
        await self._lifecycle.wait(claim, Progress(0, total, unit="jobs", message="waits for its children").as_json())

    async def tend(self) -> None:
        """Show how far the children of waiting jobs are, wake those whose children have ended, cancel orphans."""
        waiting = await self._groups.waiting(self._tallied, TALLIED_AT_ONCE)
        self._tallied = waiting[-1] if len(waiting) == TALLIED_AT_ONCE else UUID(int=0)
        if waiting:
            await self._lifecycle.tally(waiting)
        while await self._lifecycle.promote(TENDED_AT_ONCE, waiting=True) == TENDED_AT_ONCE:
            pass
        while orphans := await self._groups.orphans(TENDED_AT_ONCE):
            by_tenant: dict[UUID, list[UUID]] = defaultdict(list)
            for job_id, tenant_id in orphans:
                by_tenant[tenant_id].append(job_id)
            for tenant_id, ids in by_tenant.items():
                await self._lifecycle.cancel_many(ids, tenant_id)

    async def _submit(self, claim: Claim, children: Sequence[tuple[Child, str]]) -> None:
        if claim.depth >= MOST_DEPTH:
            raise Fatal(f"Children of children go {MOST_DEPTH} generations deep; does {claim.kind} submit itself?")
        kinds = await self._groups.kinds()
        for child, _ in children:
            if child.kind not in kinds:
                raise Fatal(f"There is no kind {child.kind!r} for a child; there are: {', '.join(kinds)}.")
        new = [
            NewJob(
                claim.tenant_id,
                child.kind,
                child.input,
                child.tags,
                child.priority,
                child.timeout or kinds[child.kind]["timeout"],
                child.max_attempts or kinds[child.kind]["max_attempts"],
                concurrency_key=child.concurrency_key,
                concurrency_limit=child.concurrency_limit,
                parent_id=claim.job_id,
                parent_token=claim.token,
                depth=claim.depth + 1,
                idempotency_key=key,
            )
            for child, key in children
        ]
        for start in range(0, len(new), SUBMITTED_AT_ONCE):
            await self._lifecycle.submit_all(new[start : start + SUBMITTED_AT_ONCE])
