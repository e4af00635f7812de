"""WAL order is not visibility order (S7): a commit that waits for a standby is in the stream and not yet to be seen.

*(seen)* The stream has T's commit, then the low watermark; the chunk that is read between the watermarks still has the old row. Only the
chunk's own snapshot tells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg
import pytest

from headrace.settings import Settings
from headrace_capture import catalog, chunks, setup, watermarks
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, prepare, replay, rows, selected
from tests.fixtures.resnapshots import ask, done, jobs
from tests.fixtures.silent import LOW, fingerprint

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"


@contextmanager
def waiting(settings: Settings, *statements: str) -> Iterator[None]:
    """Commit statements whose commit is in the WAL and not visible, until the block ends."""
    execute(settings, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    eventually("commits wait", lambda: rows(settings, "SHOW synchronous_standby_names") == [("nobody",)])
    execute(settings, "CHECKPOINT")  # the checkpointer lets them wait, once it knows
    thread = threading.Thread(target=execute, args=(settings, *statements))
    try:
        thread.start()
        where = f"datname = '{settings.source}' AND wait_event = 'SyncRep' AND query NOT LIKE '%emit_message%'"
        eventually("the commit waits", lambda: rows(settings, f"SELECT FROM pg_stat_activity WHERE {where}"))
        yield
    finally:
        with psycopg.connect(settings.dsn, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = local")
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
        thread.join()


@pytest.fixture
def three(settings: Settings) -> Settings:
    """A table of three rows."""
    prepare(settings, ITEMS, "INSERT INTO items VALUES (1, 1), (2, 2), (3, 3)")
    return settings


CHANGE = "BEGIN; UPDATE items SET no = 100 WHERE id = 1; DELETE FROM items WHERE id = 2; INSERT INTO items VALUES (4, 4); COMMIT"


def held(running: Running, settings: Settings) -> None:
    """Wait until the log has the change that nobody sees, and check that nobody does."""
    eventually("the stream has it", lambda: b'{"id":4}' in replay(settings, T))
    assert rows(settings, "SELECT * FROM items ORDER BY id") == [(1, 1), (2, 2), (3, 3)]
    assert running.error is None


def equal(settings: Settings) -> None:
    """The log is what became visible; no row was written that the change had replaced."""
    assert (
        replay(settings, T)
        == selected(settings, T)
        == {b'{"id":%d}' % i: {"id": i, "no": no} for i, no in ((1, 100), (3, 3), (4, 4))}
    )
    written = [c for c in changes(settings, T) if c.read == "resnapshot"]
    assert {c.key for c in written} == {b'{"id":3}'}


def test_committed_before_the_low_watermark_and_seen_after_the_high_one(three: Settings) -> None:
    with capturing(three) as capture:
        capture.hear("streaming")
        with waiting(three, CHANGE):
            held(capture, three)
            ask(three, tables=[T])
            eventually("it was read", lambda: jobs(three)[T]["phase"] == "done")
            assert rows(three, "SELECT * FROM items ORDER BY id") == [(1, 1), (2, 2), (3, 3)]
        capture.reach()
    equal(three)


def test_the_same_after_capture_was_started_anew(three: Settings) -> None:
    """What an earlier capture streamed is known from the log alone."""
    with capturing(three) as capture:
        capture.hear("streaming")
        capture.reach()
        with waiting(three, CHANGE):
            held(capture, three)
            capture.stop()
            with capturing(three) as again:
                again.hear("streaming")
                ask(three, tables=[T])
                eventually("it was read", lambda: jobs(three)[T]["phase"] == "done")
                assert rows(three, "SELECT * FROM items ORDER BY id") == [(1, 1), (2, 2), (3, 3)]
    with capturing(three) as capture:
        capture.reach()
    equal(three)


def test_a_table_that_joins_waits_for_what_committed_before(settings: Settings) -> None:
    """Its commit is before the table was published, so the stream never has it: it is read only when it can be seen."""
    prepare(settings, ITEMS)
    execute(settings, "CREATE TABLE late (id int PRIMARY KEY)")
    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        with waiting(settings, "INSERT INTO late VALUES (1)"):
            join = f"SET synchronous_commit = local; ALTER PUBLICATION {settings.publication} ADD TABLE late"
            execute(settings, join)
            waits = "waits for transactions that began before it"
            eventually("it waits", lambda: jobs(settings).get("public.late", {}).get("reason") == waits)
        done(settings, capture, "public.late")
    assert replay(settings, "public.late") == selected(settings, "late") == {b'{"id":1}': {"id": 1}}


def test_a_table_that_was_cancelled_while_it_waited_waits_again_when_it_is_asked_for(settings: Settings) -> None:
    """The row came while the table was not published, so the stream never has it."""
    prepare(settings, ITEMS, "CREATE TABLE others (id int PRIMARY KEY)")
    publication = f"ALTER PUBLICATION {settings.publication}"
    waits = "waits for transactions that began before it"
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as application:
        capture.hear("streaming")
        capture.reach()
        execute(settings, f"{publication} DROP TABLE items")
        application.execute("INSERT INTO items VALUES (1, 1)")
        execute(settings, f"{publication} ADD TABLE items")
        eventually("it waits", lambda: jobs(settings).get(T, {}).get("reason") == waits)
        assert ask(settings, "cancel") == {"jobs": [T]}
        assert jobs(settings)[T]["phase"] == "cancelled"
        assert ask(settings, tables=[T]) == {"jobs": [T]}
        again = eventually(
            "it is tried", lambda: (said := jobs(settings)[T])["reason"] + said["phase"] != "waiting" and said
        )
        assert again["reason"] == waits
        assert capture.reach().inexact == (T,)
        application.commit()
        done(settings, capture)
        assert capture.reach().inexact == ()
    assert replay(settings, T) == selected(settings, T) == {b'{"id":1}': {"id": 1, "no": 1}}


@pytest.mark.parametrize("what", ["append-only", "with a key"])
def test_an_empty_partition_that_comes_while_rows_are_read_lets_nothing_be_read_anew(
    settings: Settings, often: None, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Capture knows of it before it takes what was read: nothing has gone since. Where one came in every pass, none would end."""
    key, append_only = ("", ["parts"]) if what == "append-only" else ("PRIMARY KEY", list[str]())
    execute(settings, f"CREATE TABLE parts (id int {key}, n int) PARTITION BY RANGE (id)", LOW)
    execute(settings, "INSERT INTO parts VALUES (1, 1)")
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, [], "", append_only))
    passes, emit = list[str](), watermarks.emit

    def emitting(connection: catalog.Connection, which: str, mark: str) -> None:
        if which == watermarks.HIGH:
            passes.append(mark)
            oid = attach(settings, len(passes)) if len(passes) < 4 else ""
            eventually("capture has seen the partition", lambda: oid in fingerprint(settings, "public.parts"))
        emit(connection, which, mark)

    with capturing(settings) as capture:
        capture.hear("streaming")
        capture.reach()
        eventually("it was looked at", lambda: fingerprint(settings, "public.parts") != "null")
        monkeypatch.setattr(chunks.watermarks, "emit", emitting)
        ask(settings, tables=["public.parts"])
        done(settings, capture, "public.parts")
        execute(settings, "INSERT INTO parts VALUES (1001, 1)")
        capture.reach()
        capture.eventually("it is exact", lambda: capture.reach().inexact == ())
        assert len(passes) == 1
    assert len(replay(settings, "public.parts")) == 2


def attach(settings: Settings, number: int) -> str:
    """Make an empty partition, which waits for nobody who reads; return its oid."""
    bounds = f"FROM ({1000 * number}) TO ({1000 * number + 1000})"
    execute(
        settings,
        f"CREATE TABLE more{number} (LIKE parts INCLUDING ALL)",
        f"ALTER TABLE parts ATTACH PARTITION more{number} FOR VALUES {bounds}",
    )
    return str(rows(settings, f"SELECT 'more{number}'::regclass::oid")[0][0])
