"""`python -m tests.faults.shifted_clock SECONDS MODULE [ARGUMENT ...]`: a program whose clock is fast, or slow.

The monotonic clock is left as it is: no clock that is set wrong changes that one.
"""

import datetime
import runpy
import sys
import time
from typing import Any
from uuid import UUID

import uuid_utils.compat


def shift(seconds: float) -> None:
    """Every way to ask what time it is, but for what is imported before this."""
    true, uuid7 = time.time, uuid_utils.compat.uuid7

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromtimestamp(true() + seconds, tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.now(datetime.UTC).replace(tzinfo=None)

    datetime.datetime = Shifted  # type: ignore[misc]
    time.time = lambda: true() + seconds
    time.time_ns = lambda: int((true() + seconds) * 1e9)
    # The first 48 bits of such an id are milliseconds.
    uuid_utils.compat.uuid7 = lambda: UUID(int=uuid7().int + (int(seconds * 1000) << 80))


def main() -> None:
    shift(float(sys.argv[1]))
    module = sys.argv[2]
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
