"""Capture against real servers: what is in the log is what Postgres had, in commit order, exactly once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import psycopg
import pytest
from psycopg import sql

from headrace.change import Checkpoint, format_lsn, parse_lsn
from headrace.log import CutWriter, Log
from headrace.log.tail import BEGINNING, read_to_end
from headrace.settings import Settings
from headrace_capture import catalog, stream
from headrace_shop.edits import Made
from headrace_shop.writes import commit
from tests.fixtures.capture import (
    capturing,
    changes,
    eventually,
    execute,
    prepare,
    reached,
    refused,
    replay,
    rows,
    selected,
)
from tests.fixtures.serving import said
from tests.integration.test_resnapshot_order import waiting

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


def test_a_checkpoint_ends_every_cut_and_names_the_ends(settings: Settings) -> None:
    """`ends` is where the topic ends, versions never fall, and Postgres is told no more than a checkpoint covers (S4)."""
    prepare(settings, ITEMS)
    log = Log(settings)
    ends: list[list[int]] = []
    with capturing(settings) as capture:
        capture.reach()
        for n in range(5):
            execute(settings, f"INSERT INTO items VALUES ({n}, 'x', {n})")
            ends.append(capture.reach().ends[log.topic_of(T)])
            eventually("Kafka says so", lambda: log.ends(T) == [end + 1 for end in ends[-1]])  # the commit's marker
    checkpoints = list(log.checkpoints())
    assert [c.version for c in checkpoints] == sorted(c.version for c in checkpoints)
    told = [c.ends.get(log.topic_of(T), [0]) for c in checkpoints]
    assert [end for end, _ in groupby(told) if any(end)] == ends, "one for each commit"
    newest = checkpoints[-1]
    (confirmed,) = rows(
        settings, f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    )[0]
    assert parse_lsn(confirmed) <= newest.version.lsn


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


def test_an_empty_cut_follows_what_is_not_captured(settings: Settings) -> None:
    """An idle source's WAL is confirmed, and the token of a transaction without captured tables is reached (S4)."""
    settings = replace(settings, heartbeat_ms=0)  # a heartbeat is a transaction that is in the stream
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE other (id int)")
    with capturing(settings) as capture:
        capture.reach()
        for n in range(3):
            execute(settings, f"INSERT INTO other VALUES ({n})")
            checkpoint = capture.reach()
            assert checkpoint.xid == 0
        slot = f"SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
        eventually("Postgres is told", lambda: parse_lsn(rows(settings, slot)[0][0]) >= checkpoint.version.lsn)


def test_empty_cuts_come_at_most_every_100_ms(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred commits of uncaptured tables in a row do not make two hundred checkpoints."""
    monkeypatch.setattr(stream, "_IDLE_SECONDS", 1.0)  # as capture has it
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE other (id int)")
    with capturing(settings) as capture:
        capture.reach()

        def empties() -> list[Checkpoint]:
            execute(settings, *["INSERT INTO other VALUES (1)"] * 20)
            return [c for c in Log(settings).checkpoints() if c.xid == 0 and c.snapshot is None]

        for _ in range(10):
            empties()
        eventually("some come", lambda: len(empties()) > 3)
        capture.reach()
    empty = empties()
    assert all(later.appended - earlier.appended >= 90 for earlier, later in pairwise(empty))


def partials(settings: Settings) -> list[tuple[int, int]]:
    """Return for each cut that ended inside a transaction the ordinal where, and when its checkpoint came, ms."""
    return [(c.partial[1], c.appended) for c in Log(settings).checkpoints() if c.partial]


def test_a_transaction_that_takes_long_is_cut_by_the_clock(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows there are by then: who reads its partitions would wait for all of it (S5)."""
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 0.1)
    settings = replace(settings, cut_records=10**9)
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 100000) i")
        capture.reach()
    found = partials(settings)
    assert len(found) > 1, "it took a second or so"
    assert all(later[1] - earlier[1] >= 90 for earlier, later in pairwise(found))
    assert len(replay(settings, T)) == 100_000


