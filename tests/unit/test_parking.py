"""What a parked record holds tokens back to (S25)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import ClassVar

import pytest

from headrace import codec
from headrace.change import Checkpoint, Position, Version
from headrace.consumer import Batch, Generation
from headrace.errors import Poison
from headrace.log import Log
from headrace.log.debezium import Decoder
from headrace.parked import Entry
from headrace.runner import parking
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore
from tests.fixtures.envelopes import key, value
from tests.fixtures.tables import FIRST, SOURCE


class Shelf:
    """Has what is `there`, and keeps what is put."""

    there: ClassVar[list[Entry]] = []

    def __init__(self, _log: Log) -> None:
        self.kept: list[Entry] = []

    def entries(self, *_: object, bodies: bool = True) -> list[Entry]:
        assert not bodies, "they are large, and only looked at"
        return list(self.there)

    def remove(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.there.remove(entry)

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
    made.open(view, position)  # type: ignore[arg-type]  what it needs of a consumer
    made.apply(view, parking.standing(replace(position, version=Version(1, 120))))  # type: ignore[arg-type]  what it needs of a consumer
    assert (made.held, made.count) == (held, 1)


@pytest.mark.parametrize("at", ["", "1:6"])
@pytest.mark.parametrize(
    ("lsn", "offset", "named", "held", "count"),
    [
        (110, 7, (), None, 0),
        (110, 7, ("public.carts",), 109, 1),
        (110, 7, ("public.carts",), 110, 0),
        (109, 6, (), None, 1),
        (109, 6, ("public.carts",), 110, 1),
    ],
)
def test_what_the_view_has_passed_and_does_not_lack_is_not_parked(
    at: str,
    lsn: int,
    offset: int,
    named: tuple[str, ...],
    held: int | None,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who was replaced has parked it late; perhaps beside others of its table, of which the oldest holds tokens back."""
    log = Log(Settings())
    late = Entry("carts", 1, "public.carts", "1", at, held=Version(1, 109), version=Version(1, 110))
    monkeypatch.setattr(parking, "Shelf", Shelf)
    monkeypatch.setattr(Shelf, "there", [late])
    made, view = parking.Parking(log, Generation("carts", 1, "abc")), Delays(None)
    position = Position({log.topic_of("public.carts"): [9, offset]}, {}, Version(1, lsn), parked=named)
    position.held = Version(1, held) if held else None
    made.open(view, position)  # type: ignore[arg-type]  what it needs of a consumer
    made.check(view)  # type: ignore[arg-type]
    assert (made.count, len(Shelf.there)) == (count, count)
    assert bool(made._lost) == bool(named and not count), "a late one is not what the view lacks"


def test_what_is_opened_is_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """HEADRACE_PARKED_LIMIT may be many thousands."""
    late = [Entry("carts", 1, "public.carts", str(key), version=Version(1, 110)) for key in range(3)]
    monkeypatch.setattr(parking, "Shelf", Shelf)
    monkeypatch.setattr(Shelf, "there", late)
    made = parking.Parking(Log(Settings()), Generation("carts", 1, "abc"))
    monkeypatch.setattr(Entry, "__eq__", None)
    made.open(Delays(None), Position({}, {}, Version(1, 110), None, 0))  # type: ignore[arg-type]  what it needs of a consumer
    assert (made.count, len(made._done)) == (0, 3)


class Written(Shelf):
    """Has what was put, as Kafka would give it back."""

    there: ClassVar[list[Entry]] = []

    def entries(self, *_: object, bodies: bool = True) -> list[Entry]:
        return list(self.there)

    def put(self, entry: Entry) -> None:
        self.there.append(replace(entry, body=codec.loads(codec.dumps(entry.body))))


class Moody(DuckDBStore):
    """Cannot do the row 2 as long as it is `moody`."""

    moody = True

    def apply(self, batch: Batch) -> None:
        if self.moody and any(change.key == b'{"id":2}' for change in batch.changes):
            raise Poison("moody", "It is not in the mood.", "Mend it.", cursor=("public.t", '{"id":2}'))
        super().apply(batch)


def test_s28_a_change_of_a_feed_that_was_parked_before_a_restart_is_done_after_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No log has the shapes of a feed, and each reader gives them versions of its own."""
    monkeypatch.setattr(parking, "Shelf", Written)
    monkeypatch.setattr(Written, "there", [])
    settings = Settings(source="crm", feed="debezium", warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="256MB")
    made = count(1_000_000, 10)
    monkeypatch.setattr("headrace.log.debezium.time.time", lambda: next(made))
    row_1, row_2 = {"id": 1, "n": 1}, {"id": 2, "n": 2, "note": "of its own"}
    for lsn, rows, retried in ((10, [row_1, row_2], False), (20, [row_1], True)):
        decoder, store, parked = Decoder(0), Moody(settings, "tables"), parking.Parking(Log(settings), FIRST)
        position = store.open(FIRST)
        parked.open(store, position)
        changes = [
            decoder.change("public.t", 0, lsn + at, key(row["id"]), value("c", row, [lsn, lsn]))
            for at, row in enumerate(rows)
        ]
        now = Position({"crm.public.t": [lsn + 5]}, {"crm.public.t": "t"}, Version(1, lsn), None, 1)
        checkpoint = Checkpoint(now.version, 0, 0, now.offsets, SOURCE)
        parked.apply(store, Batch(changes, now, checkpoint, position is None, decoder.schemas))
        if retried:
            store.moody = False
            assert parked.retry(store, lambda _: True, now).left == []
            assert [row.value for row in store.scan(None, 10)] == [row_1 | {"note": None}, row_2]
        store.close()
