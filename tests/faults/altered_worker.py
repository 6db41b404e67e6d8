"""`python -m tests.faults.altered_worker LEASE [--unfenced]`: the worker with another lease, or without fencing.

Without fencing its statements no longer ask for the claim's token: the build that the checker must catch.
"""

import re
import sys
from datetime import timedelta
from functools import partial

from headway.store import sql
from services.worker import __main__ as worker

TOKEN = re.compile(r"(?:\w+\.)?token = (?:\w+\.token|\$\d)")


def unfence() -> None:
    """Make every comparison of tokens in the SQL true."""
    altered = 0
    for name, statement in vars(sql).items():
        if isinstance(statement, str) and TOKEN.search(statement):
            setattr(sql, name, TOKEN.sub(lambda found: f"({found[0]} OR true)", statement))
            altered += 1
    if not altered:
        sys.exit("No statement asks for a token; alter the pattern here to what fencing looks like now.")


def main() -> None:
    if "--unfenced" in sys.argv:
        unfence()
    if lease := float(sys.argv[1]):
        worker.work = partial(worker.work, lease=timedelta(seconds=lease))
    worker.main()


if __name__ == "__main__":
    main()
