"""Capture against real servers: what is in the log is what Postgres had, in commit order, exactly once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from psycopg import sql

from headrace.change import parse_lsn
from headrace.log import CutWriter, Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace_capture import catalog
from headrace_shop.edits import Made
from headrace_shop.writes import commit
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, reached, replay, rows, selected
from tests.fixtures.serving import said

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
T = "public.items"


def test_snapshot_then_stream_is_the_table(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from before and after the slot, every kind of change, several in one transaction, a rollback."""
    monkeypatch.setattr("headrace_capture.snapshot._LARGE_PAGES", 1)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, 'n' || i, i FROM generate_series(1, 500) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO items VALUES (1000, 'new \" \\ ü', NULL)",
            "UPDATE items SET n = n + 1 WHERE id < 100",
        )
        execute(settings, "BEGIN; UPDATE items SET id = 2000 WHERE id = 7; DELETE FROM items WHERE id = 8; COMMIT")
        execute(settings, "BEGIN; INSERT INTO items VALUES (3000, 'never', 1); ROLLBACK")
        checkpoint = capture.reach()
    assert [line for line in capture.said if "chunked" in line] == [capture.hear("is stopped amid this snapshot")]
    assert replay(settings, T) == selected(settings, T)
    assert checkpoint.complete
    assert not checkpoint.inexact
    assert {change.op for change in changes(settings, T)} == {"r", "c", "u", "d"}


def test_deletes_and_their_tombstones_stand_next_to_each_other(settings: Settings) -> None:
    """A delete is a `d` record and then a tombstone, both with the headers of the change."""
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 50) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "DELETE FROM items WHERE id <= 25", "UPDATE items SET id = id + 1000")
        capture.reach()
    topic = (Log(settings).topic_of(T), 0)
    records = list(read_to_end(settings, {topic: BEGINNING}))
    for before, record in pairwise(records):
        if record.value is None:
            assert before.key == record.key
            assert b'"after":null' in (before.value or b"")
            assert before.headers == record.headers
            assert before.offset + 1 == record.offset
    assert sum(record.value is None for record in records) == 50


def test_stopped_and_started_it_goes_on(settings: Settings) -> None:
    """Nothing twice and nothing missing over three clean stops."""
    prepare(settings, ITEMS)
    for n in range(3):
        with capturing(settings) as capture:
            execute(settings, f"INSERT INTO items VALUES ({2 * n}, 'on', {n})")
            capture.reach()
        assert not any("chunked" in line for line in capture.said), "it was a small one"
        execute(settings, f"INSERT INTO items VALUES ({2 * n + 1}, 'off', {n})")
    with capturing(settings) as capture:
        capture.reach()
    assert [c.row["id"] for c in changes(settings, T) if c.row] == list(range(6))


