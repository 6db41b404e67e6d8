"""Rate and ETA of an attempt."""

import math
import time

# The rate is an average over about this many seconds, so that the ETA neither jumps nor lags.
OVER = 10.0


class Pace:
    """An exponentially weighted rate from what is done and the clock."""

    def __init__(self) -> None:
        self._at: float | None = None
        self._done = 0.0
        self._rate: float | None = None

    def observe(self, done: float, total: float | None) -> tuple[float | None, float | None]:
        """The rate in units a second and the seconds left at that rate; None where it cannot be known."""
        now = time.monotonic()
        if self._at is None:
            self._at, self._done = now, done
        elif (passed := now - self._at) > 0:
            rate = max(0.0, done - self._done) / passed
            weight = min(1.0, passed / OVER)
            self._rate = rate if self._rate is None else self._rate + weight * (rate - self._rate)
            self._at, self._done = now, done
        if not self._rate:
            return self._rate, None
        left = None if total is None else max(0.0, total - done) / self._rate
        return _rounded(self._rate, 3), _rounded(left, 1)


def _rounded(number: float | None, digits: int) -> float | None:
    return round(number, digits) if number is not None and math.isfinite(number) else None
