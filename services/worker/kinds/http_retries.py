"""Whether a request is made again, and when."""

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from headway.fetching.fetcher import Record
from headway.fetching.requests import Request

STATUSES = frozenset({429, 500, 502, 503, 504})
ERRORS = frozenset({"timeout", "connect", "disconnected"})
# After these the server has not done what was asked, so that it may be asked again whatever it was.
UNDONE_STATUSES = frozenset({429, 503})
UNDONE_ERRORS = frozenset({"connect"})
REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
# A server that wants to be left alone for longer is left alone.
LONGEST_RETRY_AFTER = 300.0


def wait_before(request: Request, record: Record, tries: int) -> tuple[float, float] | None:
    """Seconds until it is tried again after so many tries, and for which its host is to be left alone; None if never.

    The first is random, for what fails together should not come back together; it doubles with each try.
    """
    if not _failed_for_now(request, record):
        return None
    after = retry_after(record["headers"].get("retry-after", "")) or 0.0
    if after > LONGEST_RETRY_AFTER:
        return None
    backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1)  # noqa: S311
    return max(after, backoff), after


def retry_after(value: str) -> float | None:
    """The seconds of a Retry-After header, which has a number of them or a date; None if it has neither."""
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value[:10])
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _failed_for_now(request: Request, record: Record) -> bool:
    repeatable = request.method in REPEATABLE
    if error := record["error"]:
        return error["type"] in (ERRORS if repeatable else UNDONE_ERRORS)
    return record["status"] in (STATUSES if repeatable else UNDONE_STATUSES)
