"""How fast a generation is, and how long it still takes."""

from __future__ import annotations

import time

_RATE_SECONDS = 5.0


class Rate:
    """Changes a second over the last seconds."""

    def __init__(self) -> None:
        """Begin with none."""
        self._since = time.monotonic()
        self._count = 0
        self._last = 0.0

    def add(self, count: int) -> None:
        """Count changes."""
        self._count += count

    def now(self) -> float:
        """Return how many there are a second."""
        passed = time.monotonic() - self._since
        if passed > _RATE_SECONDS:
            self._last = self._count / passed
            self._since, self._count = time.monotonic(), 0
        elif passed > 1.0 and not self._last:
            return self._count / passed
        return self._last


def seconds_left(records: int, rate: float, progress: tuple[int, int], begun: float | None) -> float:
    """Return for how many seconds it still takes to catch up, -1 where that is not known.

    Args:
        records: That are still to be read.
        rate: Changes a second.
        progress: (done, total) of what a consumer does with all that it has read; while it does, nothing is read.
        begun: When it began to apply that (`time.monotonic`).
    """
    done, total = progress
    if total:
        return round((time.monotonic() - begun) * (total - done) / done, 1) if done and begun is not None else -1.0
    return round(records / rate, 1) if rate and records else -1.0
