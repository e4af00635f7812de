"""The warehouse over a Debezium feed (S28): whoever begins to read it knows no shapes, and what is read first may be old."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from headrace.change import Checkpoint, Position, Row, Source, Version
from headrace.consumer import Batch
from headrace.errors import Misconfigured
from headrace.log.debezium import EPOCH, Decoder
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore, query
from tests.fixtures.envelopes import key, value, with_schema
from tests.fixtures.tables import FIRST

T, FEED = "public.t", Source("debezium", 0, "crm", "", "")
Fields = list[dict[str, Any]]
ID, NOTE = {"field": "id", "type": "int32"}, {"field": "note", "type": "string"}
DAY = {"field": "day", "type": "string", "name": "io.debezium.time.IsoDate"}


def number(kind: str) -> dict[str, Any]:
    return {"field": "n", "type": kind}


class Warehouse:
    """It is opened again for each batch."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            source="crm", feed="debezium", warehouse=str(folder / "w.duckdb"), warehouse_memory="1GB"
        )
        self.offsets, self.shown = count(1), 0

    def feed(self, *rows: tuple[Row, Fields], complete: bool = True, of_key: bytes = b"") -> None:
        """Open it, and apply one batch."""
        store, decoder, changes = DuckDBStore(self.settings, "warehouse"), Decoder(0), []
        position = store.open(FIRST)
        for (row, fields), lsn in zip(rows, self.offsets, strict=False):
            said = with_schema(value("c", row, [lsn, lsn]), fields)
            changes.append(decoder.change(T, 0, lsn, of_key or key(row["id"]), said))
            self.shown = lsn if complete else self.shown
        version = Version(EPOCH, self.shown)
        now = Position({"crm.public.t": [changes[-1].offset]}, {"crm.public.t": "t"}, version, FEED, 1)
        checkpoint = Checkpoint(version, 0, 0, now.offsets, FEED) if complete else None
        store.apply(Batch(changes, now, checkpoint, position is None, decoder.schemas))
        store.close()

    def rows(self) -> list[Row]:
        store = DuckDBStore(self.settings, "warehouse")
        store.open(FIRST)
        found = [row.value for row in store.scan(None, 100)]
        store.close()
        return found

    def ask(self, columns: str) -> list[Any]:
        store, database = DuckDBStore(self.settings, "warehouse"), Database.opened(self.settings.warehouse, "1GB")
        store.open(FIRST)
        store.promote()
        try:
            return [*map(tuple, query(database, f"SELECT {columns} FROM t ORDER BY id", rows=100, seconds=10).rows)]
        finally:
            store.close()
            database.release()


@pytest.fixture(params=["later", "in one second", "clock set back"])
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Warehouse:
    step = {"later": 1, "in one second": 0, "clock set back": -1}[request.param]
    now: Iterator[int] = count(1_000_000, step) if step else iter(lambda: 1_000_000, None)
    monkeypatch.setattr("headrace.log.debezium.time.time", lambda: next(now))
    return Warehouse(tmp_path)


def test_an_old_row_that_is_read_first_takes_no_column_and_no_value_away(made: Warehouse) -> None:
    made.feed(({"id": 1, "n": 1}, [ID, number("int32")]))
    made.feed(({"id": 2, "n": 1 << 40, "note": "x"}, [ID, number("int64"), NOTE]))
    made.feed(({"id": 3, "n": 3}, [ID, number("int32")]))
    made.feed(({"id": 4, "note": "y", "n": 4}, [ID, NOTE, number("int64")]))
    assert made.rows() == [
        {"id": id_, "n": n, "note": note}
        for id_, n, note in ((1, 1, None), (2, 1 << 40, "x"), (3, 3, None), (4, 4, "y"))
    ]
    assert made.ask("typeof(n), note") == [("BIGINT", note) for note in (None, "x", None, "y")]


def test_so_it_is_with_what_waits_until_the_end_is_reached(made: Warehouse) -> None:
    made.feed(({"id": 1}, [ID]))
    made.feed(({"id": 2, "n": 2}, [ID, number("int64")]), complete=False)
    made.feed(({"id": 3, "note": "y"}, [ID, NOTE]), complete=False)
    made.feed(({"id": 4}, [ID]), complete=True)
    assert made.ask("n, note") == [(None, None), (2, None), (None, "y"), (None, None)]


def test_what_the_old_type_could_not_hold_the_wider_one_gets(tmp_path: Path) -> None:
    """DuckDB has no days before Christ as Postgres writes them: they are kept beside."""
    made, days = Warehouse(tmp_path), ["0044-03-15 BC", "2024-01-02", None]
    made.feed(*(({"id": id_, "day": day}, [ID, DAY]) for id_, day in enumerate(days, 1)))
    made.feed(({"id": 4, "day": "some day"}, [ID, NOTE | {"field": "day"}]))
    assert made.ask("day") == [(day,) for day in (*days, "some day")]
    assert [row["day"] for row in made.rows()] == [*days, "some day"]


def test_s9_a_key_of_other_columns_is_refused_also_where_only_rows_with_the_new_one_are_read(tmp_path: Path) -> None:
    made, fields = Warehouse(tmp_path), [ID, number("int32")]
    made.feed(({"id": 1, "n": 5}, fields))
    for _ in range(2):
        with pytest.raises(Misconfigured) as caught:
            made.feed(({"id": 1, "n": 5}, fields), of_key=b'{"id":1,"n":5}')
        assert caught.value.code == "key-changed"
    made.feed(({"id": 2, "n": 5}, fields))
    assert made.rows() == [{"id": 1, "n": 5}, {"id": 2, "n": 5}]


def test_what_the_wider_type_cannot_hold_either_stays_beside_it(tmp_path: Path) -> None:
    """No DECIMAL is NaN, nor infinite."""
    made, numbers = Warehouse(tmp_path), ["NaN", "1.50", "NaN", None, "9.99"]
    made.feed(*(({"id": id_, "n": n}, [ID, decimal(6)]) for id_, n in enumerate(numbers, 1)))
    made.feed(({"id": 5, "n": "123456.78"}, [ID, decimal(8)]), ({"id": 3, "n": "2.00"}, [ID, decimal(8)]))
    assert made.ask("typeof(n), CAST(n AS VARCHAR)") == [
        ("DECIMAL(8,2)", n) for n in (None, "1.50", "2.00", None, "123456.78")
    ]
    assert [row["n"] for row in made.rows()] == ["NaN", "1.50", "2.00", None, "123456.78"]
    made.feed(({"id": 6, "n": "x"}, [ID, NOTE | {"field": "n"}]))
    assert [row["n"] for row in made.rows()] == ["NaN", "1.50", "2.00", None, "123456.78", "x"]
    assert made.ask("n")[0] == ("NaN",)


def decimal(digits: int) -> dict[str, Any]:
    said = {"type": "NUMERIC", "length": str(digits), "scale": "2"}
    parameters = {f"__debezium.source.column.{name}": each for name, each in said.items()}
    return {"field": "n", "type": "string", "parameters": parameters}
