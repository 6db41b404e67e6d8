"""What has been committed, as Postgres sees it, and cursors: how far a reader of many jobs' events has come."""

import base64
import re
import time
from dataclasses import dataclass
from uuid import UUID

FORM = re.compile(r"([0-9]{1,19}):([0-9]{1,19}):((?:[0-9]{1,19},?)*)", re.ASCII)


class BadCursor(ValueError):
    """The text is not a cursor."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot of Postgres: the transactions before `xmax` that are not in `running` are seen by it.

    Of two snapshots of one server the later one sees all that the earlier one does.
    """

    text: str
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """Of the text of a `pg_snapshot`. Raises BadCursor."""
        form = FORM.fullmatch(text)
        if form is None:
            raise BadCursor(f"{text[:100]!r} is not a snapshot.")
        xmin, xmax, running = int(form[1]), int(form[2]), [int(xid) for xid in form[3].split(",") if xid]
        if not 0 < xmin <= xmax < 1 << 63 or any(not xmin <= xid < xmax for xid in running):
            raise BadCursor(f"{text[:100]!r} is not a snapshot.")
        return cls(text, xmax, frozenset(running))

    def sees(self, xid: int) -> bool:
        """Whether a transaction that has committed by now had done so then."""
        return xid < self.xmax and xid not in self.running

    def includes(self, earlier: "Snapshot") -> bool:
        """Whether this one is not the earlier of two."""
        return self.xmax > earlier.xmax or (self.xmax == earlier.xmax and self.running <= earlier.running)


@dataclass(frozen=True, slots=True)
class Cursor:
    """All events that `since` sees were sent, and of those new in `upto` the ones up to `job` and `seq`, in that order.

    `database` tells in which database that holds, `at` when it was made, in seconds since 1970.
    """

    database: str
    since: Snapshot
    upto: Snapshot | None = None
    job: UUID | None = None
    seq: int = 0
    at: float = 0.0

    def encode(self) -> str:
        """As clients hold it: opaque, and fit for a URL and a header."""
        parts = [self.database, str(int(self.at or time.time())), self.since.text]
        if self.upto is not None:
            parts += [self.upto.text, str(self.job), str(self.seq)]
        return base64.urlsafe_b64encode("|".join(parts).encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "Cursor":
        """Raises BadCursor."""
        try:
            parts = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode().split("|")
            database, at, since, *rest = parts
            if not rest:
                return cls(database, Snapshot.parse(since), at=float(int(at)))
            upto, job, seq = rest
            return cls(database, Snapshot.parse(since), Snapshot.parse(upto), UUID(job), int(seq), float(int(at)))
        except ValueError:
            raise BadCursor("The cursor was not issued here; leave it out to begin with snapshots.") from None
