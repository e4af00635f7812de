"""WAL order is not visibility order (S7): a commit that waits for a standby is in the stream and not yet to be seen.

*(seen)* The stream has T's commit, then the low watermark; the chunk that is read between the watermarks still has the old row. Only the
chunk's own snapshot tells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from headrace.settings import Settings
from tests.fixtures.capture import Running, capturing, changes, eventually, execute, prepare, replay, rows, selected
from tests.fixtures.resnapshots import ask, done, jobs

T = "public.items"
ITEMS = "CREATE TABLE items (id int PRIMARY KEY, no int)"


@contextmanager
def waiting(settings: Settings, *statements: str) -> Iterator[None]:
    """Commit statements whose commit is in the WAL and not visible, until the block ends."""
    execute(settings, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'", "SELECT pg_reload_conf()")
    eventually("commits wait", lambda: rows(settings, "SHOW synchronous_standby_names") == [("nobody",)])
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
