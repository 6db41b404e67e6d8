"""Headway: long jobs over HTTP, with progress you can trust.

The names here are those that job authors use.
"""

from headway.errors import Fatal, LeaseLost
from headway.kinds import JobContext, kind

__all__ = ["Fatal", "JobContext", "LeaseLost", "kind"]
