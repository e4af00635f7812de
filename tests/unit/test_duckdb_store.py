"""The store of the warehouse keeps the contract of a consumer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from headrace.change import Version
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient, Wiped
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore
from tests.fixtures.tables import FIRST, SECOND, batch, gone, put, schema
from tests.fixtures.warehouses import ITEMS, TAGS, ask, rows


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="1GB")


@pytest.fixture
def store(settings: Settings) -> Iterator[DuckDBStore]:
    made = DuckDBStore(settings, "warehouse")
    assert made.open(FIRST) is None
    yield made
    made.close()


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_a_row_that_somebody_wrote_without_a_key_is_shown(store: DuckDBStore, settings: Settings, limit: int) -> None:
    """As who does not know of our columns writes it: readers see it, and so must verify. The view goes on, also after a restart."""
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    with database.cursor() as cursor:
        cursor.execute('CREATE TEMP TABLE first AS FROM g1."public.items"')
        cursor.execute('DELETE FROM g1."public.items"')
        cursor.execute("INSERT INTO g1.\"public.items\" (id, name) VALUES (7, 'x')")
        cursor.execute('INSERT INTO g1."public.items" FROM first')
    database.release()
    store.close()
    store.open(FIRST)
    store.apply(batch(20, put(ITEMS, 20, id=2, name="b"), schemas=(ITEMS,)))
    seen: list[Any] = []
    while page := store.scan((seen[-1].collection, seen[-1].key) if seen else None, limit):
        seen += page
    assert [(row.key, row.value["id"], row.version.lsn) for row in seen] == [
        ("", 7, 0),
        ('{"id":1}', 1, 10),
        ('{"id":2}', 2, 20),
    ]


# Exact states only


def test_readers_see_nothing_before_the_first_exact_state(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(5, put(ITEMS, 5, id=1, name="a"), schemas=(ITEMS,), shown=0))
    assert store.scan(None, 10) == []
    with pytest.raises(Misconfigured, match="reached no state"):
        store.promote()
    with pytest.raises(Transient, match="loading"):
        ask(settings, "SELECT 1")
    store.apply(batch(10, put(ITEMS, 10, id=2, name="b"), schemas=(ITEMS,)))
    with pytest.raises(Transient, match="loading"):
        ask(settings, "SELECT 1")
    store.promote()
    answer = ask(settings, "SELECT * FROM items ORDER BY id")
    assert (answer.rows, answer.version) == ([[1, "a"], [2, "b"]], Version(1, 10))


def test_pieces_between_two_states_wait_in_staging(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), put(ITEMS, 10, id=2, name="b"), schemas=(ITEMS,)))
    store.promote()
    before = rows(store)
    store.apply(batch(20, put(ITEMS, 20, id=1, name="half"), gone(ITEMS, 20, 2), schemas=(ITEMS,), shown=10))
    store.apply(batch(30, put(ITEMS, 30, id=2, name="again"), put(TAGS, 30, id=1), schemas=(ITEMS, TAGS), shown=10))
    assert rows(store) == before
    assert ask(settings, "SELECT count(*) FROM items").version == Version(1, 10)
    store.close()
    position = store.open(FIRST)
    assert position is not None
    assert position.offsets == {"shop.public.t": [30]}, "staged is durable"
    store.apply(batch(40, put(ITEMS, 40, id=1, name="whole"), schemas=(ITEMS,)))
    answer = ask(settings, "SELECT * FROM items ORDER BY id")
    assert (answer.rows, answer.version) == ([[1, "whole"], [2, "again"]], Version(1, 40))
    assert ask(settings, "SELECT count(*) FROM sales.tags").rows == [[1]]


def test_staging_is_merged_in_its_order(store: DuckDBStore) -> None:
    store.apply(batch(1, schemas=(ITEMS,)))
    seen: list[tuple[int, int]] = []
    store.progress = lambda done, total: seen.append((done, total))
    for lsn in (2, 3, 4):
        changes = [put(ITEMS, lsn, id=number % 9000, name=f"{lsn}-{number}") for number in range(12_000)]
        store.apply(batch(lsn, *changes, schemas=(ITEMS,), shown=1))
    store.apply(batch(5, gone(ITEMS, 5, 0), put(TAGS, 5, id=1), schemas=(ITEMS, TAGS)))
    assert seen == [(0, 36_002), (36_001, 36_002)]
    assert len(store.scan(None, 10_000)) == 9000
    assert {row.value["name"] for row in store.scan(None, 17_000) if row.value["id"] == 17} == {"4-9017"}


def test_an_empty_cut_moves_the_state(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    store.promote()
    store.apply(batch(20, schemas=(ITEMS,)))
    assert ask(settings, "SELECT count(*) FROM items").version == Version(1, 20)


# Idempotence, positions


def test_replay_in_other_cuts_leaves_the_same_view(store: DuckDBStore) -> None:
    changes = [put(ITEMS, n, id=n % 5, name=str(n)) if n % 4 else gone(ITEMS, n, n % 5) for n in range(1, 40)]
    for start in range(0, 39, 3):
        store.apply(batch(start + 3, *changes[start : start + 3], schemas=(ITEMS,)))
    once = store.scan(None, 100)
    for start in range(9, 39, 10):
        store.apply(batch(start + 10, *changes[start : start + 10], schemas=(ITEMS,)))
    assert store.scan(None, 100) == once


def test_the_last_change_of_a_key_in_a_batch_counts(store: DuckDBStore) -> None:
    changes = [put(ITEMS, 1, id=1, name="a"), gone(ITEMS, 2, 1), put(ITEMS, 3, id=1, name="c"), put(ITEMS, 3, id=2)]
    store.apply(batch(5, *changes, gone(ITEMS, 5, 2), schemas=(ITEMS,)))
    assert [(row.key, row.value["name"], row.version) for row in store.scan(None, 9)] == [
        ('{"id":1}', "c", Version(1, 3))
    ]


@pytest.mark.parametrize("type_", ["integer", "bigint", "text", "numeric"])
def test_rows_are_found_whatever_the_column_of_the_key_is_by_now(store: DuckDBStore, type_: str) -> None:
    """It went and came back, so that the row has NULL in it; or it is of another type than the keys that were written before."""
    without, again = schema("public.items", 2, name="text"), schema("public.items", 3, id=type_, name="text")
    store.apply(batch(5, put(ITEMS, 5, id=1, name="a"), put(ITEMS, 5, id=2, name="b"), schemas=(ITEMS,)))
    if type_ == "integer":
        store.apply(batch(6, put(without, 6, name="c"), gone(without, 6, "c"), schemas=(without,)))
    store.apply(batch(7, put(again, 7, id=2, name="b2"), put(again, 7, id=4, name="d"), schemas=(again,)))
    store.apply(batch(8, gone(again, 8, 1), put(again, 8, id=2, name="b3"), schemas=(again,)))
    assert [(row.key, row.value["name"]) for row in store.scan(None, 9)] == [('{"id":2}', "b3"), ('{"id":4}', "d")]


def test_rows_are_found_by_one_number_of_a_longer_key(store: DuckDBStore) -> None:
    lines = replace(schema("public.lines", note="text", number="smallint", amount="integer"), key=("note", "number"))
    keys = [{"note": note, "number": number} for note in ("x", "1") for number in (1, 2)]
    store.apply(batch(5, *(put(lines, 5, **key, amount=1) for key in keys), schemas=(lines,)))
    deleted = put(lines, 6, **keys[3])._replace(op="d", row=None)
    store.apply(batch(6, put(lines, 6, **keys[0], amount=2), deleted, schemas=(lines,)))
    assert [(row.key, row.value["amount"]) for row in store.scan(None, 9)] == [
        ('{"note":"1","number":1}', 1),
        ('{"note":"x","number":1}', 2),
        ('{"note":"x","number":2}', 1),
    ]


def test_rows_without_a_key_are_found_by_their_place_whatever_their_columns_are_named(store: DuckDBStore) -> None:
    events = replace(schema("public.events", ordinal="integer", note="text"), key=())
    place = b'{"lsn":5,"ordinal":0}'
    first = put(events, 5, ordinal=7, note="a")._replace(key=place)
    store.apply(batch(5, first, schemas=(events,)))
    store.apply(batch(6, first, put(events, 6, ordinal=0)._replace(key=b'{"lsn":6,"ordinal":0}'), schemas=(events,)))
    assert [row.value["ordinal"] for row in store.scan(None, 9)] == [7, 0]
    store.apply(batch(7, first._replace(op="d", row=None), schemas=(events,)))
    assert [row.value["ordinal"] for row in store.scan(None, 9)] == [0]


def test_an_older_instance_can_apply_nothing_any_more(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    younger = DuckDBStore(settings, "warehouse")
    younger.open(FIRST)
    younger.apply(batch(20, put(ITEMS, 20, id=1, name="young"), schemas=(ITEMS,)))
    with pytest.raises(Wiped, match="opened by somebody else"):
        store.apply(batch(15, put(ITEMS, 15, id=1, name="zombie"), schemas=(ITEMS,)))
    assert [row.value["name"] for row in younger.scan(None, 9)] == ["young"]
    younger.close()


def test_a_batch_that_fails_leaves_nothing_behind(store: DuckDBStore) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    with pytest.raises(Poison, match="version 1 of its schema") as error:
        store.apply(batch(20, put(ITEMS, 20, id=1, name="b"), put(TAGS, 20, id=1), schemas=(ITEMS,)))
    assert error.value.cursor == (TAGS.table, '{"id":1}')
    assert [row.value["name"] for row in store.scan(None, 9)] == ["a"]
    store.apply(batch(20, put(ITEMS, 20, id=1, name="b"), put(TAGS, 20, id=1), schemas=(ITEMS, TAGS)))
    assert len(store.scan(None, 9)) == 2
    store.close()
    position = store.open(FIRST)
    assert position is not None
    assert position.version == Version(1, 20)


def test_scan_goes_through_all_tables_in_order_page_by_page(store: DuckDBStore) -> None:
    changes = [put(of, 10, id=n) for n in range(11) for of in (TAGS, ITEMS)]
    store.apply(batch(10, *changes, schemas=(ITEMS, TAGS)))
    for limit in (1, 3, 11, 100):
        seen, after = [], None
        while page := store.scan(after, limit):
            assert len(page) <= limit
            seen += [(row.collection, row.key) for row in page]
            after = seen[-1]
        assert seen == sorted({(change.table, change.key.decode()) for change in changes})


# Generations


def test_a_rebuild_touches_nothing_of_the_live_one_until_promoted(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="old"), put(TAGS, 10, id=1), schemas=(ITEMS, TAGS)))
    store.promote()
    second = DuckDBStore(settings, "warehouse")
    assert second.open(SECOND) is None
    second.apply(batch(5, put(ITEMS, 5, id=1, name="new"), schemas=(ITEMS,), shown=0))
    second.apply(batch(20, put(ITEMS, 20, id=2, name="new"), schemas=(ITEMS,)))
    store.apply(batch(20, put(ITEMS, 20, id=3, name="old"), schemas=(ITEMS,)))
    assert ask(settings, "SELECT name FROM items").rows == [["old"], ["old"]]
    assert [(g.number, g.live) for g in store.generations()] == [(1, True), (2, False)]
    second.promote()
    assert ask(settings, "SELECT name FROM items").rows == [["new"], ["new"]]
    assert ask(settings, "SELECT count(*) FROM duckdb_views() WHERE view_name = 'tags'").rows == [[0]]
    store.promote()
    assert ask(settings, "SELECT count(*) FROM sales.tags").rows == [[1]], "rolled back"
    second.drop()
    assert [(g.number, g.live) for g in store.generations()] == [(1, True)]
    with pytest.raises(Wiped):
        second.apply(batch(30, put(ITEMS, 30, id=2), schemas=(ITEMS,)))
    second.close()


def test_dropping_the_whole_view_leaves_no_table(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    store.promote()
    store.drop()
    assert store.generations() == []
    store.close()
    with duckdb.connect(settings.warehouse) as bare:
        assert bare.execute("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]
        assert bare.execute("SELECT DISTINCT schema_name FROM duckdb_tables()").fetchall() == [("headrace",)]


def test_generations_makes_no_file(settings: Settings) -> None:
    assert DuckDBStore(settings, "warehouse").generations() == []
    assert not Path(settings.warehouse).exists()


# Names and schemas


def test_a_store_of_some_tables_knows_no_others(settings: Settings) -> None:
    """A batch brings the shapes of all tables of the source: those it does not keep are not there, rather than empty."""

    class Sales(DuckDBStore):
        tables = ("public.items",)

    made = Sales(settings, "sales")
    made.open(FIRST)
    made.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS, TAGS)))
    made.promote()
    assert made.count() == {"public.items": 1}
    with pytest.raises(HeadraceError, match="tags"):
        ask(settings, "SELECT count(*) FROM sales.tags")
    made.close()
