"""How fast a generation is."""

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