def test_asked_to_stop_while_it_reads_the_checkpoints_it_stops(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After many small cuts there are many of them."""
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
    resume, resumed = CutWriter.resume, []
    begun, asked = threading.Event(), threading.Event()

    def resuming(writer: CutWriter, *args: Any) -> None:
        begun.set()
        asked.wait()
        resume(writer, *args)
        resumed.append(writer)

    monkeypatch.setattr(CutWriter, "resume", resuming)
    with capturing(settings) as capture:
        capture.eventually("it reads them", begun.is_set)
        capture._stop.set()
        asked.set()
    assert not resumed


def test_a_second_capture_waits_for_the_first(settings: Settings) -> None:
    """It does not fence the one that works, nor report over it; it takes over when that one has ended (S3)."""
    prepare(settings, ITEMS)
    with capturing(settings) as first:
        first.hear("streaming")
        first.eventually("it reports that", lambda: "streaming" in said(settings, "capture"))
        with capturing(settings) as third:
            third.hear("is in use")
        assert not {"waiting", "off"} & set(said(settings, "capture"))
        with capturing(settings) as second:
            second.hear("is in use")
            execute(settings, "INSERT INTO items VALUES (1, 'by the first', 1)")
            first.reach()
            first.stop()
            second.hear("streaming")
            execute(settings, "INSERT INTO items VALUES (2, 'by the second', 2)")
            second.reach()
    assert [c.key for c in changes(settings, T)] == [b'{"id":1}', b'{"id":2}']


# S1: the record's LSN orders nothing


def test_s1_a_row_inserted_behind_its_predecessors_delete_lives(settings: Settings) -> None:
    """T2's heap record is written before T1's delete, T2 commits after: the later commit wins, by version too."""
    slow = "CREATE FUNCTION slow(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN PERFORM pg_sleep(n); RETURN n; END $$"
    prepare(settings, ITEMS, slow, "INSERT INTO items VALUES (1, 'old', 0)", "CREATE INDEX wide ON items (slow(n))")
    with capturing(settings) as capture:
        capture.reach()
        with psycopg.connect(settings.dsn) as t1:
            t1.execute("DELETE FROM items WHERE id = 1")
            t2 = threading.Thread(target=execute, args=(settings, "INSERT INTO items VALUES (1, 'new', 0)"))
            t2.start()
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'INSERT INTO items%'"
            eventually("T2 waits for T1 on the unique index", lambda: rows(settings, waits)[0][0])
            t1.commit()
        t2.join()
        capture.reach()
    delete, _, insert = changes(settings, T)[-3:]
    assert (delete.row, insert.row) == (None, {"id": 1, "name": "new", "n": 0})
    assert insert.version > delete.version
    assert replay(settings, T) == selected(settings, T)


def test_s1_a_row_committed_at_the_consistent_point_is_not_older_than_the_snapshot(settings: Settings) -> None:
    """Its record is before that point and not in the snapshot, its commit at that very point: the two versions are equal.

    Another process of Postgres may write WAL just then, so there are some tries: each a capture of its own.
    """
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'old', 0)")
    for attempt in range(5):
        name = f"{settings.source}_{attempt}"
        tried = replace(settings, source=name, slot=name)
        capture_with_a_commit_at_the_consistent_point(tried, f"new in try {attempt}")
        log = changes(tried, T)
        assert [c.version for c in log] == sorted(c.version for c in log)
        assert replay(tried, T) == selected(tried, T)
        if log[0].version == log[1].version:
            break
    snapshot, streamed = log[:2]
    assert (snapshot.op, streamed.op) == ("r", "u")
    assert snapshot.version == streamed.version
    assert (streamed.row or {})["name"] == f"new in try {attempt}"


def capture_with_a_commit_at_the_consistent_point(settings: Settings, name: str) -> None:
    """Postgres waits for those who ran when it began, then for those who came meanwhile; who comes after them is streamed."""
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(psycopg.connect(settings.dsn)) for _ in range(3))
        before = xid(first)
        with capturing(settings) as capture:
            eventually("the slot waits for the first", lambda: awaited(settings, before))
            meanwhile = xid(second)
            first.commit()
            eventually("the slot waits for the second", lambda: awaited(settings, meanwhile))
            third.execute("UPDATE items SET name = %s WHERE id = 1", [name])
            second.commit()
            capture.hear("snapshot of public.items")
            third.commit()
            capture.reach()


def xid(connection: psycopg.Connection[Any]) -> int:
    """Return the id of the transaction that is open, given to it now."""
    row = connection.execute("SELECT pg_current_xact_id()::text").fetchone()
    assert row
    return int(row[0])


def awaited(settings: Settings, xid: int) -> bool:
    """Whether a walsender waits for the end of a transaction."""
    waits = f"""SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
        WHERE backend_type = 'walsender' AND NOT granted AND transactionid = '{xid}'::xid"""
    return bool(rows(settings, waits)[0][0])


def test_a_connection_of_the_snapshot_that_sees_another_moment_ends_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a pool that leads to several servers: none of its rows is written, and the snapshot starts again."""
    settings = replace(settings, snapshot_connections=2)
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'a', 1)")
    connect, astray = catalog.connect, list[str]()

    def misled(dsn: str, **how: Any) -> catalog.Connection:
        connection = connect(dsn, **how)
        if how.get("name") == "headrace snapshot":
            astray.append("")
            if len(astray) == 2:
                monkeypatch.setattr(connection, "execute", partial(beside, connection.execute))
        return connection

    def beside(execute_: Callable[..., Any], query: Any, *args: Any) -> Any:
        if isinstance(query, sql.Composed):
            execute(settings, "INSERT INTO items VALUES (2, 'b', 2)")
            return execute_("SELECT")
        return execute_(query, *args)

    monkeypatch.setattr(catalog, "connect", misled)
    with capturing(settings) as capture:
        assert "[snapshot-differs]" in capture.hear("waiting: ")
        capture.hear("snapshot complete")
        capture.reach()
    assert [(c.op, c.key) for c in changes(settings, T)] == [("r", b'{"id":1}'), ("r", b'{"id":2}')]
    assert len(astray) == 4


