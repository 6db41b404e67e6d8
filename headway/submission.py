"""What is asked for: a job before it is submitted."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from uuid_utils.compat import uuid7

from headway.job import Job, Priority

# What a client says of a job, but for its concurrency key.
ASKED = ("kind", "input", "tags", "priority", "timeout", "max_attempts", "run_at", "delay")


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a client asks for, already checked. `run_at` is RFC 3339, `delay` and `timeout` are seconds.

    `left_out` names what is the kind's own and not the client's: another release may have other defaults. `batch` is
    how many jobs came in the same request, if that was one of several.
    """

    tenant_id: UUID
    kind: str
    input: Any
    tags: Sequence[str]
    priority: Priority
    timeout: float
    max_attempts: int
    run_at: str | None = None
    delay: float | None = None
    concurrency_key: str | None = None
    concurrency_limit: int = 1
    parent_id: UUID | None = None
    parent_token: int | None = None
    depth: int = 0
    retry_of: UUID | None = None
    idempotency_key: str | None = None
    left_out: Sequence[str] = ()
    batch: int | None = None

    def digest(self) -> str:
        """What tells this request from another one that comes with the same idempotency key."""
        asked = {name: getattr(self, name) for name in ASKED if name not in self.left_out}
        if self.concurrency_key is not None:
            # Apart from the others, so that the digests of requests made before there were such keys still hold.
            asked |= {"concurrency_key": self.concurrency_key, "concurrency_limit": self.concurrency_limit}
        if self.batch is not None:
            asked |= {"batch": self.batch}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def is_request(self, digest: str) -> bool:
        """Whether this request has a digest, of now or of before defaults were left out of it."""
        return digest in (self.digest(), replace(self, left_out=()).digest())

    def as_record(self) -> dict[str, Any]:
        """The job as the store takes it, with an id of its own."""
        return {
            "id": str(uuid7()),
            "tenant_id": str(self.tenant_id),
            "kind": self.kind,
            "input": self.input,
            "tags": list(self.tags),
            "priority": self.priority.value,
            "timeout": self.timeout,
            "max_attempts": self.max_attempts,
            "run_at": self.run_at,
            "delay": self.delay,
            "concurrency_key": self.concurrency_key,
            "concurrency_limit": self.concurrency_limit,
            "parent_id": str(self.parent_id) if self.parent_id else None,
            "parent_token": self.parent_token,
            "depth": self.depth,
            "retry_of": str(self.retry_of) if self.retry_of else None,
            "idempotency_key": self.idempotency_key,
            "digest": self.digest() if self.idempotency_key else None,
        }


def again(job: Job) -> NewJob:
    """The job anew. No client can send a key with a space, and each job has one of its own to be retried by."""
    return NewJob(
        job.tenant_id,
        job.kind,
        job.input,
        job.tags,
        job.priority,
        job.timeout,
        job.max_attempts,
        concurrency_key=job.concurrency_key,
        concurrency_limit=job.concurrency_limit,
        retry_of=job.id,
        idempotency_key=f"retry {job.id}",
    )
