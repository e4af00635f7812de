"""Verify against real servers: it is not blind, it is exact under load, and it knows each value as the log has it."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import replace
from typing import Any

import orjson
import psycopg
import pytest

from headrace import codec
from headrace.change import Row
from headrace.documents import Document, DocumentConsumer, Node
from headrace.log import Log
from headrace.settings import Settings
from headrace.stores.duckdb import Database
from headrace.stores.redis import RedisPages
from headrace_verify.ledger import DIFFERENT, EXTRA, MISSING, Difference
from headrace_verify.postgres import connect, moment
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay
from tests.fixtures.serving import await_live, serving
from tests.fixtures.verified import (
    ITEMS,
    TYPES,
    VALUES,
    Mirror,
    T,
    Warehouse,
    closing_sync,
    found,
    kept,
    loaded,
    meddle,
)


def test_one_row_changed_one_removed_and_one_added_are_found_by_name(settings: Settings) -> None:
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 1200) i")
    with kept(settings, Mirror):
        assert found(settings, Mirror).clean
        meddle(settings, "UPDATE rows SET value = ? WHERE key = ?", '{"id":7,"n":8,"name":"x"}', '{"id":7}')
        meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":600}')
        meddle(settings, "INSERT INTO rows VALUES (1, ?, ?, ?, 1, 1)", T, '{"id":9999}', '{"id":9999}')
        seen = found(settings, Mirror)
    assert seen.rows == 1200
    assert not seen.undecided
    assert seen.wrong == [
        Difference(MISSING, T, '{"id":600}'),
        Difference(DIFFERENT, T, '{"id":7}', ("n",)),
        Difference(EXTRA, T, '{"id":9999}'),
    ]


def test_it_is_exact_while_everything_changes(settings: Settings) -> None:
    """Nothing that merely moves is reported, and what is wrong is, whatever moves around it."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 3000) i")
    with (
        kept(settings, Mirror),
        loaded(
            settings,
            lambda chance: f"UPDATE {T} SET n = n + 1 WHERE id = {chance.randint(100, 2999)}",
            lambda chance: f"DELETE FROM {T} WHERE id = {chance.randint(100, 2999)}",
            lambda chance: f"INSERT INTO {T} VALUES ({chance.randint(100, 2999)}, 0, 'new') ON CONFLICT DO NOTHING",
            *[lambda _: "SELECT pg_sleep(0.02)"] * 3,  # more than is written could not be shown
        ),
    ):
        for _ in range(3):
            assert found(settings, Mirror).clean
        meddle(settings, "DELETE FROM rows WHERE key = ?", '{"id":50}')
        seen = found(settings, Mirror)
    assert [(d.kind, d.key) for d in seen.wrong] == [(MISSING, '{"id":50}')]
    assert not seen.undecided


def test_a_commit_that_the_snapshot_does_not_see_excuses_although_it_is_logged_before(settings: Settings) -> None:
    """A commit that waits for a synchronous standby is in the log and in the view, and no snapshot sees it (S7)."""
    settings = replace(settings, heartbeat_ms=0)  # which has a transaction of its own, after that
    prepare(settings, ITEMS, f"INSERT INTO {T} VALUES (1, 0, 'old')")
    with kept(settings, Mirror) as control:
        with psycopg.connect(settings.dsn, autocommit=True) as waiting, closing_sync(settings):
            waiting.execute("SET synchronous_commit = on")
            thread = threading.Thread(target=_ignore_cancel, args=(waiting, f"UPDATE {T} SET name = 'new'"))
            thread.start()
            eventually("the view has it", lambda: _named(settings) == "new")
            with connect(settings) as connection, moment(connection) as now:
                assert connection.execute(f"SELECT name FROM {T}").fetchone() == ("old",)
            assert not now.snapshot.running, "its transaction is not even listed: it is beyond xmax"
            seen = found(settings, Mirror, timeout=30)
            waiting.cancel()
            thread.join(30)
        assert not seen.wrong
        assert [d.key for d in seen.undecided] == ['{"id":1}'], (
            "not decided while the commit waits, and not called clean"
        )
        assert found(settings, Mirror).clean
        assert control.running("view")


def _ignore_cancel(connection: psycopg.Connection[Any], statement: str) -> None:
    connection.execute(statement.encode())


def _named(settings: Settings) -> str | None:
    with sqlite3.connect(settings.path("plain.sqlite"), timeout=10) as view:
        row = view.execute("SELECT value FROM rows WHERE key = ?", ['{"id":1}']).fetchone()
    return str(orjson.loads(row[0])["name"]) if row else None


def test_columns_may_be_called_as_our_queries_call_their_rows(settings: Settings) -> None:
    """In the snapshot's queries and in ours: an alias must not be taken for the column."""
    prepare(
        settings,
        "CREATE TABLE items (r int, k int, t int, c int, PRIMARY KEY (k, r))",
        "CREATE TABLE others (r int PRIMARY KEY, k text)",
        "INSERT INTO items VALUES (1, 2, 3, 4)",
        "INSERT INTO others VALUES (1, 'k')",
    )
    with kept(settings, Mirror):
        execute(settings, "INSERT INTO items VALUES (5, 6, 7, 8)", "UPDATE others SET k = 'more'")
        assert found(settings, Mirror).clean
        keys = {change.key for table in (T, "public.others") for change in Log(settings).scan(table)}
    assert keys == {b'{"k":2,"r":1}', b'{"k":6,"r":5}', b'{"r":1}'}


