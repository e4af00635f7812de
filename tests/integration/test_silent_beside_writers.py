"""DDL that changes rows without an event (S12) and locks no writer out: what is open then brings rows as they were before.

*(seen)* A transaction has written an 'a', which ALTER TYPE … RENAME VALUE calls 'z' beside it: the stream decodes 'a' when it commits.
"""

from __future__ import annotations

import threading

import psycopg
import pytest

from headrace.settings import Settings
from headrace_capture import resnapshot, watermarks
from headrace_capture.catalog import Connection
from tests.fixtures.capture import capturing, eventually, execute, prepare, replay, rows, selected
from tests.fixtures.resnapshots import ask, done, jobs
from tests.fixtures.silent import HIGH, LOW, PARTS, ROWS, T, fingerprint

pytestmark = pytest.mark.usefixtures("often")

ENUM = "CREATE TYPE mood AS ENUM ('a', 'b')", "CREATE TABLE items (id int PRIMARY KEY, n mood)"
PAIR = "CREATE TYPE pair AS (a int, b int)", "CREATE TABLE pairs (id int PRIMARY KEY, n pair)"
RENAME = "ALTER TYPE mood RENAME VALUE 'a' TO 'z'"
NAMES = ["public.items", "public.pairs", "public.parts"]
SHOWN = ("items", "(SELECT id, n::text FROM pairs)", "parts")
WAITS = "waits for transactions that began before it"


def test_what_was_open_over_the_ddl_is_over_before_the_tables_are_read_again(settings: Settings) -> None:
    prepare(settings, *ENUM, *PAIR, PARTS, LOW, HIGH, ROWS)
    detach = "ALTER TABLE parts DETACH PARTITION low CONCURRENTLY"
    thread = threading.Thread(target=execute, args=(settings, detach))
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as application:
        capture.reach()
        eventually("they were looked at", lambda: all(fingerprint(settings, name) != "null" for name in NAMES))
        for change in (
            "INSERT INTO items VALUES (9, 'a')",
            "INSERT INTO pairs VALUES (9, (1, 2))",
            "UPDATE parts SET n = -1",
        ):
            application.execute(change.encode())
        execute(settings, RENAME, "ALTER TYPE pair DROP ATTRIBUTE b")
        thread.start()
        eventually("it is detached", lambda: rows(settings, "SELECT FROM pg_inherits WHERE inhdetachpending"))
        eventually("they wait", lambda: [jobs(settings).get(name, {}).get("reason") for name in NAMES] == [WAITS] * 3)
        assert set(capture.reach().inexact) == set(NAMES)
        application.commit()
        done(settings, capture, *NAMES)
        assert capture.reach().inexact == ()
    thread.join()
    assert [replay(settings, name) for name in NAMES] == [selected(settings, shown) for shown in SHOWN]


def test_also_where_the_first_chunk_shows_the_ddl(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody asked for the table before the catalogue was looked at."""
    monkeypatch.setattr(resnapshot.Resnapshot, "_judge", lambda *_: None)
    prepare(settings, *ENUM)
    with capturing(settings) as capture, psycopg.connect(settings.dsn) as application:
        ask(settings, tables=[T])
        done(settings, capture)
        application.execute("INSERT INTO items VALUES (9, 'a')")
        execute(settings, RENAME)
        ask(settings, tables=[T])
        capture.eventually("it waits", lambda: jobs(settings)[T]["reason"] == WAITS)
        application.commit()
        done(settings, capture)
    assert replay(settings, T) == selected(settings, "items")


@pytest.mark.parametrize("nth", [1, 2], ids=["as it is first read", "as it was waited for"])
def test_what_ends_between_the_low_watermark_and_the_read_is_not_over(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """What is read sees it, and its record, which is as it was before, counts as the newer one."""
    prepare(settings, *ENUM)
    emit, lows = watermarks.emit, []
    with psycopg.connect(settings.dsn) as application:

        def emitting(connection: Connection, which: str, mark: str) -> None:
            emit(connection, which, mark)
            lows.extend([mark] * (which == watermarks.LOW))
            if len(lows) == nth:
                application.commit()

        monkeypatch.setattr(watermarks, "emit", emitting)
        with capturing(settings) as capture:
            capture.reach()
            eventually("it was looked at", lambda: fingerprint(settings, T) != "null")
            application.execute("INSERT INTO items VALUES (9, 'a')")
            execute(settings, RENAME)
            done(settings, capture)
    assert replay(settings, T) == selected(settings, "items") == {b'{"id":9}': {"id": 9, "n": "z"}}


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE items SET n = 'b' WHERE id = 1; ALTER TABLE items ALTER n TYPE text USING n::text || '!'",
        "INSERT INTO parts VALUES (9, 9) ON CONFLICT (id) DO UPDATE SET n = -1; TRUNCATE low",
        "UPDATE parts SET n = -1 WHERE id = 9; DROP TABLE low",
    ],
    ids=["written anew", "truncated", "dropped"],
)
def test_what_commits_with_the_ddl_between_the_low_watermark_and_the_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """What it wrote is newer than the watermark, but not than what is read, which has the DDL."""
    prepare(settings, *ENUM, "INSERT INTO items VALUES (1, 'a')", PARTS, LOW, HIGH, ROWS)
    table = "items" if "items" in change else "parts"
    emit, lows = watermarks.emit, []
    with psycopg.connect(settings.dsn) as application:

        def emitting(connection: Connection, which: str, mark: str) -> None:
            emit(connection, which, mark)
            lows.extend([mark] * (which == watermarks.LOW))
            if len(lows) == 1:
                application.commit()

        with capturing(settings) as capture:
            capture.reach()
            eventually("it was looked at", lambda: fingerprint(settings, f"public.{table}") != "null")
            monkeypatch.setattr(resnapshot.Resnapshot, "_judge", lambda *_: None)
            monkeypatch.setattr(watermarks, "emit", emitting)
            application.execute(change.encode())
            ask(settings, tables=[f"public.{table}"])
            done(settings, capture, f"public.{table}")
            assert capture.reach().inexact == ()
    assert replay(settings, f"public.{table}") == selected(settings, table)