def test_a_transaction_of_which_no_more_comes_for_a_while_is_cut_by_the_clock(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Postgres sends a part of it, and then nothing: what has come does not wait for the rest (S5)."""
    monkeypatch.setattr(stream, "LONGEST_SECONDS", 3.0)
    prepare(settings, ITEMS)
    sender = f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{settings.slot}'"
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        ((pid,),) = rows(settings, sender)
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 300000) i")
        capture.eventually("it has begun", lambda: partials(settings))
        os.kill(pid, signal.SIGSTOP)
        try:
            full = settings.cut_records
            capture.eventually("that is cut", lambda: any(ordinal % full for ordinal, _ in partials(settings)), 20)
        finally:
            os.kill(pid, signal.SIGCONT)
        capture.reach()
    assert len(replay(settings, T)) == 300_000


def test_a_transaction_larger_than_a_cut_spans_several(settings_of_small_cuts: Settings) -> None:
    """Their checkpoints say partial and keep the LSN; the last one does not (S5)."""
    settings = settings_of_small_cuts
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        capture.reach()
        execute(settings, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 95) i")
        capture.reach()
    partial = [c for c in Log(settings).checkpoints() if c.partial]
    assert [c.partial[1] for c in partial if c.partial] == list(range(10, 91, 10))
    assert len({c.version for c in partial}) == 1
    assert len(replay(settings, T)) == 95


@pytest.fixture
def settings_of_small_cuts(settings: Settings) -> Settings:
    """Settings with cuts of ten records."""
    return replace(settings, cut_records=10)


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


# S8, S9: keys


def test_s8_under_full_the_key_is_the_catalogues(settings: Settings) -> None:
    """FULL flags all columns as key in Relation; a changed value of another column is no changed key."""
    prepare(
        settings,
        "CREATE TABLE items (b int, name text, a int, PRIMARY KEY (a, b))",
        "ALTER TABLE items REPLICA IDENTITY FULL",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "INSERT INTO items VALUES (1, 'x', 2)",
            "UPDATE items SET name = 'y'",
            "UPDATE items SET a = 3",
            "DELETE FROM items",
        )
        capture.reach()
    assert [(c.op, c.key) for c in changes(settings, T) if c.row is not None or c.op == "d"][:3] == [
        ("c", b'{"a":2,"b":1}'),
        ("u", b'{"a":2,"b":1}'),
        ("d", b'{"a":2,"b":1}'),
    ]
    assert replay(settings, T) == {}


def test_s9_a_deferrable_key_is_no_key(settings: Settings) -> None:
    """The table is left out with a warning; the others go on."""
    prepare(settings, ITEMS)
    execute(
        settings,
        "CREATE TABLE shifted (id int PRIMARY KEY DEFERRABLE)",
        f"ALTER PUBLICATION {settings.publication} ADD TABLE shifted",
    )
    with capturing(settings) as capture:
        assert "deferrable" in capture.hear("public.shifted is left out")
        execute(settings, "INSERT INTO shifted VALUES (1)", "INSERT INTO items VALUES (1, 'x', 1)")
        capture.reach()
    assert Log(settings).tables() == [T]


def test_a_table_without_a_key_is_left_out_with_what_to_do(settings: Settings) -> None:
    """Named in the warning, with the statement."""
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE loose (n int)", f"ALTER PUBLICATION {settings.publication} ADD TABLE loose")
    with capturing(settings) as capture:
        assert "ALTER TABLE public.loose ADD PRIMARY KEY" in capture.hear("public.loose is left out")


# S11: TRUNCATE


@pytest.mark.parametrize("cut_records", [10, 20_000])
def test_s11_truncate_is_a_delete_for_each_live_key(settings: Settings, cut_records: int) -> None:
    """In bounded cuts, whole with its transaction, with rows before and after it in the same one."""
    settings = replace(settings, cut_records=cut_records)
    prepare(settings, ITEMS, "INSERT INTO items SELECT i, 'x', i FROM generate_series(1, 35) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(
            settings,
            "BEGIN; INSERT INTO items VALUES (100, 'before', 1); TRUNCATE items; INSERT INTO items VALUES (5, 'after', 1); COMMIT",
        )
        capture.reach()
    dead = [c for c in changes(settings, T) if c.row is None]
    assert len(dead) == 2 * 36
    assert {c.ordinal for c in dead} == {2}
    assert replay(settings, T) == selected(settings, T)


def test_s11_capture_that_is_asked_to_stop_amid_a_truncate_stops(settings: Settings) -> None:
    """At the end of a cut, not when all is deleted; the next one goes on there, and each key is deleted once."""
    rows = 20_000
    settings = replace(settings, cut_records=100)
    prepare(settings, ITEMS, f"INSERT INTO items SELECT i, 'x', i FROM generate_series(1, {rows}) i")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "BEGIN; TRUNCATE items; INSERT INTO items VALUES (5, 'after', 1); COMMIT")
        capture.eventually("it deletes", lambda: any(c.partial for c in Log(settings).checkpoints()))
    assert replay(settings, T).keys() > {b'{"id":5}'}
    with capturing(settings) as capture:
        capture.reach()
    assert len([c for c in changes(settings, T) if c.row is None]) == 2 * rows
    assert replay(settings, T) == selected(settings, T)


# S14: sessions


def test_s14_the_servers_settings_do_not_shape_values(settings: Settings) -> None:
    """A database that prints dates, intervals, floats, bytes and money in its own way: snapshot and stream say the same."""
    name = settings.dsn.rpartition("/")[2]
    odd = {
        "DateStyle": "German",
        "IntervalStyle": "sql_standard",
        "TimeZone": "Asia/Tokyo",
        "extra_float_digits": "-3",
        "bytea_output": "escape",
    }
    execute(settings, *[f"ALTER DATABASE {name} SET {setting} = '{value}'" for setting, value in odd.items()])
    values = "'2024-02-03 04:05:06.7+00', '2024-02-03', '1 day 2 hours', 0.1::float8 + 0.2, '\\x00ff'"
    prepare(
        settings,
        "CREATE TABLE items (id int PRIMARY KEY, at timestamptz, day date, took interval, f float8, raw bytea)",
        f"INSERT INTO items VALUES (1, {values})",
    )
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, f"INSERT INTO items VALUES (2, {values})")
        capture.reach()
    first, second = ({k: v for k, v in row.items() if k != "id"} for row in replay(settings, T).values())
    assert (
        first
        == second
        == {
            "at": "2024-02-03T04:05:06.7+00:00",
            "day": "2024-02-03",
            "took": "1 day 02:00:00",
            "f": 0.30000000000000004,
            "raw": "AP8=",
        }
    )


@pytest.mark.parametrize("connect", [catalog.connect, catalog.connect_replication])
def test_s14_every_connection_sets_what_shapes_a_value(
    settings: Settings, connect: Callable[[str], catalog.Connection]
) -> None:
    """Money too. Whether a server has a locale with other money depends on its machine; C and POSIX print the same, and all have both."""
    name = settings.dsn.rpartition("/")[2]
    odd = {"lc_monetary": "POSIX", "DateStyle": "German", "row_security": "on", "search_path": "public"}
    execute(settings, *[f"ALTER DATABASE {name} SET {setting} = '{value}'" for setting, value in odd.items()])
    assert rows(settings, "SHOW lc_monetary") == [("POSIX",)]
    with closing(connect(settings.dsn)) as connection:
        said = {setting: connection.execute(f"SHOW {setting}".encode()).fetchone() for setting in odd}
    assert said == {"lc_monetary": ("C",), "DateStyle": ("ISO, MDY",), "row_security": ("off",), "search_path": ("",)}


def test_s14_row_security_is_an_error_not_an_empty_snapshot(settings: Settings) -> None:
    """COPY by a role under row security shows no rows and no error; row_security=off makes it refuse."""
    role = f"r_{settings.source}"
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 'hidden', 1)", "ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    execute(settings, f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x'", f"GRANT SELECT ON items TO {role}")
    try:
        error = refused(replace(settings, dsn=settings.dsn.replace("//postgres@", f"//{role}:x@")))
        assert error.code == "postgres-rights"
        assert "row-level security" in error.message
    finally:
        execute(settings, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


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


# S17: heartbeat


def test_s17_a_heartbeat_moves_an_idle_source(settings: Settings) -> None:
    """With nobody writing, checkpoints go on, and a change right after a heartbeat survives a restart (dbz#2058)."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, ITEMS)
    with capturing(settings) as capture:
        start = capture.reach().version.lsn
        eventually(
            "a heartbeat to be a cut of its own",
            lambda: any(c.xid and c.version.lsn > start for c in Log(settings).checkpoints()),
        )
        execute(settings, "SELECT pg_logical_emit_message(true, 'headrace', '')")
        capture.reach()  # capture goes on from behind a message
    emit = "SELECT pg_logical_emit_message(true, 'headrace', '')"
    execute(settings, emit, "INSERT INTO items VALUES (1, 'after', 1)")
    with capturing(settings) as capture:
        capture.reach()
    assert [c.key for c in changes(settings, T)] == [b'{"id":1}'], format_lsn(start)


@pytest.mark.parametrize("heartbeat_ms", [200, 0])
def test_s4_the_wal_of_an_idle_database_is_let_go_while_its_neighbours_write(
    settings: Settings, fresh_database: Callable[[], str], heartbeat_ms: int
) -> None:
    """The slot needs nothing of what another database on the same server writes; held back, it fills the server's disk."""
    settings = replace(settings, heartbeat_ms=heartbeat_ms)
    prepare(settings, ITEMS)
    slot = "SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = %s"
    with capturing(settings) as capture, psycopg.connect(fresh_database(), autocommit=True) as neighbour:
        capture.reach()
        neighbour.execute("CREATE TABLE busy (t text)")
        began = neighbour.execute("SELECT pg_current_wal_lsn()::text").fetchone()

        def let_go() -> bool:
            neighbour.execute("INSERT INTO busy SELECT repeat('x', 1000) FROM generate_series(1, 2000)")
            neighbour.execute(
                "SELECT pg_log_standby_snapshot()"
            )  # Postgres does it every 15 s: only then can a slot move on
            held = neighbour.execute(slot, [settings.slot]).fetchone()
            return bool(held and began) and parse_lsn(held[0]) > parse_lsn(began[0]) + 4_000_000

        eventually("Postgres may remove it", let_go)
        assert capture.reach().version.lsn > parse_lsn(began[0]) + 4_000_000


def test_s17_a_heartbeat_that_hangs_does_not_stop_the_stream(settings: Settings) -> None:
    """Its commit waits for a standby that is away, longer than its timeout; who does not wait for one is in the log all the same."""
    settings = replace(settings, heartbeat_ms=100)
    prepare(settings, ITEMS)
    hangs = f"datname = '{settings.source}' AND wait_event = 'SyncRep' AND application_name = 'headrace heartbeat'"
    with capturing(settings) as capture:
        capture.hear("streaming")
        with waiting(settings, "INSERT INTO items VALUES (1, 'waits', 1)"):
            query = f"SELECT pid FROM pg_stat_activity WHERE {hangs} AND clock_timestamp() - query_start > '6 s'"
            hanging = capture.eventually("the heartbeat hangs", lambda: rows(settings, query))
            execute(settings, "SET synchronous_commit = local; INSERT INTO items VALUES (2, 'does not', 2)")
            capture.reach()
            assert rows(settings, query) == hanging
            assert [c.key for c in changes(settings, T)] == [b'{"id":1}', b'{"id":2}']
        beyond = capture.reach().version.lsn
        reached(settings, beyond + 1)
