"""When touched documents are shown: at once, or where a consumer debounces, once in its interval."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final, NamedTuple

from headrace.change import Position, Version

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


def held_back(position: Position, left: Left | None) -> Position:
    """Return the position as the view keeps it: tokens are not answered beyond what waits to be shown (S25)."""
    if left is None:
        return position
    before = left.since.before()
    return replace(position, held=min(position.held or before, before))
