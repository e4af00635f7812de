"""Two views at one state, row by row: what new code would change."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from headrace import codec
from headrace.change import Row, Version
from headrace.consumer import ViewRow
from headrace.control import Control
from headrace.errors import Transient
from headrace.runner.scratch import Scratch
from headrace.runner.verbs import HOLD_SECONDS

_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.5


class Changed(NamedTuple):
    """One document that new code would add, remove or change; of a changed one only what differs."""

    kind: str
    collection: str
    key: str
    before: Row | None
    after: Row | None


@dataclass(slots=True)
class Comparison:
    """What was found; `shown` are the first of what differs.

    Attributes:
        counts: How many are ``added``, ``removed``, ``changed`` and the ``same``.
    """

    generation: int
    version: Version
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[Changed] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        """Whether the new code would change anything."""
        return self.counts.total() > self.counts["same"]


class Held:
    """A live view that stands still while it is read; its hold ends by itself when we die."""

    def __init__(self, control: Control, name: str) -> None:
        """Hold nothing yet."""
        self._control = control
        self._name = name
        self._asked = 0.0

    def at(self, least: Version) -> tuple[int, Version]:
        """Hold it at `least` or beyond; return its generation and where it stands. Raises Transient: `view-behind`."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            generation, version = self._hold()
            if version >= least:
                return generation, version
            self.release()
            if time.monotonic() > deadline:
                said = f"{self._name} is at {version}, the log at {least}, after {_PATIENCE_SECONDS:.0f} s."
                raise Transient("view-behind", said, "See: headrace status")
            time.sleep(_LOOK_SECONDS)

    def rows(self, generation: int, version: Version) -> Iterator[ViewRow]:
        """Yield its rows, all of the state at `version`. Raises Transient: `hold-ended`."""
        yield from self._control.scan(self._name, generation)
        self._check(generation, version)

    def renew(self, generation: int, version: Version) -> None:
        """Keep it held, also while none of its rows are asked for. Raises Transient: `hold-ended`."""
        if time.monotonic() - self._asked > HOLD_SECONDS / 3:
            self._check(generation, version)

    def release(self) -> None:
        """Let it go on."""
        self._control.ask(self._name, "release")

    def _hold(self) -> tuple[int, Version]:
        answer = self._control.ask(self._name, "hold", {"compare": True}, 2 * _PATIENCE_SECONDS)
        self._asked = time.monotonic()
        return answer["generation"], Version(*answer["version"])

    def _check(self, generation: int, version: Version) -> None:
        now = self._hold()
        if now != (generation, version):
            said = f"{self._name} went on to {now[1]}, generation {now[0]}, while it was compared."
            raise Transient("hold-ended", said, "Run it again.")


def compare(held: Held, scratch: Scratch, least: Version, limit: int) -> Comparison:
    """Compare a live view with a scratch generation that stopped at `least`, both at the state where the live one is held."""
    generation, version = held.at(least)
    scratch.reach(version)
    found = Comparison(generation, version)
    for before, after in _paired(held.rows(generation, version), scratch.rows()):
        held.renew(generation, version)
        changed = _changed(before, after)
        found.counts[changed.kind if changed else "same"] += 1
        if changed and len(found.shown) < limit:
            found.shown.append(changed)
    return found


def _paired(one: Iterator[ViewRow], other: Iterator[ViewRow]) -> Iterator[tuple[ViewRow | None, ViewRow | None]]:
    """Yield what two scans have under one key; both are in (collection, key) order."""
    left, right = next(one, None), next(other, None)
    while left or right:
        if right is None or (left and left[:2] < right[:2]):
            yield left, None
            left = next(one, None)
        elif left is None or right[:2] < left[:2]:
            yield None, right
            right = next(other, None)
        else:
            yield left, right
            left, right = next(one, None), next(other, None)


def _changed(before: ViewRow | None, after: ViewRow | None) -> Changed | None:
    if before is None or after is None:
        row = before or after
        assert row is not None
        kind = "removed" if before else "added"
        return Changed(kind, row.collection, row.key, before and before.value, after and after.value)
    names = [name for name in {**before.value, **after.value} if _text(before.value, name) != _text(after.value, name)]
    if not names:
        return None
    old, new = ({name: row.value[name] for name in names if name in row.value} for row in (before, after))
    return Changed("changed", before.collection, before.key, old, new)


def _text(row: Row, name: str) -> Any:
    """Return a value as bytes that tell 1 from 1.0 and from true; None for none."""
    return codec.dumps(row[name], option=codec.SORTED) if name in row else None
