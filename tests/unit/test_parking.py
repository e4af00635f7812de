"""What a parked record holds tokens back to (S25)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from headrace.change import Position, Version
from headrace.consumer import Batch, Generation
from headrace.errors import Poison
from headrace.log import Log
from headrace.parked import Entry
from headrace.runner import parking
from headrace.settings import Settings


class Shelf:
    """Keeps nothing."""

    def __init__(self, _log: Log) -> None:
        self.kept: list[Entry] = []

    def entries(self, *_: object) -> list[Entry]:
        return []

    def remove(self, entries: Sequence[Entry]) -> None:
        assert not entries

    def put(self, entry: Entry) -> None:
        self.kept.append(entry)


class Delays:
    """A view whose document 1 waits since 105, and cannot be shown when its time has come."""

    leaves_parked = True

    def __init__(self, since: Version | None) -> None:
        self.since = since

    def pending(self) -> Version | None:
        return self.since

    def apply(self, batch: Batch) -> None:
        if not batch.parked:
            raise Poison("render-failed", "It is not in the mood.", "Mend it.", cursor=("public.carts", "1"))
        self.since = None


@pytest.mark.parametrize(("since", "held"), [(Version(1, 105), Version(1, 104)), (None, Version(1, 110))])
def test_a_delayed_document_that_is_parked_holds_back_from_its_oldest_change(
    since: Version | None, held: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "Shelf", Shelf)
    made, view = parking.Parking(Log(Settings()), Generation("carts", 1, "abc")), Delays(since)
    position = Position({}, {}, Version(1, 110), None, 0)
    made.open(position)
    made.apply(view, parking.standing(replace(position, version=Version(1, 120))))  # type: ignore[arg-type]  what it needs of a consumer
    assert (made.held, made.count) == (held, 1)
