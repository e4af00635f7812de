"""Names, columns and types in the warehouse's tables, whatever becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from headrace.change import UNKNOWN_SCHEMA
from headrace.settings import Settings
from headrace.stores.duckdb import DuckDBStore, tables
from tests.fixtures.tables import FIRST, batch, gone, put, schema
from tests.fixtures.warehouses import ITEMS, TAGS, ask, rows
from tests.unit.test_duckdb_store import settings, store

__all__ = ["settings", "store"]


@pytest.mark.parametrize("staged", [False, True])
def test_a_delete_that_says_no_schema_leaves_the_table_as_it_is(store: DuckDBStore, staged: bool) -> None:
    """So are those that a Debezium feed begins with; of a table that never had a row there is nothing to delete."""
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), put(ITEMS, 10, id=2, name="b"), schemas=(ITEMS,)))
    store.close()
    store.open(FIRST)
    first, never = (gone(shape, 20, 1)._replace(schema=UNKNOWN_SCHEMA) for shape in (ITEMS, TAGS))
    if staged:
        store.apply(batch(20, first, never, schemas=(), shown=10))
        store.apply(batch(30, put(TAGS, 30, id=2, tag="t"), schemas=(TAGS,)))
    else:
        store.apply(batch(20, first, never, schemas=()))
        store.apply(batch(30, never, put(TAGS, 30, id=2, tag="t"), schemas=(TAGS,)))
    assert rows(store) == {
        ("public.items", '{"id":2}'): {"id": 2, "name": "b"},
        ("sales.tags", '{"id":2}'): {"id": 2, "tag": "t"},
    }


def test_a_table_of_nothing_but_deletes_that_say_no_schema_is_not_made(store: DuckDBStore) -> None:
    unknown = gone(TAGS, 20, 1)._replace(schema=UNKNOWN_SCHEMA)
    store.apply(batch(10, unknown, schemas=()))
    store.apply(batch(20, unknown, schemas=(), shown=10))
    store.apply(batch(30, schemas=()))
    assert store.count() == {}


def test_names_that_differ_only_in_case_and_taken_names_all_have_a_place(
    store: DuckDBStore, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    many = [
        schema("public.Users", id="integer", Id="text", _headrace_key="text"),
        schema("public.users", id="integer"),
        schema('public.odd"na.me', id="integer", **{'a "quoted" column': "text"}),
        schema("main.items", id="integer"),
        schema("g1.items", id="integer"),
        schema("headrace.live", id="integer"),
        schema("Sales.tags", id="integer"),
        schema("sales.tags", id="integer"),
        schema("w.items", id="integer"),
    ]
    changes = [put(of, 10, id=n, **dict.fromkeys((c.name for c in of.columns[1:]), "x")) for n, of in enumerate(many)]
    store.apply(batch(10, *changes, schemas=tuple(many)))
    store.promote()
    assert rows(store) == {(change.table, change.key.decode()): change.row for change in changes}
    assert "public.users is called public.users_2 here" in caplog.text
    assert "public.Users is" not in caplog.text
    assert len(ask(settings, "SELECT * FROM duckdb_views() WHERE NOT internal AND schema_name <> 'main'").rows) == 9
    assert ask(settings, 'SELECT id, "Id_2", "_headrace_key_2" FROM "Users"').rows == [[0, "x", "x"]]
    assert ask(settings, "SELECT * FROM users_2").rows == [[1]]
    assert ask(settings, 'SELECT "a ""quoted"" column" FROM "odd""na.me"').rows == [["x"]]
    assert ask(settings, "SELECT a.id, b.id, c.id FROM main_.items a, g1_.items b, w_.items c").rows == [[3, 4, 8]]
    assert ask(settings, "SELECT * FROM headrace_.live").rows == [[5]]


def test_a_known_table_without_rows_appears(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, schemas=(ITEMS,)))
    store.promote()
    assert ask(settings, "SELECT count(*) FROM items").rows == [[0]]
    store.apply(batch(20, schemas=(ITEMS, TAGS)))
    assert ask(settings, "SELECT count(*) FROM sales.tags").rows == [[0]]


def test_columns_come_and_go_and_change_their_type(store: DuckDBStore, settings: Settings) -> None:
    v1 = schema("public.t", 1, id="integer", n="integer", gone="text", note="character varying(10)")
    v2 = schema("public.t", 2, id="integer", n="bigint", note="text", new="numeric(6,2)")
    v3 = schema("public.t", 3, id="integer", n="text", new="date", note="integer", gone="integer")
    store.apply(
        batch(10, put(v1, 10, id=1, n=1, gone="x", note="7"), put(v1, 10, id=2, note="odd", n=5), schemas=(v1,))
    )
    store.promote()
    store.apply(batch(20, put(v2, 20, id=3, n=2**40, new="1.50"), schemas=(v1, v2)))
    assert ask(settings, "SELECT * FROM t ORDER BY id").rows == [
        [1, 1, "7", None],
        [2, 5, "odd", None],
        [3, 2**40, None, "1.50"],
    ]
    store.apply(batch(30, put(v1, 30, id=4, n=4, gone="late", note="n"), schemas=(v1, v2)))
    assert rows(store)["public.t", '{"id":4}'] == {"id": 4, "n": 4, "note": "n", "new": None}, (
        "an older schema's record"
    )
    store.apply(batch(40, put(v3, 40, id=5, n="five", new="2026-01-01", gone=5, note=5), schemas=(v3,)))
    answer = ask(settings, "SELECT * FROM t ORDER BY id")
    assert answer.columns == ["id", "n", "new", "note", "gone"]
    assert answer.rows == [
        [1, "1", None, 7, None],
        [2, "5", None, None, None],
        [3, str(2**40), None, None, None],
        [4, "4", None, None, None],
        [5, "five", "2026-01-01", 5, 5],
    ]
    store.close()
    store.open(FIRST)
    assert [list(row.value) for row in store.scan(None, 1)] == [answer.columns]


KINDS = ["integer", "text", "boolean", "double precision", "numeric(6,2)", "numeric", "date", "jsonb", "bytea", "uuid"]
KINDS += ["timestamp without time zone", "timestamp with time zone", "integer[]", "text[]", "real"]


@pytest.mark.parametrize("old", KINDS)
def test_no_change_of_type_stops_the_consumer(store: DuckDBStore, old: str) -> None:
    values = {"integer": 7, "boolean": True, "double precision": 1.5, "real": "NaN", "jsonb": {"a": 1}}
    values |= {
        "date": "0044-03-15 BC",
        "numeric(6,2)": "1.50",
        "bytea": "AP8=",
        "integer[]": [[1], [2]],
        "text[]": ["a"],
    }
    before = schema("public.t", 1, id="integer", **{f"c{n}": old for n in range(len(KINDS))})
    after = schema("public.t", 2, id="integer", **{f"c{n}": new for n, new in enumerate(KINDS)})
    value = values.get(old, "2026-01-01")
    first = {f"c{n}": value for n in range(len(KINDS))}
    store.apply(batch(10, put(before, 10, id=1, **first), put(before, 10, id=3, **first), schemas=(before,)))
    second = {f"c{n}": values.get(new, "2026-01-01") for n, new in enumerate(KINDS)}
    store.apply(batch(20, put(after, 20, id=2, **second), put(before, 15, id=1, **first), schemas=(before, after)))
    kept = {row.key: row.value for row in store.scan(None, 9)}
    # A uuid or a timestamp that was never one is kept as it came.
    assert kept['{"id":2}'] == {"id": 2, **second}
    same = f"c{KINDS.index(old)}"
    assert kept['{"id":1}'][same] == kept['{"id":3}'][same] == value


def test_a_column_that_comes_back_does_not_bring_old_values(store: DuckDBStore) -> None:
    v1 = schema("public.t", 1, id="integer", d="date")
    v2 = schema("public.t", 2, id="integer")
    v3 = schema("public.t", 3, id="integer", d="date")
    store.apply(batch(10, put(v1, 10, id=1, d="0044-03-15 BC"), schemas=(v1,)))
    store.apply(batch(20, put(v2, 20, id=2), schemas=(v2,)))
    store.apply(batch(30, put(v3, 30, id=3, d="2026-01-01"), schemas=(v3,)))
    assert [row.value.get("d") for row in store.scan(None, 9)] == [None, None, "2026-01-01"]


def test_staged_rows_of_several_schemas_are_merged_after_a_restart(store: DuckDBStore) -> None:
    v1 = schema("public.t", 1, id="integer", a="text")
    v2 = schema("public.t", 2, id="integer", a="text", b="integer")
    store.apply(batch(1, schemas=()))
    store.apply(batch(10, put(v1, 10, id=1, a="x"), schemas=(v1,), shown=1))
    store.apply(batch(20, put(v2, 20, id=2, a="y", b=2), schemas=(v2,), shown=1))
    store.close()
    store.open(FIRST)
    store.apply(batch(30, schemas=()))
    assert [row.value for row in store.scan(None, 9)] == [{"id": 1, "a": "x", "b": None}, {"id": 2, "a": "y", "b": 2}]


@pytest.mark.parametrize(
    ("sql", "type_", "value"),
    [
        ("[1234567890123456.1234::DECIMAL(20,4)]", "DECIMAL(20,4)[]", ["1234567890123456.1234"]),
        ("[9.90, NULL]", "DECIMAL(3,2)[]", ["9.90", None]),
        ("[9.90]::DECIMAL(3,2)[1]", "DECIMAL(3,2)[1]", ["9.90"]),
        ("[170141183460469231731687303715884105727]", "HUGEINT[]", ["170141183460469231731687303715884105727"]),
        (
            "{'a b': 1.10, 'hugeint': 1, 'in': [{'x': 0.5::DECIMAL(2,1), 'f': 0.5::DOUBLE}]}",
            'STRUCT("a b" DECIMAL(3,2), hugeint INTEGER, "in" STRUCT(x DECIMAL(2,1), f DOUBLE)[])',
            {"a b": "1.10", "hugeint": 1, "in": [{"x": "0.5", "f": 0.5}]},
        ),
        ("MAP {'k': 1.10}", "MAP(VARCHAR, DECIMAL(3,2))", {"k": "1.10"}),
        ("[1, 2]", "INTEGER[]", [1, 2]),
        ("['{\"a\":1.5}'::JSON]", "JSON[]", [{"a": 1.5}]),
    ],
)
def test_numbers_within_lists_structs_and_maps_keep_every_digit(
    store: DuckDBStore, settings: Settings, sql: str, type_: str, value: Any
) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    store.promote()
    found = ask(settings, f"SELECT {sql}")
    assert (found.types, found.rows) == ([type_], [[value]])


def test_a_column_of_a_large_table_gets_another_type_in_little_memory(tmp_path: Path) -> None:
    """Twice as many bytes of text as there may be in memory."""
    with duckdb.connect(tmp_path / "notes.duckdb") as database:
        cursor = database.cursor()
        cursor.execute("SET memory_limit = '80MB'; SET threads = 1")
        cursor.execute("CREATE SCHEMA g1")
        table = tables.create(cursor, "g1", schema("public.notes", 1, id="integer", body="text", n="integer"), [])
        named = f'{tables.KEY}, {tables.VERSION}, {tables.EXACT}, "id", "body", "n"'
        body = "concat('[\"', repeat(md5(i::VARCHAR), 32), '\"]')"
        cursor.execute(f"INSERT INTO {table.path} ({named}) SELECT i, 1, NULL, i, {body}, i FROM range(160000) t(i)")
        table = tables.evolve(cursor, table, schema("public.notes", 2, id="integer", body="jsonb", n="integer"))
        found = cursor.execute(f"SELECT count(*), sum(length(body->>0)), sum(n) FROM {table.path}").fetchall()
        assert found == [(160000, 160000 * 1024, 160000 * 159999 // 2)]
