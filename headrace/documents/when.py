"""When touched documents are shown: at once, or where a consumer debounces, once in its interval."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from headrace.change import Version

EVER: Final = 1 << 62


class When(NamedTuple):
    """Which of the touched documents are shown: those that may be at `now`, ms since the Unix epoch; all when that is EVER.

    `interval` is how long a document that was shown waits until it may be again, ms.
    """

    now: int
    interval: int


ALL: Final = When(EVER, 0)


class Left(NamedTuple):
    """Documents that wait: since the oldest change of any, and when the first and the last will be due, ms."""

    since: Version
    first: int
    last: int

    def is_due(self, interval: int) -> bool:
        """Whether one is, also when the clock has been put back."""
        return self.first <= now() or self.last > now() + interval


def now() -> int:
    """Return the time, ms since the Unix epoch."""
    return time.time_ns() // 1_000_000
