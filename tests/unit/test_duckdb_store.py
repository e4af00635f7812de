"""The store of the warehouse keeps the contract of a consumer."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from headrace.change import UNKNOWN_SCHEMA, Version
from headrace.errors import HeadraceError, Misconfigured, Poison, Transient, Wiped
from headrace.settings import Settings
from headrace.stores.duckdb import Database, DuckDBStore, Result, query
from tests.fixtures.tables import FIRST, SECOND, batch, gone, put, schema

ITEMS = schema("public.items", id="integer", name="text")
TAGS = schema("sales.tags", id="integer", tag="text")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(warehouse=str(tmp_path / "w.duckdb"), warehouse_memory="1GB")


@pytest.fixture
def store(settings: Settings) -> Iterator[DuckDBStore]:
    made = DuckDBStore(settings, "warehouse")
    assert made.open(FIRST) is None
    yield made
    made.close()


def ask(settings: Settings, sql: str) -> Result:
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    try:
        return query(database, sql, rows=1000, seconds=10)
    finally:
        database.release()


def rows(store: DuckDBStore) -> dict[tuple[str, str], Any]:
    return {(row.collection, row.key): row.value for row in store.scan(None, 1000)}


def test_a_file_that_must_be_opened_anew_waits_for_a_query_that_runs(store: DuckDBStore, settings: Settings) -> None:
    """What holds the file is told as busy, and not as a fault; without the query it is opened, with what was committed."""
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    running, ended = threading.Event(), threading.Event()

    def batches() -> Iterator[pa.RecordBatch]:
        running.set()
        ended.wait(60)
        yield pa.record_batch({"n": [1]})

    with database.cursor() as cursor:
        cursor.register("slow", pa.RecordBatchReader.from_batches(pa.schema({"n": pa.int64()}), batches()))
        asker = threading.Thread(target=lambda: cursor.execute("SELECT sum(n) FROM slow").fetchall())
        asker.start()
        running.wait(60)
        database._gave_up = True
        with pytest.raises(Transient, match="cannot write"):
            database.renew()
        ended.set()
        asker.join()
    store.close()
    database.renew()
    assert store.open(FIRST) is not None
    assert rows(store) == {("public.items", '{"id":1}'): {"id": 1, "name": "a"}}
    database.release()


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


# The file


def test_a_lost_file_is_made_anew(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    store.close()
    Path(settings.warehouse).unlink()
    assert store.generations() == []
    assert store.open(FIRST) is None


@pytest.mark.parametrize("damage", ["garbage", "cut", "flipped", "empty"])
def test_a_damaged_file_is_set_aside_and_made_anew(store: DuckDBStore, settings: Settings, damage: str) -> None:
    store.apply(batch(10, *(put(ITEMS, 10, id=n, name=str(n)) for n in range(5000)), schemas=(ITEMS,)))
    store.close()
    file = Path(settings.warehouse)
    data = bytearray(file.read_bytes())
    if damage == "garbage":
        data = bytearray(b"not a database" * 1000)
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[4096 : 3 * 4096] = b"\xff" * 8192
    else:
        data.clear()
    file.write_bytes(data)
    if damage == "cut":  # DuckDB opens this one and finds out when it reads
        with pytest.raises(Misconfigured, match="is damaged"):
            store.open(FIRST)
        store.close()
    assert store.generations() == []
    assert store.open(FIRST) is None
    assert file.with_name("w.duckdb.broken").read_bytes() == bytes(data)
    store.apply(batch(10, put(ITEMS, 10, id=1), schemas=(ITEMS,)))
    assert len(store.scan(None, 9)) == 1


@pytest.mark.parametrize("scarce", ["files", "memory"])
def test_a_whole_file_that_cannot_be_opened_now_is_left_as_it_is(
    store: DuckDBStore, settings: Settings, scarce: str
) -> None:
    """The process is short of something as it starts; the next attempt finds the view where it was."""
    store.apply(batch(10, *(put(ITEMS, 10, id=n, name=str(n) * 500) for n in range(9000)), schemas=(ITEMS,)))
    store.close()
    script = f"""
import os, resource, duckdb
real = duckdb.connect
if {scarce == "memory"}:
    with real({settings.warehouse!r}, config={{"checkpoint_threshold": "1GB"}}) as large:
        large.execute("PRAGMA disable_checkpoint_on_shutdown")
        large.execute("CREATE TABLE g1.more AS SELECT range AS n, repeat(md5(range::text), 2) AS text FROM range(300000)")
        large.execute("UPDATE g1.more SET text = text || 'x' WHERE n % 2 = 0")
    duckdb.connect = lambda path, config: real(path, config=config | {{"memory_limit": "8MB"}})
from headrace.settings import Settings
from headrace.stores.duckdb import Database
if {scarce == "files"}:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    last = max(os.dup(0) for _ in range(64 - len(os.listdir("/proc/self/fd")) + 1))
    os.close(last)
try:
    Database.opened({settings.warehouse!r}, "1GB")
