"""Postgres 15, 17 and 18: what differs between them is known, and the log is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import psycopg
import pytest

from headrace.settings import Settings
from headrace_capture import catalog, setup, teardown
from headrace_capture.slot import slot_facts
from headrace_verify import postgres as verify
from tests.fixtures.capture import (
    Running,
    capturing,
    changes,
    execute,
    prepare,
    replay,
    rows,
    selected,
)

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, n int, big text, twice int GENERATED ALWAYS AS (n * 2) STORED)"
SOME = "INSERT INTO items SELECT i, i, repeat(md5(i::text), 200) FROM generate_series(1, 30) i"
SCRIPT = [
    "UPDATE items SET n = n + 1",
    "UPDATE items SET id = id + 100 WHERE id <= 10",
    "DELETE FROM items WHERE id BETWEEN 11 AND 15",
    "BEGIN; INSERT INTO items VALUES (500, 1, repeat('x', 9000)); SAVEPOINT s; DELETE FROM items; ROLLBACK TO s; COMMIT",
    "UPDATE items SET n = 0 WHERE id = 500",
]
T = "public.items"


ENDING = ["idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout"]
"""Settings that end a session; the last one came with 17."""


@pytest.mark.parametrize(
    "connect",
    [
        lambda settings: catalog.connect(settings.dsn),
        lambda settings: catalog.connect_replication(settings.dsn),
        verify.connect,
    ],
    ids=["statements", "replication", "verify"],
)
def test_s14_no_session_is_ended_for_taking_long(
    each_source: Settings, connect: Callable[[Settings], psycopg.Connection[Any]]
) -> None:
    """A snapshot, a transaction of the stream or a comparison takes as long as it takes, whatever the database sets for all others."""
    there = [name for name in ENDING if rows(each_source, f"SELECT FROM pg_settings WHERE name = '{name}'")]
    assert len(there) == 2 + (rows(each_source, "SHOW server_version_num") >= [("170000",)])
    database = each_source.dsn.rpartition("/")[2]
    execute(each_source, *[f"ALTER DATABASE {database} SET {name} = '1h'" for name in there])
    with closing(connect(each_source)) as connection:
        connection.rollback()
        assert {name: connection.execute(f"SHOW {name}".encode()).fetchone() for name in there} == dict.fromkeys(
            there, ("0",)
        )


def published(settings: Settings) -> list[str]:
    """Return the published columns."""
    with closing(catalog.connect(settings.dsn)) as connection:
        (table,) = catalog.published_tables(connection, settings.publication)
    return [column.name for column in table.published]


def test_snapshot_stream_and_resume_are_the_table(each_version: Settings) -> None:
    """With values out of line, a stored generated column (sent from 18 on), restarts, and TRUNCATE at the end."""
    settings = each_version
    prepare(settings, ITEMS, "ALTER TABLE items ALTER big SET STORAGE EXTERNAL", SOME)
    columns = published(settings)
    newest = rows(settings, "SHOW server_version_num") >= [(str(catalog.GENERATED),)]
    assert columns == ["id", "n", "big", *(["twice"] if newest else [])]
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, *SCRIPT)
        capture.reach()
    execute(settings, "UPDATE items SET n = 7 WHERE id > 20", "DELETE FROM items WHERE id = 500")
    with capturing(settings) as capture:
        capture.reach()
        wanted = {key: {name: row[name] for name in columns} for key, row in selected(settings, "items").items()}
        assert replay(settings, T) == wanted
        execute(settings, "TRUNCATE items", "INSERT INTO items (id) VALUES (1)")
        capture.reach()
    assert list(replay(settings, T)) == [b'{"id":1}']


def test_a_table_whose_key_is_not_sent_is_left_out_and_the_others_go_on(each_version: Settings) -> None:
    """A generated key, which is sent from 18 on; before, setup leaves the table out, and here somebody publishes it all the same."""
    settings = each_version
    mails = "CREATE TABLE mails (mail text, low text GENERATED ALWAYS AS (lower(mail)) STORED PRIMARY KEY)"
    prepare(settings, "CREATE TABLE items (id int PRIMARY KEY)", mails, "INSERT INTO mails (mail) VALUES ('A')")
    newest = rows(settings, "SHOW server_version_num") >= [(str(catalog.GENERATED),)]
    why = "low of its key is generated"
    with closing(catalog.connect(settings.dsn)) as connection:
        left = {left.table: left.reason for left in setup.plan(connection, settings, []).left_out}
    assert newest == (left == {})
    if not newest:
        assert left["public.mails"].startswith(why)
        execute(settings, f"ALTER PUBLICATION {settings.publication} ADD TABLE mails")
    with capturing(settings) as capture:
        capture.hear("streaming")
        execute(settings, "INSERT INTO mails (mail) VALUES ('B')", "UPDATE mails SET mail = 'C' WHERE mail = 'A'")
        execute(settings, "INSERT INTO items VALUES (1)")
        capture.reach()
        if not newest:
            capture.hear(f"public.mails is left out: {why}")
    assert list(replay(settings, T)) == [b'{"id":1}']
    assert not newest or replay(settings, "public.mails").keys() == {b'{"low":"b"}', b'{"low":"c"}'}


def test_a_snapshot_begins_again_with_a_new_slot(each_version: Settings) -> None:
    """The slot of the attempt that was stopped is dropped, once nobody uses it."""
    settings = each_version
    prepare(settings, ITEMS, SOME)
    with psycopg.connect(settings.dsn) as open_:
        open_.execute("UPDATE items SET n = 1")
        running = Running(settings)  # waits for the open transaction
        running.hear("making slot")
        running.stop()
    execute(settings, "DELETE FROM items WHERE id < 5")
    with capturing(settings) as capture:
        capture.reach()
    assert len(replay(settings, T)) == 26
    assert {change.op for change in changes(settings, T)} == {"r"}


def test_setup_and_teardown_leave_nothing(each_source: Settings) -> None:
    settings = each_source
    execute(settings, ITEMS, "CREATE TABLE slim (id int PRIMARY KEY)")
    before = rows(
        settings, "SELECT relname, relreplident::text FROM pg_class WHERE relname IN ('items', 'slim') ORDER BY 1"
    )
    with closing(catalog.connect(settings.dsn)) as connection:
        setup.apply(connection, setup.plan(connection, settings, []))
        assert setup.plan(connection, settings, []).statements == []
        execute(settings, SOME, "UPDATE items SET n = 2", "DELETE FROM items")
        execute(settings, f"SELECT pg_create_logical_replication_slot('{settings.slot}', 'pgoutput')")
        assert slot_facts(settings)["wal_status"] == "reserved"
        teardown.run(connection, settings, teardown.plan(connection, settings))
    assert (
        rows(settings, "SELECT relname, relreplident::text FROM pg_class WHERE relname IN ('items', 'slim') ORDER BY 1")
        == before
    )
    assert not slot_facts(settings)["exists"]


@pytest.mark.parametrize("kind", ["STORED", "VIRTUAL"])
def test_no_statement_fails_because_of_a_generated_column(each_source: Settings, kind: str) -> None:
    """Virtual ones are of 18; what a server sends of stored ones, and what FULL then breaks, differs (S8)."""
    settings = each_source
    virtual = rows(settings, "SHOW server_version_num") >= [(str(catalog.GENERATED),)]
    if kind == "VIRTUAL" and not virtual:
        with pytest.raises(psycopg.errors.SyntaxError):
            execute(settings, ITEMS.replace("STORED", kind))
        return
    prepare(settings, ITEMS.replace("STORED", kind), SOME)
    execute(settings, "UPDATE items SET n = 5", "UPDATE items SET id = -id", "DELETE FROM items")
    assert ("twice" in published(settings)) == (kind == "STORED" and virtual)