# S25: tokens


class Overtaken:
    """An edit that takes an LSN inside its transaction, while another one commits."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.lsn = 0

    def make(self, connection: psycopg.Connection[Any], made: Made) -> None:
        connection.execute("UPDATE items SET n = 1 WHERE id = 1")
        row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        assert row
        self.lsn = parse_lsn(row[0])
        execute(self._settings, "UPDATE items SET n = 1 WHERE id = 2")


def test_s25_a_token_is_beyond_its_commit_where_an_lsn_from_inside_is_reached_without_it(settings: Settings) -> None:
    """The shop's own way of writing. A view that has reached the LSN from inside may show the other's change and not ours."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'ours', 0), (2, 'another', 0)")
    inside = Overtaken(settings)
    with capturing(settings) as capture:
        capture.hear("streaming")
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            token = commit(connection, (inside,)).lsn
        checkpoint = reached(settings, token)
    another, ours = changes(settings, T)[-2:]
    assert (another.row["id"], ours.row["id"]) == (2, 1)
    assert inside.lsn < another.version.lsn < ours.version.lsn < token <= checkpoint.version.lsn
    assert checkpoint.version.epoch == ours.version.epoch == 1


# S12, S13: shapes


def test_s13_a_new_column_is_a_new_version_that_records_name(settings: Settings) -> None:
    """A nullable column without a default changes no row; dropped again, it is a third version."""
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO items VALUES (1, 'a', 1)",
            "ALTER TABLE items ADD COLUMN more text",
            "INSERT INTO items VALUES (2, 'b', 1, 'm')",
        )
        execute(settings, "ALTER TABLE items DROP COLUMN more", "INSERT INTO items VALUES (3, 'c', 1)")
        checkpoint = capture.reach()
    assert [c.schema for c in changes(settings, T)] == [1, 2, 3]
    schemas = Log(settings).schemas()
    assert [[c.name for c in schemas[T, version].columns] for version in (1, 2, 3)] == [
        ["id", "name", "n"],
        ["id", "name", "n", "more"],
        ["id", "name", "n"],
    ]
    assert not checkpoint.inexact


@pytest.mark.parametrize(
    "ddl",
    [
        "ALTER TABLE items ADD COLUMN more int DEFAULT 5",
        "ALTER TABLE items RENAME COLUMN n TO m",
        "ALTER TABLE items ALTER COLUMN n TYPE text USING 'no ' || n",
    ],
)
def test_s12_ddl_that_changes_rows_silently_lets_the_table_be_read_again(settings: Settings, ddl: str) -> None:
    """Inexact in the checkpoints until then, with a warning that names the rule, and no longer."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'a', 1)")
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, ddl, "INSERT INTO items (id) VALUES (2)")
        assert "S12" in capture.hear("public.items is inexact")
        capture.hear("public.items was read again")
        assert capture.reach().inexact == ()
    assert any(c.inexact == (T,) for c in Log(settings).checkpoints())
    assert replay(settings, T) == selected(settings, T)


def test_a_table_that_joins_the_publication_is_read_by_itself(settings: Settings) -> None:
    """With rows from before, changed at once or never."""
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        for name in ("busy", "idle"):
            execute(settings, f"CREATE TABLE {name} (id int PRIMARY KEY)", f"INSERT INTO {name} VALUES (1)")
            execute(settings, f"ALTER PUBLICATION {settings.publication} ADD TABLE {name}")
        execute(settings, "INSERT INTO busy VALUES (2)")
        for name in ("busy", "idle"):
            capture.hear(f"public.{name} was read again")
        assert capture.reach().inexact == ()
    for name in ("busy", "idle"):
        assert replay(settings, f"public.{name}") == selected(settings, name)
