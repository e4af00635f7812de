"""Capture's heartbeat (S4, S17): an idle source moves on, and lets the WAL of its neighbours go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import psycopg
import pytest

from headrace.change import format_lsn, parse_lsn
from headrace.log import Log
from headrace.settings import Settings
from tests.fixtures.capture import capturing, changes, eventually, execute, prepare, reached, rows
from tests.integration.test_resnapshot_order import waiting

ITEMS = "CREATE TABLE items (id int PRIMARY KEY, name text, n int)"
T = "public.items"


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