except Exception as error:
    print(type(error).__name__, error.code, error.remedy)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    expected = {"files": "Transient warehouse-io See the message", "memory": "Transient warehouse-memory"}
    assert said.startswith(expected[scarce])
    assert not list(Path(settings.warehouse).parent.glob("*.broken"))
    assert [found.number for found in store.generations()] == [1]


def test_an_attempt_that_failed_while_the_file_was_given_up_can_be_closed(
    store: DuckDBStore, settings: Settings
) -> None:
    other = DuckDBStore(settings, "warehouse")
    database = Database.opened(settings.warehouse, settings.warehouse_memory)
    database._root.close()
    with pytest.raises(Transient):
        other.open(FIRST)
    other.close()
    assert database.users == 2
    database.release()


def test_what_was_set_aside_before_is_kept(store: DuckDBStore, settings: Settings) -> None:
    store.close()
    file = Path(settings.warehouse)
    for text in ("first", "second"):
        file.write_text(text)
        assert store.generations() == []
    assert [file.with_name(f"w.duckdb.{name}").read_text() for name in ("broken", "broken2")] == ["first", "second"]


def test_a_file_that_another_process_has_is_refused(settings: Settings) -> None:
    script = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, settings.warehouse], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(Misconfigured, match=rf"w\.duckdb.*PID {other.pid}") as raised:
            DuckDBStore(settings, "warehouse").open(FIRST)
        assert raised.value.code == "warehouse-locked"
        other.communicate()


def test_somebody_elses_database_is_refused_and_left_alone(settings: Settings) -> None:
    with duckdb.connect(settings.warehouse) as bare:
        bare.execute("CREATE TABLE mine AS SELECT 1")
    store = DuckDBStore(settings, "warehouse")
    with pytest.raises(Misconfigured, match="did not make"):
        store.open(FIRST)
    store.close()
    with duckdb.connect(settings.warehouse) as bare:
        assert bare.execute("SHOW TABLES").fetchall() == [("mine",)]


def test_a_folder_in_place_of_the_file_is_misconfigured(settings: Settings) -> None:
    Path(settings.warehouse).mkdir()
    with pytest.raises(Misconfigured, match="cannot be opened"):
        DuckDBStore(settings, "warehouse").open(FIRST)


def test_a_size_that_is_none_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="HEADRACE_WAREHOUSE_MEMORY='much'"):
        DuckDBStore(Settings(warehouse=str(tmp_path / "w"), warehouse_memory="much"), "warehouse").open(FIRST)


# Names and schemas


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


def test_a_file_of_another_consumer_is_refused_and_left_as_it_is(store: DuckDBStore, settings: Settings) -> None:
    store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), schemas=(ITEMS,)))
    store.promote()
    sales = DuckDBStore(settings, "sales")
    for attempt in (sales.generations, lambda: sales.open(FIRST), lambda: sales.open(SECOND)):
        with pytest.raises(Misconfigured, match="is of warehouse, not of sales") as error:
            attempt()
        assert error.value.code == "view-of-another"
        assert "HEADRACE_WAREHOUSE" in error.value.remedy
        sales.close()
    assert ask(settings, "SELECT name FROM items").rows == [["a"]]
    assert [(found.consumer, found.number, found.live) for found in store.generations()] == [("warehouse", 1, True)]


def test_a_file_that_says_no_consumer_is_of_who_opens_it_first(store: DuckDBStore, settings: Settings) -> None:
    store.close()
    with duckdb.connect(settings.warehouse) as raw:
        raw.execute("DROP TABLE headrace.consumer")
    sales = DuckDBStore(settings, "sales")
    assert [found.number for found in sales.generations()] == [1]
    sales.open(FIRST)
    sales.close()
    with pytest.raises(Misconfigured, match="is of sales, not of warehouse"):
        store.open(FIRST)


@pytest.mark.parametrize("name", ["headrace", "Headrace", "g1", "g2.old", "public", "information_schema"])
def test_a_file_that_duckdb_would_take_for_a_schema_in_it_is_refused(tmp_path: Path, name: str) -> None:
    refused = DuckDBStore(Settings(warehouse=str(tmp_path / f"{name}.duckdb"), warehouse_memory="1GB"), "warehouse")
    with pytest.raises(Misconfigured, match="would take it for the file's") as error:
        refused.open(FIRST)
    assert (error.value.code, list(tmp_path.iterdir())) == ("warehouse-file", [])


@pytest.mark.parametrize("name", ["main", "system", "sales", "warehouse"])
def test_a_file_of_another_name_works_through_a_rebuild(tmp_path: Path, name: str) -> None:
    settings = Settings(warehouse=str(tmp_path / f"{name}.duckdb"), warehouse_memory="1GB")
    store = DuckDBStore(settings, "warehouse")
    for generation in (FIRST, SECOND):
        store.open(generation)
        store.apply(batch(10, put(ITEMS, 10, id=1, name="a"), put(TAGS, 10, id=1, tag="x"), schemas=(ITEMS, TAGS)))
        store.promote()
        tagged = "SELECT name, tag FROM items JOIN public.items USING (name), " + (
            "sales_.tags" if name == "sales" else "sales.tags"
        )
        assert ask(settings, tagged).rows == [["a", "x"]]
    store.close()


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
