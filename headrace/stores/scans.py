"""Scans of a store that has no order: each goes on in what it listed when it began."""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

_PLACES: Final = 4
"""At how many places scans stand at most: of one that was given up nobody says so."""


class Listed(Protocol):
    """What a scan goes on in; `since` is when it was listed, by any clock that does not go back."""

    since: float


L = TypeVar("L", bound=Listed)


class Scans(Generic[L]):
    """Where scans stand, by the id that each has shown last."""

    def __init__(self) -> None:
        """None has begun."""
        self._standing: dict[str, list[L]] = {}

    def take(self, last: str | None) -> L | None:
        """Return what a scan goes on in that has shown `last`; None for one that begins, and where none stands."""
        standing = self._standing.pop(last, []) if last is not None else []
        found = standing.pop() if standing else None
        if standing and last is not None:
            self._standing[last] = standing
        return found

    def put(self, last: str, listed: L) -> None:
        """Let a scan go on after `last`. Where several stand at one place, all have what was listed last."""
        standing = [*self._standing.pop(last, []), listed]
        self._standing[last] = [max(standing, key=lambda each: each.since)] * len(standing)
        if len(self._standing) > _PLACES:
            del self._standing[next(iter(self._standing))]