def test_every_type_is_read_as_the_log_has_it(settings: Settings) -> None:
    """Snapshot and stream against SQL; the same value, all NULL, and an old row from before a column was added."""
    columns = {f"c{number}": type_ for number, type_ in enumerate(VALUES)}
    typed = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
    values = ", ".join(f"{value}::{type_}" for type_, value in VALUES.items())
    table = f"CREATE TABLE public.every (id numeric(5,2), code text, PRIMARY KEY (code, id), {typed})"
    prepare(settings, *TYPES, table, f"INSERT INTO public.every VALUES (1.5, 'k', {values})")
    execute(settings, "INSERT INTO public.every VALUES (2, 'nulls')")
    with kept(settings, Mirror):
        execute(settings, f"INSERT INTO public.every VALUES (1.5, 'streamed \" ü', {values})")
        assert [(d.kind, d.key, d.columns) for d in found(settings, Mirror).wrong] == []
        execute(
            settings,
            "ALTER TABLE public.every ADD COLUMN later int",
            "INSERT INTO public.every (id, code, later) VALUES (3, 'l', 1)",
        )
        execute(settings, "UPDATE public.every SET c1 = 1 WHERE code = 'nulls'")
        seen = found(settings, Mirror)
        assert [(d.kind, d.key, d.columns) for d in seen.wrong] == []
        meddle(settings, "UPDATE rows SET value = replace(value, '\"1.50\"', '\"1.5\"') WHERE key LIKE '%\"k\"%'")
        again = found(settings, Mirror)
    assert seen.rows == 4
    assert [(d.key, d.columns) for d in again.wrong] == [('{"code":"k","id":"1.50"}', ("id",))]


@pytest.mark.usefixtures("redis_server")
def test_documents_as_deep_as_postgres_takes_them_are_in_every_view(settings: Settings) -> None:
    """Snapshot and stream; rows, a warehouse and documents, which then go on with what comes after."""

    class Deep(DocumentConsumer):
        """Rows as they are."""

        document = Document(T)
        store = RedisPages("verify-deep")

        def render(self, row: Node) -> Row | None:
            return {"html": codec.dumps([row["a"], row["b"], row["c"]]).decode()}

    insert = (
        f"INSERT INTO {T} SELECT {{}} + n, d, d::jsonb, ARRAY[d::jsonb, '[1]'] "
        "FROM unnest(ARRAY[2, 199, 200, 201, 253, 260, 1022, 1023, 1024, 3000]) n, LATERAL (SELECT (repeat('[{{\"[\":', n / 2) || "
        "CASE WHEN n % 2 = 1 THEN '[ ]' ELSE 'null' END || repeat('}} ]', n / 2))::json) made (d)"
    )
    prepare(settings, f"CREATE TABLE {T} (id int PRIMARY KEY, a json, b jsonb, c jsonb[])", insert.format(0))
    views: dict[str, type[Any]] = {"view": Mirror, "deep": Deep, "warehouse": Warehouse}
    with capturing(settings) as capture, serving(settings, **views) as control:
        capture.reach()
        await_live(control, *views)
        execute(settings, insert.format(10000), f"INSERT INTO {T} VALUES (99, '1', '2', NULL)")
        seen = {name: found(settings, consumer, name) for name, consumer in views.items()}
    assert {name: ([(d.kind, d.key, d.columns) for d in of.wrong], of.rows) for name, of in seen.items()} == {
        name: ([], 21) for name in views
    }
    log = replay(settings, T)
    for n in (200, 1024):
        assert log[b'{"id":%d}' % (10000 + n)]["a"] == log[b'{"id":%d}' % n]["a"]
    assert [type(log[b'{"id":%d}' % n]["b"]) for n in (200, 201)] == [list, str]


def test_a_row_that_is_there_twice_is_found(settings: Settings) -> None:
    """No index of the warehouse forbids it; also where a page ends between the two, as the first does after ten rows."""
    prepare(settings, ITEMS, f"INSERT INTO {T} SELECT i, i, 'x' FROM generate_series(1, 30) i")
    with kept(settings, Warehouse):
        database = Database.opened(settings.warehouse, settings.warehouse_memory)
        try:
            with database.cursor() as cursor:
                items = f'g1."{T}"'
                cursor.execute(f"CREATE TEMP TABLE more AS FROM {items} WHERE id = 30")
                cursor.execute(f"INSERT INTO more (FROM {items} ORDER BY _headrace_key LIMIT 1 OFFSET 9)")
                cursor.execute(f"INSERT INTO {items} FROM more")
                keys = sorted(key for (key,) in cursor.execute("SELECT _headrace_key FROM more").fetchall())
        finally:
            database.release()
        seen = found(settings, Warehouse)
    assert seen.wrong == [Difference(EXTRA, T, key) for key in keys]
    assert (len(keys), seen.undecided) == (2, [])
